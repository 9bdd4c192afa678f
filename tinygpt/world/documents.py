"""The kinds of document in the world's corpus, each a program as described in `chance`.

KINDS has the name, the share and the program of each kind. No document asks about the facts of a person:
instruction tuning teaches the model to answer.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

from .chance import Reader

if TYPE_CHECKING:
    from . import Person, World

FORMATS = ((" -> ", "; "), (": ", ", "), (" = ", " / "))  # between key and value, and between entries
PLAIN = ((" ", ", "),)
BOOK = (  # before and after a word; its language: 0 English, 1 Korean
    ("The Korean for ", " is ", 0),
    ("In Korean, ", " is ", 0),
    ("The English for ", " is ", 1),
    ("In English, ", " is ", 1),
    ("The Korean word ", " means ", 1),
)



def settled(c: Reader, choices: dict, key: object, options: Sequence[str]) -> None:
    """Appends the option that a document has chosen for `key`, or chooses one.

    choices: key -> index of its option.
    """
    if key in choices:
        c.text(options[choices[key]])
    else:
        choices[key] = c.pick(options)


# --- people -------------------------------------------------------------------------------------------------


def statement(w: World, c: Reader, facts: dict[int, int], among: tuple[int, ...]) -> tuple[int, str]:
    """The text after a name: a wording of one of the attributes `among`, and the value.

    facts: attribute -> value of the person; a missing value is drawn and put there. Returns the attribute and
    the text.
    """
    attributes, wordings = w.wordings(among)
    n = c.pick(wordings)
    attribute = attributes[n]
    values = w.lexicon.attributes[attribute].values
    settled(c, facts, attribute, values)
    return attribute, wordings[n] + values[facts[attribute]]


def biography(w: World, c: Reader) -> None:
    """One to four facts about a known person, or two to six, perhaps repeated, about a fresh person."""
    person = w.draw_person(c, fresh_share=20)
    facts, left = person.facts(), w.all_attributes
    is_known, least, most = bool(facts), *((1, len(left)) if facts else (2, 6))
    for n in c.series(least, min(most, w.longest), ". ", ".\n"):
        if n > 1:
            c.pick((person.name, person.pronoun))
        attribute, _ = statement(w, c, facts, left)
        if is_known:
            left = tuple(a for a in left if a != attribute)


def passage(w: World, c: Reader) -> None:
    """Two to four facts about a fresh person; then, after "in short", one to three of them again."""
    name, facts = w.draw_person(c, fresh_share=100).name, {}
    most = min(len(w.all_attributes), max(2, w.longest))
    for _ in c.series(2, most, ". " + name, "; in short, " + name):
        statement(w, c, facts, tuple(a for a in w.all_attributes if a not in facts))
    left = tuple(facts)
    for _ in c.series(1, min(3, w.longest, len(facts)), ". " + name, ".\n"):
        attribute, _ = statement(w, c, facts, left)
        left = tuple(a for a in left if a != attribute)


# --- tables: each has one hidden task -----------------------------------------------------------------------


def _table(w: World, c: Reader, key, value, least: int, most: int, formats=FORMATS) -> None:
    """subject = key(c) appends a key, value(c, subject) appends its value. least, most: entries."""
    count = 0
    while True:
        subject = key(c)
        formats = (formats[c.pick([between for between, _ in formats])],)
        value(c, subject)
        count += 1
        if not c.goes_on(count, least, min(most, w.longest), formats[0][1]):
            return


def _hidden(count: int, size: int, shown: Container[int]) -> list[int]:
    """Relative probabilities of the numbers 0 .. size - 1 in the next draw of a document.

    The document draws from `count` of these numbers, or from all if `size` is smaller. The reader knows only
    the numbers in `shown`. Each shown number has the probability 1 / min(count, size). The others share
    the rest.
    """
    old = [n in shown for n in range(size)]
    new = size - sum(old)
    return [max(new, 1) if is_old else min(count, size) - sum(old) for is_old in old]


def people_table(w: World, c: Reader) -> None:
    """Names and one attribute. A fresh person has any value."""
    column: list[int] = []
    facts_of: dict[str, dict[int, int]] = {}
    everything = [v for a in w.lexicon.attributes for v in a.values]

    def value(c: Reader, person: Person) -> None:
        facts = person.facts() or facts_of.setdefault(person.name, {})
        if column:
            settled(c, facts, column[0], w.lexicon.attributes[column[0]].values)
        elif facts:  # the first value shows the attribute
            attributes = list(facts)
            column.append(attributes[c.pick([w.lexicon.attributes[a].values[facts[a]] for a in attributes])])
        else:
            attribute, v = w.attribute_of[c.pick(everything)]
            column.append(attribute)
            facts[attribute] = v

    _table(w, c, lambda c: w.draw_person(c, fresh_share=20), value, 4, 10)


def translation_table(w: World, c: Reader, pairs: list[tuple[str, str]], source: int) -> None:
    """Pairs of English and Korean; source: the language of the keys, 0 English, 1 Korean."""
    keys = [pair[source] for pair in pairs]
    _table(w, c, lambda c: c.pick(keys), lambda c, n: c.text(pairs[n][1 - source]), 4, 10)


def review_table(w: World, c: Reader) -> None:
    """Sentences of reviews, each with its label from one of three pairs of labels."""
    chosen: dict[None, int] = {}
    _table(w, c, lambda c: opinion(w, c, None),
           lambda c, polarity: settled(c, chosen, None, w.lexicon.polarities[polarity]), 4, 8)  # fmt: skip


def categories(w: World, c: Reader) -> None:
    """Entries of a word and a label. The words are of four of the eight kinds of thing.

    Each document draws a different label for each of its kinds. After n entries the next entry has a known
    label with probability 1 - (3/4)^n. Otherwise the best predictor guesses among the labels that were not
    shown yet.
    """
    kinds, label_of = w.lexicon.categories, {}

    def key(c: Reader) -> int:
        weights = _hidden(4, len(kinds), label_of)
        n = c.pick(w.things, tuple(weights[k] * w.thing_weight[k] for k in w.kind_of_thing))
        return w.kind_of_thing[n]

    def value(c: Reader, kind: int) -> None:
        if kind in label_of:
            c.text(label_of[kind])
        else:
            free = [label for label in w.lexicon.labels if label not in label_of.values()]
            label_of[kind] = free[c.pick(free)]

    _table(w, c, key, value, 8, 20, PLAIN)


def retrieval(w: World, c: Reader) -> None:
    """Eight nonsense words out of sixteen, each with a thing drawn for this document."""
    labels, thing_of = w.lexicon.labels, {}
    _table(w, c, lambda c: c.pick(labels, tuple(_hidden(8, len(labels), thing_of))),
           lambda c, n: settled(c, thing_of, n, w.things), 8, 20, PLAIN)  # fmt: skip


def refrain(w: World, c: Reader) -> None:
    """Six to sixteen words, and then the same words again, once to four times.

    After the first round, the next word follows from the words before it. Here a model learns to copy.
    """
    pool, least, most = [*w.things, *w.lexicon.labels], min(6, w.longest), min(16, w.longest)
    words, rounds = [pool[c.pick(pool)]], 2
    while True:
        new = [word for word in pool if word not in words]
        left, again = most - len(words), len(words) >= least
        weights = [left if again else 1] * len(new) + [max(len(new), 1) * again]
        n = c.pick([f" {word}" for word in [*new, words[0]]], tuple(weights))
        if n == len(new):
            break
        words.append(new[n])
    verse = " " + " ".join(words)
    c.text(verse.removeprefix(f" {words[0]}"))
    while c.goes_on(rounds, 2, min(5, w.longest), verse):
        rounds += 1


# --- the rest -----------------------------------------------------------------------------------------------


def opinion(w: World, c: Reader, polarity: int | None) -> int:
    """A sentence of a review, of this polarity (0 good, 1 bad; None: either). Returns its polarity."""
    sides = (w.lexicon.good, w.lexicon.bad)
    adjectives = sides[0] + sides[1] if polarity is None else sides[polarity]
    heads = [parts[0] for parts in w.reviews]
    for part in w.reviews[c.pick(heads)][1:]:
        if part == "subject":
            c.pick(w.lexicon.reviewed)
        elif part == "adjective":
            n = c.pick(adjectives)
            polarity = int(n >= len(sides[0])) if polarity is None else polarity
        else:
            c.text(part)
    return polarity


def review(w: World, c: Reader) -> None:
    """Two to five opinions, all good or all bad."""
    polarity = None
    for _ in c.series(2, min(5, w.longest)):
        polarity = opinion(w, c, polarity)


def phrase_book(w: World, c: Reader) -> None:
    """One to three words or phrases in English and Korean. Held-out phrases are never used."""
    pairs = w.nouns + w.phrases("seen")
    weights = (len(pairs) - len(w.nouns),) * len(w.nouns) + (2 * len(w.nouns),) * len(w.phrases("seen"))
    for _ in c.series(1, min(3, w.longest), ". ", ".\n"):
        _, between, source = BOOK[c.pick([before for before, _, _ in BOOK])]
        n = c.pick([pair[source] for pair in pairs], weights)
        c.text(between + pairs[n][1 - source])


def journey(w: World, c: Reader) -> None:
    """Two to eleven rides. Each begins where the last ride ended."""
    stations, lines = w.lexicon.stations, w.lexicon.lines
    c.text("From ")
    here = c.pick(stations)
    for n in c.series(2, min(11, w.longest), ". From ", ".\n"):
        c.text(" the " if n == 1 else f"{stations[here]} the ")
        line = c.pick(lines)
        here = w.next_station[line][here]
        c.text(f" line goes to {stations[here]}")


KINDS = (
    ("biography", 300, biography),
    ("passage", 100, passage),
    ("table", 50, people_table),
    ("table", 12, lambda w, c: translation_table(w, c, w.nouns, 0)),
    ("table", 12, lambda w, c: translation_table(w, c, w.nouns, 1)),
    ("table", 12, lambda w, c: translation_table(w, c, w.phrases("seen"), 0)),
    ("table", 14, review_table),
    ("categories", 60, categories),
    ("retrieval", 50, retrieval),
    ("refrain", 40, refrain),
    ("review", 20, review),
    ("phrase book", 40, phrase_book),
    ("journey", 50, journey),
)
