"""Replay: the operations of a function again, without the Python between them.

    loss = recorded(model.loss, model, optimizer.flat)
    loss(ids, targets, weights)      runs the function, and writes its operations down on a tape
    loss(ids, targets, weights)      copies the three inputs to where the first ones were, and runs the tape

Python takes a tenth of the time of a small model's training step, and more of a token's generation. A tape is
an array of calls to the C core. It reads the weights and writes the gradients where they are; results are
copies. All other memory of a tape is lent by an arena, and is used again within the tape.

A function is refused, and then always called as it is, if a replay could give something else: where it has
dropout, which draws other numbers in each call; and where an operation reads or writes an array that is no
input, no weight and no result of an operation, such as a copy of an input. A tape does not see what Python
decides: the function must decide by shapes alone.

The idea is that of CUDA graphs, and of TinyJit in tinygrad.
"""

import ctypes
from collections.abc import Callable
from functools import partial

import numpy as np

from . import kernels
from .memory import Arena, empty
from .model import GPT
from .ops import Array


def recorded(
    function: Callable[..., Array], model: GPT, *memory: Array, pack_after: int | None = None, most: int = 16
) -> Callable[..., Array]:
    """`function`, which is replayed from the second call with inputs of the same shapes and types on.

    The inputs are those arguments that are arrays. memory: the arrays, beside the weights of `model`, that
    the function reads or writes. pack_after: the number of calls after which copies of the weights, in the
    order of their use, are expected to pay; the weights must not change any more. most: how many tapes are
    kept.

    On the NumPy backend the result is `function` itself. Not for several threads at a time.
    """
    if model.ops is not kernels:
        return function
    tapes, arena, calls, packs = {}, Arena(), 0, Packs() if pack_after else None

    def replay(*args, **named) -> Array:
        nonlocal calls
        if kernels.current_tape() is not None:  # the tape of a caller, which must see the operations
            return function(*args, **named)
        calls += 1
        if calls == pack_after:
            packs.fill()
        inputs = {name: a for name, a in [*enumerate(args), *named.items()] if type(a) is np.ndarray}
        weights = model.flat, model.trained.flat
        key = *map(id, weights), *[(name, a.shape, a.dtype.char) for name, a in inputs.items()]
        if (tape := tapes.get(key)) is None:
            held = {name: np.array(a, order="C") for name, a in inputs.items()}
            tape = Tape(held, (*weights, *memory), packs)
            with kernels.write_to(tape), arena.lending():
                args = [held.get(n, a) for n, a in enumerate(args)]
                result = function(*args, **{name: held.get(name, a) for name, a in named.items()})
            tapes[key] = tape
            if len(tapes) > most:
                del tapes[next(iter(tapes))]
            tape.end(result)
            return result.copy()
        if tape.is_whole and tape.run(inputs):
            return tape.result.copy()
        return function(*args, **named)  # and if an id is outside its table, this says which

    return replay


class Packs:
    """Copies of weights in the order in which a multiply reads them. They are read once they are filled."""

    def __init__(self) -> None:
        self.filled, self._pairs = np.zeros(1, np.int32), {}

    def panels(self, b: Array) -> Array:
        """The copy of a weight (K, N); the same weight has one copy."""
        key = b.ctypes.data, b.shape, b.strides
        if key not in self._pairs:
            self._pairs[key] = b, empty(-(-b.shape[1] // 32) * 32 * b.shape[0], b.dtype)
            if self.filled:
                self.fill([key])
        return self._pairs[key][1]

    def fill(self, keys=None) -> None:
        for key in self._pairs if keys is None else keys:
            kernels.pack_panels(*self._pairs[key][::-1])
        self.filled[:] = 1


class Tape:
    """The operations of one call of a function, in order: stretches of calls to the C core, and between them
    operations in NumPy."""

    def __init__(self, inputs: dict, memory: tuple[Array, ...], packs: Packs | None) -> None:
        self.inputs, self.is_whole, self.result = inputs, True, None
        self._steps, self._packs, self._known = [], packs, {}
        self._memory = memory  # as long as the tape has these arrays, no others have their id
        self._know(*memory, *inputs.values())

    def add(self, op: str, call: tuple, fields: tuple) -> None:
        """Takes down a call to the C core: (number of the operation, is_double, its struct)."""
        self._expect(fields)
        self.is_whole &= op != "dropout_forward"
        if not self._steps or callable(self._steps[-1]):
            self._steps.append([])
        self._steps[-1].append(call)

    def add_numpy(self, function: Callable, args: tuple, named: dict, result: object) -> None:
        """Takes down an operation in NumPy, whose arrays a replay fills anew."""
        self._expect([*args, *named.values()])
        results = list(_arrays(result))
        self._know(*results)

        def again() -> None:
            for old, new in zip(results, _arrays(function(*args, **named)), strict=True):
                old[...] = new

        self._steps.append(again if results else partial(function, *args, **named))

    def panels(self, b: Array) -> tuple[Array | None, Array | None]:
        """The copy of a weight b, and whether a multiply is to read it by now; for any other b None, None."""
        if self._packs is None or isinstance(_owner(b), ctypes.Array):
            return None, None
        self._know(self._packs.filled)
        with kernels.write_to(None):
            return self._packs.panels(b), self._packs.filled

    def end(self, result: Array) -> None:
        """Takes the result of the function, after its last operation."""
        self._expect([result])
        self.is_whole &= bool(self._steps)
        self.result = result if self.is_whole else None
        run_all, array = kernels.lib.tinygpt_run_all, partial(kernels.ffi.new, "struct call[]")
        self._replay = [s if callable(s) else partial(run_all, array(s), len(s)) for s in self._steps]

    def run(self, inputs: dict) -> bool:
        """The operations again, with other inputs. False: an id is outside its table."""
        for name, a in inputs.items():
            self.inputs[name][...] = a
        for step in self._replay:
            if status := step():
                if status == 2:
                    return False
                raise MemoryError("the C core")
        return True

    def _know(self, *arrays: Array) -> None:
        self._known |= {id(owner): owner for owner in map(_owner, arrays)}

    def _expect(self, fields) -> None:
        """Refuses the tape where an array among these fields is not known, and not lent by the arena."""
        for a in fields:
            if type(a) is np.ndarray:
                owner = _owner(a)
                self.is_whole &= isinstance(owner, ctypes.Array) or id(owner) in self._known


def _owner(a: Array) -> object:
    """The object that the memory of an array belongs to; a ctypes.Array is a loan of an arena."""
    while isinstance(a.base, np.ndarray):
        a = a.base
    return a if a.base is None else a.base


def _arrays(value: object):
    """The arrays in a result: one, or some in nested tuples."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _arrays(part)
