"""The likely mistake in a wrong gradient, if the evidence is clear.

Every sentence is a fact about all elements, for several upstream gradients. `gradcheck` prints a sentence
only if it holds at both points. `tests/check/mutants.py` compares the sentences with planted mistakes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np

Array = np.ndarray
Slopes = dict[str, tuple[Array, Array]]  # by input: D and its uncertainty, (K, *shape) each


def diagnose(name: str, g: Array | list, slopes: Slopes, if_right: str) -> str:
    """A sentence about the gradients g (K, *shape) of the input `name`, or "". Their shape may be wrong.

    if_right: the sentence for gradients that are right, but break a rule. An empty g gives this sentence too.
    """
    if not len(g):
        return if_right
    slopes = {n: (D, u) for n, (D, u) in slopes.items() if u.max() < 1e-5 * np.abs(D).max()}  # clear evidence
    if name not in slopes or not np.isfinite(g).all():
        return ""
    D, u = (numbers[: len(g)] for numbers in slopes[name])
    if g.shape == D.shape and _near(g, D, u):
        return if_right
    return next(_sentences(name, np.float64(g), D, u, slopes), "")


def _sentences(name: str, g: Array, D: Array, u: Array, slopes: Slopes) -> Iterator[str]:
    """The simplest first."""
    axes = range(1, g.ndim)
    if g.shape != D.shape:
        for lost in (lost for n in range(g.ndim) for lost in combinations(axes, n)):
            total = g.sum(lost)
            if total.size == D.size and _near(total.reshape(D.shape), D, u):
                where = f"axis {' and '.join(str(axis - 1) for axis in lost)}"
                yield f"a sum over {where} is missing" if lost else "the numbers are right, not the shape"
        if g.ndim > 2 and g.swapaxes(-1, -2).shape == D.shape and _near(g.swapaxes(-1, -2), D, u):
            yield "it is transposed"
        return
    if not g.any():
        yield "it is 0 everywhere"
    factor = float((g * D).sum() / (D * D).sum())
    if abs(factor) > 1e-3 and _near(g, factor * D, abs(factor) * u):
        yield "its sign is wrong" if abs(factor + 1) < 1e-6 else f"it is {factor:.6g} times the right one"
    for i, j in combinations(axes, 2):
        if D.shape[i] == D.shape[j] and _near(g.swapaxes(i, j), D, u):
            yield "it is transposed" if g.ndim == 3 else f"its axes {i - 1} and {j - 1} are exchanged"
    for other, (theirs, v) in slopes.items():
        if other != name and theirs.shape == g.shape and _near(g, theirs, v):
            yield f"it is the gradient of {other}"
    where = np.argwhere((np.abs(g - D) > 1e-6 * np.maximum(np.abs(g), np.abs(D)) + u).any(0))
    if len(where) and D[0].size > 2:
        fixed = [len(set(column)) == 1 and n > 1 for column, n in zip(where.T, D.shape[1:], strict=True)]
        if any(fixed):
            place = ", ".join(str(i) if one else ":" for i, one in zip(where[0], fixed, strict=True))
            yield f"it is wrong at [{place}] only"


def _near(a: Array, b: Array, u: Array) -> bool:
    """Whether all elements are equal, up to the uncertainty u of the differences."""
    slack = 1e-6 * np.maximum(np.abs(a), np.abs(b)) + u + 1e-9 * np.abs(b).max()
    return bool((np.abs(a - b) <= slack).all())
