"""One program for each kind of document, and two readers: one draws a document, the other scores a text.

A program is a function of a reader `c`. `c.pick(options, weights)` makes a choice, and appends the chosen
option to the document at once. `c.text(...)` appends fixed text. No option of a choice is the beginning of
another one. So a document shows its choices, and its probability is the exact product of their probabilities.
A hidden choice, such as the task of a table, is drawn when it first shows.

Weights are integers. The choices come from raw integers of a PCG64, a stream that NumPy guarantees: the same
seed gives the same text on each machine.
"""

import functools
import itertools
import math
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence

import numpy as np

END = "\n"  # a document is one line


def raw_integers(*seed: int) -> Iterator[int]:
    """Endless uniform integers below 2^64, from a seed of one or more integers."""
    bits = np.random.PCG64(np.random.SeedSequence(seed))
    while True:
        yield from bits.random_raw(1024).tolist()


def pick(options: Sequence, integers: Iterator[int]):
    """One of the options; all are equally likely."""
    return options[next(integers) % len(options)]


@functools.lru_cache(1 << 14)
def _cumulated(weights: tuple[int, ...]) -> list[int]:
    return list(itertools.accumulate(weights))


class Reader:
    """The argument of a program. The readers differ in `pick`."""

    def pick(self, options: Sequence[str], weights: tuple[int, ...] | None = None) -> int:
        """Appends one of the options and returns its index. Without weights all are equally likely."""
        raise NotImplementedError

    def text(self, text: str) -> None:
        self.pick((text,))

    def goes_on(self, count: int, least: int, most: int, more: str = " ", end: str = END) -> bool:
        """Whether a part follows after `count` parts, if their number is uniform from `least` to `most`."""
        if count < min(least, most):
            self.text(more)
            return True
        if count >= most:
            self.text(end)
            return False
        return self.pick((end, more), (1, most - count)) == 1

    def series(self, least: int, most: int, more: str = " ", end: str = END) -> Iterator[int]:
        """Counts parts from 1. Their number is uniform from `least` to `most`.

        `more` stands between two parts, `end` after the last.
        """
        count = 0
        while not count or self.goes_on(count, least, most, more, end):
            count += 1
            yield count


class Sampler(Reader):
    """Draws a document. `document` returns the text and begins the next document."""

    def __init__(self, integers: Iterator[int]) -> None:
        self.integers, self.parts = integers, []

    def pick(self, options, weights=None):
        if len(options) == 1:
            n = 0
        elif weights is None:
            n = next(self.integers) % len(options)  # the bias, 2^-60, is below the precision of a double
        else:
            bounds = _cumulated(weights)
            n = bisect(bounds, next(self.integers) % bounds[-1])
        self.parts.append(options[n])
        return n

    def document(self) -> str:
        text, self.parts = "".join(self.parts), []
        return text.removesuffix(END)


class Impossible(Exception):  # noqa: N818 - it is no error, but an answer
    """The program cannot write this text."""


class Scorer(Reader):
    """Follows a document and sums log p, in nats, of its choices."""

    def __init__(self, document: str) -> None:
        self.document, self.place, self.logprob = document + END, 0, 0.0

    def pick(self, options, weights=None):
        matches = [n for n, option in enumerate(options) if self.document.startswith(option, self.place)]
        if len(matches) != 1:
            if matches:
                raise ValueError(f"ambiguous: {[options[n] for n in matches]}")
            raise Impossible
        n = matches[0]
        p = 1 / len(options) if weights is None else weights[n] / _cumulated(weights)[-1]
        if not p:
            raise Impossible
        self.logprob += math.log(p)
        self.place += len(options[n])
        return n


def logprob(program: Callable[[Reader], None], document: str) -> float:
    """log p of a document in nats; -inf for a text that the program cannot write."""
    c = Scorer(document)
    try:
        program(c)
    except Impossible:
        return -math.inf
    return c.logprob if c.place == len(c.document) else -math.inf
