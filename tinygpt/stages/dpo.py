"""DPO: comparisons steer a model without a judge and without samples.

    loss = -log sigmoid(beta (log-ratio of the chosen answer - that of the rejected one))

The log-ratio is log(policy / reference) of a whole answer. Reference: Rafailov et al. 2023, "Direct
Preference Optimization", equation 7.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from ..core.model import GPT
from ..text import instructions
from ..text.data import Array, Tokenizer
from ..text.examples import LeftOutError, Notes
from . import reward
from .rlhf import RLHF, Material, Settings
from .samples import Samples, answered, learn, logprobs
from .stage import Store


def dpo(chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, beta: float):
    """-log sigmoid(beta (log-ratio of the chosen - that of the rejected)), the mean over N pairs, from the
    log-probabilities of whole answers (N,); its gradient by the first two. Rafailov et al. 2023, eq. 7."""
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    d = -beta / (1 + np.exp(margin)) / len(margin)
    return float(np.logaddexp(0, -margin).mean()), d, -d


class Comparisons(NamedTuple):
    """What DPO learns from: N chosen answers, then the N rejected ones; the reference's log p of each."""

    samples: Samples
    ref: Array  # (2 N,)

    @property
    def ids(self) -> Array:
        return self.samples.ids


def compared(tokenizer: Tokenizer, reference: GPT, pairs: Sequence[reward.Comparison]) -> Comparisons:
    """Comparisons as DPO takes them: question, answer and the end-of-text token."""
    prompts = [instructions.prompt(tokenizer, pair.prompt) for pair in pairs]
    texts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    samples = answered(tokenizer, prompts * 2, [_answer_ids(tokenizer, text) for text in texts])
    return Comparisons(samples, logprobs(reference, samples).sum(1))


def _answer_ids(tokenizer: Tokenizer, text: str) -> Array:
    """The ids of an answer, with its end."""
    return np.append(tokenizer.encode(instructions.answer_text(text)), np.int32(tokenizer.eos_id))


def dpo_loss(logp: Array, logits: Array | None, c: Comparisons, beta: float) -> tuple[float, Array]:
    """`dpo` of log-probabilities by token, (2 N, T), and its gradient by them, for `learn`."""
    (chosen, rejected), refs = np.split(logp.sum(1), 2), np.split(c.ref, 2)
    loss, dchosen, drejected = dpo(chosen, rejected, *refs, beta)
    return loss, np.concatenate([dchosen, drejected])[:, None] * c.samples.mask


class DPO(RLHF):
    """DPO from comparisons, of all weights or of an adapter."""

    def prepare(self) -> None:
        self.pairs = self.notes.keep(((c.where, c) for c in self.data.comparisons), self._fitting)
        self.prompts, self.compute = [c.prompt for c in self.pairs], self._compute

    @classmethod
    def read(cls, settings: Settings, store: Store) -> Material:
        notes = Notes()
        comparisons = [c for path in settings.data for c in reward.read_file(path, notes)]
        return Material(store.base(settings), None, [], comparisons, [], notes=notes)

    def _fitting(self, comparison: reward.Comparison) -> reward.Comparison:
        longest = max(len(_answer_ids(self.tokenizer, text)) for text in comparison[1:3])
        if len(instructions.prompt(self.tokenizer, comparison.prompt)) + longest - 1 > self.model.context:
            raise LeftOutError(f"as longer than the {self.model.context} positions of the model")
        return comparison

    def update(self, n: int, rng: np.random.Generator) -> list[Comparisons]:
        indices = rng.integers(len(self.pairs), size=self.settings.batch_size)
        return [compared(self.tokenizer, self.data.reference, [self.pairs[i] for i in indices])]

    def _compute(self, batches: list[Comparisons], rng: np.random.Generator) -> float:
        (c,) = batches
        return learn(self.optimizer, c.samples, partial(dpo_loss, c=c, beta=self.settings.rl.beta))
