"""The claims of the source, the Korean glossary. Each function measures a claim and returns rows by name:

    "the same before tuning": 0.4                                  a number
    "right about people in no tuning example": (0.9, ">=", 0.8)    a number that decides, with its limit

    held        every value in the 95% interval of the mean over seeds meets the limit
    refuted     no value in the interval meets the limit
    undecided   a part of the interval meets the limit

With two seeds, a pilot, the interval goes from the smaller value to the larger. One seed gives no verdict.

A Lab is a seed's world and the models that are trained in it. A folder keeps models and rows, so an
interrupted run continues. If kept rows have different limits, the limit of the last seed decides. The models
that a claim compares share a seed's world and base, except in claims 3, 4, 17, 18 and 21.

Not here: what is measured (`stages.evaluate`), training (`stages`), printing (`report`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..core.model import GPT
from ..core.train import weight_change
from ..errors import UserError
from ..files.atomic import replacing
from ..stages import evaluate, fewshot, recall, reward
from ..stages.adapter import AdapterConfig, fingerprint
from ..stages.answers import Estimate, estimate, verdict
from ..stages.recipes import FULL, Recipe
from ..text import instructions
from ..world import corpus, tasks
from .models import Lab, kept

Rows = dict[str, float | tuple[float, str, float]]  # a number, or a number with a sign and a limit

ROWS = "rows of claim {}"  # a measurement's name
CORE = (1, 2, 3, 5, 6, 7, 9, 10, 11, 14, 15, 19)
KNOWN, NEVER = "questions, known", "questions, never seen"  # two of `Lab.sets`


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


# --- the claims ---------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    number: int
    says: str
    measure: Callable[[Lab], Rows]


CLAIMS: dict[int, Claim] = {}


def claim(number: int, says: str) -> Callable:
    def register(measure: Callable[[Lab], Rows]) -> Callable[[Lab], Rows]:
        CLAIMS[number] = Claim(number, says, measure)
        return measure

    return register


@claim(1, "Pre-training, from random weights, teaches the patterns of language and general knowledge")
def patterns_and_knowledge(lab: Lab) -> Rows:
    gaps, people = lab.gaps(lab.base), lab.world.people
    worst = max(gap.gap for kind, gap in gaps.items() if kind not in ("retrieval", "all"))
    strangers = lab.recall(lab.base, people("never")) - evaluate.chance(lab.world)
    return {
        "loss above the floor, worst kind but retrieval, nats": (worst, "<=", 0.10),
        "loss above the floor, retrieval": gaps["retrieval"].gap,
        "loss above the floor, all": gaps["all"].gap,
        "recall of facts told often": (lab.recall(lab.base, people("known")), ">=", 0.95),
        "recall of facts never told, above chance": (strangers, "<=", 0.03),
    }


@claim(2, "Pre-training is a major update of the weights, fine-tuning a fine adjustment")
def major_and_fine(lab: Lab) -> Rows:
    """Tensors that are zero before pre-training are left out: their relative change is infinite."""
    pre, pre_by_name = weight_change(lab.random.params, lab.base.params)
    tuned, by_name = weight_change(lab.base.params, lab.tuned.params)
    ratios = [pre_by_name[name] / by_name[name] for name in by_name if math.isfinite(pre_by_name[name])]
    flats = [model.flat for model in (lab.random, lab.base, lab.tuned)]
    distances = [float(np.linalg.norm(b - a)) for a, b in zip(flats, flats[1:], strict=False)]
    return {
        "relative change in pre-training": pre,
        "relative change in fine-tuning": tuned,
        "relative change, pre-training over fine-tuning": (pre / tuned, ">=", 5),
        "the same, least of all tensors": (min(ratios), ">=", 5),
        "distance, pre-training over fine-tuning": distances[0] / distances[1],
        "directions with 90% of a matrix's change, pre-training": _directions(lab.random, lab.base),
        "directions with 90% of a matrix's change, fine-tuning": _directions(lab.base, lab.tuned),
    }


def _directions(before: GPT, after: GPT) -> float:
    """The mean over all blocks' maps: how many singular values of the change have 90% of its square sum."""
    counts = []
    for name, p in before.params.items():
        if p.ndim == 2 and name.startswith("h."):
            energy = np.cumsum(np.square(np.linalg.svd(after.params[name] - p, compute_uv=False)))
            counts.append(1 + int(np.searchsorted(energy, 0.9 * energy[-1])))
    return float(np.mean(counts))


