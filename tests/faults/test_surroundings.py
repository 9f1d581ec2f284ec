"""What a user's machine does to a run: signals, pipes, folders, disks, locales, other people's files."""

import csv
import errno
import functools
import os
import pickle
import pty
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from matplotlib.figure import Figure
from runs import SMALL, Run, SmallNetwork, empty_plot, flags_for, fp32

import data
import system
import train
import utils
from compress import save_compressed
from files import load_model
from model import NeuralNetwork

CSV = "p/digits_accuracy_sparsity.csv"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs within this process, too, have a small network and empty plots."""
    monkeypatch.setattr(train, "NeuralNetwork", SmallNetwork)
    monkeypatch.setattr(train, "SIZES", SMALL)
    monkeypatch.setattr(utils, "plot_accuracy_sparsity", empty_plot)
    monkeypatch.setattr(utils, "plot_accuracy_weights", empty_plot)
    monkeypatch.setattr(train, "pick_precision", fp32)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # exit_status is for whole programs


def good_model(folder: Path) -> Path:
    path = folder / "model.bin"
    torch.save(NeuralNetwork((784, 30, 10)).state_dict(), path)
    return path


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main(folder: Path, *flags: str) -> int:
    return system.exit_status(lambda: train.main(flags_for(folder, *flags)))


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on stderr."""
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("train.py: error: "), captured.err
    return captured.err


# ── signals ──


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_a_line_that_says_how_to_go_on(number, status, tmp_path):
    run = Run(tmp_path / "run", "--seeds", "1000")
    assert run.wait_for(lambda: run.output.count("Epoch") > 1)
    run.signal(number)
    assert run.end() == status
    assert run.errors == f"\n{system.STOPPED}\n"
    assert len(list((tmp_path / "run/p").glob("digits_accuracy_sparsity_seed_*.unfinished"))) >= 1


DURING_THE_IMPORTS = """
import signal, sys
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "torch": signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Slow())
sys.argv = ["train.py"]
import runpy; runpy.run_path("src/train.py", run_name="__main__")
"""


def test_a_signal_during_the_imports_is_no_traceback():
    done = subprocess.run([sys.executable, "-c", DURING_THE_IMPORTS], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, f"\n{system.STOPPED}\n")


# ── nobody reads ──


def open_on(path: str, *streams: int) -> None:
    for stream in streams:
        os.dup2(os.open(path, os.O_WRONLY), stream)


def close(*streams: int) -> None:
    for stream in streams:
        os.close(stream)
        setattr(sys, ("stdout", "stderr")[stream - 1], None)


