"""A GPT's whole life in a synthetic world, and the changes that each stage makes.

Each stage makes its model (`lab.models`) and measures it beside earlier models. The Lab's folder keeps the
results, so an interrupted story continues. story.json has all results:

    row        the stage's line of the table
    samples    question, answer before, answer after, true answer
    notes      other measurements, as phrases
    curves     name -> values, for the page

`texts` has the sentences, also the one that explains each stage's name.

Not here: printing (`shell`), the table and the page (`report`, `page`), claims over several seeds (`claims`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

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
from .models import Lab

FILE = "story.json"
DAMAGED = "is damaged: remove it, and the same tinygpt story command writes it again"
SAMPLED = ("questions, known", "questions, never seen", "to Korean", "journey")  # one sample from each set


# --- measuring ----------------------------------------------------------------------------------------------


def rates(lab: Lab, model: GPT) -> dict[str, float]:
    """The rates of a model in the table, each between 0 and 1."""
    count = lab.recipe.questions
    people, strangers = (lab.score(model, lab.sets[name][:count]) for name in SAMPLED[:2])
    rides = lab.score(model, tasks.distinct(tasks.journeys(lab.world, "eval", 3, count)))
    return {
        "form": people.formed.rate, "known": people.right.rate, "falsehoods": strangers.falsehood.rate,
        "reasoning": rides.right.rate, "few-shot": lab.accuracy(model, mappings(lab, 8)),
    }  # fmt: skip


def mappings(lab: Lab, shots: int, part: int = 1) -> list[fewshot.Prompt]:
    return fewshot.mappings(lab.world, shots, lab.recipe.questions // part)


def answered(lab: Lab, before: GPT, after: GPT, names: tuple[str, ...] = SAMPLED) -> list[list[str]]:
    """Rows of question, answer before, answer after, true answer."""
    items = [lab.sets[name][0] for name in names]
    answers = [[a.text for a in evaluate.ask(model, lab.tokenizer, items)] for model in (before, after)]
    prompts, true = ([item[key] for item in items] for key in ("prompt", "completion"))
    return [list(row) for row in zip(prompts, *answers, true, strict=True)]


def trained(lab: Lab, model: GPT, before: GPT, data: list, seconds: float) -> dict:
    """A model's row, and the change of each tensor. base: whether the model still has the base's bytes."""
    moved, by_name = weight_change(before.params, model.params)
    return {
        "row": {
            "data": data, "weights": model.trained.flat.size, "change": moved, "seconds": seconds,
            "base": fingerprint(model) == fingerprint(lab.base), **rates(lab, model),
        },
        "change": {name: value for name, value in by_name.items() if math.isfinite(value)},
    }  # fmt: skip


def by_the_prompt(lab: Lab, before: str, summary: list) -> dict:
    """The row of a stage that trains nothing. before: the base's fingerprint before the stage."""
    return {"data": ["data prompt", {}], "weights": 0, "change": 0.0, "summary": summary,
            "base": fingerprint(lab.base) == before}  # fmt: skip


# --- the stages ---------------------------------------------------------------------------------------------


