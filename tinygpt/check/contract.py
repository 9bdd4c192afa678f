"""Calls a forward/backward pair for `gradcheck.py`, and holds the pair to the contract of `ops.py`.

The contract: forward returns (out, cache), and the same for the same inputs. Backward called twice gives the
same answer, and is linear in dout. Neither writes to its arguments. Backward does not write to the parameters
of a layer. This file judges no gradient's numbers.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from ..errors import UserError

__tracebackhide__ = True  # for pytest, as in gradcheck.py
Array = np.ndarray
Inputs = dict | list | tuple | Array  # by name, in order, or a single one; each may be a nest of arrays
MakeInputs = Callable[[np.random.Generator], Inputs]
DOUTS = 4  # upstream gradients at each point; each costs one backward
FACTORS = (1024, 2**-20)  # of a multiple of dout; powers of 2: a product with them does not round
FIRST_ONLY = "it is right at the first call only"
SEVERITY = ("ok", "not judged", "missing", "wrong")  # the verdicts


class AdviceError(UserError):
    """A mistake whose remedy takes several lines."""


@dataclasses.dataclass(frozen=True)
class Result:
    """The verdict on one gradient, or on a rule of the contract that is broken."""

    name: str  # "dx" is the gradient of the input x
    verdict: str  # one of SEVERITY
    rel_err: float = math.nan  # wrong: |g - D| / max(|g|, |D|); else rtol |g - D| / the allowed difference
    index: tuple[int, ...] | None = None  # the worst element
    backward: float = math.nan  # g there
    differences: float = math.nan  # D there
    uncertainty: float = math.nan  # u there
    extent: str = ""  # how many elements were judged one by one
    problem: str = ""  # the broken rule, or the reason why the gradient is not judged
    notes: tuple[str, ...] = ()  # a sentence each
    diagnosis: str = ""  # the likely mistake, where the evidence is clear

    @property
    def ok(self) -> bool:
        return self.verdict == "ok"

    def badness(self) -> tuple[int, float]:
        return SEVERITY.index(self.verdict), self.rel_err

    def worse(self, other: Result) -> Result:
        """The worse of two points, with the notes of both: one for each element."""
        notes = {note.split(": ")[0]: note for note in other.notes + self.notes}
        return dataclasses.replace(max(self, other, key=Result.badness), notes=tuple(notes.values()))

    def explained(self, diagnosis: str) -> Result:
        return dataclasses.replace(self, diagnosis=diagnosis * (self.verdict == "wrong"))

    def lines(self) -> list[str]:
        """The lines below the verdict: the diagnosis, and the notes."""
        diagnosis = [f"likely {self.diagnosis}"] * bool(self.diagnosis)
        return diagnosis + [f"note   {note}" for note in self.notes]

    def __str__(self) -> str:
        text, u = f"{self.name}: {self.problem or f'relative error {self.rel_err:.1e}'}", self.uncertainty
        if self.index is not None:
            text += f" at {list(self.index)}: backward {self.backward:.6g}, "
            text += f"differences {self.differences:.6g}" + f" +- {u:.1g}" * (self.verdict == "not judged")
        return text + f" (checked: {self.extent})" * bool(self.extent)


class BrokenError(Exception):
    """A rule of the contract is broken, so that nothing can be compared. Its argument: problems by name."""


# --- nests of arrays ---------------------------------------------------------------------------------------


def is_float(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def as_tuple(value) -> tuple:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def leaves(value, name: str = "", objects: bool = False, above: tuple = ()) -> Iterator[tuple[str, object]]:
    """Path, for example "cache[0]['y']", and value of all leaves in a nest of tuples, lists and dicts.

    `objects`: the fields of dataclasses too. `above`: the nests around `value`. A nest that contains itself
    is not entered again.
    """
    nest = value
    if objects and dataclasses.is_dataclass(value) and not isinstance(value, type):
        nest = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if not isinstance(nest, tuple | list | dict):
        yield name, value
    elif not any(value is other for other in above):
        for key, child in nest.items() if isinstance(nest, dict) else enumerate(nest):
            yield from leaves(child, f"{name}[{key!r}]" if name else str(key), objects, (*above, value))


def rebuilt(value: object, parts: dict, name: str) -> object:
    """The nest `value` with the arrays of `parts`, by path, in place of its own. Other leaves stay."""
    if isinstance(value, dict):
        return {key: rebuilt(child, parts, f"{name}[{key!r}]") for key, child in value.items()}
    if isinstance(value, tuple | list):
        children = [rebuilt(child, parts, f"{name}[{i}]") for i, child in enumerate(value)]
        return type(value)(*children) if hasattr(value, "_fields") else type(value)(children)
    return parts.get(name, value)


def vector(out) -> Array:
    """All outputs in one new vector (N,)."""
    return np.concatenate([np.ravel(np.asarray(o)) for o in as_tuple(out)])


def like(out, vector: Array):
    """The numbers of a vector (N,) in the form of `out`: an array, a number or a tuple of these."""
    ends = np.cumsum([np.size(o) for o in as_tuple(out)])
    parts = zip(np.split(vector, ends[:-1]), as_tuple(out), strict=True)
    shaped = tuple(part.reshape(np.shape(o))[()] for part, o in parts)  # [()]: a number, where out is one
    return shaped if isinstance(out, tuple | list) else shaped[0]


def numbers(name: str, gradient: object) -> Array:
    """A copy of a gradient. Raises UserError unless it is an array of real numbers, or can become one."""
    try:
        array = np.array(gradient)
    except ValueError:  # lists of different lengths
        array = np.array(None)
    if array.dtype.kind not in "fiu":
        raise UserError(f"backward returns {array.dtype} for {name}; it must return numbers")
    return array


# --- a pair ------------------------------------------------------------------------------------------------


def parameters(function: Callable, required: bool = False) -> list[str]:
    """The names of a function's positional parameters; `required`: only those without a default."""
    every = inspect.signature(function).parameters.values()
    positional = [p for p in every if p.kind <= p.POSITIONAL_OR_KEYWORD]
    return [p.name for p in positional if p.default is p.empty or not required]


