"""What a user's machine does to a run: signals, pipes, folders, disks, locales, other people's files."""

import contextlib
import errno
import functools
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from runs import Run, flags_for

import prune
import train
import utils
from compress import save_compressed
from model import NeuralNetwork


def good_model(folder: Path) -> Path:
    path = folder / "model.bin"
    torch.save(NeuralNetwork((784, 30, 10)).state_dict(), path)
    return path


def main(folder: Path, *flags: str) -> int:
    return train.main(flags_for(folder, *flags))


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on stderr."""
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


# ── signals and pipes ──


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    ("flags", "moment", "kept"),
    [("--epochs 500", "k %", "nothing was written yet"), ("--seeds 500", "seed 1,", "written: ")],
)
def test_a_signal_ends_the_run_with_a_line_that_says_what_was_kept(number, status, flags, moment, kept, tmp_path):
    run = Run(tmp_path / "run", *flags.split())
    assert run.prints(moment)
    run.signal(number)
    with contextlib.suppress(ProcessLookupError):
        run.signal(number)  # some are impatient
    assert run.end() == status
    assert run.errors.splitlines()[1].startswith(f"train.py: stopped; {kept}")
    assert len(run.errors.splitlines()) <= 4 and "Traceback" not in run.errors
    assert ("digits_model.bin" in run.errors) == ("written" in kept and "nothing" not in kept)


DURING_THE_IMPORTS = """
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "torch": signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Slow())
sys.argv = ["train.py"]
import runpy; runpy.run_path("src/train.py", run_name="__main__")
"""
DURING_THE_END = """
import atexit, utils; utils.stop_on_signals()
atexit.register(signal.raise_signal, signal.SIGINT)  # a second one
signal.raise_signal(signal.SIGINT)
"""


@pytest.mark.parametrize("code", [DURING_THE_IMPORTS, DURING_THE_END], ids=["imports", "end"])
def test_a_signal_at_a_bad_moment_is_no_traceback(code):
    code = f"import signal, sys; sys.path.insert(0, 'src')\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == "\ntrain.py: stopped; nothing was written yet\n"


def print_to(pipe: Path) -> None:
    os.dup2(os.open(pipe, os.O_WRONLY), 1)


def test_a_closed_pipe_does_not_end_the_run_and_a_log_file_gets_no_bar(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    run = Run(tmp_path / "run", fault=functools.partial(print_to, tmp_path / "pipe"))
    with (tmp_path / "pipe").open() as reader:  # `| head -1`
        assert reader.readline()
    assert run.end() == 0
    assert run.errors == ""  # where a terminal would have the bar
    assert (tmp_path / "run" / "p" / "digits_accuracy_sparsity.png").exists()


def test_without_any_output_the_files_are_still_written(tmp_path):
    command = [sys.executable, ROOT / "src/train.py", "--dataset", "digits", "--epochs", "1", "--k", "50"]
    folders = ["--models", str(tmp_path), "--plots", str(tmp_path)]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command, *folders], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "digits_accuracy_sparsity.png").exists()


def test_a_missing_package_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    flags = ["--dataset", "digits", "--epochs", "1", "--k", "50", "--models", str(tmp_path), "--plots", str(tmp_path)]
    assert train.main(flags) == 1
    assert "matplotlib" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_strange_shell_and_a_source_tree_that_is_left_alone(tmp_path):
    """A log file for a terminal, a C locale, no display, paths of all kinds, and sources that are read-only."""
    odd, log = tmp_path / "a b\nc ö 数", tmp_path / "log"
    tree = odd / "tree"
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "inputs").mkdir()
    shutil.copy(ROOT / "inputs" / "digits.npz", tree / "inputs")
    for path in (tree, *tree.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)  # root may write nevertheless
    unset = ("DISPLAY", "LANG", "LC_CTYPE", "PYTHONIOENCODING")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-B", str(tree / "src" / "train.py"), *flags_for(odd, "--model", str(good_model(odd)))]
    with log.open("w") as stream:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.PIPE, env=environment, cwd=tmp_path
        )
    assert (done.returncode, done.stderr) == (0, b"")
    text = log.read_text(encoding="ascii")
    assert "c ?? ???" in text  # the path, as far as this locale has its letters
    assert {path.name for path in odd.iterdir()} == {"tree", "m", "p", "model.bin"}
    assert (odd / "p" / "digits_accuracy_sparsity.csv").exists()
    assert {path.name for path in tree.iterdir()} == {"src", "inputs"}
    for folder in (tree, tree / "src", tree / "inputs"):
        folder.chmod(0o755)  # for whoever tidies up


def test_two_runs_at_once_both_end_well(tmp_path):
    runs = [Run(tmp_path / "run") for _ in range(2)]
    assert [run.end() for run in runs] == [0, 0], [run.errors for run in runs]
    left = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(left) == 5 and not [path for path in left if path.name.startswith(".")]
    state = torch.load(tmp_path / "run" / "m" / "digits_model.bin", weights_only=True)
    assert NeuralNetwork.from_state_dict(state)


def test_what_a_run_beside_this_one_has_just_removed_is_not_missed(tmp_path, monkeypatch):
    """The file of a finished seed is found, but gone when it is to be removed."""
    found = Path.glob

    def late(folder: Path, pattern: str) -> list[Path]:
        return [folder / "gone.json"] if "unfinished" in pattern else list(found(folder, pattern))

    monkeypatch.setattr(Path, "glob", late)
    assert main(tmp_path, "--model", str(good_model(tmp_path))) == 0


def test_a_file_in_a_folder_that_is_not_there_is_named_as_the_user_did(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, utils.atomic_write(tmp_path / "none" / "file"):
        pass
    assert caught.value.filename == str(tmp_path / "none" / "file")


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """The later one wins, whole; and a run that starts meanwhile takes neither for what a killed run has left."""
    path = tmp_path / "file"
    with utils.atomic_write(path) as first:
        with utils.atomic_write(path) as second:
            assert first != second
            first.write_text("first")
            second.write_text("second")
            utils.prepare_folder(tmp_path)
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


# ── folders and disks ──


@pytest.mark.parametrize("folder", ["--models", "--plots"])
def test_a_file_in_a_folders_place_is_told_before_any_training(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path(os.devnull)):
        assert main(tmp_path, folder, str(place)) == 1
        assert str(place) in one_line(capsys)
    assert (tmp_path / "file").read_text() == "mine"


def be_nobody() -> None:
    if os.geteuid() == 0:  # to root everything is writable
        os.seteuid(65534)


def test_a_folder_that_cannot_be_written_to_is_told_before_any_training(tmp_path):
    folder = tmp_path / "run" / "p"
    folder.mkdir(parents=True)
    folder.chmod(0o555)
    folder.parent.chmod(0o777)
    for parent in folder.parents[1:-2]:  # pytest's own are private
        parent.chmod(parent.stat().st_mode | 0o111)
    run = Run(tmp_path / "run", fault=be_nobody)
    assert run.end() == 1
    assert str(folder) in run.errors and run.errors.count("\n") == 1
    assert run.output == ""


def files_stay_small(name: str, *, deadly: bool) -> None:
    """Files whose names end so cannot grow past 50 bytes: the write fails as on a full disk, or kills the process."""
    original = utils.atomic_write
    if deadly:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)

    @contextlib.contextmanager
    def limited(path: Path) -> Iterator[Path]:
        with original(path) as temporary:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            if path.name.endswith(name):
                resource.setrlimit(resource.RLIMIT_FSIZE, (50, most))
            try:
                yield temporary
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    for module in {"utils", "train", "compress", "results"} & sys.modules.keys():
        if hasattr(sys.modules[module], "atomic_write"):
            sys.modules[module].atomic_write = limited  # type: ignore[attr-defined]


WRITTEN = {  # by the flags of the run that writes it
    "digits_model.bin": "", "digits_model.json": "", "digits_unit_50.bin": "--keep unit:50 --model",
    "digits_seed0.json": "--model", "digits_accuracy_sparsity.csv": "--model",
    "digits_accuracy_sparsity.png": "--model", "digits_accuracy_weights.png": "--model",
}  # fmt: skip


def with_old_files(folder: Path, name: str) -> list[str]:
    """Flags for a run, and every file that it could replace."""
    for path in (folder / "m" / name, folder / "p" / name):
        path.parent.mkdir(parents=True)
        path.write_text("old")
    flags = WRITTEN[name].split()
    return [*flags, str(good_model(folder))] if "--model" in flags else flags


def old_files(folder: Path, name: str) -> list[str]:
    return [path.read_text() for path in (folder / "m" / name, folder / "p" / name)]


@pytest.fixture
def atomic_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the originals back."""
    for module in (utils, sys.modules["compress"], sys.modules["results"]):
        monkeypatch.setattr(module, "atomic_write", utils.atomic_write)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_full_disk_leaves_the_old_file_whole(name, tmp_path, capsys, atomic_writes):
    flags = with_old_files(tmp_path, name)
    files_stay_small(name, deadly=False)
    assert main(tmp_path, *flags) == 1
    message = one_line(capsys)
    assert name in message and os.strerror(errno.EFBIG) in message
    assert old_files(tmp_path, name) == ["old", "old"]
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("name", [name for name in WRITTEN if name != "digits_accuracy_weights.png"])
def test_a_run_killed_in_the_middle_of_a_file_leaves_the_old_one_whole(name, tmp_path):
    flags = with_old_files(tmp_path / "run", name)
    run = Run(tmp_path / "run", *flags, fault=functools.partial(files_stay_small, name, deadly=True))
    assert run.end() == -signal.SIGXFSZ
    assert old_files(tmp_path / "run", name) == ["old", "old"]
    (litter,) = (tmp_path / "run").rglob("*.tmp")
    assert litter.stat().st_size == 50
    utils.prepare_folder(litter.parent)
    assert not litter.exists()


