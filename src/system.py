"""What concerns the operating system: files, messages, signals, the machine, several processes.

torch is imported inside the functions that need it: train.py uses the others before that slow import.
"""

import contextlib
import errno
import os
import platform
import re
import signal
import sys
import timeit
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

STOPPED = "train.py: stopped; with --seeds, the same command goes on after the last whole seed"
MEETING = 25.0  # seconds in which all ranks must have started; torch waits twice


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, and make its folder; OSError. A kill may leave a `.NAME.….tmp` there."""
    target = Path(os.path.realpath(path))  # a symbolic link stays
    temporary = target.with_name(f".{target.name[:30]}.{os.urandom(8).hex()}.tmp")  # names end at 255 bytes
    try:
        if os.path.lexists(target) and not target.is_file():
            raise OSError(errno.EEXIST, "Not a regular file, so it is not replaced")
        target.parent.mkdir(parents=True, exist_ok=True)
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
    """Make a folder; raise an OSError unless a file can be created, renamed and removed there."""
    probe = folder / f".{os.urandom(8).hex()}.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    write_file(probe, b"")
    probe.unlink()


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
    """Show an error as one printable line: what could command a terminal is escaped."""
    line = " ".join(str(error).split()) or type(error).__name__
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


def stop_on_signals() -> None:
    """End at the first SIGINT or SIGTERM with a line on stderr and status 130 or 143, at a second one at once."""

    def stop(number: int, frame: object) -> NoReturn:
        _on_signals(signal.SIG_DFL)
        with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr is gone, closed or None
            os.write(sys.stderr.fileno(), f"\n{STOPPED}\n".encode())  # print may be in the midst of a write
        sys.exit(128 + number)  # the program cleans up

    _on_signals(stop)


def _on_signals(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # the parent's choice
            signal.signal(number, handler)


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


def pick_device(name: str) -> "torch.device":
    """Choose the device for "auto", "cpu" or "cuda"; ValueError for "cuda" where there is none."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; --device cpu runs everywhere")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0) % torch.cuda.device_count())


def pick_precision(name: str, device: "torch.device") -> "torch.dtype":
    """Choose the type of the training passes: "bf16", "fp32", or "auto", bf16 where it multiplies clearly faster."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(1000, 1000, dtype=dtype, device="cpu")
        return min(timeit.repeat(lambda: matrix[:512] @ matrix, number=1, repeat=10))

    if name == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # Without the instructions a product takes a second; there is no public name for them. With them it may be slower.
    native = any(getattr(torch.cpu, probe, bool)() for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    faster = name == "auto" and native and 1.3 * seconds(torch.bfloat16) < seconds(torch.float32)
    return torch.bfloat16 if name == "bf16" or faster else torch.float32


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


def join_ranks() -> tuple[int, int]:
    """Meet the other processes of torchrun, if it started this one; return the rank and how many there are.

    Raises:
        ValueError: not all of torchrun's variables are set.
        ConnectionError: the others did not come in time.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) <= 1:
        return 0, 1
    from torch import distributed

    with _waiting("not all ranks have started"):
        distributed.init_process_group("gloo", timeout=timedelta(seconds=MEETING))
    return distributed.get_rank(), distributed.get_world_size()


def gather(rows: list[Any], ranks: int) -> list[Any] | None:
    """Collect the rows of all ranks on rank 0; None on the others. ConnectionError where a rank ended before."""
    if ranks == 1:
        return rows
    from torch import distributed

    gathered: list[Any] = [[]] * ranks
    with _waiting("a rank ended before the others"):
        distributed.monitored_barrier(timeout=timedelta(days=7))  # they may come hours apart
        distributed.gather_object(rows, gathered if distributed.get_rank() == 0 else None)
        distributed.destroy_process_group()
    return [row for rows in gathered for row in rows] or None


@contextlib.contextmanager
def _waiting(fault: str) -> Iterator[None]:
    """Let a signal end the process at once, as torch waits in C++, where Python's handlers do not run."""
    _on_signals(signal.SIG_DFL)
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(f"{fault}: {str(error).splitlines()[0]}") from None
    finally:
        stop_on_signals()
