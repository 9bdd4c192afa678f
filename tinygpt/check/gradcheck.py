"""Finite differences judge any forward/backward pair: the reader's own, and this project's.

    out, cache = layernorm_forward(x, g, b)
    dx, dg, db = layernorm_backward(dout, cache)

For a fixed random `dout`, L = sum(dout * out) is a number. Backward claims the gradient of L. The checker
measures the slope of L along d: one element of x after the other, or random directions in a large tensor.

    D(h) = (L(x + h d) - L(x - h d)) / 2h             its error has the order h^2
    T(h) = D(h) + (D(h) - D(4h)) / 15                 the order h^4; T(h) and T(4h), with 255, give h^6; ...

Each T combines a finer estimate, that of the smaller step, and a coarser one (Ridders 1982; Numerical
Recipes, 5.7). Its uncertainty is

    u = 8 sum_j |dout_j| noise_j / h  +  max(|T - finer|, |T - coarser|)

noise_j is the rounding of output j, measured. The sum is over the outputs that move. An output that moves
only when another element changes may still have a slope here, too small to see: its rounding counts too,
divided by the largest step. The steps are 1e-3 of the element's size, then smaller and larger ones, by
factors of 4, until u <= rtol |D| / 10. The T with the least u is the slope, called D from here on. If G is
the largest |g| of the tensor, the gradient g of an element is

    wrong         if |g - D| > rtol max(|g|, |D|) + u + 1e-12 G + atol
    not judged    else, if u exceeds 1e-3 |D| and 1e-6 G and atol, and g and D are not both 0
    ok            else

This is done for four `dout`, so that no mistake fits them all, and at two points. No `dout` equals an input:
their random streams differ. An element is wrong if one `dout` says so with steps of three sizes. It is not
judged if no `dout` can judge it. Otherwise a large constant that is added to the outputs would make every
gradient ok. If |g| <= u in a whole tensor, as for a bias before a batch norm, then G is that of the other
inputs (each |g| times the size of its input). At a kink, such as relu at 0, the left and the right slope stay
apart as h shrinks. A gradient between the two is accepted. If it is not between them and several outputs have
the kink, then the element is not judged.

What this does not do: second derivatives; float32, whose rounding hides bugs. Inputs are converted to
float64, and a forward that returns float32 is refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from ..errors import UserError
from . import contract, diagnosis, layers
from .contract import Array, Inputs, MakeInputs

__tracebackhide__ = True  # pytest then shows the message and the line of the test, not this file
DOUTS = 4  # upstream gradients at each point; each costs one backward
DIRECTIONS = 4  # through a large tensor
STREAMS = [int.from_bytes(name, "big") for name in (b"point", b"dout", b"direction")]  # nobody else's
KEPT = "it is right at the first inputs and the same at others: something is kept, or a term is missing"
SEVERITY = ("ok", "not judged", "missing", "wrong")  # the verdicts


@dataclasses.dataclass(frozen=True)
class Result:
    """The verdict on one gradient, or on a rule of the contract that is broken."""

    name: str  # "dx" is the gradient of the input x
    verdict: str  # one of SEVERITY
    rel_err: float = math.nan  # wrong: |g - D| / max(|g|, |D|); else rtol |g - D| / what is allowed
    index: tuple[int, ...] | None = None  # the worst element
    backward: float = math.nan  # g there
    differences: float = math.nan  # D there
    uncertainty: float = math.nan  # u there
    extent: str = ""  # how many elements were judged one by one
    problem: str = ""  # the broken rule, or why the gradient is not judged
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
        """What stands below the verdict: the diagnosis, and the notes."""
        diagnosis = [f"likely {self.diagnosis}"] * bool(self.diagnosis)
        return diagnosis + [f"note   {note}" for note in self.notes]

    def __str__(self) -> str:
        text, u = f"{self.name}: {self.problem or f'relative error {self.rel_err:.1e}'}", self.uncertainty
        if self.index is not None:
            text += f" at {list(self.index)}: backward {self.backward:.6g}, "
            text += f"differences {self.differences:.6g}" + f" +- {u:.1g}" * (self.verdict == "not judged")
        return text + f" (checked: {self.extent})" * bool(self.extent)


def gradcheck(
    forward: Callable | object, backward: Callable | Inputs | MakeInputs | None = None,
    inputs: Inputs | MakeInputs | None = None, rtol: float = 1e-6, atol: float = 0.0,
    *, seed: int = 0, small: int = 256,
) -> list[Result]:  # fmt: skip
    """Judges every gradient of gradcheck(forward, backward, inputs), or of a layer, gradcheck(layer, inputs).

    forward(*inputs), or forward(**inputs) where `inputs` is a dict -> (out, cache); out is an array, a number
    or a tuple of these. backward(dout, cache) -> the gradients of those inputs that are float arrays, in
    their order, or a dict by name; None or False leaves one out. Other inputs are passed on as they are. An
    input may be a nest of dicts and lists; its gradient is such a nest. `layers.py` has the layers that are
    understood, whose parameters are checked too; two methods of a layer are one as well.

    `inputs` may be a function of a random generator: it then makes both points. Otherwise the second point is
    x (1 + 0.05 r), r uniform in [-1, 1). A tensor of zeros becomes 0.05 r in both cases. A tensor of at most
    `small` elements is judged element by element, with 8 forwards for each, or up to 100 near bends.

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
    points, *rngs = (np.random.default_rng([seed, stream]) for stream in STREAMS)
    first = pair.point(inputs(points) if callable(inputs) else inputs)
    results, again, notes = _check(pair, first, *how, *rngs), {}, pair.notes
    wrong = any(r.verdict == "wrong" for r in results)
    second = pair.point(inputs(points) if callable(inputs) else inputs)
    second |= contract.moved(second, points, still=list(pair.inputs) if callable(inputs) else [])
    if why := contract.outside(pair, first, second):
        notes = [*notes, f"only one point is judged: at a second one {why}"]
    else:
        try:
            again = {r.name: r for r in _check(pair, second, *how, *rngs)}
        except Exception:
            if not wrong:
                raise
    if wrong:
        others = {n: (contract.FIRST_ONLY, r.diagnosis) for n, r in again.items()}
        results = [r.explained(r.diagnosis * (r.diagnosis in others.get(r.name, ()))) for r in results]
    else:
        names = contract.unmoved(pair, first, second) if again else ()
        again = {n: r.explained(KEPT * (n in names)) for n, r in again.items()}
        results = [r.worse(again.pop(r.name, r)) for r in results] + list(again.values())
    results[0] = dataclasses.replace(results[0], notes=(*results[0].notes, *notes))
    return results