def die_as_a_terminal() -> None:
    """As under nohup, or in a shell that ignores SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ours, theirs = pty.openpty()
    for stream in (1, 2):
        os.dup2(theirs, stream)
    os.close(ours)
    os.close(theirs)


FAULTS = {
    "both closed": functools.partial(close, 1, 2), "both full": functools.partial(open_on, "/dev/full", 1, 2),
    "terminal gone": die_as_a_terminal,
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_that_nobody_can_read_still_writes_its_files(fault, tmp_path):
    flags = ("--k", "100", "--costs")  # emptied layers are warned of, and costs have a bar
    run = Run(tmp_path / "run", *flags, faults=(FAULTS[fault],))
    assert run.end() == 0, run.errors
    written = {path.name for path in (tmp_path / "run").rglob("*.*")}
    assert written == {
        *("digits_model.bin", "digits_model.json", "digits_cost_sparsity.csv", "digits_cost_sparsity.png"),
        *(f"digits_accuracy_{name}" for name in ("sparsity.csv", "sparsity.png", "weights.png")),
    }  # fmt: skip


def test_a_closed_pipe_does_not_end_the_run_and_a_log_file_gets_no_bar(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    run = Run(tmp_path / "run", faults=(functools.partial(open_on, str(tmp_path / "pipe"), 1),))
    with (tmp_path / "pipe").open() as reader:  # `| head -1`
        assert reader.readline()
    assert run.end() == 0
    assert run.errors == ""  # where a terminal would have the bar
    assert (tmp_path / "run" / CSV).exists()


# ── how it is started ──

STARTS = [["src/train.py"], ["-m", "src.train"], ["-I", "src/train.py"], ["-P", "src/train.py"]]


@pytest.mark.parametrize("start", STARTS, ids=" ".join)
def test_it_starts_however_python_is_told_to(start):
    """Its own modules are found; torch and all else is found as ever."""
    done = subprocess.run([sys.executable, *start, "--epochs", "0"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "train.py: error: argument --epochs: must be a whole number from 1 to 1000000000, got '0'\n"


def test_a_strange_shell_and_a_source_tree_that_is_left_alone(tmp_path):
    """A log file for a terminal, a C locale, no display, paths of all kinds, a link, and sources that are read-only."""
    odd, log = tmp_path / "a b\nc ö 数", tmp_path / "log"
    tree = odd / "tree"
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "inputs").mkdir()
    shutil.copy(ROOT / "inputs" / "digits.npz", tree / "inputs")
    for path in (tree, *tree.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)  # root may write nevertheless
    (tmp_path / "train").symlink_to(tree / "src" / "train.py")
    unset = ("DISPLAY", "LANG", "LC_CTYPE", "PYTHONIOENCODING")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-P", "-B", str(tmp_path / "train"), *flags_for(odd, "--model", str(good_model(odd)))]
    with log.open("w") as stream:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.PIPE, env=environment, cwd=tmp_path
        )
    assert (done.returncode, done.stderr) == (0, b"")
    text = log.read_text(encoding="ascii")
    assert "c ?? ???" in text  # the path, as far as this locale has its letters
    assert {path.name for path in odd.iterdir()} == {"tree", "m", "p", "model.bin"}
    assert (odd / CSV).exists()
    assert {path.name for path in tree.iterdir()} == {"src", "inputs"}
    for folder in (tree, tree / "src", tree / "inputs"):
        folder.chmod(0o755)  # for whoever tidies up


def test_two_runs_at_once_both_end_well(tmp_path):
    runs = [Run(tmp_path / "run", "--seeds", "2") for _ in range(2)]
    assert [run.end() for run in runs] == [0, 0], [run.errors for run in runs]
    left = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(left) == 5 and not [path for path in left if path.name.startswith(".")]
    with warnings.catch_warnings(action="error"):
        load_model(tmp_path / "run/m/digits_model.bin")


# ── folders and disks ──


@pytest.mark.parametrize("folder", ["--models", "--plots"])
def test_a_file_in_a_folders_place_is_told_before_any_training(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path(os.devnull)):
        assert main(tmp_path, folder, str(place)) == 1
        assert str(place) in one_line(capsys)
    assert (tmp_path / "file").read_text() == "mine"


def be_nobody() -> None:
    "".encode("cp437")  # for the digits' archive: who is nobody may not read Python's own files
    if os.geteuid() == 0:  # to root everything is writable
        os.seteuid(65534)


def test_a_folder_that_cannot_be_written_to_is_told_before_any_training():
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are private
        Path(place).chmod(0o755)
        folder = Path(place) / "run" / "p"
        folder.mkdir(parents=True)
        folder.chmod(0o555)
        folder.parent.chmod(0o777)
        run = Run(folder.parent, faults=(be_nobody,))
        assert run.end() == 1
        assert str(folder) in run.errors and run.errors.count("\n") == 1
        assert run.output == ""


LARGEST = {  # file in bytes → what is written after all, and what is named
    50_000: (0, "m/digits_model.bin"), 50: (0, "digits_accuracy_sparsity.csv"), 800: (1, "p/digits_accuracy_sparsity"),
}  # fmt: skip


@pytest.mark.parametrize("size", LARGEST)
def test_a_full_disk_leaves_the_old_files_whole_and_the_rows_first(size, tmp_path, capsys, monkeypatch):
    """Files cannot grow past a size; matplotlib's empty figures take more than a CSV file."""
    monkeypatch.setattr(utils, "plot_accuracy_sparsity", lambda *_: Figure((4, 4)))
    written, named = LARGEST[size]
    old = [tmp_path / "m/digits_model.bin", tmp_path / CSV, tmp_path / "p/digits_accuracy_sparsity.png"]
    for path in old:
        path.parent.mkdir(exist_ok=True)
        path.write_text("old")
    flags = ["--model", str(good_model(tmp_path))] if size < 50_000 else []
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        assert main(tmp_path, *flags) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    *_, message = capsys.readouterr().err.splitlines()
    assert named in message and os.strerror(errno.EFBIG) in message
    assert sum(path.read_bytes() != b"old" for path in old) == written == (old[1].read_bytes() != b"old")
    assert not list(tmp_path.rglob(".*"))


# ── memory ──


def have_little_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="there is no /proc")
def test_a_machine_without_memory_is_told_in_one_line(tmp_path):
    run = Run(tmp_path / "run", "--batch-size", "1437", small=False, faults=(have_little_memory,))
    assert run.end() == 1
    assert run.errors.startswith("train.py: error: out of memory") and "--batch-size" in run.errors
    assert run.errors.count("\n") == 1


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
]  # fmt: skip


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: type(error).__name__)
def test_memory_that_ends_is_told_with_what_to_set(error, capsys):
    def full() -> int:
        raise error

    assert system.exit_status(full) == 1
    message = one_line(capsys)
    assert "--batch-size" in message and "--device cpu" in message