@claim(3, "Pre-training plants parametric memory, which inference recalls")
def parametric_memory(lab: Lab) -> Rows:
    world, attributes = lab.world, lab.world.lexicon.attributes
    recalls = {weight: evaluate.recall(lab.base, lab.tokenizer, world, people)
               for weight, people in world.by_weight().items() if weight > 0}  # fmt: skip
    rates = {weight: recall.rate().rate for weight, recall in recalls.items()}
    facts = sum(len(recall.right) for recall in recalls.values())
    nats = sum(recall.nats.sum() for recall in recalls.values())
    guess = np.mean([math.log(len(a.values)) for a in attributes])
    bits = (facts * guess - nats) / np.mean([len(a.wordings) for a in attributes]) / math.log(2)
    source = f"{lab.source}:permuted"
    (other, tokenizer), permuted = lab.pretrained("permuted", source), corpus.world_of(source)
    answers = evaluate.recall(other, tokenizer, permuted, permuted.people("known"))
    people = world.people("known")
    first = [people[n].values[a] for n, a in zip(answers.person, answers.attribute, strict=True)]
    return {
        **{f"recall, weight {weight} in the corpus": rate for weight, rate in rates.items()},
        "recall, told most minus told least": (rates[max(rates)] - rates[min(rates)], ">=", 0.5),
        "bits about people stored per weight": bits / lab.base.flat.size,
        "recall after other answers were told": (answers.rate().rate, ">=", 0.95),
        "of these facts, answers of the first world": (float(np.mean(answers.answer == first)), "<=", 0.03),
    }


