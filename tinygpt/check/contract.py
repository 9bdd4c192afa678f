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
Inputs = dict | list | tuple | Array  # by name, in order, or a single one
MakeInputs = Callable[[np.random.Generator], Inputs]


def named(forward: Callable, inputs: Inputs) -> dict:
    """The inputs by name, in the order of forward's parameters; a sequence gets their names."""
    if isinstance(inputs, dict):
        return {name: inputs[name] for name in parameters(forward) if name in inputs} | inputs
    inputs = as_tuple(inputs)
    names = parameters(forward) + [f"input {i}" for i in range(len(inputs))]  # numbers for forward(*args)
    return dict(zip(names, inputs, strict=False))


def point(forward: Callable, inputs: Inputs) -> dict:
    """The inputs by name, float arrays as float64 copies."""
    values = named(forward, inputs)
    return {n: np.array(x, np.float64) if is_float(x) else x for n, x in values.items()}


def moved(values: dict, rng: np.random.Generator, zeros_alone: bool) -> dict:
    """Float arrays at a second point: x (1 + 0.05 r), r uniform in [-1, 1). Zeros, behind which a term may
    hide, become 0.05 r; `zeros_alone`: nothing else moves."""
    r = {n: 0.05 * rng.uniform(-1, 1, x.shape) for n, x in values.items() if is_float(x)}
    return {
        n: np.array(values[n] + (values[n] if values[n].any() else 1) * step)
        for n, step in r.items()
        if not (zeros_alone and values[n].any())
    }


def parameters(forward: Callable, required: bool = False) -> list[str]:
    """Names of a function's positional parameters; of those without a default if `required`."""
    every = inspect.signature(forward).parameters.values()
    positional = [p for p in every if p.kind <= p.POSITIONAL_OR_KEYWORD]
    return [p.name for p in positional if p.default is p.empty or not required]


