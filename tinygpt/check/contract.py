"""Calls a forward/backward pair for `gradcheck.py`, and holds the pair to the contract of `ops.py`.

The contract: forward returns (out, cache) and is deterministic; backward called twice gives the same answer;
neither writes to the arrays that it is given. This file does not judge any number.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator

import numpy as np

from ..errors import UserError

__tracebackhide__ = True  # for pytest, as in gradcheck.py
Array = np.ndarray
Inputs = dict | list | tuple | Array  # by name, in order, or a single one; each may be a nest of arrays
FIRST_ONLY = "it is right at the first call only"
MakeInputs = Callable[[np.random.Generator], Inputs]


class AdviceError(UserError):
    """A mistake whose remedy takes several lines."""


def parameters(forward: Callable, required: bool = False) -> list[str]:
    """Names of a function's positional parameters; of those without a default if `required`."""
    every = inspect.signature(forward).parameters.values()
    positional = [p for p in every if p.kind <= p.POSITIONAL_OR_KEYWORD]
    return [p.name for p in positional if p.default is p.empty or not required]


def named(forward: Callable, inputs: Inputs) -> dict:
    """The inputs by name, in the order of forward's parameters; a sequence gets their names."""
    if isinstance(inputs, dict):
        return {name: inputs[name] for name in parameters(forward) if name in inputs} | inputs
    inputs = as_tuple(inputs)
    names = parameters(forward) + [f"input {i}" for i in range(len(inputs))]  # numbers for forward(*args)
    return dict(zip(names, inputs, strict=False))


