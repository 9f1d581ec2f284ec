"""Kill a run at random moments; whatever is left must be whole, and the next run must end well.

`python -m pytest tests/faults --kills 100 -s` takes a quarter of an hour and tells where the kills fell; the default
suite kills a few.
"""

import collections
import itertools
import json
import random
import time
from pathlib import Path

import pytest
import torch
from runs import Run

from compress import load_compressed

SEEDS = 3
FLAGS = ("--seeds", str(SEEDS), "--keep", "unit:50")
CSV, MODEL, KEPT = "p/digits_accuracy_sparsity.csv", "m/digits_model.bin", "m/digits_unit_50.bin"


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def check_whole(folder: Path, expected: Path) -> None:
    """Every file is a temporary one, or bears its final name and is whole: the numbers are the undisturbed run's."""
    for name in names(folder):
        path = folder / name
        if path.suffix == ".png":
            assert path.read_bytes()[-12:-4] == b"\0\0\0\0IEND"
        elif name == KEPT:
            assert load_compressed(path)[0].sizes == (784, 500, 500, 250, 100, 10)
        elif name == MODEL:
            state, undisturbed = (torch.load(where / MODEL, weights_only=True) for where in (folder, expected))
            assert all(torch.equal(state[name], undisturbed[name]) for name in undisturbed)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix != ".tmp":
            assert name == CSV and path.read_bytes() == (expected / CSV).read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """What a whole run writes, and the seconds that it takes."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run = Run(folder, *FLAGS)
    assert run.prints("k %")  # before that it may have to wait for imports
    started = time.perf_counter()
    assert run.end() == 0, run.errors
    return folder, time.perf_counter() - started


def kill(run: Run, folder: Path) -> str:
    """Kill a run; returns what it was doing."""
    run.process.kill()
    run.end()
    saved = [path.name.lstrip(".").split(".")[0] for path in folder.rglob("*.tmp")]
    if saved:
        return f"saving {saved[0]}"
    if run.process.exitcode == 0:
        return "nothing any more"
    if "k %" not in run.output:
        return "starting"
    return "reporting" if "flat up to" in run.output else "training and sweeping"


def finished_seeds(folder: Path) -> int:
    return len(list(folder.rglob("*seed?.json")))


def check_next(run: Run, folder: Path, expected: Path, finished: int) -> None:
    """The run after a kill ends well, does no finished seed again, and leaves nothing but the results."""
    assert run.end() == 0, run.errors
    check_whole(folder, expected)
    assert names(folder) == names(expected)
    assert run.output.count("is taken from") == finished
    assert run.output.count("Epoch:1/1") == SEEDS - finished


def test_a_killed_run_leaves_whole_files_and_the_next_one_ends_well(undisturbed, tmp_path, request):
    """Every second kill falls into a save, which takes a small part of the time only."""
    expected, duration = undisturbed
    fell: collections.Counter[str] = collections.Counter()
    resumed, moment = 0, random.Random(0)
    kills = request.config.getoption("--kills")
    for number in itertools.takewhile(lambda _: fell.total() < kills, itertools.count()):
        folder = tmp_path / str(number)
        run = Run(folder, *FLAGS)
        if number % 2:
            time.sleep(moment.uniform(0, duration))
        else:
            kind = moment.choice(["*.bin", "*.json", "*.csv", "*.png"])
            run.wait_for(lambda folder=folder, kind=kind: any(folder.rglob(f".{kind}.*.tmp")))
            time.sleep(moment.uniform(0, 0.004))
        if (doing := kill(run, folder)) != "nothing any more":
            fell[doing] += 1
        check_whole(folder, expected)
        finished = finished_seeds(folder)
        check_next(Run(folder, *FLAGS), folder, expected, finished)
        resumed += finished
    print(f"\nkilled while {dict(fell.most_common())}; {resumed} seeds were not trained again")


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(undisturbed, tmp_path, request):
    expected, duration = undisturbed
    folder, moment = tmp_path / "run", random.Random(0)
    finished = [0]
    for number in range(max(2, request.config.getoption("--kills") // 20)):
        run = Run(folder, *FLAGS)
        if number == 0:
            assert run.prints("seed 1,")  # so that one is finished
        left = SEEDS - finished[-1] if number else 1
        time.sleep(moment.uniform(0, duration * left / SEEDS))
        fell = kill(run, folder)
        check_whole(folder, expected)
        print(f"killed while {fell}, {finished[-1]} seeds were not trained again")
        assert run.output.count("Epoch:1/1") <= SEEDS - finished[-1]
        finished.append(finished_seeds(folder))
    assert finished[1] > 0
    check_next(Run(folder, *FLAGS), folder, expected, finished[-1])