class Pair:
    """A forward and a backward as functions of their float arrays, by path: "x", or "x['a'][0]" in a nest."""

    def __init__(self, forward: Callable, backward: Callable) -> None:
        self.forward, self.backward, self.notes = forward, backward, []
        self.state: dict[str, Array] = {}  # parameters of a layer, to which backward must not write
        self.contents: list[tuple[Array, Array]] = []  # arrays of a layer, and copies

    def restore(self) -> None:
        """Gives the arrays of a layer their content back."""
        for array, content in self.contents:
            array[...] = content

    def point(self, inputs: Inputs) -> dict[str, Array]:
        """The float arrays among the inputs, by path, as float64 copies."""
        self.by_name, names = isinstance(inputs, dict), parameters(self.forward)
        if self.by_name:  # in the order of forward's parameters
            self.inputs = {name: inputs[name] for name in names if name in inputs} | inputs
        else:
            names += [f"input {i}" for i in range(len(as_tuple(inputs)))]  # for forward(*args)
            self.inputs = dict(zip(names, as_tuple(inputs), strict=False))
        for name, x in leaves(self.inputs):
            if isinstance(x, np.matrix | np.ma.MaskedArray):
                raise UserError(f"{name} is a {type(x).__name__}: pass a plain array")
        self.names = [n for n, x in self.inputs.items() if any(is_float(a) for _, a in leaves(x))]
        return {name: np.array(x, np.float64) for name, x in leaves(self.inputs) if is_float(x)}

    def label(self, name: str) -> str:
        """The name of the gradient of an input."""
        return f"d{name}" if name.split("[")[0].isidentifier() else name

    def advice(self) -> str:
        """The end of a message about the inputs: how to pass a number, such as a scale of 0.5."""
        numbers = [(name, x) for name, x in leaves(self.inputs) if isinstance(x, float)]
        return "".join(f"; {name} is a Python number: pass np.array({x})" for name, x in numbers[:1])

    def __call__(self, values: dict) -> tuple:
        """(out, cache) at a point."""
        args = self.inputs | {name: rebuilt(self.inputs[name], values, name) for name in self.names}
        return self.judgeable(self.forward(**args) if self.by_name else self.forward(*args.values()))

    def judgeable(self, result) -> tuple:
        """(out, cache) as forward returned them. Raises UserError for outputs that are not float64."""
        name = getattr(self.forward, "__name__", "forward")
        if not (isinstance(result, tuple) and len(result) == 2):
            raise UserError(f"{name} must return (out, cache); the cache is what backward needs")
        outs = as_tuple(result[0])
        if not outs or any(isinstance(out, tuple | list | dict) or out is None for out in outs):
            raise UserError(f"{name}: out must be an array, a number or a tuple of these, and no nest")
        for out in outs:
            if (kind := np.asarray(out).dtype) != np.float64:
                raise UserError(f"{name} returns {kind} for float64 inputs: differences need float64")
        return result

    def answer(self, dout, cache, values: dict) -> dict[str, Array | None]:
        """Copies of the gradients that backward returns, by path; None for one that backward leaves out."""
        return self.by_path(self.backward(dout, cache), values)

    def by_path(self, answer, values: dict) -> dict[str, Array | None]:
        """The gradients that backward returned: in the order of the inputs, or a dict by name."""
        names, only = self.names, self.names[0]
        if answer is None:
            end = f"end it with `return {', '.join(map(self.label, names))}`"
            raise UserError(f"backward returns None, there is nothing to check: {end}")
        nest = self.inputs[only] if len(names) == 1 and only not in values else None
        bare = isinstance(nest, list | tuple) and len(as_tuple(answer)) != 1
        if bare or (isinstance(nest, dict) and isinstance(answer, dict) and only not in answer):
            answer = {only: answer}
        if not isinstance(answer, dict):
            answer = as_tuple(answer)
            if len(answer) != len(names):
                raise UserError(
                    f"backward returns {len(answer)} gradient{'s' * (len(answer) != 1)}; float arrays: "
                    f"{', '.join(names)} (write None for one that you leave out){self.advice()}"
                )
            answer = dict(zip(names, answer, strict=True))
        nests = ([(n, g)] if n in values else leaves(g, n) for n, g in answer.items())
        parts = {path: g for nest in nests for path, g in nest}
        left_out = tuple(f"{path}[" for path, g in parts.items() if g is None or g is False)
        due = [n for n in values if not f"{n}[".startswith(left_out)]
        problems = [f"no gradient for {n}" for n in due if n not in parts]
        problems += [f"a gradient for {n}" for n, g in answer.items() if n not in names and g is not None]
        if problems:
            rule = f"it must return numbers for {', '.join(names)}, and a nest of numbers for a nest"
            raise UserError(f"backward returns {problems[0]}; {rule}{self.advice()}")
        return {n: numbers(n, parts[n]) if n in due else None for n in values}


