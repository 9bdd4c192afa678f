"""Text from a model: KV cache, sampling, generation token by token.

A token's keys and values depend on what comes before it, never on what comes after. They are computed once and
kept, so that a step costs one token's forward pass whatever the length of the text (Pope et al. 2022, "Efficiently
Scaling Transformer Inference", section 2). The next token is drawn from softmax(logits / temperature), cut to the
`top_k` likeliest tokens (Fan et al. 2018, section 5.4) or to the likeliest with `top_p` of the probability together
(nucleus sampling, Holtzman et al. 2020, section 3.1). Temperature 0 is greedy: always the likeliest.

The layers compose: `probabilities` <- `sample` <- `steps` <- `generate` (ids in, ids out) and `stream` (text out).

Not here: beam search, penalties on repetition, speculative decoding; how a conversation is laid out as text.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

from . import storage, tokenizer
from .errors import UserError
from .model import GPT

Array = np.ndarray


class KVCache:
    """Keys and values of the tokens so far, (n_layer, B, capacity, C) each, of which the first `length` are there.

    The model hands every layer's new keys and values to `extend`, its layers in order; nobody else writes here.
    """

    def __init__(self, model: GPT, batch: int, capacity: int) -> None:
        shape = (model.config.n_layer, batch, capacity, model.config.n_embd)
        self.keys, self.values = (storage.empty(shape, model.flat.dtype) for _ in range(2))
        self.length, self.capacity = 0, capacity

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Adds one layer's k and v, (B, T, C). Returns all of that layer's, (B, S, C) with S = length + T, as views."""
        old, new = self.length, self.length + k.shape[1]
        keys, values = self.keys[layer, :, :new], self.values[layer, :, :new]
        keys[:, old:], values[:, old:] = k, v
        if layer == len(self.keys) - 1:
            self.length = new
        return keys, values

    def keep(self, alive: Array) -> Array:
        """Drops the rows where `alive` (B,) is False. Returns which old row each new row was, for the caller's arrays.

        Rows from the end move into the gaps, so that dropping a row copies one row at most.
        """
        n = np.count_nonzero(alive)
        rows, gaps = np.arange(n), np.flatnonzero(~alive[:n])
        rows[gaps] = n + np.flatnonzero(alive[n:])
        for a in (self.keys, self.values):
            a[:, gaps, : self.length] = a[:, rows[gaps], : self.length]
        self.keys, self.values = self.keys[:, :n], self.values[:, :n]
        return rows


# --- sampling: functions of the logits --------------------------------------------------------------------------