# ── data that cannot be had ──


@pytest.fixture
def no_mirrors(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = SimpleNamespace(MNIST=SimpleNamespace(mirrors=[], resources=[]))
    monkeypatch.setitem(sys.modules, "torchvision", datasets)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)


def test_without_mnist_the_run_ends_or_says_that_digits_took_its_place(tmp_path, capsys, no_mirrors):
    inputs = tmp_path / "not" / "there"
    assert main(tmp_path, "--inputs", str(inputs), "--dataset", "mnist") == 1
    message = one_line(capsys)
    assert "train-images-idx3-ubyte" in message and f"Put the four .gz files of MNIST into {inputs}" in message
    assert not list(tmp_path.rglob("*.*"))
    model = good_model(tmp_path)
    assert main(tmp_path, "--inputs", str(inputs), "--dataset", "auto", "--model", str(model)) == 0
    assert capsys.readouterr().out.count("These are NOT MNIST results") == 2
    assert {path.name.partition("_")[0] for path in (tmp_path / "p").iterdir()} == {"digits"}


# ── files from strangers ──


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def bad_model(kind: str, folder: Path) -> Path:
    path = good_model(folder)
    state = torch.load(path, weights_only=True)
    if kind in ("missing", "a folder"):
        path.unlink()
        if kind == "a folder":
            path.mkdir()
        return path
    if kind == "malicious":
        path.write_bytes(pickle.dumps(Malicious(folder / "executed")))
        return path
    if kind == "malicious, zipped":
        torch.save({"fc1.weight": Malicious(folder / "executed")}, path)
        return path
    if kind == "compressed":
        save_compressed(NeuralNetwork((784, 30, 10)), path)
        return path
    if kind == "a whole model":
        torch.save(NeuralNetwork((784, 30, 10)), path)
        return path
    if kind == "sparse":
        state["fc1.weight"] = state["fc1.weight"].to_sparse()
    if kind == "wrong dtype":
        state["fc1.weight"] = state["fc1.weight"].long()
    if kind == "NaN":
        state["fc2.weight"][0, 0] = torch.nan
    if kind == "another architecture":
        state = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2)).state_dict()
    if kind == "another width":
        state = NeuralNetwork((784, 30, 7)).state_dict()
    torch.save([1, 2] if kind == "a list" else state, path)
    if kind == "cut short":
        path.write_bytes(path.read_bytes()[:-2000])
    if kind == "empty":
        path.write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "model.bin"),
        ("a folder", "model.bin"),
        ("malicious", "model.bin is not a model file"),
        ("malicious, zipped", "model.bin is not a model file"),
        ("cut short", "model.bin is not a model file"),
        ("empty", "model.bin is not a model file"),
        ("compressed", "model.bin is not a model file"),
        ("a list", "model.bin is not a model file"),
        ("a whole model", "a state_dict is needed"),
        ("sparse", "fc1.weight must be a floating-point matrix (out, in), and dense"),
        ("wrong dtype", "fc1.weight must be a floating-point matrix"),
        ("NaN", "fc2.weight has NaN"),
        ("another architecture", "expected fc1.weight"),
        ("another width", "from 784 to 7 values"),
    ],
)
def test_a_bad_model_file_is_told_in_one_line(kind, words, tmp_path, capsys):
    assert main(tmp_path, "--model", str(bad_model(kind, tmp_path))) == 1
    message = one_line(capsys)
    assert words in message and "model.bin" in message
    assert "weights_only" not in message  # torch advises to switch it off
    assert not (tmp_path / "executed").exists()


