"""Replay: runs the operations of a function again, without the Python code between them.

    loss = recorded(model.loss, model, optimizer.flat)
    loss(ids, targets, weights)      runs the function, and records its operations on a tape
    loss(ids, targets, weights)      copies the three inputs into those of the first call, and runs the tape

Python takes a tenth of the time of a small model's training step, and more of a generation step. A tape is an
array of calls to the C core. A tape reads the weights and writes the gradients in place. The result is a
copy. An arena lends all other memory of a tape, and lends a block again within the tape.

Some functions cannot be replayed; `recorded` then calls them as they are:

- An operation is dropout or AdamW. Their numbers (the seed, the step) differ in each call.
- An operation reads or writes an array that is no input, no weight and no result of an operation. An example
  is a copy of an input.
- The function has no operation.

A tape does not record three things. The function must not do them:

- decide by the numbers of an array
- change an array in place without an operation
- write to an input: the tape has a copy

Training is replayed for GPT-2, GPT-1, and LoRA with alpha = rank. Generation is replayed for all models
except LoRA with another alpha. The other cases compute something in NumPy alone.

The idea is that of CUDA graphs, and of TinyJit in tinygrad.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from . import kernels
from .memory import Arena, current_arena, empty
from .model import GPT
from .ops import Array


def recorded(
    function: Callable[..., Array], model: GPT, *memory: Array, packs: "Packs | None" = None, most: int = 16
) -> Callable[..., Array]:
    """A function with the results of `function`. Its first call with some shapes records a tape.

    A tape is the list of the operations. If the function can be replayed, later calls with these shapes run
    the tape.

    An input is an argument that is an array. Other arguments must be hashable. There is one tape for each
    combination of the inputs' shapes and types and the values of other arguments. `function` must return one
    array. Each call returns a new array.

    - memory: arrays, besides inputs and weights, that exist before the call and that the function uses
    - packs: copies of the weights (`Packs`). The weights must not change after `Packs` makes the copies.
    - most: the number of tapes that are kept. One more tape replaces the tape that was used least recently.

    On the NumPy backend `recorded` returns `function` itself. Only one thread at a time may call the returned
    function.
    """
    if model.ops is not kernels:
        return function
    tapes, arena, weights = {}, Arena(), ()

    def replay(*args, **named) -> Array:
        nonlocal weights
        if kernels.current_tape.value is not None:  # a caller records: its tape needs the operations
            return function(*args, **named)
        if not (weights and weights[0] is model.flat and weights[1] is model.trained.flat):
            tapes.clear()  # their weights are in other memory
            weights = model.flat, model.trained.flat
        arguments = [*enumerate(args), *named.items()]
        inputs = {name: a for name, a in arguments if isinstance(a, np.ndarray)}
        if any(type(a) not in (np.ndarray, np.memmap) for a in inputs.values()):  # a masked array
            return function(*args, **named)
        key = tuple((name, a.shape, a.dtype.char) if name in inputs else (name, a) for name, a in arguments)
        if key in tapes:
            tape = tapes[key] = tapes.pop(key)  # the tape of the latest call is the last one in order
            return tape.run() if tape and tape.accepts(inputs) else function(*args, **named)
        copies = {name: np.array(a, order="C") for name, a in inputs.items()}
        tape = Tape(copies, weights, memory, arena, packs)
        with kernels.current_tape.use(tape), current_arena.use(arena):
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
    """Copies of weights in the order in which a product reads them. Products read them if `ready` is 1.

    Several functions may share the copies.
    """

    def __init__(self, after: int) -> None:
        self.ready, self._copies, self._calls_left = np.zeros(1, np.int32), {}, after

    def panels(self, b: Array, bfloat16: bool) -> Array:
        """The copy of a weight (K, N). Each weight has one copy."""
        key = b.ctypes.data, b.shape, b.strides, bfloat16
        if key not in self._copies:
            with current_arena.use(None), kernels.current_tape.use(None):  # all tapes share the copy
                self._copies[key] = empty(kernels.panels_size(b, bfloat16), b.dtype), b, bfloat16
                if self.ready:
                    kernels.pack_panels(*self._copies[key])
        return self._copies[key][0]

    def count(self) -> None:
        """Counts a call of a recorded function, before the call. The call number `after` makes the copies."""
        self._calls_left -= 1
        if self._calls_left == 0:
            for copy in self._copies.values():
                kernels.pack_panels(*copy)
            self.ready[:] = 1


class Tape:
    """The operations of one call of a function, in order: lists of calls to the C core, and operations in
    NumPy. `is_whole`: whether a replay of the tape gives the results of the function."""

    def __init__(self, inputs: dict, weights: tuple, memory: tuple, arena: Arena, packs: Packs | None):
        self.inputs, self.is_whole, self.result = inputs, True, None
        self._steps, self._checks, self._arena, self._packs, self._owners = [], [], arena, packs, {}
        self._weights = {id(_owner(a)) for a in weights}
        self._know(*weights, *memory, *inputs.values())

    def add(self, op: str, call: tuple, fields: tuple) -> None:
        """Records a call to the C core: (number of the operation, is_double, its struct)."""
        self._expect(fields)
        self.is_whole &= op not in ("dropout_forward", "adamw")  # their numbers differ in each call
        if op == "check_ids" and any(_owner(fields[1]) is a for a in self.inputs.values()):
            self._checks.append(call)  # a replay checks its inputs first, before it changes anything
            return
        if not self._steps or callable(self._steps[-1]):
            self._steps.append([])
        self._steps[-1].append(call)

    def add_numpy(self, function: Callable, args: tuple, named: dict, result: object) -> None:
        """Records an operation in NumPy. A replay writes its results into the same arrays."""
        self._expect(_arrays((*args, *named.values())))
        results = list(_arrays(result))
        self._know(*results)

        def again() -> None:
            for old, new in zip(results, _arrays(function(*args, **named)), strict=True):
                old[...] = new

        self._steps.append(again if results else partial(function, *args, **named))

    def panels(self, b: Array, bfloat16: bool) -> tuple[Array | None, Array | None]:
        """The copy of a weight b, and the flag whether a product reads the copy; None, None for other b."""
        if self._packs is None or id(_owner(b)) not in self._weights:
            return None, None
        panels = self._packs.panels(b, bfloat16)
        self._know(panels, self._packs.ready)
        return panels, self._packs.ready

    def end(self, result: Array) -> None:
        """Ends the tape with the result of the function. Raises TypeError if that is not an array."""
        if type(result) is not np.ndarray:
            raise TypeError(f"recorded: the function must return an array, not {type(result).__name__}")
        self._expect([result])
        self.is_whole &= bool(self._steps)
        self.result = result
        run_all, array = kernels.lib.tinygpt_run_all, partial(kernels.ffi.new, "struct call[]")
        calls = [self._checks, *self._steps]
        self._check, *self._replay = [s if callable(s) else partial(run_all, array(s), len(s)) for s in calls]

    def accepts(self, inputs: dict) -> bool:
        """Copies inputs to the memory of the first ones. Returns False if an id is outside its table."""
        for name, a in inputs.items():
            self.inputs[name][...] = a
        return not self._check()

    def run(self) -> Array:
        """Runs the operations, and returns a copy of the result."""
        for step in self._replay:
            if status := step():
                raise IndexError("a KV cache is full") if status == 2 else MemoryError("the C core")
        return self.result.copy()

    def _know(self, *arrays: Array) -> None:
        self._owners |= {id(owner): owner for owner in map(_owner, arrays)}

    def _expect(self, fields) -> None:
        """The tape is not whole if one of these arrays is neither known nor a loan of the arena."""
        for a in fields:
            if isinstance(a, np.ndarray):
                owner = _owner(a)
                self.is_whole &= id(owner) in self._owners or self._arena.has_lent(owner)


def _owner(a: Array) -> object:
    """The object that owns the memory of an array: an array, or the loan of an arena."""
    while isinstance(a.base, np.ndarray):
        a = a.base
    return a if a.base is None else a.base


def _arrays(value: object):
    """The arrays in a value: the value itself, or those in nested tuples."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _arrays(part)
