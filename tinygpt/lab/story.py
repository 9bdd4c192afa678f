"""A GPT's whole life in a world of which everything is known, and what each stage of it changed.

Each stage makes its model (`lab.models`) and measures it beside those before it. The results are kept in the
Lab's folder: a story that was interrupted goes on. story.json has all of them:

    row        the stage's line of the table
    samples    question, answer before, answer after, true answer
    curves     name -> values, for the report

Not here: printing (`shell`), the table and the page (`report`, `page`), claims over several seeds (`claims`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..core.model import GPT
from ..core.train import weight_change
from ..errors import UserError
from ..files.atomic import replacing
from ..files.jsonfile import read_object
from ..folders import checkpoint
from ..stages import evaluate, fewshot, recall, reward
from ..stages.adapter import AdapterConfig, fingerprint
from ..stages.recipes import QUICK
from ..world import tasks
from ..world.corpus import DOCUMENTS
from .models import Lab, read_records

FILE = "story.json"
DAMAGED = "is not what tinygpt story wrote, or damaged: tell the story again"
SHOWN = ("questions, known", "questions, never seen", "to Korean", "journey")  # samples are one of each


class Stage(NamedTuple):
    name: str
    term: str  # in Korean
    says: str  # what the term means
    measure: Callable[[Lab], dict]


STAGES: list[Stage] = []


def stage(name: str, term: str) -> Callable:
    """A stage is a function that measures it. Its docstring is the text that the story has of it."""

    def register(measure: Callable[[Lab], dict]) -> Callable[[Lab], dict]:
        STAGES.append(Stage(name, term, " ".join(measure.__doc__.split()), measure))
        return measure

    return register


# --- measuring ----------------------------------------------------------------------------------------------


def rates(lab: Lab, model: GPT) -> dict[str, float]:
    """The table's rates of a model that writes, each between 0 and 1."""
    count = lab.recipe.shown
    known, never = (lab.score(model, lab.sets[name][:count]) for name in SHOWN[:2])
    rides = lab.score(model, tasks.distinct(tasks.journeys(lab.world, "eval", 3, count)))
    return {
        "form": known.formed.rate, "known": known.right.rate, "falsehoods": never.falsehood.rate,
        "reasoning": rides.right.rate, "few-shot": lab.accuracy(model, mappings(lab, 8)),
    }  # fmt: skip


