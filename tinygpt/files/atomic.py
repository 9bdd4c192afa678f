"""Files that are never seen half written, and folders with one writing process at a time.

A reader of a file sees the old content or the new content, also after a crash. `together` does the same for
several files of a folder. It first writes a list of the renames and removals to the disk, and then does them.
After a crash `finish` does the rest of the list: whoever loads a folder calls `finish` first.
"""

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: folders are not locked there
    fcntl = None

from ..errors import UserError
from .jsonfile import parse, read_text

TO_DO = ".to-do.json"  # [[part, name], ...]: rename part to name, or remove name if part is ""
PART, NAME = re.compile(r"(\.[\w.-]+\.part)?", re.ASCII), re.compile(r"\.?\w[\w.-]*", re.ASCII)
_locks: dict[Path, int] = {}  # the folders that this process has locked, and their open descriptors
_steps: dict[Path, list[tuple[str, str]]] = {}  # the list of each open `together`


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a new path, for a file that replaces `path` at the end of the block, once it is on the disk.

    If the block raises, `path` stays as it was and the new file is removed. After a kill the new file,
    `.NAME.*.part`, stays until the next process locks the folder. Raises UserError as `writing` does.
    """
    beside, is_step = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part"), False
    steps = _steps.get(path.parent.resolve())
    try:
        with writing(path):
            # O_EXCL: fails if the name exists, as a file of another process or a link to another folder
            os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield beside
            sync(beside)
            if is_step := steps is not None:
                steps.append((beside.name, path.name))
            else:
                os.replace(beside, path)
                sync(path.parent)  # the name is on the disk too
    finally:
        if not is_step:
            beside.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Removes a file, if it exists. Within `together` for its folder it does so at the end of the block."""
    if (steps := _steps.get(path.parent.resolve())) is not None:
        steps.append(("", path.name))
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def together(folder: Path) -> Iterator[None]:
    """Replaces and removes files of `folder` together, at the end of the block: all of them, or none.

    This holds after a crash too. Until the end readers see the old files. If the block raises, the old files
    stay.
    """
    make_folder(folder)
    folder = folder.resolve()
    if folder in _steps:  # within another block for this folder: its end is the moment
        yield
        return
    finish(folder)  # an older list must not be overwritten
    steps = _steps[folder] = []
    try:
        yield
        del _steps[folder]
        with replacing(folder / TO_DO) as beside:
            beside.write_text(json.dumps(steps), encoding="utf-8")
        with writing(folder):
            finish(folder)
    finally:
        _steps.pop(folder, None)
        if not (folder / TO_DO).exists():
            for new in filter(None, (new for new, _ in steps)):
                (folder / new).unlink(missing_ok=True)


def finish(folder: Path) -> None:
    """Does the rest of a list after a crash. Raises UserError for a list that `together` did not write."""
    to_do = folder / TO_DO
    if not to_do.is_file():  # a pipe would never end
        return
    try:
        steps = parse(read_text(to_do))
        right = all(PART.fullmatch(new) and NAME.fullmatch(name) for new, name in steps)
    except (ValueError, TypeError):
        if not to_do.exists():  # another process was faster
            return
        right = False
    if not right:
        raise UserError(f"{to_do}: is not a list of renames and removals in this folder: remove it")
    for new, name in steps:
        with contextlib.suppress(FileNotFoundError):  # done before the crash
            os.replace(folder / new, folder / name) if new else (folder / name).unlink()
    sync(folder)
    to_do.unlink(missing_ok=True)
    sync(folder)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error of the operating system, such as a full disk, into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        reason = f"cannot be written ({error.strerror}); the files from before are kept"
        raise UserError(f"{path}: {reason}") from error


def sync(path: Path) -> None:
    """Waits until the content of a file or folder is on the disk."""
    if path.is_dir() and os.name != "posix":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents. Their names are on the disk before a file is in them."""
    if not folder.is_dir():
        make_folder(folder.absolute().parent)
        with writing(folder):
            folder.mkdir(exist_ok=True)
            sync(folder.absolute().parent)


def lock(folder: Path) -> None:
    """Locks a folder against other writers, until `unlock` or the end of this process, even by a kill.

    Makes the folder if necessary. The lock is on the folder itself (flock), not in a file. With the lock, it
    completes an interrupted `together` and removes files that a kill left half written. Without flock, as on
    Windows, nothing is locked. Raises UserError if another process has the lock.
    """
    make_folder(folder)
    folder = folder.resolve()
    if fcntl is None or holds(folder):
        return
    if folder in _locks:
        os.close(_locks.pop(folder))  # of an older folder with this name
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        text = "another process is writing there; wait for it, or take another folder"
        raise UserError(f"{folder}: {text}") from None
    except OSError:  # the file system has no locks; `holds` still sees whether the folder is the same one
        _locks[folder] = descriptor
        return
    _locks[folder] = descriptor
    finish(folder)
    for part in folder.glob(".*.part"):
        part.unlink()


def holds(folder: Path) -> bool:
    """Whether this process has locked the folder that now has this name."""
    folder = folder.resolve()
    if fcntl is None:
        return folder.exists()
    with contextlib.suppress(FileNotFoundError):
        return folder in _locks and os.path.samestat(os.fstat(_locks[folder]), os.stat(folder))
    return False


def unlock() -> None:
    """Gives up all locks of this process."""
    while _locks:
        os.close(_locks.popitem()[1])
