"""Finite differences judge any forward/backward pair: the reader's own, and this project's.

    out, cache = layernorm_forward(x, g, b)
    dx, dg, db = layernorm_backward(dout, cache)

For a fixed random `dout`, L = sum(dout * out) is a number. Backward claims the gradient of L. The checker
compares each element g of it with the slope D of L, measured with the uncertainty u (`differences.py`). In a
large tensor it compares along random directions. If G is the largest |g| of the tensor, an element is

    wrong         if |g - D| > rtol max(|g|, |D|) + u + 1e-12 G + atol
    not judged    else, if u exceeds 1e-3 |D| and 1e-6 G and atol, and g and D are not both 0
    ok            else

This is done for four `dout`, because a mistake that one `dout` hides shows with another, and at two points.
No `dout` equals an input: their random streams differ. An element is wrong if one `dout` says so with steps
of three sizes. It is not judged if no `dout` can judge it. Otherwise a large constant that is added to the
outputs would make every gradient ok. A tensor may have gradients that are all rounding (every |g| <= u), as
for a bias before a batch norm. There G is the largest |g| of another input, times the size of that input,
divided by the size of this tensor. At a kink, such as relu at 0, the left and the right slope stay apart as
the steps shrink. The checker accepts a gradient between the two. Another gradient is not judged if several
outputs have the kink.

What this does not do: second derivatives; float32, whose rounding hides bugs. Inputs are converted to
float64, and a forward that returns float32 is refused.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np

from ..errors import UserError
from . import contract, diagnosis, layers
from .contract import DOUTS, Array, Inputs, MakeInputs, Result
from .differences import Differences, rms

__tracebackhide__ = True  # pytest then shows the message and the line of the test, not this file
DIRECTIONS = 4  # through a large tensor
STREAMS = [int.from_bytes(name, "big") for name in (b"point", b"dout", b"direction")]  # nobody else's
KEPT = "it passes at the first inputs and is the same at others: something is kept, or a term is missing"


def gradcheck(
    forward: Callable | object, backward: Callable | Inputs | MakeInputs | None = None,
    inputs: Inputs | MakeInputs | None = None, rtol: float = 1e-6, atol: float = 0.0,
    *, seed: int = 0, small: int = 256,
) -> list[Result]:  # fmt: skip
    """Judges every gradient of gradcheck(forward, backward, inputs), or of a layer, gradcheck(layer, inputs).

    The calls are forward(*inputs), or forward(**inputs) where `inputs` is a dict, and backward(dout, cache).

    Forward returns (out, cache). `out` is an array, a number or a tuple of these. Backward returns the
    gradients of all inputs that are float arrays, in their order, or a dict by name. None or False leaves one
    out. Other inputs are passed on as they are. An input may be a nest of dicts and lists; its gradient is
    such a nest. `layers.py` lists the conventions for layers, whose parameters are checked too. Two methods
    of a layer count as the layer.

    `inputs` may be a function of a random generator: it then makes both points. Otherwise, and if both points
    of the function are equal, the second point is x (1 + 0.05 r), r uniform in [-1, 1). A tensor of zeros
    becomes 0.05 r in all cases. A tensor of at most `small` elements is judged element by element, with 8
    forwards for each, or up to 100 near bends.

    Returns a `Result` for each gradient and for each broken rule of the contract (`contract.py`). Raises
    UserError (a ValueError) if nothing can be judged: no float array, no pair, a gradient too many.
    """
    if not (0 < rtol < math.inf and 0 <= atol < math.inf):
        raise UserError(f"rtol {rtol} must be more than 0, atol {atol} at least 0, and both finite")
    if inputs is None:
        backward, inputs = None, backward
    pair = layers.pair_of(forward, backward)
    with np.errstate(all="ignore"):
        try:
            return _at_two_points(pair, inputs, seed, rtol, atol, small)
        finally:
            pair.restore()


def _at_two_points(pair: contract.Pair, inputs: Inputs | MakeInputs, seed: int, *how) -> list[Result]:
    """The worse verdict of two points on each gradient; if one is wrong at the first, that of the first."""
    points, directions = (np.random.default_rng([seed, STREAMS[n]]) for n in (0, 2))

    def check(values: dict) -> tuple[dict[str, Result], dict[str, Array]]:
        return _check(pair, values, np.random.default_rng([seed, STREAMS[1]]), directions, *how)

    first = pair.point(inputs(points) if callable(inputs) else inputs)
    results, grads = check(first)
    second, notes = pair.point(inputs(points) if callable(inputs) else inputs), pair.notes
    drawn = callable(inputs) and any(not contract.same(first.get(n), x) for n, x in second.items())
    still = [n for n in second if drawn and n.split("[")[0] in pair.inputs]
    second |= contract.moved(second, points, still)
    if why := contract.outside(pair, first, second):
        again, kept, notes = {}, [], [*notes, f"only one point is judged: at a second one {why}"]
    else:
        again, others = check(second)
        kept = [n for n, g in grads.items() if n in others and contract.same(g, others[n])]
    if any(r.verdict == "wrong" for r in results.values()):
        for n, r in results.items():  # a diagnosis must hold at both points
            confirmed = n in again and r.diagnosis in (contract.FIRST_ONLY, again[n].diagnosis)
            results[n] = r.explained(r.diagnosis * confirmed)
    else:
        for n, r in again.items():
            results[n] = results.get(n, r).worse(r.explained(KEPT * (n in kept and results[n].ok)))
    first, *rest = results.values()
    return [dataclasses.replace(first, notes=(*first.notes, *notes)), *rest]


def assert_gradients(*arguments, allow_missing: bool = False, strict: bool = True, **options) -> None:
    """`gradcheck`, with its arguments, for a test. AssertionError names the wrong gradient and element.

    A missing gradient fails too, unless `allow_missing`. So does a gradient that is not judged, if `strict`.
    An array that is not checked is a warning.
    The product below lacks a transpose in its second gradient. The matrices are square: no shape is wrong.

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
    bad = {"wrong", "missing" * (not allow_missing), "not judged" * strict}
    results = gradcheck(*arguments, **options)
    for note in dict.fromkeys(note for r in results for note in r.notes if note.endswith("not checked")):
        warnings.warn(note, stacklevel=2)
    if wrong := [r for r in results if r.verdict in bad]:
        raise AssertionError("\n".join(line for r in wrong for line in (str(r), *r.lines())))


