"""Few-shot prompting: examples of a task in the context, then a question; no weight changes.

    apple dax, dog wug, pear

The right answer is dax: apple and pear are of one kind. The model's answer is the likeliest of some choices,
by log p(choice | prompt), or a text that the model writes. Tasks come from a world (`tinygpt/world`) or from
a file of examples. One task of a world is `mappings`: words of four kinds, whose labels are random in each
prompt. So no weight can store which label a kind has. The best possible predictor's rate can be computed.

Reference: Brown et al. 2020, "Language Models are Few-Shot Learners", section 2; Min et al. 2022,
"Rethinking the Role of Demonstrations", for the shuffled labels.
"""

import math
from collections.abc import Iterator, Sequence
from reprlib import repr as short
from typing import NamedTuple

import numpy as np

from ..core.model import GPT
from ..errors import UserError
from ..text import examples, instructions
from ..text.data import Array, Tokenizer
from ..text.examples import Example, LeftOutError, Notes
from ..text.stream import encode_prompt
from ..world import TASKS, World, raw_integers, shuffled, tasks
from .answers import Rate, answers, likelihoods, wilson

Pair = tuple[str, str]  # a question and its answer

# The text between question and answer, and the text after the answer.
STYLES = {"table": ("", ", "), "arrow": (" ->", "; "), "colon": (":", ", "), "lines": ("", "\n")}
CONTROLS = ("shuffled", "unseen", "reordered")


class Prompt(NamedTuple):
    """A question with the examples before it."""

    examples: tuple[Pair, ...]
    question: str
    answer: str
    choices: tuple[str, ...] = ()  # the possible answers; empty: any text
    optimal: float = math.nan  # how often the best predictor is right


def text(prompt: Prompt, style: str) -> str:
    """A prompt as one text, up to the place of the answer.

    >>> text(Prompt((("apple", "dax"), ("dog", "wug")), "pear", "dax"), "arrow")
    'apple -> dax; dog -> wug; pear ->'
    """
    between, after = STYLES[style]
    return "".join(f"{x}{between} {y}{after}" for x, y in prompt.examples) + prompt.question + between


def encoded(tokenizer: Tokenizer, prompt: Prompt, style: str) -> Array:
    """The ids of a prompt. In the style "chat" (instruction tuning) the examples are earlier turns."""
    if style != "chat":
        return encode_prompt(tokenizer, text(prompt, style))
    turns = [message for pair in prompt.examples for message in instructions.pair(*pair)]
    return instructions.prompt(tokenizer, [*turns, {"role": "user", "content": prompt.question}])


def likeliest(model: GPT, tokenizer: Tokenizer, prompts: Sequence[Prompt], style: str) -> list[str]:
    """The likeliest of each prompt's choices.

    If any choice is the beginning of another, the text after an answer, such as a comma, counts for all
    choices. Raises UserError for a prompt that is longer, with its answer, than the model's context.
    """
    ids = _fitting(model, tokenizer, prompts, style)
    names = dict.fromkeys(choice for prompt in prompts for choice in prompt.choices)
    codes = {choice: tokenizer.encode(f" {choice}") for choice in names}
    prefixes = {tuple(tokens[:n]) for tokens in codes.values() for n in range(1, len(tokens))}
    if any(tuple(tokens) in prefixes for tokens in codes.values()):
        end = "" if style == "chat" else STYLES[style][1].rstrip(" ")
        last = [tokenizer.eos_id] if style == "chat" else []
        codes = {choice: np.append(tokenizer.encode(f" {choice}{end}"), last).astype(int) for choice in codes}
    logps = likelihoods(model, ids, [[codes[choice] for choice in prompt.choices] for prompt in prompts])
    return [prompt.choices[int(logp.argmax())] for prompt, logp in zip(prompts, logps, strict=True)]


