"""Learned prompts: rows before the embeddings, or keys and values before those of each layer.

    x = [prompt; x]          prompt tuning (Lester et al. 2021, section 2); p-tuning learns the rows through
                             an MLP with relu (Liu et al. 2021, section 3.2)
    K, V = [prompt; K, V]    prefix tuning (Li and Liang 2021, section 4.2), perhaps through an MLP with tanh

A prompt takes the first P positions, and every query sees it.
"""

import math

import numpy as np

from ..core.generate import KVCache
from ..core.model import GPT, Array, Pass
from .adapter import Adapted


class _Learned(Adapted):
    """The common part of prompts and prefixes: a table of rows, perhaps with an MLP behind the table."""

    activation = "relu"

    def initialise(self, rng: np.random.Generator) -> None:
        """A prompt begins as random tokens of the vocabulary, or as random normal numbers. Their deviation is
        that of the token table, or 1 for the input of an MLP. The MLP's layers are uniform in +-1 /
        sqrt(inputs), as PyTorch's."""
        params, config = self.adapter.params, self.adapter.config
        for name, p in params.items():
            if name != "embedding.weight":
                p[:] = rng.uniform(-1, 1, p.shape) / math.sqrt(len(params[name.replace("bias", "weight")]))
            elif self.adapter.layers or config.init == "random":
                deviation = 1 if self.adapter.layers else self.params["wte.weight"].std()
                p[:] = rng.standard_normal(p.shape) * deviation
            else:
                p[:] = self.words(rng.integers(self.config.vocab_size, size=(1, len(p))).astype(np.int32))

    def prompt(self) -> tuple[Array, list]:
        """The learned rows (P, C), and the cache for `prompt_backward`.

        For a prefix the rows are the keys and values of all layers, (P, 2 n_layer C). The keys of layer i are
        block 2 i, its values block 2 i + 1.
        """
        x, params, caches = self.adapter.params["embedding.weight"], self.adapter.params, []
        for name in self.adapter.layers:
            c_act = None
            if caches:
                x, c_act = getattr(self.ops, f"{self.activation}_forward")(x)
            x, c = self.ops.linear_forward(x, params[f"{name}.weight"], params[f"{name}.bias"])
            caches.append((name, c_act, c))
        return x, caches

    def prompt_backward(self, dx: Array, caches: list, grads: dict[str, Array]) -> None:
        """Computes the gradients in `grads` from the gradient of the prompt."""
        for name, c_act, c in reversed(caches):
            dw, db = grads.get(f"{name}.weight", False), grads.get(f"{name}.bias", False)
            dx, _, _ = self.ops.linear_backward(dx, c, dw=dw, db=db)
            if c_act is not None:
                dx = getattr(self.ops, f"{self.activation}_backward")(dx, c_act)
        if "embedding.weight" in grads:
            grads["embedding.weight"][:] = dx


