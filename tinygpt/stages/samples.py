"""Answers that a model samples, their log-probabilities, and how a model learns from an objective of these.

An objective maps the log-probabilities of sampled tokens to a loss and d, the gradient of the loss by them.
What d does to the weights is what a weighted cross-entropy with weights -d does: a policy gradient is
supervised learning of one's own answers, the better the more.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..core.generate import generate
from ..core.model import GPT
from ..core.optim import AdamW
from ..text import instructions
from ..text.data import Array, Tokenizer
from ..text.examples import LeftOutError
from ..text.instructions import Prompt


class Samples(NamedTuple):
    """N answers, those to one question side by side. Padding is on the right: nothing sees it."""

    ids: Array  # (N, T) prompt, answer, padding
    targets: Array  # (N, T)
    mask: Array  # (N, T): 1 where the target is a token of the answer, its end included
    answers: list[str]
    stopped: Array  # (N,)

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
    """`count` answers to each prompt (ids); at temperature 1 from the model as it is, with nothing ruled out.

    One of max_new_tokens without an end is scored all the same, as if it had ended there.
    """
    rows = [prompt for prompt in prompts for _ in range(count)]
    stop = {tokenizer.eos_id}
    new = generate(model, rows, max_new_tokens, temperature=temperature, stop=stop, rng=rng,
                   vocab_size=tokenizer.vocab_size)  # fmt: skip
    return answered(tokenizer, rows, new)


def prompt_ids(model: GPT, tokenizer: Tokenizer, prompt: Prompt, max_new_tokens: int) -> Array:
    """The ids (n,) of a prompt. Raises LeftOutError where its answer has no room in the model.

    The last token of an answer is a target, and takes no place.
    """
    ids = instructions.prompt(tokenizer, prompt)
    if len(ids) + max_new_tokens - 1 > model.context:
        raise LeftOutError(f"as longer than {model.context} tokens with --max-new-tokens {max_new_tokens}")
    return ids


def answered(tokenizer: Tokenizer, prompts: Sequence[Array], new: Sequence[Array]) -> Samples:
    """Prompts and their answers (ids, with the end-of-text id where they end) as `Samples`."""
    whole = [np.concatenate(pair) for pair in zip(prompts, new, strict=True)]
    shape = len(whole), max(map(len, whole)) - 1
    ids, targets, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for row, (text, prompt) in enumerate(zip(whole, prompts, strict=True)):
        n = len(text) - 1
        ids[row, :n], targets[row, :n], mask[row, len(prompt) - 1 : n] = text[:-1], text[1:], 1
    stopped = np.array([len(a) > 0 and a[-1] == tokenizer.eos_id for a in new])
    texts = (tokenizer.decode(a[: len(a) - end]) for a, end in zip(new, stopped, strict=True))
    return Samples(ids, targets, mask, list(map(instructions.answer_content, texts)), stopped)


def logprobs(model: GPT, samples: Samples) -> Array:
    """log p of each target (N, T), float64, 0 where the mask is 0."""
    return scored(model, samples, keep=False)[0]


def scored(model: GPT, samples: Samples, keep: bool = True) -> tuple[Array, Array, tuple, tuple]:
    """log p of each target (N, T), float64, 0 where the mask is 0; the logits (places, V) of the places of
    the answers, where the mask is 1, in their order; the caches of the model and of the cross-entropy."""
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


