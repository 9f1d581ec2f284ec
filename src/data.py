"""MNIST, or the bundled digits, as tensors in memory; batches of them.

Nothing is used unverified: a file is read once, and the very bytes that were hashed are used.
"""

import gzip
import hashlib
import io
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils import atomic_write, prepare_folder

# The unpacked files with their MD5 digests; torchvision knows those of the .gz files only.
MNIST_FILES = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
DIGITS_FILE = Path(__file__).resolve().parents[1] / "inputs" / "digits.npz"  # wherever --inputs points
DIGITS_MD5 = "83f13429d4bafcf5822a0e37e5a5e042"
TIMEOUT = 8.0  # seconds; two silent mirrors and a run on digits fit into half a minute
SLOWEST = 10_000  # bytes a second; a mirror that sends less counts as silent


class DataError(RuntimeError):
    """The data cannot be had. The message is one line: which file, why, and what to do."""


@dataclass(frozen=True)
class Dataset:
    """Images and the digits that they show, all on one device."""

    name: str  # "mnist" or "digits"
    train_images: Tensor  # (N, 784) float32 in [0, 1]
    train_labels: Tensor  # (N,) int64
    test_images: Tensor  # (M, 784) float32 in [0, 1]
    test_labels: Tensor  # (M,) int64
    fallback_reason: str = ""  # one line, where these are the digits because MNIST cannot be had


def load(dataset: str, inputs: Path, *, holdout: bool = False, device: torch.device | str = "cpu") -> Dataset:
    """Load MNIST or the digits.

    MNIST is read from `inputs`/MNIST/raw: its four files, or their .gz. What is missing or wrong there is
    downloaded from torchvision's mirrors, and kept there unpacked. Lines on stderr tell of it.

    Args:
        dataset: "mnist", "digits", or "auto": MNIST, or the digits where it cannot be had.
        inputs: the folder of MNIST/; made where it is missing. It may be read-only.
        holdout: put the last sixth of the training images (MNIST: 10,000) in the place of the test images.
        device: where the tensors go.

    Raises:
        ValueError: another `dataset`.
        DataError: "mnist" cannot be had, or the bundled digits are damaged.
    """
    if dataset not in ("auto", "mnist", "digits"):
        raise ValueError(f"dataset must be auto, mnist or digits, got {dataset!r}")
    name, reason = "digits", ""
    if dataset != "digits":
        try:
            name, tensors = "mnist", _read_mnist(Path(inputs) / "MNIST" / "raw")
        except DataError as error:
            if dataset == "mnist":
                raise DataError(f"{error}, or choose --dataset digits") from error
            reason = str(error)
    if name == "digits":
        tensors = _read_digits()
    images, labels, test_images, test_labels = (tensor.to(device) for tensor in tensors)
    if holdout:
        kept = len(labels) - len(labels) // 6
        images, test_images = images[:kept], images[kept:]
        labels, test_labels = labels[:kept], labels[kept:]
    return Dataset(name, images, labels, test_images, test_labels, reason)


