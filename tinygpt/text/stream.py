"""A prompt as ids, and the model's ids as text, piece by piece as they are drawn.

`core.generate.steps` draws the ids. Not here: conversations (`instructions`).
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ..core.generate import Ids, generate, steps
from ..core.model import GPT, Array
from ..errors import UserError
from .tokenizer import Tokenizer, stream_decoder


def encode_prompt(tokenizer: Tokenizer, text: str, special: bool = False) -> Array:
    """A prompt's ids, (n,), int32, after the ids that the tokenizer puts before each text.

    An empty prompt becomes one token: bos_token, or else eos_token, or else a newline. special: as in
    `Tokenizer.encode`. Raises UserError for a character that the tokenizer cannot write, and for an empty
    prompt if it has none of these three tokens.
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
        raise UserError("the prompt is empty, and this vocabulary has no newline for its beginning: give a "
                        "prompt") from None


def note_special(tokenizer: Tokenizer, text: str, what: str, remedy: str = "") -> None:
    """Warns of special tokens that a text spells. `encode` takes them as characters."""
    if names := tokenizer.spelled(text):
        warnings.warn(f"{what} spells {', '.join(names)}, which is taken as characters{remedy}", stacklevel=3)


def stream(model: GPT, tokenizer: Tokenizer, prompt: Ids, max_new_tokens: int, **settings) -> Iterator[str]:
    """The continuation of one prompt, in pieces of whole characters, up to one of `tokenizer.stops`.

    The continuation has at most max_new_tokens tokens. An ordinary token that stops a text is part of the
    text; a special token is not. settings: those of `steps` except `stop` and `vocab_size`. The function
    `until` stops these pieces at a given text too.
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
    """The text of `pieces`, piece by piece, up to the text `stop`. An empty `stop` never stops.

    >>> list(until(["one.", " two", ". ", "three"], ". t"))
    ['one', '']
    """
    text = ""
    for piece in pieces:
        text, end, _ = (text + piece).partition(stop) if stop else (text + piece, "", "")
        if end:
            break
        # The last characters wait if they may be the beginning of `stop`.
        waits = next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
        yield text[: len(text) - waits]
        text = text[len(text) - waits :]
    yield text