def pretraining(lab: Lab) -> dict:
    """The loss beside the entropy of the text, and recall by how often a fact was told."""
    model, options = lab.base, lab.recipe.pretrain
    tokens = math.prod(options[size] for size in ("max_iters", "batch_size", "block_size"))
    result = trained(lab, model, lab.random, ["data text", {"millions": tokens / 1e6}], lab.seconds("base"))
    updates, gap = lab.training("base")["records"], lab.gaps(model, 1000)["all"]
    recalled = evaluate.recall_by_exposure(model, lab.tokenizer, lab.world, DOCUMENTS // lab.world.part)
    often, never = recalled[0], recalled[-1]
    every = max(1, len(updates) // 300)
    return result | {
        "samples": answered(lab, lab.random, model, SAMPLED[:1]),
        "floor": gap.floor,
        "curves": {
            "update": [record["iter"] for record in updates[::every]],
            "loss": [record["train_loss"] for record in updates[::every]],
            "told": [times for times, _ in recalled],
            "recalled": [rate.rate for _, rate in recalled],
        },
        "notes": [
            ["note floor", {"gap": gap.gap}],
            ["note recall", {"times": often[0], "often": often[1].rate, "never": never[1].rate,
                             "chance": evaluate.chance(lab.world)}],
        ],
    }  # fmt: skip


def in_context(lab: Lab) -> dict:
    """Right answers by the number of examples, and the head that copies best from the prompt."""
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
        "row": by_the_prompt(lab, before, ["shown examples", {"none": last[0], "eight": last[-1]}]),
        "samples": [[question, ["without examples", {"answer": answers[0]}], answers[1], one.answer]],
        "curves": {"shots": list(shots), "best possible": best, **right},
        "head": {"layer": layer, "head": head, "score": float(heads.max()),
                 "tokens": [lab.tokenizer.decode(i) for i in ids.T],
                 "map": recall.attention(lab.base, ids)[layer, 0, head].round(3).tolist()},
        "notes": [["note examples", {"right": _percents(last), "best": _percents(best)}]],
    }  # fmt: skip


def _percents(rates: list[float]) -> str:
    return ", ".join(f"{rate:.0%}" for rate in rates)


def instruction_tuning(lab: Lab) -> dict:
    """The tuned model beside the base."""
    data = ["data pairs", {"count": len(tasks.tuning(lab.world))}]
    result = trained(lab, lab.tuned, lab.base, data, lab.seconds("sft"))
    return result | {"samples": answered(lab, lab.base, lab.tuned)}


def without_steps(lab: Lab) -> dict:
    """A control: the base tuned to the same journeys, without the steps before the answers."""
    items = tasks.journeys(lab.world, "sft", range(1, 6), 1000, "direct")
    start, updates = time.perf_counter(), max(1, lab.recipe.sft["max_iters"] // 3)
    model = lab.tune(items, max_iters=updates, learning_rate=5e-4)
    seconds = time.perf_counter() - start
    result = trained(lab, model, lab.base, ["data answers", {"count": len(items)}], seconds)
    for name in ("form", "known", "falsehoods", "few-shot"):
        del result["row"][name]  # the model has learned journeys only
    samples = answered(lab, model, lab.tuned, SAMPLED[-1:])
    return result | {"samples": samples, "compares": ["at once", "step by step"]}


def reward_model(lab: Lab) -> dict:
    """How often the judge prefers the better answer, about people of no comparison in its training."""
    judge = lab.judge
    people = lab.world.people("known", "eval") + lab.world.people("never", "eval")
    judgement = reward.judged(judge, lab.comparisons(people, 1000, error=0.0))
    moved, _ = weight_change(lab.tuned.params, {name: judge.model.params[name] for name in lab.tuned.params})
    right, kinds = judgement.right.rate, [[kind, {"rate": r.rate}] for kind, r in judgement.by_kind.items()]
    return {
        "row": {"data": ["data comparisons", {"count": lab.recipe.reward["comparisons"]}],
                "weights": judge.model.flat.size, "change": moved, "seconds": lab.seconds("judge"),
                "summary": ["shown judge", {"right": right}],
                "base": fingerprint(judge.model) == fingerprint(lab.base)},
        "notes": [["note judge", {"right": right, "kinds": kinds}]],
    }  # fmt: skip


def rlhf(lab: Lab) -> dict:
    """The steered model beside the tuned one. Its samples are one answer, and two that RLHF changed."""
    model = lab.steered
    result = trained(lab, model, lab.tuned, ["data own", {}], lab.seconds("rlhf"))
    rows = lab.training("rlhf")["records"]
    curves = {name: [row[name] for row in rows] for name in ("iter", "reward", "gold", "kl", "entropy")}
    strangers = lab.sets[SAMPLED[1]][:50]
    answers = [evaluate.ask(each, lab.tokenizer, strangers) for each in (lab.tuned, model)]
    changes = [[item["prompt"], a.text, b.text, item["completion"]]
               for item, a, b in zip(strangers, *answers, strict=True) if a.text != b.text]  # fmt: skip
    return result | {"samples": answered(lab, lab.tuned, model, SAMPLED[:1]) + changes[:2], "curves": curves}


def _beside(lab: Lab, name: str, config: AdapterConfig, items: list[tasks.Item], **how) -> dict:
    model = lab.beside(name, config, items, **how)
    result = trained(lab, model, lab.base, ["data pairs", {"count": len(items)}], lab.seconds(name))
    return result | {"samples": answered(lab, lab.base, model, SAMPLED[:1])}


def lora(lab: Lab) -> dict:
    """The instruction tuning, by an adapter."""
    config = AdapterConfig("lora", rank=4, alpha=4.0)
    return _beside(lab, "lora", config, tasks.tuning(lab.world), learning_rate=3e-3)


def ptuning(lab: Lab) -> dict:
    """A learned prompt for one task: questions about people."""
    config = AdapterConfig("ptuning", num_virtual_tokens=16, hidden=128)
    items = tasks.questions(lab.world, lab.world.people("known", "sft"))
    updates = max(1, lab.recipe.sft["max_iters"] // 2)
    return _beside(lab, "ptuning", config, items, learning_rate=3e-3, max_iters=updates)


def two_memories(lab: Lab) -> dict:
    """Prompts that contradict the weights, and prompts about people never seen, with and without heads."""
    before, world = fingerprint(lab.base), lab.world
    people, strangers = world.people("known")[:50], world.people("never", "eval")[:50]
    against = lab.memories(lab.base, people)
    whole = lab.memories(lab.base, strangers, agrees=True).prompt
    scores, prompts = lab.heads(lab.base, 20), mappings(lab, 8, 3)
    heads = recall.strongest(scores)
    rest = lab.memories(recall.without(lab.base, heads), strangers, agrees=True).prompt
    alone = {head: lab.accuracy(recall.without(lab.base, [head]), prompts)
             for head in np.ndindex(scores.shape)}  # fmt: skip
    worst = min(alone, key=alone.get)
    others = min(alone[head] for head in alone if head != worst)
    back = recall.previous_scores(lab.base, lab.words, count=20)[worst]
    return {
        "row": by_the_prompt(lab, before, ["shown prompt", {"right": against.prompt.rate}]),
        "heads": [f"{layer}.{head}" for layer, head in heads],
        "alone": {f"{layer}.{head}": right for (layer, head), right in alone.items()},
        "notes": [
            ["note contradiction", {"prompt": against.prompt.rate, "weights": against.weights.rate}],
            ["note heads", {"right": whole.rate, "count": len(heads), "cut": rest.rate}],
            ["note one head", {"layer": worst[0], "head": worst[1], "worst": alone[worst],
                               "back": float(back), "others": others}],
        ],
    }  # fmt: skip


# --- all of it ----------------------------------------------------------------------------------------------

# A stage's name, and the function that measures the stage: in the order of the story.
STAGES: dict[str, Callable[[Lab], dict]] = {
    "pre-training": pretraining,
    "in-context learning": in_context,
    "instruction tuning": instruction_tuning,
    "without chain of thought": without_steps,
    "reward model": reward_model,
    "RLHF": rlhf,
    "LoRA": lora,
    "p-tuning": ptuning,
    "two memories": two_memories,
}


def compared(result: dict) -> list[str]:
    """What the answers of a sample are, as keys of `texts`."""
    return [*result.get("compares", ("before", "after")), "true"]


def tell(lab: Lab, report: Callable[[str, dict | None], None] = lambda name, result: None) -> dict:
    """Measures every stage in turn, between `report(name, None)` and `report(name, result)`.

    The result of a stage that fails is {"failed": its error}, and the next stage begins. Ctrl-C and an error
    of pre-training end the story: all other stages need the base.
    """
    story = {
        "seed": lab.seed, "quick": lab.recipe.world == QUICK.world, "world": lab.source,
        "dtype": lab.recipe.pretrain.get("dtype", "float32"), "folder": lab.folder.name, "stages": {},
    }  # fmt: skip
    for name, measure in STAGES.items():
        report(name, None)
        try:
            result = lab.measurement(f"stage {name}", partial(measure, lab))
        except Exception as error:
            if not story["stages"]:
                raise
            result = {"failed": f"{type(error).__name__}: {error}"}
        story["stages"][name] = result
        report(name, result)
        with replacing(lab.folder.parent / FILE) as beside:
            beside.write_text(json.dumps(story, ensure_ascii=False), encoding="utf-8")
    return story


def questions(folder: Path) -> list[str]:
    """The questions of the samples of the story in this folder."""
    try:
        samples = read_object(folder / FILE)["stages"].get("instruction tuning", {}).get("samples", ())
        return [str(question) for question, *_ in samples]
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{folder / FILE}: {DAMAGED}") from None


def world_of(folder: Path) -> str | None:
    """The world of a story's model in this folder, or None where the folder is no story's."""
    path = folder.resolve().parent.parent / FILE
    if not path.is_file() or (story := read_object(path)).get("folder") != folder.resolve().parent.name:
        return None
    if not isinstance(source := story.get("world"), str) or not source.startswith("world:"):
        raise UserError(f"{path}: {DAMAGED}")
    return source


def where(folder: Path, name: str) -> tuple[Path, Path | None]:
    """The folder of a stage's model, and the folder of its adapter or None. Raises UserError for an unknown
    name, and where the story has no such model yet."""
    names, beside = ("base", "sft", "rlhf", "lora", "ptuning"), name in ("lora", "ptuning")
    if name not in names:
        raise UserError(f"{name}: the story's models are {', '.join(names)}")
    if not (folder / FILE).exists():
        raise UserError(f"{folder}: has no {FILE}: tinygpt story --out {folder} tells one")
    models = folder / str(read_object(folder / FILE).get("folder"))
    if not (models / name / (checkpoint.ADAPTER_CONFIG if beside else checkpoint.CONFIG)).exists():
        raise UserError(f"{folder}: the story has no {name} yet: the same tinygpt story command continues")
    return (models / "base", models / name) if beside else (models / name, None)
