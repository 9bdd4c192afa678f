"""Memory: one flat buffer with named views into it, and the arena of a recording.

Weights, gradients and both Adam moments are each one contiguous array; a dict of views gives every tensor its
name. Clipping, the optimizer, hashing a model and measuring how far it moved are then one call each. Every
other array is made anew, and is valid as long as somebody holds it.
"""

import contextlib
import ctypes
import math
import threading
import weakref
from collections.abc import Iterable, Iterator

import numpy as np

from ..errors import UserError

ALIGN = 64  # bytes: a cache line, and the widest vector of the C core


def empty(shape: tuple[int, ...] | int, dtype: np.dtype | type) -> np.ndarray:
    """np.empty whose first element lies on a cache line."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if (arena := getattr(_lending, "arena", None)) is not None:
        return np.ndarray(shape, dtype, arena.lend(size))
    raw = np.empty(size + ALIGN, np.uint8)
    return np.ndarray(shape, dtype, raw, -raw.__array_interface__["data"][0] % ALIGN)


class Arena:
    """Memory that `empty` lends within `with lending(arena)`. A block is lent again as soon as nobody holds
    the array in it, or a view of that array."""

    def __init__(self) -> None:
        self._loans = weakref.WeakValueDictionary()  # by id
        self.free: list[np.ndarray] = []

    def lend(self, size: int) -> ctypes.Array:
        fits = [n for n, block in enumerate(self.free) if size <= len(block)]
        if fits:
            block = self.free.pop(min(fits, key=lambda n: len(self.free[n])))
        else:
            with lending(None):
                block = empty(size, np.uint8)
        # an object that an array and its views keep alive; of a memoryview NumPy would keep the block alone
        loan = (ctypes.c_char * size).from_buffer(block)
        weakref.finalize(loan, self.free.append, block).atexit = False
        self._loans[id(loan)] = loan
        return loan

    def has_lent(self, owner: object) -> bool:
        """Whether this object, an array's base, is a loan of this arena."""
        return self._loans.get(id(owner)) is owner


@contextlib.contextmanager
def lending(arena: Arena | None) -> Iterator[None]:
    """Within this context, this thread's new arrays are loans of the arena; None: of no arena."""
    outer, _lending.arena = getattr(_lending, "arena", None), arena
    try:
        yield
    finally:
        _lending.arena = outer


_lending = threading.local()


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
