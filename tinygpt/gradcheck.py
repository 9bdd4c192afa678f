"""Finite differences judge any forward/backward pair: the reader's own, and this project's.

    out, cache = layernorm_forward(x, g, b)
    dx, dg, db = layernorm_backward(dout, cache)

For a fixed random `dout`, L = sum(dout * out) is a number. Backward claims the gradient of L. The checker
measures the slope of L along d: one element of x after the other, or random directions in a large tensor.

    D(h) = (L(x + h d) - L(x - h d)) / 2h             its error has the order h^2
    T(h) = D(h) + (D(h) - D(4h)) / 15                 the order h^4; the same again gives h^6, and so on

Each estimate combines a finer and a coarser one (Ridders 1982; Numerical Recipes, 5.7). Its uncertainty is

    u = 8 sum_j |dout_j| noise_j / h  +  max(|T - finer|, |T - coarser|)

noise_j is the rounding of output j: eps |out_j|, or more if steps of 1e-10 show more. The sum is over the
outputs that move. An output that moves only for other elements may hide a slope: it counts, with the largest
h. The steps are 1e-3 of the element's size, then smaller and larger ones, by factors of 4, until u is small.
The estimate with the least u is the slope D. If G is the largest |g| of the tensor, the gradient g of an
element is

    wrong         if |g - D| > rtol max(|g|, |D|) + u + 1e-12 G + atol
    not judged    else, if u exceeds 1e-3 max(|g|, |D|) and 1e-6 G and atol
    ok            else

Without "not judged", a large number that is added to the outputs would certify anything. The judgement is
made for several `dout`, which share no random stream with the inputs, and at two points. At a kink, such as
relu at 0, the left and the right slope stay apart as h shrinks; any value between the two is accepted.

What this does not do: second derivatives; float32, whose rounding hides bugs. Inputs are converted to
float64, and a forward that returns float32 is refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from . import contract
from .contract import Array, Inputs, MakeInputs, grad_name, is_float
from .errors import UserError

DOUTS = 4  # upstream gradients at each point; each costs one backward
DIRECTIONS = 4  # through a large tensor
STREAMS = [int.from_bytes(name, "big") for name in (b"point", b"dout", b"direction")]  # nobody else's
SEVERITY = ("ok", "not judged", "missing", "wrong")  # the verdicts


@dataclasses.dataclass(frozen=True)
class Result:
    """The verdict on one gradient, or on a rule of the contract that is broken."""

    name: str  # "dx" is the gradient of the input x
    verdict: str  # one of SEVERITY
    rel_err: float = math.nan  # of the worst element
    index: tuple[int, ...] | None = None  # the worst element
    backward: float = math.nan  # g there
    differences: float = math.nan  # D there
    uncertainty: float = math.nan  # u there
    extent: str = ""  # how many elements were judged one by one
    problem: str = ""  # the broken rule, or why the gradient is not judged
    notes: tuple[str, ...] = ()  # a sentence each

    @property
    def ok(self) -> bool:
        return self.verdict == "ok"

    def badness(self) -> tuple[int, float]:
        return SEVERITY.index(self.verdict), self.rel_err

    def __str__(self) -> str:
        text = f"{self.name}: {self.problem or f'relative error {self.rel_err:.1e}'}"
        if self.index is not None:
            text += f" at {list(self.index)}: backward {self.backward:.6g}, "
            text += f"differences {self.differences:.6g}"
            text += f" +- {self.uncertainty:.1g}" * (self.verdict == "not judged")
        return text + f" ({self.extent})" * bool(self.extent)


def gradcheck(
    forward: Callable, backward: Callable, inputs: Inputs | MakeInputs, rtol: float = 1e-6, atol: float = 0.0,
    *, seed: int = 0, small: int = 256,
) -> list[Result]:  # fmt: skip
    """Judges every gradient that `backward` returns, and whether the pair keeps the contract.

    forward(*inputs), or forward(**inputs) where `inputs` is a dict -> (out, cache); out is an array, a number
    or a tuple of these. backward(dout, cache) -> the gradients of those inputs that are float arrays, in
    their order, or a dict by name; None or False leaves one out. Other inputs are passed on as they are.

    `inputs` may be a function of a random generator: it then makes both points. Otherwise the second point is
    x (1 + 0.05 r), r uniform in [-1, 1). A tensor of at most `small` elements is judged element by element,
    with 8 to 50 forwards for each; a larger one along random directions.

    Returns a `Result` for each gradient and for each broken rule of the contract (`contract.py`). Raises
    UserError (a ValueError) if nothing can be judged: no float array, no pair, a gradient too many.
    """
    points, *rngs = (np.random.default_rng([seed, stream]) for stream in STREAMS)
    given = inputs(points) if callable(inputs) else inputs
    call = contract.caller(forward, isinstance(given, dict))

    def point(given: Inputs, spread: float) -> dict:
        values = contract.named(forward, given)
        floats = {n: np.array(x, np.float64) for n, x in values.items() if is_float(x)}
        if spread:
            floats = {n: x * (1 + spread * points.uniform(-1, 1, x.shape)) for n, x in floats.items()}
        return values | floats

    with np.errstate(all="ignore"):
        first = point(given, 0)
        results = _check(call, backward, first, rtol, atol, small, *rngs)
        if any(r.verdict == "wrong" for r in results):
            return results
        second = point(inputs(points), 0) if callable(inputs) else point(given, 0.05)
        if not callable(inputs) and (why := contract.outside(call, first, second)):
            note = f"judged at one point alone: at another, 5 % away, {why}"
            return [dataclasses.replace(r, notes=(*r.notes, note)) for r in results[:1]] + results[1:]
        again = {r.name: r for r in _check(call, backward, second, rtol, atol, small, *rngs)}
    return [max(r, again.pop(r.name, r), key=Result.badness) for r in results] + list(again.values())


def assert_gradients(
    forward: Callable, backward: Callable, inputs: Inputs | MakeInputs, rtol: float = 1e-6, atol: float = 0.0,
    *, allow_missing: bool = False, **options,
) -> None:  # fmt: skip
    """`gradcheck` for a test: AssertionError says which gradient is wrong, by how much and at which element.

    A gradient that is not judged fails too. So does a missing one, unless `allow_missing`. The example is a
    product whose second gradient lacks a transpose. The matrices are square, so every shape is right.

    >>> import numpy as np, tinygpt
    >>> def matmul_forward(a, b):
    ...     return a @ b, (a, b)
    >>> def matmul_backward(dout, cache):
    ...     a, b = cache
    ...     return dout @ b.T, a @ dout  # should be a.T @ dout
    >>> inputs = {"a": np.array([[1.0, 2.0], [3.0, 4.0]]), "b": np.ones((2, 2))}
    >>> tinygpt.assert_gradients(matmul_forward, matmul_backward, inputs)
    Traceback (most recent call last):
    AssertionError: db: relative error 7.0e-01 at [0, 0]: backward -0.482453, differences -0.144712 ...
    """
    __tracebackhide__ = True  # pytest then shows the message and the line of the test, not this file
    fine = ("ok", "missing") if allow_missing else ("ok",)
    results = gradcheck(forward, backward, inputs, rtol, atol, **options)
    if failures := [r for r in results if r.verdict not in fine]:
        raise AssertionError("\n".join(line for r in failures for line in (str(r), *r.notes)))


def _check(call: Callable, backward: Callable, values: dict, rtol, atol, small, dout_rng, rng) -> list:
    """The verdict on each gradient at the point `values`."""
    if not any(map(is_float, values.values())):
        raise UserError("no input is a float array: there is nothing to differentiate")
    out, cache, broken = contract.results(call, values)
    grads, douts = {}, dout_rng.standard_normal((DOUTS, contract.vector(out).size))
    if not broken:
        shaped = [contract.like(out, row) for row in douts]
        grads, broken = contract.gradients(backward, shaped, cache, values)
        if not broken and all(g is None for g in grads.values()):
            raise UserError("backward returns no gradient: there is nothing to check")
    results = [Result(name, "wrong", math.inf, problem=problem) for name, problem in broken]
    sizes = {n: _rms(values[n]) * np.abs(g).max(initial=0) for n, g in grads.items() if g is not None}
    for name, g in grads.items():
        x, notes = values[name], []
        if g is None:
            result = Result("", "missing", problem="backward returns no gradient for it")
        elif not np.isfinite(g).all():
            k, *index = np.argwhere(~np.isfinite(g))[0].tolist()
            result = Result("", "wrong", math.inf, problem=f"backward says {g[(k, *index)]} at {index}")
        elif not x.size:
            result = Result("", "ok", 0.0)
        else:
            others = max((size for n, size in sizes.items() if n != name), default=0.0)
            outputs = contract.Outputs(call, values, name)
            judge = _Judge(x, np.float64(g.reshape(DOUTS, -1)), outputs, douts, others, rtol, atol, rng)
            result = judge.elements(np.arange(x.size)) if x.size <= small else judge.directions(small)
            notes += [f"kink at {name}{kink}" for kink in judge.kinks[:1]]
            if g.dtype != np.float64:
                notes += [f"backward returns {g.dtype} for {name}: its rounding counts as an error"]
            if len(x.shape) - x.shape.count(1) > len(set(x.shape) - {1}):
                shape = " x ".join(map(str, x.shape))
                notes.append(f"{name} is {shape}: unequal sizes would show more mistakes with axes")
        results.append(dataclasses.replace(result, name=grad_name(name), notes=tuple(notes)))
    return results


class _Judge:
    """The judgement on the gradient of one input x: `grads` (K, n) has a row for each upstream gradient."""

    def __init__(self, x, grads, outputs: contract.Outputs, douts, others: float, rtol, atol, rng) -> None:
        """douts (K, N). `others`: the largest |g| of another input, times the size of that input."""
        self.x, self.shape, self.grads, self.outputs, self.douts = x.ravel(), x.shape, grads, outputs, douts
        self.rtol, self.atol, self.rng, self.kinks, self.scale = rtol, atol, rng, [], _rms(x)
        self.zero = others / self.scale  # a gradient that is small beside this counts as zero
        size, d, t = np.abs(outputs.base), self.x * rng.choice((-1, 1), x.size), rng.uniform(-1, 1, (12, 1))
        tiny = np.array([outputs(self.x + 1e-10 * step * d) - outputs.base for step in t])  # (12, N)
        near, far = self.sides(1e-3 * d), self.sides(self.scale * rng.standard_normal(x.size))
        self.moved = np.any(tiny, 0) | np.any(near, 0) | np.any(far, 0)
        bends = np.nan_to_num(tiny - t * (t.T @ tiny) / (t.T @ t))  # so near, only noise is no straight line
        self.noise = np.maximum(np.finfo(np.float64).eps * size, 2 * np.abs(bends).max(0))
        movable = 1e-7 * np.abs(near[1]) > 2e-15 * size
        self.single = bool(movable.any()) and np.mean(tiny[:, movable] != 0) < 0.5
        if self.single:  # float64 would show a change of 1e-10
            self.noise = np.finfo(np.float32).eps * size

    def sides(self, step: Array) -> tuple[Array, Array]:
        """out(x) - out(x - step) and out(x + step) - out(x), (N,) each."""
        base = self.outputs.base
        return base - self.outputs(self.x - step), self.outputs(self.x + step) - base

    def rounding(self, moved: Array) -> Array:
        """8 sum |dout_j| noise_j over the outputs that moved, (K,)."""
        return 8 * (np.abs(self.douts[:, moved]) @ self.noise[moved])

    def slope(self, d: Array, least: float, most: float, enough: float) -> tuple[Array, Array]:
        """D and u along d, (K,) each. Steps: 1e-3 of `least`, smaller ones, then larger ones up to `most`."""
        slopes, first, top = {}, 1e-3 * least, 3 + math.ceil(math.log(max(1, 60 * most / least), 4))
        moved = np.any(self.sides(most * d), 0)
        for levels in (range(3), range(-9, 3), range(-9, top)):
            for n in levels:
                if n not in slopes:
                    h = first * 4.0**n
                    step = self.outputs(self.x + h * d) - self.outputs(self.x - h * d)
                    slopes[n], moved = self.douts @ step / (2 * h), moved | (step != 0)
            steps = first * 4.0 ** np.array(levels)[:, None]
            noise = self.rounding(moved) / steps + self.rounding(self.moved & ~moved) / most
            D, u = _extrapolate([slopes[n] for n in levels], noise)
            if (u <= np.maximum(self.rtol / 10 * np.abs(D), enough)).all():
                break
        return D, u

    def compare(self, g: Array, D: Array, u: Array, G: float) -> tuple[Array, Array, Array]:
        """The error, of which rtol is the limit; whether it is wrong; whether all of it is uncertain."""
        gap, top, slack = np.abs(g - D), np.maximum(np.abs(g), np.abs(D)), u + 1e-12 * G + self.atol
        unit = max(G, self.zero if (np.abs(g) <= u).all() else 0)
        certain = u <= np.maximum(np.maximum(1e-3 * top, 1e-6 * unit), self.atol)
        error = gap / np.maximum(top + slack / self.rtol, np.finfo(np.float64).tiny)
        return error, gap > self.rtol * top + slack, ~certain.any(0)

    def elements(self, chosen: Array) -> Result:
        """Judges each of the chosen elements alone."""
        G, g, lines = np.abs(self.grads).max(), self.grads[:, chosen], []
        for i in chosen:
            least, most = sorted((abs(self.x[i]) or self.scale, self.scale))
            lines.append((np.eye(1, self.x.size, i)[0], least, most, 1e-12 * G + self.atol))
        D, u = (np.array(column).T for column in zip(*(self.slope(*line) for line in lines), strict=True))
        error, wrong, uncertain = self.compare(g, D, u, G)
        verdict, score = "ok", error
        for n in np.argsort(-error.max(0)):
            if wrong[:, n].any():
                d, least, most, enough = lines[n]
                again = self.slope(d, 0.6 * least, 0.6 * most, enough)  # other steps must call it wrong too
                if self.compare(g[:, n], *again, G)[1].any() and not self.is_kink(chosen[n], least, g[:, n]):
                    verdict, score = "wrong", wrong * error * (np.arange(len(chosen)) == n)
                    break
                error[:, n] = uncertain[n] = 0
        if verdict == "ok" and uncertain.any():
            verdict, score = "not judged", np.where(uncertain, np.nan_to_num(u, posinf=1e300), -1)
        k, n = np.unravel_index(score.argmax(), score.shape)
        extent = f"{len(chosen):,} of {self.x.size:,} elements one by one"
        return self.result(verdict, error[k, n], (g[k, n], D[k, n], u[k, n]), extent, chosen[n])

    def directions(self, small: int) -> Result:
        """Judges random directions. A wrong one is bisected down to an element, which is judged alone."""
        results = []
        for n in range(DIRECTIONS):
            d, size = self.rng.standard_normal(self.x.size), self.scale
            if n % 2 and self.x.any():
                d, size = d * self.x, 1.0  # each element moves by its own size
            g, G = self.grads @ d, np.linalg.norm(self.grads * d, axis=1).max()
            D, u = self.slope(d, size, size, 1e-12 * G + self.atol)
            error, wrong, uncertain = self.compare(g, D, u, G)
            k = int(np.argmax(np.where(wrong, error, -1) if wrong.any() else error))
            if wrong.any() and self.compare(g, *self.slope(d, 0.6 * size, 0.6 * size, 0), G)[1].any():
                element = self.elements(np.array([self.bisect(d, size, k, abs(g[k] - D[k]))]))
                if element.ok and self.kinks:  # a kink bends every direction
                    element = self.elements(self.rng.choice(self.x.size, small // 4, replace=False))
                    if element.ok:
                        why = "there are kinks along every direction; a sample is right"
                        return dataclasses.replace(element, verdict="not judged", problem=why, index=None)
                if element.verdict == "wrong":
                    return element
                return self.result("wrong", error[k], (g[k], D[k], u[k]), "along a random direction")
            verdict = "not judged" if uncertain.any() else "ok"
            results.append(self.result(verdict, error[k], (g[k], D[k], u[k]), ""))
        judged = [r for r in results if r.ok]
        extent = f"{len(judged)} directions in {self.x.size:,} elements, 0 elements one by one"
        return dataclasses.replace(max(judged or results, key=Result.badness), extent=extent)

    def bisect(self, d: Array, size: float, k: int, gap: float) -> int:
        """The element to which the gap along d leads: of two halves the one with the larger gap."""
        low, high = 0, d.size
        while high - low > 1:
            middle, gaps = (low + high) // 2, []
            for half in (slice(low, middle), slice(middle, high)):
                e = np.zeros(d.size)
                e[half] = d[half]
                gaps.append(abs(self.grads[k] @ e - self.slope(e, size, size, gap / 20)[0][k]))
            low, high = (middle, high) if gaps[0] < gaps[1] else (low, middle)
        return low

    def is_kink(self, i: int, size: float, g: Array) -> bool:
        """Whether g lies between a left and a right slope that stay apart. The kink is noted anyway."""
        steps = 1e-3 * size / 64.0 ** np.arange(3)
        changes = [self.sides(h * np.eye(1, self.x.size, i)[0]) for h in steps]
        slopes = np.array(changes) @ self.douts.T / steps[:, None, None]  # (3 steps, 2 sides, K)
        (left, right), jumps = slopes[-1], np.abs(slopes[:, 1] - slopes[:, 0])
        slack = self.rounding(np.any(changes[0], 0)) / steps[-1] + np.abs(slopes[-1] - slopes[-2]).sum(0)
        k = int(np.argmax(jumps[-1]))
        if not jumps[-1, k] > max(jumps[0, k] / 2, 4 * slack[k]):
            return False
        at = [int(n) for n in np.unravel_index(i, self.shape)]
        self.kinks.append(f"{at} = {self.x[i]:.6g}: left slope {left[k]:.6g}, right slope {right[k]:.6g}")
        return bool(np.all((np.minimum(left, right) - slack <= g) & (g <= np.maximum(left, right) + slack)))

    def result(self, verdict: str, error: float, numbers: tuple, extent: str, i=None) -> Result:
        (g, D, u), problem, largest = map(float, numbers), "", np.abs(self.outputs.base).max()
        if verdict == "wrong":
            error = abs(g - D) / max(abs(g), abs(D))
        elif verdict == "not judged":
            problem = f"outputs as large as {largest:.2g} hide it, or forward is not smooth"
            if self.single:
                problem = "forward does not follow a change of 1e-10: does it compute in float32?"
            elif not math.isfinite(u):
                problem = self.outputs.error or "forward is not finite beside it"
        index = None if i is None else tuple(int(n) for n in np.unravel_index(i, self.shape))
        return Result("", verdict, float(error), index, g, D, u, extent, problem)


def _extrapolate(slopes: list, noise: Array) -> tuple[Array, Array]:
    """The best estimate and its uncertainty, (K,) each, from D(h) of rising steps and their rounding. A large
    step may jump over a bend: after the first T that contradicts smaller steps, no estimate counts."""
    best, least = np.full(noise.shape[1], math.nan), np.full(noise.shape[1], math.inf)
    finer, counts = [], True  # finer: D, T and so on with the last step but one
    for top, D in enumerate(slopes):
        row = [D]
        for m, T in enumerate(finer, 1):
            row.append(T + (T - row[-1]) / (16.0**m - 1))
            u = np.maximum(np.abs(row[m] - T), np.abs(row[m] - row[m - 1])) + noise[top - m]
            agrees = ~(np.abs(row[m] - best) > 3 * least + u)
            counts = counts & (agrees | (m > 1))
            better = (u < least) & agrees & counts
            best, least = np.where(better, row[m], best), np.where(better, u, least)
        finer = row
    return best, least


def _rms(x: Array) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if x.any() else 1.0
