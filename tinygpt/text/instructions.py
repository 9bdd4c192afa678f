"""Instructions and conversations as text: one form, from which training data, masks and prompts are made.

    <|endoftext|>System: Answer in one word.
    User: Where does Ada live?
    Assistant: London<|endoftext|>User: And Alan?
    Assistant: Wilmslow<|endoftext|>

The form has plain words and the end-of-text token, which each model has learned: the vocabulary needs no new
token. The learned tokens are " London<|endoftext|>" and " Wilmslow<|endoftext|>". Their places follow from
the order of the pieces, not from a search in the text. Each piece is encoded alone, so the ids of a prompt
are the first ids of its example. A cut is between ":" and a space, which no tokenizer joins: encoding the
whole text gives the same ids.

`TEMPLATE` is the same form for Hugging Face's `apply_chat_template`. A model is tuned to instructions if its
tokenizer has this template. Other templates are kept in the folder, but not applied: that would need jinja.
White space around a content is left out, except the spaces at the beginning of an answer: code is indented.

Not here: files of conversations (`examples`), tools, pictures. A user who writes "Assistant:" can imitate an
answer; only reserved tokens would prevent this.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..errors import UserError
from .data import Array, Tokenizer

Message = dict  # role, content; a message of the assistant with "weight": 0 is not learned
Prompt = str | tuple[tuple[str, str], ...]  # a message of the user; or (role, content) of several messages

# `generation` marks the learned text for TRL's assistant_only_loss. The template makes one text, in which the
# end token that a message spells would become the token itself: the template refuses such a message. tinygpt
# encodes each piece alone and need not refuse it.
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
TEMPLATE = _CONVERSATION.replace("ANSWER", (
    f"{{% if message['weight'] == 0 %}}{_ANSWER}{{% else %}}"
    f"{{% generation %}}{_ANSWER}{{% endgeneration %}}{{% endif %}}"))  # fmt: skip
# Models of older versions have this template: answers then lost the spaces at their beginning.
_OLDER_TEMPLATE = _CONVERSATION.replace(
    "ANSWER", "{% generation %}{{ ' ' + (message['content'] | trim) + eos_token }}{% endgeneration %}")

# --- conversations to ids -----------------------------------------------------------------------------------


def segments(messages: Iterable[Message]) -> list[tuple[str, bool | None]]:
    """The text of a conversation in pieces, each a pair.

    An answer's pair is (text, whether training learns the answer), another text's pair is (text, None). The
    pieces have no end token: `encode` puts it before the first piece and after each answer.

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
    """The text after "Assistant:". `answer_content` is the inverse.

    >>> answer_text("    return 1\\n"), answer_content(answer_text("    return 1\\n"))
    ('     return 1', '    return 1')
    """
    return " " + content.rstrip().lstrip("\r\n")


def answer_content(text: str) -> str:
    """The content of an answer, from the text after "Assistant:"."""
    return text.removeprefix(" ").rstrip().lstrip("\r\n")


def encode(tokenizer: Tokenizer, messages: Iterable[Message]) -> tuple[Array, Array]:
    """Ids (n,), int32, and whether each is learned (n,), bool.

    Raises UserError for a tokenizer without an end token, and for characters that it does not know.
    """
    return _encode(tokenizer, segments(messages))


def prompt(tokenizer: Tokenizer, messages: Prompt | Iterable[Message]) -> Array:
    """The ids (n,), int32, after which the assistant speaks. Raises what `encode` raises."""
    return _encode(tokenizer, segments([*turns(messages), {"role": "assistant", "content": ""}])[:-1])[0]


def _encode(tokenizer: Tokenizer, pieces: list[tuple[str, bool | None]]) -> tuple[Array, Array]:
    end = tokenizer.eos_id
    if end is None:
        raise UserError("this tokenizer has no end-of-text token, from which a model learns where an answer "
                        "ends: use a model with such a token, for example of `pretrain --tokenizer bpe`")
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
    """Messages as a Prompt, which can be a key of a dict. A single message of the user is a string."""
    pairs = tuple((message["role"], message["content"]) for message in messages)
    return pairs[0][1] if len(pairs) == 1 and pairs[0][0] == "user" else pairs


def shown(prompt: Prompt) -> str:
    """A prompt for people to read."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{role}: {content}" for role, content in prompt)


def pair(prompt: Prompt, completion: str) -> list[Message]:
    return [*turns(prompt), {"role": "assistant", "content": completion}]


def is_tuned(tokenizer: Tokenizer) -> bool:
    """Whether a model with this tokenizer was tuned to this form of conversations."""
    return tokenizer.chat_template in (TEMPLATE, _OLDER_TEMPLATE)


def check_tuned(tokenizer: Tokenizer, folder: Path | str) -> None:
    """Raises UserError unless the model in this folder was tuned to instructions."""
    if not is_tuned(tokenizer):
        raise UserError(f"{folder}: was not tuned to instructions: run tinygpt sft first")
