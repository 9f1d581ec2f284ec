"""MNIST, or the bundled digits, as tensors in memory; batches of them. All bytes are verified, all sizes known."""

import gzip
import hashlib
import io
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from system import one_line, say, warn, write_file

MNIST_FILES = {  # bytes and MD5 of the unpacked files; bytes as .gz
    "train-images-idx3-ubyte": (47_040_016, "6bbc9ace898e44ae57da46a324031adb", 9_912_422),
    "train-labels-idx1-ubyte": (60_008, "a25bea736e30d166cdddb491f175f624", 28_881),
    "t10k-images-idx3-ubyte": (7_840_016, "2646ac647ad5339dbf082846283269ea", 1_648_877),
    "t10k-labels-idx1-ubyte": (10_008, "27ae3e4e09519cfbb04c329615203637", 4_542),
}
MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")  # torchvision's
DIGITS_FILE = Path(__file__).resolve().parents[1] / "inputs" / "digits.npz"  # wherever --inputs points
TIMEOUT = 8.0  # seconds; two silent mirrors and a run on digits fit into half a minute
NOT_MNIST = "*** These are NOT MNIST results: the bundled digits took its place. ***"  # said first and last
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
    fallback_reason: str = field(default="", kw_only=True)  # one line: why these are the digits in place of MNIST


def load(dataset: str, inputs: Path, *, holdout: bool = False, device: torch.device | str = "cpu") -> Dataset:
    """Load "mnist" or the bundled "digits" to a device; for "auto" MNIST, or the digits where it is not available.

    MNIST's four files are read from `inputs`/MNIST/raw, or else their .gz, or those of torchvision's mirrors, and kept
    there unpacked. With `holdout` the last sixth of the training images takes the place of the test images.

    Raises: ValueError: another `dataset`. DataError: it is damaged or not available.

    >>> load("digits", Path("inputs")).train_images.shape
    torch.Size([1437, 784])
    """
    if dataset == "auto":
        try:
            return load("mnist", inputs, holdout=holdout, device=device)
        except DataError as error:
            say(f"{NOT_MNIST}\n{error}")
            return replace(load("digits", inputs, holdout=holdout, device=device), fallback_reason=str(error))
    if dataset not in ("mnist", "digits"):
        raise ValueError(f"dataset must be auto, mnist or digits, got {dataset!r}")
    raw, faults = Path(inputs) / "MNIST" / "raw", list[str]()  # shared: a mirror that failed is not asked again
    tensors = _read_digits() if dataset == "digits" else [_read_mnist(raw / name, faults) for name in MNIST_FILES]
    if holdout:
        kept = len(tensors[1]) - len(tensors[1]) // 6
        tensors = [*(tensor[:kept] for tensor in tensors[:2]), *(tensor[kept:] for tensor in tensors[:2])]
    return Dataset(dataset, *(tensor.to(device) for tensor in tensors))


@dataclass(frozen=True, eq=False)
class Batches:
    """Images and labels in batches (B, …) and (B,), on their device; each loop over it is one epoch.

    >>> [len(labels) for _, labels in Batches(torch.rand(10, 784), torch.arange(10), batch_size=4)]
    [4, 4, 2]
    """

    images: Tensor  # (N, …)
    labels: Tensor  # (N,)
    batch_size: int  # >= 1; the last batch holds what is left
    generator: torch.Generator | None = None  # on the CPU: shuffles every epoch, alike on all devices

    def __post_init__(self) -> None:
        """Raise ValueError for a wrong batch size, or for lengths that differ."""
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ValueError(f"batch_size must be a whole number >= 1, got {self.batch_size!r}")
        if len(self.images) != len(self.labels):
            raise ValueError(f"got {len(self.images)} images, but {len(self.labels)} labels")

    def __len__(self) -> int:
        """Batches an epoch."""
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch."""
        if self.generator is None:  # views cost nothing
            return zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True)
        order = torch.randperm(len(self.labels), generator=self.generator).to(self.labels.device)  # (N,)
        parts = order.split(self.batch_size)  # of (B,)
        return ((self.images.index_select(0, part), self.labels.index_select(0, part)) for part in parts)


def _read_digits() -> list[Tensor]:
    """Images (N, 784), bilinearly upsampled from 8x8, and labels (N,): 1,437 to train on, 360 to test."""
    try:
        data = _read(DIGITS_FILE, 46_319, "83f13429d4bafcf5822a0e37e5a5e042")
    except OSError as error:
        raise DataError(f"{DIGITS_FILE}: {one_line(error)}. Restore it: it is part of the repository") from error
    file = np.load(io.BytesIO(data))  # shuffled once, when it was made
    squares, labels = torch.tensor(file["images"]).view(-1, 1, 8, 8) / 16, torch.tensor(file["labels"]).long()
    images = torch.nn.functional.interpolate(squares, size=(28, 28), mode="bilinear").flatten(1)  # (1797, 784)
    return [images[:1437], labels[:1437], images[1437:], labels[1437:]]


def _read_mnist(path: Path, faults: list[str]) -> Tensor:
    """Images (N, 784) or labels (N,) of one file, from the first source without a fault; it is kept at `path`."""
    sources: list[Path | str] = [path, Path(f"{path}.gz")]
    sources += [f"{url}{path.name}.gz" for url in MIRRORS if not any(url in fault for fault in faults)]
    for source in sources:
        try:
            data = _read(source, *MNIST_FILES[path.name])
            break
        except FileNotFoundError:
            pass
        except Exception as error:  # gzip alone has four kinds for wrong bytes, and a mirror fails in many ways
            faults.append(f"{source}: {one_line(error)}")
            warn(f"Not used: {faults[-1]}")
    else:
        cure = f"Put the four .gz files of MNIST into {path.parent}, or choose --dataset digits"
        raise DataError(f"MNIST's {path.name} is not available: {'; '.join(faults)}. {cure}")
    if source != path:
        try:
            write_file(path, data)
        except OSError as error:  # the bytes are good all the same
            warn(f"MNIST is not kept unpacked: {one_line(error)}; this run goes on without that")
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # after a header of 16 bytes, or 8
    return values[16:].view(-1, 784).float().div_(255) if "images" in path.name else values[8:].long()


def _read(source: Path | str, size: int, md5: str, packed_size: int = 0) -> bytes:
    """The verified bytes of a file or an address, unpacked where it is a .gz; hardly more than these are ever read."""
    packed, data, started = str(source).endswith(".gz"), bytearray(), time.monotonic()
    most = packed_size if packed else size
    if isinstance(source, str):
        warn(f"Downloading {source}")
    elif source.exists() and not source.is_file():  # a FIFO would wait for a writer
        raise DataError("not a regular file")
    with urllib.request.urlopen(source, timeout=TIMEOUT) if isinstance(source, str) else source.open("rb") as stream:
        while chunk := stream.read1(2**16):
            data += chunk  # every byte starts urlopen's own timeout again
            if len(data) > most:
                raise DataError(f"more than {most:,} bytes")
            if (seconds := time.monotonic() - started) > max(TIMEOUT, len(data) / SLOWEST):
                raise DataError(f"too slow: {len(data):,} bytes in {seconds:.0f} s")
    content = gzip.GzipFile(fileobj=io.BytesIO(data)).read(size + 1) if packed else bytes(data)  # no bomb
    if (found := hashlib.md5(content, usedforsecurity=False).hexdigest()) != md5:
        raise DataError(f"{len(content):,} bytes with MD5 {found}, expected {size:,} with {md5}")
    return content