class Prompt(_Learned):
    """A GPT with learned rows before the embeddings."""

    def words(self, ids: Array) -> Array:
        """The rows (P, C) of the tokens ids (1, P)."""
        return self.params["wte.weight"][ids[0]]

    def forward(self, ids: Array, *, places=None, past=None, **how) -> tuple[Array, tuple]:
        if places is not None and not (past and past.length):  # the prompt's rows come before each text
            places = places + (places // ids.shape[1] + 1) * np.int32(self.prefix)
        return super().forward(ids, places=places, past=past, **how)

    def embed(self, ids: Array, positions: Array, run: Pass) -> tuple[Array, tuple]:
        """-> (B, P + T, C). Where `run.past` has the prompt already: (B, T, C)."""
        x, c_text = super().embed(ids, positions, run)  # (B, T, C)
        if run.past is not None and run.past.length:
            return x, (c_text, None)
        prompt, c_prompt = self.prompt()  # (P, C)
        rows, _ = self.ops.residual_forward(prompt, self.params["wpe.weight"][: self.prefix])  # (P, C)
        return before(rows, x), (c_text, c_prompt)

    def embed_backward(self, dx: Array, cache: tuple, grads: dict[str, Array]) -> None:
        c_text, c_prompt = cache
        self.prompt_backward(dx[:, : self.prefix].sum(0), c_prompt, grads)
        super().embed_backward(dx[:, self.prefix :], c_text, grads)

    def head_backward(self, dlogits: Array, cache: tuple, grads: dict[str, Array]) -> Array:
        """The rows of the prompt have no logits: their gradient is 0."""
        dx = super().head_backward(dlogits, cache, grads)  # (B, T, C); of picked rows (N, C)
        if dx.ndim == 3:
            dx = before(np.zeros((self.prefix, dx.shape[2]), dx.dtype), dx)  # (B, P + T, C)
        return dx


class Prefix(_Learned):
    """A GPT with learned keys and values before those of each layer."""

    activation = "tanh"

    def words(self, ids: Array) -> Array:
        """The keys and values of all layers, (P, 2 n_layer C), of the tokens ids (1, P)."""
        past = KVCache(self.base, *ids.shape)
        self.base.forward(ids, past=past, keep=False)
        sides = np.stack([past.keys[:, 0], past.values[:, 0]], 1)  # (n_layer, 2, P, C)
        return sides.transpose(2, 0, 1, 3).reshape(ids.shape[1], -1)

    def forward(self, ids: Array, *, past=None, **how) -> tuple[Array, tuple]:
        if past is not None and past.length:  # `past` has the prefix already
            return super().forward(ids, past=past, **how)
        prompt, c_prompt = self.prompt()
        logits, cache = super().forward(ids, past=_Before(prompt, past, self), **how)
        return logits, (cache, c_prompt)

    def backward(self, dlogits: Array, cache: tuple, grads: dict[str, Array]) -> None:
        c_model, c_prompt = cache
        dprompt = np.zeros((self.prefix, 2 * self.config.n_layer * self.config.n_embd), dlogits.dtype)
        super().backward(dlogits, c_model, {**grads, "prompt": dprompt})
        self.prompt_backward(dprompt, c_prompt, grads)

    def depth(self, name: str) -> int:
        """The parameters of the prompt reach the keys of block 0, and no embedding."""
        return super().depth(name) if name in self.params else 0

    def attend(self, qkv: Array, layer: int, run: Pass) -> tuple[Array, tuple]:
        y, cache = super().attend(qkv, layer, run)
        return y, (cache, layer)

    def attend_backward(self, dy: Array, cache: tuple, grads: dict[str, Array]) -> Array:
        (c, layer), P = cache, self.prefix
        dq, dk, dv = self.ops.attention_backward(dy, c)  # (B, T, C), (B, P + T, C) twice
        for d, place in zip((dk, dv), self.places(layer), strict=True):
            grads["prompt"][:, place] = d[:, :P].sum(0)
        return np.concatenate([dq, dk[:, P:], dv[:, P:]], -1)  # (B, T, 3C)

    def places(self, layer: int) -> tuple[slice, slice]:
        """Where a layer's keys and values are in the prompt."""
        C, at = self.config.n_embd, 2 * self.config.n_embd * layer
        return slice(at, at + C), slice(at + C, at + 2 * C)


class _Before:
    """Learned keys and values as a past. The text's keys and values come after them, and go to a KV cache."""

    length = 0

    def __init__(self, prompt: Array, past, model: Prefix) -> None:
        self.prompt, self.past, self.model = prompt, past, model

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array, Array | None]:
        keys, values = self.model.places(layer)
        k, v = before(self.prompt[:, keys], k), before(self.prompt[:, values], v)  # (B, P + T, C)
        return (k, v, None) if self.past is None else self.past.extend(layer, k, v)


def before(rows: Array, x: Array) -> Array:
    """rows (P, C), equal for the whole batch, before x (B, T, C) -> (B, P + T, C)."""
    return np.concatenate([np.broadcast_to(rows, (len(x), *rows.shape)), x], 1)


def nearest(model: GPT, count: int = 3) -> Array:
    """Ids (P, count) of the tokens whose embeddings have the largest cosine with each row of the learned
    prompt of `model` (p-tuning, prompt tuning)."""
    rows, table = model.prompt()[0], model.params["wte.weight"]
    cosines = rows @ table.T / np.maximum(np.linalg.norm(table, axis=1), 1e-30)  # times each row's length
    return np.argsort(-cosines, axis=1)[:, :count]
