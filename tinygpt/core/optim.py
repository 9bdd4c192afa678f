"""AdamW, gradient clipping, and the learning rate from step to step.

Weights, gradients and the two moments are flat buffers, so that an update of the whole model is one call
where all of it is trained, and one call for each unbroken stretch of trained weights where some are frozen.
Clipping has no pass of its own: its factor goes into the update. Matrices decay, embeddings included; vectors
do not.

Not here: other optimizers, a learning rate for each group of weights.

References: Loshchilov and Hutter 2019 (AdamW), 2017, section 3 (cosine); Pascanu et al. 2013, section 3.2
(clipping).
"""

import math
from collections.abc import Iterable

from . import memory
from .memory import Parameters
from .model import GPT


def learning_rate(step: int, *, peak: float, lowest: float, warmup_iters: int, max_iters: int) -> float:
    """The rate of update `step`, counted from 0: a line up to `peak`, then half a cosine down to `lowest`.

    nanoGPT's formula. The line starts above 0, and the cosine would reach `lowest` at step max_iters.
    """
    if step < warmup_iters:
        return peak * (step + 1) / (warmup_iters + 1)
    if step >= max_iters:
        return lowest
    progress = (step - warmup_iters) / (max_iters - warmup_iters)
    return lowest + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - lowest)


class AdamW:
    """The gradients of a model's parameters `names` (all if None), their two moments, and the updates.

    Of a model with an adapter, these are the adapter's; the model's own stay as they are.

    `grads` (name -> array) is for `model.loss` to fill; `flat`, `m` and `v` are the buffers, `steps` the
    number of updates made. These, with the weights, are all that changes in training: a checkpoint holds
    nothing else.
    """

    def __init__(
        self,
        model: GPT,
        names: Iterable[str] | None = None,
        *,
        beta1: float = 0.9,
        beta2: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        grad_clip: float = 1.0,
    ) -> None:
        """grad_clip: the largest norm of all gradients together that goes into an update; 0 is no limit."""
        self.model, self.grad_clip, self.weight_decay = model, grad_clip, weight_decay
        self.betas_eps = {"beta1": beta1, "beta2": beta2, "eps": eps}
        self.trained = model.trained
        self.flat, self.grads = self.trained.gradients(names)
        self.m, self.v = (memory.flat({"": self.flat.shape}, self.flat.dtype)[0] for _ in range(2))
        self.steps = 0
        self.spans = _spans(self.trained, self.grads)

    def step(self, lr: float) -> float:
        """One update with the gradients now in `flat`; returns their norm before clipping.

        A norm that is not finite is returned too, and then nothing is updated.
        """
        norm = math.sqrt(self.model.ops.sum_of_squares(self.flat))
        if not math.isfinite(norm):
            return norm
        self.steps += 1
        scale = self.grad_clip / norm if 0 < self.grad_clip < norm else 1.0
        for weights, trained, decays in self.spans:
            self.model.ops.adamw(
                self.trained.flat[weights], self.flat[trained], self.m[trained], self.v[trained],
                step=self.steps, lr=lr, weight_decay=self.weight_decay if decays else 0.0, scale=scale,
                **self.betas_eps,
            )  # fmt: skip
        return norm


def _spans(all_: Parameters, trained: Iterable[str]) -> list[tuple[slice, slice, bool]]:
    """(stretch of all_.flat, the same in the gradients, whether it decays), as few as there can be."""
    spans, offset, end = [], 0, 0
    for name, p in all_.params.items():
        if name in trained:
            weights, grads, decays = slice(offset, offset + p.size), slice(end, end + p.size), p.ndim > 1
            if spans and spans[-1][0].stop == offset and spans[-1][2] == decays:
                before = spans.pop()
                weights, grads = slice(before[0].start, weights.stop), slice(before[1].start, grads.stop)
            spans.append((weights, grads, decays))
            end += p.size
        offset += p.size
    return spans
