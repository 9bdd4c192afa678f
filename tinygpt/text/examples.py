"""Files of examples: conversations, prompts and comparisons, in the forms that other tools write.

A file has a JSON object in each line, or is one list of objects. `FORMS` is the table of forms. Every command
takes each form that has as many answers as the command needs.

All commands decide in the same way whether they can use an example. An example that cannot be used is left
out, and never cut. `Notes` has a line for each reason: how many examples, and the first by file and line.

Not here: a conversation as text (`instructions`).
"""

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

# --- notes --------------------------------------------------------------------------------------------------

S, T = TypeVar("S"), TypeVar("T")


class LeftOutError(Exception):
    """An example cannot be used. The text of the exception is the reason."""


class Notes(defaultdict):
    """Each note about examples -> file:line of each of these examples."""

    def __init__(self) -> None:
        super().__init__(list)

    def __str__(self) -> str:
        """A line for each note."""
        return "\n".join(f"{note}: {len(at):,}, the first is {at[0]}" for note, at in self.items())

    def keep(self, places: Iterable[tuple[str, S]], make: Callable[[S], T]) -> list[T]:
        """make(example) of each (file:line, example), without those for which `make` raises LeftOutError.

        Notes the reason of each LeftOutError. Raises UserError if no example is left. Puts file and line
        before a UserError of `make`.
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

    before: tuple[str, ...]  # a prompt or a conversation; then a text to add to it, which may be missing
    answers: tuple[str, ...]  # of the assistant; the first is learned, or preferred to the second
    tools: str  # that write this form


FORMS = (  # a row is read in the first form whose columns and answers the row has
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
ROLES = {  # by their names in files
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant",
}  # fmt: skip
PROMPT, EXAMPLE, COMPARISON = range(3)  # needs of a command: the number of answers to a prompt
USUAL = (
    '{"prompt": "..."}', '{"prompt": "...", "completion": "..."}',
    '{"prompt": "...", "chosen": "...", "rejected": "..."}',
)  # fmt: skip


class Example(NamedTuple):
    """A prompt, or a conversation that the assistant ends."""

    where: str  # file:line
    messages: list[Message]
    rejected: str = ""  # of a comparison: the other answer
    row: dict = {}  # all columns, as in the file

    @property
    def prompt(self) -> Prompt:
        """All before the last answer."""
        return before(self.messages[: -1 if self.messages[-1]["role"] == "assistant" else None])


def read(paths: Iterable[Path | str], needs: int = EXAMPLE, notes: Notes | None = None) -> list[Example]:
    """The examples of files. Messages after the last answer are cut off; of a prompt, the answers at the end.

    An <|endoftext|> at the end of an answer is removed. An example with an empty prompt or answer is left
    out. EXAMPLE also leaves out examples whose answers all have weight 0. COMPARISON also leaves out two
    equal answers, and answers to different prompts.

    Raises UserError, with file and line, for a row without a form that `needs` accepts, and for a wrong
    message. Raises UserError if no example is left.
    """
    notes = Notes() if notes is None else notes
    places = ((where, (where, row)) for path in paths for where, row in _rows(Path(path), needs))
    return notes.keep(places, lambda place: _example(*place, needs, notes))


def _example(where: str, row: object, needs: int, notes: Notes) -> Example:
    """Raises LeftOutError, and UserError without the place."""
    usual = f"a line is {USUAL[needs]} or in another form of demos/formats.md"
    if not isinstance(row, dict):
        raise UserError(f"is {short(row)}, not an object: {usual}")
    forms = [form for form in FORMS if _serves(form, row, needs)]
    if not forms:
        raise UserError(f"has {short(sorted(row))}: {usual}")
    full = (form for form in forms if None not in map(row.get, (*form.before[:1], *form.answers)))
    form = next(full, forms[0])  # tools write null into columns that a row does not use
    note = lambda text: notes[text].append(where)  # noqa: E731
    question = _messages(row[form.before[0]], form.before[0], "user", note) if form.before else []
    for column in form.before[1:]:
        if (added := row.get(column)) not in (None, "") and question:
            question[-1]["content"] += "\n\n" + _content(added, "user")
    talks = []  # of two answers two conversations
    for column in form.answers[: max(1, needs)]:
        answer = _messages(row[column], column, "assistant", note)
        talks.append(answer if any(m["role"] != "assistant" for m in answer) else question + answer)
    first, *other = (_ended(talk, needs) for talk in talks or [question])
    if needs == COMPARISON:
        chosen, rejected = first, other[0]
        if chosen[:-1] != rejected[:-1]:
            raise LeftOutError("as chosen and rejected are no answers to one prompt")
        if answer_text(chosen[-1]["content"]) == answer_text(rejected[-1]["content"]):
            raise LeftOutError("as chosen and rejected are the same")
    return Example(where, first, other[0][-1]["content"] if other else "", row)


def _serves(form: Form, row: dict, needs: int) -> bool:
    """Whether a row has the columns of a form, and the form as many answers as a command needs."""
    has_columns = all(column in row for column in (*form.before[:1], *form.answers))
    return has_columns and (len(form.answers) >= needs or needs == EXAMPLE and form.before[0] in WHOLE)


def _ended(messages: list[Message], needs: int) -> list[Message]:
    """The messages before an answer of the assistant, for a prompt, or up to the assistant's last answer."""
    while messages and (messages[-1]["role"] == "assistant") == (needs == PROMPT):
        messages.pop()
    answers = [message for message in messages if message["role"] == "assistant"]
    questions = [message for message in messages if message["role"] != "assistant"]
    if len(answers) < min(needs, 1) or not all(message["content"].strip() for message in answers):
        raise LeftOutError("as an answer is empty")
    if not any(message["content"].strip() for message in questions[-1 if needs == PROMPT else 0 :]):
        raise LeftOutError("as the prompt is empty")
    if needs == EXAMPLE and all(message.get("weight") == 0 for message in answers):
        raise LeftOutError("as nothing of it is learned")
    return messages


