"""Instructions and conversations as text: one form, from which training data, masks and prompts are made.

    <|endoftext|>System: Answer in one word.
    User: Where does Ada live?
    Assistant: London<|endoftext|>User: And Alan?
    Assistant: Wilmslow<|endoftext|>

Plain words, and the one token that every model has learned to end a text with: nothing is added to the
vocabulary. What is learned, " London<|endoftext|>" and " Wilmslow<|endoftext|>", is known from how the text
is put together and never searched for in it. The pieces are encoded one by one, so a prompt's ids are the
first ids of the example that it begins; they are cut where no tokenizer joins what is cut apart, between ":"
and a space, so that encoding the whole text gives the same ids.

`TEMPLATE` says the same to Hugging Face's `apply_chat_template`. A tokenizer that carries it makes a model
one that is tuned to instructions. Other templates are kept for others to read, not applied: that would need
jinja. Contents are stripped of white space around them.

Not here: tools, pictures; protection from a user who writes "Assistant:", which only reserved tokens give.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..files.jsonfile import MOST_BYTES, parse
from .data import Array, Tokenizer

Message = dict[str, str]  # role and content

ROLES = ("system", "user", "assistant")

# `generation` marks what is learned, which TRL's assistant_only_loss reads. What spells the end token out
# would become it here, where all is one text, and is refused; tinygpt's own pieces have no such trouble.
TEMPLATE = (
    "{{ eos_token }}{% for message in messages %}"
    "{% if eos_token in message['content'] %}"
    "{{ raise_exception('a message spells ' + eos_token + ', which ends a text') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant:' }}{% generation %}{{ ' ' + (message['content'] | trim) + eos_token }}{% endgeneration %}"
    "{% else %}{{ (message['role'] | capitalize) + ': ' + (message['content'] | trim) + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# --- conversations to ids -----------------------------------------------------------------------------------


def segments(messages: Iterable[Message]) -> list[tuple[str, bool]]:
    """The text of a conversation in pieces, each with whether it is learned.

    The end token stands before the first piece and after each that is learned.

    >>> segments([{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}])
    [('User: 1 + 1?\\nAssistant:', False), (' 2', True)]
    """
    pieces, text = [], ""
    for message in messages:
        role, content = message["role"], message["content"].strip()
        if role == "assistant":
            pieces += [(f"{text}Assistant:", False), (f" {content}", True)]
            text = ""
        else:
            text += f"{role.capitalize()}: {content}\n"
    return pieces + [(text, False)] if text else pieces


def encode(tokenizer: Tokenizer, messages: Iterable[Message]) -> tuple[Array, Array]:
    """Ids (n,), int32, and which of them are learned (n,), bool.

    Raises UserError for a tokenizer without an end token, and for characters that it does not know.
    """
    return _encode(tokenizer, segments(messages))


def prompt(tokenizer: Tokenizer, messages: str | Iterable[Message]) -> Array:
    """The ids (n,), int32, after which the assistant speaks. A string is one message of the user.

    Raises what `encode` raises.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return _encode(tokenizer, segments([*messages, {"role": "assistant", "content": ""}])[:-1])[0]


def _encode(tokenizer: Tokenizer, pieces: list[tuple[str, bool]]) -> tuple[Array, Array]:
    end = tokenizer.eos_id
    if end is None:
        raise UserError(
            "this tokenizer has no end-of-text token, from which a model learns where an answer ends: begin "
            "with a model that has one, such as `tinygpt pretrain --tokenizer bpe` makes"
        )
    ids, learned = [end], [False]
    for text, supervised in pieces:
        new = tokenizer.encode(text).tolist() + [end] * supervised
        ids += new
        learned += [supervised] * len(new)
    return np.array(ids, np.int32), np.array(learned)


def is_tuned(tokenizer: Tokenizer) -> bool:
    """Whether a model with this tokenizer was tuned to the form that is written here."""
    return tokenizer.chat_template == TEMPLATE


def check_tuned(tokenizer: Tokenizer, folder: Path) -> None:
    """Raises UserError unless the model in this folder, of this tokenizer, was tuned to instructions."""
    if not is_tuned(tokenizer):
        raise UserError(f"{folder}: was not tuned to instructions: tinygpt sft comes first")


# --- files --------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """A conversation, and where it was read. The last message is the assistant's."""

    where: str  # file:line
    messages: list[Message]


def read(paths: Iterable[Path | str]) -> list[Example]:
    """The examples of JSON Lines files, one a line: the keys `prompt` and `completion`, or `messages`.

    prompt and completion are strings; messages are a list of objects with role, one of `ROLES`, and content.
    Other keys are ignored, and so are blank lines and what comes after the assistant's last message. Raises
    UserError, which names file and line, for whatever else a line holds.
    """
    return [Example(where, _messages(row, where)) for path in paths for where, row in objects(path, _FORM)]


def objects(path: Path | str, form: str, *texts: str) -> list[tuple[str, dict]]:
    """(file:line, object) of a JSON Lines file without its blank lines; form: how a line looks.

    Raises UserError, with file and line, for what is no JSON object, or has no string under each of the keys
    `texts`, and for a file without any.
    """
    if Path(path).is_dir():
        raise UserError(f"{path}: is a folder: --data takes files of JSON Lines")
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file: --data takes files of JSON Lines")
    with open(path, "rb") as file:
        numbered = enumerate(iter(lambda: file.readline(MOST_BYTES + 1), b""), 1)
        lines = [(f"{path}:{n}", line) for n, line in numbered if _is_short(line, path, n) and line.strip()]
    if not lines:
        raise UserError(f"{path}: has no examples: a line is {form}")
    rows = [(where, _object(line, where, form)) for where, line in lines]
    for where, row in rows:
        if not all(isinstance(row.get(key), str) for key in texts):
            raise UserError(f"{where}: a line is {form}")
    return rows


def _is_short(line: bytes, path: Path | str, n: int) -> bool:
    if len(line) > MOST_BYTES:
        raise UserError(f"{path}:{n}: is longer than {MOST_BYTES:,} bytes")
    return True


_FORM = '{"prompt": "...", "completion": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}'


def pair(prompt: str, completion: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _object(line: bytes, where: str, form: str) -> dict:
    try:
        value = parse(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} is not UTF-8: convert the file to UTF-8 text") from None
    except ValueError as error:
        what = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{where}: is not JSON ({what}): a line is {form}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: is {short(value)}, not an object: a line is {form}")
    return value


def _messages(value: dict, where: str) -> list[Message]:
    keys = value.keys() & {"prompt", "completion", "messages"}
    if keys == {"prompt", "completion"}:
        return _checked(pair(value["prompt"], value["completion"]), where)
    if keys == {"messages"}:
        return _checked(value["messages"], where)
    raise UserError(f"{where}: has {short(sorted(keys) or list(value))}: a line is {_FORM}")


def _checked(messages: object, where: str) -> list[Message]:
    if not isinstance(messages, list):
        raise UserError(f"{where}: messages is {short(messages)}: it must be a list")
    turns = []
    for message in messages:
        message = message if isinstance(message, dict) else {}
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"{where}: a message's role is {short(role)}: it must be {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"{where}: what the {role} says is {short(content)}: it must be a string")
        if role == "assistant" and not content.strip():
            raise UserError(f"{where}: a completion is empty: there is nothing to learn; leave the line out")
        turns.append({"role": role, "content": content})
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if not turns:
        raise UserError(f"{where}: has no message of the assistant, so there is nothing to learn")
    return turns
