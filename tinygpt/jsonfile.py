"""Text files and JSON files that anybody may have written.

A downloaded folder may hold a pipe, which never ends, a link to a device, or a file that takes all memory.
These functions read regular files of a limited size, and nothing else.
"""

import json
import stat
from pathlib import Path
from reprlib import repr as short

from .errors import UserError

MOST_BYTES = 1 << 24  # of a text; GPT-2's tokenizer.json has 1.4 MB
MOST_VALUES = 1 << 20  # of a JSON text; GPT-2's tokenizer.json has 200,000. A value takes about 100 bytes


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The UTF-8 text of a regular file of at most `most` bytes. Raises UserError."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: is not a regular file")
        if status.st_size > most:
            raise UserError(f"{path}: has {status.st_size:,} bytes: at most {most:,} are read")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def parse(text: str) -> object:
    """The value of a JSON text. Raises ValueError for one that is wrong, too deep, or of too many values."""
    if sum(map(text.count, ",[{")) > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES:,} values")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("brackets nested too deeply") from None


def read_object(path: Path) -> dict:
    """The JSON object in a file. Raises UserError."""
    text = read_text(path)
    try:
        value = parse(text)
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}); it may be incomplete, get it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: should hold a JSON object, holds {short(value)}")
    return value
