"""Memory: one flat buffer with named views, and buffers that are used again from step to step.

Weights, gradients and both Adam moments are each one contiguous array; a dict of views gives every tensor its
name. Clipping, the optimizer, hashing a model and measuring how far it moved are then one call each.
"""

import math

import numpy as np

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


class Workspace:
    """Named scratch arrays, made at first use and handed out again at the next.

    `ws("fc", (B, T, 4 * C), dtype)` is the same memory each time: what a model's forward returned from a
    workspace is valid until the next forward in that workspace. Two passes that must live side by side take
    two workspaces.
    """

    def __init__(self) -> None:
        self.records: dict[object, object] = {}  # of work in these buffers; gone when one is replaced
        self._buffers: dict[tuple[str, np.dtype], np.ndarray] = {}
        self._views: dict[tuple, np.ndarray] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        view = self._views.get((name, shape, dtype))
        if view is None:
            size, buffer = math.prod(shape), self._buffers.get((name, dtype))
            if buffer is None or buffer.size < size:
                self._views.clear()  # some are of the buffer that is replaced here
                self.records.clear()  # and these would keep it alive
                buffer = self._buffers[name, dtype] = empty(size, dtype)
            view = self._views[name, shape, dtype] = buffer[:size].reshape(shape)
        return view

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for b in self._buffers.values())
