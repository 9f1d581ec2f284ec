"""system.py against real faults: full disks and pipes, dead terminals, signals, kills, processes that never come."""

import contextlib
import errno
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import system


def python(code: str, *arguments: object, shell: str = "", **options) -> subprocess.Popen:
    """Start Python with system.py at hand; `shell` is what follows the command on a shell's line."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    if shell:
        command = ["sh", "-c", f'"$@" {shell}', "sh", *command]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"} | options.pop("env", {})
    environment.pop("PYTHONUNBUFFERED", None)  # what Python holds back is part of the matter
    return subprocess.Popen(command, text=True, env=environment, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ── files ──


def test_a_file_is_replaced_and_as_readable_as_any_other_and_its_folder_is_made(tmp_path):
    path = tmp_path / "none" / "inner" / "file"
    before = os.umask(0o027)
    try:
        for data in (b"old and longer", b"new", io.BytesIO(b"view").getbuffer()):
            system.write_file(path, data)
            assert path.read_bytes() == data
        assert path.stat().st_mode & 0o777 == 0o640
    finally:
        assert os.umask(before) == 0o027  # it is the whole process's, and nobody has touched it
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("name", ["n" * 255, "ö" * 127, "数" * 85, "𝄞" * 63, ".hidden", "a b\nc"])
def test_every_name_that_a_file_can_have(name, tmp_path):
    system.write_file(tmp_path / name, b"new")
    assert (tmp_path / name).read_bytes() == b"new"
    assert names(tmp_path) == [name]


def test_the_target_of_a_symbolic_link_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "there").mkdir()
    for target in ("there/file", "there/not yet"):
        link = tmp_path / Path(target).name
        link.symlink_to(target)
    (tmp_path / "there" / "file").write_text("old")
    for name in ("file", "not yet"):
        system.write_file(tmp_path / name, b"new")
        assert (tmp_path / name).is_symlink() and (tmp_path / "there" / name).read_bytes() == b"new"
    assert names(tmp_path) == ["file", "not yet", "there"] and names(tmp_path / "there") == ["file", "not yet"]


@pytest.mark.parametrize("kind", ["directory", "FIFO", "socket", "link to a FIFO", "link to a directory", "loop"])
def test_what_is_no_regular_file_is_not_replaced(kind, tmp_path):
    path, other = tmp_path / "file", tmp_path / "other"
    with contextlib.ExitStack() as stack:
        {
            "directory": path.mkdir,
            "FIFO": lambda: os.mkfifo(path),
            "socket": lambda: stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(path)),
            "link to a FIFO": lambda: (os.mkfifo(other), path.symlink_to(other)),
            "link to a directory": lambda: (other.mkdir(), path.symlink_to(other)),
            "loop": lambda: path.symlink_to("file"),
        }[kind]()
        before, there = path.lstat(), names(tmp_path)
        with pytest.raises(OSError, match="Not a regular file") as caught:
            system.write_file(path, b"new")
    assert caught.value.filename == str(path) and names(tmp_path) == there
    after = path.lstat()  # but the time of access: a link is read
    kept = ("st_ino", "st_mode", "st_size", "st_mtime_ns", "st_ctime_ns")
    assert [getattr(after, name) for name in kept] == [getattr(before, name) for name in kept]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_step_that_fails_leaves_the_old_file_whole_and_no_litter(step, tmp_path, monkeypatch):
    def fail(*arguments: object):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "elsewhere", None, "and there")

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError) as caught:
        system.write_file(path, b"new")
    assert str(caught.value) == f"[Errno {errno.EIO}] {os.strerror(errno.EIO)}: {str(path)!r}"
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_fsync_is_no_reason_to_fail(number, tmp_path, monkeypatch):
    def fail(descriptor: int):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    system.write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file_whole_and_other_programs_files_stay(tmp_path):
    """The disk is full, and that is deadly. The file that the killed process leaves may be removed."""
    code = """
import resource, signal, sys, system; from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
system.write_file(Path(sys.argv[1]), bytes(60_000))"""
    path = tmp_path / "file"
    path.write_text("old")
    (tmp_path / ".file.123.tmp").write_text("of another program")
    assert python(code, path).wait() == -signal.SIGXFSZ
    assert path.read_text() == "old"
    litter = [name for name in names(tmp_path) if name not in ("file", ".file.123.tmp")]
    assert len(litter) == 1 and re.fullmatch(r"\.file\.\w+\.tmp", litter[0])
    system.write_file(path, b"new")
    assert names(tmp_path) == sorted(["file", ".file.123.tmp", *litter])


def test_two_processes_that_write_one_file_again_and_again_never_leave_a_mixture(tmp_path):
    code = """
