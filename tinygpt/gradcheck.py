"""Finite differences for any forward/backward pair: the reader's own, and this project's.

    out, cache = layernorm_forward(x, g, b)
    dx, dg, db = layernorm_backward(dout, cache)

For a random `dout`, L = sum(dout * out) is a number, and backward claims to know its gradients. Each is compared with

    dL/ds of L(x + s d), at s = 0:    D(h) = (L(x + h d) - L(x - h d)) / 2h        error of order h^2
    two steps, extrapolated:          (4 D(h/2) - D(h)) / 3                        error of order h^4

where d is one element after the other in a small tensor and a few random directions in a large one; a large one that
fails is bisected down to an element. Where D(h) and D(h/2) differ (a kink nearby, strong curvature) h shrinks: Ridders
1982, as in Numerical Recipes, section 5.7. The error of a tensor is max|analytic - numeric| over the largest of both
(or over a floor, for a gradient of zero), the measure of the CS231n notes on gradient checks, taken over a tensor.

What this does not do: second derivatives; points on a kink, such as relu at 0, where no difference quotient is right;
float32, whose rounding would hide the bugs. Inputs are converted, and a forward that returns float32 is refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace

import numpy as np

from .errors import UserError

STEP = 2e-3  # of the tensor's own size; balances h^4 against rounding, 1e-16 / h
FLOOR = 1e-4  # of |L| / |x|, the size a gradient has when nothing special happens; rounding in D is about 1e-13 of it
DIRECTIONS = 8
Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Result:
    """What was found for one gradient, or a broken rule of the contract, which `problem` then describes."""

    name: str  # "dx" is the gradient of the input x
    rel_err: float
    ok: bool
    index: tuple[int, ...] | None = None  # the worst element; in a large tensor, looked for only on failure
    analytic: float = math.nan  # what backward says there
    numeric: float = math.nan  # what the differences say there
    problem: str = ""

    def __str__(self) -> str:
        if self.problem:
            return f"{self.name}: {self.problem}"
        where = f" at {list(self.index)}: backward {self.analytic:.6g}, differences {self.numeric:.6g}"
        return f"{self.name}: relative error {self.rel_err:.1e}" + (where if self.index is not None else "")


def gradcheck(
    forward: Callable, backward: Callable, inputs: dict | list | tuple, tol: float = 1e-6, *, seed: int = 0,
    small: int = 256,
) -> list[Result]:  # fmt: skip
    """Checks every gradient that `backward` returns, and that the pair keeps the contract of `ops.py`.

    forward(*inputs), or forward(**inputs) where `inputs` is a dict -> (out, cache); out is an array, a number or a tuple
    of these. backward(dout, cache) -> the gradients of the inputs that are float arrays, in their order, or a dict by
    name; None or False: not checked. Other inputs are passed on as they are. A tensor of at most `small` elements is
    checked element by element.

    The contract: forward is deterministic; backward twice gives the same answer; neither writes to what it is given.

    Returns one `Result` for each gradient, and one for each broken rule. Raises UserError (a ValueError) where there is
    nothing to check: no float array among the inputs, a forward that does not return a pair or not float64, a gradient
    too many or too few.
    """
    rng = np.random.default_rng(seed)
    values, call = _bind(forward, inputs)
    before = _copies(values)
    first = _as_tuple(_copies(call(values)[0]))
    out, cache = call(values)
    if written := _changed(before, values):
        return [Result(name, math.inf, False, problem="forward writes to this input") for name in written]
    if any(not _same(a, b) for a, b in zip(first, _as_tuple(out))):
        return [Result("out", math.inf, False, problem="forward called twice gives two answers: fix its random seed")]
    douts = tuple(rng.standard_normal(np.shape(o)) for o in first)
    grads, results = _call_backward(backward, douts if isinstance(out, (tuple, list)) else douts[0], cache, values)
    if not grads:
        raise UserError("backward returned no gradient: there is nothing to check")

    def difference(name: str, d: np.ndarray, h: float) -> float:
        """L(x + h d) - L(x - h d), subtracted before the sum: outputs that did not change add no rounding."""
        ends = (_as_tuple(_copies(call({**values, name: values[name] + step * d})[0])) for step in (h, -h))
        return sum(float(np.sum(dout * (a - b))) for dout, a, b in zip(douts, *ends))

    size = math.hypot(*(float(np.linalg.norm(np.multiply(o, dout))) for o, dout in zip(first, douts)))
    for name, grad in grads.items():
        results.append(_compare(name, values[name], grad, difference, size, tol, small, rng))
    return results


def assert_gradients(
    forward: Callable, backward: Callable, inputs: dict | list | tuple, tol: float = 1e-6, **options
) -> None:
    """`gradcheck` for a test: raises AssertionError that says which gradient is wrong, by how much, at which element.

    A product whose second gradient lacks the transpose. The matrices are square, so every shape is right:

    >>> import numpy as np, tinygpt
    >>> def matmul_forward(a, b):
    ...     return a @ b, (a, b)
    >>> def matmul_backward(dout, cache):
    ...     a, b = cache
    ...     return dout @ b.T, a @ dout  # should be a.T @ dout
    >>> tinygpt.assert_gradients(matmul_forward, matmul_backward, {"a": np.eye(2) + 1, "b": np.ones((2, 2))})
    >>> a = np.array([[1.0, 2.0], [3.0, 4.0]])
    >>> tinygpt.assert_gradients(matmul_forward, matmul_backward, {"a": a, "b": np.ones((2, 2))})
    Traceback (most recent call last):
    AssertionError: db: relative error 3.6e-01 at [1, 1]: backward 2.79742, differences 0.16738
    """
    wrong = [str(result) for result in gradcheck(forward, backward, inputs, tol, **options) if not result.ok]
    if wrong:
        raise AssertionError("\n".join(wrong))


# --- one tensor ------------------------------------------------------------------------------------------------


def _compare(name, x, grad, difference, size, tol, small, rng) -> Result:
    """One gradient against differences. `size` is |dout * out|: with x's own size it says how large a gradient may be
    expected, and so which one is zero."""
    if grad.shape != x.shape:
        return Result(_d(name), math.inf, False, problem=f"shape {grad.shape}, but {name} has shape {x.shape}")
    if not np.isfinite(grad).all():
        index = tuple(map(int, np.argwhere(~np.isfinite(grad))[0]))
        return Result(_d(name), math.inf, False, index, problem=f"{grad[index]} at {list(index)}")
    scale = float(np.sqrt(np.mean(np.square(x)))) if x.any() else 1.0
    floor = FLOOR * size / scale

    def numeric(d: np.ndarray) -> float:
        return _slope(lambda h: difference(name, d.reshape(x.shape), h), STEP * scale, floor)

    by_element = x.size <= small
    rows = np.eye(x.size) if by_element else rng.standard_normal((DIRECTIONS, x.size))
    a, n = rows @ grad.ravel(), np.array([numeric(d) for d in rows])
    if not x.size:
        return Result(_d(name), 0.0, True)
    gap = np.abs(a - n)
    rel_err = float(gap.max() / max(np.abs(a).max(), np.abs(n).max(), floor, np.finfo(float).tiny))
    ok = rel_err <= tol  # False for nan
    worst = None
    if by_element:
        worst = int(gap.argmax())
    elif not ok:
        worst = _bisect(grad.ravel(), numeric, rng)
    if worst is None:
        return Result(_d(name), rel_err, ok)
    said, found = float(grad.flat[worst]), float(n[worst]) if by_element else numeric(np.eye(1, x.size, worst)[0])
    return Result(_d(name), rel_err, ok, tuple(map(int, np.unravel_index(worst, x.shape))), said, found)


def _slope(difference: Callable[[float], float], h: float, floor: float) -> float:
    """The derivative at 0 of a function, given f(h) - f(-h); nan where the function is."""
    best, least = math.nan, math.inf
    for step in (h, h / 16, h / 256, h / 4096):
        coarse, fine = difference(step) / (2 * step), difference(step / 2) / step
        slope, doubt = fine + (fine - coarse) / 3, abs(fine - coarse)
        if doubt < least:
            best, least = slope, doubt
        if least <= 1e-5 * max(abs(slope), floor):
            break
    return best


def _bisect(grad: np.ndarray, numeric: Callable, rng: np.random.Generator) -> int:
    """An element at which the gradient is wrong: the half with the larger gap, along a random direction, and again."""
    low, high = 0, grad.size
    while high - low > 1:
        middle, gaps = (low + high) // 2, []
        for half in (slice(low, middle), slice(middle, high)):
            d = np.zeros(grad.size)
            d[half] = rng.standard_normal(half.stop - half.start)
            gaps.append(abs(grad @ d - numeric(d)))
        low, high = (low, middle) if gaps[0] >= gaps[1] else (middle, high)
    return low


# --- calling the pair, and its contract ------------------------------------------------------------------------


def _named(forward: Callable, inputs: dict | list | tuple) -> dict:
    """The inputs by name: their own in a dict, the names of forward's parameters in a sequence."""
    if isinstance(inputs, dict):
        return dict(inputs)
    try:
        parameters = [p.name for p in inspect.signature(forward).parameters.values() if p.kind != p.VAR_POSITIONAL]
    except (TypeError, ValueError):  # a builtin has no signature
        parameters = []
    names = parameters + [f"input {i}" for i in range(len(parameters), len(inputs))]
    return dict(zip(names, inputs))


