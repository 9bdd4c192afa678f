"""LoRA: a low-rank branch beside a linear map that stays as it is (Hu et al. 2021, section 4.1).

    y = x w + b + s (drop(x) A) B          s = alpha / rank

A is (I, R), B is (R, O); lora_A is stored transposed, as in PEFT. With `full` the adapter also has copies of
all parameters without a branch, and the copies are trained (ReLoRA; Lialin et al. 2023).
"""

import math

import numpy as np

from ..core.model import GPT, Array, Pass
from ..core.optim import AdamW
from .adapter import Adapted


class LoRA(Adapted):
    """A GPT with low-rank branches at the linear maps that its adapter names."""

    @property
    def draws(self) -> int:
        branches = sum(name.endswith(".lora_A") for name in self.adapter.params)
        return super().draws + branches * (self.adapter.config.dropout > 0)

    def initialise(self, rng: np.random.Generator) -> None:
        """A is uniform in +-1 / sqrt(inputs) (PEFT's Kaiming initialisation) and B is zero: the model
        computes the same as the base. With `full`, copies of tensors without a branch begin as in the base.
        """
        for name, p in self.adapter.params.items():
            if name.endswith(".lora_A"):
                p[:] = rng.uniform(-1, 1, p.shape) / math.sqrt(p.shape[1])
            else:
                p[:] = self.base.params.get(name, 0)

    def linear(self, x: Array, name: str, run: Pass, add: Array | None = None) -> tuple[Array, tuple]:
        """Computes the branch first. Then x w is added to the branch: a large product hides the time of
        reading the branch."""
        if f"{name}.lora_A" not in self.adapter.params:
            return super().linear(x, name, run, add)
        config, (a, b) = self.adapter.config, (self.adapter.params[f"{name}.lora_{side}"] for side in "AB")
        s = config.alpha / config.rank
        dropped, c_drop = self.dropout(x, config.dropout, run)  # (B, T, I)
        scaled = a if s == 1 else a * a.dtype.type(s)  # of all factors A is the smallest
        low, c_a = self.ops.linear_forward(dropped, scaled.T)  # (B, T, R), in float32: a branch is small
        y, c_b = self.ops.linear_forward(low, b, self.params[f"{name}.bias"], add)  # (B, T, O)
        w = self.params[f"{name}.weight"]  # (I, O)
        out, c = self.ops.linear_forward(x, w, None, y, self.bfloat16)  # (B, T, O)
        return out, (name, c, (s, c_drop, c_a, c_b))

    def linear_backward(
        self, dout: Array, cache: tuple, grads: dict[str, Array], add: Array | None = None
    ) -> Array:
        if len(cache) == 2:  # a map without a branch
            return super().linear_backward(dout, cache, grads, add)
        name, c, (s, c_drop, c_a, c_b) = cache
        grad_a, grad_b = grads.get(f"{name}.lora_A", False), grads.get(f"{name}.lora_B", False)
        dlow, _, _ = self.ops.linear_backward(dout, c_b, dw=grad_b, db=False)  # (B, T, R)
        da = grad_a if grad_a is False else grad_a.T  # (I, R)
        dx, _, _ = self.ops.linear_backward(dlow, c_a, dw=da, db=False)  # (B, T, I)
        if s != 1 and grad_a is not False:
            grad_a *= grad_a.dtype.type(s)
        dx = self.dropout_backward(dx, c_drop)  # (B, T, I)
        if add is not None:
            dx, _ = self.ops.residual_forward(dx, add)  # (B, T, I)
        return super().linear_backward(dout, (name, c), grads, add=dx)

    def merge(self) -> GPT:
        """A new model with w + s A B in place of w, without branches; nothing else changes."""
        merged, s = self.base.copy(), self.adapter.config.alpha / self.adapter.config.rank
        for name, p in self.adapter.params.items():
            if name.endswith(".lora_A"):
                w, b = merged.params[name.replace("lora_A", "weight")], self.adapter.params[name[:-1] + "B"]
                w[:] = merged.ops.linear_forward((p * p.dtype.type(s)).T, b, add=w)[0]
            elif name in merged.params:
                merged.params[name][:] = p
        return merged


def restart(optimizer: AdamW, rng: np.random.Generator) -> None:
    """ReLoRA's step from one low-rank update to the next: a merged base, new A and B with moments of zero."""
    model, end = optimizer.model, 0
    model.base = model.merge()
    model.flat, params, part = model.base.flat, model.adapter.params, optimizer.slice
    model.params = model.base.params | {name: p for name, p in params.items() if name in model.base.params}
    model.initialise(rng)
    for name, grad in optimizer.grads.items():
        begin, end = end, end + grad.size
        if ".lora_" in name:
            moments = slice(*np.clip([begin, end], part.start, part.stop) - part.start)
            optimizer.m[moments] = optimizer.v[moments] = 0
