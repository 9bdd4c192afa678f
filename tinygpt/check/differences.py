"""Finite differences: the slopes of a forward in one input, and how uncertain they are.

For a fixed upstream gradient `dout`, L = sum(dout * out) is a number. Its slope along d is measured by

    D(h) = (L(x + h d) - L(x - h d)) / 2h             its error has the order h^2
    T(h) = D(h) + (D(h) - D(4h)) / 15                 the order h^4; T(h) and T(4h), with 255, give h^6; ...

Each T combines a finer estimate, that of the smaller step, and a coarser one (Ridders 1982; Numerical
Recipes, 5.7). Its uncertainty is

    u = 8 sum_j |dout_j| noise_j / h  +  max(|T - finer|, |T - coarser|)

noise_j is the measured rounding of output j. The sum is over the outputs that move. The steps are 1e-3 of
the element's size, then smaller ones, then larger ones, by factors of 4, until u <= rtol |D| / 10. The T with
the least u is the slope D.
"""

from __future__ import annotations

import math

import numpy as np

from .contract import Array, Pair, vector

__tracebackhide__ = True  # for pytest, as in gradcheck.py


def rms(x: Array) -> float:
    """The root mean square of the finite elements; 1 if all of them are 0."""
    x = np.abs(x[np.isfinite(x)])
    top = x.max(initial=0)
    return float(top * np.sqrt(np.mean(np.square(x / top)))) if top else 1.0


