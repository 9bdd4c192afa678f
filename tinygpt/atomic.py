"""Files that nobody sees half written, and folders that one process at a time writes to.

Whoever opens a file sees the old content or the new, also after a crash. Not here: replacing several files
together; what must not fall apart goes into one file.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: folders are not locked there
    fcntl = None

from .errors import UserError

_locks: dict[Path, int] = {}  # the folders that this process has locked, and their open descriptors


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to. At the end it is flushed to the disk and takes the name.

    If the block raises, `path` stays as it was and what was written is removed. What a kill leaves behind,
    `.NAME.*.part`, the next process that locks the folder removes. Raises what `writing` raises.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with writing(path):
            # O_EXCL: a new file, neither somebody else's nor a link that leads out of the folder
            os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield beside
            sync(beside)
            os.replace(beside, path)
            if os.name == "posix":  # elsewhere a folder cannot be opened
                sync(path.parent)  # the new name itself
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the operating system's errors, a full disk for one, into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); what was saved before is kept"
        ) from error


def sync(path: Path) -> None:
    """Waits until the disk has what was written to this file or folder."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(folder: Path) -> None:
    """Keeps other processes from writing to a folder, until `unlock` or the end of this one, kills included.

    The folder itself is locked (flock), so no file tells of it. Raises UserError where another process has
    the lock. Removes what a kill left half written.
    """
    folder = folder.resolve()
    if fcntl is None or folder in _locks:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        advice = "wait for it, or take another folder"
        raise UserError(f"{folder}: another process is writing there; {advice}") from None
    except OSError:  # a file system without locks
        os.close(descriptor)
        return
    _locks[folder] = descriptor
    for part in folder.glob(".*.part"):
        part.unlink()


def unlock() -> None:
    """Gives up all locks of this process."""
    while _locks:
        os.close(_locks.popitem()[1])
