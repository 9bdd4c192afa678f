"""Memory: flat buffers with named views, and arenas, which lend memory to a recorded function (`replay`).

Weights and gradients are one contiguous array each, and a dict of views gives every tensor its name. Each
Adam moment is one array too. So the sum of squares, a model's hash and the distance between two models are
one call each. Every other array has new memory, or a block of an arena. An arena lends a block again once no
Python object holds the array.
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


class Current(threading.local):
    """A value of each thread: None, except within `use`."""

    value = None

    @contextlib.contextmanager
    def use(self, value: object) -> Iterator[None]:
        """In this context `value` is the value of this thread."""
        outer, self.value = self.value, value
        try:
            yield
        finally:
            self.value = outer


current_arena = Current()  # the arena that lends the memory of this thread's new arrays; None: no arena


def empty(shape: tuple[int, ...] | int, dtype: np.dtype | type) -> np.ndarray:
    """np.empty, aligned to a cache line. The memory is a loan of the current arena, if there is one."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if (arena := current_arena.value) is not None:
        return np.ndarray(shape, dtype, arena.lend(size))
    raw = np.empty(size + ALIGN, np.uint8)
    return np.ndarray(shape, dtype, raw, -raw.__array_interface__["data"][0] % ALIGN)


class Arena:
    """Blocks of memory for arrays. A block is lent again once its array and all views of it are gone."""

    def __init__(self) -> None:
        self._loans = weakref.WeakValueDictionary()  # by id
        self.free: list[np.ndarray] = []

    def lend(self, size: int) -> ctypes.Array:
        fits = [n for n, block in enumerate(self.free) if size <= len(block)]
        if fits:
            block = self.free.pop(min(fits, key=lambda n: len(self.free[n])))
        else:
            with current_arena.use(None):
                block = empty(size, np.uint8)
        # The base of an array and of its views is this ctypes object, so the loan lives as long as they do.
        # If the array came from a memoryview, its base would be the block, and the loan would end at once.
        loan = (ctypes.c_char * size).from_buffer(block)
        weakref.finalize(loan, self.free.append, block).atexit = False
        self._loans[id(loan)] = loan
        return loan

    def has_lent(self, owner: object) -> bool:
        """Whether this object, the base of an array, is a loan of this arena."""
        return self._loans.get(id(owner)) is owner


def flat(
    shapes: dict[str, tuple[int, ...]], dtype: np.dtype | type
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A buffer of zeros for tensors of these shapes, one after the other, and its views by name."""
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

    def gradients(self, names: Iterable[str] | None = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A flat buffer of zeros and its named views, for the gradients of `names`; None: of all parameters.

        Raises UserError for a name that no parameter has.
        """
        names = set(self.params if names is None else names)
        if strangers := names - set(self.params):
            raise UserError(f"no parameter is called {min(strangers)!r}; {min(self.params)} is one")
        return flat({n: p.shape for n, p in self.params.items() if n in names}, self.flat.dtype)
