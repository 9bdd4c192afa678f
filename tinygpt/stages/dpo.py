"""DPO: comparisons steer a model without a judge and without samples.

    loss = -log sigmoid(beta (log-ratio of the chosen answer - log-ratio of the rejected answer))

The log-ratio is log(policy / reference) of a whole answer. Reference: Rafailov et al. 2023, "Direct
Preference Optimization", equation 7.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from ..core.model import GPT
from ..core.optim import AdamW
from ..text import instructions
from ..text.data import Array, Tokenizer, shuffled_places
from ..text.examples import LeftOutError
from .reward import Comparison, bradley_terry
from .samples import Samples, answered, learn, logprobs


def dpo(chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, beta: float):
    """-log sigmoid(beta (log-ratio of the chosen - that of the rejected)), the mean over N pairs.

    This is the loss of a reward model whose score is beta times the log-ratio.
    The arguments are log-probabilities of whole answers (N,). Returns the loss and its gradients by the first
    two. Rafailov et al. 2023, equation 7.
    """
    loss, d, _ = bradley_terry(beta * (chosen - ref_chosen), beta * (rejected - ref_rejected))
    return loss, beta * d, -beta * d


Pair = tuple[Array, Array, Array]  # the ids of a prompt, of the chosen and of the rejected answer


def encode(model: GPT, tokenizer: Tokenizer, comparison: Comparison) -> Pair:
    """The ids of a comparison. Both answers end with the end-of-text id. Raises LeftOutError for a comparison
    that is longer than the model's context."""
    texts = map(instructions.answer_text, (comparison.chosen, comparison.rejected))
    chosen, rejected = (np.append(tokenizer.encode(text), np.int32(tokenizer.eos_id)) for text in texts)
    prompt = instructions.prompt(tokenizer, comparison.prompt)
    if len(prompt) + max(len(chosen), len(rejected)) - 1 > model.context:
        raise LeftOutError(f"as longer than the {model.context} positions of the model")
    return prompt, chosen, rejected


def samples_of(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> Samples:
    """The N chosen answers, then the N rejected answers."""
    prompts, chosen, rejected = zip(*pairs, strict=True)
    return answered(tokenizer, prompts * 2, chosen + rejected)


def dpo_loss(logp: Array, logits: Array | None, pairs: Samples, beta: float) -> tuple[float, Array]:
    """`dpo` of log-probabilities by token, (2 N, T), and its gradient by them, for `learn`."""
    loss, *d = dpo(*logp.sum(1).reshape(2, -1), *pairs.ref, beta)
    return loss, np.concatenate(d)[:, None] * pairs.mask


def learning(
    optimizer: AdamW, reference: GPT, tokenizer: Tokenizer, pairs: Sequence[Pair], beta: float, size: int,
    seed: int,
) -> tuple[Callable, Callable]:  # fmt: skip
    """`batches` and `compute` of `train.train`, for updates from `size` pairs each.

    All pairs have their turn once in each pass. The reference scores each pair once, always beside the
    same pairs: so a resumed run has the same bytes.
    """
    ref, size = np.full((2, len(pairs)), np.nan), min(size, len(pairs))  # log p of the reference

    def samples(places: Array) -> Samples:
        return samples_of(tokenizer, [pairs[place] for place in places])

    def batches(n: int, rng: np.random.Generator) -> list[Samples]:
        places = shuffled_places(len(pairs), size, n, seed)
        for group in np.unique(places[np.isnan(ref[0, places])] // size):
            some = np.arange(group * size, min((group + 1) * size, len(pairs)))
            ref[:, some] = logprobs(reference, samples(some)).sum(1).reshape(2, -1)
        return [samples(places)._replace(ref=ref[:, places])]

    def compute(batches: list[Samples], rng: np.random.Generator) -> float:
        return learn(optimizer, batches[0], partial(dpo_loss, pairs=batches[0], beta=beta))

    return batches, compute
