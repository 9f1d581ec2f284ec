"""Small functions that the other files share: files, the process and its messages, the machine.

torch is imported inside the functions that need it: train.py uses the others before that slow import.
"""

import contextlib
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

written: list[Path] = []  # every file that this process has written, the latest last


# ── files ──


def prepare_folder(folder: Path) -> None:
    """Make a folder, see that it can be written to, and remove what killed runs left half written in it.

    Raises:
        OSError: it cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    for leftover in folder.glob(".*.tmp"):
        writer = leftover.name.split(".")[-3]
        if os.name == "posix" and writer.isdigit() and not _is_alive(int(writer)):
            with contextlib.suppress(OSError):  # another run was faster, or it is somebody else's
                leftover.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, so there is one
        pass
    return True


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file whole or not at all.

    Yields the name of a temporary file in the same folder. When the block ends well it takes the place of `path`,
    after its bytes have reached the disk; when it raises, it is removed and `path` stays what it was. A killed
    process leaves its temporary file behind, for `prepare_folder` to remove.

    Args:
        path: the file to write; its folder must exist.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.{os.getpid()}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        error.filename = str(path)  # people know nothing of the temporary one
        raise
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)  # mkstemp makes files private; a result is as readable as any other file
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
        written.append(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # that of a full disk names no file
            error.filename = str(path)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# ── the process and its messages ──


def say(text: str) -> None:
    """Print a line or more at once, whatever the terminal or the pipe makes of it."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # stdout is None where it is closed
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except BrokenPipeError:  # `| head` has seen enough; the run goes on for the sake of its files
        silence()


def silence() -> None:
    """Drop all that is printed from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(status: int, error: object) -> int:
    """Say in one line on stderr what went wrong; returns the exit status."""
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    print(f"train.py: error: {rank}{' '.join(str(error).split())}", file=sys.stderr)
    return status


def stop_on_signals() -> None:
    """From now on end at SIGINT and SIGTERM with a line that says what was written, and the shells' exit status.

    The first signal still lets the run clean up; a second one, which may come in the midst of that, ends it at once.
    """

    def stop(number: int, frame: object) -> NoReturn:
        kept = [shown(path) for path in dict.fromkeys(written) if path.exists()]
        line = f"\ntrain.py: stopped; {'written: ' + ', '.join(kept) if kept else 'nothing was written yet'}\n"
        with contextlib.suppress(OSError, AttributeError):  # stderr is closed, or None
            os.write(sys.stderr.fileno(), line.encode(errors="replace"))  # for print may be in the midst of a write
        _handle_stops(lambda number, frame: os._exit(128 + number))
        sys.exit(128 + number)

    _handle_stops(stop)


def _handle_stops(handler: Callable[[int, FrameType | None], object]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def shown(path: Path) -> str:
    """A path as people read it: from the working directory where it lies below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


# ── machine ──


def pick_device(name: str) -> "torch.device":
    """The device for "auto", "cpu" or "cuda".

    Raises:
        ValueError: "cuda" where there is none.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; --device cpu runs everywhere")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def pick_precision(name: str, device: "torch.device") -> "torch.dtype":
    """The type of the training passes for "auto", "bf16" or "fp32".

    "auto" is bf16 where the hardware multiplies it natively: elsewhere it is emulated and slower than fp32.
    """
    import torch

    if name == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # there is no public name for them
            native = any(getattr(torch.cpu, probe, bool)() for probe in probes)
        name = "bf16" if native else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32


def versions(device: "torch.device") -> dict[str, str | int]:
    """What a number depends on beside the settings: versions, hardware, threads."""
    import numpy
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):  # Linux alone has this file, and there platform.processor() is empty
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def l2(weight: "torch.Tensor") -> "torch.Tensor":
    """L2 norm of every unit.

    Args:
        weight: (out, …), one row a unit.

    Returns:
        (out,) norms.
    """
    import torch

    return torch.linalg.vector_norm(weight.flatten(1), dim=1)
