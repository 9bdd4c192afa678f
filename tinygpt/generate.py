"""Text from a model: KV cache, sampling, generation token by token.

A token's keys and values depend on what comes before it, never on what comes after. They are computed once
and kept, so that a step costs one token's forward pass (Pope et al. 2022, "Efficiently Scaling Transformer
Inference", section 2). The next token is drawn from softmax(logits / temperature), cut to the `top_k`
likeliest tokens (Fan et al. 2018, section 5.4) or to the likeliest that together have probability `top_p`
(Holtzman et al. 2020, section 3.1). Temperature 0 is greedy: always the likeliest.

`probabilities` <- `sample` <- `steps` <- `generate` (ids in, ids out) and `stream` (text out). Not here: beam
search, penalties on repetition, speculative decoding; how a conversation is written down as text.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import numpy as np

from .errors import UserError
from .model import GPT, Array
from .storage import Workspace, empty
from .tokenizer import BPETokenizer, CharTokenizer, stream_decoder

Ids = Sequence[int] | Array
Tokenizer = CharTokenizer | BPETokenizer


class KVCache:
    """Keys and values of the first `length` tokens, (n_layer, B, capacity, C) each, extended by the model."""

    def __init__(self, model: GPT, batch: int, capacity: int) -> None:
        shape = (model.config.n_layer, batch, capacity, model.config.n_embd)  # an adapter's prompt included
        self.keys, self.values = (empty(shape, model.flat.dtype) for _ in range(2))
        self.length, self.capacity, self._model = 0, capacity, model

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Adds one layer's k and v, (B, T, C); the last layer's move `length` on.

        Returns all that the layer has, (B, length + T, C), as views.
        """
        old, new = self.length, self.length + k.shape[1]
        keys, values = self.keys[layer, :, :new], self.values[layer, :, :new]
        self._model.ops.append_rows(self.keys[layer], k, old)
        self._model.ops.append_rows(self.values[layer], v, old)
        if layer == len(self.keys) - 1:
            self.length = new
        return keys, values

    def keep(self, alive: Array) -> Array:
        """Drops the rows where `alive` (B,) is False, and returns which old row each row now is.

        Rows from the end move into the gaps: a dropped row costs one row's copy at most.
        """
        n = np.count_nonzero(alive)
        rows, gaps = np.arange(n), np.flatnonzero(~alive[:n])
        rows[gaps] = n + np.flatnonzero(alive[n:])
        for a in (self.keys, self.values):
            a[:, gaps, : self.length] = a[:, rows[gaps], : self.length]
        self.keys, self.values = self.keys[:, :n], self.values[:, :n]
        return rows


# --- sampling: functions of the logits ----------------------------------------------------------------------


