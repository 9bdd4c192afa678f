"""Text in, text out: a prompt as ids, and what the model writes as text, piece by piece as it comes.

`core.generate.steps` draws the ids. Not here: conversations (`instructions`).
"""

from collections.abc import Iterable, Iterator

import numpy as np

from ..core.generate import Ids, steps
from ..core.model import GPT, Array
from ..errors import UserError
from .tokenizer import BPETokenizer, CharTokenizer, stream_decoder

Tokenizer = CharTokenizer | BPETokenizer


def encode_prompt(tokenizer: Tokenizer, text: str) -> Array:
    """A prompt's ids; an empty one is what a text begins after: the end-of-text token, else a newline.
    For a tokenizer of documents any prompt begins with that token.

    Raises UserError for a character that the tokenizer does not know, and where it has neither of these two.
    """
    if text:
        ids = tokenizer.encode(text)
        return np.append(np.int32(tokenizer.eos_id), ids) if tokenizer.documents else ids
    if tokenizer.eos_id is not None:
        return np.array([tokenizer.eos_id], np.int32)
    try:
        return tokenizer.encode("\n")
    except UserError:
        raise UserError("the prompt is empty, and this vocabulary has no newline to begin with") from None


def stream(model: GPT, tokenizer: Tokenizer, prompt: Ids, max_new_tokens: int, **settings) -> Iterator[str]:
    """One prompt's continuation as text, as it comes, whole characters only, up to the end-of-text token.

    Settings are those of `steps`, but for `stop` and `vocab_size`; `until` stops at a text.
    """
    feed = stream_decoder(tokenizer)
    stop = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    new = steps(model, [prompt], max_new_tokens, stop=stop, vocab_size=tokenizer.vocab_size, **settings)
    for _, (i,) in new:
        if i not in stop:
            yield feed(i)
    yield feed(final=True)


def until(pieces: Iterable[str], stop: str) -> Iterator[str]:
    """The text of `pieces` as it comes, up to where it holds `stop`; "" never stops.

    >>> list(until(["one.", " two", ". ", "three"], ". t"))
    ['one', '']
    """
    text = ""
    for piece in pieces:
        text, end, _ = (text + piece).partition(stop) if stop else (text + piece, "", "")
        if end:
            break
        waits = 0 if not stop else next(n for n in range(len(stop) - 1, -1, -1) if text.endswith(stop[:n]))
        yield text[: len(text) - waits]  # the rest may be the beginning of `stop`
        text = text[len(text) - waits :]
    yield text
