"""GPT-2: parameters, forward and backward.

    x = wte[ids] + wpe[positions]
    x = x + attn(ln_1(x));  x = x + mlp(ln_2(x))     each block (Radford et al. 2019, section 2.3)
    logits = ln_f(x) wte^T                           the token table again

Each part of the model is a pair of methods, a forward and below it the backward, with the same lines in
reverse order. A forward returns its result and a cache. A backward takes the gradient of the result, the
cache and `grads`, and returns the gradient of the input.

    B batch    T time    C channels, n_embd    V vocabulary

`grads` (name -> array) receives the gradients of the parameters. A name that is not in `grads` is frozen: its
gradient is not computed.

Variants are views of a model that replace some of its parts. They are in `stages`: GPT-1 (`gpt1`), a score in
place of logits (`score`), LoRA (`lora`) and learned prompts (`prompts`). Not here: loss functions other than
next-token prediction, the optimizer, data, generation.
"""

from __future__ import annotations

import copy
import math
import warnings
from types import ModuleType
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from ..errors import UserError
from . import kernels, memory
from .config import DTYPES, GPTConfig

Array = np.ndarray
Grads = dict[str, Array]


class Pass(NamedTuple):
    """The arguments of one forward that its blocks read."""

    start: Array | None = None  # (B, T): the first key that each query sees, see ops.visible_keys
    past: object | None = None  # a generate.KVCache
    rng: Generator | None = None  # draws dropout; None: no dropout
    places: Array | None = None  # (N,): the places of the text whose logits are computed; None: all


