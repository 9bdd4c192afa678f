"""Memory: one flat buffer with named views into it.

Weights, gradients and both Adam moments are each one contiguous array; a dict of views gives every tensor its
name. Clipping, the optimizer, hashing a model and measuring how far it moved are then one call each.
"""

import math
from collections.abc import Iterable

import numpy as np

from .errors import UserError

ALIGN = 64  # bytes: a cache line, and the widest vector of the C core


def empty(shape: tuple[int, ...] | int, dtype: np.dtype | type) -> np.ndarray:
    """np.empty whose first element lies on a cache line."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    dtype = np.dtype(dtype)
    raw = np.empty(math.prod(shape) * dtype.itemsize + ALIGN, np.uint8)
    skip = -raw.__array_interface__["data"][0] % ALIGN
    return raw[skip : skip + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def flat(
    shapes: dict[str, tuple[int, ...]], dtype: np.dtype | type
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A zeroed buffer that holds tensors of these shapes one after the other, and the named views into it."""
    buffer = empty(sum(map(math.prod, shapes.values())), dtype)
    buffer[:] = 0
    views, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape)
        views[name] = buffer[begin:end].reshape(shape)
    return buffer, views


class Parameters:
    """Named arrays, `params` (name -> view into the buffer `flat`)."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: type) -> None:
        self.flat, self.params = flat(shapes, dtype)

    def gradients(
        self, names: Iterable[str] | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A zeroed flat buffer and its named views for the gradients of `names` (all parameters if None)."""
        names = set(self.params if names is None else names)
        if unknown := names - set(self.params):
            raise UserError(f"no parameter is called {sorted(unknown)[0]!r}; {min(self.params)} is one")
        return flat({n: p.shape for n, p in self.params.items() if n in names}, self.flat.dtype)
