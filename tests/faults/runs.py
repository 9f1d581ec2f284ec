"""Runs of train.py in processes of their own, forked from one that has imported torch, so that they start at once."""

import itertools
import multiprocessing
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT
from matplotlib.figure import Figure
from tqdm import tqdm

import costs
import engine
import model
import utils

FORKS = multiprocessing.get_context("forkserver")  # which imports these, and does nothing else, in a single thread
FORKS.set_forkserver_preload(["torch", "tqdm", "matplotlib.backends.backend_agg", "pytest"])
NUMBER = itertools.count()
SMALL = (784, 40, 20, 10)


class SmallNetwork(model.NeuralNetwork):
    def __init__(self, sizes: tuple[int, ...] = SMALL) -> None:
        super().__init__(sizes)


def empty_plot(*_: object) -> Figure:
    return Figure((1, 1))


def fp32(*_: object) -> str:
    return "fp32"


def be_small() -> None:
    """A small network, empty plots and no search for the fastest precision, in the run that follows."""
    engine.pick_precision = fp32
    model.NeuralNetwork, model.SIZES = SmallNetwork, SMALL  # type: ignore[misc]
    utils.plot_accuracy_sparsity = utils.plot_accuracy_weights = costs.plot_cost_sparsity = empty_plot
    costs.ROUNDS, costs.ROUND_SECONDS = 1, 1e-3


def flags_for(folder: Path, *flags: str) -> list[str]:
    """A quick run on the digits that writes into m/ and p/ of a folder."""
    quick = ["--dataset", "digits", "--k", "90", *(() if "--model" in flags else ("--epochs", "1"))]
    return [*quick, "--models", str(folder / "m"), "--plots", str(folder / "p"), *flags]


class Run:
    """A run of train.py that has just been started.

    Args:
        folder: where it writes; its output goes to files beside it.
        flags: added to those of `flags_for`.
        faults: what befalls the process before the run: functions of a module, perhaps in a functools.partial.
        small: whether the network and the plots are those of `be_small`.
    """

    def __init__(
        self, folder: Path, *flags: str, faults: tuple[Callable[[], object], ...] = (), small: bool = True
    ) -> None:
        self.log = folder.with_name(f"{folder.name}.{next(NUMBER)}")
        befalls = (be_small, *faults) if small else faults
        self.process = FORKS.Process(target=_run, args=(flags_for(folder, *flags), self.log, befalls), daemon=True)
        self.process.start()

    @property
    def output(self) -> str:
        path = Path(f"{self.log}.output")
        return path.read_text(encoding="utf-8") if path.exists() else ""  # killed before it printed anything

    @property
    def errors(self) -> str:
        return Path(f"{self.log}.errors").read_text(encoding="utf-8")

    def wait_for(self, happens: Callable[[], object]) -> bool:
        """Whether something happens before the run ends; FileNotFoundError means not yet."""
        while self.process.is_alive():
            try:
                if happens():
                    return True
            except FileNotFoundError:
                pass
            time.sleep(1e-4)
        return False

    def prints(self, text: str) -> bool:
        return self.wait_for(lambda: text in self.output)

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self) -> int:
        """The exit status, negative for the signal that ended it."""
        self.process.join(timeout=120)
        assert self.process.exitcode is not None, "it hangs"
        return self.process.exitcode


def _run(flags: list[str], log: Path, faults: tuple[Callable[[], object], ...]) -> None:
    for descriptor, kind in ((1, "output"), (2, "errors")):
        os.dup2(os.open(f"{log}.{kind}", os.O_WRONLY | os.O_CREAT), descriptor)
    tqdm.set_lock(threading.RLock())  # its own lock is shared between processes, and outlives one that is killed
    for fault in faults:
        fault()
    if sys.stdout is not None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    if sys.stderr is not None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1)
    sys.argv = ["train.py", *flags]
    try:
        runpy.run_path(str(ROOT / "src" / "train.py"), run_name="__main__")
    except SystemExit:
        sys.stdout = sys.stderr = None  # multiprocessing would end with another status if it could not flush them
        raise
