"""Text in, text out: a prompt as ids, and what the model writes as text, piece by piece as it comes.

`core.generate.steps` draws the ids. Not here: conversations (`instructions`).
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ..core.generate import Ids, generate, steps
from ..core.model import GPT, Array
from ..errors import UserError
from .tokenizer import BPETokenizer, CharTokenizer, stream_decoder

Tokenizer = CharTokenizer | BPETokenizer


def encode_prompt(tokenizer: Tokenizer, text: str, special: bool = False) -> Array:
    """A prompt's ids, (n,), int32, after those that the tokenizer puts before each text.

    An empty prompt is the token that texts begin with: the first of bos_token, eos_token and a newline that
    the tokenizer has. special: see `encode`. Raises UserError for a character that the tokenizer does not
    know, and where it has none of these three.
    """
    if not special:
        note_special(tokenizer, text, "the prompt", "; generate --special-tokens makes it a token")
    begin = tokenizer.begin
    if not (text or begin):
        begin = [i for i in (tokenizer.role_id("bos_token"), tokenizer.eos_id) if i is not None][:1]
    if text or begin:
        return np.append(np.array(begin, np.int32), tokenizer.encode(text, special))
    try:
        return tokenizer.encode("\n")
    except UserError:
        raise UserError("the prompt is empty, and this vocabulary has no newline to begin with") from None


def note_special(tokenizer: Tokenizer, text: str, what: str, remedy: str = "") -> None:
    """Warns of a special token that a text spells, which `encode` takes as characters."""
    if names := tokenizer.spelled(text):
        warnings.warn(f"{what} spells {', '.join(names)}, which is taken as characters{remedy}", stacklevel=3)


def stream(model: GPT, tokenizer: Tokenizer, prompt: Ids, max_new_tokens: int, **settings) -> Iterator[str]:
    """One prompt's continuation as text, as it comes, whole characters only, up to one of `tokenizer.stops`.
    An ordinary token that stops a text is part of it, a special one is not.

    Settings are those of `steps`, but for `stop` and `vocab_size`; `until` stops at a text.
    """
    feed = stream_decoder(tokenizer)
    stop, vocab_size = tokenizer.stops, tokenizer.vocab_size
    silent = tuple(stop.intersection(tokenizer.special.values()))
    for _, (i,) in steps(model, [prompt], max_new_tokens, stop=stop, vocab_size=vocab_size, **settings):
        if i not in silent:
            yield feed(i)
    yield feed(final=True)


def new_ids(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[Ids], max_new_tokens: int, **settings
) -> list[Array]:
    """The new ids of each prompt, as `generate` has them, up to one of `tokenizer.stops`, which is the last.

    Settings are those of `stream`.
    """
    stop, vocab_size = tokenizer.stops, tokenizer.vocab_size
    return generate(model, prompts, max_new_tokens, stop=stop, vocab_size=vocab_size, **settings)


def ended(tokenizer: Tokenizer, ids: Array) -> tuple[str, bool]:
    """The text of new ids, and whether one of `tokenizer.stops` ended it. The text is that of `stream`."""
    stopped = len(ids) > 0 and int(ids[-1]) in tokenizer.stops
    is_silent = stopped and ids[-1] in tokenizer.special.values()
    return tokenizer.decode(ids[: len(ids) - is_silent]), stopped


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
