"""Answers that a model samples, their log-probabilities, and how a model learns from an objective of these.

An objective maps the log-probabilities of sampled tokens to a loss and to d, its gradient by them.
Backpropagating d equals backpropagating a weighted cross-entropy with weights -d. So a policy gradient is
supervised learning of the model's own answers, in which better answers have larger weights.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..core.model import GPT
from ..core.optim import AdamW
from ..text import instructions
from ..text.data import Array, Tokenizer
from ..text.examples import LeftOutError
from ..text.instructions import Prompt
from ..text.stream import ended, new_ids


class Samples(NamedTuple):
    """N answers. Answers to one question are neighbours. Padding is on the right: no token sees it."""

    ids: Array  # (N, T) prompt, answer, padding
    targets: Array  # (N, T)
    mask: Array  # (N, T): 1 where the target is a token of the answer, its end included
    answers: list[str]
    stopped: Array  # (N,): whether the answer has an end
    ref: Array | None = None  # of DPO, (2, N / 2): the reference's log p of each chosen and rejected answer

    @property
    def places(self) -> Array:
        """Where the mask is 1, in `ids.ravel()`, int32."""
        return np.flatnonzero(self.mask).astype(np.int32)

    def spread(self, values: Array) -> Array:
        """values, one for each of the places -> (N, T), float64, 0 elsewhere."""
        spread = np.zeros(self.mask.shape)
        spread[self.mask > 0] = values
        return spread


def sample(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[Array], count: int, max_new_tokens: int,
    rng: np.random.Generator, temperature: float = 1.0,
) -> Samples:  # fmt: skip
    """`count` answers to each prompt (ids), each up to one of `tokenizer.stops` or to `max_new_tokens`.

    At temperature 1 the answers are samples of the model itself: no token is excluded. An answer without an
    end is scored like an answer that ended there.
    """
    rows = [prompt for prompt in prompts for _ in range(count)]
    new = new_ids(model, tokenizer, rows, max_new_tokens, temperature=temperature, rng=rng)
    return answered(tokenizer, rows, new)


def prompt_ids(model: GPT, tokenizer: Tokenizer, prompt: Prompt, max_new_tokens: int) -> Array:
    """The ids (n,) of a prompt. Raises LeftOutError where the model has no room for the answer.

    The last token of an answer is only a target, so it needs no position.
    """
    ids = instructions.prompt(tokenizer, prompt)
    if len(ids) + max_new_tokens - 1 > model.context:
        raise LeftOutError(f"as longer than {model.context} tokens with --max-new-tokens {max_new_tokens}")
    return ids


def answered(tokenizer: Tokenizer, prompts: Sequence[Array], new: Sequence[Array]) -> Samples:
    """Prompts and their answers (ids, with the id of the end where they have an end) as `Samples`."""
    shape = len(new), max(len(p) + len(a) for p, a in zip(prompts, new, strict=True)) - 1
    ids, targets, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for row, pair in enumerate(zip(prompts, new, strict=True)):
        text = np.concatenate(pair)
        n = len(text) - 1
        ids[row, :n], targets[row, :n], mask[row, len(pair[0]) - 1 : n] = text[:-1], text[1:], 1
    texts, stopped = zip(*(ended(tokenizer, answer) for answer in new), strict=True)
    return Samples(ids, targets, mask, list(map(instructions.answer_content, texts)), np.array(stopped))


def logprobs(model: GPT, samples: Samples) -> Array:
    """log p of each target (N, T), float64, 0 where the mask is 0."""
    return scored(model, samples, keep=False)[0]


def scored(model: GPT, samples: Samples, keep: bool = True) -> tuple[Array, Array, tuple, tuple]:
    """Log-probabilities of the answers, and the caches for a backward pass.

    Returns four things: log p of each target (N, T), float64, 0 where the mask is 0; the logits (places, V);
    the model's cache; the cross-entropy's cache.
    """
    places = samples.places
    logits, cache = model.forward(samples.ids, places=places, keep=keep)
    nll, c_nll = model.ops.cross_entropy_forward(logits, samples.targets.ravel()[places])  # (places,)
    return samples.spread(-nll), logits, cache, c_nll


def learn(
    optimizer: AdamW, samples: Samples, objective: Callable[[Array, Array], tuple[float, Array]]
) -> float:
    """Puts the gradients of objective(logp (N, T), logits (places, V)) into `optimizer.flat`; the loss."""
    model = optimizer.model
    logp, logits, cache, c_nll = scored(model, samples)
    loss, d = objective(logp, logits)
    weights = -d[samples.mask > 0].astype(logits.dtype)  # (places,)
    dlogits = model.ops.cross_entropy_backward(weights, c_nll)
    del logits, c_nll  # the largest arrays of all
    model.backward(dlogits, cache, optimizer.grads)
    return loss