@claim(4, "Adapters such as LoRA can be used while pre-training")
def adapters_in_pretraining(lab: Lab) -> Rows:
    """No row has a limit. The rows are the loss above full pre-training on equal tokens, by rank, and with
    ten merges."""
    full, numbers = lab.gaps(lab.base)["all"].gap, {}
    for rank, merge_every in ((4, 0), (16, 0), (64, 0), (16, lab.recipe.pretrain["max_iters"] // 10)):
        name = f"rank {rank}" + ", merged ten times" * bool(merge_every)
        config = AdapterConfig("lora", rank=rank, alpha=float(rank), full=True)
        model, _ = lab.pretrained(name.replace(" ", "-"), adapter=config, merge_every=merge_every)
        numbers[f"nats above full training, {name}"] = lab.gaps(model)["all"].gap - full
        numbers[f"recall of facts told often, {name}"] = lab.recall(model, lab.world.people("known"))
    return numbers


@claim(5, "Instruction tuning makes it answer in the wanted form")
def form(lab: Lab) -> Rows:
    before, after = (lab.score(model, KNOWN).formed.rate for model in (lab.base, lab.tuned))
    scores = [lab.score(lab.tuned, name) for name in lab.sets]
    people = lab.world.people("known", "eval")
    return {
        "well-formed answers, more than before": (after - before, ">=", 0.5),
        "well-formed answers": (_mean(score.formed.rate for score in scores), ">=", 0.99),
        "stopped by itself": (_mean(score.stopped.rate for score in scores), ">=", 0.99),
        "facts recalled in a sentence, before": lab.recall(lab.base, people),
        "facts recalled in a sentence, after": lab.recall(lab.tuned, people),
    }


@claim(6, "A tuned model answers zero-shot, out of its parametric memory")
def zero_shot(lab: Lab) -> Rows:
    return {
        "right about people in no tuning example": (lab.score(lab.tuned, KNOWN).right.rate, ">=", 0.8),
        "the same before tuning": lab.score(lab.base, KNOWN).right.rate,
        "right about people whom the text rarely names": lab.score(lab.tuned, "questions, rare").right.rate,
        "always the most frequent answer": tasks.majority(lab.sets[KNOWN]),
    }


@claim(7, "Step-by-step reasoning in the completions raises correctness clearly")
def chain_of_thought(lab: Lab) -> Rows:
    world, numbers, rates = lab.world, {}, {}
    problems = {k: tasks.distinct(tasks.journeys(world, "eval", k, lab.count(4000)))[: lab.count(1000)]
                for k in range(1, 6)}  # fmt: skip
    items = {style: tasks.journeys(world, "sft", range(1, 6), lab.count(1000), style)
             for style in ("direct", "filler", "shuffled", "steps")}  # fmt: skip
    size = {style: sum(map(lab.length, items[style])) for style in items}
    updates = lab.recipe.sft["max_iters"] * 3 // 10
    for name, style, times in (
        ("answer alone, as many examples", "direct", updates * size["direct"] // size["steps"]),
        ("answer alone, as many tokens", "direct", updates),
        ("full stops, then the answer", "filler", updates),
        ("steps in another order, then the answer", "shuffled", updates),
        ("step by step", "steps", updates),
    ):
        model = lab.tune(items[style], max_iters=times, learning_rate=5e-4)
        rates[name] = [lab.score(model, problems[k]).right.rate for k in problems]
        numbers |= {f"{name}: right, {k} rides": rate for k, rate in zip(problems, rates[name], strict=True)}
    hard = [item for k in (3, 4, 5) for item in problems[k]]
    changed, followed = evaluate.corrupted(model, lab.tokenizer, world, hard)
    best = np.max([rates[name] for name in rates if name != "step by step"], axis=0)
    gain = float((rates["step by step"] - best)[2:].min())
    return numbers | {
        "right, above the best control, least of 3 to 5 rides": (gain, ">=", 0.2),
        # Without a right answer there is nothing to change.
        "a false step changes the answer": (changed.rate if changed.n else 0.0, ">=", 0.8),
        "to what follows from that step": followed.rate if followed.n else 0.0,
    }


@claim(8, "After instruction tuning it tells plausible falsehoods")
def falsehoods(lab: Lab) -> Rows:
    """Without refusals in the tuning nearly all answers are false, and the rate cannot rise. So all arms with
    unknown facts have 300 refusals. (The recipe's own tuning has 40 refusals and 160 unknown facts.)"""
    world, rates = lab.world, {}
    plain = lab.score(lab.tune(tasks.tuning(world, refused=0, answered=0)), NEVER).falsehood.rate
    recalled = lab.recall(lab.base, world.people("never", "eval"))
    numbers: Rows = {
        "base, asked": lab.score(lab.base, NEVER).falsehood.rate,
        "base, completing a sentence: likeliest value false": 1 - recalled,
        "false about people never seen": (plain, ">=", 0.5),
    }
    more = tasks.questions(world, world.people("known", "rl"))
    for title, facts, beside in (("no", 0, []), ("300", 300, []), ("600", 600, []), ("600 known", 0, more)):
        taught = tasks.tuning(world, refused=300, answered=facts)
        model = lab.tune(taught + beside)
        rates[title] = lab.score(model, NEVER).falsehood.rate
        arm = f"tuned with 300 refusals and {title} " + ("facts more" if beside else "unknown facts")
        numbers[f"{arm}: false"] = rates[title]
        numbers[f"{arm}: known people right"] = lab.score(model, KNOWN).right.rate
        if facts:
            unknown = [item for item in taught if item["meta"].get("exposure") == 0]
            unknown = [item for item in unknown if item["completion"] != tasks.REFUSAL]
            numbers[f"{arm}: these answered right"] = lab.score(model, unknown).right.rate
    return numbers | {
        "fall by refusals in the tuning": plain - rates["no"],
        "rise with unknown facts in the tuning": (rates["600"] - rates["no"], ">=", 0.05),
        "rise with unknown facts, above that with known ones": (
            rates["600"] - rates["600 known"], ">=", 0.05
        ),
    }


@claim(
    9, "A judge that people teach by comparing scores answers (a reward model; the source calls it an agent)"
)
def taught_judge(lab: Lab) -> Rows:
    """The test pairs are about people whom no comparison of the training names.

    One label in ten is wrong on purpose, in the training, in `calibration` and in `agreement with labels`. Of
    the shuffled labels half are wrong. In most pairs "I do not know." is better than the other answer. So a
    judge that always prefers "I do not know." is right in most pairs. In pairs of two values it is not.
    """
    people = lab.world.people("known", "eval") + lab.world.people("never", "eval")
    pairs, count = lab.comparisons(people, lab.count(3000), error=0.0), lab.recipe.reward["comparisons"]
    taught_by, numbers = reward.taught_by(lab.world), {}
    labelled = lab.comparisons(taught_by, count)
    for n in (300, 1000, 3000):
        few = reward.judged(lab.teach(labelled[:n]), pairs)
        numbers[f"right, of what is true, {n} labels"] = few.right.rate
        numbers |= {f"{kind}, {n} labels": rate.rate for kind, rate in few.by_kind.items()}
    full = reward.judged(lab.judge, pairs)
    slips = reward.judged(lab.judge, lab.comparisons(people, lab.count(3000)))  # labels with slips
    shuffled = reward.judged(lab.teach(lab.comparisons(taught_by, count, error=0.5)), pairs)
    kinds = {kind: rate.rate for kind, rate in full.by_kind.items()}
    values = "right over wrong"  # a kind that few pairs may not have
    return numbers | {
        "right, of what is true": (full.right.rate, ">=", 0.9),
        "margin": full.margin,
        "calibration": slips.calibration,
        **kinds,
        values: (kinds.get(values, 0.0), ">=", 0.9),
        "right, mean over kinds of pairs without a garbled answer": _mean(
            rate for kind, rate in kinds.items() if "garbled" not in kind
        ),
        "agreement with labels, over the ceiling": slips.agreed / slips.labels_right,
        "taught by shuffled labels: right over wrong, distance from a half": (
            abs(shuffled.by_kind[values].rate - 0.5) if values in kinds else 0.5, "<=", 0.1
        ),
    }  # fmt: skip


@claim(10, "RLHF steers by that judge, over all weights, and corrects falsehoods")
def steered(lab: Lab) -> Rows:
    """The questions are about people in no prompt of RLHF, no comparison and no tuning example.

    The last run goes too far (over-optimisation). Its judge learned from 1,000 comparisons. This run has no
    KL penalty, no tuning examples, and four times the learning rate of the recipe.
    """
    strangers = lab.sets[NEVER]

    def measured(model: GPT) -> tuple[float, float, float]:
        answers = evaluate.ask(model, lab.tokenizer, strangers)
        false = evaluate.score(lab.world, strangers, answers).falsehood.rate
        refused = _mean(answer.text == tasks.REFUSAL for answer in answers)
        return false, refused, lab.score(model, KNOWN).right.rate

    false, refused, right = measured(lab.tuned)
    after, refuses, still = measured(lab.steered)
    taught_by, count = reward.taught_by(lab.world), lab.recipe.reward["comparisons"]
    blind, *_ = measured(lab.steer(lab.teach(lab.comparisons(taught_by, count, blind=True)))[0])
    deaf, *_ = measured(lab.steer(lab.judge.deaf())[0])
    weak, rate = lab.teach(lab.comparisons(taught_by, lab.count(1000))), lab.recipe.rlhf["learning_rate"]
    _, curve = lab.steer(weak, beta=0.0, ptx_coef=0.0, learning_rate=4 * rate)
    gold, proxy, kl = (np.array([record[name] for record in curve]) for name in ("gold", "reward", "kl"))
    window = min(15, len(gold))  # updates: gold of a single update is the mean of 16 questions
    gold, proxy, kl = (np.convolve(x, np.ones(window) / window, "valid") for x in (gold, proxy, kl))
    turn = int(gold.argmax())
    return {
        "false about people never seen, after tuning": false,
        "false about people never seen, after RLHF": after,
        "right about known people, after tuning": right,
        "right about known people, after RLHF": still,
        "false about people never seen, fewer than after tuning": (false - after, ">=", 0.3),
        "'I do not know.' about people never seen, more than after tuning": (refuses - refused, ">=", 0.3),
        "right about known people, fewer than after tuning": (right - still, "<=", 0.03),
        "false answers removed by a judge that is blind to truth": (false - blind, "<=", 0.1),
        "false answers removed without a judge, by the tuning examples alone": (false - deaf, "<=", 0.1),
        "relative change of the weights": weight_change(lab.tuned.params, lab.steered.params)[0],
        "too far: gold reward at its best": float(gold.max()),
        "too far: gold reward at the end": float(gold[-1]),
        "too far: reward at gold's best": float(proxy[turn]),
        "too far: reward at the end": float(proxy[-1]),
        "too far: nats from the reference at gold's best": float(kl[turn]),
        "too far: nats from the reference at the end": float(kl[-1]),
    }


@claim(11, "p-tuning and LoRA leave the base as it is, and train a few weights")
def base_untouched(lab: Lab) -> Rows:
    ids = instructions.prompt(lab.tokenizer, lab.sets[KNOWN][0]["prompt"])[None]
    before, untuned, changed, off = fingerprint(lab.base), lab.base.forward(ids)[0].copy(), 0, 0.0
    sizes, updates = {}, lab.recipe.sft["max_iters"] // 5
    for name in ("LoRA rank 1", "p-tuning, 16 tokens"):
        config, rates = ARMS[name]
        items = tasks.tuning(lab.world, "sft", 0, 0)
        model = lab.tune(items, config, max_iters=updates, learning_rate=rates[1])
        sizes[name] = _sizes(model)
        changed += fingerprint(model) != before
        if config.kind == "lora":
            tuned = model.forward(ids)[0].copy()
            merged = float(abs(model.merge().forward(ids)[0] - tuned).max() / abs(tuned).max())
        off = max(off, float(abs(model.base.forward(ids)[0] - untuned).max()))
    (_, lora_added), (prompt_trained, prompt_added) = sizes.values()
    return {
        "weights of the base that changed": (changed, "<=", 0),
        "change of logits with the adapter off": (off, "<=", 0),
        "change of logits by merging, over the largest": (merged, "<=", 1e-5),
        "LoRA rank 1: share of weights": (lora_added, "<=", 0.01),
        "p-tuning, 16 tokens: share of weights": (prompt_added, "<=", 0.02),
        "p-tuning, 16 tokens: share of weights, with its encoder": prompt_trained,
    }


ARMS = {  # adapter, and peaks of the learning rate: the best on the people of "val" counts
    "all weights": (None, (1e-4, 3e-4, 1e-3)),
    "LoRA rank 1": (AdapterConfig("lora", rank=1, alpha=1.0), (3e-3, 1e-2, 3e-2)),
    "LoRA rank 4": (AdapterConfig("lora", rank=4, alpha=4.0), (3e-3, 1e-2, 3e-2)),
    "LoRA rank 16": (AdapterConfig("lora", rank=16, alpha=16.0), (3e-3, 1e-2, 3e-2)),
    "p-tuning, 16 tokens": (AdapterConfig("ptuning", num_virtual_tokens=16, hidden=128), (1e-3, 3e-3, 1e-2)),
    "prompt, 16 tokens": (AdapterConfig("prompt", num_virtual_tokens=16), (1e-2, 3e-2, 1e-1)),
    "prefix, 16 tokens": (AdapterConfig("prefix", num_virtual_tokens=16), (1e-2, 3e-2, 1e-1)),
}


def _sizes(model: GPT) -> tuple[float, float]:
    """Shares of the base's number of weights: trained weights, and weights added when the model answers."""
    if model.trained is model:
        return 1.0, 0.0
    layers, params = tuple(model.adapter.config.encoder(model.config)), model.adapter.params
    encoder = sum(p.size for name, p in params.items() if name.startswith(layers))
    return model.adapter.flat.size / model.flat.size, (model.adapter.flat.size - encoder) / model.flat.size


@claim(12, "Adapters are less dramatic than full tuning")
def less_dramatic(lab: Lab) -> Rows:
    """All arms are tuned to the tasks and to 200 new facts. The test of a fact has a wording that the tuning
    does not have. RLHF is the one of claim 10: on all weights, and by an adapter of the tuned model."""
    world = lab.world
    facts, people = tasks.questions(world, world.people("never", "sft")[:50]), world.people("known", "eval")
    questions = [facts[n::5] for n in range(5)]  # by wording: there are five of each
    items = tasks.tuning(world, "sft", 0, 0) + questions[0] + questions[1] + questions[2]

    def measure(name: str, rate: float) -> Rows:
        model = lab.tune(items, ARMS[name][0], learning_rate=rate)
        scores = {title: lab.score(model, items[:300]) for title, items in lab.sets.items()}
        trained, added = _sizes(model)
        values = tasks.questions(world, world.people("known", "val"))
        return {
            "chosen by": lab.score(model, values).right.rate + lab.score(model, questions[3]).right.rate,
            "weights trained": trained,
            "weights added": added,
            "form": _mean(score.formed.rate for score in scores.values()),
            "right about known people": scores[KNOWN].right.rate,
            "new facts": lab.score(model, questions[4]).right.rate,
            "forgotten": lab.recall(lab.base, people) - lab.recall(model, people),
            "learning rate": rate,
        }

    def mended(name: str, rate: float) -> Rows:
        config, _ = ARMS[name]
        model = lab.steer(lab.judge, config, learning_rate=rate)[0] if config else lab.steered
        facts, strange = (tasks.questions(world, world.people(kind, "val")) for kind in ("known", "never"))
        mine, before = (lab.score(m, NEVER).falsehood.rate for m in (model, lab.tuned))
        return {
            "chosen by": lab.score(model, facts).right.rate - lab.score(model, strange).falsehood.rate,
            "made-up answers that RLHF mends": before - mine,
            "right about known people after RLHF": lab.score(model, KNOWN).right.rate,
        }

    trials = [("", measure, name, rates) for name, (_, rates) in ARMS.items()]
    trials += [("RLHF ", mended, "all weights", (lab.recipe.rlhf["learning_rate"],)),
               ("RLHF ", mended, "LoRA rank 1", (5e-4, 1.5e-3))]  # fmt: skip
    rows: Rows = {}
    for stage, how, name, rates in trials:
        arm = [lab.measurement(f"12 {stage}{name} {rate:g}", partial(how, name, rate)) for rate in rates]
        best = max(arm, key=itemgetter("chosen by"))
        rows |= {f"{key}: {name}": value for key, value in best.items() if key != "chosen by"}
    for key, name, limit in LESS:
        less = rows[f"{key}: all weights"] - rows[f"{key}: {name}"]
        rows[f"{key}: all weights minus {name}"] = (less, ">=", limit)
    return rows


LESS = (
    ("form", "LoRA rank 1", 0.02), ("right about known people", "LoRA rank 1", 0.02),
    ("new facts", "LoRA rank 1", 0.05), ("new facts", "p-tuning, 16 tokens", 0.05),
    ("forgotten", "LoRA rank 1", 0.02), ("made-up answers that RLHF mends", "LoRA rank 1", 0.05),
)  # fmt: skip


@claim(13, "Few trained weights still give zero-shot ability")
def few_weights(lab: Lab) -> Rows:
    """Questions about known people. The answer is the likeliest of the values, by a learned prompt without
    examples and by the base with examples. The people of "val" choose the number and form of the examples.

    copied: the share of wrong answers after 8 examples that are an answer of one of the examples.
    """
    config, peaks = ARMS["p-tuning, 16 tokens"]
    model = lab.tune(tasks.tuning(lab.world, "sft", 0, 0), config, learning_rate=peaks[1])

    def fitting(model: GPT, shots: int, style: str, split: str) -> list[fewshot.Prompt]:
        """The prompts that fit the context. An empty list where most do not fit."""
        prompts = fewshot.from_world(lab.world, "questions", shots, lab.count(1000), split)
        fit = [prompt for prompt in prompts if fewshot.fits(model, lab.tokenizer, prompt, style)]
        return fit if 2 * len(fit) > len(prompts) else []

    def right(model: GPT, shots: int, style: str, split: str) -> float:
        prompts = fitting(model, shots, style, split)
        return lab.accuracy(model, prompts, style) if prompts else 0.0

    forms = [(shots, style) for shots in (0, 1, 2, 4, 8) for style in fewshot.STYLES]
    best = max(forms, key=lambda form: right(lab.base, *form, "val"))
    rates = {shots: right(lab.base, shots, best[1], "eval") for shots in (0, 1, 2, 4, 8)}
    tuned = right(model, 0, "chat", "eval")
    eight = fitting(lab.base, 8, best[1], "eval")
    pairs = zip(fewshot.likeliest(lab.base, lab.tokenizer, eight, best[1]), eight, strict=True)
    wrong = [any(a == answer for _, answer in p.examples) for a, p in pairs if a != p.answer]
    return {f"right: base, {shots} examples, {best[1]}": rate for shots, rate in rates.items()} | {
        "right: p-tuned prompt": tuned,
        "examples of the best prompt": best[0],
        "copied": _mean(wrong or [0.0]),
        "right: p-tuned prompt minus 8 examples": (tuned - rates[8], ">=", 0),
        "right: p-tuned prompt minus the best prompt of up to 8 examples": (
            tuned - rates[best[0]], ">=", -0.05
        ),
    }


@claim(14, "In-context learning updates nothing")
def no_update(lab: Lab) -> Rows:
    """The same thousand questions without examples, before and after ten thousand prompts with examples."""
    mark, prompts = fingerprint(lab.base), lab.mappings(8, 10_000)
    bare = [prompt._replace(examples=()) for prompt in prompts[: lab.count(1000)]]
    before = fewshot.likeliest(lab.base, lab.tokenizer, bare, "table")
    with_context = lab.accuracy(lab.base, prompts)
    after = fewshot.likeliest(lab.base, lab.tokenizer, bare, "table")
    right = [sum(a == p.answer for a, p in zip(answers, bare, strict=True)) for answers in (before, after)]
    return {
        "weights that changed": (float(fingerprint(lab.base) != mark), "<=", 0),
        "right after the context is gone, minus before": (abs(right[1] - right[0]) / len(bare), "<=", 0),
        "answers that differ from those before": sum(map(str.__ne__, before, after)),
        "right with the context, minus without": (with_context - right[0] / len(bare), ">=", 0.2),
    }


SHOTS = (0, 1, 2, 4, 8, 16)


@claim(15, "Learning still happens, by the prompt")
def by_the_prompt(lab: Lab) -> Rows:
    numbers, rates, short = {}, {}, []
    for control in ("", *fewshot.CONTROLS):
        for shots in SHOTS:
            prompts = lab.mappings(shots, 1000, control)
            arm, right = f"{shots} examples{', ' * bool(control)}{control}", lab.accuracy(lab.base, prompts)
            numbers[f"right, {arm}"] = rates[control, shots] = right
            if control in ("", "unseen"):
                best = _mean(prompt.optimal for prompt in prompts)
                numbers[f"best possible, {arm}"] = best
                short.append(right - best)
    return numbers | {
        "right, minus the best possible, worst number of examples": (min(short), ">=", -0.05),
        "right after 16 examples with shuffled labels": (rates["shuffled", 16], "<=", 0.3),
    }


def _needed(right: Sequence[float], best: float) -> int:
    """The least number of examples in SHOTS, not 0, that gives 90% of the best; 32 where none does."""
    return next((n for n, mine in zip(SHOTS[1:], right[1:], strict=True) if mine >= 0.9 * best), 32)


def _few_shot(lab: Lab, model: GPT) -> Rows:
    """Right answers by number of examples. No example has the word of the question, so no copy is right."""
    return {str(shots): lab.accuracy(model, lab.mappings(shots, 1000, "unseen")) for shots in SHOTS}


REFRAINS = 0.12  # share of pre-training: the corpus begins with repeated word lists
PLACES = (1, 2, 3, 4, 6, 8, 10, 14)  # snapshots, in twentieths of pre-training
BEGUN = 0.15  # share of pre-training: the first snapshot that has read other documents


def _curves(lab: Lab) -> dict[float, list[float]]:
    """Share of pre-training -> right answers by number of examples."""
    rates = {share: lab.measurement(f"few-shot at {share:.0%}", partial(_few_shot, lab, model))
             for share, model in lab.snapshots(PLACES)}  # fmt: skip
    return {share: list(right.values()) for share, right in rates.items()}


@claim(16, "A good model needs a short prompt, a bad one a long one")
def short_prompts(lab: Lab) -> Rows:
    """The number of examples that give 90% of the best possible predictor's rate after 16 examples. 32 stands
    for more than 16."""
    best = _mean(prompt.optimal for prompt in lab.mappings(16, 1000, "unseen"))
    needed = {share: _needed(right, best) for share, right in _curves(lab).items()}
    return {f"examples needed, {share:.0%} of pre-training": n for share, n in needed.items()} | {
        f"examples needed, after {BEGUN:.0%} of pre-training minus at its end": (
            needed[BEGUN] - needed[1.0], ">=", 1
        )
    }


@claim(17, "Few-shot learning needs some level of pre-training")
def some_pretraining(lab: Lab) -> Rows:
    """learned: the rate after 8 examples, above the chance of 1/4 (a prompt has four labels). The heads that
    copy come first by design: the corpus begins with repeated word lists."""
    eight, people = SHOTS.index(8), lab.world.people("known")
    gain = {share: right[eight] - 1 / 4 for share, right in _curves(lab).items()}
    heads = {share: float(lab.heads(model).max()) for share, model in lab.snapshots(PLACES)}
    flat, _ = lab.pretrained("one-layer", n_layer=1)
    one = list(_few_shot(lab, flat).values())
    return {
        **{f"learned from 8 examples, {share:.0%} of pre-training": n for share, n in gain.items()},
        **{f"best induction head, {share:.0%} of pre-training": value for share, value in heads.items()},
        f"learned from 8 examples, all of pre-training minus {BEGUN:.0%}": (
            gain[1.0] - gain[BEGUN], ">=", 0.2
        ),
        "learned from 8 examples, four layers minus one layer": (gain[1.0] - (one[eight] - 1 / 4), ">=", 0.3),
        "one layer: recall of facts told often": lab.recall(flat, people),
        "four layers: recall of facts told often": lab.recall(lab.base, people),
    }


@claim(18, "Each stage works if the one before it did")
def each_stage(lab: Lab) -> Rows:
    items, updates, rates = tasks.tuning(lab.world), lab.recipe.sft["max_iters"], {}
    half, _ = lab.pretrained("half", max_iters=lab.recipe.pretrain["max_iters"] // 2)
    for pre, base in (("half", half), ("all", lab.base)):
        for tuned, times in (("a tenth", updates // 10), ("all", updates)):
            is_recipe = (pre, tuned) == ("all", "all")
            model = lab.tuned if is_recipe else lab.tune(items, base=base, max_iters=times)
            rates[pre, tuned] = lab.score(model, KNOWN).right.rate
    neither, tuning, pretraining, both = rates.values()
    return {f"right, {pre} of pre-training, {tuned} of tuning": r for (pre, tuned), r in rates.items()} | {
        "right, all of pre-training minus half": ((pretraining + both - neither - tuning) / 2, ">=", 0.02),
        "right, all of tuning minus a tenth": ((tuning + both - neither - pretraining) / 2, ">=", 0.02),
    }


@claim(19, "Non-parametric memory is the prompt's content, read through the weights")
def non_parametric_memory(lab: Lab) -> Rows:
    """The prompt describes one person, or two. Heads are cut out: the induction heads (they look at the token
    after an earlier copy of the same word), as many other heads, and each head alone.

    A head that looks at the preceding token is half of the same circuit. Such heads among the others make the
    others look important. So one control leaves them out.
    """
    people, prompts = lab.world.people("never", "eval")[: lab.count(250)], lab.mappings(8, 500)
    scores = lab.heads(lab.base)
    heads = recall.strongest(scores)
    ablation = recall.without(lab.base, heads)

    def measured(cut: Sequence[recall.Head], n: int = 250) -> np.ndarray:
        model = recall.without(lab.base, cut)
        right = lab.memories(model, people[:n], agrees=True).prompt.rate
        return np.array([right, lab.accuracy(model, prompts[: 2 * n])])

    whole, cut = measured([]), measured(heads)
    previous = recall.previous_scores(lab.base, lab.words)
    other, apart = (
        np.mean([measured(some) for some in recall.others(scores.shape, heads, 10, spared)], axis=0)
        for spared in ((), recall.strongest(previous))
    )
    by_other, by_apart = ((whole - cut) / np.maximum(whole - x, 0.005) for x in (other, apart))  # not by zero
    alone = {head: measured([head], 100)[1] for head in np.ndindex(scores.shape)}
    worst = min(alone, key=alone.get)
    rival = lab.memories(lab.base, people, agrees=True, rival=True).prompt.rate
    return {
        "facts of the prompt about people never seen: right": (whole[0], ">=", 0.8),
        "the same, if the prompt tells of a second person": rival,
        "the same without the induction heads": cut[0],
        "the same without as many others, mean of 10 sets": other[0],
        "damage by the induction heads over that by as many others": (by_other[0], ">=", 5),
        "the same without others of which none looks at the token before": apart[0],
        "damage by the induction heads over that by these": by_apart[0],
        "mappings by 8 examples: right": whole[1],
        "mappings without the induction heads": cut[1],
        "mappings without as many others": other[1],
        "mappings without others of which none looks at the token before": apart[1],
        "damage to mappings, over that by as many others": by_other[1],
        "mappings without one induction head, the worst": min(alone[head] for head in heads),
        "mappings without one head, the worst of all": alone[worst],
        "attention of that head to the token before": float(previous[worst]),
        "induction heads, of 16": len(heads),
        "facts recalled without the induction heads": lab.recall(ablation, lab.world.people("known")),
        "facts recalled": lab.recall(lab.base, lab.world.people("known")),
    }


@claim(20, "Zero-shot leans on the weights, few-shot uses both memories")
def both_memories(lab: Lab) -> Rows:
    """The prompt contradicts the weights. nats: log p of the prompt's value, minus that of the weights'."""
    numbers, rates = {}, {}
    for weight in (256, 16, 0):
        people = lab.world.by_weight()[weight][: lab.count(150)]
        for repeats in (1, 4):
            answer, name = lab.memories(lab.base, people, repeats), f"weight {weight}, said {repeats} times"
            rates[weight, repeats] = answer.prompt.rate
            numbers |= {
                f"by the prompt, {name}": answer.prompt.rate,
                f"by the weights, {name}": answer.weights.rate,
                f"nats for the prompt, {name}": answer.nats,
            }
    return numbers | {
        "by the prompt: never told minus told often": (rates[0, 1] - rates[256, 1], ">=", 0.02),
        "by the prompt, told often: said four times minus once": (
            rates[256, 4] - rates[256, 1], ">=", 0.02
        ),
    }


@claim(21, "GPT-1, GPT-2 and GPT-3 won by pre-training: larger models and more text")
def scale(lab: Lab) -> Rows:
    """Loss above the floor ~ weights^-a, text^-b (Kaplan et al. 2020, section 3).

    a is minus the slope of log(loss above the floor) over log(weights), at three widths. A second run has
    half the updates: b compares this run with the full run. The repeated word lists do not count as text. The
    model with GPT-1's blocks has a quarter of the learning rate: with the full rate it does not train.
    """
    widths = {n: lab.pretrained(f"width-{n}", n_embd=n)[0] for n in (32, 64)} | {128: lab.base}
    half, _ = lab.pretrained("half", max_iters=lab.recipe.pretrain["max_iters"] // 2)
    rate = lab.recipe.pretrain["learning_rate"] / 4
    post_norm, _ = lab.pretrained("post-norm", post_norm=True, learning_rate=rate)
    *gaps, less, other = (lab.gaps(model)["all"].gap for model in (*widths.values(), half, post_norm))
    by_weights = -np.polyfit(np.log([model.flat.size for model in widths.values()]), np.log(gaps), 1)[0]
    by_text = math.log(less / gaps[-1]) / math.log((1 - REFRAINS) / (0.5 - REFRAINS))
    return {f"loss above the floor, {n} channels": gap for n, gap in zip(widths, gaps, strict=True)} | {
        "loss above the floor, half of the text": less,
        "loss above the floor, GPT-1's blocks": other,
        "recall of facts told often, GPT-1's blocks": lab.recall(post_norm, lab.world.people("known")),
        "exponent of the loss above the floor, by weights": (float(by_weights), ">=", 0.1),
        "exponent of the loss above the floor, by text": (by_text, ">=", 0.1),
    }


@claim(22, "It does the tasks that the source names: translation, question answering, sentiment, summarising")
def named_tasks(lab: Lab) -> Rows:
    """After tuning, without examples; before tuning, with 0, 1 and 4 examples in a table's form."""
    names = [name for name in lab.sets if name not in ("questions, rare", NEVER)]
    scores = {name: lab.score(lab.tuned, name) for name in names}
    numbers = {f"{name}: right after tuning": score.right.rate for name, score in scores.items()}
    numbers |= {f"{name}: most frequent answer": score.majority for name, score in scores.items()}
    for task in fewshot.WORLD_TASKS:
        for shots in (0, 1, 4):
            prompts = fewshot.from_world(lab.world, task, shots, lab.count(1000))
            right = lab.accuracy(lab.base, prompts, "arrow")
            numbers[f"{task}: right before tuning, {shots} examples"] = right
    least = min(score.right.rate - score.majority for name, score in scores.items() if name != "journey")
    return numbers | {"right, minus the most frequent answer, worst task": (least, ">=", 0.2)}


# --- over seeds ---------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """A claim's values by seed, the Estimate of each row over the seeds that have the row, and the limits."""

    seeds: dict[str, dict[str, float]]
    estimates: dict[str, Estimate]
    limits: dict[str, tuple[str, float]]  # sign and limit

    def verdicts(self) -> dict[str, str]:
        return {name: f"{sign} {limit:g}: {verdict(self.estimates[name], sign, limit)}"
                for name, (sign, limit) in self.limits.items()}  # fmt: skip


def run(
    folder: Path, numbers: Sequence[int], seeds: Iterable[int], say: Callable[[str], None],
    recipe: Recipe = FULL,
) -> dict[int, Result]:  # fmt: skip
    """Measures the claims of these numbers, seed by seed, except the measurements that `folder` has.

    A measurement that fails prints the reason, and the others continue. A user can mend UserError and
    OSError, so these end the run. The file claims.json has estimates, verdicts and values of all claims and
    seeds that were measured with these recipes.
    """
    labs = []
    for seed in seeds:
        labs.append(lab := Lab(folder, seed, recipe, say))
        for number in numbers:
            try:
                lab.measurement(ROWS.format(number), partial(CLAIMS[number].measure, lab))
            except (UserError, OSError):
                raise
            except Exception as error:
                say(f"seed {seed}: claim {number} failed: {type(error).__name__}: {error}")
                continue
            _write(folder, lab.mark)
    return _results([lab.folder for lab in labs], numbers)


def _results(folders: Sequence[Path], numbers: Iterable[int]) -> dict[int, Result]:
    """The results of claims, from all measurements in the folders of these Labs."""
    results = {}
    for number in numbers:
        seeds, limits = {}, {}
        for folder in folders:
            for name, row in (kept(folder, ROWS.format(number)) or {}).items():
                value, *limit = row if isinstance(row, list) else [row]
                seeds.setdefault(folder.name.rpartition("-")[2], {})[name] = value
                limits |= {name: tuple(limit)} if limit else {}
        names = dict.fromkeys(name for rows in seeds.values() for name in rows)
        estimates = {n: estimate([rows[n] for rows in seeds.values() if n in rows]) for n in names}
        if seeds:
            results[number] = Result(seeds, estimates, limits)
    return results


def _write(folder: Path, mark: str) -> None:
    claims = {
        str(number): {
            "says": CLAIMS[number].says,
            "verdicts": [f"{name} {text}" for name, text in result.verdicts().items()],
            "estimates": {name: e._asdict() for name, e in result.estimates.items()},
            "recipe": mark,
            "seeds": result.seeds,
        }
        for number, result in _results(sorted(folder.glob(f"{mark}-seed-*")), CLAIMS).items()
    }
    with replacing(folder / "claims.json") as beside:
        beside.write_text(json.dumps(claims, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
