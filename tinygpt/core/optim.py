"""AdamW, gradient clipping, and the learning rate of each step.

Weights, gradients and the two moments are flat buffers. An update of the whole model is two calls: one for
the matrices, which decay, and one for the vectors, which do not. Embeddings are matrices. Where some weights
are frozen, each unbroken stretch of trained weights is one call. Gradient clipping needs no pass over the
weights: the update multiplies the gradients by its factor.

Not here: other optimizers, a learning rate for each group of weights.

References: Loshchilov and Hutter 2019 (AdamW), 2017, section 3 (cosine); Pascanu et al. 2013, section 3.2
(clipping).
"""

import math
from collections.abc import Collection

import numpy as np

from ..errors import UserError
from . import memory
from .memory import Parameters
from .model import GPT
from .ops import Array
from .parallel import ALONE, PARTS, Group, slices


def learning_rate(step: int, *, peak: float, lowest: float, warmup_iters: int, max_iters: int) -> float:
    """The rate of update `step`, counted from 0: a line up to `peak`, then half a cosine down to `lowest`.

    nanoGPT's formula. The line starts above 0. The cosine reaches `lowest` one step after the last update.
    """
    if step < warmup_iters:
        return peak * (step + 1) / (warmup_iters + 1)
    if step >= max_iters:
        return lowest
    progress = (step - warmup_iters) / (max_iters - warmup_iters)
    return lowest + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - lowest)


class AdamW:
    """The gradients of the parameters `names` of a model (None: all), their two moments, and the updates.

    For a model with an adapter the parameters are those of the adapter; the model's own stay as they are.

    `flat` has the gradients, and `grads` (name -> array) has its views, which `model.loss` fills. `m` and `v`
    are the moments, `steps` is the number of updates. Training changes these and the weights, nothing else.

    A process of a group updates the slice `slice` of the weights, and has the moments of this slice only.
    """

    def __init__(
        self, model: GPT, names: Collection[str] | None = None, *, beta1: float = 0.9, beta2: float = 0.99,
        eps: float = 1e-8, weight_decay: float = 0.1, grad_clip: float = 1.0, group: Group = ALONE,
    ) -> None:  # fmt: skip
        """grad_clip: the largest norm of all gradients together, to which an update scales them; 0: no limit.
        group: the processes that train the model. With several processes names must be None."""
        if group.size > 1 and names is not None:
            raise UserError("several processes train all parameters: names must be None")
        self.model, self.grad_clip, self.weight_decay = model, grad_clip, weight_decay
        self.betas_eps = {"beta1": beta1, "beta2": beta2, "eps": eps}
        self.trained = model.trained
        self.flat, self.grads = self.trained.gradients(names)
        self.group, self.bounds = group, slices(self.flat.size, group.size)
        self.slice = slice(*self.bounds[group.rank : group.rank + 2])
        shape = {"": self.flat[self.slice].shape}
        self.m, self.v = (memory.flat(shape, self.flat.dtype)[0] for _ in range(2))
        self.steps = 0
        self.spans = _spans(self.trained, self.grads, self.slice)

    def step(self, lr: float) -> float:
        """One update with the gradients in `flat[slice]`. Returns the norm of all gradients before clipping.

        If the norm is not finite, nothing is updated.
        """
        norm = math.sqrt(self._squares())
        if not math.isfinite(norm):
            return norm
        self.steps += 1
        scale = self.grad_clip / norm if 0 < self.grad_clip < norm else 1.0
        grads = self.flat[self.slice]
        for weights, moments, decays in self.spans:
            self.model.ops.adamw(
                self.trained.flat[weights], grads[moments], self.m[moments], self.v[moments],
                step=self.steps, lr=lr, weight_decay=self.weight_decay if decays else 0.0, scale=scale,
                **self.betas_eps,
            )  # fmt: skip
        self.group.gather(self.trained.flat, self.bounds)
        return norm

    def _squares(self) -> float:
        """The sum of the squares of all gradients: one sum for each of the PARTS, added up in order."""
        parts, length = np.zeros(PARTS), max(1, -(-self.flat.size // PARTS))
        sums = self.model.ops.squares(self.flat[self.slice], length)
        parts[self.slice.start // length :][: sums.size] = sums
        return float(np.cumsum(self.group.combine(parts))[-1])  # np.sum adds in another order

    def whole(self, moment: Array) -> Array:
        """The moment `m` or `v` of all trained weights. All processes of a group must call `whole` together.

        With several processes the result is the buffer `self.flat`. The call overwrites the gradients there,
        and the next call overwrites the result.
        """
        if self.group.size == 1:
            return moment
        self.flat[self.slice] = moment
        self.group.gather(self.flat, self.bounds)
        return self.flat


def _spans(model: Parameters, names: Collection[str], part: slice) -> list[tuple[slice, slice, bool]]:
    """The calls of an update: (slice of model.flat, the same weights in the moments, whether they decay).

    A call is an unbroken stretch of trained weights that lies in `part`, a slice of the gradients.
    """
    stretches, weight, grad = [], 0, 0  # a weight and its gradient, as indices of the two buffers
    for name, p in model.params.items():
        if name in names:
            kind = weight - grad, p.ndim > 1
            begin = stretches.pop()[1] if stretches and stretches[-1][0] == kind else grad
            grad += p.size
            stretches.append((kind, begin, grad))
        weight += p.size
    spans = []
    for (ahead, decays), begin, end in stretches:
        begin, end = max(begin, part.start), min(end, part.stop)
        if begin < end:
            weights, moments = slice(begin + ahead, end + ahead), slice(begin - part.start, end - part.start)
            spans.append((weights, moments, decays))
    return spans
