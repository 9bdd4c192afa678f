"""Replay: the operations of a function again, without the Python between them.

    loss = recorded(model.loss, model, optimizer.flat)
    loss(ids, targets, weights)      runs the function, and writes its operations down on a tape
    loss(ids, targets, weights)      copies the three inputs to where the first ones were, and runs the tape

Python takes a tenth of the time of a small model's training step, and more of a token's generation. A tape is
an array of calls to the C core. It reads the weights and writes the gradients where they are; results are
copies. All other memory of a tape is lent by an arena, and is used again within the tape.

A function is refused, and then always called as it is, where an operation has dropout, which draws other
numbers in each call, and where an operation reads or writes an array that is no input, no weight and no
result of an operation, such as a copy of an input. Three things a tape does not see, and a function must not
do them: decide by the numbers in an array, change an array in place without an operation, and write to an
input, which is a copy.

Replayed are the training of GPT-2, of GPT-1 and of LoRA with alpha = rank, and the generation of all models
but of LoRA with another alpha. The others compute something in NumPy alone.

The idea is that of CUDA graphs, and of TinyJit in tinygrad.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from . import kernels
from .memory import Arena, empty, lending
from .model import GPT
from .ops import Array


def recorded(
    function: Callable[..., Array], model: GPT, *memory: Array, packs: "Packs | None" = None, most: int = 16
) -> Callable[..., Array]:
    """`function`, which is replayed from the second call with inputs of the same shapes and types on.

    The inputs are those arguments that are arrays. Other arguments must be hashable; each value has tapes of
    its own. The result is one array, and a copy where the function was replayed. memory: the arrays, beside
    the weights of `model`, that the function reads or writes. packs: copies of the weights, which must not
    change any more once the copies are made. most: how many tapes are kept.

    On the NumPy backend the result is `function` itself. Not for several threads at a time.
    """
    if model.ops is not kernels:
        return function
    tapes, arena, weights = {}, Arena(), ()

    def replay(*args, **named) -> Array:
        nonlocal weights
        if kernels.current_tape() is not None:  # the tape of a caller, which must see the operations
            return function(*args, **named)
        if not (weights and weights[0] is model.flat and weights[1] is model.trained.flat):
            tapes.clear()  # they read other weights
            weights = model.flat, model.trained.flat
        arguments = [*enumerate(args), *named.items()]
        inputs = {name: a for name, a in arguments if isinstance(a, np.ndarray)}
        if any(type(a) not in (np.ndarray, np.memmap) for a in inputs.values()):  # a masked array
            return function(*args, **named)
        key = tuple((name, a.shape, a.dtype.char) if name in inputs else (name, a) for name, a in arguments)
        if key in tapes:
            tape = tapes[key] = tapes.pop(key)  # the last one used is the last in order
            if tape is None or not tape.right_ids(inputs):
                return function(*args, **named)
            return tape.run()
        copies = {name: np.array(a, order="C") for name, a in inputs.items()}
        tape = Tape(copies, weights, memory, arena, packs)
        with kernels.write_to(tape), lending(arena):
            args = [copies.get(n, a) for n, a in enumerate(args)]
            result = function(*args, **{name: copies.get(name, a) for name, a in named.items()})
        tape.end(result)
        tapes[key] = tape if tape.is_whole else None
        if len(tapes) > most:
            del tapes[next(iter(tapes))]
        result = result.copy()
        if not any(tapes.values()):
            del tape
            arena.free.clear()
        return result

    return replay


class Packs:
    """Copies of weights in the order in which a multiply reads them, made by the `count` number `after`.

    Several functions may share the copies. Multiplies read a copy as soon as it is made.
    """

    def __init__(self, after: int) -> None:
        self.ready, self._copies, self._calls_left = np.zeros(1, np.int32), {}, after

    def panels(self, b: Array, bfloat16: bool) -> Array:
        """The copy of a weight (K, N); the same weight has one copy."""
        key = b.ctypes.data, b.shape, b.strides, bfloat16
        if key not in self._copies:
            with lending(None):  # a copy stays as long as the tapes
                self._copies[key] = empty(kernels.panels_size(b, bfloat16), b.dtype), b, bfloat16
            if self.ready:
                self._pack(*self._copies[key])
        return self._copies[key][0]

    def count(self) -> None:
        """The caller counts each call of a recorded function before the call."""
        self._calls_left -= 1
        if self._calls_left == 0:
            for copy in self._copies.values():
                self._pack(*copy)
            self.ready[:] = 1

    def _pack(self, *copy) -> None:
        with kernels.write_to(None):
            kernels.pack_panels(*copy)


class Tape:
    """The operations of one call of a function, in order: stretches of calls to the C core, and between them
    operations in NumPy."""

    def __init__(
        self, inputs: dict, weights: tuple, memory: tuple, arena: Arena, packs: Packs | None
    ) -> None:
        self.inputs, self.is_whole, self.result = inputs, True, None
        self._steps, self._checks, self._arena, self._packs, self._owners = [], [], arena, packs, {}
        self._weights = {id(_owner(a)) for a in weights}
        self._know(*weights, *memory, *inputs.values())

    def add(self, op: str, call: tuple, fields: tuple) -> None:
        """Takes down a call to the C core: (number of the operation, is_double, its struct)."""
        self._expect(fields)
        self.is_whole &= op not in ("dropout_forward", "adamw")  # whose numbers are others in each call
        if op == "check_ids" and any(_owner(fields[1]) is a for a in self.inputs.values()):
            self._checks.append(call)  # before all else: a replay that is refused has changed nothing
            return
        if not self._steps or callable(self._steps[-1]):
            self._steps.append([])
        self._steps[-1].append(call)

    def add_numpy(self, function: Callable, args: tuple, named: dict, result: object) -> None:
        """Takes down an operation in NumPy, whose arrays a replay fills anew."""
        self._expect(_arrays((*args, *named.values())))
        results = list(_arrays(result))
        self._know(*results)

        def again() -> None:
            for old, new in zip(results, _arrays(function(*args, **named)), strict=True):
                old[...] = new

        self._steps.append(again if results else partial(function, *args, **named))

    def panels(self, b: Array, bfloat16: bool) -> tuple[Array | None, Array | None]:
        """The copy of a weight b, and whether a multiply is to read it by now; for any other b None, None."""
        if self._packs is None or id(_owner(b)) not in self._weights:
            return None, None
        panels = self._packs.panels(b, bfloat16)
        self._know(panels, self._packs.ready)
        return panels, self._packs.ready

    def end(self, result: Array) -> None:
        """Takes the result of the function, after its last operation."""
        if type(result) is not np.ndarray:
            raise TypeError(f"recorded: the function must return an array, not {type(result).__name__}")
        self._expect([result])
        self.is_whole &= bool(self._steps)
        self.result = result
        run_all, array = kernels.lib.tinygpt_run_all, partial(kernels.ffi.new, "struct call[]")
        calls = [self._checks, *self._steps]
        self._check, *self._replay = [s if callable(s) else partial(run_all, array(s), len(s)) for s in calls]

    def right_ids(self, inputs: dict) -> bool:
        """Puts other inputs into the places of the first ones; False if an id is outside its table."""
        for name, a in inputs.items():
            self.inputs[name][...] = a
        return not self._check()

    def run(self) -> Array:
        """The operations again: a copy of the result."""
        for step in self._replay:
            if status := step():
                raise IndexError("a KV cache is full") if status == 2 else MemoryError("the C core")
        return self.result.copy()

    def _know(self, *arrays: Array) -> None:
        self._owners |= {id(owner): owner for owner in map(_owner, arrays)}

    def _expect(self, fields) -> None:
        """Refuses the tape where an array among these fields is not known, and no loan of the arena."""
        for a in fields:
            if isinstance(a, np.ndarray):
                owner = _owner(a)
                self.is_whole &= id(owner) in self._owners or self._arena.has_lent(owner)


def _owner(a: Array) -> object:
    """The object that the memory of an array belongs to: an array, or the loan of an arena."""
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