def continuations(model: GPT, tokenizer: Tokenizer, prompts: Sequence[Prompt], style: str) -> list[str]:
    """The model's own answers, greedily, up to the end of the text or of the style's answer."""
    ids = _fitting(model, tokenizer, prompts, style)
    longest = max(len(tokenizer.encode(f" {prompt.answer}")) for prompt in prompts)
    room = model.context - max(map(len, ids))
    after = STYLES[style][1].strip(" ") if style != "chat" else ""
    replies = [answer.text for answer in answers(model, tokenizer, ids, min(longest + 2, room))]
    return [(reply.split(after)[0] if after else reply).strip() for reply in replies]


def _fitting(model: GPT, tokenizer: Tokenizer, prompts: Sequence[Prompt], style: str) -> list[Array]:
    if not all(fits(model, tokenizer, prompt, style) for prompt in prompts):
        reason = f"longer than the {model.context} positions of the model: give fewer --shots"
        raise UserError(f"with its answer a prompt is {reason}")
    return [encoded(tokenizer, prompt, style) for prompt in prompts]


def fits(model: GPT, tokenizer: Tokenizer, prompt: Prompt, style: str) -> bool:
    """Whether a prompt, with the longest of its choices, fits the model's context."""
    longest = max(len(tokenizer.encode(f" {choice}")) for choice in (prompt.answer, *prompt.choices))
    return len(encoded(tokenizer, prompt, style)) + longest <= model.context


def accuracy(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[Prompt], style: str = "table", free: bool = False
) -> Rate:
    """How often the answer is right: the likeliest of the choices, or the text that the model writes.

    The model writes a text where a prompt has no choices, or with `free`. A full stop at the end is ignored.
    """
    free = free or not all(prompt.choices for prompt in prompts)
    replies = (continuations if free else likeliest)(model, tokenizer, prompts, style)
    pairs = zip(replies, prompts, strict=True)
    right = sum(reply.removesuffix(".") == prompt.answer.removesuffix(".") for reply, prompt in pairs)
    return wilson(right, len(prompts))


# --- tasks --------------------------------------------------------------------------------------------------


def mappings(world: World, shots: int, count: int, control: str = "") -> list[Prompt]:
    """Words of four kinds of thing, each kind with a nonsense label that is drawn for this prompt.

    The best predictor knows the label of a kind that an example shows. For any other kind it guesses among
    the labels that no example shows. With more shots the questions are the same and there are more examples.

    Controls: "shuffled" gives each example the label of any of the four kinds. "unseen" asks for a word that
    is in no example. "reordered" has the same examples in another order.
    """
    return [_mapping(world, shots, control, raw_integers(world.seed, TASKS, 20, n)) for n in range(count)]


def _mapping(world: World, shots: int, control: str, integers: Iterator[int]) -> Prompt:
    categories, labels = world.lexicon.categories, world.lexicon.labels
    kinds = shuffled(range(len(categories)), integers)[:4]
    label_of = dict(zip(kinds, shuffled(labels, integers), strict=False))

    def draw() -> tuple[int, str]:
        kind = kinds[next(integers) % len(kinds)]
        words = list(categories[kind])
        return kind, words[next(integers) % len(words)]

    kind, question = draw()
    triples = []
    while len(triples) < shots:
        example = draw()
        other = label_of[kinds[next(integers) % len(kinds)]]
        if control != "unseen" or example[1] != question:
            triples.append((*example, other if control == "shuffled" else label_of[example[0]]))
    if control == "reordered":
        triples = shuffled(triples, integers)
    shown = {example for example, _, _ in triples}
    best = 1.0 if kind in shown else 1 / (len(labels) - len(shown))
    pairs = tuple((word, label) for _, word, label in triples)
    return Prompt(pairs, question, label_of[kind], tuple(labels), math.nan if control == "shuffled" else best)


