"""Examples in files: conversations, prompts and comparisons, in the forms that other tools write.

A file has a JSON object in each line, or is one list of objects. `FORMS` is the table of forms; every command
takes every form that has what the command needs.

Whether an example can be used is decided in one way for all commands. What cannot be used is left out, not
cut, and `Notes` has a line for each reason: how many, and the first by file and line.

Not here: how a conversation is written as text (`instructions`).
"""

import itertools
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple, TypeVar

from ..errors import UserError
from ..files.jsonfile import MOST_BYTES, parse
from .data import not_utf8
from .instructions import Message, Prompt, answer_text, before
from .tokenizer import END_OF_TEXT

# --- what was noticed ---------------------------------------------------------------------------------------

S, T = TypeVar("S"), TypeVar("T")


class LeftOutError(Exception):
    """An example cannot be used. The text of the exception is the reason."""


class Notes(defaultdict):
    """Each thing that was noticed about examples -> file:line of each of these examples."""

    def __init__(self) -> None:
        super().__init__(list)

    def __str__(self) -> str:
        """A line for each thing."""
        return "\n".join(f"{thing}: {len(at):,}, the first is {at[0]}" for thing, at in self.items())

    def keep(self, places: Iterable[tuple[str, S]], make: Callable[[S], T]) -> list[T]:
        """make(example) of each (file:line, example). Where `make` raises LeftOutError, this is noted.

        Raises UserError where none is left, and what `make` raises, with file and line.
        """
        results, where = [], None
        for where, example in places:
            try:
                results.append(make(example))
            except LeftOutError as reason:
                self[f"Left out, {reason}"].append(where)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
        if where is not None and not results:
            raise UserError("no example can be used. " + str(self).replace("\n", "; "))
        return results


# --- forms --------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """The columns of a row. A column holds a text, a message, or a list of messages."""

    before: tuple[str, ...]  # a prompt or a conversation; and a text that is added, where a row has it
    answers: tuple[str, ...]  # of the assistant; the first is learned, or preferred to the second
    tools: str  # whose form it is


FORMS = (  # a row is read in the first form of which it has the columns and which has what the command needs
    Form(("conversations",), ("chosen", "rejected"), "LLaMA-Factory"),
    Form(("messages",), (), "OpenAI, TRL, UltraChat, no_robots"),
    Form(("conversations",), (), "ShareGPT"),
    Form(("prompt",), ("completion",), "TRL"),
    Form(("prompt",), ("chosen", "rejected"), "TRL, UltraFeedback, `tinygpt label`"),
    Form(("instruction", "input"), ("output",), "Alpaca"),
    Form(("instruction", "input"), ("chosen", "rejected"), "LLaMA-Factory"),
    Form((), ("chosen", "rejected"), "TRL; both lists begin with the prompt"),
    Form(("prompt",), (), "TRL"),
)
WHOLE = ("messages", "conversations")  # columns that hold the answers too
ROLES = {  # and the names that files have for them
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant",
}  # fmt: skip
PROMPT, EXAMPLE, COMPARISON = range(3)  # what a command needs: how many answers to a prompt
USUAL = (
    '{"prompt": "..."}', '{"prompt": "...", "completion": "..."}',
    '{"prompt": "...", "chosen": "...", "rejected": "..."}',
)  # fmt: skip


class Example(NamedTuple):
    """A prompt, or a conversation that the assistant ends."""

    where: str  # file:line
    messages: list[Message]
    rejected: str = ""  # of a comparison: the other answer
    row: dict = {}  # as it is in the file

    @property
    def prompt(self) -> Prompt:
        """All before the last answer."""
        return before(self.messages[: -1 if self.messages[-1]["role"] == "assistant" else None])


def read(paths: Iterable[Path | str], needs: int = EXAMPLE, notes: Notes | None = None) -> list[Example]:
    """The examples of files. Other columns are ignored, and so are messages after the assistant's last.

    An end token that ends an answer is taken off. An example without a prompt or an answer, or with nothing
    to learn or to compare, is left out. Raises UserError, with file and line, for a row without the columns
    of a form and for a message that is none; and where no example is left.
    """
    notes = Notes() if notes is None else notes
    places = ((where, (where, row)) for path in paths for where, row in _rows(Path(path), needs))
    return notes.keep(places, lambda place: _example(*place, needs, notes))


def _example(where: str, row: object, needs: int, notes: Notes) -> Example:
    """Raises LeftOutError, and UserError without the place."""
    usual = f"a line is {USUAL[needs]} or in another form of the README"
    if not isinstance(row, dict):
        raise UserError(f"is {short(row)}, not an object: {usual}")
    form = next((form for form in FORMS if _serves(form, row, needs)), None)
    if form is None:
        raise UserError(f"has {short(sorted(row))}: {usual}")
    note = lambda thing: notes[thing].append(where)  # noqa: E731
    question = _messages(row[form.before[0]], form.before[0], "user", note) if form.before else []
    if added := [row[column] for column in form.before[1:] if row.get(column)]:
        question[-1]["content"] += "\n\n" + _content(added[0], "user")
    talks = []  # of two answers two conversations
    for column in form.answers[: max(1, needs)]:
        answer = _messages(row[column], column, "assistant", note)
        talks.append(answer if any(m["role"] != "assistant" for m in answer) else question + answer)
    first, *other = (_ended(talk, needs) for talk in talks or [question])
    if needs == COMPARISON:
        _compare(first, *other)
    return Example(where, first, other[0][-1]["content"] if other else "", row)