def _check(pair: contract.Pair, values: dict, dout_rng, rng, rtol, atol, small) -> tuple[dict, dict]:
    """The verdict on each gradient at the point `values`, and the gradients for all dout, by input."""
    try:
        douts, answers = contract.answers(pair, values, dout_rng)
    except contract.BrokenError as broken:
        return {n: Result(n, "wrong", math.inf, problem=problem) for n, problem in broken.args[0].items()}, {}
    judged = {n: g for n, (g, result) in answers.items() if result.ok}
    sizes = {n: rms(values[n]) * np.abs(g).max(initial=0) for n, g in judged.items()}
    measured, results = {}, {n: result for n, (_, result) in answers.items()}
    for name, (g, result) in answers.items():
        x, others = values[name], max((size for n, size in sizes.items() if n != name), default=0.0)
        if not x.size or (not result.ok and (x.size > small or not len(g))):
            continue
        slopes = Differences(pair, values, name, douts, rtol, rng)
        if not result.ok:  # for the diagnosis
            measured[name] = slopes.elements(np.arange(x.size), atol)
            continue
        judge = _Judge(result.name, slopes, np.float64(g.reshape(DOUTS, -1)), others, atol)
        result = judge.elements(np.arange(x.size)) if x.size <= small else judge.directions(small)
        notes = (*(f"{name}{note}" for note in judge.notes[:1]), *contract.notes(name, x, g))
        measured[name], results[name] = judge.whole, dataclasses.replace(result, notes=notes)
    whole = {n: m.reshape(2, DOUTS, *values[n].shape) for n, m in measured.items() if m is not None}
    for name, result in results.items():
        if result.verdict == "wrong":
            text = diagnosis.diagnose(name, answers[name][0], whole, result.diagnosis)
            results[name] = result.explained(text)
    return results, judged


