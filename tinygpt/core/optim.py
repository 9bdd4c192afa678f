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

import numpy as np

from . import memory
from .memory import Parameters
from .model import GPT
from .ops import PARTS, Array
from .parallel import ALONE, Alone, slices


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

    Of several processes each updates the slice `own` of the weights, and has the moments of that alone.
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
        group: Alone = ALONE,
    ) -> None:
        """grad_clip: the largest norm of all gradients together that goes into an update; 0 is no limit.
        group: the processes that train the model. Several train all its weights, so names is None."""
        self.model, self.grad_clip, self.weight_decay = model, grad_clip, weight_decay
        self.betas_eps = {"beta1": beta1, "beta2": beta2, "eps": eps}
        self.trained = model.trained
        self.flat, self.grads = self.trained.gradients(names)
        self.group, self.bounds = group, slices(self.flat.size, group.size)
        self.own = slice(*self.bounds[group.rank : group.rank + 2])
        shape = {"": self.flat[self.own].shape}
        self.m, self.v = (memory.flat(shape, self.flat.dtype)[0] for _ in range(2))
        self.steps = 0
        self.spans = _spans(self.trained, self.grads, self.own)

    def step(self, lr: float) -> float:
        """One update with the gradients now in `flat[own]`; returns the norm of all before clipping.

        A norm that is not finite is returned too, and then nothing is updated.
        """
        norm = math.sqrt(self._squares())
        if not math.isfinite(norm):
            return norm
        self.steps += 1
        scale = self.grad_clip / norm if 0 < self.grad_clip < norm else 1.0
        grads = self.flat[self.own]
        for weights, own, decays in self.spans:
            self.model.ops.adamw(
                self.trained.flat[weights], grads[own], self.m[own], self.v[own],
                step=self.steps, lr=lr, weight_decay=self.weight_decay if decays else 0.0, scale=scale,
                **self.betas_eps,
            )  # fmt: skip
        self.group.gather(self.trained.flat, self.bounds)
        return norm

    def _squares(self) -> float:
        """The sum of the squares of all gradients, added up part by part in their order."""
        parts, length = np.zeros(PARTS), max(1, -(-self.flat.size // PARTS))
        own = self.model.ops.squares(self.flat[self.own], length)
        parts[self.own.start // length :][: own.size] = own
        return float(np.cumsum(self.group.merged(parts))[-1])  # np.sum adds in another order

    def whole(self, moment: Array) -> Array:
        """A moment, `m` or `v`, of all weights. Of several processes all call it; it then lies in `flat`."""
        if self.group.size == 1:
            return moment
        self.flat[self.own] = moment
        self.group.gather(self.flat, self.bounds)
        return self.flat


def _spans(all_: Parameters, trained: Iterable[str], own: slice) -> list[tuple[slice, slice, bool]]:
    """(stretch of all_.flat, the same in the slice `own` of the gradients, whether it decays), as few as
    there can be."""
    spans, offset, end = [], 0, 0
    for name, p in all_.params.items():
        if name in trained:
            begin, stop = max(end, own.start), min(end + p.size, own.stop)
            if begin < stop:
                weights = slice(begin - end + offset, stop - end + offset)
                grads, decays = slice(begin - own.start, stop - own.start), p.ndim > 1
                if spans and spans[-1][0].stop == weights.start and spans[-1][2] == decays:
                    before = spans.pop()
                    weights, grads = slice(before[0].start, weights.stop), slice(before[1].start, grads.stop)
                spans.append((weights, grads, decays))
            end += p.size
        offset += p.size
    return spans
