"""system.py against real faults: full disks and pipes, dead terminals, signals, kills, processes that never come."""

import contextlib
import doctest
import errno
import io
import json
import os
import re
import resource
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


def test_a_file_is_replaced_and_as_readable_as_any_other(tmp_path):
    path = tmp_path / "file"
    before = os.umask(0o027)
    try:
        for data in (b"old and longer", b"new", io.BytesIO(b"view").getbuffer()):
            system.write_file(path, data)
            assert path.read_bytes() == data
        assert path.stat().st_mode & 0o777 == 0o640
    finally:
        assert os.umask(before) == 0o027  # it is the whole process's, and nobody has touched it
    assert names(tmp_path) == ["file"]


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
        before = path.lstat(), names(tmp_path)
        with pytest.raises(OSError, match="Not a regular file") as caught:
            system.write_file(path, b"new")
    assert caught.value.filename == str(path)
    assert (path.lstat(), names(tmp_path)) == before


def test_a_full_disk_leaves_the_old_file_whole_and_no_litter(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as caught:
            system.write_file(path, bytes(60_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(path)
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


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


def test_a_missing_folder_is_made(tmp_path):
    system.write_file(tmp_path / "none" / "inner" / "file", b"new")
    assert (tmp_path / "none" / "inner" / "file").read_bytes() == b"new"


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file_whole_and_other_programs_files_stay(tmp_path):
    """The disk is full again, and this time that is deadly. The file that the killed process leaves may be removed."""
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
    system.check_folder(tmp_path)
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


def test_a_folder_is_made_tried_and_left_as_it_was(tmp_path):
    folder = tmp_path / "a" / "b c"
    for _ in range(2):
        system.check_folder(folder)
        assert names(folder) == []


@pytest.mark.parametrize("place", ["a file", "below a file", "device", "cannot rename", "cannot remove"])
def test_a_folder_that_cannot_hold_files_is_told(place, tmp_path, monkeypatch):
    def fail(*arguments: object):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), "elsewhere")

    (tmp_path / "file").write_text("mine")
    folder = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "x", "device": Path(os.devnull)}.get(
        place, tmp_path
    )
    if place.startswith("cannot"):
        monkeypatch.setattr(Path, "replace" if "rename" in place else "unlink", fail)
    with pytest.raises(OSError, match="elsewhere" if place == "cannot remove" else str(folder)):
        system.check_folder(folder)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_read_only_folder_is_told():
    code = """
import os, system, tempfile; from pathlib import Path
with tempfile.TemporaryDirectory() as folder:
    os.chmod(folder, 0o555)
    if os.geteuid() == 0: os.seteuid(65534)  # root may write anywhere
    try: system.check_folder(Path(folder))
    except PermissionError as error: print(error.filename.startswith(folder), os.listdir(folder))
    os.seteuid(os.getuid()); os.chmod(folder, 0o755)"""
    assert python(code, stdout=subprocess.PIPE).communicate()[0] == "True []\n"


# ── messages ──

TALK = """
import sys, system; from pathlib import Path
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
    code = r"import system; system.say('± ö 数 \udcff'); system.warn('± ö 数 \udcff')"
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


def test_a_file_of_the_callers_that_is_full_stays_his(tmp_path):
    """Only the standard streams are given up for good."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (tmp_path / "log").open("w") as log, contextlib.redirect_stdout(log):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        try:
            system.say("more than ten letters")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        system.say("again")
    assert (tmp_path / "log").read_text().endswith("again\n")


def test_an_error_is_one_printable_line():
    assert system.one_line(MemoryError()) == "MemoryError"
    assert system.one_line("a\r\n b\t\x00c\x9b31m \udc80 ö 数 \u202e") == r"a b \x00c\x9b31m \udc80 ö 数 \u202e"


# ── signals ──

STOP = """
import sys, system, time; system.stop_on_signals()
try: print("ready", flush=True); time.sleep(60)
finally:
    print("cleaned up", flush=True)
    if "slow" in sys.argv: time.sleep(60)
"""


