"""Kill a real run at random moments; whatever is left must be whole, and the next run must end well.

`python -m pytest tests/faults --kills 100` takes a quarter of an hour; the default suite kills a few.
"""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from compress import load_compressed

FLAGS = ["--dataset", "digits", "--epochs", "1", "--k", "50", "90", "--seeds", "3", "--keep", "unit:50"]
CSV, MODEL, KEPT = "digits_accuracy_sparsity.csv", "digits_model.bin", "digits_unit_50.bin"


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "src/train.py"), *FLAGS, "--models", str(folder), "--plots", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def check_whole(folder: Path, expected: Path) -> None:
    """Every file bears its final name and is whole, or is a temporary one; the numbers are the undisturbed run's."""
    for path in folder.rglob("*"):
        if path.is_dir() or path.name.endswith(".tmp"):
            continue
        if path.suffix == ".png":
            assert path.read_bytes()[-12:-4] == b"\0\0\0\0IEND"
        elif path.name == KEPT:
            assert load_compressed(path)[0].sizes == (784, 500, 500, 250, 100, 10)
        elif path.name == MODEL:
            state, undisturbed = (torch.load(where / MODEL, weights_only=True) for where in (folder, expected))
            assert all(torch.equal(state[name], undisturbed[name]) for name in undisturbed)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert path.name == CSV and path.read_bytes() == (expected / CSV).read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    folder = tmp_path_factory.mktemp("undisturbed")
    started = time.perf_counter()
    run = start(folder)
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    return folder, time.perf_counter() - started


def test_a_killed_run_leaves_whole_files_and_the_next_one_ends_well(undisturbed, tmp_path, request):
    expected, duration = undisturbed
    kills, trained, moment = request.config.getoption("--kills"), 0, random.Random(0)
    for kill in range(kills):
        folder = tmp_path / str(kill)
        run = start(folder)
        time.sleep(moment.uniform(0, duration))
        run.kill()
        first, _ = run.communicate()
        if folder.exists():
            check_whole(folder, expected)
        again = start(folder)
        second, errors = again.communicate()
        assert again.returncode == 0, errors
        check_whole(folder, expected)
        assert {path.name for path in folder.rglob("*")} == {path.name for path in expected.rglob("*")}
        resumed = second.count("is taken from")
        if "flat up to" not in first:  # from then on the run is whole, and what it kept of its seeds goes away
            assert resumed >= first.count("swept in") - 1  # the last of them may not have been on disk yet
        assert second.count("Epoch:1/1") == 3 - resumed
        trained += resumed
    print(f"{kills} kills, {trained} seeds were not trained again")