# ── data that cannot be had ──


def test_without_mnist_the_run_ends_or_says_that_digits_took_its_place(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "MIRRORS", ())
    inputs = tmp_path / "not" / "there"
    assert main(tmp_path, "--inputs", str(inputs), "--dataset", "mnist") == 1
    assert "train-images-idx3-ubyte" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.*"))
    model = good_model(tmp_path)
    assert main(tmp_path, "--inputs", str(inputs), "--dataset", "auto", "--model", str(model)) == 0
    assert capsys.readouterr().out.count("These are NOT MNIST results") == 2
    assert {path.name.partition("_")[0] for path in (tmp_path / "p").iterdir()} == {"digits"}
    assert data.load("digits", inputs).fallback_reason == ""


# ── files from strangers ──


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def spoil(path: Path, **changed: object) -> None:
    torch.save({**torch.load(path, weights_only=True), **changed}, path)


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


NO_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "No such file"),
    "a folder": (make_a_folder, "is no regular file"),
    "a pipe": (make_a_pipe, "is no regular file"),
    "malicious": (
        lambda path: path.write_bytes(pickle.dumps(Malicious(path.with_name("executed")))), "is damaged, not from",
    ),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-2000]), "is damaged, not from"),
    "a whole model": (lambda path: torch.save(NeuralNetwork((784, 30, 10)), path), "is damaged, not from"),
    "sparse": (lambda path: spoil(path, **{"fc1.weight": torch.eye(30, 784).to_sparse()}), "model.bin"),
    "too large for float32": (
        lambda path: spoil(path, **{"fc2.weight": torch.full((10, 30), 1e300, dtype=torch.float64)}), "fc2.weight",
    ),
    "another layer": (lambda path: spoil(path, **{"conv.weight": torch.ones(1, 1, 3, 3)}), "expected fc1.weight"),
    "a name with control characters": (lambda path: spoil(path, **{"\x1b[31mred\n": torch.ones(1)}), "x1b[31mred"),
    "another width": (lambda path: spoil(path, **{"fc2.weight": torch.ones(7, 30)}), "from 784 to 7 values"),
    "another input": (lambda path: spoil(path, **{"fc1.weight": torch.ones(30, 100)}), "from 100 to 10 values"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_MODELS)
def test_a_bad_model_file_is_told_in_one_line(kind, tmp_path, capsys):
    path, (write, words) = good_model(tmp_path), NO_MODELS[kind]
    write(path)
    assert main(tmp_path, "--model", str(path)) == 1
    message = one_line(capsys)
    assert words in message and "model.bin" in message and "\x1b" not in message
    assert "weights_only" not in message  # torch advises to switch it off
    assert not (tmp_path / "executed").exists() and not list((tmp_path / "p").iterdir())


@pytest.mark.parametrize("kind", ["state_dict", "compressed", "eight bits"])
def test_files_of_torch_save_and_kept_ones_are_taken(kind, tmp_path):
    path = good_model(tmp_path)
    state = torch.load(path, weights_only=True)
    if kind == "compressed":
        save_compressed(state, path)
    elif kind == "eight bits":
        torch.save({name: weight.to(torch.float8_e4m3fn) for name, weight in state.items()}, path)
    assert main(tmp_path, "--model", str(path)) == 0
    assert kind == "eight bits" or int(read_rows(tmp_path / CSV)[0]["weights_kept"]) == 30 * 794


# ── settings that only the machine, the network or the training can refuse ──


@pytest.mark.parametrize("flags", [("--skip", "fc9"), ("--skip", "*")])
def test_layers_that_are_not_there_and_nothing_to_prune_are_told_before_training(flags, tmp_path, capsys):
    assert main(tmp_path, *flags) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_divergence_is_told_and_earlier_files_stay(tmp_path, capsys):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "digits_model.bin").write_text("old")
    assert main(tmp_path, "--learning-rate", "1e6", "--epochs", "7") == 1
    assert "try a lower learning rate" in one_line(capsys)
    assert (tmp_path / "m" / "digits_model.bin").read_text() == "old"
    assert [path.name for path in tmp_path.rglob("*")] == ["m", "p", "digits_model.bin"]


def test_a_layer_that_is_emptied_is_named_and_truly_measured(tmp_path, capsys):
    model = good_model(tmp_path)
    with pytest.warns(UserWarning, match="pruning leaves nothing of fc1"):
        assert main(tmp_path, "--k", "100", "100", "--model", str(model)) == 0
    last = read_rows(tmp_path / CSV)[-1]
    found = [last[name] for name in ("method", "k_percent", "achieved_percent", "weights_kept")]
    assert found == ["unit", "100", "100", "0"]
    assert 5 < float(last["accuracy_percent"]) < 15
