"""Text from a model: KV cache, sampling, generation token by token.

A token's keys and values depend on what comes before it, never on what comes after. They are computed once
and kept, so that a step costs one token's forward pass (Pope et al. 2022, "Efficiently Scaling Transformer
Inference", section 2). The next token is drawn from softmax(logits / temperature), cut to the `top_k`
likeliest tokens (Fan et al. 2018, section 5.4) or to the likeliest that together have probability `top_p`
(Holtzman et al. 2020, section 3.1). Temperature 0 is greedy: always the likeliest.

`ops.probabilities` <- `ops.sample` <- `steps` <- `generate` (ids in, ids out) and `stream` (text out). Not
here: beam search, penalties on repetition, speculative decoding; how a conversation is written down as text.
"""

import warnings
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from ..errors import UserError
from .memory import empty
from .model import GPT, Array
from .replay import Packs, recorded

Ids = Sequence[int] | Array

DRAWN = 64  # random numbers drawn at a time for each prompt
PACK_AFTER = 8  # steps after which a copy of the weights is expected to pay; of bfloat16, half as large, 1


class KVCache:
    """Keys and values of the first `length` tokens, (n_layer, B, capacity, C) each, extended by the model.

    length is an array (), int64: a replayed operation reads how many there are by then.
    """

    def __init__(self, model: GPT, batch: int, capacity: int) -> None:
        shape = model.config.n_layer, batch, capacity, model.config.n_embd
        self.keys, self.values = (empty(shape, model.flat.dtype) for _ in range(2))
        self.length, self.capacity, self._ops = np.zeros((), np.int64), capacity, model.ops

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """Adds one layer's k and v, (B, T, C); the first layer moves `length` on.

        Returns the layer's keys and values, (B, capacity, C), and `length`, which says how many there are.
        """
        if layer == 0:
            self._ops.advance(self.length, k.shape[1])
        keys, values = self.keys[layer], self.values[layer]
        self._ops.append_rows(keys, k, self.length)
        self._ops.append_rows(values, v, self.length)
        return keys, values, self.length

    def keep(self, is_alive: Array) -> Array:
        """Drops the rows where `is_alive` (B,) is False, and returns which old row each row now is.

        Rows from the end move into the gaps: a dropped row costs one row's copy at most.
        """
        n = np.count_nonzero(is_alive)
        rows, gaps = np.arange(n), np.flatnonzero(~is_alive[:n])
        rows[gaps] = n + np.flatnonzero(is_alive[n:])
        for a in (self.keys, self.values):
            a[:, gaps, : self.length] = a[:, rows[gaps], : self.length]
        self.keys, self.values = self.keys[:, :n], self.values[:, :n]
        return rows


# --- generation ---------------------------------------------------------------------------------------------


def steps(
    model: GPT, prompts: Sequence[Ids], max_new_tokens: int, *, temperature: float = 1.0, top_k: int = 0,
    top_p: float = 1.0, stop: Collection[int] = (), rng: np.random.Generator | None = None,
    vocab_size: int | None = None, packs: Packs | None = None,
) -> Iterator[tuple[Array, Array]]:  # fmt: skip
    """Continues all prompts together, a token each a step: yields (which prompts, their new ids), both (B,).

    A prompt ends with an id of `stop`, which is yielded, or after `max_new_tokens`, and then costs nothing.

    Shorter prompts are padded on the left. Padding is invisible (`ops.visible_keys`), positions count from a
    prompt's first token, and each prompt has a generator of its own, seeded by one number of `rng`:
    neighbours have no influence, and a batch gives what calls for one prompt after the other give, up to
    rounding, which in float32 can tip a choice between tokens that are all but equal.

    A text has `model.context` positions. A longer prompt loses its beginning, with a warning. A text that
    outgrows them goes on from the last half of them, read anew: as every position changes, nothing cached can
    stay, and keeping more would mean doing so more often.

    The weights must not change meanwhile: after a few steps they are read from copies, as large as they
    are. The sums of a product then have another order, so logits differ in their last bits. packs: the
    copies, where several calls share them (`packs_for`).

    Only ids below `vocab_size` are drawn: a model may have more rows than its tokenizer has tokens. Raises
    UserError for an empty prompt, a setting out of range and logits that are not finite.
    """
    _check(temperature, top_k, top_p, max_new_tokens, rng)
    texts = [_fit(prompt, model.context) for prompt in prompts]  # what the next token follows from
    longest = max(map(len, texts), default=0)
    stop = np.array(sorted(stop), np.int64)
    kv = KVCache(model, len(texts), model.prefix + min(model.context, longest + max_new_tokens))
    seeds = rng.integers(2**63, size=len(texts)) if temperature else ()
    draws = [np.random.default_rng(seed) for seed in seeds]
    uniform = np.zeros((len(texts), DRAWN))  # the numbers of DRAWN steps
    rows, ids, backlog, packs = np.arange(len(texts)), None, [], packs or packs_for(model)

    def newest(ids: Array, positions: Array, start: Array) -> Array:
        return model.forward(ids, positions=positions, start=start, past=kv, keep=False)[0]

    # a replay takes less time than the Python of a small model's forward
    decode = recorded(newest, model, kv.keys, kv.values, kv.length, packs=packs, most=1)
    for step in range(max_new_tokens):
        if not len(rows):
            return
        if kv.length in (0, kv.capacity):
            _append(texts, backlog)
            logits, pad = _read(model, [texts[row] for row in rows], kv)
        else:
            positions = (kv.length - model.prefix - pad).astype(np.int32)
            packs.count()
            logits = decode(ids[:, None], positions, pad)  # (B, 1, V)
        if temperature and step % DRAWN == 0:
            for row in rows:
                draws[row].random(out=uniform[row])
        logits, numbers = logits[:, -1, :vocab_size], uniform[rows, step % DRAWN]
        ids = model.ops.sample(logits, numbers, temperature, top_k, top_p)
        backlog.append((rows, ids))
        yield rows, ids
        if stop.size and (at_end := (ids[:, None] == stop).any(1)).any():
            order = kv.keep(~at_end)
            rows, pad, ids = rows[order], pad[order], ids[order]