def assert_gradients(
    forward: Callable | object, backward: Callable | Inputs | MakeInputs | None = None,
    inputs: Inputs | MakeInputs | None = None, rtol: float = 1e-6, atol: float = 0.0,
    *, allow_missing: bool = False, strict: bool = True, **options,
) -> None:  # fmt: skip
    """`gradcheck` for a test: AssertionError says which gradient is wrong, by how much and at which element.

    A missing gradient fails too, unless `allow_missing`; so does one that is not judged, if `strict`. The
    product below lacks a transpose in its second gradient. The matrices are square: no shape is wrong.

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
    if wrong := [r for r in gradcheck(forward, backward, inputs, rtol, atol, **options) if r.verdict in bad]:
        raise AssertionError("\n".join(line for r in wrong for line in (str(r), *r.lines())))


def _check(pair: contract.Pair, values: dict, rtol, atol, small, dout_rng, rng) -> list[Result]:
    """The verdict on each gradient at the point `values`."""
    out, cache, broken = contract.run_twice(pair, values)
    grads, odd, douts = {}, {}, dout_rng.standard_normal((DOUTS, contract.vector(out).size))
    if not broken:
        shaped = [contract.like(out, row) for row in douts]
        grads, broken, odd = contract.gradients(pair, shaped, cache, values)
    results = [Result(name, "wrong", math.inf, problem=problem) for name, problem in broken]
    sizes = {n: contract.rms(values[n]) * np.abs(g).max(initial=0) for n, g in grads.items() if g is not None}
    judges = {}

    def judge(name: str, g: Array) -> Result:
        others = max((size for n, size in sizes.items() if n != name), default=0.0)
        outputs, x = contract.Outputs(pair, values, name), values[name]
        judges[name] = _Judge(x, np.float64(g.reshape(DOUTS, -1)), outputs, douts, others, rtol, atol, rng)
        return judges[name].elements(np.arange(x.size)) if x.size <= small else judges[name].directions(small)

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
            result = judge(name, g)
            notes = [f"{name}{note}" for note in judges[name].notes[:1]] + contract.notes(name, x, g)
        results.append(dataclasses.replace(result, name=pair.label(name), notes=tuple(notes)))
    if any(r.verdict == "wrong" for r in results):
        for name in odd:  # what should it be?
            if 0 < values[name].size <= small:
                judge(name, np.zeros((DOUTS, values[name].size)))
        slopes = {name: judge.whole for name, judge in judges.items() if judge.whole}
        answers = {name: (g, "") for name, g in grads.items() if name in slopes} | odd
        texts = {pair.label(n): diagnosis.diagnose(n, g, slopes, right) for n, (g, right) in answers.items()}
        results = [r.explained(texts.get(r.name, "")) for r in results]
    return results


class _Judge:
    """The judgement on the gradient of one input x: `grads` (K, n) has a row for each upstream gradient."""

    def __init__(self, x, grads, outputs: contract.Outputs, douts, others: float, rtol, atol, rng) -> None:
        """douts (K, N). `others`: the largest |g| of another input, times the size of that input."""
        self.x, self.shape, self.grads, self.outputs, self.douts = x.ravel(), x.shape, grads, outputs, douts
        self.rtol, self.atol, self.rng, self.notes, self.scale = rtol, atol, rng, [], contract.rms(x)
        self.zero, self.whole = others / self.scale, None
        usual = np.isfinite(self.x) & (self.x != 0)
        self.sizes = np.maximum(np.where(usual, np.abs(self.x), min(self.scale, 1)), 1e-30 * self.scale)
        self.noise = outputs.noise(self.x, self.sizes * rng.choice((-1, 1), x.size), rng)
        steps = 1e-3 * self.sizes, self.scale * rng.standard_normal(x.size)
        self.moved = np.any([side != 0 for step in steps for side in self.sides(step)], 0)

    def sides(self, step: Array) -> tuple[Array, Array]:
        """out(x) - out(x - step) and out(x + step) - out(x), (N,) each."""
        base = self.outputs.base
        return base - self.outputs(self.x - step), self.outputs(self.x + step) - base

    def rounding(self, moved: Array) -> Array:
        """8 sum |dout_j| noise_j over the outputs that moved, (K,)."""
        return 8 * (np.abs(self.douts[:, moved]) @ self.noise[moved])

    def slope(self, d: Array, size: float, most: float, enough: float) -> tuple[Array, Array]:
        """D and u along d, (K,) each. Steps: 1e-3 of `size`, smaller ones, then larger ones up to `most`; no
        more of them once u <= enough or u <= rtol |D| / 10."""
        slopes, first, top = {}, 1e-3 * size, 3 + math.ceil(math.log(max(1, 60 * most / size), 4))
        moved, low = np.any(self.sides(most * d), 0), -9 if (self.x * d).any() else -24  # 0 + h is exact
        for levels in (range(3), range(low, 3), range(low, top)):
            for n in set(levels) - slopes.keys():
                h = first * 4.0**n
                step = self.outputs(self.x + h * d) - self.outputs(self.x - h * d)
                slopes[n], moved = self.douts @ step / (2 * h), moved | (step != 0)
            steps = first * 4.0 ** np.array(levels)[:, None]
            noise = self.rounding(moved) / steps + self.rounding(self.moved & ~moved) / most
            D, u = _extrapolate([slopes[n] for n in levels], noise)
            if (u <= np.maximum(self.rtol / 10 * np.abs(D), enough)).all():
                break
        return D, u

    def compare(self, g: Array, D: Array, u: Array, G: float) -> tuple[Array, Array]:
        """|g - D| over its limit, which is wrong above 1, and whether no dout can judge."""
        top = np.maximum(np.abs(g), np.abs(D))
        limit = np.maximum(self.rtol * top + u + 1e-12 * G + self.atol, np.finfo(np.float64).tiny)
        unit = max(G, self.zero if (np.abs(g) <= u).all() else 0)
        certain = (u <= np.maximum(np.maximum(1e-3 * np.abs(D), 1e-6 * unit), self.atol)) | (top == 0)
        return np.nan_to_num(np.abs(g - D) / limit), ~certain.any(0)

    def elements(self, chosen: Array) -> Result:
        """Judges each of the chosen elements alone."""
        G, g = np.abs(self.grads).max(), self.grads[:, chosen]
        D, u = np.empty((2, *g.shape))

        def measure(n: int, factor: float) -> None:
            sizes, d = np.sort((self.sizes[chosen[n]], self.scale)), np.eye(1, self.x.size, chosen[n])[0]
            D[:, n], u[:, n] = self.slope(d, *(factor * sizes), 1e-12 * G + self.atol)

        def result(verdict: str, n: int) -> Result:
            extent = f"{len(chosen):,} of {self.x.size:,} elements one by one"
            return self.result(verdict, g[:, n], D[:, n], u[:, n], score[:, n], extent, chosen[n])

        for n in range(len(chosen)):
            measure(n, 1)
        if len(chosen) == self.x.size:
            shape = len(g), *self.shape
            self.whole = D.reshape(shape).copy(), u.reshape(shape).copy()
        score, uncertain = self.compare(g, D, u, G)
        for n in [n for n in np.argsort(-score.max(0)) if score[:, n].max() > 1]:
            for factor in (0.6, 0.36):
                measure(n, factor)
                score[:, n], uncertain[n] = self.compare(g[:, n], D[:, n], u[:, n], G)
                if score[:, n].max() <= 1:
                    break
            else:
                if (kink := self.kink(chosen[n], g[:, n])) not in ("inside", "mixed"):
                    return result("wrong", n)
                score[:, n], uncertain[n] = 0, kink == "mixed"
        if uncertain.any():
            return result("not judged", int(np.argmax(uncertain)))
        return result("ok", int(np.argmax(score.max(0))))

    def directions(self, small: int) -> Result:
        """Judges random directions. A wrong one is bisected down to an element, which is judged alone. If it
        is a kink, directions leave out all elements of its value; a sample of them is judged alone."""
        results, kink, alone = [], np.zeros(self.x.size, bool), 0
        while len(results) < DIRECTIONS:
            d, size = np.where(kink, 0, self.rng.standard_normal(self.x.size)), self.scale
            if len(results) % 2 and self.x.any():
                d, size = d * self.x, 1.0  # each element moves by its own size
            g, G = self.grads @ d, np.linalg.norm(self.grads * d, axis=1).max()
            for factor in (1, 0.6, 0.36):
                D, u = self.slope(d, factor * size, factor * size, 1e-12 * G + self.atol)
                score, uncertain = self.compare(g, D, u, G)
                if score.max() <= 1:
                    break
            else:
                k, kinks = int(score.argmax()), len(self.notes)
                i = self.bisect(d, size, k, g[k] - D[k])
                result = self.elements(np.array([i]))
                if result.ok and len(self.notes) > kinks and alone <= small:
                    same = np.flatnonzero(self.x == self.x[i])
                    sample = self.rng.choice(same, min(small // 4 + 1, len(same)), replace=False)
                    kink[same], alone, result = True, alone + len(sample), self.elements(sample)
                    if result.ok:
                        continue
                if result.verdict == "wrong":
                    return result
                return self.result("wrong", g, D, u, score, "a random direction")
            results.append(self.result("not judged" if uncertain else "ok", g, D, u, score, ""))
        judged = [r for r in results if r.ok]
        extent = f"{len(judged)} random directions, {alone:,} of {self.x.size:,} elements one by one"
        return dataclasses.replace(max(judged or results, key=Result.badness), extent=extent)

    def bisect(self, d: Array, size: float, k: int, gap: float) -> int:
        """The element to which the gap along d leads: of two halves the one with the larger gap."""
        low, high = 0, d.size
        while high - low > 1:
            middle, e = (low + high) // 2, np.zeros(d.size)
            e[low:middle] = d[low:middle]
            left = self.grads[k] @ e - self.slope(e, size, size, abs(gap) / 20)[0][k]
            first = abs(left) > abs(gap - left)
            low, high, gap = (low, middle, left) if first else (middle, high, gap - left)
        return low

    def kink(self, i: int, g: Array) -> str:
        """"inside" if left and right slope stay apart, g between; else "outside", or "mixed" outputs."""
        steps = 1e-3 * self.sizes[i] / 64.0 ** np.arange(3)
        changes = np.array([self.sides(h * np.eye(1, self.x.size, i)[0]) for h in steps])
        parts = changes[:, :, None] * self.douts / steps[:, None, None, None]  # (3 steps, 2 sides, K, N)
        slopes = parts.sum(-1)
        (left, right), jumps = slopes[-1], np.abs(slopes[:, 1] - slopes[:, 0])
        slack = self.rounding(np.any(changes[0], 0)) / steps[-1] + np.abs(slopes[-1] - slopes[-2]).sum(0)
        k = int(np.argmax(jumps[-1]))
        if not jumps[-1, k] > max(jumps[0, k] / 2, 4 * slack[k]):
            return ""
        at = f"{[int(n) for n in np.unravel_index(i, self.shape)]} = {self.x[i]:.6g}"
        self.notes.append(f"{at} is a kink: slopes {left[k]:.6g} and {right[k]:.6g}")
        slack += 1e-12 * np.abs(slopes[-1]).max(0)
        low, high = parts[-1].min(0).sum(-1) - slack, parts[-1].max(0).sum(-1) + slack
        if ((low <= g) & (g <= high)).all():
            return "inside"
        return "mixed" if np.any(changes[-1], 0).sum() > 1 else "outside"

    def result(self, verdict: str, g, D, u, score, extent: str, i: int | None = None) -> Result:
        k, problem = int(np.argmax(np.nan_to_num(u) if verdict == "not judged" else score)), ""
        numbers = [float(a[k]) for a in (g, D, u)]
        error = abs(g[k] - D[k]) / max(abs(g[k]), abs(D[k])) if verdict == "wrong" else self.rtol * score[k]
        if verdict == "not judged":
            problem = f"uncertain differences: outputs round by {self.noise.max():.1g}, or bend; worst"
            if not math.isfinite(u[k]):
                problem = self.outputs.error or "forward is not finite beside it"
        index = None if i is None else tuple(int(n) for n in np.unravel_index(i, self.shape))
        return Result("", verdict, float(error), index, *numbers, extent, problem)


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