def _bind(forward: Callable, inputs: dict | list | tuple) -> tuple[dict, Callable]:
    """The inputs by name, copied, float arrays as float64, and a function that calls `forward` with such values."""

    def call(values: dict) -> tuple:
        result = forward(**values) if isinstance(inputs, dict) else forward(*values.values())
        if not (isinstance(result, tuple) and len(result) == 2):
            raise UserError(f"{_name(forward)} must return (out, cache): cache is what backward needs, perhaps the inputs")
        for out in _as_tuple(result[0]):
            if np.asarray(out).dtype != np.float64:
                kind = np.asarray(out).dtype
                raise UserError(f"{_name(forward)} returns {kind} for float64 inputs: differences need float64 throughout")
        return result

    values = {n: np.array(v, np.float64) if _is_float(v) else _copies(v) for n, v in _named(forward, inputs).items()}
    if not any(map(_is_float, values.values())):
        raise UserError(f"{_name(forward)} has no float array among its inputs: there is nothing to differentiate")
    return values, call


def _call_backward(backward, dout, cache, values) -> tuple[dict[str, np.ndarray], list[Result]]:
    """The gradients by name, and the rules of the contract that backward broke."""
    given = {"dout": dout, "cache": cache, **values}
    before = _copies(given)
    grads = _by_name(backward(dout, cache), values)
    again = _by_name(backward(dout, cache), values)
    broken = [Result(name, math.inf, False, problem="backward writes to it") for name in _changed(before, given)]
    for name, grad in grads.items():
        if not _same(grad, again.get(name), 1e-12):
            broken.append(Result(_d(name), math.inf, False, problem="backward called twice gives two answers"))
    return grads, broken


