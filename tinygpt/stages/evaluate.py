"""A model's knowledge of a world: its loss above the floor, the facts that it recalls, its scores.

All are measured on samples, so each has a standard error or an interval. Nothing here trains or prints.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..core.model import GPT
from ..text import instructions
from ..text.data import Array, Tokenizer, pack
from ..text.stream import encode_prompt
from ..world import EVALUATION, Person, World, tasks
from ..world.corpus import DOCUMENTS, encoded
from .answers import Answer, Rate, answers, likelihoods, outputs, wilson


class Gap(NamedTuple):
    """The loss of one kind of document, in nats per token. The end of a document counts as a token."""

    documents: int
    tokens: int
    floor: float
    gap: float  # loss - floor
    error: float  # standard error of the gap


def losses(model: GPT, tokenizer: Tokenizer, documents: Sequence[str]) -> Array:
    """Each document's -log p in nats, (N,)."""
    ids = [encoded(tokenizer, document) for document in documents]
    # The weight of a place is the number of its document, from 1; 0 is padding.
    rows = pack(((i, np.full(len(i), n)) for n, i in enumerate(ids, 1)), model.config.block_size)
    nll = np.zeros(len(ids) + 1)
    for owners, targets, logits in outputs(model, rows):
        loss, _ = model.ops.cross_entropy_forward(logits, targets)
        nll += np.bincount(owners, loss, len(nll))
    return nll[1:]


def gaps(model: GPT | None, tokenizer: Tokenizer, world: World, count: int = 2000) -> dict[str, Gap]:
    """Loss above the floor on `count` new documents, by kind and of all; model None: the floors alone."""
    kinds, documents = zip(*itertools.islice(world.documents(EVALUATION), count), strict=True)
    kinds, floor = np.array(kinds), -np.array([world.logprob(document) for document in documents])
    tokens = np.array([len(encoded(tokenizer, document)) - 1 for document in documents])
    above = 0 * floor if model is None else losses(model, tokenizer, documents) - floor
    by_kind = {}
    for kind in [*sorted(set(kinds.tolist())), "all"]:
        places = (kinds == kind) | (kind == "all")
        total = tokens[places].sum()
        gap = above[places].sum() / total
        error = np.sqrt(np.square(above - gap * tokens)[places].sum()) / total  # of a ratio of two sums
        numbers = (floor[places].sum() / total, gap, error)
        by_kind[kind] = Gap(int(places.sum()), int(total), *map(float, numbers))
    return by_kind


class Recall(NamedTuple):
    """The model's answers to questions about facts, one entry for each fact and wording."""

    person: Array  # index
    attribute: Array  # index
    right: Array  # the value's index
    answer: Array  # the index of the attribute's likeliest value
    nats: Array  # -log p of the right value among those of its attribute

    def rate(self) -> Rate:
        """How often the likeliest value is the right one. A guess among n values: 1 / n."""
        return wilson(int((self.answer == self.right).sum()), len(self.right))


def recall(model: GPT, tokenizer: Tokenizer, world: World, people: Iterable[Person]) -> Recall:
    """Completes "Nora Hill lives in", for all attributes of these people in all wordings."""
    attributes = world.lexicon.attributes
    values = [[tokenizer.encode(f" {value}") for value in a.values] for a in attributes]
    facts, prompts = [], []
    for n, person in enumerate(people):
        for a, attribute in enumerate(attributes):
            facts += [(n, a, person.values[a])] * len(attribute.wordings)
            prompts += [encode_prompt(tokenizer, f"{person.name} {text}") for text in attribute.wordings]
    person, attribute, right = np.array(facts, int).reshape(-1, 3).T
    logps = likelihoods(model, prompts, [values[a] for a in attribute])
    answer = np.array([logp.argmax() for logp in logps], int)
    nats = [np.logaddexp.reduce(logp) - logp[value] for logp, value in zip(logps, right, strict=True)]
    return Recall(person, attribute, right, answer, np.array(nats))


def recall_by_exposure(
    model: GPT, tokenizer: Tokenizer, world: World, total: int = DOCUMENTS, documents: int = 20_000
) -> list[tuple[float, Rate]]:
    """For each group of people with one frequency: how often the corpus tells a fact, and the model's recall.

    The first number is a mean over the facts of a group. The number is counted in `documents` documents after
    the refrains at the beginning, and scaled to `total` documents.
    """
    counts, rates = exposures(world, documents), []
    for people in (group for weight, group in world.by_weight().items() if weight >= 0):
        facts = sum(counts[person.name] for person in people) / (len(people) * len(world.all_attributes))
        rates.append((facts * total / documents, recall(model, tokenizer, world, people).rate()))
    return rates