BAD_MASKS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "of another model": (lambda masks: {"fc9.weight": masks["fc1.weight"]}, "no parameter 'fc9.weight'"),
    "of another width": (lambda masks: masks | {"fc2.weight": masks["fc1.weight"]}, r"fc2.weight must be .*\(6, 5\)"),
    "wrong dtype": (lambda masks: masks | {"fc2.weight": masks["fc2.weight"].float()}, "fc2.weight must be a boolean"),
    "a list": (lambda masks: list(masks.values()), "must be a dict"),
}


@pytest.mark.parametrize("kind", BAD_MASKS)
def test_bad_masks_from_a_file_are_told_and_change_nothing(kind, tmp_path):
    model = NeuralNetwork((4, 5, 6, 2))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    spoil, words = BAD_MASKS[kind]
    torch.save(spoil(prune.find_masks(model, "weight", 0.5)), tmp_path / "masks.bin")
    with pytest.raises((ValueError, TypeError), match=words):
        prune.apply_masks(model, torch.load(tmp_path / "masks.bin", weights_only=True))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("kind", ["empty", "cut short", "a byte short", "malicious"])
def test_a_mask_file_that_torch_does_not_load_with_weights_only_is_never_applied(kind, tmp_path):
    path = tmp_path / "masks.bin"
    masks = prune.find_masks(NeuralNetwork((4, 5, 6, 2)), "weight", 0.5)
    torch.save(masks | {"fc9.weight": Malicious(tmp_path / "executed")} if kind == "malicious" else masks, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: {"empty": 0, "cut short": len(whole) // 2, "a byte short": -1}.get(kind)])
    with pytest.raises((EOFError, RuntimeError, pickle.UnpicklingError)):
        torch.load(path, weights_only=True)
    assert not (tmp_path / "executed").exists()


# ── settings that only the machine, the network or the training can refuse ──


def test_a_layer_that_is_not_there_is_a_bad_setting(tmp_path, capsys):
    assert main(tmp_path, "--skip", "fc9") == 2
    assert "fc9" in one_line(capsys)


def test_cuda_where_there_is_none_is_a_bad_setting(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(tmp_path, "--device", "cuda") == 2
    assert "--device cuda" in one_line(capsys)


def test_divergence_ends_the_run_with_its_epoch_and_earlier_files_untouched(tmp_path, capsys):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "digits_model.bin").write_text("old")
    assert main(tmp_path, "--learning-rate", "1e6", "--epochs", "7") == 1
    message = one_line(capsys)
    assert "after epoch" in message and "/7" in message and "learning rate" in message
    assert (tmp_path / "m" / "digits_model.bin").read_text() == "old"
    assert [path.name for path in tmp_path.rglob("*")] == ["m", "p", "digits_model.bin"]


def test_a_layer_that_is_emptied_is_named_and_truly_measured(tmp_path, recwarn):
    model = good_model(tmp_path)
    assert main(tmp_path, "--k", "100", "100", "--skip", "fc2", "--model", str(model)) == 0
    assert any("fc1" in str(warning.message) for warning in recwarn)
    last = (tmp_path / "p" / "digits_accuracy_sparsity.csv").read_text().splitlines()[-1].split(",")
    chance = float(last[6])
    assert last[1:6] == ["unit", "layer", "100", "100", "0"] and 5 < chance < 15


def test_a_gpu_without_memory_is_told_what_to_set(tmp_path, capsys, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", full)
    assert main(tmp_path) == 1
    message = one_line(capsys)
    assert "--batch-size" in message and "--device cpu" in message


def test_a_gpu_too_old_for_bf16_trains_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert utils.pick_precision("auto", torch.device("cuda")) == torch.float32
