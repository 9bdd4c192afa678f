"""Text files and JSON files from an unknown author.

A downloaded folder may have a pipe, which never ends, a link to a device, or a file that fills the memory.
These functions read only regular files of a limited size.
"""

import json
from pathlib import Path
from reprlib import repr as short

from ..errors import UserError

MOST_BYTES = 1 << 24  # of a text; GPT-2's tokenizer.json has 1.4 MB
MOST_VALUES = 1 << 19  # of a JSON text; GPT-2's tokenizer.json has 200,000. A value takes about 100 bytes


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The UTF-8 text of a regular file of at most `most` bytes. Raises UserError."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is not a regular file")
        size = min(path.stat().st_size, most)
        with path.open("rb") as file:
            data = file.read(size + 1)
        if len(data) > size:  # the file is too large, or grows
            raise UserError(f"{path}: has more than {most:,} bytes: only smaller files are read")
        return data.decode().replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def parse(text: str) -> object:
    """The value of a JSON text. Raises ValueError for wrong JSON, deep nesting, or too many values."""
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
        raise UserError(f"{path}: is not JSON ({error}); it may be incomplete: get it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: should be a JSON object, is {short(value)}")
    return value
