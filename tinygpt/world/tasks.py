"""Question sets about a world, for the stages after pre-training. An item has prompt, completion and meta.

    {"prompt": "Where does Nora Hill live?", "completion": "Oslo.", "meta": {"task": "question", ...}}

The caller joins prompt and completion with a space, because words in the corpus come after a space. `meta`
has the task, the split, the `answer` within the completion, and the values by which results are grouped
(`exposure`, `steps`). `about` lists the people, the phrase, the problem or the review of an item. Each of
these belongs to one split wherever it occurs: see `World.people`, `World.phrases`, `World.split_of`.

Journeys are an exception: the corpus too has rides from all stations by all lines. Pre-training teaches the
rides; tuning only teaches when to write them step by step.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from ..text.instructions import Message, pair
from . import TASKS, Person, World, raw_integers, shuffled
from .chance import Sampler, pick
from .documents import opinion, statement

Item = dict  # prompt, completion, meta
SPLITS = ("sft", "rl", "val", "eval")
REFUSAL = "I do not know."
SHORT = 80  # characters; a shorter question with its answer may share a conversation

_TRANSLATE = (
    ("What is {} in Korean?", "How do you say {} in Korean?", "Translate into Korean: {}"),
    ("What is {} in English?", "How do you say {} in English?", "Translate into English: {}"),
)
_SENTIMENT = ("{} Is this review {} or {}?", "Is the following review {1} or {2}? {0}")
_STATED = ("Which sentence tells the {} of {}?", "Sum up what is said of the {} of {}.")
_TRAVEL = (
    "You start at {} and take {}. Where do you arrive?",
    "Which station do you reach from {} by {}?",
    "Starting from {}, where do I get by {}?",
)


def _item(prompt: str, completion: str, task: str, split: str, answer: str, about, **meta) -> Item:
    about = {"task": task, "split": split, "answer": answer, "about": about}
    return {"prompt": prompt, "completion": completion, "meta": about | meta}


def questions(world: World, people: Sequence[Person], refuse: bool = False) -> list[Item]:
    """Each attribute of these people in each wording. refuse: the completion is REFUSAL."""
    return [
        _item(question.format(person.name), REFUSAL if refuse else f"{attribute.values[value]}.", "question",
              person.split, attribute.values[value], [person.name], attribute=attribute.name,
              exposure=person.weight)
        for person in people
        for attribute, value in zip(world.lexicon.attributes, person.values, strict=True)
        for question in attribute.questions
    ]  # fmt: skip


def translations(world: World, split: str) -> list[Item]:
    """Phrases into Korean and into English, in each wording. For "sft": the phrases of the corpus."""
    pairs = world.phrases("seen" if split == "sft" else split)
    return [
        _item(wording.format(pair[source]), f"{pair[1 - source]}.", task, split, pair[1 - source], [pair[0]])
        for source, task in enumerate(("to Korean", "to English"))
        for pair in pairs
        for wording in _TRANSLATE[source]
    ]


def sentiments(world: World, split: str, count: int) -> list[Item]:
    """Reviews of two or three sentences. The answer is good or bad, in the words of a pair of labels."""
    integers, items = _integers(world, "sentiment", split), []
    c, labels = Sampler(integers), world.lexicon.polarities
    while len(items) < count:
        polarity = opinion(world, c, None)
        for _ in range(1 + next(integers) % 2):
            c.text(" ")
            opinion(world, c, polarity)
        text = c.document()
        if world.split_of(text) == split:
            n = next(integers) % len(labels[0])
            prompt = pick(_SENTIMENT, integers).format(text, labels[0][n], labels[1][n])
            answer = labels[polarity][n]
            items.append(_item(prompt, f"{answer}.", "sentiment", split, answer, [text], labels=n))
    return items


def readings(world: World, split: str, count: int) -> list[Item]:
    """Passages about a person without fixed facts ("sft": a fresh person; else one in no document).

    Each passage comes twice: the task "reading" asks for a value, "summary" for the sentence with this value.
    """
    integers, items = _integers(world, "reading", split), []
    c, people = Sampler(integers), world.people("fresh") if split == "sft" else world.people("never", split)
    attributes = world.lexicon.attributes
    while len(items) < 2 * count:
        person, facts, sentences = pick(people, integers), {}, []
        for _ in range(3 + next(integers) % 2):
            left = tuple(a for a in world.all_attributes if a not in facts)
            attribute, text = statement(world, c, facts, left)
            sentences.append((attribute, f"{person.name}{text}."))
        c.document()
        passage = " ".join(sentence for _, sentence in sentences)
        a, sentence = pick(sentences, integers)
        answer, about = attributes[a].values[facts[a]], [person.name]
        question = pick(attributes[a].questions, integers).format(person.name)
        meta = {"attribute": attributes[a].name}
        items.append(_item(f"{passage} {question}", f"{answer}.", "reading", split, answer, about, **meta))
        question = pick(_STATED, integers).format(attributes[a].name, person.name)
        items.append(_item(f"{passage} {question}", sentence, "summary", split, answer, about, **meta))
    return items


def journeys(world: World, split: str, steps: int | Sequence[int], count: int,
             style: str = "steps") -> list[Item]:  # fmt: skip
    """Questions that ask where a journey of `steps` rides ends. Several numbers are equally frequent.

    style: "direct" has only the answer, "steps" has each ride and then the answer. "shuffled" has the rides
    in another order. "filler" has full stops instead of rides (Pfau et al. 2024, "Let's Think Dot by Dot").
    """
    integers, lexicon, items = _integers(world, "journey", split), world.lexicon, []
    numbers = [steps] if isinstance(steps, int) else list(steps)
    while len(items) < count:
        here = start = next(integers) % len(lexicon.stations)
        lines = [next(integers) % len(lexicon.lines) for _ in range(numbers[len(items) % len(numbers)])]
        names = [lexicon.lines[line] for line in lines]
        problem = " ".join([lexicon.stations[start], *names])
        wording = pick(_TRAVEL, integers)
        order = shuffled(range(len(lines)), integers)
        if world.split_of(problem) != split:
            continue
        if order == sorted(order):
            order.append(order.pop(0))
        rides = []
        for line, name in zip(lines, names, strict=True):
            before, here = here, world.next_station[line][here]
            rides.append(f"From {lexicon.stations[before]} the {name} line goes to {lexicon.stations[here]}.")
        rides = {
            "direct": [], "steps": rides, "shuffled": [rides[n] for n in order],
            "filler": [". . . . . . . . ."] * len(rides),  # a ride is nine tokens
        }[style]  # fmt: skip
        answer, route = lexicon.stations[here], ", then ".join(f"the {name} line" for name in names)
        prompt, meta = wording.format(lexicon.stations[start], route), {"steps": len(lines), "style": style}
        completion = " ".join([*rides, f"The answer is {answer}."])
        items.append(_item(prompt, completion, "journey", split, answer, [problem], **meta))
    return items


def corrupted(world: World, item: Item) -> tuple[str, str]:
    """A journey's steps up to a middle step, which ends at a wrong station, and the answer that follows."""
    names, lines = world.lexicon.stations, world.lexicon.lines
    rides = item["completion"].split(". ")[:-1]
    wrong = (len(rides) - 1) // 2  # never the last of two or more rides
    before, there = rides[wrong].rsplit(" ", 1)
    here = (names.index(there) + 1) % len(names)
    steps = ". ".join([*rides[:wrong], f"{before} {names[here]}."])
    for ride in rides[wrong + 1 :]:
        here = world.next_station[lines.index(ride.split(" the ")[1].split()[0])][here]
    return steps, names[here]


