"""GPT: configuration, parameters, forward and backward.

    x = wte[ids] + wpe[positions]
    x = x + attn(ln_1(x));  x = x + mlp(ln_2(x))     each block of GPT-2, pre-norm (Radford et al. 2019, 2.3)
    x = ln_1(x + attn(x));  x = ln_2(x + mlp(x))     each block of GPT-1, post-norm (Radford et al. 2018, 4.1)
    logits = ln_f(x) wte^T                           the token table again; GPT-1 has no ln_f
    scores = ln_f(x) score^T                         instead, where the config has num_labels: a reward model

Parameters carry GPT-2's names and layout as Hugging Face has them, weights (in, out). Backward is the forward
read from the bottom up. It computes gradients for the names it is given an array for and no others: freezing
is leaving names out. Loss, optimizer and data are elsewhere; so is generation, which hands `forward` a KV
cache.

An adapter is a few weights beside these, `GPT.adapter`:

    x w + b + s (x A) B     a low-rank branch at a linear map, s = alpha / rank (LoRA; Hu et al. 2021, 4.1)
    x = [prompt; x]         learned rows before the embeddings (prompt tuning; Lester et al. 2021, 2;
                            p-tuning, which learns them through an MLP: Liu et al. 2021, 3.2)
    K, V = [prompt; K, V]   learned keys and values in each layer (prefix tuning; Li and Liang 2021, 4.2)

A prompt takes the first positions, and every query sees it. `finetune.adapters` makes, saves and merges them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from types import ModuleType

import numpy as np

from . import kernels, storage
from .errors import UserError
from .ops import Grad

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
    num_labels: int = 0  # scores of a text instead of logits of the next token

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
        C, tables = self.n_embd, self.vocab_size + self.block_size + self.num_labels
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
        if self.num_labels:
            shapes |= {"score.weight": (self.num_labels, C)}
        return dict(sorted(shapes.items(), key=lambda item: len(item[1]) == 1))  # stable: matrices first


PROJECTIONS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # the linear maps of a block


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What an adapter consists of. Raises UserError where that is nothing."""

    kind: str = ""  # lora, ptuning, prompt or prefix; "" is none
    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0  # on what goes into a low-rank branch
    targets: tuple[str, ...] = PROJECTIONS  # ends of names of linear maps
    full: bool = False  # LoRA: train copies of all that is not low-rank, as ReLoRA does
    num_virtual_tokens: int = 20  # rows of the prompt
    hidden: int = 0  # channels of the MLP that makes the prompt; 0: no MLP
    init: str = "vocab"  # a prompt begins as words of the vocabulary, or as random numbers

    def __post_init__(self) -> None:
        for name, right, rule in (  # comparisons that are False for NaN
            ("kind", self.kind in ("", "lora", "ptuning", "prompt", "prefix"), "a known one"),
            ("rank", self.rank >= 1, "at least 1"),
            ("alpha", 0 < self.alpha < math.inf, "more than 0"),
            ("dropout", 0 <= self.dropout < 1, "at least 0 and less than 1"),
            ("num_virtual_tokens", self.num_virtual_tokens >= 1, "at least 1"),
            ("hidden", self.hidden >= 0, "at least 0"),
            ("init", self.init in ("vocab", "random"), "vocab or random"),
        ):
            if not right:
                raise UserError(f"adapter: {name} is {getattr(self, name)!r}: it must be {rule}")

    @property
    def prompt_length(self) -> int:
        """The positions that it takes."""
        return 0 if self.kind in ("", "lora") else self.num_virtual_tokens

    def encoder(self, base: GPTConfig) -> dict[str, tuple[int, int]]:
        """The layers, (in, out), of the MLP that makes the prompt, under PEFT's names."""
        C, H = base.n_embd, self.hidden
        if H and self.kind == "ptuning":
            return {"mlp_head.0": (C, H), "mlp_head.2": (H, H), "mlp_head.4": (H, C)}
        if H and self.kind == "prefix":
            return {"transform.0": (C, H), "transform.2": (H, 2 * base.n_layer * C)}
        return {}

    def shapes(self, base: GPTConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter beside a model like `base`, matrices first. Raises UserError for
        a target that matches nothing, and for a prompt that leaves no position."""
        shapes, layers, missed = {}, self.encoder(base), set(self.targets)
        if self.prompt_length >= (limit := base.block_size):
            name = "num_virtual_tokens"
            raise UserError(f"adapter: {name} is {self.prompt_length}: the model has {limit} positions")
        if self.prompt_length:
            width = base.n_embd * (2 * base.n_layer if self.kind == "prefix" and not layers else 1)
            shapes["embedding.weight"] = (self.num_virtual_tokens, width)
            for name, (width, out) in layers.items():
                shapes |= {f"{name}.weight": (width, out), f"{name}.bias": (out,)}
        for name, shape in base.shapes().items() if self.kind == "lora" else ():
            module = name.removesuffix(".weight")
            hit = {t for t in self.targets if f".{module}".endswith(f".{t}")}
            if hit and module.endswith(PROJECTIONS):
                shapes[f"{module}.lora_A"] = (self.rank, shape[0])  # as it lies, it is A^T
                shapes[f"{module}.lora_B"] = (self.rank, shape[1])
                missed -= hit
            elif self.full:
                shapes[name] = shape
        if self.kind == "lora" and (missed or not self.targets):
            known = ", ".join(PROJECTIONS)
            raise UserError(f"adapter: the target {min(missed, default='')!r} is no linear map: {known} are")
        return dict(sorted(shapes.items(), key=lambda item: len(item[1]) == 1))


PRESETS = {
    "nano": GPTConfig(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128),
    "small": GPTConfig(vocab_size=1024, block_size=128, n_layer=4, n_head=4, n_embd=256),
    "baby": GPTConfig(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384),
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}


class Parameters:
    """Named arrays, `params` (name -> view into the buffer `flat`)."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: type) -> None:
        self.flat, self.params = storage.flat(shapes, dtype)

    def gradients(self, names: Iterable[str] | None = None) -> tuple[Array, dict[str, Array]]:
        """A zeroed flat buffer and its named views for the gradients of `names` (all parameters if None)."""
        names = set(self.params if names is None else names)
        if unknown := names - set(self.params):
            raise UserError(f"no parameter is called {sorted(unknown)[0]!r}; {min(self.params)} is one")
        return storage.flat({n: p.shape for n, p in self.params.items() if n in names}, self.flat.dtype)


class Adapter(Parameters):
    """An adapter's weights, at first zero; `GPT.adapter` takes one, and another when it is set anew."""

    def __init__(self, config: AdapterConfig, base: GPTConfig, dtype: type = np.float32) -> None:
        super().__init__(config.shapes(base), dtype)
        self.config, self.layers = config, config.encoder(base)

    def prompt(self, ops: ModuleType) -> tuple[Array, tuple]:
        """The learned rows (P, C), or for prefix tuning keys and values of all layers, (P, 2 n_layer C):
        layer i's keys are number 2 i, its values number 2 i + 1; and the cache for `prompt_backward`."""
        x, activation = self.params["embedding.weight"], getattr(ops, f"{self._activation}_forward")
        caches = []
        for name in self.layers:
            c_act = None
            if caches:
                x, c_act = activation(x)
            x, c = ops.linear_forward(x, self.params[f"{name}.weight"], self.params[f"{name}.bias"])
            caches.append((name, c_act, c))
        return x, caches

    def prompt_backward(self, dx: Array, caches: list, grads: dict[str, Array], ops: ModuleType) -> None:
        """From the gradient of the prompt to those of `grads`. Without an MLP `dx` is already there."""
        activation = getattr(ops, f"{self._activation}_backward")
        for name, c_act, c in reversed(caches):
            first = grads.get("embedding.weight", False)
            dw, db = grads.get(f"{name}.weight", False), grads.get(f"{name}.bias", False)
            dx, _, _ = ops.linear_backward(dx, c, dx=first if c_act is None else None, dw=dw, db=db)
            if c_act is not None:
                dx = activation(dx, c_act)

    @property
    def _activation(self) -> str:
        return "tanh" if self.config.kind == "prefix" else "relu"  # as in PEFT


class GPT(Parameters):
    """A model: its `config`, its `params` (name -> view into the buffer `flat`), its backend `ops`, and its
    `adapter`, None at first.

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
        self.adapter: Adapter | None = None
        super().__init__(config.shapes(), dtype)
        if rng is not None:
            self._initialise(rng)

    def copy(self) -> GPT:
        """The same weights in memory of their own, without an adapter."""
        other = GPT(self.config, dtype=self.flat.dtype.type, ops=self.ops)
        other.flat[:] = self.flat
        return other

    def _initialise(self, rng: np.random.Generator) -> None:
        """GPT-2's: normal, the two projections into the residual stream scaled by 1/sqrt(2 layers), so that
        the stream's variance does not grow with depth (Radford et al. 2019, section 2.3); biases 0, gains 1.

        GPT-2's deviation 0.02 is for 768 channels. Scaled by the root of the width, a projection of a
        normalised x has the same variance in a model of any width."""
        wide = 0.02 * math.sqrt(768 / self.config.n_embd)
        for name, p in self.params.items():
            if p.ndim == 2:
                std = wide / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else wide
                p[:] = rng.standard_normal(p.shape, np.float32) * np.float32(std)
            else:
                p[:] = ".ln_" in f".{name}" and name.endswith("weight")

    @property
    def head(self) -> str:
        """The parameter (outputs, C) that makes the result of what leaves the last block."""
        return "score.weight" if self.config.num_labels else "wte.weight"

    @property
    def trained(self) -> Parameters:
        """What training changes: the adapter's parameters where there is one, else the model's own."""
        return self.adapter or self

    @property
    def prompt_length(self) -> int:
        """The positions that the adapter's prompt takes."""
        return self.adapter.config.prompt_length if self.adapter else 0

    @property
    def context(self) -> int:
        """The longest text: block_size without the adapter's prompt."""
        return self.config.block_size - self.prompt_length

    @property
    def draws(self) -> bool:
        """Whether a forward with `rng` has dropout in it."""
        return bool(self.config.dropout or (self.adapter and self.adapter.config.dropout))

    def _param(self, name: str) -> Array:
        """The adapter's own copy of a parameter where it has one, else the model's."""
        own = self.adapter.params.get(name) if self.adapter else None
        return self.params[name] if own is None else own

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
        """ids (B, T) -> logits (B, T, V), or scores (B, T, num_labels), and the cache that `backward` takes.

        positions (T,) or (B, T): rows of wpe, 0 to T - 1 by default, after those of an adapter's prompt.
        start (B, T): where each query's view begins, see `ops.visible_keys`. rng: turns dropout on. kv: a
        `generate.KVCache`, whose keys and values come before these and which is extended; an empty one gets
        the prompt first. keep=False: buffers are shared by all layers and the cache is of no use to
        `backward`. last=True: logits of the last position only, (B, 1, V), with keep=False. Raises UserError
        for a sequence longer than `context`. Results live until `ws` is used again.
        """
        (B, T), C, P = ids.shape, self.config.n_embd, self.prompt_length
        ws, begins, wpe = ws or storage.Workspace(), kv is None or not kv.length, self._param("wpe.weight")
        if positions is None:
            positions = np.arange(T, dtype=np.int32) + (0 if begins else kv.length - P)
        if positions.size and positions.max() >= self.context:
            limit = f"block_size, {self.config.block_size}" + f", less a prompt of {P}" * bool(P)
            raise UserError(f"a sequence of {positions.max() + 1} tokens is longer than {limit}")
        prompt, c_prompt = self.adapter.prompt(self.ops) if P and begins else (None, None)
        rows = prompt is not None and self.adapter.config.kind != "prefix"  # else they are keys and values

        def buffer(name: str, *channels: int, T: int = T + P * rows) -> Array:
            return ws(name, (B, T, *channels), self.flat.dtype)

        run = _Pass(buffer, rng if self.draws else None, start, kv, keep, P, None if rows else prompt)
        tok, c_tok = self.ops.embedding_forward(ids, self._param("wte.weight"), out=buffer("tok", C, T=T))
        pos, c_pos = self.ops.embedding_forward(
            np.broadcast_to(positions, (B, T)), wpe[P:], out=buffer("pos", C, T=T)
        )
        x, _ = self.ops.residual_forward(tok, pos, out=buffer("x", C, T=T))
        if rows:
            placed, _ = self.ops.residual_forward(prompt, wpe[:P])
            x = self._after(placed, x, buffer("rows", C))
        x, c_drop = self._dropout(x, "x.drop", run, self.config.dropout)
        sublayers, c_norm = [], None
        for layer in range(self.config.n_layer):
            for norm, branch in ((f"h.{layer}.ln_1", self._attention), (f"h.{layer}.ln_2", self._mlp)):
                x, cache = self._sublayer(x, norm, branch, run)
                sublayers.append(cache)
        if rows:
            stream, x = x, buffer("text", C, T=T)
            self.ops.append_rows(x, stream[:, P:], 0)
        if not self.config.post_norm:
            x, c_norm = self._layernorm(x, "ln_f", run)
        if last:
            x = np.ascontiguousarray(x[:, -1:])
        head = self._param(self.head)
        out = ws("logits", (*x.shape[:2], len(head)), x.dtype)
        logits, c_head = self.ops.linear_forward(x, head.T, out=out)
        return logits, (buffer, c_tok, c_pos, c_drop, sublayers, c_norm, c_head, c_prompt, prompt, rows)

    def _after(self, rows: Array, x: Array, out: Array) -> Array:
        """out (B, P + T, C) = rows (P, C), the same for each of the batch, and then x (B, T, C)."""
        self.ops.append_rows(out, np.broadcast_to(rows, (len(x), *rows.shape)), 0)
        self.ops.append_rows(out, x, len(rows))
        return out

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
        if run.prefix is not None:
            S, (key, value) = q.shape[1] + len(run.prefix), self._places(block)
            name = run.name(f"{block}.prefix")
            k = self._after(run.prefix[:, key], k, run.buffer(f"{name}.k", C, T=S))
            v = self._after(run.prefix[:, value], v, run.buffer(f"{name}.v", C, T=S))
        if run.kv is not None:
            k, v = run.kv.extend(int(block[2:]), k, v)
        out = run.buffer(run.name(f"{block}.attn"), C)
        a, c_attn = self.ops.attention_forward(
            q, k, v, self.config.n_head, run.start, run.prompt_length, out=out
        )
        x, c_proj = self._join(a, x, f"{block}.attn.c_proj", run)
        return x, (self._attention_backward, c_qkv, c_attn, c_proj, run.prefix is not None and block)

    def _places(self, block: str) -> tuple[slice, slice]:
        """Where a block's keys and values are in a prefix."""
        C, at = self.config.n_embd, 2 * self.config.n_embd * int(block[2:])
        return slice(at, at + C), slice(at + C, at + 2 * C)

    def _mlp(self, h: Array, x: Array, block: str, run: _Pass) -> tuple[Array, tuple]:
        f, c_fc = self._linear(h, f"{block}.mlp.c_fc", run)
        g, c_gelu = self.ops.gelu_forward(f, out=run.buffer(run.name(f"{block}.gelu"), f.shape[-1]))
        x, c_proj = self._join(g, x, f"{block}.mlp.c_proj", run)
        return x, (self._mlp_backward, c_fc, c_gelu, c_proj)

    def _join(self, h: Array, x: Array, name: str, run: _Pass) -> tuple[Array, tuple]:
        """A branch's last layer, dropout, and the sum with the stream; without dropout one operation."""
        if run.rng is None or not self.config.dropout:
            x, c_linear = self._linear(h, name, run, add=x)
            return x, (c_linear, None)
        y, c_linear = self._linear(h, name, run)
        y, c_drop = self._dropout(y, f"{name}.drop", run, self.config.dropout)
        x, _ = self.ops.residual_forward(x, y, out=run.buffer(run.name(f"{name}.sum"), x.shape[-1]))
        return x, (c_linear, c_drop)

    def _linear(self, x: Array, name: str, run: _Pass, add: Array | None = None) -> tuple[Array, tuple]:
        w, b = self._param(f"{name}.weight"), self._param(f"{name}.bias")
        out = run.buffer(run.name(name), w.shape[1])
        c_low = self._low_rank(x, b, add, out, name, run)
        if c_low is not None:
            b, add = None, out
        out, cache = self.ops.linear_forward(x, w, b, add, out=out)
        return out, (name, cache, c_low)

    def _low_rank(self, x: Array, b: Array, add: Array | None, out: Array, name: str, run: _Pass):
        """out = s (drop(x) A) B + b + add, where the adapter has A^T (R, I) and B (R, O) for this map.

        x w is added to that, not that to x w: a large product hides the time it takes to read `out`.
        """
        if not self.adapter or f"{name}.lora_A" not in self.adapter.params:
            return None
        low_a, low_b = (self.adapter.params[f"{name}.lora_{side}"] for side in "AB")
        s = self.adapter.config.alpha / self.adapter.config.rank
        x, c_drop = self._dropout(x, f"{name}.lora_drop", run, self.adapter.config.dropout)
        a = low_a if s == 1 else self.ops.scale(low_a, s)  # A is the smallest of all that s could go to
        low, c_a = self.ops.linear_forward(x, a.T, out=run.buffer(run.name(f"{name}.low"), len(a)))
        _, c_b = self.ops.linear_forward(low, low_b, b, add, out=out)
        return s, c_drop, c_a, c_b

    def _layernorm(self, x: Array, name: str, run: _Pass) -> tuple[Array, tuple]:
        g, b = self._param(f"{name}.weight"), self._param(f"{name}.bias")
        out = run.buffer(run.name(name), x.shape[-1], T=x.shape[1])
        out, cache = self.ops.layernorm_forward(x, g, b, self.config.layer_norm_epsilon, out=out)
        return out, (name, cache)

    def _dropout(self, x: Array, name: str, run: _Pass, rate: float) -> tuple[Array, tuple | None]:
        if run.rng is None or not rate:
            return x, None
        seed = int(run.rng.integers(2**63))
        return self.ops.dropout_forward(x, rate, seed, out=run.buffer(run.name(name), x.shape[-1]))

    # --- backward: the forward, read from the bottom up -----------------------------------------------------

    def backward(self, dlogits: Array, cache: tuple, grads: dict[str, Array]) -> None:
        """Writes into `grads` (name -> array, see `gradients`) the gradients of the loss, given its gradient
        `dlogits`.

        dlogits (B, T, V). A name that `grads` does not have is not computed, nor is anything below the lowest
        name. Beside an adapter's prompt wpe has no gradient.
        """
        buffer, c_tok, c_pos, c_drop, sublayers, c_norm, c_head, c_prompt, prompt, rows = cache
        C, lowest = self.config.n_embd, min(map(self._depth, grads), default=2 * self.config.n_layer)
        if prompt is not None:
            T, P = dlogits.shape[1], len(prompt)
            dprompt = np.empty_like(prompt) if self.adapter.layers else grads.get("embedding.weight")
            dprompt = np.empty_like(prompt) if dprompt is None else dprompt
        dwte, dhead = grads.get("wte.weight", False), grads.get(self.head, False)
        dhead = dhead if dhead is False else dhead.T
        text = {"T": dlogits.shape[1]}
        dx, _, _ = self.ops.linear_backward(dlogits, c_head, dx=buffer("dx", C, **text), dw=dhead, db=False)
        if c_norm is not None:
            dx = self._layernorm_backward(dx, c_norm, buffer("dx.ln_f", C, **text), grads)
        if rows:  # no logits were read from the prompt
            dx = self._after(np.broadcast_to(np.zeros(C, dx.dtype), (P, C)), dx, buffer("dx.rows", C))
        needs = grads if prompt is None else {**grads, "prompt": dprompt}
        for depth in range(len(sublayers) - 1, max(lowest, 0) - 1, -1):
            dx = self._sublayer_backward(dx, sublayers[depth], buffer, needs, depth > lowest)
        if lowest < 0:
            if c_drop is not None:
                dx = self.ops.dropout_backward(dx, c_drop, dx=buffer("dx.drop", C))
            if rows:
                self.ops.batch_sum(dx[:, :P], out=dprompt)
                if dwte is not False:
                    dx, stream = buffer("dx.text", C, T=T), dx
                    self.ops.append_rows(dx, stream[:, P:], 0)
            tied = self.head == "wte.weight"  # the table is used twice: this adds to the head's part
            self.ops.embedding_backward(dx, c_tok, dwte, add=tied)
            if prompt is None:
                self.ops.embedding_backward(dx, c_pos, grads.get("wpe.weight", False))
        if prompt is not None:
            self.adapter.prompt_backward(dprompt, c_prompt, grads, self.ops)

    def _depth(self, name: str) -> int:
        """-1 for the embeddings and what stands beside them, 2 i for the attention of block i, 2 i + 1 for
        its MLP, 2 n_layer for what comes after the blocks."""
        first, *rest = name.split(".")
        if first == "h":
            return 2 * int(rest[0]) + (rest[1] in ("mlp", "ln_2"))
        if first in ("ln_f", "score"):
            return 2 * self.config.n_layer
        return 0 if first not in ("wte", "wpe") and self.adapter.config.kind == "prefix" else -1

    def _sublayer_backward(self, dx: Array, cache, buffer: Callable, grads: dict, below: bool) -> Array:
        """below: whether there are gradients to compute below this half of a block; else its own end it."""
        norm, c_norm, (branch_backward, *c_branch) = cache
        C, own = self.config.n_embd, not grads.keys().isdisjoint((f"{norm}.weight", f"{norm}.bias"))
        dh = buffer("dh", C) if below or (own and not self.config.post_norm) else False
        if self.config.post_norm:
            dx = self._layernorm_backward(dx, c_norm, buffer("d" + norm[-4:], C), grads)
            dh = branch_backward(dx, *c_branch, dh, buffer, grads)
            return dx if dh is False else self.ops.residual_forward(dx, dh, out=dx)[0]
        dh = branch_backward(dx, *c_branch, dh, buffer, grads)
        if dh is False:
            return dx
        return self._layernorm_backward(dh, c_norm, dx, grads, add=dx)  # it fed sum and branch: gradients add

    def _attention_backward(self, dx, c_qkv, c_attn, c_proj, prefix, dh, buffer, grads: dict) -> Grad:
        C = self.config.n_embd
        da = self._join_backward(dx, c_proj, buffer("da", C), buffer, grads)
        dqkv = buffer("dqkv", 3 * C)
        dq, *dkv = dqkv[..., :C], dqkv[..., C : 2 * C], dqkv[..., 2 * C :]
        if not prefix:
            self.ops.attention_backward(da, c_attn, dq, *dkv)
        else:
            P, whole = len(grads["prompt"]), [buffer(f"d{side}", C, T=c_attn[1].shape[1]) for side in "kv"]
            self.ops.attention_backward(da, c_attn, dq, *whole)
            for d, part, place in zip(dkv, whole, self._places(prefix), strict=True):
                self.ops.append_rows(d, part[:, P:], 0)
                self.ops.batch_sum(part[:, :P], out=grads["prompt"][:, place])
        return self._linear_backward(dqkv, c_qkv, dh, buffer, grads)

    def _mlp_backward(self, dx, c_fc, c_gelu, c_proj, dh, buffer: Callable, grads: dict) -> Grad:
        C = self.config.n_embd
        dg = self._join_backward(dx, c_proj, buffer("dg", 4 * C), buffer, grads)
        df = self.ops.gelu_backward(dg, c_gelu, dx=dg)
        return self._linear_backward(df, c_fc, dh, buffer, grads)

    def _join_backward(self, dx: Array, cache: tuple, dh: Array, buffer: Callable, grads) -> Array:
        c_linear, c_drop = cache
        if c_drop is not None:
            dx = self.ops.dropout_backward(dx, c_drop, dx=buffer("dy", self.config.n_embd))
        return self._linear_backward(dx, c_linear, dh, buffer, grads)

    def _linear_backward(self, dout: Array, cache: tuple, dx: Grad, buffer: Callable, grads: dict) -> Grad:
        name, c, c_low = cache
        dw, db = grads.get(f"{name}.weight", False), grads.get(f"{name}.bias", False)
        if c_low is not None:
            self._low_rank_backward(dout, c_low, name, dx, buffer, grads)
        add = None if c_low is None or dx is False else dx
        return self.ops.linear_backward(dout, c, dx=dx, dw=dw, db=db, add=add)[0]

    def _low_rank_backward(self, dout: Array, cache, name: str, dx: Grad, buffer: Callable, grads) -> None:
        """Writes to dx, unless that is False, what reaches x through the branch."""
        s, c_drop, c_a, c_b = cache
        da, db = grads.get(f"{name}.lora_A", False), grads.get(f"{name}.lora_B", False)
        dlow = buffer("dlow", c_a[1].shape[1])
        self.ops.linear_backward(dout, c_b, dx=dlow, dw=db, db=False)
        self.ops.linear_backward(dlow, c_a, dx=dx, dw=da if da is False else da.T, db=False)
        if c_drop is not None and dx is not False:
            self.ops.dropout_backward(dx, c_drop, dx=dx)
        if s != 1 and da is not False:
            self.ops.scale(da, s, out=da)

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
    prompt_length: int
    prefix: Array | None  # keys and values to place before those of the text

    def name(self, buffer: str) -> str:
        """Without a backward to come, all layers share the first one's buffers: `h.3.attn.c_attn` becomes
        `attn.c_attn`."""
        return buffer if self.keep or not buffer.startswith("h.") else buffer.split(".", 2)[2]