class GPT(memory.Parameters):
    """A model: its `config`, its `params` (name -> view of the buffer `flat`) and its backend `ops`.

    `rng` draws the initial weights. Without `rng` they are zero, and a checkpoint fills them. dtype is
    float32 or float64.
    """

    prefix = 0  # keys before those of the text; every query sees them
    table = "wte.weight"  # the matrix (outputs, C) of the head
    bfloat16 = False  # whether linear maps round their operands, see ops.linear_forward

    def __init__(
        self, config: GPTConfig, rng: Generator | None = None, dtype: type = np.float32,
        ops: ModuleType | None = None,
    ) -> None:  # fmt: skip
        if type(self) is GPT and (config.post_norm or config.num_labels):
            raise UserError("this configuration is not GPT-2's: variants.build makes a model of any kind")
        self.config = config
        self.ops = ops or kernels.backend()
        super().__init__(config.shapes(), dtype)
        if rng is not None:
            self._initialise(rng)

    def _initialise(self, rng: Generator) -> None:
        """GPT-2's distribution: matrices are normal, biases 0, gains 1 (Radford et al. 2019, section 2.3).

        The two projections of a block into the residual stream are divided by sqrt(2 n_layer). The variance
        of the stream then does not grow with the depth. GPT-2's standard deviation 0.02 is for 768 channels.
        Here it is proportional to 1/sqrt(n_embd): the product of a matrix and a normalised x then has the
        same variance for any width.
        """
        base = 0.02 * math.sqrt(768 / self.config.n_embd)
        for name, p in self.params.items():
            if p.ndim == 2:
                std = base / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else base
                p[:] = rng.standard_normal(p.shape, np.float32) * np.float32(std)
            else:
                p[:] = ".ln_" in f".{name}" and name.endswith("weight")

    def copy(self) -> GPT:
        """A model with the same weights in other memory."""
        other = copy.copy(self)
        other.flat, other.params = memory.flat(self.config.shapes(), self.flat.dtype)
        other.flat[:] = self.flat
        return other

    def compute_in(self, dtype: str) -> None:
        """Sets the type of the operands of linear maps: "float32", or "bfloat16", to which they are rounded.

        Weights, gradients and sums stay float32 (Micikevicius et al. 2018, section 3; Kalamkar et al. 2019).
        Raises UserError for another type. Warns if the processor does not multiply bfloat16.
        """
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype!r}: it must be {' or '.join(DTYPES)}")
        self.bfloat16 = dtype == "bfloat16"
        if self.bfloat16 and not kernels.has_bfloat16():
            warnings.warn("this processor has no products in bfloat16: float32 is faster", stacklevel=2)

    @property
    def trained(self) -> memory.Parameters:
        """The parameters that training changes: the model's own, or those of an adapter."""
        return self

    @property
    def draws(self) -> int:
        """How many numbers of 64 bits a forward draws from `rng`: one for each dropout."""
        return (1 + 2 * self.config.n_layer) * (self.config.dropout > 0)

    @property
    def context(self) -> int:
        """The longest text, in tokens."""
        return self.config.block_size - self.prefix

    # --- the whole model ------------------------------------------------------------------------------------

    def forward(
        self, ids: Array, *, positions: Array | None = None, start: Array | None = None,
        past: object | None = None, rng: Generator | None = None, places: Array | None = None,
        keep: bool = True,
    ) -> tuple[Array, tuple]:  # fmt: skip
        """ids (B, T) -> logits (B, T, V), and the cache for `backward`.

        - positions (T,) or (B, T): the position of each token, row `prefix` + position of wpe; None: those
          after `past`
        - start (B, T): the first key that each query sees, see `ops.visible_keys`; None: key 0
        - past: a `generate.KVCache` with the keys and values before `ids`; the forward appends its own
        - rng: draws dropout; None: no dropout
        - places (N,), int32: the result is the logits (N, V) of these places of `ids.ravel()`; after the last
          attention no other place is computed
        - keep=False: the cache is empty, which saves its memory

        Raises UserError for a sequence longer than `context`, IndexError for an id outside the vocabulary,
        and ValueError for a filled `past` without keep=False.
        """
        if keep and past is not None and past.length:
            raise ValueError("forward: a text after `past` has no backward: call with keep=False")
        run, caches = Pass(start, past, rng, places), []
        x, c_embed = self.embed(ids, self._positions(ids, positions, past), run)  # (B, T, C)
        x, c_drop = self.dropout(x, self.config.dropout, run)  # (B, T, C)
        for layer in range(self.config.n_layer):
            x, cache = self.block(x, layer, run)  # (B, T, C)
            caches.append(cache if keep else None)
        if places is None:
            x = np.ascontiguousarray(x[:, -ids.shape[1] :])  # (B, T, C): without the rows of a learned prompt
        logits, c_head = self.head(x)  # (B, T, V), or (N, V)
        return logits, (c_embed, c_drop, caches, c_head) if keep else ()

    def backward(self, dlogits: Array, cache: tuple, grads: Grads) -> None:
        """Writes the gradients of a loss into `grads` (name -> array, see `gradients`).

        dlogits (B, T, V), or (N, V) with `places`: the gradient of the loss with respect to the logits.
        Blocks below the lowest name in `grads` are not computed.
        """
        c_embed, c_drop, caches, c_head = cache
        lowest = min(map(self.depth, grads), default=self.config.n_layer)
        dx = self.head_backward(dlogits, c_head, grads)  # (B, T, C)
        for layer in reversed(range(max(lowest, 0), self.config.n_layer)):
            dx = self.block_backward(dx, caches[layer], grads)  # (B, T, C)
        if lowest < 0:
            dx = self.dropout_backward(dx, c_drop)  # (B, T, C)
            self.embed_backward(dx, c_embed, grads)

    def depth(self, name: str) -> int:
        """The number of a parameter's block; -1 for the embeddings, n_layer for the head."""
        first, *rest = name.split(".")
        return int(rest[0]) if first == "h" else self.config.n_layer if first in ("ln_f", "score") else -1

    def _positions(self, ids: Array, positions: Array | None, past) -> Array:
        """The position of each token, (B, T). Raises UserError if the model has fewer positions."""
        if positions is None:
            first = 0 if past is None else max(0, past.length - self.prefix)
            positions = np.arange(first, first + ids.shape[1], dtype=np.int32)
        if positions.size and positions.max() >= self.context:
            limit = f"block_size, {self.config.block_size}" + f", less {self.prefix} rows" * bool(self.prefix)
            raise UserError(f"a sequence of {positions.max() + 1} tokens is longer than {limit}")
        return np.broadcast_to(positions, ids.shape)

    # --- its parts ------------------------------------------------------------------------------------------

    def embed(self, ids: Array, positions: Array, run: Pass) -> tuple[Array, tuple]:
        """ids and positions (B, T) -> x (B, T, C), the sum of a row of wte and a row of wpe."""
        tok, c_tok = self.ops.embedding_forward(ids, self.params["wte.weight"])  # (B, T, C)
        wpe = self.params["wpe.weight"][self.prefix :]
        pos, c_pos = self.ops.embedding_forward(positions, wpe)  # (B, T, C)
        x, _ = self.ops.residual_forward(tok, pos)  # (B, T, C)
        return x, (c_tok, c_pos)

    def embed_backward(self, dx: Array, cache: tuple, grads: Grads) -> None:
        c_tok, c_pos = cache
        tied = self.table == "wte.weight"  # the head uses the table too, and has written its part
        self.ops.embedding_backward(dx, c_pos, grads.get("wpe.weight", False))
        self.ops.embedding_backward(dx, c_tok, grads.get("wte.weight", False), add=tied)

    def block(self, x: Array, layer: int, run: Pass) -> tuple[Array, tuple]:
        """x (B, T, C) -> x (B, T, C): attention, then the MLP. Each is a branch whose result joins x.

        With `run.places` the result of the last block is (N, C).
        """
        h = f"h.{layer}"
        a, c1 = self.norm(x, f"{h}.ln_1")  # (B, T, C)
        qkv, c2 = self.linear(a, f"{h}.attn.c_attn", run)  # (B, T, 3C)
        y, c3 = self.attend(qkv, layer, run)  # (B, T, C)
        x, c_x = self.pick(x, layer, run)  # (B, T, C); in the last block (N, C), and so are all below
        y, c_y = self.pick(y, layer, run)  # (B, T, C)
        x, c4 = self.join(x, y, f"{h}.attn.c_proj", run)  # (B, T, C)
        m, c5 = self.norm(x, f"{h}.ln_2")  # (B, T, C)
        f, c6 = self.linear(m, f"{h}.mlp.c_fc", run)  # (B, T, 4C)
        g, c7 = self.ops.gelu_forward(f)  # (B, T, 4C)
        x, c8 = self.join(x, g, f"{h}.mlp.c_proj", run)  # (B, T, C)
        return x, (c1, c2, c3, c_x, c_y, c4, c5, c6, c7, c8)

    def block_backward(self, dx: Array, cache: tuple, grads: Grads) -> Array:
        c1, c2, c3, c_x, c_y, c4, c5, c6, c7, c8 = cache
        d = self.join_backward(dx, c8, grads)  # (B, T, 4C)
        d = self.ops.gelu_backward(d, c7)  # (B, T, 4C)
        d = self.linear_backward(d, c6, grads)  # (B, T, C)
        dx = self.norm_backward(d, c5, grads, add=dx)  # (B, T, C), plus the stream's own gradient
        d = self.join_backward(dx, c4, grads)  # (B, T, C)
        dx, d = self.pick_backward(dx, c_x), self.pick_backward(d, c_y)  # (B, T, C) each
        d = self.attend_backward(d, c3, grads)  # (B, T, 3C)
        d = self.linear_backward(d, c2, grads)  # (B, T, C)
        return self.norm_backward(d, c1, grads, add=dx)  # (B, T, C)

    def pick(self, x: Array, layer: int, run: Pass) -> tuple[Array, tuple | None]:
        """x (B, T, C) -> in the last block, its rows (N, C) at `run.places`; in other blocks x itself.

        After the attention of the last block no row depends on another, so the other rows are not needed.
        """
        if run.places is None or layer < self.config.n_layer - 1:
            return x, None
        rows, cache = self.ops.embedding_forward(run.places, x.reshape(-1, x.shape[-1]))  # (N, C)
        return rows, (cache, x.shape)

    def pick_backward(self, drows: Array, cache: tuple | None) -> Array:
        """drows (N, C) -> dx (B, T, C): rows at other places have the gradient 0."""
        return drows if cache is None else self.ops.embedding_backward(drows, cache[0]).reshape(cache[1])

    def attend(self, qkv: Array, layer: int, run: Pass) -> tuple[Array, tuple]:
        """qkv (B, T, 3C) -> y (B, T, C). A query sees the keys of `run.past`, earlier keys and its own."""
        q, k, v = np.split(qkv, 3, axis=-1)  # views, (B, T, C) each
        length = None
        if run.past is not None:
            k, v, length = run.past.extend(layer, k, v)  # (B, S, C) each
        return self.ops.attention_forward(q, k, v, self.config.n_head, run.start, self.prefix, length)

    def attend_backward(self, dy: Array, cache: tuple, grads: Grads) -> Array:
        return self.ops.attention_backward(dy, cache, packed=True)  # (B, T, 3C)

    def join(self, x: Array, y: Array, name: str, run: Pass) -> tuple[Array, tuple]:
        """The end of a branch: x + dropout(y w + b). y (..., I), the stream x (..., C) -> (..., C)."""
        if run.rng is None or not self.config.dropout:  # one operation
            x, c_linear = self.linear(y, name, run, add=x)  # (B, T, C)
            return x, (c_linear, None)
        y, c_linear = self.linear(y, name, run)  # (B, T, C)
        y, c_drop = self.dropout(y, self.config.dropout, run)  # (B, T, C)
        return self.ops.residual_forward(x, y)[0], (c_linear, c_drop)

    def join_backward(self, dx: Array, cache: tuple, grads: Grads) -> Array:
        """dx (..., C) -> dy (..., I). The gradient of the stream x is dx itself."""
        c_linear, c_drop = cache
        dy = self.dropout_backward(dx, c_drop)  # (B, T, C)
        return self.linear_backward(dy, c_linear, grads)

    def head(self, x: Array) -> tuple[Array, tuple]:
        """x (..., C) -> logits (..., V)."""
        x, c_norm = self.norm(x, "ln_f")  # (..., C)
        logits, c_linear = self.ops.linear_forward(x, self.params[self.table].T, bfloat16=self.bfloat16)
        return logits, (c_norm, c_linear)

    def head_backward(self, dlogits: Array, cache: tuple, grads: Grads) -> Array:
        c_norm, c_linear = cache
        dw = grads[self.table].T if self.table in grads else False
        dx, _, _ = self.ops.linear_backward(dlogits, c_linear, dw, False, bfloat16=self.bfloat16)  # (..., C)
        return self.norm_backward(dx, c_norm, grads)  # (..., C)

    # --- operations on named parameters ---------------------------------------------------------------------

    def linear(self, x: Array, name: str, run: Pass, add: Array | None = None) -> tuple[Array, tuple]:
        """x w + b + add: x (..., I) -> (..., O)."""
        w, b = self.params[f"{name}.weight"], self.params[f"{name}.bias"]
        out, c = self.ops.linear_forward(x, w, b, add, self.bfloat16)
        return out, (name, c)

    def linear_backward(self, dout: Array, cache: tuple, grads: Grads, add: Array | None = None) -> Array:
        name, c = cache
        dw, db = grads.get(f"{name}.weight", False), grads.get(f"{name}.bias", False)
        return self.ops.linear_backward(dout, c, dw, db, add, self.bfloat16)[0]

    def norm(self, x: Array, name: str) -> tuple[Array, tuple]:
        """LayerNorm: x (..., C) -> (..., C)."""
        g, b = self.params[f"{name}.weight"], self.params[f"{name}.bias"]
        out, c = self.ops.layernorm_forward(x, g, b, self.config.layer_norm_epsilon)
        return out, (name, c)

    def norm_backward(self, dout: Array, cache: tuple, grads: Grads, add: Array | None = None) -> Array:
        name, c = cache
        dg, db = grads.get(f"{name}.weight", False), grads.get(f"{name}.bias", False)
        return self.ops.layernorm_backward(dout, c, dg, db, add)[0]

    def dropout(self, x: Array, rate: float, run: Pass) -> tuple[Array, tuple | None]:
        """Any shape. Without dropout the result is x and the cache None."""
        if run.rng is None or not rate:
            return x, None
        return self.ops.dropout_forward(x, rate, int(run.rng.integers(2**63)))

    def dropout_backward(self, dout: Array, cache: tuple | None) -> Array:
        return dout if cache is None else self.ops.dropout_backward(dout, cache)

    # --- loss -----------------------------------------------------------------------------------------------

    def loss(
        self, ids: Array, targets: Array, weights: Array | None = None, grads: Grads | None = None, **forward
    ) -> Array:
        """sum(weights * nll), (), float64, in nats. If `grads` is given, it receives the gradients.

        ids, targets and weights (B, T); weights None is the mean, 1 / (B T) each. Other arguments are those
        of `forward`. With `places`, targets and weights are (N,).
        """
        if weights is None:
            weights = np.full(targets.shape, 1 / targets.size, self.flat.dtype)
        logits, cache = self.forward(ids, keep=grads is not None, **forward)  # (B, T, V) or (N, V)
        nll, c_nll = self.ops.cross_entropy_forward(logits, targets)  # (B, T) or (N,)
        if grads is not None:
            dlogits = self.ops.cross_entropy_backward(weights, c_nll)  # (B, T, V) or (N, V)
            del logits, c_nll  # the largest arrays
            self.backward(dlogits, cache, grads)
        return self.ops.weighted_sum(nll, weights)  # ()