def majority(items: Sequence[Item]) -> float:
    """The score without knowledge: to each kind of question its most frequent answer."""
    tasks: dict[tuple, Counter] = {}
    for meta in (item["meta"] for item in items):
        kind = (meta["task"], meta.get("attribute"), meta.get("labels"))
        tasks.setdefault(kind, Counter())[meta["answer"]] += 1
    return sum(max(counts.values()) for counts in tasks.values()) / max(len(items), 1)


def task_sets(world: World) -> dict[str, list[Item]]:
    """All question sets of `tinygpt world`, by the name of their file, task.split."""
    sets = {}
    for split in SPLITS:
        known, rare, never = (world.people(kind, split) for kind in ("known", "rare", "never"))
        count, styles = (200 if split == "val" else 1000), ("direct",)
        sets[f"question.{split}"] = questions(world, known if split == "sft" else known + rare + never)
        if split == "rl":
            continue
        if split == "sft":
            styles = ("direct", "steps", "shuffled", "filler")
            sets["unknown.sft"] = questions(world, never)
            sets["refusal.sft"] = questions(world, never, refuse=True)
        sets[f"translation.{split}"] = translations(world, split)
        sets[f"sentiment.{split}"] = sentiments(world, split, count)
        sets[f"reading.{split}"] = readings(world, split, count)
        for style in styles:
            sets[f"journey-{style}.{split}"] = journeys(world, split, range(1, 6), count, style)
    return sets


