"""Small functions that the other files share: whole-or-nothing file writes, seeds, devices, tables, plots."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all.

    Yields the name of a temporary file in the same folder. When the block ends well it takes the place of `path`, after
    its bytes have reached the disk; when it raises, it is removed and `path` stays what it was. A killed process leaves
    its temporary file behind, for `prepare_folder` to remove.

    Args:
        path: the file to write; its folder must exist.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.{os.getpid()}.", suffix=".tmp", dir=path.parent)
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
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