def probabilities(logits: Array, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Array:
    """The distribution that `sample` draws from: (..., V) logits -> (..., V) probabilities of the same dtype.

    top_k 0 and top_p 1 are off; with both, top_p is a share of what top_k leaves. Tokens as likely as the last one
    that is kept are kept too, so that the result depends on the logits only, not on the order of the vocabulary.
    Raises UserError for a NaN or an infinity.
    """
    V, top = logits.shape[-1], logits.max(-1, keepdims=True)
    if not np.isfinite(top).all():
        raise UserError("the model's logits are not finite numbers: its training diverged, or its file is damaged")
    if temperature == 0:
        probs = np.zeros_like(logits)
        np.put_along_axis(probs, logits.argmax(-1)[..., None], 1, -1)
        return probs
    scaled = (logits - top) / max(temperature, 1e-6)  # less would be 0 in float32, and 0 / 0
    if 0 < top_k < V:
        scaled[scaled < np.partition(scaled, V - top_k)[..., V - top_k, None]] = -np.inf
    probs = np.exp(scaled, out=scaled)
    probs /= probs.sum(-1, keepdims=True)
    if top_p < 1:
        probs[probs < _least_in_nucleus(probs, top_p)] = 0
        probs /= probs.sum(-1, keepdims=True)
    return probs


def _least_in_nucleus(probs: Array, top_p: float) -> Array:
    """The probability (..., 1) of the last token needed, likeliest first, to have top_p together.

    A trained model needs few, so only the likeliest are sorted: 64, and eight times more until they are enough.
    """
    V, n = probs.shape[-1], 64
    while True:
        n = min(n, V)
        likeliest = np.sort(np.partition(probs, V - n)[..., V - n :])[..., ::-1]
        mass = likeliest.cumsum(-1, dtype=np.float64)
        if n == V or (mass[..., -1] >= top_p).all():
            last = np.minimum((mass < top_p).sum(-1, keepdims=True), n - 1)  # n - 1: all, rounded, may miss top_p
            return np.take_along_axis(likeliest, last, -1)
        n *= 8


def sample(logits: Array, uniform: Array, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Array:
    """One token a row: the first whose cumulative probability exceeds the row's `uniform` number in [0, 1).

    logits (B, V), uniform (B,) -> ids (B,). Raises UserError as `probabilities` does.
    """
    cumulative = probabilities(logits, temperature, top_k, top_p).cumsum(-1, dtype=np.float64)
    return (cumulative > (uniform * cumulative[:, -1])[:, None]).argmax(-1)  # times the sum, as it is 1 but for rounding


# --- generation -------------------------------------------------------------------------------------------------


def steps(
    model: GPT,
    prompts: Sequence[Sequence[int] | Array],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Collection[int] = (),
    rng: np.random.Generator | None = None,
    ws: storage.Workspace | None = None,
) -> Iterator[tuple[Array, Array]]:
    """Continues all prompts together, one token each a step; yields (which prompts, their new tokens), both (B,).

    A prompt ends with a token of `stop`, which is yielded, or after `max_new_tokens`; then it costs nothing more.

    Prompts of different lengths are padded on the left. Padding is invisible (`ops.visible_keys`), positions count
    from a prompt's first token, and prompt i draws numbers i * max_new_tokens onwards of `rng`: what it becomes does
    not depend on the others, and a batch gives what the same calls one by one give.

    There are block_size positions and no more. A prompt that is longer loses its beginning, with a warning. A text
    that outgrows them goes on from its last block_size / 2 tokens, read anew: keeping more would mean reading anew
    more often, as every token's position changes. Raises UserError for an empty prompt, for settings out of range
    and for logits that are not finite.
    """
    block_size = model.config.block_size
    _check(temperature, top_k, top_p, max_new_tokens, rng)
    seen = [_fit(prompt, block_size) for prompt in prompts]  # what each prompt's next token follows from
    uniform = rng.random((len(seen), max_new_tokens)) if temperature else np.zeros((len(seen), max_new_tokens))
    stop, ws = np.array(sorted(stop), np.int64), ws or storage.Workspace()
    kv = KVCache(model, len(seen), min(block_size, max(map(len, seen), default=0) + max_new_tokens))
    rows = np.arange(len(seen))
    for step in range(max_new_tokens):
        if not len(rows):
            return
        if kv.length in (0, kv.capacity):
            logits, pad = _read(model, [seen[row] for row in rows], kv, ws)
        else:
            logits, _ = model.forward(tokens[:, None], ws, positions=kv.length - pad, start=pad, kv=kv, keep=False)
        tokens = sample(logits[:, -1], uniform[rows, step], temperature, top_k, top_p)
        for row, token in zip(rows.tolist(), tokens.tolist()):
            seen[row].append(token)
        yield rows, tokens
        ended = (tokens[:, None] == stop).any(1)
        if ended.any():
            kept = kv.keep(~ended)
            rows, tokens, pad = rows[kept], tokens[kept], pad[kept]


def _check(temperature: float, top_k: int, top_p: float, max_new_tokens: int, rng: object) -> None:
    """Raises UserError for a setting out of range; written so that NaN is out of range."""
    if not temperature >= 0:
        raise UserError(f"temperature is {temperature}: it must be at least 0, and 0 is greedy")
    if not top_k >= 0:
        raise UserError(f"top_k is {top_k}: it must be at least 0, and 0 is off")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}: it must be greater than 0 and at most 1, and 1 is off")
    if not max_new_tokens >= 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}: it must be at least 0")
    if temperature and rng is None:
        raise UserError("sampling needs rng, for example np.random.default_rng(seed); temperature=0 does without")