def is_float(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def leaves(value, name: str = "", objects: bool = False, above: tuple = ()) -> Iterator[tuple[str, object]]:
    """Everything in a nest of tuples, lists and dicts, with its path, as in "cache[0]['y']". `objects`: and
    of dataclasses. `above`: what the value is inside of, as a nest may contain itself."""
    if objects and dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if not isinstance(value, tuple | list | dict):
        yield name, value
    elif not any(value is other for other in above):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(child, f"{name}[{key!r}]" if name else str(key), objects, (*above, value))


def rebuilt(value: object, parts: dict, name: str) -> object:
    """A nest with the arrays of `parts` in place of its own; other things are passed on as they are."""
    if isinstance(value, dict):
        return {key: rebuilt(child, parts, f"{name}[{key!r}]") for key, child in value.items()}
    if isinstance(value, tuple | list):
        children = [rebuilt(child, parts, f"{name}[{i}]") for i, child in enumerate(value)]
        return type(value)(*children) if hasattr(value, "_fields") else type(value)(children)
    return parts.get(name, value)


class Pair:
    """A forward and a backward as functions of their float arrays, by path: "x", or "x['a'][0]" in a nest."""

    def __init__(self, forward: Callable, backward: Callable) -> None:
        self.forward, self.backward = forward, backward
        self.inputs: dict = {}  # by name, as they were given
        self.names: list[str] = []  # of those with a gradient
        self.by_name, self.notes = False, []

    def restore(self) -> None:
        """A pair of functions has no state."""

    def point(self, inputs: Inputs) -> dict[str, Array]:
        """The float arrays among the inputs, by path, as float64 copies."""
        self.inputs, self.by_name = named(self.forward, inputs), isinstance(inputs, dict)
        self.names = [n for n, x in self.inputs.items() if any(is_float(a) for _, a in leaves(x))]
        return {name: np.array(x, np.float64) for name, x in leaves(self.inputs) if is_float(x)}

    def label(self, name: str) -> str:
        """What the gradient of an input is called."""
        return f"d{name}" if name.split("[")[0].isidentifier() else name

    def numbers(self) -> str:
        """What to do with a number that is no array, such as a scale of 0.5."""
        numbers = [(name, x) for name, x in leaves(self.inputs) if isinstance(x, float)]
        return "".join(f"; {name} is a Python number: pass np.array({x})" for name, x in numbers[:1])

    def __call__(self, values: dict) -> tuple:
        """(out, cache) at a point. It refuses all outputs but float64."""
        args = self.inputs | {name: rebuilt(self.inputs[name], values, name) for name in self.names}
        result = self.forward(**args) if self.by_name else self.forward(*args.values())
        return self.judgeable(result)

    def judgeable(self, result) -> tuple:
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
        """What backward returns, by path: copies, and None where backward left one out."""
        return self.by_path(self.backward(dout, cache), values)

    def by_path(self, answer, values: dict) -> dict[str, Array | None]:
        names = self.names
        if answer is None:
            end = f"end it with `return {', '.join(map(self.label, names))}`"
            raise UserError(f"backward returns None, there is nothing to check: {end}")
        if not isinstance(answer, dict):
            one_nest = len(names) == 1 and names[0] not in values and len(as_tuple(answer)) != 1
            answer = (answer,) if one_nest else as_tuple(answer)
            if len(answer) != len(names):
                raise UserError(
                    f"backward returns {len(answer)} gradient{'s' * (len(answer) != 1)}; float arrays: "
                    f"{', '.join(names)} (write None for one that you leave out){self.numbers()}"
                )
            answer = dict(zip(names, answer, strict=True))
        elif len(names) == 1 and names[0] not in answer and isinstance(self.inputs[names[0]], dict):
            answer = {names[0]: answer}
        answer = {n: g for n, g in answer.items() if n not in self.inputs or n in names or g is not None}
        for name in sorted(set(names) ^ set(answer)):
            count = "a" if name in answer else "no"
            keys = f"the keys must be the inputs' names: {', '.join(names)}"
            raise UserError(f"backward returns {count} gradient for {name!r}; {keys}{self.numbers()}")
        nests = ([(n, answer[n])] if n in values else leaves(answer[n], n) for n in names)
        parts = {path: g for nest in nests for path, g in nest}
        for n in values:
            if n not in parts and not any(n.startswith(path) and g is None for path, g in parts.items()):
                raise UserError(f"backward returns no gradient for {n}: that of a nest must be a nest too")
        grads = {n: None if (g := parts.get(n)) is None or g is False else np.array(g) for n in values}
        for name, g in grads.items():
            if g is not None and g.dtype.kind not in "fiu":
                raise UserError(f"backward returns {g.dtype} for {name!r}: a gradient is an array of numbers")
        return grads


def run_twice(pair: Pair, values: dict) -> tuple:
    """(out, cache) at a point, and the rules that forward breaks."""
    if not values:
        raise UserError(f"no input is a float array: there is nothing to differentiate{pair.numbers()}")
    before, first = snapshot(values), vector(pair(values)[0])
    out, cache = pair(values)
    if np.isnan(first).any():
        raise UserError("forward returns nan for these inputs: choose inputs in its domain")
    broken = [(name, "forward writes to it") for name in changed(before)]
    if not broken and not same(first, vector(out)):
        broken = [("out", "forward called twice gives two answers: make its random numbers from a seed")]
    return out, cache, broken


def gradients(pair: Pair, douts: list, cache, values: dict) -> tuple[dict, list[tuple[str, str]], dict]:
    """The gradients by input, one for each of `douts`; the rules that backward breaks; and, by input, answers
    that break a rule, with the diagnosis if all of these are right.

    A gradient is an array (K, *shape) of backward's own dtype, or None where backward leaves it out. Backward
    is called twice with the first dout, and with multiples of it. Where backward writes to what it is given
    there are no gradients: differences would be taken with what was written.
    """
    watched = [array for dout in douts for array in snapshot({"dout": dout})]
    watched += snapshot({"cache": cache, **values})
    answers, broken, odd = [], [], {}
    for dout in (douts[0], *douts):
        try:
            answers.append(pair.answer(dout, cache, values))
        except Exception as error:
            if not answers:
                raise
            problem = f"backward raises {type(error).__name__} when it is called again ({error}): keep what "
            problem += "forward saved, the checker calls backward several times"
            return {}, [("cache", problem)], {}
        if names := changed(watched):
            return {}, [(name, "backward writes to it") for name in names], {}
    first, *answers = answers
    grads, factors = {}, (1024, 2**-20)  # powers of 2: rounding is multiplied too
    scaled = [pair.answer(_scaled(douts[0], factor), cache, values) for factor in factors]
    for name, grad in first.items():
        row, problem, if_right = [answer[name] for answer in answers], "", ""
        if any(g is None for g in (grad, *row)):
            grads[name] = None
            continue
        if any(g.shape != values[name].shape for g in row):
            its = name if pair.label(name) != name else "its parameter"
            problem = f"its shape is {grad.shape}, that of {its} is {values[name].shape}"
        elif not same(np.float64(grad), np.float64(row[0]), rel=1e-12):
            problem = "backward called twice gives two answers"
            row, if_right = [grad], FIRST_ONLY
        elif grad.dtype.itemsize >= 4 and not all(
            same(np.float64(other[name]), factor * np.float64(grad), rel=1e-6)
            for factor, other in zip(factors, scaled, strict=True)
        ):
            problem = "backward is not linear in dout: 1024 dout must give 1024 gradients (is dout cut off?)"
            if all(same(np.float64(other[name]), np.float64(grad)) for other in scaled):
                problem = "backward does not depend on dout: multiply by it (chain rule)"
                row, if_right = [], "dout is ignored"
        if problem:
            broken.append((pair.label(name), problem))
            odd[name] = np.stack(row) if len({g.shape for g in row}) == 1 else [], if_right
        else:
            grads[name] = np.stack(row)
    if not broken and all(g is None for g in grads.values()):
        raise UserError("backward returns no gradient: there is nothing to check")
    return grads, broken, odd


def moved(values: dict, rng: np.random.Generator, still: list[str]) -> dict:
    """Arrays at a second point: x (1 + 0.05 r), r uniform in [-1, 1). Zeros, behind which a term may hide,
    become 0.05 r; of the inputs `still` nothing else moves."""
    r = {n: 0.05 * rng.uniform(-1, 1, x.shape) for n, x in values.items()}
    return {
        n: np.array(values[n] + (values[n] if values[n].any() else 1) * step)
        for n, step in r.items()
        if not (n.split("[")[0] in still and values[n].any())
    }


class Outputs:
    """All outputs of a pair in one vector (N,), as a function of one input, given flat.

    An output that is infinite or nan, and stays so, does not move: it is 0 here. If it does not stay so, or
    if forward raises an exception, it is nan.
    """

    def __init__(self, pair: Pair, values: dict, name: str) -> None:
        self.pair, self.values, self.name = pair, values, name
        self.error = ""  # what forward raised last: a step may lead out of its domain
        out = vector(pair(values)[0])
        self.infinite = ~np.isfinite(out)
        self.infinities, self.base = out[self.infinite], np.where(self.infinite, 0.0, out)

    def __call__(self, x: Array) -> Array:
        x = x.reshape(self.values[self.name].shape)
        try:
            out = vector(self.pair({**self.values, self.name: x})[0])
        except Exception as error:
            self.error = f"forward raises {type(error).__name__} beside it ({error})"
            return np.full(self.base.shape, np.nan)
        if out.size != self.base.size:
            self.error = "forward returns another number of outputs beside it"
            return np.full(self.base.shape, np.nan)
        now = out[self.infinite]
        stays = (now == self.infinities) | (np.isnan(now) & np.isnan(self.infinities))
        out[self.infinite] = np.where(stays, 0.0, np.nan)
        return out

    def noise(self, x: Array, d: Array, rng: np.random.Generator) -> Array:
        """How far rounding moves each output, (N,): its distance from a straight line, as x moves along d.

        Over a step of 1e-10 a smooth function bends by 1e-20 only. An output that mostly stays where it is
        rounds more coarsely (float32 inside forward, a large number added): longer steps measure it again.
        Beside 0 steps may be shorter, as 0 + h does not round: a small number may be added to x.
        After More and Wild, Estimating computational noise, 2011.
        """
        noise = np.finfo(np.float64).eps * np.abs(self.base)
        coarse = self(x + 1e-3 * d) != self.base
        for step in 10.0 ** np.arange(-10 if x.all() else -18, -3, 2):
            line, bend, moves = self(x + step * d) - self.base, 0 * noise, 0 * noise
            for t in rng.uniform(0, 1, 12):  # on one side of x: a kink at x is no noise
                change = self(x + t * step * d) - self.base
                bend, moves = np.fmax(bend, np.abs(change - t * line)), moves + (change != 0)
            noise = np.where(coarse, np.maximum(noise, 2 * bend), noise)
            coarse &= moves < 6
            if not coarse.any():
                break
        return noise


def outside(pair: Pair, first: dict, second: dict) -> str:
    """Why the second point is not in the domain of forward; empty if it is."""
    try:
        out = vector(pair(second)[0])
    except Exception as error:
        return f"forward raises {type(error).__name__} ({error})"
    leaving = np.isnan(out) | (np.isfinite(vector(pair(first)[0])) & ~np.isfinite(out))
    return "forward is not finite" if leaving.any() else ""


def unmoved(pair: Pair, *points: dict) -> set[str]:
    """The gradients that are the same at two points, for one dout."""
    answers = []
    for values in points:
        out, cache = pair(values)
        answers.append(pair.answer(like(out, np.ones(vector(out).size)), cache, values))
    return {pair.label(n) for n, g in answers[0].items() if g is not None and same(g, answers[1][n])}


def snapshot(values: dict) -> list[tuple[str, Array, Array]]:
    """Name, array and a copy of every array in `values`, for `changed`."""
    arrays = [(name, a) for name, a in leaves(values, objects=True)
              if isinstance(a, np.ndarray) and a.dtype.kind != "O"]  # fmt: skip
    return [(name, array, array.copy()) for name, array in arrays]


def changed(snapshot: list[tuple[str, Array, Array]]) -> list[str]:
    """The names of the arrays that are no longer what they were."""
    return [name for name, now, then in snapshot if not same(now, then)]


def same(a: Array, b: Array, rel: float = 0.0) -> bool:
    """Whether a and b are equal, up to `rel` of the largest: two BLAS calls may round differently."""
    if a.shape != b.shape:
        return False
    with np.errstate(invalid="ignore"):
        near = rel > 0 and a.size > 0 and np.abs(a - b).max() <= rel * np.abs(a).max()
    return bool(near) or np.array_equal(a, b, equal_nan=a.dtype.kind in "fcmM")


def vector(out) -> Array:
    """All outputs in one new vector, (N,)."""
    return np.concatenate([np.ravel(np.asarray(o)) for o in as_tuple(out)])


def like(out, vector: Array):
    """The numbers of a vector (N,) in the form of `out`: an array, a number or a tuple of these."""
    parts, at = [], 0
    for o in as_tuple(out):
        shape, size = np.shape(o), np.size(o)
        parts.append(vector[at : at + size].reshape(shape)[()])  # [()]: a number, where out is one
        at += size
    return tuple(parts) if isinstance(out, tuple | list) else parts[0]


def _scaled(dout, factor: float):
    return tuple(factor * d for d in dout) if isinstance(dout, tuple) else factor * dout


def as_tuple(value) -> tuple:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def notes(name: str, x: Array, grad: Array) -> list[str]:
    """What a reader should know of an input and its gradient, though it is no mistake; a sentence each."""
    lines, sizes = [], [n for n in x.shape if n > 1]
    if grad.dtype != np.float64:
        lines.append(f"backward returns {grad.dtype} for {name}: its rounding counts as an error")
    if len(set(sizes)) < len(sizes):
        shape = " x ".join(map(str, x.shape))
        lines.append(f"{name} is {shape}: unequal sizes would show more mistakes with axes")
    return lines


def rms(x: Array) -> float:
    """The root mean square of the finite elements; 1 if all of them are 0."""
    x = np.abs(x[np.isfinite(x)])
    top = x.max(initial=0)
    return float(top * np.sqrt(np.mean(np.square(x / top)))) if top else 1.0

