"""DPO: comparisons steer a model without a judge and without samples.

    loss = -log sigmoid(beta (log-ratio of the chosen answer - log-ratio of the rejected answer))

The log-ratio is log(policy / reference) of a whole answer. Reference: Rafailov et al. 2023, "Direct
Preference Optimization", equation 7.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from ..text import instructions
from ..text.data import Array, Tokenizer, shuffled_places
from ..text.examples import LeftOutError, Notes
from . import reward
from .rlhf import RLHF, Material, Settings
from .samples import Samples, answered, learn, logprobs
from .stage import Store


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


def encode(tokenizer: Tokenizer, comparison: reward.Comparison) -> Pair:
    texts = map(instructions.answer_text, (comparison.chosen, comparison.rejected))
    answers = (np.append(tokenizer.encode(text), np.int32(tokenizer.eos_id)) for text in texts)
    return Pair(instructions.prompt(tokenizer, comparison.prompt), *answers)


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


class DPO(RLHF):
    """DPO from comparisons, of all weights or of an adapter."""

    def _prepare(self, settings: Settings, data: Material) -> None:
        def encoded(comparison: reward.Comparison) -> tuple:
            pair = encode(self.tokenizer, comparison)
            if len(pair.prompt) + max(map(len, pair[1:])) - 1 > self.model.context:
                raise LeftOutError(f"as longer than the {self.model.context} positions of the model")
            return comparison.prompt, pair

        kept = self.notes.keep(((c.where, c) for c in data.comparisons), encoded)
        self.prompts, self.pairs = zip(*kept, strict=True)
        self.ref = np.full((2, len(self.pairs)), np.nan)  # the reference scores each pair once, see `update`
        self.compute = self._compute

    @classmethod
    def read(cls, settings: Settings, store: Store) -> Material:
        notes = Notes()
        comparisons = [c for path in settings.data for c in reward.read_file(path, notes)]
        return Material(store.base(settings), None, [], comparisons, [], notes=notes)

    def update(self, n: int, rng: np.random.Generator) -> list[Batch]:
        """The pairs whose turn is in update n. The reference scores those that are new to it."""
        size = min(self.settings.batch_size, len(self.pairs))
        places = shuffled_places(len(self.pairs), size, n, self.settings.train.seed)
        if len(new := np.unique(places[np.isnan(self.ref[0, places])])):
            self.ref[:, new] = logprobs(self.data.reference, self._samples(new)).sum(1).reshape(2, -1)
        return [Batch(self._samples(places), self.ref[:, places])]

    def _samples(self, places: Array) -> Samples:
        return samples_of(self.tokenizer, [self.pairs[place] for place in places])

    def _compute(self, batches: list[Batch], rng: np.random.Generator) -> float:
        (batch,) = batches
        objective = partial(dpo_loss, batch=batch, beta=self.settings.rl.beta)
        return learn(self.optimizer, batch.samples, objective)
