"""data.py against real files, real faults, and a real server on loopback that answers well, badly or never."""

import contextlib
import gzip
import hashlib
import os
import socket
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data

ROOT = Path(__file__).resolve().parents[1]
REAL_RAW = ROOT / "inputs" / "MNIST" / "raw"
NAMES = list(data.MNIST_FILES)


# ── stand-ins for the four files, and a mirror that serves them ──


def make_files() -> dict[str, bytes]:
    """Four small files in MNIST's format: a header, then bytes."""
    random = np.random.default_rng(7)
    files = {}
    for name in NAMES:
        count = 24 if name.startswith("train") else 6
        shape = (count, 28, 28) if "images" in name else (count,)
        header = np.array([0x0800 + len(shape), *shape], ">i4").tobytes()
        files[name] = header + random.integers(0, 256 if len(shape) > 1 else 10, shape, np.uint8).tobytes()
    return files


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


FILES = make_files()
PACKED = {f"{name}.gz": gzip.compress(content, 1) for name, content in FILES.items()}
FACTS = {name: (len(FILES[name]), md5(FILES[name]), len(PACKED[f"{name}.gz"])) for name in NAMES}
BOMB = gzip.compress(bytes(10**7))  # 10 kB
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


class Mirror(BaseHTTPRequestHandler):
    """Serves ``/BEHAVIOR/NAME``."""

    def do_GET(self):
        _, behavior, name = self.path.split("/")
        self.server.asked.append((behavior, name))
        body = self.server.files[name]
        half = body[: len(body) // 2]
        page = b"<!DOCTYPE html><html><body>Please log in to this network</body></html>"
        if behavior in ("404", "escape"):
            self.send_error(404, "\x1b[2J" if behavior == "escape" else None)
        elif behavior == "silent":
            self.server.closing.wait()
        elif behavior == "hangup":
            self.answer(half, length=len(body))
        elif behavior == "trickle":
            self.answer(b"", length=len(body))
            while not self.server.closing.wait(0.02):
                self.wfile.write(b"x")
        elif behavior == "endless":
            self.answer(b"", length=2**40)
            while not self.server.closing.is_set():
                self.wfile.write(bytes(2**16))
        else:
            self.answer({"page": page, "half": half, "flipped": flip(body), "bomb": BOMB}.get(behavior, body))

    def answer(self, body: bytes, length: int | None = None):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def handle(self):
        with contextlib.suppress(OSError):  # a client that has given up
            super().handle()

    def log_message(self, *_):
        pass


def flip(content: bytes) -> bytes:
    return content[:-20] + bytes(255 - byte for byte in content[-20:])


@contextlib.contextmanager
def serving(files: dict[str, bytes]):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.files, server.asked, server.closing = files, [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server():
    with serving(PACKED) as server:
        yield server


@pytest.fixture
def mirrors(monkeypatch):
    """The list of mirrors, empty; the stand-ins take the place of MNIST."""
    mirrors = []
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data, "MIRRORS", mirrors)
    monkeypatch.setattr(data, "MNIST_FILES", FACTS)
    monkeypatch.setattr(data, "TIMEOUT", 0.8)
    return mirrors


def put(inputs: Path, files: dict[str, bytes]) -> Path:
    raw = inputs / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    return raw


def assert_is_standin(dataset: data.Dataset):
    assert (dataset.name, dataset.fallback_reason) == ("mnist", "")
    found = dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels
    for values, name in zip(found, NAMES, strict=True):
        expected = torch.tensor(list(FILES[name][16 if "images" in name else 8 :]))
        expected = expected.view(-1, 784) / 255 if "images" in name else expected
        assert values.dtype == expected.dtype and torch.equal(values, expected)


def assert_kept_whole(raw: Path, *, packed: bool = False):
    names = {*FILES, *PACKED} if packed else {*FILES}
    assert {path.name for path in raw.iterdir()} == names  # and no temporary file
    assert {name: (raw / name).read_bytes() for name in FILES} == FILES


# ── MNIST from the folder ──


@pytest.mark.parametrize("files", [FILES, PACKED], ids=["unpacked", "packed"])
def test_files_in_the_folder_are_read_and_kept_unpacked(files, mirrors, tmp_path):
    raw = put(tmp_path, files)
    for dataset in ("auto", "mnist"):
        assert_is_standin(data.load(dataset, tmp_path))
        assert_kept_whole(raw, packed=files is PACKED)


WRONG_BYTES = {
    "cut short": lambda content: content[: len(content) // 2],
    "flipped bytes": flip,
    "empty": lambda _: b"",
    "longer": lambda content: content + b"\0",
}
NO_FILES = ["directory", "FIFO", "device", "link to a FIFO", "link to itself"]
KINDS = [*WRONG_BYTES, "huge", *NO_FILES]


@pytest.fixture
def damage():
    """Spoils a file, or puts something else in its place."""
    terminals = []

    def put_in_place(path: Path, kind: str):
        content = path.read_bytes()
        path.unlink()
        if kind == "huge":
            with path.open("wb") as file:
                file.truncate(20 * 10**9)  # it takes no room
        elif kind == "directory":
            path.mkdir()
        elif kind == "FIFO":
            os.mkfifo(path)
        elif kind == "device":
            terminals.extend(os.openpty())
            path.symlink_to(os.ttyname(terminals[-1]))
        elif kind == "link to a FIFO":
            os.mkfifo(path.with_name("pipe"))
            path.symlink_to("pipe")
        elif kind == "link to itself":
            path.symlink_to(path.name)
        else:
            path.write_bytes(WRONG_BYTES[kind](content))

    yield put_in_place
    for terminal in terminals:
        os.close(terminal)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["packed", "mirror"])
def test_wrong_bytes_are_replaced_and_what_is_no_file_is_left_alone(
    kind, source, mirrors, server, tmp_path, capsys, damage
):
    raw = put(tmp_path, FILES | (PACKED if source == "packed" else {}))
    mirrors.append(f"{server.url}/good/")
    damage(raw / IMAGES, kind)
    before = (raw / IMAGES).lstat()
    assert_is_standin(data.load("mnist", tmp_path))
    assert len(server.asked) == (source == "mirror")
    told = capsys.readouterr().err
    assert f"Not used: {raw / IMAGES}" in told
    if kind in NO_FILES:
        assert f"not kept unpacked: [Errno 17] Not a regular file, so it is not replaced: '{raw / IMAGES}'" in told
        assert (raw / IMAGES).lstat() == before
        assert not list(raw.glob(".*"))
    else:
        assert_kept_whole(raw, packed=source == "packed")


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_bytes_that_nothing_can_replace_are_named(kind, mirrors, tmp_path, damage):
    raw = put(tmp_path, FILES)
    damage(raw / LABELS, kind)
    with pytest.raises(data.DataError) as caught:
        data.load("mnist", tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{raw / LABELS}: " in message
    assert f"Put the four .gz files of MNIST into {raw}, or choose --dataset digits" in message
    if kind in ("huge", "longer"):
        assert f"more than {len(FILES[LABELS])} bytes" in message
    elif kind not in NO_FILES:
        assert f"MD5 {md5((raw / LABELS).read_bytes())}, expected 32 with {md5(FILES[LABELS])}" in message
    elif kind != "link to itself":
        assert "not a regular file" in message
    assert data.load("auto", tmp_path).fallback_reason == message


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_gz_is_not_used(kind, mirrors, server, tmp_path, damage):
    raw = put(tmp_path, PACKED)
    damage(raw / f"{IMAGES}.gz", kind)
    with pytest.raises(data.DataError, match=f"{IMAGES}.gz: "):
        data.load("mnist", tmp_path)
    mirrors.append(f"{server.url}/good/")
    assert_is_standin(data.load("mnist", tmp_path))
    assert (raw / IMAGES).read_bytes() == FILES[IMAGES]


def test_the_bytes_that_were_hashed_are_the_ones_used(mirrors, tmp_path, monkeypatch):
    """Somebody overwrites each file as soon as it has been hashed."""
    raw = put(tmp_path, FILES)
    hashed = []

    def hash_then_overwrite(content, **options):
        for path in raw.iterdir():
            if path.read_bytes() == content:
                path.write_bytes(flip(content))
                hashed.append(path.name)
        return hashlib.new("md5", content, **options)

    monkeypatch.setattr(hashlib, "md5", hash_then_overwrite)
    assert_is_standin(data.load("mnist", tmp_path))
    assert hashed == NAMES


def test_a_file_in_the_place_of_the_folder(mirrors, server, tmp_path, capsys):
    mirrors.append(f"{server.url}/good/")
    (tmp_path / "MNIST").write_text("not a folder")
    assert_is_standin(data.load("mnist", tmp_path))
    assert "not kept unpacked" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["folder", "bomb", "endless"])
def test_a_small_file_or_a_mirror_that_grows_without_end_takes_no_memory(source, mirrors, server, tmp_path):
    """2 GB come out of the file in the folder, 10 MB out of the mirror's bomb, and more than there is of the last."""
    if source == "folder":
        put(tmp_path, {f"{IMAGES}.gz": 200 * BOMB})
    else:
        mirrors.append(f"{server.url}/{source}/")
    tracemalloc.start()
    try:
        with pytest.raises(data.DataError, match=r"bytes"):
            data.load("mnist", tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2 * 10**6
    finally:
        tracemalloc.stop()


# ── MNIST from mirrors ──

FAULTS = ["404", "page", "half", "hangup", "flipped", "silent", "trickle", "endless", "bomb", "refused"]


def mirror_that(fault: str, server) -> str:
    if fault != "refused":
        return f"{server.url}/{fault}/"
    with socket.socket() as free:  # a port that nobody listens on any more
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mirror_that_fails_is_named_and_the_next_one_is_asked(fault, mirrors, server, tmp_path, capsys):
    mirrors.append(mirror_that(fault, server))
    fallback = data.load("auto", tmp_path)
    assert fallback.name == "digits"
    assert "\n" not in fallback.fallback_reason
    assert all(text in fallback.fallback_reason for text in (IMAGES, mirrors[0], "choose --dataset digits"))
    assert not list(tmp_path.rglob("*-ubyte*"))
    server.asked.clear()
    capsys.readouterr()
    mirrors.append(f"{server.url}/good/")
    assert_is_standin(data.load("mnist", tmp_path))
    assert_kept_whole(tmp_path / "MNIST" / "raw")
    asked = [behavior for behavior, _ in server.asked]
    assert asked.count("good") == 4
    assert len(asked) - 4 == (fault != "refused")  # a mirror that failed is not asked for the other three files
    told = capsys.readouterr().err
    assert told.count("Downloading") == 5 and told.count(f"Not used: {mirrors[0]}") == 1


def test_a_download_goes_on_where_it_stopped(mirrors, server, tmp_path):
    raw = put(tmp_path, {name: content for name, content in FILES.items() if name != LABELS})
    mirrors.append(f"{server.url}/good/")
    assert_is_standin(data.load("mnist", tmp_path))
    assert server.asked == [("good", f"{LABELS}.gz")]
    assert_kept_whole(raw)


def test_control_characters_of_a_mirror_do_not_reach_the_terminal(mirrors, server, tmp_path):
    mirrors.append(f"{server.url}/escape/")
    message = data.load("auto", tmp_path).fallback_reason
    assert r"\x1b[2J" in message and message.isprintable()


# ── the real MNIST ──


@pytest.mark.mnist
def test_real_mnist_is_what_torchvision_reads(tmp_path, monkeypatch):
    """From the .gz files over a loopback mirror with torchvision's own checksums, then from the kept files."""
    missing = [name for name in NAMES if not (REAL_RAW / f"{name}.gz").is_file()]
    if missing:
        pytest.skip(f"no {missing[0]}.gz in inputs/MNIST/raw")
    from torchvision.datasets import MNIST

    monkeypatch.setenv("no_proxy", "*")
    with serving({f"{name}.gz": (REAL_RAW / f"{name}.gz").read_bytes() for name in NAMES}) as server:
        monkeypatch.setattr(data, "MIRRORS", [f"{server.url}/404/", f"{server.url}/good/"])
        downloaded = data.load("mnist", tmp_path)
    train, test = MNIST(tmp_path, train=True), MNIST(tmp_path, train=False)
    assert torch.equal(downloaded.train_images, train.data.flatten(1) / 255)
    assert torch.equal(downloaded.train_labels, train.targets)
    assert torch.equal(downloaded.test_images, test.data.flatten(1) / 255)
    assert torch.equal(downloaded.test_labels, test.targets)
    kept = data.load("mnist", tmp_path, holdout=True)
    assert torch.equal(torch.cat([kept.train_images, kept.test_images]), downloaded.train_images)
    assert torch.equal(torch.cat([kept.train_labels, kept.test_labels]), downloaded.train_labels)
    assert (len(kept.train_images), len(kept.test_images)) == (50_000, 10_000)


# ── digits ──


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", Path("there", "is", "no", "such", "folder"))


def test_digits_have_the_form_of_mnist(digits):
    assert (digits.name, digits.fallback_reason) == ("digits", "")
    train, test = (digits.train_images, digits.train_labels), (digits.test_images, digits.test_labels)
    for (images, labels), count in ((train, 1437), (test, 360)):
        assert (images.shape, images.dtype) == ((count, 784), torch.float32)
        assert (images.min(), images.max()) == (0, 1)
        assert (labels.shape, labels.dtype) == ((count,), torch.int64)
        assert labels.unique().tolist() == list(range(10))


def test_digits_are_upsampled_bilinearly(digits):
    """Against the definition: pixels are squares, and between their centers the gray level is linear."""
    centers = np.clip((np.arange(28) + 0.5) * 8 / 28 - 0.5, 0, 7)
    left = np.minimum(centers.astype(int), 6)
    weights = np.zeros((28, 8))
    weights[np.arange(28), left] = 1 - (centers - left)
    weights[np.arange(28), left + 1] += centers - left
    with np.load(data.DIGITS_FILE) as file:
        small = file["images"][:50].reshape(-1, 8, 8) / 16
    expected = torch.from_numpy((weights @ small @ weights.T).reshape(-1, 784)).float()
    torch.testing.assert_close(digits.train_images[:50], expected)


def test_digits_neither_use_nor_move_the_random_numbers_and_holdout_leaves_the_test_digits_alone(digits):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    held = data.load("digits", Path(), holdout=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.cat([held.train_images, held.test_images]), digits.train_images)
    assert torch.equal(torch.cat([held.train_labels, held.test_labels]), digits.train_labels)
    assert len(held.test_images) == 239


@pytest.mark.parametrize("kind", [*KINDS, "missing"])
def test_damaged_digits_are_not_used(kind, tmp_path, monkeypatch, damage):
    path = tmp_path / "digits.npz"
    if kind != "missing":
        path.write_bytes(data.DIGITS_FILE.read_bytes())
        damage(path, kind)
    monkeypatch.setattr(data, "DIGITS_FILE", path)
    with pytest.raises(data.DataError, match=r"digits\.npz: .*Restore it"):
        data.load("digits", tmp_path)


def test_an_unknown_dataset():
    with pytest.raises(ValueError, match=r"auto, mnist or digits, got 'cifar'"):
        data.load("cifar", Path())


# ── batches ──


@given(count=st.integers(0, 50), batch_size=st.integers(1, 60), seed=st.none() | st.integers(0, 5))
def test_an_epoch_holds_every_pair_once(count, batch_size, seed):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    labels = torch.arange(count)
    batches = data.Batches(labels[:, None].expand(-1, 3).float(), labels, batch_size, generator)
    for _ in range(2):
        epoch = list(batches)
        if count:
            assert len(epoch) == len(batches) == -(-count // batch_size)
            assert [len(found) for _, found in epoch[:-1]] == [batch_size] * (len(epoch) - 1)
        for images, found in epoch:
            assert torch.equal(images, found[:, None].expand(-1, 3).float())
        seen = [label for _, found in epoch for label in found.tolist()]
        assert (seen if generator is None else sorted(seen)) == labels.tolist()


def test_each_epoch_has_an_order_of_its_own_that_the_seed_repeats():
    def two_epochs(seed):
        batches = data.Batches(torch.rand(100, 784), torch.arange(100), 32, torch.Generator().manual_seed(seed))
        return [torch.cat([labels for _, labels in batches]).tolist() for _ in range(2)]

    first, second = two_epochs(0)
    assert first != second
    assert two_epochs(0) == [first, second]
    assert two_epochs(1)[0] != first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_come_in_the_same_order_on_a_gpu():
    images, labels = torch.rand(100, 784), torch.arange(100)
    here = data.Batches(images, labels, 32, torch.Generator().manual_seed(0))
    there = data.Batches(images.cuda(), labels.cuda(), 32, torch.Generator().manual_seed(0))
    for (images, labels), (images_there, labels_there) in zip(here, there, strict=True):
        assert images_there.is_cuda
        assert torch.equal(images, images_there.cpu())
        assert torch.equal(labels, labels_there.cpu())


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, "4", None])
def test_a_wrong_batch_size_and_images_without_labels(batch_size):
    with pytest.raises(ValueError, match="batch_size must be "):
        data.Batches(torch.rand(4, 784), torch.arange(4), batch_size)
    with pytest.raises(ValueError, match="5 images, but 4 labels"):
        data.Batches(torch.rand(5, 784), torch.arange(4), 2)
