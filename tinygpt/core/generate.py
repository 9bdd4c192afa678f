"""Text from a model: KV cache, sampling, generation token by token.

The keys and values of a token depend on the tokens before it, not on later tokens. They are computed once and
kept, so a step costs the forward pass of one token (Pope et al. 2022, "Efficiently Scaling Transformer
Inference", section 2). The next token is drawn from softmax(logits / temperature). The distribution is cut to
the `top_k` likeliest tokens (Fan et al. 2018, section 5.4), or to the likeliest tokens that together have the
probability `top_p` (Holtzman et al. 2020, section 3.1). Temperature 0 is greedy: always the likeliest token.

`ops.probabilities` <- `ops.sample` <- `steps` <- `generate` (ids in, ids out) and `text.stream` (text out).
Not here: beam search, penalties on repetition, speculative decoding, the text form of a conversation.
"""

import warnings
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from ..errors import UserError
from .memory import empty
from .model import GPT, Array
from .option import inside
from .replay import Packs, recorded

Ids = Sequence[int] | Array

PACK_AFTER = 8  # steps after which copies of the weights save time; bfloat16 copies are half as large: 1 step


class KVCache:
    """`keys` and `values`, (n_layer, B, capacity, C) each, of which the first `length` positions are filled.

    length is an array (), int64, so that a replayed operation reads the present length.
    """

    def __init__(self, model: GPT, batch: int, capacity: int) -> None:
        shape = model.config.n_layer, batch, capacity, model.config.n_embd
        self.keys, self.values = (empty(shape, model.flat.dtype) for _ in range(2))
        self.length, self.capacity, self._ops = np.zeros((), np.int64), capacity, model.ops

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """Appends k and v, (B, T, C), to one layer. Layer 0 comes first and adds T to `length`.

        Returns the keys and values of the layer, (B, capacity, C) each, and `length`.
        """
        if layer == 0:
            self._ops.advance(self.length, k.shape[1])
        keys, values = self.keys[layer], self.values[layer]
        self._ops.append_rows(keys, k, self.length)
        self._ops.append_rows(values, v, self.length)
        return keys, values, self.length

    def keep(self, is_alive: Array) -> Array:
        """Drops the rows where `is_alive` (B,) is False. Returns the old number of each remaining row.

        Rows from the end move into the gaps, so a dropped row costs at most the copy of one row.
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
    """Continues all prompts together, one token per step. Yields (prompts' numbers, new ids), (B,) each.

    A prompt ends after an id of `stop`, which is yielded, or after `max_new_tokens`. It then costs no time.

    Other prompts do not change the text of a prompt. Shorter prompts are padded on the left, and padding is
    invisible (`ops.visible_keys`). Positions count from a prompt's first token. Each prompt has its own
    generator, seeded by one number of `rng`. Only rounding depends on the batch: in float32 it can change the
    choice between two tokens whose probabilities are nearly equal.

    A text has `model.context` positions. A longer prompt loses its beginning, with a warning. When a text
    needs more positions, the model reads the last half of the context again, and continues after this half.
    All positions have changed, so the cache is useless. A larger part would have to be read more often.

    The weights must not change between steps: after a few steps the model reads copies of them. The sums of a
    product then have another order, so logits differ in their last bits. packs: copies that several calls
    share, see `packs_for`.

    Only ids below `vocab_size` are drawn: a model may have more rows than its tokenizer has tokens. Raises
    UserError for an empty prompt, a setting out of range, and logits that are not finite.
    """
    _check(temperature, top_k, top_p, max_new_tokens, rng)
    texts = [_fit(prompt, model.context) for prompt in prompts]  # the ids before the next token
    longest = max(map(len, texts), default=0)
    stop = np.array(sorted(stop), np.int64)
    kv = KVCache(model, len(texts), model.prefix + min(model.context, longest + max_new_tokens))
    seeds = rng.integers(2**63, size=len(texts)) if temperature else ()
    draws = [np.random.default_rng(seed) for seed in seeds]
    rows, ids, backlog, packs = np.arange(len(texts)), None, [], packs or packs_for(model)

    def newest(ids: Array, positions: Array, start: Array) -> Array:
        return model.forward(ids, positions=positions, start=start, past=kv, keep=False)[0]

    # a replay takes less time than the Python of a small model's forward
    decode = recorded(newest, model, kv.keys, kv.values, kv.length, packs=packs, most=1)
    for _ in range(max_new_tokens):
        if not len(rows):
            return
        if kv.length in (0, kv.capacity):
            _append(texts, backlog)
            logits, pad = _read(model, [texts[row] for row in rows], kv)
        else:
            positions = (kv.length - model.prefix - pad).astype(np.int32)
            packs.count()
            logits = decode(ids[:, None], positions, pad)  # (B, 1, V)
        uniform = np.array([draws[row].random() if temperature else 0.0 for row in rows])
        ids = model.ops.sample(logits[:, -1, :vocab_size], uniform, temperature, top_k, top_p)
        backlog.append((rows, ids))
        yield rows, ids
        if stop.size and (at_end := (ids[:, None] == stop).any(1)).any():
            order = kv.keep(~at_end)
            rows, pad, ids = rows[order], pad[order], ids[order]


def packs_for(model: GPT) -> Packs:
    """Copies of the weights of a model, for several calls of `steps` or `generate`."""
    return Packs(1 if model.bfloat16 else PACK_AFTER)


def _check(temperature: float, top_k: int, top_p: float, max_new_tokens: int, rng: object) -> None:
    for name, value, interval, hint in (
        ("temperature", temperature, "[0, inf]", "; 0 is greedy"),
        ("top_k", top_k, "[0, inf)", "; 0 is off"),
        ("top_p", top_p, "(0, 1]", "; 1 is off"),
        ("max_new_tokens", max_new_tokens, "[0, inf)", ""),
    ):
        is_inside, rule = inside(value, interval)
        if not is_inside:
            raise UserError(f"{name} is {value}: it must be {rule}{hint}")
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
    """Appends the ids of steps, (numbers of the texts, their new ids) each, to the texts. Empties `new`."""
    for rows, ids in new:
        for row, i in zip(rows.tolist(), ids.tolist(), strict=True):
            texts[row].append(i)
    new.clear()


def _read(model: GPT, texts: list[list[int]], kv: KVCache) -> tuple[Array, Array]:
    """Fills the cache with whole texts. Returns the logits after each, (B, 1, V), and its padding, (B, 1).

    A text longer than the context is cut, in place, to its last half context. Equal texts are read once.
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
    """The new ids of each prompt, int32, with the id of `stop` at the end. Settings are those of `steps`."""
    new = [[] for _ in prompts]
    _append(new, list(steps(model, prompts, max_new_tokens, **settings)))
    return [np.array(ids, np.int32) for ids in new]
