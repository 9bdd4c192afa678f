"""DPO: comparisons steer a model without a judge and without samples.

    loss = -log sigmoid(beta (log-ratio of the chosen answer - log-ratio of the rejected answer))

The log-ratio is log(policy / reference) of a whole answer. Reference: Rafailov et al. 2023, "Direct
Preference Optimization", equation 7.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from ..core.model import GPT
from ..core.optim import AdamW
from ..text import instructions
from ..text.data import Array, Tokenizer, shuffled_places
from ..text.examples import LeftOutError
from .reward import Comparison
from .samples import Samples, answered, learn, logprobs


def dpo(chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, beta: float):
    """-log sigmoid(beta (log-ratio of the chosen - that of the rejected)), the mean over N pairs.

    The arguments are log-probabilities of whole answers (N,). Returns the loss and its gradients by the first
    two. Rafailov et al. 2023, equation 7.
    """
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    d = -beta / (1 + np.exp(margin)) / len(margin)
    return float(np.logaddexp(0, -margin).mean()), d, -d


class Pair(NamedTuple):
    """The ids of a comparison. Both answers end with the end-of-text id."""

    prompt: Array
    chosen: Array
    rejected: Array


def encode(model: GPT, tokenizer: Tokenizer, comparison: Comparison) -> Pair:
    """Raises LeftOutError for a comparison that is longer than the model's context."""
    texts = map(instructions.answer_text, (comparison.chosen, comparison.rejected))
    answers = (np.append(tokenizer.encode(text), np.int32(tokenizer.eos_id)) for text in texts)
    pair = Pair(instructions.prompt(tokenizer, comparison.prompt), *answers)
    if len(pair.prompt) + max(map(len, pair[1:])) - 1 > model.context:
        raise LeftOutError(f"as longer than the {model.context} positions of the model")
    return pair


def samples_of(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> Samples:
    """The N chosen answers, then the N rejected answers."""
    prompts, chosen, rejected = zip(*pairs, strict=True)
    return answered(tokenizer, prompts * 2, chosen + rejected)


class Batch(NamedTuple):
    """The answers of N pairs as `samples_of` has them, and the reference's log p of each answer."""

    samples: Samples
    ref: Array  # (2, N): chosen, rejected

    @property
    def ids(self) -> Array:
        return self.samples.ids


def dpo_loss(logp: Array, logits: Array | None, batch: Batch, beta: float) -> tuple[float, Array]:
    """`dpo` of log-probabilities by token, (2 N, T), and its gradient by them, for `learn`."""
    loss, *d = dpo(*logp.sum(1).reshape(2, -1), *batch.ref, beta)
    return loss, np.concatenate(d)[:, None] * batch.samples.mask


class Learner:
    """Makes updates from comparisons: `update` and `compute` are for `train.train`."""

    def __init__(
        self, optimizer: AdamW, reference: GPT, tokenizer: Tokenizer, pairs: Sequence[Pair], beta: float,
        batch_size: int, seed: int,
    ) -> None:  # fmt: skip
        self.optimizer, self.reference, self.tokenizer, self.pairs = optimizer, reference, tokenizer, pairs
        self.beta, self.batch_size, self.seed = beta, min(batch_size, len(pairs)), seed
        self.ref = np.full((2, len(pairs)), np.nan)  # the reference scores each pair once, see `update`

    def update(self, n: int, rng: np.random.Generator) -> list[Batch]:
        """The pairs whose turn is in update n. The reference scores those that have no score yet."""
        places = shuffled_places(len(self.pairs), self.batch_size, n, self.seed)
        if len(new := np.unique(places[np.isnan(self.ref[0, places])])):
            self.ref[:, new] = logprobs(self.reference, self._samples(new)).sum(1).reshape(2, -1)
        return [Batch(self._samples(places), self.ref[:, places])]

    def _samples(self, places: Array) -> Samples:
        return samples_of(self.tokenizer, [self.pairs[place] for place in places])

    def compute(self, batches: list[Batch], rng: np.random.Generator) -> float:
        (batch,) = batches
        return learn(self.optimizer, batch.samples, partial(dpo_loss, batch=batch, beta=self.beta))
