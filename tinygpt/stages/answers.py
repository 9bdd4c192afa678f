"""Asks a model questions, in batches. Computes the rate of right answers, with a 95 % confidence interval.

An answer takes the likeliest token at each step. The caller decides which answers are right.

Reference: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..core.generate import packs_for
from ..core.model import GPT
from ..text import instructions
from ..text.data import Array, Batch, Tokenizer, pack
from ..text.instructions import Message
from ..text.stream import encode_prompt, ended, new_ids

BATCH = 64  # prompts that are computed together


class Answer(NamedTuple):
    text: str  # as `instructions.answer_content`, or without white space around it
    stopped: bool  # by one of `tokenizer.stops`, not by the limit of its length


def answers(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[str | Sequence[Message] | Array], max_new_tokens: int
) -> list[Answer]:
    """The likeliest continuation of each prompt, token by token, up to one of `tokenizer.stops`.

    A prompt is ids (n,), a string or messages. A model that was tuned to instructions gets a string and
    messages in the form of `instructions`. Any other model continues a string as a text. Prompts of similar
    length are computed together. That changes an answer by rounding only (see `generate.steps`).
    """
    is_tuned, packs = instructions.is_tuned(tokenizer), packs_for(model)
    content = instructions.answer_content if is_tuned else str.strip

    def encoded(prompt: str | Sequence[Message] | Array) -> Array:
        if isinstance(prompt, Array):
            return prompt
        is_text = isinstance(prompt, str) and not is_tuned
        return (encode_prompt if is_text else instructions.prompt)(tokenizer, prompt)

    ids = [encoded(prompt) for prompt in prompts]
    order, replies = sorted(range(len(ids)), key=lambda n: len(ids[n])), {}
    for i in range(0, len(order), BATCH):
        batch = order[i : i + BATCH]
        new = new_ids(model, tokenizer, [ids[n] for n in batch], max_new_tokens, temperature=0, packs=packs)
        for n, (text, stopped) in zip(batch, (ended(tokenizer, reply) for reply in new), strict=True):
            replies[n] = Answer(content(text), stopped)
    return [replies[n] for n in range(len(ids))]


def outputs(model: GPT, packed: Batch, rows: int = 16) -> Iterator[tuple[Array, Array, Array]]:
    """The marked places of packed texts, `rows` rows at a time: marks (N,), targets (N,), outputs (N, V).

    The weights of `packed` are the marks, whole numbers. At the mark 0 nothing is computed.
    """
    for at in range(0, len(packed.ids), rows):
        ids, targets, marks, start, positions = (field[at : at + rows] for field in packed)
        places = np.flatnonzero(marks).astype(np.int32)
        logits, _ = model.forward(ids, start=start, positions=positions, places=places, keep=False)
        yield marks.ravel()[places].astype(int), targets.ravel()[places], logits


def likelihoods(
    model: GPT, prompts: Sequence[Array], choices: Sequence[Sequence[Array]], rows: int = 16
) -> list[Array]:
    """log p of each choice (ids) after its prompt (ids), in nats: an array for each prompt.

    Choices that differ only in their last token share one computation. Raises ValueError
    where a prompt with a choice is longer than the model's context.
    """
    groups: dict[tuple, list[int]] = {}  # prompt, all of a choice but its last token -> which choices
    for n, options in enumerate(choices):
        for m, option in enumerate(options):
            groups.setdefault((n, *option[:-1].tolist()), []).append(m)
    parts, keys = [], list(groups)
    for mark, (n, *head) in enumerate(keys, 1):
        ids = np.concatenate([prompts[n], head, [0]]).astype(np.int32)  # 0 makes the last token an input
        parts.append((ids, np.repeat([0, mark], [len(prompts[n]), len(head) + 1])))
    packed = pack(parts, model.context)
    logps = [np.zeros(len(options)) for options in choices]
    for marks, _, logits in outputs(model, packed, rows):
        for mark in np.unique(marks):
            n, here = keys[mark - 1][0], logits[marks == mark].astype(np.float64)  # (length of choices, V)
            here -= here.max(-1, keepdims=True)  # exp cannot overflow
            here -= np.log(np.exp(here).sum(-1, keepdims=True))
            for m in groups[keys[mark - 1]]:
                logps[n][m] = here[np.arange(len(here)), choices[n][m]].sum()
    return logps


class Rate(NamedTuple):
    rate: float
    low: float  # Wilson's 95% interval
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.rate:.1%} [{self.low:.1%}, {self.high:.1%}] of {self.n}"


def wilson(right: int, n: int, z: float = 1.96) -> Rate:
    """A rate with its interval. The interval is never a point, and stays between 0 and 1.

    >>> print(wilson(9, 10))
    90.0% [59.6%, 98.2%] of 10
    """
    if not n:
        return Rate(math.nan, 0.0, 1.0, 0)
    p, middle = right / n, right / n + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + side) / (1 + z * z / n) for side in (-half, half))
    return Rate(p, max(0.0, low), min(1.0, high), n)


# --- over seeds ---------------------------------------------------------------------------------------------

T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t for 1 to 9 degrees of freedom;
# beyond them 1.96 + 2.37 / degrees + 2.8 / degrees^2, the beginning of its expansion, is right to 0.2%


class Estimate(NamedTuple):
    """The mean of a number over seeds, with its 95% interval (Student's t)."""

    mean: float
    low: float
    high: float
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """Of one or two seeds the interval is from the smaller to the larger value."""
    mean, n = float(np.mean(values)), len(values)
    if n <= 2:
        return Estimate(mean, min(values), max(values), n)
    degrees = n - 1
    t = T95[degrees - 1] if degrees <= len(T95) else 1.96 + 2.37 / degrees + 2.8 / degrees**2
    half = t * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def verdict(interval: Estimate, sign: str, limit: float) -> str:
    """held, refuted or undecided: is the interval on the right side of `limit`? sign: ">=" or "<="."""
    if interval.n < 2:
        return "one seed"
    low, high = (interval.low, interval.high) if sign == ">=" else (-interval.high, -interval.low)
    limit = limit if sign == ">=" else -limit
    return "held" if low >= limit else "refuted" if high < limit else "undecided"
