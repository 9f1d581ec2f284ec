"""What a user's machine does to a run: signals, pipes, folders, disks, locales, other people's files."""

import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import train
from model import NeuralNetwork

TRAIN = str(ROOT / "src" / "train.py")
QUICK = ["--dataset", "digits", "--epochs", "1", "--k", "90"]


def command(folder: Path, *flags: str) -> list[str]:
    return [sys.executable, TRAIN, *QUICK, "--models", str(folder / "m"), "--plots", str(folder / "p"), *flags]


def finish(arguments: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, **options)  # type: ignore[call-overload]


def main(folder: Path, *flags: str) -> int:
    return train.main(command(folder, *flags)[2:])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on stderr."""
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


# ── signals and pipes ──


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("moment", ["Epoch:1/", "k %"])
def test_a_signal_ends_the_run_with_a_line_that_says_what_was_kept(number, status, moment, tmp_path):
    flags = ("--epochs", "500") if moment != "Epoch:1/" else ("--seeds", "500")
    run = subprocess.Popen(command(tmp_path, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith(moment if moment == "k %" else "seed 1"):
            run.send_signal(number)
            break
    _, errors = run.communicate(timeout=60)
    assert run.returncode == status
    assert "Traceback" not in errors
    assert ("digits_model.bin" if moment != "k %" else "nothing was written yet") in errors


def test_a_signal_during_the_imports_is_no_traceback(tmp_path):
    code = (
        "import sys, signal, os; sys.path.insert(0, 'src'); sys.argv = ['train.py']\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "import runpy; runpy.run_path('src/train.py', run_name='__main__')\n"
    )
    done = finish([sys.executable, "-c", code], cwd=ROOT)
    assert done.returncode == 130
    assert "stopped; nothing was written yet" in done.stderr and "Traceback" not in done.stderr


def test_a_closed_pipe_does_not_end_the_run(tmp_path):
    run = subprocess.Popen(command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout is not None and run.stderr is not None
    run.stdout.readline()
    run.stdout.close()  # as `| head -1` does
    with run.stderr as stream:
        errors = stream.read().decode()
    assert run.wait() == 0, errors
    assert errors == ""
    assert (tmp_path / "p" / "digits_accuracy_sparsity.png").exists()


def test_a_log_file_gets_no_progress_bar_and_a_c_locale_gets_its_table(tmp_path):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("DISPLAY", "LANG", "PYTHONIOENCODING")
    }
    environment |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = finish(command(tmp_path, "--seeds", "2"), env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "it/s" not in done.stdout and "\r" not in done.stdout
    assert " ? " in done.stdout  # the ± that this locale does not have


def test_any_path_will_do(tmp_path):
    folder = tmp_path / "a b\nc ö 数"
    folder.mkdir()
    done = finish(command(folder), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "p" / "digits_accuracy_sparsity.csv").exists()


def test_two_runs_at_once_both_end_well(tmp_path):
    runs = [subprocess.Popen(command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    for run in runs:
        _, errors = run.communicate()
        assert run.returncode == 0, errors
    assert NeuralNetwork.from_state_dict(torch.load(tmp_path / "m" / "digits_model.bin", weights_only=True))
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]


# ── folders and disks ──


@pytest.mark.parametrize("folder", ["--models", "--plots"])
def test_a_file_in_a_folders_place_is_told_before_any_training(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(tmp_path, folder, str(tmp_path / "file")) == 1
    assert str(tmp_path / "file") in one_line(capsys)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written_to_is_told_before_any_training(tmp_path):
    (tmp_path / "p").mkdir(mode=0o555)
    code = (
        "import os, sys; import train\n"
        "if os.geteuid() == 0: os.seteuid(65534)\n"  # to root everything is writable
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o111)
    arguments = [sys.executable, "-c", code, *command(tmp_path)[2:]]
    done = finish(arguments, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    assert str(tmp_path / "p") in done.stderr and done.stderr.count("\n") == 1
    assert "Epoch" not in done.stdout


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "digits_model.bin").write_text("old")

    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    done = finish(command(tmp_path), preexec_fn=small_files_only)
    assert done.returncode == 1
    assert "digits_model.bin" in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["digits_model.bin"]
    assert (tmp_path / "m" / "digits_model.bin").read_text() == "old"


# ── files from strangers ──


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def bad_model(kind: str, folder: Path) -> Path:
    path = folder / "model.bin"
    state = NeuralNetwork((784, 30, 10)).state_dict()
    if kind == "missing":
        return path
    if kind == "malicious":
        path.write_bytes(pickle.dumps(Malicious(folder / "executed")))
        return path
    if kind == "wrong dtype":
        state["fc1.weight"] = state["fc1.weight"].long()
    if kind == "NaN":
        state["fc2.weight"][0, 0] = torch.nan
    if kind == "another architecture":
        state = torch.nn.Linear(784, 10).state_dict()
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
        ("malicious", "model.bin is not a model file"),
        ("cut short", "model.bin is not a model file"),
        ("empty", "model.bin is not a model file"),
        ("a list", "model.bin is not a model file"),
        ("wrong dtype", "fc1.weight must be a floating-point matrix"),
        ("NaN", "fc2.weight has NaN"),
        ("another architecture", "expected fc1.weight"),
        ("another width", "from 784 to 7 values"),
    ],
)
def test_a_bad_model_file_is_told_in_one_line(kind, words, tmp_path, capsys):
    flags = ["--dataset", "digits", "--model", str(bad_model(kind, tmp_path))]
    assert train.main([*flags, "--models", str(tmp_path / "m"), "--plots", str(tmp_path / "p")]) == 1
    message = one_line(capsys)
    assert words in message and "model.bin" in message
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
    assert main(tmp_path, "--k", "100", "--skip", "fc1", "fc5") == 0
    assert any("fc2" in str(warning.message) for warning in recwarn)
    last = (tmp_path / "p" / "digits_accuracy_sparsity.csv").read_text().splitlines()[-1].split(",")
    chance = float(last[6])
    assert last[1:6] == ["unit", "layer", "100", "100", "0"] and 5 < chance < 15


def test_a_gpu_without_memory_is_told_what_to_set(tmp_path, capsys, monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(train, "_train_network", full)
    assert main(tmp_path) == 1
    assert "--batch-size" in one_line(capsys)


def test_a_gpu_too_old_for_bf16_trains_in_fp32(monkeypatch):
    import utils

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert utils.pick_precision("auto", torch.device("cuda")) == torch.float32
