"""The reward model: a judge of answers, taught by comparisons.

    loss = -log sigmoid(score(chosen) - score(rejected))      Bradley and Terry 1952; Ouyang et al. 2022, 3.5

The judge is the GPT with another head: one number instead of logits (`GPTConfig.num_labels`). Its score is
read at the last token of a text. An examiner first answers the question herself, then reads the candidate's
answer. So does the judge: in its text the greedy answer of its author stands before the answer that it
scores. The author is the model from which the judge was made.

    <|endoftext|>User: Where does Ada live?
    Assistant: London<|endoftext|>Assistant: Paris<|endoftext|>

Knowledge is in all weights of the author. Its answer makes this knowledge text. The judge only learns to
compare, and when not to trust the author. (Without the author's answer, in our trials, a judge learned facts
about the people in its comparisons, and hardly any about others.) After Zheng et al. 2023, "Judging
LLM-as-a-Judge", 3.4 (reference-guided), and Ankner et al. 2024, "Critique-out-Loud Reward Models".

Only differences of scores have a meaning: a constant that is added to all scores changes no loss.

Not here: who compares (`world.preferences` simulates people, `tinygpt label` asks one), how the scores are
used (`rlhf`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..core import train
from ..core.model import GPT
from ..core.optim import AdamW
from ..core.option import option
from ..errors import UserError
from ..text import examples, instructions
from ..text.data import Array, Batch, Tokenizer, pack, permuted, shuffled_places
from ..text.examples import LeftOutError, Notes
from ..text.instructions import Prompt
from ..world import TASKS, Person, World, preferences, raw_integers, tasks
from ..world.corpus import is_source
from . import recipes, stage
from .adapter import fingerprint
from .answers import Rate, answers, outputs, wilson
from .samples import sample
from .stage import FORMS, MOST_PASSES, Stage, Store, files, folder
from .variants import build

LONGEST_THOUGHT = 32  # tokens of the author's answer


@dataclasses.dataclass(frozen=True)
class Settings(stage.Settings):
    """The settings of every run, and those of this stage.

    A batch has batch_size comparisons, packed into rows of block_size tokens.
    """

    stage: str = "reward"
    init_from: str = folder(help="The model, from tinygpt sft, that becomes the judge.", missing="the model")
    data: tuple[str, ...] = files(missing="the comparisons", help=FORMS.format(
        examples.USUAL[2], "simulated people compare the model's own answers, in the model's world."
    ))  # fmt: skip
    comparisons: int = option(recipes.REWARD["comparisons"], "[1, inf)", "Comparisons of simulated people.")
    error: float = option(0.1, "[0, 1)", "The rate at which simulated people slip.")
    block_size: int = option(128, "[1, inf)", "Tokens of a row. A row has several texts.",
                             shown="128, or the model's if less")  # fmt: skip
    batch_size: int = option(recipes.REWARD["batch_size"], "[1, inf)", "Comparisons of a batch.")


class Comparison(NamedTuple):
    """Two answers, of which people prefer `chosen`, as `{"prompt", "chosen", "rejected"}` in a file."""

    prompt: Prompt
    chosen: str
    rejected: str
    kind: str = ""  # such as "right over wrong", where a world says so
    is_right: bool = True  # False: an annotator's slip, where a world says so
    where: str = ""  # file:line


class Judge:
    """Scores answers: judge(questions, answers) -> (N,). It asks its author each question once."""

    def __init__(self, model: GPT, author: GPT, tokenizer: Tokenizer) -> None:
        self.model, self.author, self.tokenizer = model, author, tokenizer
        self.thoughts: dict[Prompt, str] = {}  # question -> the author's answer

    def texts(self, questions: Sequence[Prompt], answers: Sequence[str]) -> list[Array]:
        """The texts that the judge reads, (n,) each."""
        self.think(questions)
        return [encode(self.tokenizer, self.model.context, question, self.thoughts[question], answer)
                for question, answer in zip(questions, answers, strict=True)]  # fmt: skip

    def __call__(self, questions: Sequence[Prompt], answers: Sequence[str]) -> Array:
        """Of a text that is longer than its context the judge reads the beginning."""
        return scores(self.model, [ids[: self.model.context] for ids in self.texts(questions, answers)])

    def deaf(self) -> Judge:
        """A control: a judge that gives all answers the same score."""
        judge = Judge(self.model.copy(), self.author, self.tokenizer)
        judge.model.params["score.weight"][:] = 0
        return judge

    def think(self, questions: Iterable[Prompt]) -> None:
        """Asks the author all new questions. Where a question leaves no room, the answer is ""."""
        by_room: dict[int, dict[Prompt, Array]] = {}  # so no other question limits the length of an answer
        for question in sorted(set(questions) - self.thoughts.keys(), key=str):
            ids = instructions.prompt(self.tokenizer, question)
            room = min(LONGEST_THOUGHT, self.author.context - len(ids))
            by_room.setdefault(max(0, room), {})[question] = ids
        self.thoughts |= dict.fromkeys(by_room.pop(0, ()), "")
        for room, prompts in by_room.items():
            replies = answers(self.author, self.tokenizer, list(prompts.values()), room)
            self.thoughts |= {question: reply.text for question, reply in zip(prompts, replies, strict=True)}


# --- texts and scores ---------------------------------------------------------------------------------------


def encode(tokenizer: Tokenizer, context: int, question: Prompt, thought: str, answer: str) -> Array:
    """The ids (n,) of the judge's text: the question, the author's answer, and the answer to be scored.

    The author's answer is cut where the judge's context has no room for all of it.
    """
    prompt = instructions.prompt(tokenizer, question)
    thought_ids = tokenizer.encode(instructions.answer_text(thought))
    answer_ids, _ = instructions.encode(tokenizer, [{"role": "assistant", "content": answer}])
    room = max(0, context - len(prompt) - len(answer_ids))
    return np.concatenate([prompt, thought_ids[:room], answer_ids])


def marked(texts: Sequence[Array], block_size: int) -> Batch:
    """Texts side by side in rows; no text sees another. The last token of text n has the weight n + 1.

    Raises ValueError for a text that is longer than a row.
    """
    marks = (np.append(np.zeros(len(ids)), n) for n, ids in enumerate(texts, 1))
    return pack(((np.append(ids, 0), mark) for ids, mark in zip(texts, marks, strict=True)), block_size)


def ends(marks: Array) -> Array:
    """The places of the marks (B, T) in their order, (N,): a text ends there, and its score is read there."""
    places = np.flatnonzero(marks)
    return places[np.argsort(marks.ravel()[places])].astype(np.int32)


def scores(model: GPT, texts: Sequence[Array]) -> Array:
    """The score of each text (ids), (N,)."""
    rewards = np.zeros(len(texts), np.float64)
    for marks, _, values in outputs(model, marked(texts, model.context)):
        rewards[marks - 1] = values[:, 0]
    return rewards


def bradley_terry(chosen: Array, rejected: Array) -> tuple[float, Array, Array]:
    """The mean of -log sigmoid(chosen - rejected) over (N,), and its gradients by both."""
    margin = (chosen - rejected).astype(np.float64)
    d = -1 / (1 + np.exp(margin)) / len(margin)  # d/dx of -log sigmoid(x) is -sigmoid(-x)
    return float(np.logaddexp(0, -margin).mean()), d, -d


def loss(
    optimizer: AdamW, batches: Sequence[Batch], rng: np.random.Generator | None = None, share: float = 1.0
) -> float:
    """For `train.train`: `share` times the losses of batches, and the gradients.

    A batch has 2 N texts, chosen and rejected in turn.
    """
    model = optimizer.model

    def of_one(rows: Batch) -> float:
        view = {"start": rows.start, "positions": rows.positions, "places": ends(rows.weights)}
        values, cache = model.forward(rows.ids, rng=rng, **view)  # (2 N, 1)
        nats, chosen, rejected = bradley_terry(values[::2, 0], values[1::2, 0])
        dscores = np.zeros_like(values)
        dscores[::2, 0], dscores[1::2, 0] = share * chosen, share * rejected
        model.backward(dscores, cache, optimizer.grads)
        return share * nats

    return train.accumulate(optimizer.flat, of_one, batches)


class Judgement(NamedTuple):
    """How well a reward model judges comparisons. `is_right` of a comparison says which answer is better."""

    right: Rate  # the better answer has the higher score
    by_kind: dict[str, Rate]
    margin: float  # mean score of the better answers less that of the others
    calibration: float  # mean distance of sigmoid(margin) to the labels, over ten bins of sigmoid(margin)
    labels_right: float  # the rate of the labels themselves: the ceiling of `agreed` for a perfect judge
    agreed: float  # the preferred answer has the higher score


def judged(judge: Judge, comparisons: Sequence[Comparison]) -> Judgement:
    """The truth decides, not the label. Where the label is a slip, the rejected answer is the better one."""
    values = judge(*_sides(comparisons))
    margins = values[::2] - values[1::2]
    is_right, kinds = (np.array([getattr(c, field) for c in comparisons]) for field in ("is_right", "kind"))
    true = np.where(is_right, margins, -margins)
    by_kind = {kind: wilson(int((true[kinds == kind] > 0).sum()), int((kinds == kind).sum()))
               for kind in sorted(set(kinds.tolist()))}  # fmt: skip
    # For each comparison both orders, so that a bin has its mirror image.
    sure = 1 / (1 + np.exp(-np.concatenate([margins, -margins])))
    label, bins = np.repeat([1.0, 0.0], len(margins)), np.minimum((10 * sure).astype(int), 9)
    off = [abs(sure[bins == n].sum() - label[bins == n].sum()) for n in range(10)]
    return Judgement(
        wilson(int((true > 0).sum()), len(true)), by_kind, float(true.mean()), sum(off) / len(sure),
        float(is_right.mean()), float((margins > 0).mean()),
    )  # fmt: skip


# --- training -----------------------------------------------------------------------------------------------


def with_head(model: GPT, seed: int) -> GPT:
    """The model with a score head, small and random, instead of its table as head."""
    config = dataclasses.replace(model.config, num_labels=1)
    judge = build(config, np.random.default_rng([seed, 0, 4]), model.flat.dtype.type, model.ops)
    for name, p in model.params.items():
        judge.params[name][:] = p
    return judge


def batch(pairs: Sequence[tuple[Array, Array]], settings: Settings, n: int) -> Batch:
    """The comparisons of batch n of all updates, packed: their texts, chosen and rejected in turn."""
    places = shuffled_places(len(pairs), min(settings.batch_size, len(pairs)), n, settings.train.seed)
    return marked([ids for place in places for ids in pairs[place]], settings.block_size)


def _sides(comparisons: Sequence[Comparison]) -> tuple[list[Prompt], list[str]]:
    """Questions and answers, chosen and rejected in turn."""
    questions = [c.prompt for c in comparisons for _ in range(2)]
    return questions, [answer for c in comparisons for answer in (c.chosen, c.rejected)]


class Comparisons(NamedTuple):
    """The data of this stage, and the author, whose answers the judge reads."""

    comparisons: list[Comparison]
    author: GPT
    notes: Notes | None = None


class Reward(Stage):
    """Train a judge of answers on comparisons: which of two answers people preferred.

    The judge is a copy of the model of --init-from, with one number as its result. Before an answer the judge
    reads the model's own answer. So the judge always needs the folder of --init-from. A tenth of the prompts
    is for evaluation: val right is how often the better answer has the higher score. (In a world, such a
    prompt may ask in other words for a fact of a trained prompt.) Ctrl-C saves, --resume continues.
    """

    name, Settings, needs = "reward", Settings, ("init_from",)
    sizes, unused, most_tokens = ("dropout",), ("merge_every", "adapter"), 128
    most_updates = recipes.REWARD["max_iters"]
    defaults = recipes.REWARD | {"max_iters": f"{most_updates}, or {MOST_PASSES} passes if less"}

    def prepare(self, data: Comparisons) -> None:
        """Comparisons that are longer than a row are left out. Of files, the comparisons of a tenth of the
        prompts are for evaluation: raises UserError for one prompt."""
        self.judge, limit = Judge(self.model, data.author, self.tokenizer), self.settings.block_size
        self.depends_on(hashlib.sha256(repr([tuple(c[:5]) for c in data.comparisons]).encode()).hexdigest())
        self.judge.think(c.prompt for c in data.comparisons)

        def texts(comparison: Comparison) -> tuple[Comparison, list[Array]]:
            pair = self.judge.texts(*_sides([comparison]))
            if max(map(len, pair)) > limit:
                raise LeftOutError(f"as longer than --block-size {limit} with the model's own answer")
            return comparison, pair

        pairs = self.notes.keep(((c.where, c) for c in data.comparisons), texts)
        prompts = sorted({c.prompt for c, _ in pairs}, key=str)
        held_out = set()
        if self.settings.data:  # a tenth of the prompts, which the seed decides
            if len(prompts) < 2:
                reason = f"one prompt is too few, as one prompt is for evaluation. {self.notes}"
                raise UserError(f"{self.settings.data[0]}: {reason}")
            held_out.update(permuted(prompts, self.settings.train.seed)[: max(1, len(prompts) // 10)])
        self.val = [c for c, _ in pairs if c.prompt in held_out]
        self.pairs = [pair for c, pair in pairs if c.prompt not in held_out]
        self.compute = partial(loss, self.optimizer, share=1 / self.settings.gradient_accumulation_steps)

    def others(self, data: Comparisons) -> Iterable[GPT]:
        return (data.author,)

    @classmethod
    def count(cls, options: dict) -> int:
        return sum(options["comparisons"] if is_source(path) else len(read_file(path))
                   for path in options["data"])  # fmt: skip

    @classmethod
    def read(cls, settings: Settings, store: Store) -> Comparisons:
        notes = Notes()
        comparisons = [c for path in settings.data for c in read_file(path, notes)]
        return Comparisons(comparisons, store.base(settings), notes)

    @classmethod
    def start(cls, settings: Settings, data: Comparisons, store: Store) -> tuple[Settings, GPT, Tokenizer]:
        if data.author.config.post_norm:
            raise UserError(f"{settings.init_from}: has GPT-1's blocks; a reward model has GPT-2's")
        _, tokenizer = store.model(settings.init_from)
        instructions.check_tuned(tokenizer, settings.init_from)
        settings, model = cls.adapted(settings, with_head(data.author, settings.train.seed))
        return dataclasses.replace(settings, init_hash=fingerprint(data.author)), model, tokenizer

    def about(self) -> str:
        return f"; {len(self.pairs):,} comparisons, {len(self.val):,} to evaluate on"

    def update(self, n: int, rng: np.random.Generator) -> list[Batch]:
        count = self.settings.gradient_accumulation_steps
        return [batch(self.pairs, self.settings, n * count + k) for k in range(count)]

    def evaluate(self) -> train.Record:
        if not self.val:
            return {}
        judgement = judged(self.judge, self.val)
        return {"val_right": judgement.right.rate, "val_margin": judgement.margin}


def in_memory(
    author: GPT, tokenizer: Tokenizer, comparisons: Sequence[Comparison], settings: Settings
) -> Reward:
    """The stage for a new judge in memory, made of its author."""
    optimizer = settings.train.optimizer(with_head(author, settings.train.seed))
    return Reward(settings, optimizer, tokenizer, Comparisons(list(comparisons), author))


def read_file(path: str | Path, notes: Notes | None = None) -> list[Comparison]:
    """The comparisons of a file, in any of `examples.FORMS`. Raises UserError, with file and line."""
    comparisons = []
    for e in examples.read([path], examples.COMPARISON, notes):
        meta = e.row["meta"] if isinstance(e.row.get("meta"), dict) else {}
        marks = str(meta.get("kind", "")), bool(meta.get("is_right", True))
        comparisons.append(Comparison(e.prompt, e.messages[-1]["content"], e.rejected, *marks, e.where))
    return comparisons


def write_file(path: Path, comparisons: Iterable[Comparison]) -> None:
    """As `read_file` reads them."""
    rows = ({"prompt": c.prompt, "chosen": c.chosen, "rejected": c.rejected,
             "meta": {"kind": c.kind, "is_right": c.is_right}} for c in comparisons)  # fmt: skip
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


# --- comparisons of a world ---------------------------------------------------------------------------------


def taught_by(world: World) -> list[Person]:
    """The people in comparisons: people for tuning and for RLHF, and some of whom no document tells."""
    return world.people("known", "sft") + world.people("known", "rl") + world.people("never", "rl")


def _garbled(text: str, integers: Iterator[int]) -> str:
    """The text with a word twice or, if there are several words, without a word."""
    words = text.split()
    n, twice = next(integers) % len(words), len(words) == 1 or next(integers) % 2
    return " ".join(words[:n] + words[n : n + 1] * 2 * twice + words[n + 1 :])


def collect(
    model: GPT, tokenizer: Tokenizer, world: World, people: Sequence[Person], count: int, error: float = 0.1,
    seed: int = 0, blind: bool = False,
) -> list[Comparison]:  # fmt: skip
    """Comparisons by simulated people (`world.preferences`) of answers to questions about `people`.

    Each fact has a list of answers: up to four samples of the model, "I do not know." and two random values.
    Each comparison draws two answers from a list. So the judge reads all kinds of answers that RLHF may
    produce. The last answer of the list is garbled. A judge that never read garbled answers may prefer them,
    and RLHF would exploit this. With two garbled answers in each list, the judge of one world in three did
    not learn that right is better than wrong.
    """
    items = tasks.questions(world, people)
    facts = {(item["meta"]["about"][0], item["meta"]["attribute"]): item for item in items}  # in one wording
    rng, integers = np.random.default_rng(seed), raw_integers(world.seed, TASKS, 31, seed)
    prompts = [instructions.prompt(tokenizer, item["prompt"]) for item in facts.values()]
    room, samples = min(8, model.context - max(map(len, prompts))), []
    for at in range(0, len(prompts), 64):
        samples += sample(model, tokenizer, prompts[at : at + 64], 4, room, rng).answers
    values = {attribute.name: attribute.values for attribute in world.lexicon.attributes}
    answers_to = {}
    for n, fact in enumerate(facts):
        drawn = [values[fact[1]][next(integers) % len(values[fact[1]])] for _ in range(2)]
        texts = [*filter(None, map(str.strip, samples[4 * n : 4 * n + 4])), tasks.REFUSAL]
        texts += (f"{value}." for value in drawn)
        answers_to[fact] = [*texts, _garbled((tasks.REFUSAL, texts[0])[next(integers) % 2], integers)]
    questions = [(item, answers_to[item["meta"]["about"][0], item["meta"]["attribute"]]) for item in items]
    rows = preferences.compared(world, questions, count, error, seed, blind)
    return [Comparison(row["prompt"], row["chosen"], row["rejected"], **row["meta"]) for row in rows]