def probabilities(logits: Array, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Array:
    """The distribution that `sample` draws from: (..., V) -> (..., V), of the same dtype.

    top_k 0 and top_p 1 are off; top_k is applied first. Tokens as likely as the last one kept stay too: the
    order of the vocabulary has no influence. Raises UserError for logits that are not finite.
    """
    V, top = logits.shape[-1], logits.max(-1, keepdims=True)
    if not np.isfinite(top).all():
        raise UserError("the logits are not finite: the model's training diverged, or its file is damaged")
    if temperature == 0:
        probs = np.zeros_like(logits)
        np.put_along_axis(probs, logits.argmax(-1)[..., None], 1, -1)
        return probs
    scaled = (logits - top) / max(temperature, 1e-6)  # a float32 holds no 1e-300, and 0 / 0 is NaN
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

    A trained model needs few: the 64 likeliest are sorted, and eight times more until they are enough.
    """
    V, n = probs.shape[-1], 64
    while True:
        n = min(n, V)
        likeliest = np.sort(np.partition(probs, V - n)[..., V - n :])[..., ::-1]
        mass = likeliest.cumsum(-1, dtype=np.float64)
        if n == V or (mass[..., -1] >= top_p).all():
            last = np.minimum((mass < top_p).sum(-1, keepdims=True), n - 1)  # rounded, all may be below top_p
            return np.take_along_axis(likeliest, last, -1)
        n *= 8


def sample(
    logits: Array, uniform: Array, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Array:
    """One id a row: the first whose cumulative probability exceeds the row's number in [0, 1).

    logits (B, V), uniform (B,) -> ids (B,). Raises what `probabilities` raises.
    """
    mass = probabilities(logits, temperature, top_k, top_p).cumsum(-1, dtype=np.float64)
    return (mass > (uniform * mass[:, -1])[:, None]).argmax(-1)  # the last mass is 1 but for rounding


# --- generation ---------------------------------------------------------------------------------------------


def steps(
    model: GPT, prompts: Sequence[Ids], max_new_tokens: int, *, temperature: float = 1.0, top_k: int = 0,
    top_p: float = 1.0, stop: Collection[int] = (), rng: np.random.Generator | None = None,
    ws: Workspace | None = None, vocab_size: int | None = None,
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

    Only ids below `vocab_size` are drawn: a model may have more rows than its tokenizer has tokens. Raises
    UserError for an empty prompt, a setting out of range and logits that are not finite.
    """
    _check(temperature, top_k, top_p, max_new_tokens, rng)
    seen = [_fit(prompt, model.context) for prompt in prompts]  # what the next token follows from
    longest = max(map(len, seen), default=0)
    kv = KVCache(model, len(seen), model.prompt_length + min(model.context, longest + max_new_tokens))
    seeds = rng.integers(2**63, size=len(seen)) if temperature else ()
    draws = [np.random.default_rng(seed).random for seed in seeds]
    stop, ws = np.array(sorted(stop), np.int64), ws or Workspace()
    rows, pad, ids, decode = np.arange(len(seen)), None, None, None
    for _ in range(max_new_tokens):
        if not len(rows):
            return
        if kv.length in (0, kv.capacity):
            logits, pad = _read(model, [seen[row] for row in rows], kv, ws)
            decode = _decoder(model, kv, pad, ws)
        else:
            logits = decode(ids)
        uniform = np.array([draws[row]() for row in rows]) if temperature else np.zeros(len(rows))
        ids = sample(logits[:, -1, :vocab_size], uniform, temperature, top_k, top_p)
        for row, i in zip(rows.tolist(), ids.tolist(), strict=True):
            seen[row].append(i)
        yield rows, ids
        ended = (ids[:, None] == stop).any(1)
        if ended.any():
            kept = kv.keep(~ended)
            rows, pad, ids = rows[kept], pad[kept], ids[kept]
            decode = _decoder(model, kv, pad, ws)


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


def _read(model: GPT, texts: list[list[int]], kv: KVCache, ws: Workspace) -> tuple[Array, Array]:
    """Fills the cache with whole texts: the logits after each, (B, 1, V), and the padding before it, (B, 1).

    Cuts texts longer than the context, in place, to their last half context.
    """
    for text in texts:
        if len(text) > model.context:
            del text[: -max(1, model.context // 2)]
    T = max(map(len, texts))
    pad = np.array([[T - len(text)] for text in texts], np.int32)
    ids = np.array([[0] * (T - len(text)) + text for text in texts], np.int32)
    at, start = np.maximum(np.arange(T, dtype=np.int32) - pad, 0), np.repeat(pad, T, axis=1)
    kv.length = 0
    return model.forward(ids, ws, positions=at, start=start, kv=kv, keep=False, last=True)[0], pad


def _decoder(model: GPT, kv: KVCache, pad: Array, ws: Workspace) -> Callable[[Array], Array]:
    """A function from the newest ids (B,) to the logits (B, 1, V) after them: the forward pass of one token.

    With the C core the first call is recorded, and later ones are made from the record: a step of a small
    model takes less time than the Python of its forward. What changes from step to step is the contents of
    two arrays, and how far the cache is filled.
    """
    token, position = np.empty(pad.shape, np.int32), np.empty(pad.shape, np.int32)
    recording = None

    def forward() -> Array:
        return model.forward(token, ws, positions=position, start=pad, kv=kv, keep=False)[0]

    def decode(ids: Array) -> Array:
        nonlocal recording
        token[:, 0], position[:] = ids, kv.length - model.prompt_length - pad
        if not hasattr(model.ops, "Recording"):
            return forward()
        if recording is None:
            recording = model.ops.Recording(forward)
        else:
            for args in recording.args["append_rows"]:
                args.at = kv.length
            kv.length += 1
            for args in recording.args["attention_forward"]:
                args.S = kv.length
            recording.replay()
        return recording.result

    return decode


def generate(model: GPT, prompts: Sequence[Ids], max_new_tokens: int, **settings) -> list[Array]:
    """The new ids of each prompt, int32, with the id of `stop` that ended it. Settings: see `steps`."""
    new = [[] for _ in prompts]
    for rows, ids in steps(model, prompts, max_new_tokens, **settings):
        for row, i in zip(rows.tolist(), ids.tolist(), strict=True):
            new[row].append(i)
    return [np.array(ids, np.int32) for ids in new]


# --- text ---------------------------------------------------------------------------------------------------


def encode_prompt(tokenizer: Tokenizer, text: str) -> Array:
    """A prompt's ids; an empty one is what a text begins after: the end-of-text token, else a newline.

    Raises UserError for a character that the tokenizer does not know, and where it has neither of these two.
    """
    if text:
        return tokenizer.encode(text)
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