def from_world(world: World, task: str, shots: int, count: int, split: str = "eval") -> list[Prompt]:
    """A task of `WORLD_TASKS`: examples from the tuning split, questions of another split.

    Each fact has one question. The examples are of the question's kind: attribute and wording, or labels.
    """
    pairs_of: dict[object, list[Pair]] = {}  # kind of question -> pairs
    for kind, _, question, answer, _ in WORLD_TASKS[task](world, "sft"):
        pairs_of.setdefault(kind, []).append((question, answer))
    rows = {}  # topic -> its last wording
    for kind, about, *rest in tasks.some(world, list(WORLD_TASKS[task](world, split)), 10**6):
        rows[about] = kind, *rest
    prompts = []
    for n, (kind, *question) in enumerate(list(rows.values())[:count]):
        integers = raw_integers(world.seed, TASKS, 21, n)
        pairs = tuple(pairs_of[kind][next(integers) % len(pairs_of[kind])] for _ in range(shots))
        prompts.append(Prompt(pairs, *question))
    return prompts


# Each yields the kind of a question, its topic, the question, its answer, and the choices.


def _people(world: World, split: str) -> Iterator[tuple]:
    for person in world.people("known", split):
        for attribute, value in zip(world.lexicon.attributes, person.values, strict=True):
            about = person.name, attribute.name
            yield attribute.name, about, person.name, attribute.values[value], attribute.values


def _questions(world: World, split: str) -> Iterator[tuple]:
    values = {attribute.name: attribute.values for attribute in world.lexicon.attributes}
    for item in tasks.questions(world, world.people("known", split)):
        (name,), meta = item["meta"]["about"], item["meta"]
        about = name, meta["attribute"]
        yield item["prompt"].replace(name, ""), about, item["prompt"], meta["answer"], values[about[1]]


def _phrases(world: World, split: str) -> Iterator[tuple]:
    for english, korean in world.phrases("seen" if split == "sft" else split):
        yield "", english, english, korean, ()


def _reviews(world: World, split: str) -> Iterator[tuple]:
    for item in tasks.sentiments(world, split, 1000):
        (review,), meta = item["meta"]["about"], item["meta"]
        labels = tuple(pair[meta["labels"]] for pair in world.lexicon.polarities)
        yield meta["labels"], review, review, meta["answer"], labels


WORLD_TASKS = {"people": _people, "questions": _questions, "phrases": _phrases, "reviews": _reviews}


Row = tuple[str, str, tuple[str, ...]]  # a question, its answer, its choices


def read(path: str, model: GPT, tokenizer: Tokenizer, style: str, notes: Notes) -> list[Row]:
    """The rows of a file. A row may have "choices", a list that contains the answer.

    A row that alone is longer than the model's context is left out and noted. Raises UserError, with file and
    line, for a row without an answer, of no form of `examples.FORMS`, or with wrong choices.
    """

    def row(example: Example) -> Row:
        turns, choices = instructions.turns(example.prompt), example.row.get("choices", [])
        answer = example.messages[-1]["content"].strip()
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise UserError(f"choices is {short(choices)}: it must be a list of strings")
        choices = tuple(map(str.strip, choices))
        if choices and answer not in choices:
            raise UserError(f"the answer {short(answer)} is none of the choices")
        question = "\n".join(message["content"].strip() for message in turns)
        if not fits(model, tokenizer, Prompt((), question, answer, choices), style):
            raise LeftOutError(f"as longer than the {model.context} positions of the model")
        return question, answer, choices

    rows = examples.read([path], examples.EXAMPLE, notes)
    return notes.keep(((example.where, example) for example in rows), row)


def from_file(rows: Sequence[Row], shots: int, count: int, seed: int = 0) -> list[Prompt]:
    """Questions of a file, each with a new random draw of other rows as examples. Raises UserError for too
    few rows."""
    if len(rows) <= shots:
        raise UserError(f"{len(rows)} lines are too few for {shots} examples and a question")
    rng, prompts = np.random.default_rng(seed), []
    for n in rng.permutation(len(rows))[:count]:
        others = rng.permutation(len(rows) - 1)[:shots]
        prompts.append(Prompt(tuple(rows[m + (m >= n)][:2] for m in others), *rows[n]))
    return prompts
