"""Replace a file as a whole: whoever opens it sees the old content or the new, also after a crash.

Not here: replacing several files together; what must not fall apart goes into one file.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to. At the end it is flushed to the disk and takes the name.

    If the block raises, `path` stays as it was and what was written is removed. What a kill leaves behind,
    `.NAME.part`, the next writer of the same file overwrites. Raises what `writing` raises.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        with writing(path):
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