def _by_name(result, values: dict) -> dict[str, np.ndarray]:
    """What backward returned, as copies by input name, without None and False."""
    names = [n for n, value in values.items() if _is_float(value)]
    if not isinstance(result, dict):
        result = _as_tuple(result)
        if len(result) != len(names):
            raise UserError(f"backward returned {len(result)} gradient(s) for {', '.join(names)}; None means: has none")
        result = dict(zip(names, result))
    if missing := set(names) ^ set(result):
        raise UserError(f"backward's gradients are {', '.join(result)}, the inputs {', '.join(names)}: {missing} differ")
    return {n: np.array(g, np.float64) for n, g in result.items() if g is not None and g is not False}


def _as_tuple(value) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _is_float(value) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def _d(name: str) -> str:
    return f"d{name}" if name.isidentifier() else name


def _name(function: Callable) -> str:
    return getattr(function, "__name__", "forward")


def _same(a, b, tol: float = 0.0) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not tol or not a.size:
        return np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    return bool(np.abs(a - b).max() <= tol * np.abs(a).max()) or np.array_equal(a, b, equal_nan=True)


def _copies(value):
    """The value with every array in it copied; what is neither array nor container is shared."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, (tuple, list)):
        return tuple(map(_copies, value))
    if isinstance(value, dict):
        return {key: _copies(v) for key, v in value.items()}
    return _copies(vars(value)) if _has_fields(value) else value


def _has_fields(value) -> bool:
    return dataclasses.is_dataclass(value) or isinstance(value, SimpleNamespace)