def stopped(number: int, *arguments: str, **options) -> tuple[subprocess.Popen, str]:
    """A process that was sent a signal when it was ready, and what it printed next."""
    run = python(STOP, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    assert run.stdout is not None and run.stdout.readline() == "ready\n"
    run.send_signal(number)
    return run, run.stdout.readline()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_program_with_a_line_after_it_has_cleaned_up(number, status):
    run, printed = stopped(number)
    errors = run.communicate()[1]
    assert (printed, run.returncode) == ("cleaned up\n", status)
    assert errors.count("\n") == 2 and errors.startswith("\ntrain.py: stopped; ") and "the same command" in errors


@pytest.mark.parametrize(("first", "second"), [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_a_second_signal_ends_it_at_once(first, second):
    run, printed = stopped(first, "slow")
    assert printed == "cleaned up\n"
    run.send_signal(second)
    assert run.wait() == -second
    assert run.communicate()[1].count("stopped") == 1


def test_a_signal_that_the_parent_ignores_stays_ignored():
    """As shells do with SIGINT for what runs in the background; SIGHUP is left as it was, too."""
    code = """
import signal, system; before = signal.getsignal(signal.SIGHUP)
system.stop_on_signals()
signal.raise_signal(signal.SIGINT)
print(signal.getsignal(signal.SIGHUP) == before)"""
    run = python(code, shell="& wait $!", stdout=subprocess.PIPE)
    assert run.communicate()[0] == "True\n" and run.returncode == 0


@pytest.mark.parametrize("stderr", ["closed", "None", "full"])
def test_a_signal_ends_it_with_its_status_where_nobody_can_read_the_line(stderr):
    code = "import signal, sys, system; system.stop_on_signals()\n"
    code += {"closed": "sys.stderr.close()", "None": "sys.stderr = None", "full": ""}[stderr]
    code += "\nsignal.raise_signal(signal.SIGTERM)"
    run = python(code, shell="2> /dev/full" if stderr == "full" else "", stderr=subprocess.PIPE)
    assert run.communicate()[1] == "" and run.returncode == 143


# ── machine ──


def test_devices_and_precisions(monkeypatch):
    cpu = torch.device("cpu")
    assert system.pick_device("cpu") == cpu
    assert system.pick_precision("fp32", cpu) == torch.float32
    assert system.pick_precision("bf16", cpu) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert system.pick_device("auto") == cpu
    with pytest.raises(ValueError, match="--device cuda"):
        system.pick_device("cuda")


def test_auto_is_bf16_where_it_is_clearly_faster(monkeypatch):
    """The instructions alone do not tell: there are processors that have them and are slower with them."""
    cpu = torch.device("cpu")
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: True, raising=False)
    for ratio, expected in ((0.5, torch.float32), (1.2, torch.float32), (1.5, torch.bfloat16)):
        times = [[1.0], [ratio]]  # of a product in bf16, then in fp32
        monkeypatch.setattr("timeit.repeat", lambda *_, times=times, **__: times.pop(0))
        assert system.pick_precision("auto", cpu) == expected
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: False, raising=False)
    assert system.pick_precision("auto", cpu) == torch.float32  # emulated: not even tried, for it may take seconds
    for native in (True, False):  # a GPU that emulates it trains in fp32
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        expected = torch.bfloat16 if native else torch.float32
        assert system.pick_precision("auto", torch.device("cuda")) == expected


def test_the_machine_is_described_in_plain_values():
    machine = system.describe_machine(torch.device("cpu"))
    assert list(machine) == ["python", "torch", "numpy", "hardware", "threads"]
    assert json.loads(json.dumps(machine)) == machine
    assert machine["hardware"] and machine["torch"] == torch.__version__


# ── ranks ──

RANKS = """
import json, os, signal, socket, sys, time
from pathlib import Path
import torch, torch.distributed
import system

folder, report = Path(sys.argv[1]), {}
running = {}

def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]

def joined(scenario, rank):
    return folder / f"{scenario}, {rank}: joined"

def start(scenario, rank, ranks, act=lambda rank: None, port=None, meeting=60):
    child = os.fork()
    if child:
        running[scenario, rank] = child
        return child
    for descriptor, kind in ((1, "output"), (2, "errors")):
        os.dup2(os.open(folder / f"{scenario}, {rank}: {kind}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port())}
    system.MEETING = meeting
    system.stop_on_signals()
    try:
        rank, ranks = system.join_ranks()
        system.say(f"joined as {rank} of {ranks}")
        joined(scenario, rank).touch()
        act(rank)
        rows = system.gather([f"row {rank}.{number}" for number in range(2)], ranks)
        (folder / f"{scenario}, {rank}: rows").write_text(json.dumps(rows))
        os._exit(0)
    except ConnectionError as error:
        system.warn(str(error))
        os._exit(1)
    except SystemExit as stop:
        os._exit(stop.code)

def end(*scenarios):
    for (scenario, rank), child in list(running.items()):
        if scenario in scenarios:
            report[f"{scenario}, {rank}"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            del running[scenario, rank]

def wait_for(happens):
    while not happens():
        time.sleep(0.01)

def dies(scenario, number):
    def act(rank):
        if rank == number:
            wait_for(joined(scenario, 1 - rank).exists)
            os._exit(9)
    return act

port = free_port()
for rank in range(3):
    start("all come", rank, 3, port=port)
port = free_port()
for rank in range(2):
    start("rank 1 dies", rank, 2, dies("rank 1 dies", 1), port=port)
port = free_port()
for rank in range(2):
    start("rank 0 dies", rank, 2, dies("rank 0 dies", 0), port=port)
start("nobody comes", 0, 2, meeting=1)
start("nobody came before", 1, 2, meeting=1)
end("all come", "rank 1 dies", "rank 0 dies", "nobody comes", "nobody came before")

# Ctrl-C while a rank waits for the others to start, and while rank 0 waits for rows
port = free_port()
def listens():
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
waiting = start("stopped, alone", 0, 2, port=port)
wait_for(listens)
os.kill(waiting, signal.SIGINT)
end("stopped, alone")

port = free_port()
waiting = start("stopped, late", 0, 2, port=port)
late = start("stopped, late", 1, 2, lambda rank: time.sleep(60) if rank else None, port=port)
wait_for(joined("stopped, late", 0).exists)
time.sleep(0.5)  # it gathers
os.kill(waiting, signal.SIGTERM)
report["waited for"] = os.waitstatus_to_exitcode(os.waitpid(waiting, 0)[1])
report["the late one lives"] = os.waitpid(late, os.WNOHANG) == (0, 0)
os.kill(late, signal.SIGKILL)
os.waitpid(late, 0)
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The exit status of every process above, which one fresh interpreter starts, and the folder of what they said."""
    folder = tmp_path_factory.mktemp("ranks")
    run = python(RANKS, folder, stdout=subprocess.PIPE, env={"TORCH_CPP_LOG_LEVEL": "FATAL"})
    report = run.communicate(timeout=300)[0]
    assert run.returncode == 0
    return json.loads(report), lambda name: (folder / name).read_text()


def test_all_rows_come_to_rank_0(ranks):
    status, said = ranks
    assert [status[f"all come, {rank}"] for rank in range(3)] == [0, 0, 0]
    rows = [json.loads(said(f"all come, {rank}: rows")) for rank in range(3)]
    assert rows == [[f"row {rank}.{number}" for rank in range(3) for number in range(2)], None, None]
    assert [said(f"all come, {rank}: output") for rank in range(3)] == [f"joined as {rank} of 3\n" for rank in range(3)]
    assert [said(f"all come, {rank}: errors") for rank in range(3)] == ["", "", ""]


@pytest.mark.parametrize(("rank", "dead"), [(0, 1), (1, 0)])
def test_a_rank_that_dies_is_named_by_the_one_that_waits_for_it(rank, dead, ranks):
    status, said = ranks
    assert (status[f"rank {dead} dies, {rank}"], status[f"rank {dead} dies, {dead}"]) == (1, 9)
    errors = said(f"rank {dead} dies, {rank}: errors")
    assert errors.startswith("a rank ended before") and f"ank {dead}" in errors and errors.count("\n") == 1


@pytest.mark.parametrize(("scenario", "rank"), [("nobody comes", 0), ("nobody came before", 1)])
def test_a_rank_that_stays_alone_says_so_in_one_line(scenario, rank, ranks):
    status, said = ranks
    assert status[f"{scenario}, {rank}"] == 1
    assert said(f"{scenario}, {rank}: errors").startswith("not all ranks have started: ")
    assert said(f"{scenario}, {rank}: errors").count("\n") == 1


def test_a_signal_ends_a_rank_that_waits_at_once(ranks):
    status, _ = ranks
    assert status["stopped, alone, 0"] == -signal.SIGINT
    assert status["waited for"] == -signal.SIGTERM
    assert status["the late one lives"]


def test_torchruns_variables_without_their_companions(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for alone in (None, "", "1"):
        if alone is not None:
            monkeypatch.setenv("WORLD_SIZE", alone)
        assert system.join_ranks() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="environment variable MASTER_ADDR expected, but not set"):
        system.join_ranks()


def test_one_process_needs_no_gathering():
    assert system.gather([1, 2], ranks=1) == [1, 2]


def test_examples():
    assert doctest.testmod(system).failed == 0