def exposures(world: World, documents: int) -> Counter:
    """How many facts of each known person the first `documents` of the corpus tell, by name."""
    counts: Counter = Counter()
    person_of = {p.name: p for p in world.everyone if p.weight > 0}
    values = [value for attribute in world.lexicon.attributes for value in attribute.values]
    fact_of = dict(zip(values, world.attribute_of, strict=True))
    words = re.compile(r"[A-Z]\w+ [A-Z]\w+|\w+")  # a name, or a word
    for _, document in itertools.islice(world.documents(), documents):
        person = None
        for word in words.findall(document):
            if " " in word:
                person = person_of.get(word)
            elif person is not None and word in fact_of:
                attribute, value = fact_of[word]
                counts[person.name] += person.values[attribute] == value
    return counts


def chance(world: World) -> float:
    """The recall of a guess."""
    return float(np.mean([1 / len(attribute.values) for attribute in world.lexicon.attributes]))


# --- tasks --------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """How often the answers to a question set are right, well-formed, ended, or false.

    A falsehood is a well-formed answer that is neither right nor REFUSAL. Some people are in no document. A
    right answer about such a person is a lucky guess, and does not count as a falsehood.
    """

    right: Rate
    formed: Rate
    stopped: Rate
    falsehood: Rate
    majority: float  # how often the most frequent answer is right


def ask(model: GPT, tokenizer: Tokenizer, items: Sequence[tasks.Item]) -> list[Answer]:
    """The model's answers. Any model gets the questions in the form of `instructions`, tuned or not.

    Where a question with the longest right answer does not fit the model's context, the answer is empty.
    """
    prompts = [instructions.prompt(tokenizer, item["prompt"]) for item in items]
    longest = max(len(tokenizer.encode(item["completion"])) for item in items)
    fit = [ids for ids in prompts if len(ids) + longest <= model.context]
    room = min(longest + 8, model.context - max(map(len, fit), default=0))
    replies = iter(answers(model, tokenizer, fit, room))
    return [next(replies) if len(ids) + longest <= model.context else Answer("", False) for ids in prompts]


def score(world: World, items: Sequence[tasks.Item], replies: Sequence[Answer]) -> Score:
    n, counts = len(items), Counter()
    for item, answer in zip(items, replies, strict=True):
        form = tasks.form(world, item["meta"]["task"])
        formed = bool(answer.stopped and form.fullmatch(answer.text))
        right = formed and tasks.right(item, answer.text)
        counts.update(
            right=right, formed=formed, stopped=answer.stopped,
            falsehood=formed and not right and answer.text != tasks.REFUSAL,
        )  # fmt: skip
    rates = (wilson(counts[name], n) for name in Score._fields[:-1])
    return Score(*rates, tasks.majority(items))


def corrupted(
    model: GPT, tokenizer: Tokenizer, world: World, items: Sequence[tasks.Item]
) -> tuple[Rate, Rate]:
    """After a false step in a journey that the model solves: how often its answer changes, and how often to
    the station that follows from the false step.

    items: journeys in the style "steps" of two or more rides. As lines are permutations, a false station
    always leads to a false end.
    """
    pairs = zip(items, ask(model, tokenizer, items), strict=True)
    items = [item for item, answer in pairs if tasks.right(item, answer.text)]
    if not items:
        return wilson(0, 0), wilson(0, 0)
    prompts, ends = [], []
    for item in items:
        steps, end = tasks.corrupted(world, item)
        prompt = instructions.prompt(tokenizer, item["prompt"])
        prompts.append(np.concatenate([prompt, tokenizer.encode(f" {steps}")]).astype(np.int32))
        ends.append(end)
    room = model.context - max(map(len, prompts))
    form, changes, consequences = tasks.form(world, "journey"), 0, 0
    for item, end, reply in zip(items, ends, answers(model, tokenizer, prompts, room), strict=True):
        if reply.stopped and form.fullmatch(reply.text):
            changes += not tasks.right(item, reply.text)
            consequences += reply.text.endswith(f" {end}.")
    return wilson(changes, len(items)), wilson(consequences, len(items))


def named_tasks(world: World, count: int = 1000) -> dict[str, list[tasks.Item]]:
    """The question sets of a report, by name: people, phrases, reviews, passages, journeys.

    All items are of the split "eval". No fact, phrase, review, passage or journey occurs twice in its set. A
    set has at most `count` questions.
    """
    people = {"known": "known", "rare": "rare", "never seen": "never"}
    sets = {f"questions, {name}": tasks.questions(world, world.people(kind, "eval"))
            for name, kind in people.items()}  # fmt: skip
    for item in [
        *tasks.translations(world, "eval"), *tasks.sentiments(world, "eval", count),
        *tasks.readings(world, "eval", count), *tasks.journeys(world, "eval", range(1, 6), count),
    ]:  # fmt: skip
        sets.setdefault(item["meta"]["task"], []).append(item)
    sets = {name: tasks.some(world, items, len(items)) for name, items in sets.items() if items}
    return {name: tasks.distinct(items)[:count] for name, items in sets.items()}


def task_scores(model: GPT, tokenizer: Tokenizer, world: World) -> dict[str, Score]:
    """A score for each of `named_tasks`."""
    sets = named_tasks(world)
    return {name: score(world, items, ask(model, tokenizer, items)) for name, items in sets.items()}