def tuning(world: World, split: str = "sft", refused: int = 40, answered: int = 160) -> list[Item]:
    """The training items of `tinygpt sft --data world`, of all tasks. For validation ("val"): a tenth.

    The writer of examples does not know the facts of pre-training. So some questions are about people in no
    document: `answered` questions have facts, and `refused` questions have REFUSAL as completion. No person
    has both, and "val" has neither. A small world has a fifth of all items. Raises ValueError if there are
    too few people.
    """
    people, part = world.people("never", split), world.part
    if split != "sft":
        part, refused, answered = 10, 0, 0
    items = [
        *questions(world, world.people("known", split)),
        *some(world, translations(world, split), 500 // part),
        *sentiments(world, split, 300 // part),
        *readings(world, split, 1200 // part),
        *journeys(world, split, range(1, 6), 800 // part),
    ]
    half = len(people) // 2
    pools = questions(world, people[:half], refuse=True), questions(world, people[half:])
    for pool, count in zip(pools, (refused // part, answered // part), strict=True):
        if len(pool) < count:
            raise ValueError(f"{count} questions about people in no document: there are {len(pool)}")
        items += some(world, pool, count)
    return items


def conversations(world: World, items: Sequence[Item]) -> list[list[Message]]:
    """Items in a random order as conversations, half with one question, others with two or three short ones.

    A model that sees no second question in training cannot answer a second question.
    """
    integers, dialogues, group, size = raw_integers(world.seed, TASKS, 8), [], [], 1
    for item in some(world, items, len(items)):
        messages = pair(item["prompt"], item["completion"])
        if len(item["prompt"]) + len(item["completion"]) > SHORT:
            dialogues.append(messages)
            continue
        group += messages
        if len(group) == 2 * size:
            dialogues.append(group)
            group, size = [], (1, 1, 2, 3)[next(integers) % 4]
    return dialogues + [group] * bool(group)


def some(world: World, items: Sequence[Item], count: int) -> list[Item]:
    """A sample of a set, in a random order."""
    return shuffled(items, raw_integers(world.seed, TASKS, 9))[:count]


def distinct(items: Iterable[Item]) -> list[Item]:
    """One item about each fact, phrase or problem. More items would only make an interval look narrow."""
    by_fact: dict[tuple, Item] = {}
    for item in items:
        meta = item["meta"]
        by_fact.setdefault((meta["task"], *meta["about"], meta.get("attribute"), meta["answer"]), item)
    return list(by_fact.values())


# --- judging an answer --------------------------------------------------------------------------------------


@lru_cache(64)
def form(world: World, task: str) -> re.Pattern:
    """The pattern of well-formed answers to a task, true or not."""
    lexicon = world.lexicon
    value = _any(v for attribute in lexicon.attributes for v in attribute.values)
    name, station = f"{_any(lexicon.women + lexicon.men)} {_any(lexicon.surnames)}", _any(lexicon.stations)
    facts = "|".join(f"{_any(a.wordings)} {_any(a.values)}" for a in lexicon.attributes)
    ride = f"From {station} the {_any(lexicon.lines)} line goes to {station}\\."
    return re.compile({
        "question": rf"{value}\.|{re.escape(REFUSAL)}",
        "reading": rf"{value}\.",
        "summary": rf"{name} (?:{facts})\.",
        "to Korean": rf"{_any(lexicon.adjectives.values())} {_any(korean for _, korean in world.nouns)}\.",
        "to English": rf"{_any(lexicon.adjectives)} {_any(world.things)}\.",
        "sentiment": rf"{_any(label for labels in lexicon.polarities for label in labels)}\.",
        "journey": rf"(?:{ride} |\. )*The answer is {station}\.",  # "\. ": filler
    }[task])  # fmt: skip


def right(item: Item, answer: str) -> bool:
    """Whether a well-formed answer ends with the right value. A summary must begin with the right name."""
    meta = item["meta"]
    about = f"{meta['about'][0]} " if meta["task"] == "summary" else ""
    return answer.startswith(about) and f" {answer}".endswith(f" {meta['answer']}.")


def _any(words: Iterable[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, words))})"


def _integers(world: World, task: str, split: str) -> Iterator[int]:
    place = ("sentiment", "reading", "journey").index(task), SPLITS.index(split)
    return raw_integers(world.seed, TASKS, *place)
