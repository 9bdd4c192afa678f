"""Finite differences for any forward/backward pair: the reader's own, and this project's.

    out, cache = layernorm_forward(x, g, b)
    dx, dg, db = layernorm_backward(dout, cache)

For a random `dout`, L = sum(dout * out) is a number, and backward claims to know its gradients. Each is
compared with the slope of L(x + s d) at s = 0:

    D(h) = (L(x + h d) - L(x - h d)) / 2h             wrong by order h^2
    (4 D(h/2) - D(h)) / 3                             wrong by order h^4

where d is one element after the other of a small tensor, and a few random directions in a large one; a
large one that fails is bisected down to an element. Where D(h) and D(h/2) disagree (a kink nearby, a sharp
bend) h shrinks: Ridders 1982, as in Numerical Recipes, section 5.7. The error of a tensor is
max|analytic - numeric| over the larger of max|analytic| and max|numeric|, or over a floor if both are zero.

What this does not do: second derivatives; points on a kink, such as relu at 0, where no difference quotient
is right; float32, whose rounding hides bugs: inputs are converted, a forward that returns float32 is refused.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator

import numpy as np

from .errors import UserError

Array = np.ndarray
Inputs = dict | list | tuple | Array  # by name, in order, or a single one
DIRECTIONS = 8
STEP = 2e-3  # of the tensor's own size: h^4 is then 1e-11, and rounding, 1e-16 / h, stays below it
FLOOR = 1e-4  # of |L| / |x|, the size of an ordinary gradient: rounding in the slope is some 1e-13 of that


@dataclasses.dataclass(frozen=True)
class Result:
    """What was found for one gradient, or a broken rule of the contract, which `problem` then describes."""

    name: str  # "dx" is the gradient of the input x
    rel_err: float
    ok: bool
    index: tuple[int, ...] | None = None  # the worst element; in a large tensor looked for only on failure
    analytic: float = math.nan  # what backward says there
    numeric: float = math.nan  # what the differences say there
    problem: str = ""  # if it is ok all the same: why it was left out; rel_err is then nan

    def __str__(self) -> str:
        text = f"{self.name}: {self.problem or f'relative error {self.rel_err:.1e}'}"
        if self.problem or self.index is None:
            return text
        return f"{text} at {list(self.index)}: backward {self.analytic:.6g}, differences {self.numeric:.6g}"


def gradcheck(
    forward: Callable,
    backward: Callable,
    inputs: Inputs,
    tol: float = 1e-6,
    *,
    seed: int = 0,
    small: int = 256,
) -> list[Result]:
    """Checks every gradient that `backward` returns, and that the pair keeps the contract of `ops.py`.

    forward(*inputs), or forward(**inputs) where `inputs` is a dict -> (out, cache); out is an array, a number
    or a tuple of these. backward(dout, cache) -> the gradients of those inputs that are float arrays, in
    their order, or a dict by name; None or False leaves one out. Other inputs are passed on as they are. A
    tensor of at most `small` elements is checked element by element, in four forwards each.

    The contract: forward is deterministic, backward twice gives the same answer, a gradient has the shape of
    its input, and neither writes to what it is given: where one does, only that is reported.

    Returns a `Result` for each gradient and for each broken rule. Raises UserError (a ValueError) where
    nothing can be checked: no float array among the inputs, no pair or no float64 from forward, a gradient
    too few or too many.
    """
    rng = np.random.default_rng(seed)
    call = _caller(forward, isinstance(inputs, dict))
    values = {n: x.astype(np.float64) if is_float(x) else x for n, x in named(forward, inputs).items()}
    if not any(map(is_float, values.values())):
        raise UserError("no input is a float array: there is nothing to differentiate")
    before = _snapshot(values)
    first = _outs(call(values))
    out, cache = call(values)
    if written := _changed(before):
        return [_broken(name, "forward writes to it") for name in written]
    if not all(map(_same, first, _outs((out, cache)))):
        return [_broken("out", "forward called twice gives two answers: fix its random seed")]
    douts = tuple(rng.standard_normal(o.shape) for o in first)
    grads, results = _gradients(backward, douts if isinstance(out, tuple | list) else douts[0], cache, values)
    if not grads and results:
        return results
    if not any(map(is_float, grads.values())):
        raise UserError("backward returns no gradient: there is nothing to check")

    def difference(name: str, d: Array, h: float) -> float:
        """L(x + h d) - L(x - h d), subtracted before the sum: outputs that did not move add no rounding."""
        plus, minus = (_outs(call({**values, name: values[name] + step * d})) for step in (h, -h))
        return sum(float(np.sum(dout * (a - b))) for dout, a, b in zip(douts, plus, minus, strict=True))

    size = math.hypot(*(float(np.linalg.norm(o * dout)) for o, dout in zip(first, douts, strict=True)))
    for name, grad in grads.items():
        if is_float(grad):
            results.append(_compare(name, values[name], grad, difference, size, tol, small, rng))
        else:
            results.append(Result(_d(name), math.nan, True, problem=f"backward returns {grad} for it"))
    return results


def assert_gradients(
    forward: Callable, backward: Callable, inputs: Inputs, tol: float = 1e-6, **options
) -> None:
    """`gradcheck` for a test: AssertionError says which gradient is wrong, by how much and at which element.

    A product whose second gradient lacks a transpose. The matrices are square, so that every shape is right,
    and it takes differences to see it:

    >>> import numpy as np, tinygpt
    >>> def matmul_forward(a, b):
    ...     return a @ b, (a, b)
    >>> def matmul_backward(dout, cache):
    ...     a, b = cache
    ...     return dout @ b.T, a @ dout  # should be a.T @ dout
    >>> inputs = {"a": np.array([[1.0, 2.0], [3.0, 4.0]]), "b": np.ones((2, 2))}
    >>> tinygpt.assert_gradients(matmul_forward, matmul_backward, inputs)
    Traceback (most recent call last):
    AssertionError: db: relative error 2.2e-01 at [0, 0]: backward 1.40658, differences 2.047
    """
    wrong = [str(result) for result in gradcheck(forward, backward, inputs, tol, **options) if not result.ok]
    if wrong:
        raise AssertionError("\n".join(wrong))


# --- one tensor --------------------------------------------------------------------------------------------


def _compare(name: str, x: Array, grad: Array, difference: Callable, size: float, tol, small, rng) -> Result:
    """One gradient against differences. `size` is |dout * out|: over the size of x it says how large a
    gradient would ordinarily be, and so below what a gradient counts as zero."""
    if grad.shape != x.shape:
        return _broken(_d(name), f"its shape is {grad.shape}, that of {name} is {x.shape}")
    if not np.isfinite(grad).all():
        index = tuple(map(int, np.argwhere(~np.isfinite(grad))[0]))
        return _broken(_d(name), f"backward says {grad[index]} at {list(index)}")
    if not x.size:
        return Result(_d(name), 0.0, True)
    scale = float(np.sqrt(np.mean(np.square(x)))) or 1.0
    floor = FLOOR * size / scale

    def slope(d: Array, doubt: float = 1e-9) -> float:
        return _slope(lambda h: difference(name, d.reshape(x.shape), h), STEP * scale, doubt, floor)

    by_element = x.size <= small
    directions = np.eye(x.size) if by_element else rng.standard_normal((DIRECTIONS, x.size))
    analytic = directions @ grad.ravel()
    for doubt in (1e-5, 1e-9):  # again with more care before saying that something is wrong
        numeric = np.array([slope(d, doubt) for d in directions])
        gap, top = np.abs(analytic - numeric), max(np.abs(analytic).max(), np.abs(numeric).max(), floor)
        rel_err = float(gap.max() / top) if gap.any() else 0.0
        if ok := rel_err <= tol:  # False for nan
            break
    if not by_element and ok:
        return Result(_d(name), rel_err, ok)
    worst = int(gap.argmax()) if by_element else _bisect(grad.ravel(), slope, rng)
    index = tuple(map(int, np.unravel_index(worst, x.shape)))
    found = numeric[worst] if by_element else slope(np.eye(1, x.size, worst)[0])
    return Result(_d(name), rel_err, ok, index, float(grad[index]), float(found))


def _slope(difference: Callable[[float], float], h: float, doubt: float, floor: float) -> float:
    """f'(0), given f(h) - f(-h) as a function of h; nan where f is. The first step at which D(h) and D(h/2)
    differ by no more than `doubt`, relatively, is taken, or the one at which they differ least."""
    best, least = math.nan, math.inf
    for step in (h, h / 16, h / 256, h / 4096):
        coarse, fine = difference(step) / (2 * step), difference(step / 2) / step
        slope, gap = fine + (fine - coarse) / 3, abs(fine - coarse)
        if gap < least:
            best, least = slope, gap
        if least <= doubt * max(abs(slope), floor):
            break
    return best


def _bisect(grad: Array, slope: Callable[[Array], float], rng: np.random.Generator) -> int:
    """An element whose gradient is wrong: of two halves the one with the larger gap, and so on."""
    low, high = 0, grad.size
    while high - low > 1:
        middle, gaps = (low + high) // 2, []
        for half in (slice(low, middle), slice(middle, high)):
            d = np.zeros(grad.size)
            d[half] = rng.standard_normal(half.stop - half.start)
            gaps.append(abs(grad @ d - slope(d)))
        low, high = (low, middle) if gaps[0] >= gaps[1] else (middle, high)
    return low


# --- calling the pair, and its contract --------------------------------------------------------------------


def named(forward: Callable, inputs: Inputs) -> dict:
    """The inputs by name: their own in a dict, those of forward's parameters in a sequence."""
    if isinstance(inputs, dict):
        return dict(inputs)
    inputs = _as_tuple(inputs)
    names = parameters(forward) + [f"input {i}" for i in range(len(inputs))]  # numbers for forward(*args)
    return dict(zip(names, inputs, strict=False))


