"""What concerns the operating system: files, messages, signals, the machine, several processes.

torch is imported inside the functions that need it: train.py uses the others before that slow import.
"""

import contextlib
import errno
import os
import platform
import re
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

STOPPED = "train.py: stopped; with --seeds, the same command goes on after the last whole seed"
MEETING = 60.0  # seconds in which all ranks must have started


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; a killed process may leave a `.NAME.….tmp` beside it.

    Raises:
        OSError: it cannot be written, or what stands there is no regular file. The error names `path`.
    """
    target = Path(os.path.realpath(path))  # a symbolic link stays
    temporary = target.with_name(f".{target.name[:30]}.{os.urandom(8).hex()}.tmp")  # names end at 255 bytes
    try:
        if os.path.lexists(target) and not target.is_file():
            raise OSError(errno.EEXIST, "Not a regular file, so it is not replaced")
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # not every file system has it
                    raise
        temporary.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # people do not know the temporary one
    finally:
        with contextlib.suppress(OSError):  # it is gone where all went well
            temporary.unlink()


def check_folder(folder: Path) -> None:
    """Make a folder; create, rename and remove a file in it. Where one of these fails, an OSError names the folder."""
    probe = folder / f".{os.urandom(8).hex()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(probe, b"")
        probe.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def say(text: str, stream: str = "stdout") -> None:
    """Print a line at once. A stream that is closed, full or gone never ends a run, whose files matter more."""
    file = getattr(sys, stream)  # None where it was closed before Python started
    encoding = getattr(file, "encoding", None) or "utf-8"
    try:
        if file:
            print(text.encode(encoding, "replace").decode(encoding), file=file, flush=True)
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
            if file.fileno() in (1, 2):  # what it still holds would fail again at exit, with status 120
                os.dup2(nowhere.fileno(), file.fileno())


def warn(text: str) -> None:
    """Print a line to stderr, as `say` does to stdout."""
    say(text, "stderr")


def one_line(error: object) -> str:
    r"""Show an error as one printable line: what could command a terminal is escaped.

    Example:
        >>> print(one_line(ValueError("two\nlines, \x1b[31mred")))
        two lines, \x1b[31mred
    """
    line = " ".join(str(error).split()) or type(error).__name__
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


def stop_on_signals() -> None:
    """End at the first SIGINT or SIGTERM with a line on stderr and exit status 130 or 143, at a second one at once.

    The first lets the program clean up, for it raises SystemExit. A signal that the parent ignores stays ignored.
    """

    def stop(number: int, frame: object) -> NoReturn:
        _on_signals(signal.SIG_DFL)
        with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr is gone, closed or None
            os.write(sys.stderr.fileno(), f"\n{STOPPED}\n".encode())  # print may be in the midst of a write
        sys.exit(128 + number)

    _on_signals(stop)


def _on_signals(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def pick_device(name: str) -> "torch.device":
    """Choose the device for "auto", "cpu" or "cuda"; ValueError for "cuda" where there is none."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; --device cpu runs everywhere")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def pick_precision(name: str, device: "torch.device") -> "torch.dtype":
    """Choose the type of the training passes: "bf16", "fp32", or "auto", bf16 where it multiplies clearly faster.

    Processors that have the instructions may be slower with them: here the two are measured, for a tenth of a second.
    """
    import torch

    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # there is no public name for them
        native = any(getattr(torch.cpu, probe, bool)() for probe in probes)
        faster = name == "auto" and native and 1.3 * product_time(torch.bfloat16) < product_time(torch.float32)
    return torch.bfloat16 if name == "bf16" or (name == "auto" and faster) else torch.float32


def product_time(dtype: "torch.dtype") -> float:
    """Seconds that a product as in a training step takes, at best."""
    import torch

    left, right, times = torch.ones(512, 1000, dtype=dtype), torch.ones(1000, 1000, dtype=dtype), []
    for _ in range(8):
        start = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - start)
    return min(times)


def describe_machine(device: "torch.device") -> dict[str, str | int]:
    """Collect what a number depends on beside the settings: versions, hardware, threads."""
    import numpy
    import torch

    hardware = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux has a file instead
        if model := re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(errors="replace")):
            hardware = model[1]
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
    return {**versions, "hardware": hardware, "threads": torch.get_num_threads()}


def exit_status(main: Callable[[], int]) -> int:
    """Run `main` for people: what they can mend is told in one line on stderr, with exit status 1."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {one_line(message)}\n"
    try:
        return main()
    except (OSError, ImportError, ValueError, ArithmeticError, MemoryError) as error:
        message = one_line(error)
    except RuntimeError as error:  # torch has no class of its own for a CPU without memory
        if "memory" not in str(error):
            raise
        message = "out of memory: try a smaller --batch-size, or --device cpu"
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    warn(f"train.py: error: {rank}{message}")
    return 1


def join_ranks() -> tuple[int, int]:
    """Meet the other processes of torchrun, if it started this one.

    Returns:
        This process's rank and how many there are; (0, 1) without torchrun. Ranks above 0 leave stdout to rank 0.

    Raises:
        ValueError: not all of torchrun's variables are set.
        ConnectionError: the others did not come within `MEETING`.
    """
    ranks = int(os.environ.get("WORLD_SIZE") or 1)
    if ranks <= 1:
        return 0, 1
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if not os.environ.get(name)]:
        raise ValueError(f"WORLD_SIZE is {ranks} without {', '.join(missing)}: start with torchrun, or unset it")
    rank, local_rank, host, port = (os.environ[name] for name in names)
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(int(local_rank) % torch.cuda.device_count())
    deadline = time.monotonic() + MEETING
    _on_signals(signal.SIG_DFL)  # torch waits in C++, where Python's handlers do not run
    try:
        while rank != "0":  # torch would wait for rank 0 as well, but print a page of C++ when it never comes
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
                break
            if time.monotonic() > deadline:
                raise TimeoutError("rank 0 does not answer")
            time.sleep(0.2)
        store, *_ = next(distributed.rendezvous("env://", timeout=timedelta(seconds=MEETING)))
        week = timedelta(days=7)  # the ranks meet again at the end, perhaps hours apart
        distributed.init_process_group("gloo", store=store, rank=int(rank), world_size=ranks, timeout=week)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(f"the {ranks} ranks did not meet at {host}:{port}: {one_line(error)}") from None
    stop_on_signals()
    if rank != "0":
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
    return int(rank), ranks


def gather(rows: list[Any], ranks: int) -> list[Any] | None:
    """Collect the rows of all ranks on rank 0, in the order of the ranks; None on the others.

    Raises:
        ConnectionError: a rank has ended before that.
    """
    if ranks == 1:
        return rows
    from torch import distributed

    _on_signals(signal.SIG_DFL)  # as in join_ranks
    rank, other = distributed.get_rank(), 0
    try:
        if rank:
            distributed.send_object_list([rows], dst=0)
        for other in range(1, 1 if rank else ranks):
            received: list[Any] = [None]
            distributed.recv_object_list(received, src=other)
            rows = rows + received[0]
    except RuntimeError:
        raise ConnectionError(f"rank {other} ended before the ranks brought their rows together") from None
    distributed.destroy_process_group()
    stop_on_signals()
    return None if rank else rows
