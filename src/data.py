"""MNIST, or the bundled digits, as tensors in memory; batches of them.

Nothing is used unverified, and nothing is read without end: every size is known.
"""

import gzip
import hashlib
import io
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from system import one_line, warn, write_file

MNIST_FILES = {  # bytes unpacked and as .gz; MD5 of the unpacked ones
    "train-images-idx3-ubyte": (47_040_016, 9_912_422, "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": (60_008, 28_881, "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": (7_840_016, 1_648_877, "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": (10_008, 4_542, "27ae3e4e09519cfbb04c329615203637"),
}
DIGITS_FILE = Path(__file__).resolve().parents[1] / "inputs" / "digits.npz"  # wherever --inputs points
DIGITS_SIZE, DIGITS_MD5 = 46_319, "83f13429d4bafcf5822a0e37e5a5e042"
TIMEOUT = 8.0  # seconds; two silent mirrors and a run on digits fit into half a minute
SLOWEST = 30_000  # bytes a second on average; a mirror that sends less counts as silent


class DataError(OSError):
    """The data is not available. The message is one line: which file, why, and what to do."""


@dataclass(frozen=True)
class Dataset:
    """Images and the digits that they show, all on one device."""

    name: str  # "mnist" or "digits"
    train_images: Tensor  # (N, 784) float32 in [0, 1]
    train_labels: Tensor  # (N,) int64
    test_images: Tensor  # (M, 784) float32 in [0, 1]
    test_labels: Tensor  # (M,) int64
    fallback_reason: str = ""  # one line, where these are the digits because MNIST is not available


def load(dataset: str, inputs: Path, *, holdout: bool = False, device: torch.device | str = "cpu") -> Dataset:
    """Load MNIST or the digits.

    MNIST is read from `inputs`/MNIST/raw: its four files, or their .gz. What is missing or wrong there is downloaded
    from torchvision's mirrors, as lines on stderr say. It is kept there unpacked, unless the folder is read-only.

    Args:
        dataset: "mnist", "digits", or "auto": MNIST, or the digits where it is not available.
        inputs: the folder of MNIST/; made where it is missing.
        holdout: put the last sixth of the training images (MNIST: 10,000) in the place of the test images.
        device: where the tensors go.

    Raises:
        ValueError: another `dataset`.
        DataError: "mnist" is not available, or the bundled digits are damaged.

    Example:
        >>> load("digits", Path("inputs")).train_images.shape
        torch.Size([1437, 784])
    """
    if dataset not in ("auto", "mnist", "digits"):
        raise ValueError(f"dataset must be auto, mnist or digits, got {dataset!r}")
    reason = ""
    try:
        tensors = _read_digits() if dataset == "digits" else _read_mnist(Path(inputs) / "MNIST" / "raw")
    except DataError as error:
        if dataset != "auto":
            raise
        reason, tensors = str(error), _read_digits()
    name = "digits" if reason or dataset == "digits" else "mnist"
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
    generator: torch.Generator | None = None  # on the CPU: shuffles every epoch, alike on all devices

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
        data = _read(DIGITS_FILE, DIGITS_SIZE, 0, DIGITS_MD5)
    except Exception as error:
        raise DataError(f"{DIGITS_FILE}: {one_line(error)}. Restore it: it is part of the repository") from error
    with np.load(io.BytesIO(data), allow_pickle=False) as file:  # shuffled once, when the file was made
        small, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long()  # (1797, 64), (1797,)
    squares = (small / 16).view(-1, 1, 8, 8)  # from values in 0..16
    images = torch.nn.functional.interpolate(squares, size=(28, 28), mode="bilinear").flatten(1)  # (1797, 784)
    return [images[:1437], labels[:1437], images[1437:], labels[1437:]]


def _read_mnist(raw: Path) -> list[Tensor]:
    """Images (N, 784) and labels (N,) to train on, then those to test."""
    tensors: list[Tensor] = []
    faults: list[str] = []  # a file or an address, and why it is not used
    for name in MNIST_FILES:
        data = bytearray(_read_mnist_file(raw / name, faults))  # torch warns of bytes, which are read-only
        if "images" in name:  # verified bytes need no parsing: the header has 16 bytes here, 8 before labels
            pixels = torch.frombuffer(data, dtype=torch.uint8, offset=16).view(-1, 784)
            tensors.append(pixels.to(torch.float32).div_(255))
        else:
            tensors.append(torch.frombuffer(data, dtype=torch.uint8, offset=8).long())
    if faults:
        warn(f"Not used: {'; '.join(faults)}")
    return tensors


def _read_mnist_file(path: Path, faults: list[str]) -> bytes:
    """The verified bytes of one file from the first source without a fault; then kept at `path`."""
    for source in _sources(path, faults):
        try:
            data = _read(source, *MNIST_FILES[path.name])
        except FileNotFoundError:
            continue
        except Exception as error:  # gzip alone has four kinds for wrong bytes, and a mirror fails in many ways
            faults.append(f"{source}: {one_line(error)}")
            continue
        if source != path:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, data)
            except OSError as error:  # the bytes are good all the same
                warn(f"MNIST is not kept unpacked: {one_line(error)}; this run goes on without that")
        return data
    cure = f"Put the four .gz files of MNIST into {path.parent}, or choose --dataset digits"
    raise DataError(f"MNIST's {path.name} is not available: {'; '.join(faults)}. {cure}")


def _sources(path: Path, faults: list[str]) -> Iterator[Path | str]:
    """The unpacked file; its .gz; the address of that at each mirror that has not failed yet."""
    yield path
    yield path.with_name(f"{path.name}.gz")
    try:
        from torchvision.datasets import MNIST
    except Exception as error:  # beside the wrong torch: RuntimeError, OSError, AttributeError, …
        fault = f"torchvision is missing or does not match torch {torch.__version__} ({one_line(error)})"
        faults.append(f"{fault}: install the two together, pip install --force-reinstall -r requirements.txt")
        return
    for mirror in MNIST.mirrors:
        if not any(fault.startswith(mirror) for fault in faults):
            yield f"{mirror}{path.name}.gz"


def _read(source: Path | str, size: int, packed_size: int, md5: str) -> bytes:
    """The verified bytes of a file or an address, unpacked where it is a .gz; hardly more than these are ever read."""
    packed = str(source).endswith(".gz")
    most = packed_size if packed else size
    if isinstance(source, str):
        data = _fetch(source, most)
    elif source.exists() and not source.is_file():  # a FIFO would wait for a writer
        raise DataError("not a regular file")
    else:
        with source.open("rb") as file:
            data = file.read(most + 1)
    if len(data) > most:
        raise DataError(f"more than {most:,} bytes")
    if packed:
        data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(size + 1)  # a bomb unpacks no further
    if (found := hashlib.md5(data, usedforsecurity=False).hexdigest()) != md5:
        raise DataError(f"{len(data):,} bytes with MD5 {found}, expected {size:,} with {md5}")
    return data


def _fetch(url: str, most: int) -> bytes:
    """The bytes at `url`, not many more than `most`; DataError where they come more slowly than `SLOWEST`."""
    warn(f"Downloading {url}")
    received, started = bytearray(), time.monotonic()
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        while len(received) <= most and (chunk := response.read1(2**16)):
            received += chunk
            seconds = time.monotonic() - started  # every byte starts urlopen's own timeout again
            if seconds > TIMEOUT and len(received) < SLOWEST * seconds:
                raise DataError(f"too slow: {len(received):,} bytes in {seconds:.0f} s")
    return bytes(received)