# --- the rules ---------------------------------------------------------------------------------------------


def answers(pair: Pair, values: dict, rng: np.random.Generator) -> tuple[Array, dict[str, tuple]]:
    """The upstream gradients (DOUTS, N), and the answer for each input (see `_answer`).

    Backward is called with each dout, with the first one twice, and with multiples of it. Raises BrokenError
    if forward or backward writes to its arguments, if forward gives two answers, or if backward raises an
    exception when it is called again.
    """
    if not any(x.size for x in values.values()):
        why = "no input is a float array with elements"
        raise UserError(f"{why}: there is nothing to differentiate{pair.advice()}")
    before, first = snapshot(values), vector(pair(values)[0])
    out, cache = pair(values)
    if np.isnan(first).any():
        raise UserError("forward returns nan for these inputs: choose inputs in its domain")
    if names := changed(before):
        raise BrokenError(dict.fromkeys(names, "forward writes to it"))
    if not same(first, vector(out)):
        problem = "forward called twice gives two answers: make its random numbers from a seed"
        raise BrokenError({"out": problem})
    rows = rng.standard_normal((DOUTS, first.size))
    douts = [like(out, row) for row in (rows[0], *rows, *(factor * rows[0] for factor in FACTORS))]
    before = [array for dout in douts for array in snapshot({"dout": dout})]
    before += snapshot({"cache": cache, **values}) + snapshot(pair.state)
    returned: list[dict] = []
    for dout in douts:
        try:
            returned.append(pair.answer(dout, cache, values))
        except Exception as error:
            if not returned:
                raise
            problem = f"backward raises {type(error).__name__} when it is called again ({error}): keep what "
            problem += "forward saved, the checker calls backward several times"
            raise BrokenError({"cache": problem}) from error
        if names := changed(before):
            raise BrokenError(dict.fromkeys(names, "backward writes to it"))
    if all(g is None for g in returned[0].values()):
        raise UserError("backward returns no gradient: there is nothing to check")
    return rows, {n: _answer(pair.label(n), n, x.shape, [r[n] for r in returned]) for n, x in values.items()}


