"""GPT: configuration, parameters, forward and backward.

    x = wte[ids] + wpe[positions]
    x = x + attn(ln_1(x));  x = x + mlp(ln_2(x))     each block of GPT-2, pre-norm (Radford et al. 2019, 2.3)
    x = ln_1(x + attn(x));  x = ln_2(x + mlp(x))     each block of GPT-1, post-norm (Radford et al. 2018, 4.1)
    logits = ln_f(x) wte^T                           the token table again; GPT-1 has no ln_f

Parameters carry GPT-2's names and layout as Hugging Face has them, weights (in, out). Backward is the forward
read from the bottom up. It computes gradients for the names it is given an array for and no others: freezing
is leaving names out. Loss, optimizer and data are elsewhere; so is generation, which hands `forward` a KV
cache.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from types import ModuleType

import numpy as np

from . import kernels, storage
from .errors import UserError

Array = np.ndarray
MOST_LAYERS, MOST_WEIGHTS = 1000, 10**11  # more is a mistake, found before it costs memory or time


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes of a model, under nanoGPT's names. Raises UserError where they make no model."""

    vocab_size: int = 50257
    block_size: int = 1024  # the longest sequence, as there are positions: GPT-2's n_positions
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # on the embeddings and on each branch before it joins the stream
    post_norm: bool = False  # GPT-1's block instead of GPT-2's
    layer_norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        for field in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} is {getattr(self, field)}: it must be at least 1")
        if self.n_embd % self.n_head:
            raise UserError(
                f"n_head {self.n_head} does not divide n_embd {self.n_embd}, and heads share it evenly"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}: it must be at least 0 and less than 1")
        if self.n_layer > MOST_LAYERS:
            raise UserError(f"n_layer is {self.n_layer}: it must be at most {MOST_LAYERS}")
        if self.size > MOST_WEIGHTS:
            sizes = ("vocab_size", "block_size", "n_layer", "n_embd")
            written = ", ".join(f"{field} {getattr(self, field)}" for field in sizes)
            raise UserError(f"{written}: these make more than {MOST_WEIGHTS:,} weights; choose smaller sizes")

    @property
    def size(self) -> int:
        """The number of weights, without a list of them: C (12 C + 13) in a layer, 2 C in ln_f."""
        C, tables = self.n_embd, self.vocab_size + self.block_size
        return C * (tables + self.n_layer * (12 * C + 13) + 2 * (not self.post_norm))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter: those that weight decay shrinks first, then vectors."""
        C = self.n_embd
        shapes = {"wte.weight": (self.vocab_size, C), "wpe.weight": (self.block_size, C)}
        for layer in range(self.n_layer):
            h = f"h.{layer}."
            shapes |= {h + "ln_1.weight": (C,), h + "ln_1.bias": (C,)}
            shapes |= {h + "attn.c_attn.weight": (C, 3 * C), h + "attn.c_attn.bias": (3 * C,)}
            shapes |= {h + "attn.c_proj.weight": (C, C), h + "attn.c_proj.bias": (C,)}
            shapes |= {h + "ln_2.weight": (C,), h + "ln_2.bias": (C,)}
            shapes |= {h + "mlp.c_fc.weight": (C, 4 * C), h + "mlp.c_fc.bias": (4 * C,)}
            shapes |= {h + "mlp.c_proj.weight": (4 * C, C), h + "mlp.c_proj.bias": (C,)}
        if not self.post_norm:
            shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
        return dict(sorted(shapes.items(), key=lambda item: len(item[1]) == 1))  # stable: matrices first


PRESETS = {
    "nano": GPTConfig(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128),
    "small": GPTConfig(vocab_size=1024, block_size=128, n_layer=4, n_head=4, n_embd=256),
    "baby": GPTConfig(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384),
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}


class GPT:
    """A model: its `config`, its `params` (name -> view into the buffer `flat`), its backend `ops`.

    `rng` draws the initial weights; without it they are zero, for a checkpoint to fill. dtype is float32 or
    float64.
    """

    def __init__(
        self,
        config: GPTConfig,
        rng: np.random.Generator | None = None,
        dtype: type = np.float32,
        ops: ModuleType | None = None,
    ) -> None:
        self.config = config
        self.ops = ops or kernels.backend()
        self.flat, self.params = storage.flat(config.shapes(), dtype)
        if rng is not None:
            self._initialise(rng)

    def _initialise(self, rng: np.random.Generator) -> None:
        """GPT-2's: normal with deviation 0.02, the two projections into the residual stream scaled by
        1/sqrt(2 layers), so that the stream's variance does not grow with depth (Radford et al. 2019, section
        2.3); biases 0, gains 1."""
        for name, p in self.params.items():
            if p.ndim == 2:
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
                p[:] = rng.standard_normal(p.shape, np.float32) * np.float32(std)
            else:
                p[:] = ".ln_" in f".{name}" and name.endswith("weight")

    def gradients(self, names: Iterable[str] | None = None) -> tuple[Array, dict[str, Array]]:
        """A zeroed flat buffer and its named views for the gradients of `names` (all parameters if None)."""
        names = set(self.params if names is None else names)
        if unknown := names - set(self.params):
            raise UserError(f"no parameter is called {sorted(unknown)[0]!r}; h.0.mlp.c_fc.weight is one")
        return storage.flat({n: p.shape for n, p in self.params.items() if n in names}, self.flat.dtype)

    # --- forward --------------------------------------------------------------------------------------------

    def forward(
        self,
        ids: Array,
        ws: storage.Workspace | None = None,
        *,
        positions: Array | None = None,
        start: Array | None = None,
        rng: np.random.Generator | None = None,
        kv=None,
        keep: bool = True,
        last: bool = False,
    ) -> tuple[Array, tuple]:
        """ids (B, T) -> logits (B, T, V), and the cache that `backward` takes.

        positions (T,) or (B, T): rows of wpe, 0 to T - 1 by default. start (B, T): where each query's view
        begins, see `ops.visible_keys`. rng: turns dropout on. kv: a `generate.KVCache`, whose keys and values
        come before these and which is extended. keep=False: buffers are shared by all layers and the cache is
        of no use to `backward`. last=True: logits of the last position only, (B, 1, V), with keep=False; the
        head is a third of GPT-2's work. Raises UserError for a sequence longer than block_size. Results live
        until `ws` is used again.
        """
        (B, T), C = ids.shape, self.config.n_embd
        ws = ws or storage.Workspace()
        if positions is None:
            positions = np.arange(T, dtype=np.int32) + (kv.length if kv is not None else 0)
        if positions.size and positions.max() >= self.config.block_size:
            limit = self.config.block_size
            raise UserError(f"a sequence of {positions.max() + 1} tokens is longer than block_size, {limit}")

        def buffer(name: str, *channels: int) -> Array:
            return ws(name, (B, T, *channels), self.flat.dtype)

        run = _Pass(buffer, rng if self.config.dropout else None, start, kv, keep)
        tok, c_tok = self.ops.embedding_forward(ids, self.params["wte.weight"], out=buffer("tok", C))
        pos, c_pos = self.ops.embedding_forward(
            np.broadcast_to(positions, (B, T)), self.params["wpe.weight"], out=buffer("pos", C)
        )
        x, _ = self.ops.residual_forward(tok, pos, out=buffer("x", C))
        x, c_drop = self._dropout(x, "x.drop", run)
        sublayers = []
        for layer in range(self.config.n_layer):
            for norm, branch in ((f"h.{layer}.ln_1", self._attention), (f"h.{layer}.ln_2", self._mlp)):
                x, cache = self._sublayer(x, norm, branch, run)
                sublayers.append(cache)
        c_norm = None
        if not self.config.post_norm:
            x, c_norm = self._layernorm(x, "ln_f", run)
        if last:
            x = np.ascontiguousarray(x[:, -1:])
        logits = ws("logits", (*x.shape[:2], self.config.vocab_size), x.dtype)
        logits, c_head = self.ops.linear_forward(x, self.params["wte.weight"].T, out=logits)
        return logits, (buffer, c_tok, c_pos, c_drop, sublayers, c_norm, c_head)

    def _sublayer(self, x: Array, norm: str, branch: Callable, run: _Pass) -> tuple[Array, tuple]:
        """Half a block: a branch off the stream `x` and its sum with it; the norm before or after."""
        h, c_norm = (x, None) if self.config.post_norm else self._layernorm(x, norm, run)
        x, c_branch = branch(h, x, norm.rsplit(".", 1)[0], run)
        if self.config.post_norm:
            x, c_norm = self._layernorm(x, norm, run)
        return x, (norm, c_norm, c_branch)

    def _attention(self, h: Array, x: Array, block: str, run: _Pass) -> tuple[Array, tuple]:
        C = self.config.n_embd
        qkv, c_qkv = self._linear(h, f"{block}.attn.c_attn", run)
        q, k, v = qkv[..., :C], qkv[..., C : 2 * C], qkv[..., 2 * C :]
        if run.kv is not None:
            k, v = run.kv.extend(int(block[2:]), k, v)
        a, c_attn = self.ops.attention_forward(
            q, k, v, self.config.n_head, run.start, out=run.buffer(run.name(f"{block}.attn"), C)
        )
        x, c_proj = self._join(a, x, f"{block}.attn.c_proj", run)
        return x, (self._attention_backward, c_qkv, c_attn, c_proj)

    def _mlp(self, h: Array, x: Array, block: str, run: _Pass) -> tuple[Array, tuple]:
        f, c_fc = self._linear(h, f"{block}.mlp.c_fc", run)
        g, c_gelu = self.ops.gelu_forward(f, out=run.buffer(run.name(f"{block}.gelu"), f.shape[-1]))
        x, c_proj = self._join(g, x, f"{block}.mlp.c_proj", run)
        return x, (self._mlp_backward, c_fc, c_gelu, c_proj)

    def _join(self, h: Array, x: Array, name: str, run: _Pass) -> tuple[Array, tuple]:
        """A branch's last layer, dropout, and the sum with the stream; without dropout one operation."""
        if run.rng is None:
            x, c_linear = self._linear(h, name, run, add=x)
            return x, (c_linear, None)
        y, c_linear = self._linear(h, name, run)
        y, c_drop = self._dropout(y, f"{name}.drop", run)
        x, _ = self.ops.residual_forward(x, y, out=run.buffer(run.name(f"{name}.sum"), x.shape[-1]))
        return x, (c_linear, c_drop)

    def _linear(self, x: Array, name: str, run: _Pass, add: Array | None = None) -> tuple[Array, tuple]:
        w, b = self.params[f"{name}.weight"], self.params[f"{name}.bias"]
        out, cache = self.ops.linear_forward(x, w, b, add, out=run.buffer(run.name(name), w.shape[1]))
        return out, (name, cache)

    def _layernorm(self, x: Array, name: str, run: _Pass) -> tuple[Array, tuple]:
        g, b = self.params[f"{name}.weight"], self.params[f"{name}.bias"]
        out = run.buffer(run.name(name), x.shape[-1])
        out, cache = self.ops.layernorm_forward(x, g, b, self.config.layer_norm_epsilon, out=out)
        return out, (name, cache)

    def _dropout(self, x: Array, name: str, run: _Pass) -> tuple[Array, tuple | None]:
        if run.rng is None:
            return x, None
        seed = int(run.rng.integers(2**63))
        return self.ops.dropout_forward(
            x, self.config.dropout, seed, out=run.buffer(run.name(name), x.shape[-1])
        )

    # --- backward: the forward, read from the bottom up -----------------------------------------------------

    def backward(self, dlogits: Array, cache: tuple, grads: dict[str, Array]) -> None:
        """Writes into `grads` (name -> array, see `gradients`) the gradients of the loss, given its gradient
        `dlogits`.

        dlogits (B, T, V). A name that `grads` does not have is not computed, nor is anything below the lowest
        name.
        """
        buffer, c_tok, c_pos, c_drop, sublayers, c_norm, c_head = cache
        C, lowest = self.config.n_embd, min(map(self._depth, grads), default=self.config.n_layer)
        dwte = grads.get("wte.weight", False)
        dwte_t = dwte if dwte is False else dwte.T
        dx, _, _ = self.ops.linear_backward(dlogits, c_head, dx=buffer("dx", C), dw=dwte_t, db=False)
        if c_norm is not None:
            dx = self._layernorm_backward(dx, c_norm, buffer("dx.ln_f", C), grads)
        for sublayer in reversed(sublayers[2 * max(lowest, 0) :]):
            dx = self._sublayer_backward(dx, sublayer, buffer, grads)
        if lowest < 0:
            if c_drop is not None:
                dx = self.ops.dropout_backward(dx, c_drop, dx=buffer("dx.drop", C))
            self.ops.embedding_backward(dx, c_tok, dwte, add=True)  # to the head's part: it is used twice
            self.ops.embedding_backward(dx, c_pos, grads.get("wpe.weight", False))

    def _depth(self, name: str) -> int:
        """-1 for the embeddings, i for block i, n_layer for what comes after the blocks."""
        parts = name.split(".")
        return int(parts[1]) if parts[0] == "h" else -1 if parts[0] in ("wte", "wpe") else self.config.n_layer

    def _sublayer_backward(self, dx: Array, cache: tuple, buffer: Callable, grads: dict[str, Array]) -> Array:
        norm, c_norm, (branch_backward, *c_branch) = cache
        if self.config.post_norm:
            dx = self._layernorm_backward(dx, c_norm, buffer("d" + norm[-4:], self.config.n_embd), grads)
            dh = branch_backward(dx, *c_branch, buffer, grads)
            return self.ops.residual_forward(dx, dh, out=dx)[0]
        dh = branch_backward(dx, *c_branch, buffer, grads)
        return self._layernorm_backward(dh, c_norm, dx, grads, add=dx)  # it fed sum and branch: gradients add

    def _attention_backward(
        self, dx, c_qkv, c_attn, c_proj, buffer: Callable, grads: dict[str, Array]
    ) -> Array:
        C = self.config.n_embd
        da = self._join_backward(dx, c_proj, buffer("da", C), buffer, grads)
        dqkv = buffer("dqkv", 3 * C)
        self.ops.attention_backward(da, c_attn, dqkv[..., :C], dqkv[..., C : 2 * C], dqkv[..., 2 * C :])
        return self._linear_backward(dqkv, c_qkv, buffer("dh", C), grads)

    def _mlp_backward(self, dx, c_fc, c_gelu, c_proj, buffer: Callable, grads: dict[str, Array]) -> Array:
        C = self.config.n_embd
        dg = self._join_backward(dx, c_proj, buffer("dg", 4 * C), buffer, grads)
        df = self.ops.gelu_backward(dg, c_gelu, dx=dg)
        return self._linear_backward(df, c_fc, buffer("dh", C), grads)

    def _join_backward(self, dx: Array, cache: tuple, dh: Array, buffer: Callable, grads) -> Array:
        c_linear, c_drop = cache
        if c_drop is not None:
            dx = self.ops.dropout_backward(dx, c_drop, dx=buffer("dy", self.config.n_embd))
        return self._linear_backward(dx, c_linear, dh, grads)

    def _linear_backward(self, dout: Array, cache: tuple, dx: Array, grads: dict[str, Array]) -> Array:
        name, c = cache
        dw, db = grads.get(f"{name}.weight", False), grads.get(f"{name}.bias", False)
        return self.ops.linear_backward(dout, c, dx=dx, dw=dw, db=db)[0]

    def _layernorm_backward(
        self, dout: Array, cache: tuple, dx: Array, grads: dict[str, Array], add: Array | None = None
    ) -> Array:
        name, c = cache
        dg, db = grads.get(f"{name}.weight", False), grads.get(f"{name}.bias", False)
        return self.ops.layernorm_backward(dout, c, dx, dg, db, add)[0]

    # --- loss -----------------------------------------------------------------------------------------------

    def loss(
        self,
        ids: Array,
        targets: Array,
        weights: Array | None = None,
        grads: dict[str, Array] | None = None,
        ws: storage.Workspace | None = None,
        **forward,
    ) -> float:
        """sum(weights * nll), in nats, and where `grads` is given its gradients.

        ids, targets and weights (B, T); weights None is the mean, 1 / (B T) each. Other arguments go to
        `forward`.
        """
        if weights is None:
            weights = np.full(targets.shape, 1 / targets.size, self.flat.dtype)
        nll = self.losses(ids, targets, weights, grads, ws, **forward)
        return float((nll * weights).sum(dtype=np.float64))

    def losses(
        self,
        ids: Array,
        targets: Array,
        weights: Array,
        grads: dict[str, Array] | None = None,
        ws: storage.Workspace | None = None,
        **forward,
    ) -> Array:
        """nll (B, T), in nats, and where `grads` is given the gradients of sum(weights * nll): see `loss`."""
        ws = ws or storage.Workspace()
        logits, cache = self.forward(ids, ws, keep=grads is not None, **forward)
        nll, c_nll = self.ops.cross_entropy_forward(logits, targets)
        if grads is not None:
            self.backward(self.ops.cross_entropy_backward(weights, c_nll, logits), cache, grads)
        return nll


@dataclasses.dataclass
class _Pass:
    """What one forward needs everywhere: where buffers come from, dropout's generator, what each query
    sees."""

    buffer: Callable[..., Array]
    rng: np.random.Generator | None
    start: Array | None
    kv: object | None
    keep: bool

    def name(self, buffer: str) -> str:
        """Without a backward to come, all layers share the first one's buffers: `h.3.attn.c_attn` becomes
        `attn.c_attn`."""
        return buffer if self.keep or not buffer.startswith("h.") else buffer.split(".", 2)[2]
