"""Files that nobody sees half written, and folders that one process at a time writes to.

Whoever opens a file sees the old content or the new, also after a crash. `together` does the same for several
files of a folder: a list of what is still to be renamed and removed is on the disk before the first of it
happens, and who opens the folder after a crash calls `finish`.
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

TO_DO = ".to-do.json"  # [[new name, name], ...]: renames, or removals where the new name is ""
PART, NAME = re.compile(r"(\.[\w.-]+\.part)?", re.ASCII), re.compile(r"\.?\w[\w.-]*", re.ASCII)
_locks: dict[Path, int] = {}  # the folders that this process has locked, and their open descriptors
_steps: dict[Path, list[tuple[str, str]]] = {}  # what each open `together` has to do


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to. At the end it is flushed to the disk and takes the name.

    If the block raises, `path` stays as it was and what was written is removed. What a kill leaves behind,
    `.NAME.*.part`, the next process that locks the folder removes. Raises what `writing` raises.
    """
    beside, is_step = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part"), False
    steps = _steps.get(path.parent.resolve())
    try:
        with writing(path):
            # O_EXCL: a new file, neither somebody else's nor a link that leads out of the folder
            os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield beside
            sync(beside)
            if is_step := steps is not None:
                steps.append((beside.name, path.name))
            else:
                os.replace(beside, path)
                sync(path.parent)  # the new name itself
    finally:
        if not is_step:
            beside.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Removes a file, if it is there; at the end of `together`, if that is open for its folder."""
    if (steps := _steps.get(path.parent.resolve())) is not None:
        steps.append(("", path.name))
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def together(folder: Path) -> Iterator[None]:
    """All files of `folder` that the block replaces or removes change at its end, or after a crash none does.

    Until then readers see the old files. If the block raises, they stay.
    """
    make_folder(folder)
    folder = folder.resolve()
    if folder in _steps:  # within another block: that one's end is the moment
        yield
        return
    finish(folder)  # or its list would be lost under the new one
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
    """Does what a crash has left to do in a folder. Raises UserError if `together` did not write the list."""
    to_do = folder / TO_DO
    if not to_do.is_file():  # a pipe would never end
        return
    try:
        steps = parse(read_text(to_do))
        right = all(PART.fullmatch(new) and NAME.fullmatch(name) for new, name in steps)
    except (ValueError, TypeError):
        if not to_do.exists():  # somebody else has done it
            return
        right = False
    if not right:
        raise UserError(f"{to_do}: is not a list of what is left to do here: remove it")
    for new, name in steps:
        with contextlib.suppress(FileNotFoundError):  # done before the crash
            os.replace(folder / new, folder / name) if new else (folder / name).unlink()
    sync(folder)
    to_do.unlink(missing_ok=True)
    sync(folder)


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
    if path.is_dir() and os.name != "posix":  # where a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it. Their names are on the disk before any file is in them."""
    if not folder.is_dir():
        make_folder(folder.absolute().parent)
        with writing(folder):
            folder.mkdir(exist_ok=True)
            sync(folder.absolute().parent)


def lock(folder: Path) -> None:
    """Keeps other processes from writing to a folder, until `unlock` or the end of this one, kills included.

    The folder itself is locked (flock), so no file tells of it. Raises UserError where another process has
    the lock. Finishes what a kill interrupted, and removes what it left half written.
    """
    folder = folder.resolve()
    if fcntl is None:
        return
    if holds(folder):
        return
    if folder in _locks:
        os.close(_locks.pop(folder))  # the folder was removed or renamed, and made anew
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
    finish(folder)
    for part in folder.glob(".*.part"):
        part.unlink()


def holds(folder: Path) -> bool:
    """Whether this process has locked the folder that has this name now."""
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
