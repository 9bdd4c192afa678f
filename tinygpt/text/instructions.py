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
jinja. White space around a content is left out, except the spaces that an answer begins with: code is
indented.

Not here: files of them (`examples`); tools, pictures; protection from a user who writes "Assistant:", which
only reserved tokens give.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..errors import UserError
from .data import Array, Tokenizer

Message = dict  # role, content, and for the assistant perhaps weight: 0 is not learned
Prompt = str | tuple[tuple[str, str], ...]  # a message of the user; or (role, content) of several messages

# `generation` marks what is learned, which TRL's assistant_only_loss reads. What spells the end token out
# would become it here, where all is one text, and is refused; tinygpt's own pieces have no such trouble.
_CONVERSATION = (
    "{{ eos_token }}{% for message in messages %}"
    "{% if eos_token in message['content'] %}"
    "{{ raise_exception('a message spells ' + eos_token + ', which ends a text') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant:' }}ANSWER"
    "{% else %}{{ (message['role'] | capitalize) + ': ' + (message['content'] | trim) + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_ANSWER = "{{ ' ' + message['content'].rstrip().lstrip('\\r\\n') + eos_token }}"
TEMPLATE = _CONVERSATION.replace(
    "ANSWER",
    f"{{% if message['weight'] == 0 %}}{_ANSWER}{{% else %}}"
    f"{{% generation %}}{_ANSWER}{{% endgeneration %}}{{% endif %}}",
)
# That of models which were tuned before answers kept the spaces that they begin with.
_OLDER_TEMPLATE = _CONVERSATION.replace(
    "ANSWER", "{% generation %}{{ ' ' + (message['content'] | trim) + eos_token }}{% endgeneration %}"
)

# --- conversations to ids -----------------------------------------------------------------------------------


def segments(messages: Iterable[Message]) -> list[tuple[str, bool | None]]:
    """The text of a conversation in pieces. With a piece that the assistant says comes whether it is learned,
    with any other None.

    The end token stands before the first piece and after each that the assistant says.

    >>> segments([{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}])
    [('User: 1 + 1?\\nAssistant:', None), (' 2', True)]
    """
    pieces, text = [], ""
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            pieces += [(f"{text}Assistant:", None), (answer_text(content), message.get("weight") != 0)]
            text = ""
        else:
            text += f"{role.capitalize()}: {content.strip()}\n"
    return pieces + [(text, None)] if text else pieces


def answer_text(content: str) -> str:
    """What stands after "Assistant:". `answer_content` is the way back.

    >>> answer_text("    return 1\\n"), answer_content(answer_text("    return 1\\n"))
    ('     return 1', '    return 1')
    """
    return " " + content.rstrip().lstrip("\r\n")


def answer_content(text: str) -> str:
    """The content of an answer, of the text after "Assistant:"."""
    return text.removeprefix(" ").rstrip().lstrip("\r\n")


def encode(tokenizer: Tokenizer, messages: Iterable[Message]) -> tuple[Array, Array]:
    """Ids (n,), int32, and which of them are learned (n,), bool.

    Raises UserError for a tokenizer without an end token, and for characters that it does not know.
    """
    return _encode(tokenizer, segments(messages))


def prompt(tokenizer: Tokenizer, messages: Prompt | Iterable[Message]) -> Array:
    """The ids (n,), int32, after which the assistant speaks. Raises what `encode` raises."""
    return _encode(tokenizer, segments([*turns(messages), {"role": "assistant", "content": ""}])[:-1])[0]


def _encode(tokenizer: Tokenizer, pieces: list[tuple[str, bool | None]]) -> tuple[Array, Array]:
    end = tokenizer.eos_id
    if end is None:
        raise UserError(
            "this tokenizer has no end-of-text token, from which a model learns where an answer ends: begin "
            "with a model that has one, such as `tinygpt pretrain --tokenizer bpe` makes"
        )
    ids, learned = [end], [False]
    for text, supervised in pieces:
        new = tokenizer.encode(text).tolist() + [end] * (supervised is not None)
        ids += new
        learned += [bool(supervised)] * len(new)
    return np.array(ids, np.int32), np.array(learned)


def turns(prompt: Prompt | Iterable[Message]) -> list[Message]:
    """The messages of a prompt."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in prompt]


def before(messages: Iterable[Message]) -> Prompt:
    """Messages as a Prompt, which can be a key: one message of the user is a string."""
    pairs = tuple((message["role"], message["content"]) for message in messages)
    return pairs[0][1] if len(pairs) == 1 and pairs[0][0] == "user" else pairs


def shown(prompt: Prompt) -> str:
    """A prompt for people to read."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{role}: {content}" for role, content in prompt)


def pair(prompt: Prompt, completion: str) -> list[Message]:
    return [*turns(prompt), {"role": "assistant", "content": completion}]


def is_tuned(tokenizer: Tokenizer) -> bool:
    """Whether a model with this tokenizer was tuned to the form that is written here."""
    return tokenizer.chat_template in (TEMPLATE, _OLDER_TEMPLATE)


def check_tuned(tokenizer: Tokenizer, folder: Path | str) -> None:
    """Raises UserError unless the model in this folder, of this tokenizer, was tuned to instructions."""
    if not is_tuned(tokenizer):
        raise UserError(f"{folder}: was not tuned to instructions: tinygpt sft comes first")
