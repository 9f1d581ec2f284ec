"""Kill a run at random moments; whatever is left must be whole, and the next run must end well.

`python -m pytest tests/faults/test_kills.py --kills 100 -s` takes some minutes and tells where the kills fell; the
default suite kills a few. Every folder holds the results of an earlier run with another seed, which are replaced.
"""

import collections
import functools
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from conftest import ROOT
from runs import Run, flags_for

from files import load_model

SEEDS = 3
FLAGS = ["--seeds", str(SEEDS), "--keep", "unit:50", "--precision", "fp32"]
FLAGS += ["--models", "m", "--plots", "p"]  # relative: the same JSON anywhere
MODEL, ABOUT = "m/digits_model.bin", "m/digits_model.json"
WRITES = {  # temporary files bear the names of what they become
    **{name: f".{name}.*.tmp" for name in ("digits_model.bin", "digits_model.json", "digits_accuracy_sparsity.csv")},
    **{name: f".{name}.*.tmp" for name in ("digits_accuracy_sparsity.png", "digits_accuracy_weights.png")},
    "progress": ".digits_accuracy_sparsity_seed*.tmp", "kept network": ".digits_unit_50.bin.*.tmp",
}  # fmt: skip


def start(folder: Path, *flags: str) -> Run:
    return Run(folder, *FLAGS, *flags, faults=(functools.partial(os.chdir, folder),))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its name, but temporary ones and those of finished seeds."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".tmp", ".unfinished")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def finished_seeds(folder: Path) -> int:
    """Seeds whose rows are on disk, each whole."""
    paths = list((folder / "p").glob("digits_accuracy_sparsity_seed_*.unfinished"))
    assert all(len(json.loads(path.read_text().splitlines()[1])) == 6 for path in paths)
    return len(paths)


def check_whole(folder: Path, old: dict[str, bytes], new: dict[str, bytes]) -> int:
    """Every file is as one of the two runs wrote it, and a pair that disagrees is noticed; returns finished seeds."""
    left = contents(folder)
    finished = finished_seeds(folder)
    for name, content in left.items():
        assert content in (old[name], new[name]), name
    assert left.keys() == new.keys()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load_model(folder / MODEL)
    agree = (left[MODEL] == new[MODEL]) == (left[ABOUT] == new[ABOUT])
    assert len(told) == (0 if agree else 1)
    return finished


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes], dict[str, bytes], float]:
    """A folder as an earlier run left it; its files; those of the run that is killed; how many seconds that takes."""
    folder = tmp_path_factory.mktemp("versions") / "run"
    folder.mkdir()
    earlier = start(folder, "--seed", "7")
    assert earlier.end() == 0, earlier.errors
    later = folder.with_name("later")
    shutil.copytree(folder, later)
    run = start(later)
    assert run.prints("training in")  # before that it may have to wait for imports
    started = time.perf_counter()
    assert run.end() == 0, run.errors
    old, new = contents(folder), contents(later)
    assert old.keys() == new.keys() and all(old[name] != new[name] for name in old if not name.endswith(".png"))
    return folder, old, new, time.perf_counter() - started


def kill(run: Run, folder: Path) -> str:
    """Kill a run; returns what it was doing."""
    run.process.kill()
    run.end()
    if run.process.exitcode == 0:
        return "nothing any more"
    if "training in" not in run.output:
        return "starting"
    if saved := [name for name, pattern in WRITES.items() if any(folder.rglob(pattern))]:
        return f"saving {saved[0]}"
    return "reporting" if "dense:" in run.output else "training and sweeping"


def check_next(run: Run, folder: Path, new: dict[str, bytes], finished: int) -> None:
    """The run after a kill ends well, as a whole one; it does no finished seed again."""
    assert run.end() == 0, run.errors
    assert contents(folder) == new
    assert run.output.count("Epoch:1/1") == SEEDS - finished


def kill_before_the_imports(folder: Path, seconds: float) -> None:
    with subprocess.Popen(
        [sys.executable, str(ROOT / "src/train.py"), *flags_for(folder, *FLAGS)], cwd=folder, stdout=subprocess.DEVNULL
    ) as process:
        time.sleep(seconds)
        process.kill()


def test_a_killed_run_leaves_whole_files_and_the_next_one_ends_well(versions, tmp_path, request):
    """Every second kill falls into a write, which takes a small part of the time only."""
    before, old, new, duration = versions
    fell: collections.Counter[str] = collections.Counter()
    resumed, moment = 0, random.Random(0)
    kills = request.config.getoption("--kills")
    for number in itertools.takewhile(lambda _: fell.total() < kills, itertools.count()):
        folder = tmp_path / str(number)
        shutil.copytree(before, folder)
        if number % 20 == 19:
            kill_before_the_imports(folder, moment.uniform(0, 2))
            assert contents(folder) == old
            fell["importing"] += 1
            continue
        run = start(folder)
        if number % 2:
            time.sleep(moment.uniform(0, duration))
        else:
            written = WRITES[moment.choice([*WRITES])]
            run.wait_for(lambda folder=folder, written=written: any(folder.rglob(written)))
            time.sleep(moment.uniform(0, 0.002))
        if (doing := kill(run, folder)) != "nothing any more":
            fell[doing] += 1
        finished = check_whole(folder, old, new)
        check_next(start(folder), folder, new, finished)
        resumed += finished
        shutil.rmtree(folder)
    print(f"\nkilled while {dict(fell.most_common())}; {resumed} seeds were not trained again")


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(versions, tmp_path, request):
    before, old, new, duration = versions
    folder, moment = tmp_path / "run", random.Random(0)
    shutil.copytree(before, folder)
    finished = [0]
    for number in range(max(2, request.config.getoption("--kills") // 10)):
        run = start(folder)
        if number == 0:
            assert run.wait_for(lambda: any(folder.rglob("*_seed_1.unfinished")))  # so that one is finished
        else:
            time.sleep(moment.uniform(0, duration * (SEEDS - finished[-1] + 1) / SEEDS))
        fell = kill(run, folder)
        print(f"killed while {fell}, {finished[-1]} seeds were not trained again")
        assert run.output.count("Epoch:1/1") <= SEEDS - finished[-1]
        finished.append(check_whole(folder, old, new))
    assert finished[1] > 0
    check_next(start(folder), folder, new, finished[-1])