def _fit(prompt: Sequence[int] | Array, block_size: int) -> list[int]:
    prompt = np.asarray(prompt)
    if not prompt.size:
        raise UserError("a prompt is empty: begin it with a token, such as the end-of-text token or a newline")
    if prompt.size > block_size:
        cut = prompt.size - block_size
        warnings.warn(f"the prompt's first {cut} of {prompt.size} tokens are cut: the context is {block_size}", stacklevel=4)
    return prompt[-block_size:].tolist()


def _read(model: GPT, texts: list[list[int]], kv: KVCache, ws: storage.Workspace) -> tuple[Array, Array]:
    """Fills the cache with whole texts. Returns the logits after each, (B, 1, V), and the padding before it, (B, 1).

    A text longer than the context is first cut, in place, to its last half context.
    """
    block_size = model.config.block_size
    for text in texts:
        if len(text) > block_size:
            del text[: -max(1, block_size // 2)]
    T = max(map(len, texts))
    pad = np.array([[T - len(text)] for text in texts], np.int32)
    ids = np.array([[0] * (T - len(text)) + text for text in texts], np.int32)
    positions = np.maximum(np.arange(T, dtype=np.int32) - pad, 0)
    kv.length = 0
    logits, _ = model.forward(
        ids, ws, positions=positions, start=np.repeat(pad, T, axis=1), kv=kv, keep=False, last=True
    )
    return logits, pad


def generate(
    model: GPT, prompts: Sequence[Sequence[int] | Array], max_new_tokens: int, **settings
) -> list[Array]:
    """The new tokens of each prompt, int32, a token of `stop` at the end included. Settings are those of `steps`."""
    new = [[] for _ in prompts]
    for rows, tokens in steps(model, prompts, max_new_tokens, **settings):
        for row, token in zip(rows.tolist(), tokens.tolist()):
            new[row].append(token)
    return [np.array(tokens, np.int32) for tokens in new]


# --- text -------------------------------------------------------------------------------------------------------

Tokenizer = tokenizer.CharTokenizer | tokenizer.BPETokenizer


def encode_prompt(tok: Tokenizer, text: str) -> Array:
    """The ids of a prompt. An empty one becomes what a text begins after: the end-of-text token, else a newline.

    Raises UserError for a character that the tokenizer does not know, and for an empty prompt where it has neither.
    """
    if not text and tok.eos_id is not None:
        return np.array([tok.eos_id], np.int32)
    try:
        return tok.encode(text or "\n")
    except UserError as error:
        if text:
            raise
        raise UserError("the prompt is empty, and this vocabulary has no newline to begin with: give one") from error


def stream(model: GPT, tok: Tokenizer, prompt: Sequence[int] | Array, max_new_tokens: int, **settings) -> Iterator[str]:
    """The continuation of one prompt as text, as it comes, whole characters only; ends before the end-of-text token.

    Settings are those of `steps`, but for `stop`.
    """
    feed = tokenizer.stream_decoder(tok)
    stop = () if tok.eos_id is None else (tok.eos_id,)
    for _, tokens in steps(model, [prompt], max_new_tokens, stop=stop, **settings):
        if tokens[0] not in stop:
            yield feed(tokens[0])
    yield feed(final=True)


def until(pieces: Iterable[str], stop: str) -> Iterator[str]:
    """The text of `pieces` as it comes, up to where it holds `stop`; what may become `stop` waits. "" never stops.

    >>> list(until(["one\\n", "two\\n", "\\nthree"], "\\n\\n"))
    ['one', '\\ntwo']
    """
    text = ""
    for piece in pieces:
        text += piece
        if stop and stop in text:
            text = text[: text.index(stop)]
            break
        waits = next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-n:])), 0)
        if len(text) > waits:
            yield text[: len(text) - waits]
            text = text[len(text) - waits :]
    if text:
        yield text