def _messages(value: object, column: str, role: str, note: Callable[[str], None]) -> list[Message]:
    """The messages of a column. role: the speaker of a text that is no message."""
    if isinstance(value, str | None) and column not in WHOLE:
        value = [{"role": role, "content": value}]
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        kinds = "a list of messages" if column in WHOLE else "a text or a list of messages"
        raise UserError(f"{column} is {short(value)}: it must be {kinds}")
    return [_message(message, note) for message in messages]


def _message(message: dict, note: Callable[[str], None]) -> Message:
    keys = ("role", "from"), ("content", "value"), ("weight",)  # a value of null is missing
    name, content, weight = (next((message[key] for key in some if message.get(key) is not None), None)
                             for some in keys)  # fmt: skip
    if name not in list(ROLES):
        raise UserError(f"a message's role is {short(name)}: it must be {', '.join(ROLES)}")
    if weight not in (None, 0, 1):
        raise UserError(f"a message's weight is {short(weight)}: it must be 0 or 1")
    role, content = ROLES[name], _content(content, name)
    if role == "assistant" and content.rstrip().endswith(END_OF_TEXT):
        note(f"Taken off, a {END_OF_TEXT} that ends an answer")
        content = content.rstrip().removesuffix(END_OF_TEXT)
    if not unicodedata.is_normalized("NFC", content):
        note("Decomposed (NFD), where composed text (NFC) is usual")
    if END_OF_TEXT in content:
        note(f"Taken as characters, a {END_OF_TEXT} within a text")
    return {"role": role, "content": content} | ({"weight": 0} if weight == 0 else {})


def _content(value: object, role: str) -> str:
    """A text, or the texts of a list of parts."""
    parts = value if isinstance(value, list) else [{"text": value}]
    texts = [part.get("text") for part in parts
             if isinstance(part, dict) and str(part.get("type", "text")).endswith("text")]  # fmt: skip
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"the {role}'s text is {short(value)}: it must be a string, or parts of type text")
    return "".join(texts)


# --- files --------------------------------------------------------------------------------------------------

MOST_LIST = 1 << 26  # bytes of a file that is one list
_BLANK = b"\xef\xbb\xbf \t\r\n"  # the first three are a byte order mark


def _rows(path: Path, needs: int) -> Iterator[tuple[str, object]]:
    """(file:line, value) of each row of a file."""
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {problem}: --data takes files of JSON Lines")
    with open(path, "rb") as file:
        is_list = file.read(1 << 16).lstrip(_BLANK).startswith(b"[")
    rows = (_listed if is_list else _lines)(path, needs)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path}: has no examples: a line is {USUAL[needs]}")
    yield first
    yield from rows


def _lines(path: Path, needs: int) -> Iterator[tuple[str, object]]:
    with open(path, "rb") as file:
        for n, line in enumerate(iter(partial(file.readline, MOST_BYTES + 1), b""), 1):
            if len(line) > MOST_BYTES:
                raise UserError(f"{path}:{n}: is longer than {MOST_BYTES:,} bytes: shorten or remove it")
            if line.strip(_BLANK):
                where = f"{path}:{n}"
                yield where, _parsed(path, where, needs, lambda data: parse(_text(data)), line)


def _listed(path: Path, needs: int) -> Iterator[tuple[str, object]]:
    """The rows of a file that is one JSON list."""
    if path.stat().st_size > MOST_LIST:
        program = "import json; [print(json.dumps(row)) for row in json.load(open(0))]"
        raise UserError(f"{path}: is one list, of more than {MOST_LIST:,} bytes. This makes lines of it: "
                        f"python3 -c '{program}' <{path} >{path}l")  # fmt: skip
    text = _parsed(path, str(path), needs, _text, path.read_bytes())
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    n, start, end = 1, 0, text.index("[") + 1
    while not text.startswith("]", place := between.match(text, end).end()):
        n, start = n + text.count("\n", start, place), place
        value, end = _parsed(path, f"{path}:{n}", needs, decode, text, place)
        yield f"{path}:{n}", value
    if text[place + 1 :].strip():
        raise UserError(f"{path}: has text after its list: a file is one list, or has a row in each line")


def _text(data: bytes) -> str:
    return data.decode("utf-8-sig")


def _parsed(path: Path, where: str, needs: int, decode: Callable[..., T], *arguments: object) -> T:
    """decode(*arguments). Its errors become UserErrors."""
    try:
        return decode(*arguments)
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is not UTF-8{not_utf8(path, error.object)}"
    except (ValueError, RecursionError) as error:
        what = "brackets nested too deeply" if isinstance(error, RecursionError) else error
        what = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else what
        problem = f"is not JSON ({what}): a line is {USUAL[needs]}"
    raise UserError(f"{where}: {problem}")
