"""What concerns the operating system: files, messages, signals, the machine.

torch is imported inside the functions that need it: train.py uses the others before that slow import.
"""

import contextlib
import errno
import io
import os
import platform
import re
import signal
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch

STOPPED = "train.py: stopped; with --seeds, the same command goes on after the last whole seed"


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


def say(text: str, stream: str = "stdout") -> None:
    """Print a line at once. A stream that is closed, full or gone never ends a run, whose files matter more."""
    try:
        print(text, file=getattr(sys, stream), flush=True)
    except (OSError, ValueError):
        setattr(sys, stream, io.StringIO())


warn = partial(say, stream="stderr")


def one_line(error: object) -> str:
    """Show an error as one printable line: what could command a terminal is escaped."""
    line = " ".join(str(error).split()) or type(error).__name__
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


def begin_program() -> None:
    """Let a program end at SIGINT or SIGTERM with a line and status 130 or 143, and print whatever its streams are."""

    def stop(number: int, frame: object) -> NoReturn:
        with contextlib.suppress(OSError, ValueError):  # stderr is gone
            os.write(sys.stderr.fileno(), f"\n{STOPPED}\n".encode())  # print may be in the midst of a write
        sys.exit(128 + number)  # the program cleans up

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # the parent's choice
            signal.signal(number, stop)
    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()  # None: it was closed
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {one_line(message)}\n"


def exit_status(main: Callable[[], int]) -> int:
    """Run `main` for people: what they can mend is told in one line on stderr, with exit status 1."""
    try:
        return main()
    except (OSError, ImportError, ValueError, ArithmeticError, MemoryError) as error:
        warn(f"train.py: error: {one_line(error)}")
    except RuntimeError as error:  # torch has no class of its own for a CPU without memory
        if "memory" not in str(error):
            raise
        warn("train.py: error: out of memory: try a smaller --batch-size, or --device cpu")
    return 1


def torchrun_rank() -> tuple[int, int]:
    """The number of this process among those that torchrun started, and how many they are; else (0, 1)."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def describe_machine(device: "torch.device") -> dict[str, str | int]:
    """Collect what a number depends on beside the settings: versions, hardware, threads."""
    import numpy
    import torch

    linux = Path("/proc/cpuinfo")
    found = re.search("model name\t: (.*)", linux.read_text(errors="replace")) if linux.exists() else None
    processor = found[1] if found else platform.processor() or platform.machine()
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else processor
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
    return {**versions, "hardware": hardware, "threads": torch.get_num_threads()}
