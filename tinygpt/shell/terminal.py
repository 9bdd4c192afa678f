"""Output: all commands print through `say`.

The text of a model or a file, or a file's name, may have control characters. A terminal obeys them: they set
its title, fill its clipboard, hide a line. On a terminal, `say` shows them as \\x1b. Files and pipes get the
text unchanged.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable
from typing import TextIO

import click

from ..errors import UserError
from ..lab.texts import narrow, wide

# C0 without tab and newline, DEL, C1, and the marks that change the direction of a text
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def say(text: object = "", nl: bool = True, err: bool = False) -> None:
    """Prints a text to standard output, or with `err` to standard error. nl: with a newline at the end."""
    stream = sys.stderr if err else sys.stdout
    if stream is not None:  # `>&-` in a shell
        # color: without it, click removes escape sequences from the text of a file
        click.echo(printable(text) if is_terminal(stream) else text, nl=nl, err=err, color=True)


def printable(text: object) -> str:
    """A text with each control character as an escape sequence of Python."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a standard stream is a terminal. A stream that the shell closed is None."""
    return stream is not None and stream.isatty()


def can_renew() -> bool:
    """Whether standard output is a terminal that can replace a line."""
    plain = os.environ.get("TERM") == "dumb" or os.environ.get("NO_COLOR")
    return is_terminal(sys.stdout) and not plain


def renew(text: str, before: str = "", nl: bool = False) -> None:
    """Replaces the last line. `before` stands before `text` if the terminal is wide enough.

    With `nl` the line stays. Without `nl` the line is cut to the terminal's width: a wider line takes two
    rows, and the next call would replace only the second.
    """
    columns, text = shutil.get_terminal_size().columns - 1, wide(text)
    if not nl:
        text = (before + text if len(before + text) <= columns else text)[:columns]
    click.echo(f"\r\033[K{narrow(text)}", nl=nl)


def from_stdin(read: Callable[[], str]) -> str:
    if sys.stdin is None:  # `<&-` in a shell
        raise UserError("standard input is closed: there is no text to read")
    try:
        return read()
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8 text") from None


def one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    advice = "not enough memory: choose smaller sizes. " if isinstance(error, MemoryError) else ""
    return advice + " ".join(text.split())