def mappings(lab: Lab, shots: int, part: int = 1) -> list[fewshot.Prompt]:
    return fewshot.mappings(lab.world, shots, lab.recipe.shown // part)


def compared(lab: Lab, before: GPT, after: GPT, names: tuple[str, ...] = SHOWN) -> list[list[str]]:
    """Question, answer before, answer after, what is true."""
    items = [lab.sets[name][0] for name in names]
    answers = [[a.text for a in evaluate.ask(model, lab.tokenizer, items)] for model in (before, after)]
    prompts, true = ([item[key] for item in items] for key in ("prompt", "completion"))
    return [list(row) for row in zip(prompts, *answers, true, strict=True)]


def trained(lab: Lab, model: GPT, before: GPT, data: str, seconds: float) -> dict:
    """A model's row, and what moved. base: whether the base is in it as it was."""
    moved, by_name = weight_change(before.params, model.params)
    return {
        "row": {
            "data": data, "weights": model.trained.flat.size, "change": moved, "seconds": seconds,
            "base": fingerprint(model) == fingerprint(lab.base), **rates(lab, model),
        },
        "change": {name: value for name, value in by_name.items() if math.isfinite(value)},
    }  # fmt: skip


def by_the_prompt(lab: Lab, before: str, summary: str) -> dict:
    """The row of a stage that trains nothing; before: the base's fingerprint before it."""
    return {"data": "the prompt", "weights": 0, "change": 0.0, "shown": summary,
            "base": fingerprint(lab.base) == before}  # fmt: skip


# --- the stages ---------------------------------------------------------------------------------------------


@stage("pre-training", "사전학습")
def pretraining(lab: Lab) -> dict:
    """From random weights it learns to predict the next token of a text, again and again. All weights move.
    Patterns of language come first; what is told often stays in the weights, its parametric recall. (The text
    begins with words said over and over, from which it learns to copy: then the loss jumps.)"""
    model, options = lab.base, lab.recipe.pretrain
    tokens = math.prod(options[size] for size in ("max_iters", "batch_size", "block_size"))
    result = trained(lab, model, lab.random, f"{tokens / 1e6:.1f}M tokens of text", lab.seconds("base"))
    updates, gap = lab.records("base"), lab.gaps(model, 1000)["all"]
    recalled = evaluate.recall_by_exposure(model, lab.tokenizer, lab.world, DOCUMENTS // lab.world.part)
    often, never = recalled[0], recalled[-1]
    every = max(1, len(updates) // 300)
    return result | {
        "samples": compared(lab, lab.random, model, SHOWN[:1]),
        "floor": gap.floor,
        "curves": {
            "update": [record["iter"] for record in updates[::every]],
            "loss": [record["train_loss"] for record in updates[::every]],
            "told": [times for times, _ in recalled],
            "recalled": [rate.rate for _, rate in recalled],
        },
        "notes": [
            f"Its loss is {gap.gap:.3f} nats a token above the text's entropy, which no model beats.",
            f"Facts told {often[0]:.0f} times it recalls in {often[1].rate:.0%}, told never "
            f"{never[1].rate:.0%} (chance {evaluate.chance(lab.world):.0%}).",
        ],
    }


@stage("in-context learning", "문맥 내 학습")
def in_context(lab: Lab) -> dict:
    """Examples in the prompt, and a question: which label goes with which kind of thing is drawn for this
    prompt alone, so no weight can know it. No weight changes; when the prompt is gone, so is what it learned.
    (Its text has tables of this kind, each with labels of its own.)"""
    before, shots = fingerprint(lab.base), (0, 1, 2, 4, 8)
    prompts = {n: mappings(lab, n) for n in shots}
    right = {f"{share:.0%}": [lab.accuracy(model, prompts[n]) for n in shots]
             for share, model in lab.snapshots((2, 3, 4, 8))}  # fmt: skip
    best = [sum(p.optimal for p in prompts[n]) / len(prompts[n]) for n in shots]
    *_, last = right.values()
    one = next((p for p in prompts[4] if p.optimal == 1), prompts[4][0])  # an example tells its answer
    answers = fewshot.likeliest(lab.base, lab.tokenizer, [one._replace(examples=()), one], "table")
    question, heads = fewshot.text(one, "table"), lab.heads(lab.base, 20)
    layer, head = (int(i) for i in divmod(heads.argmax(), heads.shape[1]))
    ids = lab.tokenizer.encode("".join(f" {w}" for w in lab.world.things[:8]) * 2)[None]
    return {
        "row": by_the_prompt(lab, before, f"0 -> 8 examples: {last[0]:.2f} -> {last[-1]:.2f} right"),
        "samples": [[question, f"{answers[0]} (without the examples)", answers[1], one.answer]],
        "curves": {"shots": list(shots), "best possible": best, **right},
        "head": {"layer": layer, "head": head, "score": float(heads.max()),
                 "tokens": [lab.tokenizer.decode(i) for i in ids.T],
                 "map": recall.attention(lab.base, ids)[layer, 0, head].round(3).tolist()},
        "notes": [f"Right after 0, 1, 2, 4 and 8 examples: {_percents(last)}; the best possible predictor: "
                  f"{_percents(best)}."],
    }  # fmt: skip


def _percents(rates: list[float]) -> str:
    return ", ".join(f"{rate:.0%}" for rate in rates)


@stage("instruction tuning", "지시 미세조정")
def instruction_tuning(lab: Lab) -> dict:
    """Pairs of prompt and completion teach it to answer in the wanted form (supervised). All weights move, a
    little. It answers zero-shot, out of what pre-training left, and where that left nothing it invents."""
    count = len(tasks.tuning(lab.world))
    result = trained(lab, lab.tuned, lab.base, f"{count:,} pairs", lab.seconds("sft"))
    return result | {"samples": compared(lab, lab.base, lab.tuned)}


@stage("without chain of thought", "사고의 사슬 없이")
def without_steps(lab: Lab) -> dict:
    """The completions of the tuning above show the steps of a journey before its end (chain of thought). Here
    the same base is tuned to answers without their steps, on the same problems."""
    items = tasks.journeys(lab.world, "sft", range(1, 6), 1000, "direct")
    start, updates = time.perf_counter(), max(1, lab.recipe.sft["max_iters"] // 3)
    model = lab.tune(items, max_iters=updates, learning_rate=5e-4)
    seconds = time.perf_counter() - start
    result = trained(lab, model, lab.base, f"{len(items):,} answers alone", seconds)
    for name in ("form", "known", "falsehoods", "few-shot"):
        del result["row"][name]  # it has learned about journeys alone
    samples = compared(lab, model, lab.tuned, SHOWN[-1:])
    return result | {"samples": samples, "compares": ["at once", "step by step"]}


@stage("reward model", "보상 모델")
def reward_model(lab: Lab) -> dict:
    """People say which of two answers is better; a copy of the model, with one number as its result, learns
    to score answers as they would. (Simulated people here: they know the truth, and slip in one of ten.)"""
    judge = lab.judge
    people = lab.world.people("known", "eval") + lab.world.people("never", "eval")
    judgement = reward.judged(judge, lab.comparisons(people, 1000, error=0.0))
    moved, _ = weight_change(lab.tuned.params, {name: judge.model.params[name] for name in lab.tuned.params})
    kinds = ", ".join(f"{kind} {rate.rate:.0%}" for kind, rate in judgement.by_kind.items())
    return {
        "row": {"data": f"{lab.recipe.reward['comparisons']:,} comparisons", "weights": judge.model.flat.size,
                "change": moved, "seconds": lab.seconds("judge"),
                "shown": f"prefers the better answer: {judgement.right.rate:.2f}",
                "base": fingerprint(judge.model) == fingerprint(lab.base)},
        "notes": [f"It prefers the better answer in {judgement.right.rate:.0%}, about people of whom it was "
                  f"taught nothing: {kinds}."],
    }  # fmt: skip


@stage("RLHF", "인간 피드백 기반 강화학습")
def rlhf(lab: Lab) -> dict:
    """It writes answers, the reward model scores them, and a policy gradient makes the better ones likelier,
    without going far from where it was (KL). All weights move, very little; invented answers get rarer. Shown
    below: the judge's reward; gold, what people would truly feel, which it does not see; the KL in nats; the
    entropy; the share of answers that are distinct."""
    model = lab.steered
    result = trained(lab, model, lab.tuned, "its own answers, scored", lab.seconds("rlhf"))
    names = ("iter", "reward", "gold", "kl", "entropy")
    rows = read_records(lab.folder / "rlhf" / "records.jsonl", *names)
    curves = {name: [row[name] for row in rows] for name in names}
    strangers = lab.sets[SHOWN[1]][:50]
    answers = [evaluate.ask(each, lab.tokenizer, strangers) for each in (lab.tuned, model)]
    changed = [[item["prompt"], a.text, b.text, item["completion"]]
               for item, a, b in zip(strangers, *answers, strict=True) if a.text != b.text]  # fmt: skip
    return result | {"samples": compared(lab, lab.tuned, model, SHOWN[:1]) + changed[:2], "curves": curves}


def _beside(lab: Lab, name: str, config: AdapterConfig, items: list[tasks.Item], **how) -> dict:
    model = lab.beside(name, config, items, **how)
    result = trained(lab, model, lab.base, f"{len(items):,} pairs", lab.seconds(name))
    return result | {"samples": compared(lab, lab.base, model, SHOWN[:1])}


@stage("LoRA", "저랭크 적응")
def lora(lab: Lab) -> dict:
    """The same tuning, but the base stays as it is: beside each of its maps a branch of low rank is
    trained."""
    config = AdapterConfig("lora", rank=4, alpha=4.0)
    return _beside(lab, "lora", config, tasks.tuning(lab.world), learning_rate=3e-3)


@stage("p-tuning", "소프트 프롬프트")
def ptuning(lab: Lab) -> dict:
    """The base stays as it is, and so do its maps: what is trained are a few vectors before the prompt, made
    by a small network that is not needed afterwards. One prompt learns one task: questions about people."""
    config = AdapterConfig("ptuning", num_virtual_tokens=16, hidden=128)
    items = tasks.questions(lab.world, lab.world.people("known", "sft"))
    updates = max(1, lab.recipe.sft["max_iters"] // 2)
    return _beside(lab, "ptuning", config, items, learning_rate=3e-3, max_iters=updates)


@stage("two memories", "두 가지 기억")
def two_memories(lab: Lab) -> dict:
    """The prompt says otherwise than the weights: which of them answers? What it says about people whom
    nobody knew is read from it (non-parametric memory), by attention heads that can be found and cut out."""
    before, world = fingerprint(lab.base), lab.world
    people, never = world.people("known")[:50], world.people("never", "eval")[:50]
    against = lab.memories(lab.base, people)
    own = lab.memories(lab.base, never, agrees=True).prompt
    scores, prompts = lab.heads(lab.base, 20), mappings(lab, 8, 3)
    heads = recall.strongest(scores)
    cut = lab.memories(recall.without(lab.base, heads), never, agrees=True).prompt
    alone = {head: lab.accuracy(recall.without(lab.base, [head]), prompts)
             for head in np.ndindex(scores.shape)}  # fmt: skip
    worst = min(alone, key=alone.get)
    back = recall.previous_scores(lab.base, lab.words, count=20)[worst]
    return {
        "row": by_the_prompt(lab, before, f"told otherwise, it says so: {against.prompt.rate:.2f}"),
        "heads": [f"{layer}.{head}" for layer, head in heads],
        "alone": {f"{layer}.{head}": right for (layer, head), right in alone.items()},
        "notes": [
            f"Where they contradict, the prompt answers in {against.prompt.rate:.0%}, the weights in "
            f"{against.weights.rate:.0%}.",
            f"Facts of the prompt about people never seen: {own.rate:.0%} right; without the {len(heads)} "
            f"heads that look at what followed the same word before (induction heads), {cut.rate:.0%}.",
            f"Mappings of the prompt: {alone[worst]:.0%} right without head {worst[1]} of layer {worst[0]} "
            f"alone ({back:.0%} of its attention goes to the token before), without any other head "
            f"{min(right for head, right in alone.items() if head != worst):.0%} at least.",
        ],
    }  # fmt: skip


# --- all of it ----------------------------------------------------------------------------------------------


def tell(lab: Lab, report: Callable[[int, Stage, dict | None], None] = lambda n, stage, result: None) -> dict:
    """Measures every stage in turn; `report` hears of each before it (result None) and after it.

    A stage that fails says why, as its "failed", and the others go on; not without a base. Raises
    KeyboardInterrupt, and what pre-training raises.
    """
    story = {
        "seed": lab.seed, "quick": lab.recipe.world == QUICK.world, "world": lab.source,
        "dtype": lab.recipe.pretrain.get("dtype", "float32"), "folder": lab.folder.name, "stages": {},
    }  # fmt: skip
    for n, stage in enumerate(STAGES, 1):
        report(n, stage, None)
        try:
            result = lab.measurement(f"story {stage.name}", partial(stage.measure, lab))
        except Exception as error:
            if n == 1:
                raise
            result = {"failed": f"{type(error).__name__}: {error}"}
        story["stages"][stage.name] = {"term": stage.term, "says": stage.says, **result}
        report(n, stage, result)
        with replacing(lab.folder.parent / FILE) as beside:
            beside.write_text(json.dumps(story, ensure_ascii=False), encoding="utf-8")
    return story


def questions(folder: Path) -> list[str]:
    """What the samples of the story in this folder ask."""
    try:
        samples = read_object(folder / FILE)["stages"]["instruction tuning"].get("samples", ())
        return [str(question) for question, *_ in samples]
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{folder / FILE}: {DAMAGED}") from None


def world_of(folder: Path) -> str | None:
    """The world of a story's model in this folder, or None where it is no such model."""
    path = folder.resolve().parent.parent / FILE
    if not path.is_file() or (story := read_object(path)).get("folder") != folder.resolve().parent.name:
        return None
    if not isinstance(source := story.get("world"), str) or not source.startswith("world:"):
        raise UserError(f"{path}: {DAMAGED}")
    return source


def where(folder: Path, name: str) -> tuple[Path, Path | None]:
    """The folder of a stage's model, and of its adapter. Raises UserError where the story has none."""
    names, beside = ("base", "sft", "rlhf", "lora", "ptuning"), name in ("lora", "ptuning")
    if name not in names:
        raise UserError(f"{name}: the story's models are {', '.join(names)}")
    if not (folder / FILE).exists():
        raise UserError(f"{folder}: has no {FILE}: tinygpt story --out {folder} tells one")
    models = folder / str(read_object(folder / FILE).get("folder"))
    if not (models / name / (checkpoint.ADAPTER_CONFIG if beside else checkpoint.CONFIG)).exists():
        raise UserError(f"{folder}: the story has not come to {name} yet: the same tinygpt story goes on")
    return (models / "base", models / name) if beside else (models / name, None)