@dataclass(frozen=True, eq=False)
class Batches:
    """Images and labels in batches (B, …) and (B,), on their device; each loop over it is one epoch.

    Raises:
        TypeError: `batch_size` is no whole number.
        ValueError: `batch_size` is below 1, or the lengths differ.

    Example:
        >>> [len(labels) for _, labels in Batches(torch.rand(10, 784), torch.arange(10), batch_size=4)]
        [4, 4, 2]
    """

    images: Tensor  # (N, …)
    labels: Tensor  # (N,)
    batch_size: int  # >= 1; the last batch holds what is left
    generator: torch.Generator | None = None  # on the CPU: shuffles every epoch anew, alike on all devices

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not isinstance(self.batch_size, int):
            raise TypeError(f"batch_size must be a whole number, got {type(self.batch_size).__name__}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}")
        if len(self.images) != len(self.labels):
            raise ValueError(f"got {len(self.images)} images, but {len(self.labels)} labels")

    def __len__(self) -> int:
        """Batches an epoch."""
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch."""
        if self.generator is None:  # views cost nothing
            yield from zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True)
            return
        order = torch.randperm(len(self.labels), generator=self.generator).to(self.labels.device)  # (N,)
        for chosen in order.split(self.batch_size):  # (B,)
            yield self.images.index_select(0, chosen), self.labels.index_select(0, chosen)


def _read_digits() -> list[Tensor]:
    """Images (N, 784), bilinearly upsampled from 8x8, and labels (N,): 1,437 to train on, 360 to test."""
    try:
        data = _verified(DIGITS_FILE.read_bytes(), DIGITS_MD5)
    except (OSError, DataError) as error:
        raise DataError(f"{DIGITS_FILE}: {_why(error)}. Restore it: it is part of the repository") from error
    with np.load(io.BytesIO(data), allow_pickle=False) as file:  # shuffled once, when the file was made
        small, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long()  # (1797, 64), (1797,)
    squares = (small / 16).view(-1, 1, 8, 8)  # from values in 0..16
    images = torch.nn.functional.interpolate(squares, size=(28, 28), mode="bilinear").flatten(1)  # (1797, 784)
    return [images[:1437], labels[:1437], images[1437:], labels[1437:]]


def _read_mnist(raw: Path) -> list[Tensor]:
    """Images (N, 784) and labels (N,) to train on, then those to test."""
    tensors = []
    failed: dict[str, str] = {}  # mirror → why; it is not asked again
    for name, md5 in MNIST_FILES.items():
        data = bytearray(_read_mnist_file(raw / name, md5, failed))  # torch warns of bytes, which can't be written to
        if "images" in name:  # verified bytes need no parsing: the header has 16 bytes here, 8 before labels
            pixels = torch.frombuffer(data, dtype=torch.uint8, offset=16).view(-1, 784)
            tensors.append(pixels.to(torch.float32).div_(255))
        else:
            tensors.append(torch.frombuffer(data, dtype=torch.uint8, offset=8).long())
    return tensors


def _read_mnist_file(path: Path, md5: str, failed: dict[str, str]) -> bytes:
    """The verified bytes of one file: from `path`, its .gz or a mirror not in `failed`; then kept at `path`."""
    packed = path.with_name(f"{path.name}.gz")
    sources: dict[str, Callable[[], bytes]] = {
        str(path): path.read_bytes,
        str(packed): lambda: gzip.decompress(packed.read_bytes()),
        "download": lambda: gzip.decompress(_download(packed.name, failed)),
    }
    faults = []
    for source, read in sources.items():
        try:
            data = _verified(read(), md5)
        except FileNotFoundError:
            pass
        except Exception as error:  # gzip alone has four kinds for wrong bytes
            faults.append(f"{source}: {_why(error)}")
        else:
            if faults:
                print(f"Not used: {'; '.join(faults)}", file=sys.stderr)
            if source != str(path):
                _keep(data, path)
            return data
    raise DataError(
        f"MNIST's {path.name} (MD5 {md5}) cannot be had: {'; '.join(faults)}. "
        f"Put the four .gz files of MNIST into {path.parent}"
    )


def _keep(data: bytes, path: Path) -> None:
    try:
        prepare_folder(path.parent)
        with atomic_write(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:  # the bytes are good all the same
        print(f"Cannot keep {path} ({_why(error)}); this run goes on without it", file=sys.stderr)


def _download(packed: str, failed: dict[str, str]) -> bytes:
    """A .gz file from the first mirror, but those in `failed`, whose bytes have torchvision's checksum."""
    try:
        from torchvision.datasets import MNIST
    except Exception as error:  # beside the wrong torch: RuntimeError, OSError, AttributeError, …
        raise DataError(
            f"torchvision is missing or does not match torch {torch.__version__} ({_why(error)}): install the two "
            "together, pip install --force-reinstall -r requirements.txt"
        ) from error
    for mirror in MNIST.mirrors:
        if mirror not in failed:
            print(f"Downloading {mirror}{packed}", file=sys.stderr)
            try:
                return _verified(_fetch(mirror + packed), dict(MNIST.resources)[packed])
            except Exception as error:  # however a mirror fails, the next is asked
                failed[mirror] = f"{mirror}: {_why(error)}"
    raise DataError("; ".join(failed.values()))


def _fetch(url: str) -> bytes:
    """The bytes at `url`; DataError when it fails or too few come within `TIMEOUT`.

    A socket's own timeout leaves out the name look-up, starts anew for each address of the host, and never ends
    for a server that trickles. So a thread does the transfer, and is left behind if it stalls.
    """
    received = bytearray()
    whole: Future[bytes] = Future()

    def transfer() -> None:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                while chunk := response.read1(2**16):
                    received.extend(chunk)
            whole.set_result(bytes(received))
        except Exception as error:  # handed on as words: kept, it would keep its socket open
            whole.set_exception(DataError(_why(error)))

    threading.Thread(target=transfer, daemon=True).start()
    while True:
        before = len(received)
        try:
            return whole.result(TIMEOUT)
        except TimeoutError:
            if len(received) - before < SLOWEST * TIMEOUT:
                raise DataError(f"silent or too slow for {TIMEOUT:g} s") from None


def _verified(data: bytes, md5: str) -> bytes:
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != md5:
        raise DataError(f"{len(data):,} bytes with MD5 {found}, expected {md5}")
    return data


def _why(error: Exception) -> str:
    """An error as one line, without the file name that the caller gives."""
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