def _answer(label: str, name: str, shape: tuple, grads: list) -> tuple[Array, Result]:
    """The gradients of one input for several dout, (K, *shape) of backward's own dtype, and the broken rule.

    No gradients: there is nothing to compare. A diagnosis holds if the gradients are right all the same.
    """
    first, *row, up, down = grads
    wrong = partial(Result, label, "wrong", math.inf)
    if any(g is None for g in grads):
        return np.array([]), Result(label, "missing", problem="backward returns no gradient for it")
    if others := [g for g in row if g.shape != shape]:
        owner = name if label != name else "its parameter"
        one_shape = len({g.shape for g in row}) == 1
        problem = f"its shape is {others[0].shape}, that of {owner} is {shape}"
        return np.array(row if one_shape else []), wrong(problem=problem)
    if not same(first, row[0], 1e-12):
        problem = "backward called twice gives two answers"
        return first[None], wrong(problem=problem, diagnosis=FIRST_ONLY)
    if not np.isfinite(row).all():
        k, *index = np.argwhere(~np.isfinite(row))[0].tolist()
        return np.array(row), wrong(problem=f"backward says {row[k][tuple(index)]} at {index}")
    linear = all(same(f * np.float64(first), g, 1e-6) for f, g in zip(FACTORS, (up, down), strict=True))
    if linear or first.dtype.itemsize < 4:  # in float16 a multiple may be infinite
        return np.array(row), Result(label, "ok", 0.0)
    if all(same(first, g) for g in (*row, up, down)):
        problem = "backward does not depend on dout: multiply by it (chain rule)"
        return np.array([]), wrong(problem=problem, diagnosis="dout is ignored")
    problem = "backward is not linear in dout: 1024 dout must give 1024 gradients (is dout cut or scaled?)"
    return np.array(row), wrong(problem=problem)


def snapshot(values: dict) -> list[tuple[str, Array, bytes]]:
    """Name, array and content of every array in `values`, for `changed`."""
    return [(name, a, a.tobytes()) for name, a in leaves(values, objects=True)
            if isinstance(a, np.ndarray) and a.dtype.kind != "O"]  # fmt: skip


def changed(snapshot: list[tuple[str, Array, bytes]]) -> list[str]:
    """The names of the arrays that have another content now."""
    return [name for name, array, content in snapshot if array.tobytes() != content]


def same(a: Array, b: Array, rel: float = 0.0) -> bool:
    """Whether a and b are equal, up to `rel` of the largest: two BLAS calls may round differently."""
    a, b = np.float64(a), np.float64(b)
    slack = rel * np.abs(a[np.isfinite(a)]).max(initial=0)
    return a.shape == b.shape and np.allclose(a, b, rtol=0, atol=slack, equal_nan=True)


# --- the second point --------------------------------------------------------------------------------------


def moved(values: dict, rng: np.random.Generator, still: list[str]) -> dict:
    """Arrays at a second point: x (1 + 0.05 r), r uniform in [-1, 1). Zeros, which may hide a term, become
    0.05 r. Of the inputs `still` only a tensor of zeros moves."""
    second = {}
    for name, x in values.items():
        r = 0.05 * rng.uniform(-1, 1, x.shape)
        if not x.any():
            second[name] = np.array(r)
        elif name not in still:
            second[name] = np.array(x * (1 + r))
    return second


def outside(pair: Pair, first: dict, second: dict) -> str:
    """The reason why the second point is not in the domain of forward; empty if it is."""
    try:
        out = vector(pair(second)[0])
    except Exception as error:
        return f"forward raises {type(error).__name__} ({error})"
    leaving = np.isnan(out) | (np.isfinite(vector(pair(first)[0])) & ~np.isfinite(out))
    return "forward is not finite" if leaving.any() else ""


def notes(name: str, x: Array, grad: Array) -> list[str]:
    """Facts about an input and its gradient that are no mistakes; a sentence each."""
    lines, sizes = [], [n for n in x.shape if n > 1]
    if grad.dtype != np.float64:
        lines.append(f"backward returns {grad.dtype} for {name}: its rounding counts as an error")
    if len(set(sizes)) < len(sizes):
        shape = " x ".join(map(str, x.shape))
        lines.append(f"{name} is {shape}: unequal sizes would show more mistakes with axes")
    return lines
