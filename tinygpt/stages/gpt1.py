"""GPT-1: the norm comes after each sum, not before each branch (Radford et al. 2018, section 4.1).

    x = ln_1(x + attn(x));  x = ln_2(x + mlp(x))     each block
    logits = x wte^T                                 there is no ln_f
"""

from ..core.model import GPT, Array, Pass


class GPT1(GPT):
    """A GPT with the blocks of GPT-1."""

    def block(self, x: Array, layer: int, run: Pass) -> tuple[Array, tuple]:
        h = f"h.{layer}"
        qkv, c1 = self.linear(x, f"{h}.attn.c_attn", run)  # (B, T, 3C)
        y, c2 = self.attend(qkv, layer, run)  # (B, T, C)
        x, c_x = self.pick(x, layer, run)  # (B, T, C)
        y, c_y = self.pick(y, layer, run)  # (B, T, C)
        x, c3 = self.join(x, y, f"{h}.attn.c_proj", run)  # (B, T, C)
        x, c4 = self.norm(x, f"{h}.ln_1")  # (B, T, C)
        f, c5 = self.linear(x, f"{h}.mlp.c_fc", run)  # (B, T, 4C)
        g, c6 = self.ops.gelu_forward(f)  # (B, T, 4C)
        x, c7 = self.join(x, g, f"{h}.mlp.c_proj", run)  # (B, T, C)
        x, c8 = self.norm(x, f"{h}.ln_2")  # (B, T, C)
        return x, (c1, c2, c_x, c_y, c3, c4, c5, c6, c7, c8)

    def block_backward(self, dx: Array, cache: tuple, grads: dict[str, Array]) -> Array:
        c1, c2, c_x, c_y, c3, c4, c5, c6, c7, c8 = cache
        dx = self.norm_backward(dx, c8, grads)  # (B, T, C)
        dg = self.join_backward(dx, c7, grads)  # (B, T, 4C)
        df = self.ops.gelu_backward(dg, c6)  # (B, T, 4C)
        dm = self.linear_backward(df, c5, grads)  # (B, T, C)
        dx, _ = self.ops.residual_forward(dx, dm)  # (B, T, C): the stream's own gradient and the branch's
        dx = self.norm_backward(dx, c4, grads)  # (B, T, C)
        dy = self.join_backward(dx, c3, grads)  # (B, T, C)
        dx, dy = self.pick_backward(dx, c_x), self.pick_backward(dy, c_y)  # (B, T, C) each
        dqkv = self.attend_backward(dy, c2, grads)  # (B, T, 3C)
        da = self.linear_backward(dqkv, c1, grads)  # (B, T, C)
        return self.ops.residual_forward(dx, da)[0]  # (B, T, C)

    def head(self, x: Array) -> tuple[Array, tuple]:
        return self.ops.linear_forward(x, self.params[self.table].T, bfloat16=self.bfloat16)

    def head_backward(self, dlogits: Array, cache: tuple, grads: dict[str, Array]) -> Array:
        dw = grads[self.table].T if self.table in grads else False
        return self.ops.linear_backward(dlogits, cache, dw, False, bfloat16=self.bfloat16)[0]  # (..., C)