import sys, system; from pathlib import Path
for _ in range(100): system.write_file(Path(sys.argv[1]), sys.argv[2].encode() * 100_000)"""
    path = tmp_path / "file"
    system.write_file(path, b"c" * 100_000)
    writers = [python(code, path, letter) for letter in "ab"]
    seen = set()
    while None in [writer.poll() for writer in writers]:
        content = path.read_bytes()
        assert len(content) == 100_000 and len(set(content)) == 1
        seen.add(content[:1])
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen >= {b"a", b"b"}
    assert names(tmp_path) == ["file"]


# ── messages ──

TALK = """
import sys, system; from pathlib import Path
system.begin_program()
for length in (5, 20_000, 5):  # less and more than Python holds back
    system.say("to stdout: 98.4 % ± 0.1, 数 " + length * "x")
    system.warn("to stderr")
system.write_file(Path(sys.argv[1]), b"written all the same")
"""


@pytest.mark.parametrize("shell", [">&-", "2>&-", ">&- 2>&-", "> /dev/full", "2> /dev/full", "> /dev/full 2>&1"])
def test_a_run_goes_on_where_a_stream_is_closed_or_full(shell, tmp_path):
    run = python(TALK, tmp_path / "file", shell=shell, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = run.communicate()
    assert (tmp_path / "file").read_text() == "written all the same"
    assert run.returncode == 0  # and Python has nothing to complain of when it ends
    assert errors == ("" if "2>" in shell else 3 * "to stderr\n")
    assert (output.count("to stdout"), output.count("to stderr")) == (3 if shell.startswith("2>") else 0, 0)


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_run_goes_on_where_the_reader_has_gone(kind, stream, tmp_path):
    ours, theirs = os.pipe() if kind == "pipe" else os.openpty()
    wait = "import sys; sys.stdin.read()\n"
    run = python(wait + TALK, tmp_path / "file", stdin=subprocess.PIPE, start_new_session=True, **{stream: theirs})
    os.close(theirs)
    os.close(ours)
    run.communicate("")
    assert run.returncode == 0
    assert (tmp_path / "file").read_text() == "written all the same"


@pytest.mark.parametrize(
    ("encoding", "seen"), [("ascii", "? ? ? ?"), ("latin-1", "± ö ? ?"), ("utf-8", "± ö 数 ?"), ("utf-16", "± ö 数 ?")]
)
def test_letters_that_an_encoding_lacks_become_question_marks(encoding, seen):
    code = r"import system; system.begin_program(); system.say('± ö 数 \udcff'); system.warn('± ö 数 \udcff')"
    run = python(
        code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding=encoding, env={"PYTHONIOENCODING": encoding}
    )
    assert [written.strip() for written in run.communicate()] == [seen, seen]
    assert run.returncode == 0


def test_streams_of_notebooks_and_captured_ones_get_the_text_and_their_faults_end_nothing(capsys):
    system.say("one\ntwo")
    system.warn("three")
    assert capsys.readouterr() == ("one\ntwo\n", "three\n")

    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for stream in (Broken(), closed := io.StringIO(), None):
        closed.close()
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            system.say("lost")
            system.warn("lost")


def test_an_error_is_one_printable_line():
    assert system.one_line(MemoryError()) == "MemoryError"
    assert system.one_line("a\r\n b\t\x00c\x9b31m \udc80 ö 数 \u202e") == r"a b \x00c\x9b31m \udc80 ö 数 \u202e"


# ── signals ──


def test_a_signal_that_the_parent_ignores_stays_ignored():
    """As shells do with SIGINT for what runs in the background; SIGHUP is left as it was, too."""
    code = """
import signal, system; before = signal.getsignal(signal.SIGHUP)
system.begin_program()
signal.raise_signal(signal.SIGINT)
print(signal.getsignal(signal.SIGHUP) == before)"""
    run = python(code, shell="& wait $!", stdout=subprocess.PIPE)
    assert run.communicate()[0] == "True\n" and run.returncode == 0


@pytest.mark.parametrize("stderr", ["closed", "full"])
def test_a_signal_ends_it_with_its_status_after_it_has_cleaned_up_where_nobody_can_read_the_line(stderr):
    code = "import signal, sys, system; system.begin_program()\n"
    code += {"closed": "sys.stderr.close()", "full": ""}[stderr]
    code += "\ntry: signal.raise_signal(signal.SIGTERM)\nfinally: print('cleaned up')"
    shell = "2> /dev/full" if stderr == "full" else ""
    run = python(code, shell=shell, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.communicate() == ("cleaned up\n", "") and run.returncode == 143


# ── machine ──


def test_the_machine_is_described_in_plain_values():
    machine = system.describe_machine(torch.device("cpu"))
    assert list(machine) == ["python", "torch", "numpy", "hardware", "threads"]
    assert json.loads(json.dumps(machine)) == machine
    assert machine["hardware"] and machine["torch"] == torch.__version__
