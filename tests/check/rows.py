"""More rows than those of `tinygpt gradcheck`: single optional arguments of operations."""

from collections.abc import Iterator
from types import ModuleType

import numpy as np

from tinygpt.check.targets import Pair, project_pairs


def all_pairs(ops: ModuleType, rng: np.random.Generator) -> Iterator[tuple[str, Pair]]:
    """Name and pair of the rows of `tinygpt gradcheck`, and of the rows of this file."""
    yield from project_pairs(ops, rng)
    normal, ids = rng.standard_normal, np.array([[0, 2, 2, 6], [1, 2, 0, 4]])
    x = normal((2, 5, 6))
    yield "embedding, tied head", _tied_embedding(ops, x, ids, normal((7, 6)))
    yield "embedding, frozen", _frozen_embedding(ops, normal((2, 4, 6)), ids, normal((7, 6)))
    yield "linear, tied head", _tied_head(ops, x, normal((7, 6)))
    yield "linear, residual", _beside_a_residual(ops, "linear", x=x, w=normal((6, 3)), b=normal(3))
    yield "layernorm, residual", _beside_a_residual(ops, "layernorm", x=x, g=normal(6), b=normal(6))
    yield "attention, side by side", _side_by_side(ops, normal((2, 5, 18)))
    yield "cross_entropy, masked", _masked_cross_entropy(ops, normal((2, 4, 7)), ids)


def _side_by_side(ops: ModuleType, qkv: np.ndarray) -> Pair:
    """Queries, keys and values as in a model: three views of one array, and so are their gradients."""
    forward = lambda qkv: ops.attention_forward(*(qkv[..., i : i + 6] for i in (0, 6, 12)), 2)  # noqa: E731
    return forward, lambda dout, cache: ops.attention_backward(dout, cache, packed=True), {"qkv": qkv}


def _tied_head(ops: ModuleType, x: np.ndarray, w: np.ndarray) -> Pair:
    """The head writes its gradient through a transposed view of the table's gradient."""

    def backward(dout, cache):
        dw = np.zeros(w.shape)
        return ops.linear_backward(dout, cache, dw=dw.T, db=False)[0], dw

    return lambda x, w: ops.linear_forward(x, w.T), backward, {"x": x, "w": w}


def _tied_embedding(ops: ModuleType, x: np.ndarray, ids: np.ndarray, w: np.ndarray) -> Pair:
    """The table is the head too: the embedding adds its gradient to the head's gradient. A second table shows
    that without `add` the old content of the gradient does not count."""

    def forward(x, w, other):
        logits, c_head = ops.linear_forward(x, w.T)
        rows, c_rows = ops.embedding_forward(ids, w)
        other_rows, c_other = ops.embedding_forward(ids, other)
        return (logits, rows, other_rows), (c_head, c_rows, c_other)

    def backward(douts, caches):
        (dlogits, drows, dother_rows), (c_head, c_rows, c_other) = douts, caches
        dw = np.zeros(w.shape)
        dx, _, _ = ops.linear_backward(dlogits, c_head, dw=dw.T, db=False)
        dw = ops.embedding_backward(drows, c_rows, dw, add=True)
        return dx, dw, ops.embedding_backward(dother_rows, c_other, np.full(w.shape, 7.0))

    return forward, backward, {"x": x, "w": w, "other": 2 * w}


def _frozen_embedding(ops: ModuleType, x: np.ndarray, ids: np.ndarray, w: np.ndarray) -> Pair:
    """With dw=False the embedding computes no gradient of the table, and returns False."""

    def forward(x):
        rows, cache = ops.embedding_forward(ids, w)
        return x + rows, cache

    def backward(dout, cache):
        return dout.copy() if ops.embedding_backward(dout, cache, dw=False) is False else np.zeros(x.shape)

    return forward, backward, {"x": x}


def _beside_a_residual(ops: ModuleType, name: str, **inputs: np.ndarray) -> Pair:
    """The input is an output too. The gradient of this second path is added to the gradient of the input."""
    op_forward, op_backward = getattr(ops, f"{name}_forward"), getattr(ops, f"{name}_backward")

    def forward(x, **weights):
        out, cache = op_forward(x, **weights)
        return (out, x.copy()), cache

    def backward(douts, cache):
        dout, dx = douts
        return op_backward(dout, cache, add=dx)

    return forward, backward, inputs


def _masked_cross_entropy(ops: ModuleType, logits: np.ndarray, targets: np.ndarray) -> Pair:
    """A target of weight 0 has no gradient, even where its logits are not numbers."""
    masked = np.arange(targets.size).reshape(targets.shape) % 3 == 1

    def forward(logits):
        nll, cache = ops.cross_entropy_forward(np.where(masked[..., None], np.nan, logits), targets)
        return np.where(masked, 0, nll), cache

    def backward(dnll, cache):
        return ops.cross_entropy_backward(np.where(masked, 0, dnll), cache)

    return forward, backward, {"logits": logits}