class Differences:
    """The outputs (N,) of a pair as a function of one input x (n,), and their slopes for K `douts` (K, N)."""

    def __init__(self, pair: Pair, values: dict, name: str, douts: Array, rtol: float,
                 rng: np.random.Generator) -> None:  # fmt: skip
        self.pair, self.values, self.name, self.douts, self.rtol = pair, values, name, douts, rtol
        self.rng = rng
        self.error = "forward is not finite beside it"  # the reason, where a difference is no number
        self.x, self.scale, out = values[name].ravel(), rms(values[name]), vector(pair(values)[0])
        self.fixed = np.where(np.isfinite(out), 0, out)
        self.base = self.outputs(self.x)
        usual = np.isfinite(self.x) & (self.x != 0)
        self.sizes = np.maximum(np.where(usual, np.abs(self.x), self.scale), 1e-30 * self.scale)
        self.noise = self.rounding_errors(self.sizes * rng.choice((-1, 1), self.x.size), rng)

    def outputs(self, x: Array) -> Array:
        """out(x), (N,). An output that is infinite or nan, and stays so, does not move: it is 0 here. If it
        does not stay so, or if forward raises an exception, it is nan."""
        try:
            out = vector(self.pair({**self.values, self.name: x.reshape(self.values[self.name].shape)})[0])
            stays = (out == self.fixed) | (np.isnan(out) & np.isnan(self.fixed))
            return np.where(self.fixed == 0, out, np.where(stays, 0, np.nan))
        except Exception as error:  # a step may lead out of forward's domain
            self.error = f"forward raises {type(error).__name__} beside it ({error})"
            return np.full(self.fixed.shape, np.nan)

    def rounding_errors(self, d: Array, rng: np.random.Generator) -> Array:
        """How far rounding moves each output, (N,): its distance from a straight line, as x moves along d.

        Over a step of 1e-10 a smooth function bends by 1e-20 only. An output that mostly stays where it is
        rounds more coarsely (float32 inside forward, a large number added): longer steps measure it again.
        Beside 0 steps may be shorter, as 0 + h does not round: a small number may be added to x.
        After More and Wild, Estimating computational noise, 2011.
        """
        noise = np.finfo(np.float64).eps * np.abs(self.base)
        coarse = self.outputs(self.x + 1e-3 * d) != self.base
        for step in 10.0 ** np.arange(-10 if self.x.all() else -18, -3, 2):
            line, bend, moves = self.outputs(self.x + step * d) - self.base, 0 * noise, 0 * noise
            for t in rng.uniform(0, 1, 12):  # on one side of x: a kink at x is no noise
                change = self.outputs(self.x + t * step * d) - self.base
                bend, moves = np.fmax(bend, np.abs(change - t * line)), moves + (change != 0)
            noise = np.where(coarse, np.maximum(noise, 2 * bend), noise)
            coarse &= moves < 6
            if not coarse.any():
                break
        return noise

    def sides(self, step: Array) -> tuple[Array, Array]:
        """out(x) - out(x - step) and out(x + step) - out(x), (N,) each."""
        return self.base - self.outputs(self.x - step), self.outputs(self.x + step) - self.base

    def rounding(self, moved: Array) -> Array:
        """8 sum |dout_j| noise_j over the outputs that moved, (K,)."""
        return 8 * (np.abs(self.douts[:, moved]) @ self.noise[moved])

    def slope(
        self, d: Array, size: float, most: float, enough: float, factor: float = 1
    ) -> tuple[Array, Array]:
        """D and u along d, (K,) each. The steps are 1e-3 of `size`, then smaller ones, then larger ones up to
        `most`, all times `factor`. There are no more of them once u <= enough."""
        size, most = factor * size, factor * most
        slopes, first, top = {}, 1e-3 * size, 3 + math.ceil(math.log(max(1, 60 * most / size), 4))
        moved, low = np.any(self.sides(most * d), 0), -9 if (self.x * d).any() else -24  # 0 + h is exact
        for levels in (range(3), range(low, 3), range(low, top)):
            for n in set(levels) - slopes.keys():
                h = first * 4.0**n
                step = self.outputs(self.x + h * d) - self.outputs(self.x - h * d)
                slopes[n], moved = self.douts @ step / (2 * h), moved | (step != 0)
            steps = first * 4.0 ** np.array(levels)[:, None]
            noise = self.rounding(moved) / steps
            D, u = extrapolated([slopes[n] for n in levels], noise)
            if (u <= np.maximum(self.rtol / 10 * np.abs(D), enough)).all():
                break
        return D, u

    def element(self, i: int, enough: float, factor: float = 1) -> tuple[Array, Array]:
        """D and u of the element i, (K,) each, with `factor` times the usual steps."""
        size, most = np.sort((self.sizes[i], self.scale))
        return self.slope(np.eye(1, self.x.size, i)[0], size, most, enough, factor)

    def elements(self, chosen: Array, enough: float) -> Array:
        """D and u of the chosen elements, (2, K, n)."""
        return np.array([self.element(i, enough) for i in chosen]).transpose(1, 2, 0).copy()

    def kink(self, i: int, g: Array) -> tuple[str, str]:
        """Where the gradient g (K,) of an element lies at a kink, and a note; ("", "") if there is no kink.

        At a kink the left and the right slope stay apart as the steps shrink. g is "inside" if it lies
        between the two. Else it is "mixed" if several outputs move: an output may be a sum of several kinks.
        Else it is "outside".
        """
        steps = 1e-3 * self.sizes[i] / 64.0 ** np.arange(3)
        changes = np.array([self.sides(h * np.eye(1, self.x.size, i)[0]) for h in steps])
        parts = changes[:, :, None] * self.douts / steps[:, None, None, None]  # (3 steps, 2 sides, K, N)
        slopes = parts.sum(-1)
        jumps = np.abs(slopes[:, 1] - slopes[:, 0])
        noise = self.rounding(np.any(changes[0], 0)) / steps[:, None]
        for n in 2, 1:  # the smaller step first, unless rounding hides the jump
            slack, k = noise[n] + np.abs(slopes[n] - slopes[n - 1]).sum(0), int(np.argmax(jumps[n]))
            if jumps[n, k] > max(jumps[n - 1, k] / 2, 4 * slack[k]):
                break
        else:
            return "", ""
        left, right = slopes[n]
        note = f"{self.index(i)} = {self.x[i]:.6g} is a kink: slopes {left[k]:.6g} and {right[k]:.6g}"
        slack += 1e-12 * np.abs(slopes[n]).max(0)
        low, high = parts[n].min(0).sum(-1) - slack, parts[n].max(0).sum(-1) + slack
        if ((low <= g) & (g <= high)).all():
            return "inside", note
        return "mixed" if np.any(changes[-1], 0).sum() > 1 or self.base.size == 1 else "outside", note

    def index(self, i: int) -> list[int]:
        return [int(n) for n in np.unravel_index(i, self.values[self.name].shape)]


def extrapolated(slopes: list, noise: Array) -> tuple[Array, Array]:
    """The best estimate and its uncertainty, (K,) each, from D(h) of rising steps and their rounding.

    A large step may jump over a bend: a T that contradicts smaller steps does not count.
    """
    best, least = np.full(noise.shape[1], math.nan), np.full(noise.shape[1], math.inf)
    finer = []  # D, T and so on with the last step but one
    for top, D in enumerate(slopes):
        row = [D]
        for m, T in enumerate(finer, 1):
            row.append(T + (T - row[-1]) / (16.0**m - 1))
            u = np.maximum(np.abs(row[m] - T), np.abs(row[m] - row[m - 1])) + noise[top - m]
            better = (u < least) & ~(np.abs(row[m] - best) > 3 * least + u)
            best, least = np.where(better, row[m], best), np.where(better, u, least)
        finer = row
    return best, least