def packs_for(model: GPT) -> Packs:
    """Copies of the weights of a model, for several calls of `steps` or `generate`."""
    return Packs(1 if model.bfloat16 else PACK_AFTER)


def _check(temperature: float, top_k: int, top_p: float, max_new_tokens: int, rng: object) -> None:
    for name, value, right, rule in (  # comparisons that are False for NaN
        ("temperature", temperature, temperature >= 0, "at least 0; 0 is greedy"),
        ("top_k", top_k, top_k >= 0, "at least 0; 0 is off"),
        ("top_p", top_p, 0 < top_p <= 1, "more than 0 and at most 1; 1 is off"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "at least 0"),
    ):
        if not right:
            raise UserError(f"{name} is {value}: it must be {rule}")
    if temperature and rng is None:
        raise UserError("sampling needs rng, for example np.random.default_rng(seed); temperature=0 does not")


def _fit(prompt: Ids, context: int) -> list[int]:
    if not len(prompt):
        raise UserError("a prompt is empty: begin with a token, such as the end-of-text token or a newline")
    if (cut := len(prompt) - context) > 0:
        message = f"the first {cut} of the prompt's {len(prompt)} tokens are cut: the context is {context}"
        warnings.warn(message, stacklevel=2)
    return np.asarray(prompt[-context:]).tolist()


def _append(texts: list[list[int]], new: list[tuple[Array, Array]]) -> None:
    """Moves the ids of steps, each (which texts, their ids), to the ends of the texts."""
    for rows, ids in new:
        for row, i in zip(rows.tolist(), ids.tolist(), strict=True):
            texts[row].append(i)
    new.clear()


def _read(model: GPT, texts: list[list[int]], kv: KVCache) -> tuple[Array, Array]:
    """Fills the cache with whole texts: the logits after each, (B, 1, V), and the padding before it, (B, 1).

    Cuts texts longer than the context, in place, to their last half context. Equal texts are read once.
    """
    for text in texts:
        if len(text) > model.context:
            del text[: -max(1, model.context // 2)]
    T = max(map(len, texts))
    pad = np.array([[T - len(text)] for text in texts], np.int32)
    ids = np.array([[0] * (T - len(text)) + text for text in texts], np.int32)
    _, first, rows = np.unique(np.hstack([pad, ids]), axis=0, return_index=True, return_inverse=True)
    at, start = np.maximum(np.arange(T, dtype=np.int32) - pad, 0), np.repeat(pad, T, axis=1)
    whole, kv.length[...] = (kv.keys, kv.values), 0
    kv.keys, kv.values = (a[:, : len(first)] for a in whole)
    last = np.arange(1, len(first) + 1, dtype=np.int32) * T - 1  # the place of each text's last token
    logits, _ = model.forward(
        ids[first], positions=at[first], start=start[first], past=kv, places=last, keep=False
    )  # (texts, V)
    for a in whole:
        a[:, :, : kv.length] = a[:, rows.ravel(), : kv.length]
    kv.keys, kv.values = whole
    return logits[rows.ravel(), None], pad


def generate(model: GPT, prompts: Sequence[Ids], max_new_tokens: int, **settings) -> list[Array]:
    """The new ids of each prompt, int32, with the id of `stop` that ended it. Settings: see `steps`."""
    new = [[] for _ in prompts]
    _append(new, list(steps(model, prompts, max_new_tokens, **settings)))
    return [np.array(ids, np.int32) for ids in new]