class _Judge:
    """The judgement on the gradient of one input: `grads` (K, n) has a row for each upstream gradient."""

    def __init__(self, label: str, slopes: Differences, grads: Array, others: float, atol: float) -> None:
        """others: the largest |g| of another input, times the size of that input."""
        self.label, self.slopes, self.grads, self.rtol, self.atol = label, slopes, grads, slopes.rtol, atol
        self.zero, self.notes = others / slopes.scale, []
        self.whole: Array | None = None  # D and u of all elements, (2, K, n)

    def compare(self, g: Array, D: Array, u: Array, G: float) -> tuple[Array, Array]:
        """|g - D| over its limit, which is wrong above 1, and whether no dout can judge."""
        top = np.maximum(np.abs(g), np.abs(D))
        limit = self.rtol * top + u + 1e-12 * (G + self.zero * (np.abs(D) <= u)) + self.atol
        limit = np.maximum(limit, np.finfo(np.float64).tiny)
        unit = max(G, self.zero if (np.abs(g) <= u + 1e-12 * self.zero).all() else 0)
        certain = (u <= np.maximum(np.maximum(1e-3 * np.abs(D), 1e-6 * unit), self.atol)) | (top == 0)
        return np.nan_to_num(np.abs(g - D) / limit), ~certain.any(0)

    def judged(self, g: Array, G: float, slope: Callable[[float], tuple[Array, Array]]) -> tuple:
        """D, u and the result of `compare`, for the first of three step sizes that does not say wrong."""
        for factor in (1, 0.6, 0.36):
            D, u = slope(factor)
            score, uncertain = self.compare(g, D, u, G)
            if score.max() <= 1:
                break
        return D, u, score, uncertain

    def elements(self, chosen: Array) -> Result:
        """Judges each of the chosen elements alone."""
        G, g, total = np.abs(self.grads).max(), self.grads[:, chosen], self.grads.shape[1]
        enough = 1e-12 * G + self.atol
        D, u = slopes = self.slopes.elements(chosen, enough)
        if len(chosen) == total:
            self.whole = slopes.copy()
        score, uncertain = self.compare(g, D, u, G)
        extent = f"{len(chosen):,} of {total:,} elements one by one"

        def result(verdict: str, n: int) -> Result:
            return self.result(verdict, g[:, n], D[:, n], u[:, n], score[:, n], extent, chosen[n])

        for n in [n for n in np.argsort(-score.max(0)) if score[:, n].max() > 1]:
            slope = partial(self.slopes.element, chosen[n], enough)
            D[:, n], u[:, n], score[:, n], uncertain[n] = self.judged(g[:, n], G, slope)
            if score[:, n].max() > 1:
                place, note = self.slopes.kink(chosen[n], g[:, n])
                self.notes += [note] * bool(note)
                if place not in ("inside", "mixed"):
                    return result("wrong", n)
                score[:, n], uncertain[n] = 0, place == "mixed"
        if uncertain.any():
            return result("not judged", int(np.argmax(uncertain)))
        return result("ok", int(np.argmax(score.max(0))))

    def directions(self, small: int) -> Result:
        """Judges random directions. A wrong one is bisected down to an element, which is judged alone. If
        it is a kink, directions leave out all elements of its value. A sample of them is judged alone."""
        results, x, rng = [], self.slopes.x, self.slopes.rng
        kink, alone, unsure = np.zeros(x.size, bool), 0, []
        while len(results) < DIRECTIONS:
            d, size = np.where(kink, 0, rng.standard_normal(x.size)), self.slopes.scale
            if len(results) % 2 and x.any():
                d, size = d * x, 1.0  # each element moves by its own size
            g, G = self.grads @ d, np.linalg.norm(self.grads * d, axis=1).max()
            slope = partial(self.slopes.slope, d, size, size, 1e-12 * G + self.atol)
            D, u, score, uncertain = self.judged(g, G, slope)
            if score.max() > 1:
                k, kinks = int(score.argmax()), len(self.notes)
                i = self.bisect(d, size, k, g[k] - D[k])
                result = self.elements(np.array([i]))
                if result.verdict != "wrong" and len(self.notes) > kinks and alone <= small:
                    same = np.flatnonzero(x == x[i])
                    sample = rng.choice(same, min(small // 4 + 1, len(same)), replace=False)
                    if len(sample) < len(same):
                        self.notes[kinks] += f"; {len(sample)} of {len(same):,} such elements are judged"
                    kink[same], alone, result = True, alone + len(sample), self.elements(sample)
                    if result.verdict != "wrong":
                        unsure += [result] * (not result.ok)
                        continue
                if result.verdict == "wrong":
                    return result
                return self.result("wrong", g, D, u, score, "a random direction")
            results.append(self.result("not judged" if uncertain else "ok", g, D, u, score, ""))
        if unsure:
            return unsure[0]
        judged = [r for r in results if r.ok]
        extent = f"{len(judged)} random directions, {alone:,} of {x.size:,} elements one by one"
        return dataclasses.replace(max(judged or results, key=Result.badness), extent=extent)

    def bisect(self, d: Array, size: float, k: int, gap: float) -> int:
        """The element that causes the gap along d: of two halves the one with the larger gap."""
        low, high = 0, d.size
        while high - low > 1:
            middle, e = (low + high) // 2, np.zeros(d.size)
            e[low:middle] = d[low:middle]
            left = self.grads[k] @ e - self.slopes.slope(e, size, size, abs(gap) / 20)[0][k]
            first = abs(left) > abs(gap - left)
            low, high, gap = (low, middle, left) if first else (middle, high, gap - left)
        return low

    def result(self, verdict: str, g, D, u, score, extent: str, i: int | None = None) -> Result:
        """The result for an element i or a direction, with the numbers of the worst dout."""
        k, problem = int(np.argmax(np.nan_to_num(u) if verdict == "not judged" else score)), ""
        error = abs(g[k] - D[k]) / max(abs(g[k]), abs(D[k])) if verdict == "wrong" else self.rtol * score[k]
        if verdict == "not judged":
            problem = f"uncertain differences: outputs round by {self.slopes.noise.max():.1g}, or bend; worst"
            problem = problem if math.isfinite(u[k]) else self.slopes.error
        numbers = [float(a[k]) for a in (g, D, u)]
        index = None if i is None else tuple(self.slopes.index(i))
        return Result(self.label, verdict, float(error), index, *numbers, extent, problem)