def _ended(messages: list[Message], needs: int) -> list[Message]:
    """The messages up to where the assistant speaks, for a prompt, or up to the assistant's last."""
    while messages and (messages[-1]["role"] == "assistant") == (needs == PROMPT):
        messages.pop()
    answers = [message for message in messages if message["role"] == "assistant"]
    if not messages or not all(message["content"].strip() for message in (messages[-1], *answers)):
        raise LeftOutError(f"as {'the prompt' if needs == PROMPT else 'an answer'} is empty")
    if needs == EXAMPLE and all(message.get("weight") == 0 for message in answers):
        raise LeftOutError("as nothing of it is learned")
    return messages


def _compare(chosen: list[Message], rejected: list[Message]) -> None:
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise LeftOutError("as chosen and rejected are no answers to one prompt")
    if answer_text(chosen[-1]["content"]) == answer_text(rejected[-1]["content"]):
        raise LeftOutError("as chosen and rejected are the same")


def _serves(form: Form, row: dict, needs: int) -> bool:
    """Whether a row has the columns of a form, and the form as many answers as a command needs."""
    has_columns = all(column in row for column in (*form.before[:1], *form.answers))
    return has_columns and (len(form.answers) >= needs or needs == EXAMPLE and form.before[0] in WHOLE)


def _messages(value: object, column: str, role: str, note: Callable[[str], None]) -> list[Message]:
    """The messages of a column. role: who says a text that is no message."""
    if isinstance(value, str | None) and column not in WHOLE:
        value = [{"role": role, "content": value}]
    messages = []
    for message in [value] if isinstance(value, dict) else value if isinstance(value, list) else [None]:
        if not isinstance(message, dict):
            raise UserError(f"{column} is {short(value)}: it must be a list of messages")
        name, weight = message.get("role", message.get("from")), message.get("weight", 1)
        if name not in list(ROLES):
            raise UserError(f"a message's role is {short(name)}: it must be {', '.join(ROLES)}")
        if weight not in (0, 1):
            raise UserError(f"a message's weight is {short(weight)}: it must be 0 or 1")
        role, content = ROLES[name], _content(message.get("content", message.get("value")), name)
        if role == "assistant" and content.rstrip().endswith(END_OF_TEXT):
            note(f"Taken off, a {END_OF_TEXT} that ends an answer")
            content = content.rstrip().removesuffix(END_OF_TEXT)
        if not unicodedata.is_normalized("NFC", content):
            note("Decomposed (NFD), where composed text (NFC) is usual")
        if END_OF_TEXT in content:
            note(f"Taken as characters, a {END_OF_TEXT} within a text")
        messages.append({"role": role, "content": content} | ({} if weight else {"weight": 0}))
    return messages


def _content(value: object, role: str) -> str:
    """A text, or the texts of a list of parts."""
    parts = value if isinstance(value, list) else [{"text": value}]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"what the {role} says is {short(value)}: it must be a string, or parts of type text")
    return "".join(texts)


# --- files --------------------------------------------------------------------------------------------------

MOST_LIST = 1 << 26  # bytes of a file that is one list


def _rows(path: Path, needs: int) -> Iterator[tuple[str, object]]:
    """(file:line, value) of a file."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder: --data takes files of JSON Lines")
    if not path.is_file():
        raise UserError(f"{path}: no such file: --data takes files of JSON Lines")
    with open(path, "rb") as file:
        lines = enumerate(iter(partial(file.readline, MOST_BYTES + 1), b""), 1)
        lines = ((n, line) for n, line in lines if line.strip(_BLANK))
        first = next(lines, None)
        if first is None:
            raise UserError(f"{path}: has no examples: a line is {USUAL[needs]}")
        if first[1].lstrip(_BLANK).startswith(b"["):
            yield from _listed(path, needs)
            return
        for n, line in itertools.chain([first], lines):
            if len(line) > MOST_BYTES:
                raise UserError(f"{path}:{n}: is longer than {MOST_BYTES:,} bytes")
            yield f"{path}:{n}", _value(f"{path}:{n}", parse, _text(path, f"{path}:{n}", line), needs)


_BLANK = b"\xef\xbb\xbf \t\r\n"  # the first three are a byte order mark


def _listed(path: Path, needs: int) -> Iterator[tuple[str, object]]:
    """(file:line, value) of a file that is one JSON list."""
    if path.stat().st_size > MOST_LIST:
        program = "import json; [print(json.dumps(row)) for row in json.load(open(0))]"
        raise UserError(f"{path}: is one list, of more than {MOST_LIST:,} bytes. This makes lines of it: "
                        f"python3 -c '{program}' <{path} >{path}l")  # fmt: skip
    text = _text(path, str(path), path.read_bytes())
    at = text.index("[") + 1
    n = 1 + text.count("\n", 0, at)
    while True:
        start, at = at, re.compile(r"[\s,]*").match(text, at).end()
        n += text.count("\n", start, at)
        if text.startswith("]", at):
            return
        where = f"{path}:{n}"
        decode = partial(json.JSONDecoder().raw_decode, idx=at)
        value, end = _value(where, decode, text, needs)
        yield where, value
        at, n = end, n + text.count("\n", at, end)


def _text(path: Path, where: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} is not UTF-8{not_utf8(path, data)}") from None


def _value(where: str, decode: Callable[[str], T], text: str, needs: int) -> T:
    try:
        return decode(text)
    except (ValueError, RecursionError) as error:
        what = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{where}: is not JSON ({what}): a line is {USUAL[needs]}") from None
