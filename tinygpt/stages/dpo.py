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
from ..errors import UserError
from ..text import instructions
from ..text.data import Array, Tokenizer
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
    return np.append(tokenizer.encode(f" {text.strip()}"), np.int32(tokenizer.eos_id))


def dpo_loss(logp: Array, logits: Array | None, c: Comparisons, beta: float) -> tuple[float, Array]:
    """`dpo` of log-probabilities by token, (2 N, T), and its gradient by them, for `learn`."""
    (chosen, rejected), refs = np.split(logp.sum(1), 2), np.split(c.ref, 2)
    loss, dchosen, drejected = dpo(chosen, rejected, *refs, beta)
    return loss, np.concatenate([dchosen, drejected])[:, None] * c.samples.mask


class DPO(RLHF):
    """DPO from comparisons, of all weights or of an adapter."""

    def prepare(self) -> None:
        self.compute = self._compute

    @classmethod
    def read(cls, settings: Settings, store: Store) -> Material:
        comparisons = [c for path in settings.data for c in reward.read_file(path)]
        if not comparisons:
            raise UserError(f"{', '.join(settings.data)}: is empty")
        return Material(store.base(settings), None, [], comparisons, [])

    def longest(self) -> int:
        data, tokenizer = self.data.comparisons, self.tokenizer
        texts = [(c.prompt, _answer_ids(tokenizer, text)) for c in data for text in (c.chosen, c.rejected)]
        return max(len(instructions.prompt(tokenizer, question)) + len(ids) for question, ids in texts)

    def update(self, n: int, rng: np.random.Generator) -> list[Comparisons]:
        pairs = self.data.comparisons
        indices = rng.integers(len(pairs), size=self.settings.batch_size)
        return [compared(self.tokenizer, self.data.reference, [pairs[i] for i in indices])]

    def _compute(self, batches: list[Comparisons], rng: np.random.Generator) -> float:
        (c,) = batches
        return learn(self.optimizer, c.samples, partial(dpo_loss, c=c, beta=self.settings.rl.beta))
