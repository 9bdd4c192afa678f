"""The synthetic world: invented people and places of which everything is known, and text about them.

A World follows from its seed: the attributes of each person, how often the corpus mentions each, where
trains go. The programs in `documents` draw its documents, so `World.logprob` is exact. The entropy of the
documents follows from it, and no model can predict them better in the mean. `tasks` has question sets for the
stages after pre-training. `stages.evaluate` compares a model's answers with the truth.

People, phrases and problems belong to tuning or to evaluation, wherever they occur.

Reference: Allen-Zhu, Li 2023, "Physics of Language Models: Part 3.1, Knowledge Storage and Extraction", for
biographies of invented people in several wordings.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from typing import NamedTuple

import numpy as np

from .chance import Reader, Sampler, logprob, raw_integers
from .documents import KINDS
from .words import Lexicon

VERSION = 7  # of the text of a seed: who changes the text raises this number
CORPUS, VALIDATION, EVALUATION, TASKS, PRIMER = 0, 1, 2, 3, 4  # streams of random integers
BUILD, PERMUTE = 100, 101

# weight in the corpus, about the number of times that it tells each fact -> split -> number of people
EXPOSURES = {
    256: {"sft": 60, "rl": 30, "val": 10, "eval": 50}, **{n: {"eval": 24} for n in (64, 16, 4, 1)},
    0: {"sft": 160, "rl": 120, "val": 40, "eval": 280},  # in no document
}  # fmt: skip
WELL_KNOWN = 256  # the least weight of known people
SIZES = {"": 1, "small": 5, "tiny": 50}  # the numbers of people and of documents are divided by this


class Person(NamedTuple):
    """values: an index for each attribute. weight: see EXPOSURES. A fresh person: no values, weight -1."""

    name: str
    pronoun: str
    values: tuple[int, ...]
    weight: int
    split: str

    def facts(self) -> dict[int, int]:
        """The facts that the corpus tells about this person: attribute -> value."""
        return dict(enumerate(self.values)) if self.weight > 0 else {}


def shuffled(items: list, integers: Iterator[int]) -> list:
    items = list(items)
    for n in range(len(items) - 1, 0, -1):
        m = next(integers) % (n + 1)
        items[n], items[m] = items[m], items[n]
    return items


def moved(count: int, integers: Iterator[int]) -> list[int]:
    """A permutation of 0 .. count - 1 in which no number keeps its place."""
    while True:
        order = shuffled(range(count), integers)
        if count < 2 or all(n != m for n, m in enumerate(order)):
            return order


class World:
    """All that is true in a world.

    permuted: the same people with other answers. Each value is replaced by another value.

    size: A "small" world has a fifth of the people and a fifth of the text. Its text tells each fact as
    often as the text of a whole world. A "tiny" world is for tests.

    exposures: as EXPOSURES. longest: a limit for the length of all documents, for tests that enumerate them.
    """

    def __init__(self, seed: int = 1337, permuted: bool = False, size: str = "", *, longest: int = 99,
                 lexicon: Lexicon | None = None, exposures: dict = EXPOSURES) -> None:  # fmt: skip
        self.seed, self.permuted, self.lexicon, self.longest = seed, permuted, lexicon or Lexicon(), longest
        self.size, self.part = size, SIZES[size]
        self._people(exposures)
        self._things()

    def _people(self, exposures: dict) -> None:
        lexicon, integers = self.lexicon, raw_integers(self.seed, BUILD)
        firsts = [(name, "She") for name in lexicon.women] + [(name, "He") for name in lexicon.men]
        names = shuffled([(f"{a} {b}", pronoun) for a, pronoun in firsts for b in lexicon.surnames], integers)
        sizes = [len(attribute.values) for attribute in lexicon.attributes]
        changes = [list(range(size)) for size in sizes]
        if self.permuted:
            changes = [moved(size, raw_integers(self.seed, PERMUTE, n)) for n, size in enumerate(sizes)]
        self.everyone: list[Person] = []
        for weight, splits in exposures.items():
            for split, count in splits.items():
                for _ in range(-(-count // self.part)):
                    indices = [next(integers) % size for size in sizes]
                    values = tuple(change[v] for change, v in zip(changes, indices, strict=True))
                    self.everyone.append(Person(*names.pop(), values, weight, split))
        self.everyone += [Person(*name, (), -1, "fresh") for name in names]
        # One choice among names draws a known person or a fresh one; `share`, in percent, are fresh.
        total = sum(p.weight for p in self.everyone if p.weight > 0)
        self._draws = {}
        for share in (20, 100):
            other = (100 - share) * len(names)
            weights = [share * total if p.weight < 0 else other * p.weight for p in self.everyone]
            some = [(p, weight) for p, weight in zip(self.everyone, weights, strict=True) if weight]
            self._draws[share] = [p for p, _ in some], [p.name for p, _ in some], tuple(w for _, w in some)
        self.all_attributes = tuple(range(len(lexicon.attributes)))
        self.attribute_of = [(a, v) for a, size in enumerate(sizes) for v in range(size)]
        self._wordings: dict[tuple[int, ...], tuple[list[int], list[str]]] = {}

    def _things(self) -> None:
        lexicon = self.lexicon
        self.nouns = [pair for category in lexicon.categories for pair in category.items()]
        pairs = [(f"{english} {noun}", f"{korean} {theirs}")
                 for english, korean in lexicon.adjectives.items() for noun, theirs in self.nouns]
        pairs = shuffled(pairs, raw_integers(self.seed, BUILD, 1))
        third = len(pairs) // 3  # is held out
        cut = third * 4 // 5
        self._splits = {"eval": pairs[:cut], "val": pairs[cut:third], "seen": pairs[third:]}
        self.things = [english for english, _ in self.nouns]
        self.kind_of_thing = [k for k, category in enumerate(lexicon.categories) for _ in category]
        sizes = [len(category) for category in lexicon.categories]
        self.thing_weight = [math.lcm(*sizes) // size for size in sizes]
        self.reviews = [review.split("|") for review in lexicon.reviews]
        integers, count = raw_integers(self.seed, BUILD, 2), len(lexicon.stations)
        self.next_station = [moved(count, integers) for _ in lexicon.lines]

    # --- splits: tuning and evaluation ----------------------------------------------------------------------

    def people(self, kind: str, split: str | None = None) -> list[Person]:
        """kind: "known" (often in the corpus), "rare" (seldom in it), "never" or "fresh".

        split: "sft", "rl", "val" or "eval"; None: all. All rare people are for evaluation.
        """
        least, above = {"known": (WELL_KNOWN, math.inf), "rare": (1, WELL_KNOWN), "never": (0, 1),
                        "fresh": (-1, 0)}[kind]  # fmt: skip
        return [p for p in self.everyone if least <= p.weight < above and split in (None, p.split)]

    def by_weight(self) -> dict[int, list[Person]]:
        """People by their weight in the corpus, the largest first."""
        return {weight: list(group) for weight, group in itertools.groupby(self.everyone, lambda p: p.weight)}

    def phrases(self, split: str) -> list[tuple[str, str]]:
        """Adjective and noun, (English, Korean): "seen" in the corpus, held out for "val" and "eval"."""
        return self._splits[split]

    def split_of(self, text: str) -> str:
        """The split of a problem or a review: "sft" half of them, "val" an eighth, "eval" the rest."""
        return ("val", *["eval"] * 3, *["sft"] * 4)[sha256(text.encode()).digest()[0] % 8]

    def wordings(self, among: tuple[int, ...]) -> tuple[list[int], list[str]]:
        """The wordings of these attributes: the attribute of each, and each as it stands in a sentence."""
        if among not in self._wordings:
            pairs = [(a, f" {wording} ") for a in among for wording in self.lexicon.attributes[a].wordings]
            self._wordings[among] = tuple(map(list, zip(*pairs, strict=True)))
        return self._wordings[among]

    # --- documents ------------------------------------------------------------------------------------------

    def draw_person(self, c: Reader, fresh_share: int) -> Person:
        people, names, weights = self._draws[fresh_share]
        return people[c.pick(names, weights)]

    def documents(self, stream: int = CORPUS, only: str | None = None) -> Iterator[tuple[str, str]]:
        """Endless (kind, text), always the same for a stream. The streams are independent of each other.

        only: the only kind to draw.
        """
        integers = raw_integers(self.seed, stream)
        kinds = [row for row in KINDS if only in (None, row[0])]
        c, bounds = Sampler(integers), list(itertools.accumulate(share for _, share, _ in kinds))
        while True:
            kind, _, program = kinds[bisect(bounds, next(integers) % bounds[-1])]
            program(self, c)
            yield kind, c.document()

    def logprob(self, document: str) -> float:
        """log p of a document of the corpus, in nats, exactly. -inf for a text that cannot be in it."""
        total = sum(share for _, share, _ in KINDS)
        terms = [math.log(n / total) + logprob(partial(p, self), document) for _, n, p in KINDS]
        return float(np.logaddexp.reduce(terms))