def parameters(forward: Callable, required: bool = False) -> list[str]:
    """Names of a function's positional parameters; of those without a default if `required`."""
    found = [p for p in inspect.signature(forward).parameters.values() if p.kind <= p.POSITIONAL_OR_KEYWORD]
    return [p.name for p in found if p.default is p.empty or not required]


def is_float(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def arrays(value: object, name: str = "") -> Iterator[tuple[str, Array]]:
    """Every array in a nest of tuples, lists, dicts and dataclasses, with its path, as in "cache[0]"."""
    if isinstance(value, np.ndarray):
        yield name, value
    elif isinstance(value, tuple | list):
        for i, v in enumerate(value):
            yield from arrays(v, f"{name}[{i}]")
    elif isinstance(value, dict):
        for key, v in value.items():
            yield from arrays(v, f"{name}[{key!r}]" if name else key)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from arrays(vars(value), name)


def _caller(forward: Callable, by_name: bool) -> Callable[[dict], tuple]:
    """A function from the inputs by name to (out, cache), which holds `forward` to float64."""
    name = getattr(forward, "__name__", "forward")

    def call(values: dict) -> tuple:
        result = forward(**values) if by_name else forward(*values.values())
        if not (isinstance(result, tuple) and len(result) == 2):
            raise UserError(f"{name} must return (out, cache); the cache is what backward needs")
        for out in _as_tuple(result[0]):
            if (kind := np.asarray(out).dtype) != np.float64:
                raise UserError(f"{name} returns {kind} for float64 inputs: differences need float64")
        return result

    return call


def _gradients(backward: Callable, dout, cache, values: dict) -> tuple[dict, list[Result]]:
    """The gradients by name, and the rules of the contract that backward breaks. Where it writes to what it
    is given there are no gradients: differences would be taken with what was written."""
    before, calls, broken = _snapshot({"dout": dout, "cache": cache, **values}), [], []
    for _ in range(2):
        calls.append(_by_name(backward(dout, cache), values))
        if written := _changed(before):
            return {}, [_broken(name, "backward writes to it") for name in written]
    grads, again = calls
    for name, grad in grads.items():
        if is_float(grad) and not (is_float(again[name]) and _same(grad, again[name], rel=1e-12)):
            broken.append(_broken(_d(name), "backward called twice gives two answers"))
    return grads, broken


def _by_name(result, values: dict) -> dict[str, Array | bool | None]:
    """What backward returned, by input name: copies, and None or False where it left one out."""
    names = [name for name, value in values.items() if is_float(value)]
    if result is None:
        grads = ", ".join(map(_d, names))
        raise UserError(f"backward returns None, there is nothing to check: end it with `return {grads}`")
    if not isinstance(result, dict):
        result = _as_tuple(result)
        if len(result) != len(names):
            raise UserError(
                f"backward returns {len(result)} gradient{'s' * (len(result) != 1)}; float arrays: "
                f"{', '.join(names)} (None means: not to be checked)"
            )
        result = dict(zip(names, result, strict=True))
    for name in sorted(set(names) ^ set(result)):
        found = "a" if name in result else "no"
        raise UserError(f"backward returns {found} gradient for {name!r}; float arrays: {', '.join(names)}")
    return {n: g if g is None or g is False else np.array(g, np.float64) for n, g in result.items()}


def _snapshot(values: dict) -> list[tuple[str, Array, Array]]:
    return [(name, array, array.copy()) for name, array in arrays(values)]


def _changed(snapshot: list[tuple[str, Array, Array]]) -> list[str]:
    return [name for name, now, then in snapshot if not _same(now, then)]


def _same(a: Array, b: Array, rel: float = 0.0) -> bool:
    """Whether a and b are equal, up to `rel` of the largest: two BLAS calls may round differently."""
    if a.shape != b.shape:
        return False
    with np.errstate(invalid="ignore"):
        near = rel > 0 and a.size > 0 and np.abs(a - b).max() <= rel * np.abs(a).max()
    return bool(near) or np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def _broken(name: str, problem: str) -> Result:
    return Result(name, math.inf, False, problem=problem)


def _outs(result: tuple) -> tuple[Array, ...]:
    return tuple(map(np.array, _as_tuple(result[0])))  # copies: the next forward may use the same memory


def _as_tuple(value) -> tuple:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _d(name: str) -> str:
    return f"d{name}" if name.isidentifier() else name