def is_float(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def arrays(value: object, name: str = "", above: tuple = ()) -> Iterator[tuple[str, Array]]:
    """Every array in a nest of tuples, lists, dicts and dataclasses, with its path, as in "cache[0]".
    `above`: what the value is inside of, as a nest may contain itself."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind != "O":
            yield name, value
        return
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if any(value is other for other in above):
        return
    above = (*above, value)
    if isinstance(value, tuple | list):
        for i, v in enumerate(value):
            yield from arrays(v, f"{name}[{i}]", above)
    elif isinstance(value, dict):
        for key, v in value.items():
            yield from arrays(v, f"{name}[{key!r}]" if name else str(key), above)


def caller(forward: Callable, by_name: bool) -> Callable[[dict], tuple]:
    """A function from the inputs by name to (out, cache). It refuses all outputs but float64."""
    name = getattr(forward, "__name__", "forward")

    def call(values: dict) -> tuple:
        result = forward(**values) if by_name else forward(*values.values())
        if not (isinstance(result, tuple) and len(result) == 2):
            raise UserError(f"{name} must return (out, cache); the cache is what backward needs")
        outs = as_tuple(result[0])
        if not outs or any(isinstance(out, tuple | list | dict) or out is None for out in outs):
            raise UserError(f"{name}: out must be an array, a number or a tuple of these, and no nest")
        for out in outs:
            if (kind := np.asarray(out).dtype) != np.float64:
                raise UserError(f"{name} returns {kind} for float64 inputs: differences need float64")
        return result

    return call


def run_twice(call: Callable, values: dict) -> tuple:
    """(out, cache) at a point, and the rules that forward breaks, as (array, rule)."""
    if not any(map(is_float, values.values())):
        raise UserError("no input is a float array: there is nothing to differentiate")
    before, first = snapshot(values), vector(call(values)[0])
    out, cache = call(values)
    if np.isnan(first).any():
        raise UserError("forward returns nan for these inputs: choose inputs in its domain")
    broken = [(name, "forward writes to it") for name in changed(before)]
    if not broken and not same(first, vector(out)):
        broken = [("out", "forward called twice gives two answers: make its random numbers from a seed")]
    return out, cache, broken


def gradients(backward: Callable, douts: list, cache, values: dict) -> tuple[dict, list[tuple[str, str]]]:
    """The gradients by input name, one for each of `douts`, and the rules that backward breaks.

    A gradient is an array (K, *shape) of backward's own dtype, or None where backward leaves it out. Backward
    is called twice with the first dout, and with multiples of it. Where backward writes to what it is given
    there are no gradients: differences would be taken with what was written.
    """
    watched = [array for dout in douts for array in snapshot({"dout": dout})]
    watched += snapshot({"cache": cache, **values})
    answers, broken = [], []
    for dout in (douts[0], *douts):
        try:
            answer = backward(dout, cache)
        except Exception as error:
            if not answers:
                raise
            problem = f"backward raises {type(error).__name__} when it is called again ({error}): keep what "
            problem += "forward saved, the checker calls backward several times"
            return {}, [("cache", problem)]
        answers.append(_by_name(answer, values))
        if names := changed(watched):
            return {}, [(name, "backward writes to it") for name in names]
    first, *answers = answers
    grads, factors = {}, (1024, 2**-20)  # powers of 2: rounding is multiplied too
    scaled = [_by_name(backward(_scaled(douts[0], factor), cache), values) for factor in factors]
    for name, grad in first.items():
        row = [answer[name] for answer in answers]
        if any(g is None for g in (grad, *row)):
            grads[name] = None
            continue
        if any(g.shape != values[name].shape for g in row):
            problem = f"its shape is {grad.shape}, that of {name} is {values[name].shape}"
            broken.append((grad_name(name), problem))
            continue
        if not same(np.float64(grad), np.float64(row[0]), rel=1e-12):
            broken.append((grad_name(name), "backward called twice gives two answers"))
            continue
        if grad.dtype.itemsize >= 4 and not all(
            same(np.float64(other[name]), factor * np.float64(grad), rel=1e-6)
            for factor, other in zip(factors, scaled, strict=True)
        ):
            problem = "backward is not linear in dout: 1024 dout must give 1024 gradients (is dout cut off?)"
            if all(same(np.float64(other[name]), np.float64(grad)) for other in scaled):
                problem = "backward does not depend on dout: multiply by it (chain rule)"
            broken.append((grad_name(name), problem))
            continue
        grads[name] = np.stack(row)
    if not broken and all(g is None for g in grads.values()):
        raise UserError("backward returns no gradient: there is nothing to check")
    return grads, broken


def _by_name(result, values: dict) -> dict[str, Array | None]:
    """What backward returned, by input name: copies, and None where backward left one out."""
    names = [name for name, value in values.items() if is_float(value)]
    if result is None:
        grads = ", ".join(map(grad_name, names))
        raise UserError(f"backward returns None, there is nothing to check: end it with `return {grads}`")
    if not isinstance(result, dict):
        result = as_tuple(result)
        if len(result) != len(names):
            raise UserError(
                f"backward returns {len(result)} gradient{'s' * (len(result) != 1)}; float arrays: "
                f"{', '.join(names)} (write None for one that you leave out; a number is no array)"
            )
        result = dict(zip(names, result, strict=True))
    result = {name: g for name, g in result.items() if name not in values or name in names or g is not None}
    for name in sorted(set(names) ^ set(result)):
        count = "a" if name in result else "no"
        keys = f"the keys must be the inputs' names: {', '.join(names)}"
        raise UserError(f"backward returns {count} gradient for {name!r}; {keys}")
    grads = {name: None if g is None or g is False else np.array(g) for name, g in result.items()}
    for name, g in grads.items():
        if g is not None and g.dtype.kind not in "fiu":
            raise UserError(f"backward returns {g.dtype} for {name!r}: a gradient is an array of numbers")
    return grads


class Outputs:
    """All outputs of a pair in one vector (N,), as a function of one input, given flat.

    An output that is infinite or nan, and stays so, does not move: it is 0 here. If it does not stay so, or
    if forward raises an exception, it is nan.
    """

    def __init__(self, call: Callable, values: dict, name: str) -> None:
        self.call, self.values, self.name = call, values, name
        self.error = ""  # what forward raised last: a step may lead out of its domain
        out = vector(call(values)[0])
        self.infinite = ~np.isfinite(out)
        self.infinities, self.base = out[self.infinite], np.where(self.infinite, 0.0, out)

    def __call__(self, x: Array) -> Array:
        x = x.reshape(self.values[self.name].shape)
        try:
            out = vector(self.call({**self.values, self.name: x})[0])
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


def outside(call: Callable, first: dict, second: dict) -> str:
    """Why the second point is not in the domain of forward; empty if it is."""
    try:
        out = vector(call(second)[0])
    except Exception as error:
        return f"forward raises {type(error).__name__} ({error})"
    leaves = np.isnan(out) | (np.isfinite(vector(call(first)[0])) & ~np.isfinite(out))
    return "forward is not finite" if leaves.any() else ""


def snapshot(values: dict) -> list[tuple[str, Array, Array]]:
    """Name, array and a copy of every array in `values`, for `changed`."""
    return [(name, array, array.copy()) for name, array in arrays(values)]


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


def grad_name(name: str) -> str:
    return f"d{name}" if name.isidentifier() else name
