"""The glossary's claims, each a short function that measures it on a `Lab`, and what must come out.

    held        the 95% interval of the mean over seeds lies beyond the limit
    refuted     it lies on the other side
    undecided   neither; with two seeds, a pilot, an estimate counts as an interval

A Lab is a seed's world and the models trained in it. These, and what was measured, are kept in a folder, so
that a run that was interrupted goes on. All arms of a claim share a seed's world and base.

Not here: what is measured (`stages.evaluate`), training (`stages`), printing (`report`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ..core.model import GPT
from ..core.train import weight_change
from ..errors import UserError
from ..files.atomic import replacing
from ..files.jsonfile import read_object
from ..stages import evaluate, fewshot, recall, reward, variants
from ..stages.adapter import AdapterConfig, fingerprint
from ..stages.answers import Estimate, estimate, verdict
from ..text import instructions
from ..world import World, tasks
from .models import Lab, Numbers

CORE = (1, 2, 3, 5, 6, 7, 9, 10, 11, 14, 15, 19)


# --- the claims ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Claim:
    number: int
    says: str
    needs: tuple[tuple[str, str, float], ...]  # name of a number, ">=" or "<=", limit
    measure: Callable[[Lab], Numbers]


CLAIMS: dict[int, Claim] = {}


def claim(number: int, says: str, *needs: tuple[str, str, float]):
    def register(measure: Callable[[Lab], Numbers]) -> Callable[[Lab], Numbers]:
        CLAIMS[number] = Claim(number, says, needs, measure)
        return measure

    return register


@claim(
    1, "Pre-training, from random weights, teaches the patterns of language and general knowledge",
    ("loss above the floor, worst kind but retrieval, nats", "<=", 0.10),
    ("recall of facts told often", ">=", 0.95),
    ("recall of facts never told, above chance", "<=", 0.03),
)  # fmt: skip
def patterns_and_knowledge(lab: Lab) -> Numbers:
    gaps, world = evaluate.gaps(lab.base, lab.tokenizer, lab.world), lab.world
    chance = evaluate.chance(world)
    return {
        "loss above the floor, worst kind but retrieval, nats": max(
            gap.gap for kind, gap in gaps.items() if kind not in ("retrieval", "all")
        ),
        "loss above the floor, retrieval": gaps["retrieval"].gap,
        "loss above the floor, all": gaps["all"].gap,
        "recall of facts told often": lab.recall(lab.base, world.people("known")),
        "recall of facts never told, above chance": lab.recall(lab.base, world.people("never")) - chance,
    }


@claim(
    2, "Pre-training is a major update of the weights, fine-tuning a fine adjustment",
    ("relative change, pre-training over fine-tuning", ">=", 5),
    ("the same, least of all tensors", ">=", 5),
)  # fmt: skip
def major_and_fine(lab: Lab) -> Numbers:
    """Of tensors, those that are not zero before pre-training: from nothing there is no relative change."""
    pre, pre_by_name = weight_change(lab.random.params, lab.base.params)
    tuned, by_name = weight_change(lab.base.params, lab.tuned.params)
    ratios = [pre_by_name[name] / by_name[name] for name in by_name if math.isfinite(pre_by_name[name])]
    return {
        "relative change in pre-training": pre,
        "relative change in fine-tuning": tuned,
        "relative change, pre-training over fine-tuning": pre / tuned,
        "the same, least of all tensors": min(ratios),
        "distance, pre-training over fine-tuning": _distance(lab.random, lab.base)
        / _distance(lab.base, lab.tuned),
        "directions with 90% of a matrix's change, pre-training": _directions(lab.random, lab.base),
        "directions with 90% of a matrix's change, fine-tuning": _directions(lab.base, lab.tuned),
    }


def _distance(before: GPT, after: GPT) -> float:
    return float(np.linalg.norm(after.flat - before.flat))


def _directions(before: GPT, after: GPT) -> float:
    """Of the maps of all blocks, the mean number of singular values that hold 90% of the squared change."""
    counts = []
    for name, p in before.params.items():
        if p.ndim == 2 and name.startswith("h."):
            energy = np.cumsum(np.square(np.linalg.svd(after.params[name] - p, compute_uv=False)))
            counts.append(1 + int(np.searchsorted(energy, 0.9 * energy[-1])))
    return float(np.mean(counts))


@claim(
    3, "Pre-training plants parametric memory, which inference recalls",
    ("recall, told most less told least", ">=", 0.5),
    ("recall after other answers were told", ">=", 0.95),
    ("of these facts, answers of the first world", "<=", 0.03),
)  # fmt: skip
def parametric_memory(lab: Lab) -> Numbers:
    world, groups = lab.world, {}
    for person in world.everyone:
        if person.weight > 0:
            groups.setdefault(person.weight, []).append(person)
    recalls = {weight: evaluate.recall(lab.base, lab.tokenizer, world, people)
             for weight, people in groups.items()}  # fmt: skip
    rates = {weight: recall.rate().rate for weight, recall in recalls.items()}
    facts, nats = zip(*((len(r.right), r.nats.sum()) for r in recalls.values()), strict=True)
    wordings = sum(len(a.wordings) for a in world.lexicon.attributes) / len(world.lexicon.attributes)
    guess = np.mean([math.log(len(a.values)) for a in world.lexicon.attributes])
    bits = (sum(facts) * guess - sum(nats)) / wordings / math.log(2)
    other, tokenizer = lab.pretrained("permuted", f"world:{lab.seed}:permuted")
    permuted = World(lab.seed, permuted=True)
    answers = evaluate.recall(other, tokenizer, permuted, permuted.people("known"))
    people = world.people("known")
    first = [people[n].values[a] for n, a in zip(answers.person, answers.attribute, strict=True)]
    return {
        **{f"recall, weight {weight} in the corpus": rate for weight, rate in rates.items()},
        "recall, told most less told least": rates[max(rates)] - rates[min(rates)],
        "bits about people stored per weight": bits / lab.base.flat.size,
        "recall after other answers were told": answers.rate().rate,
        "of these facts, answers of the first world": float(np.mean(answers.chosen == first)),
    }


@claim(4, "Adapters such as LoRA can be used while pre-training")
def adapters_in_pretraining(lab: Lab) -> Numbers:
    """No limit: loss above full pre-training at equal tokens, by rank, and with merging ten times."""
    full, numbers = evaluate.gaps(lab.base, lab.tokenizer, lab.world)["all"].gap, {}
    arms = [(rank, 0) for rank in (4, 16, 64)] + [(16, lab.pretraining["max_iters"] // 10)]
    for rank, merge_every in arms:
        name = f"rank {rank}" + ", merged ten times" * bool(merge_every)
        config = AdapterConfig("lora", rank=rank, alpha=float(rank), full=True)
        model, tokenizer = lab.pretrained(name.replace(" ", "-"), adapter=config, merge_every=merge_every)
        gap = evaluate.gaps(model, tokenizer, lab.world)["all"].gap
        numbers[f"nats above full training, {name}"] = gap - full
        numbers[f"recall of facts told often, {name}"] = lab.recall(model, lab.world.people("known"))
    return numbers


@claim(
    5, "Instruction tuning makes it answer in the wanted form",
    ("well-formed answers, more than before", ">=", 0.5), ("well-formed answers", ">=", 0.99),
    ("stopped by itself", ">=", 0.99),
)  # fmt: skip
def form(lab: Lab) -> Numbers:
    before, after = (lab.score(model, "questions, known") for model in (lab.base, lab.tuned))
    all_sets = [lab.score(lab.tuned, name) for name in lab.sets]
    people = lab.world.people("known", "eval")
    return {
        "well-formed answers, more than before": after.formed.rate - before.formed.rate,
        "well-formed answers": float(np.mean([score.formed.rate for score in all_sets])),
        "stopped by itself": float(np.mean([score.stopped.rate for score in all_sets])),
        "facts recalled in a sentence, before": lab.recall(lab.base, people),
        "facts recalled in a sentence, after": lab.recall(lab.tuned, people),
    }


@claim(
    6, "A tuned model answers zero-shot, out of its parametric memory",
    ("right about people in no tuning example", ">=", 0.8),
)  # fmt: skip
def zero_shot(lab: Lab) -> Numbers:
    return {
        "right about people in no tuning example": lab.score(lab.tuned, "questions, known").right.rate,
        "the same before tuning": lab.score(lab.base, "questions, known").right.rate,
        "about people told of seldom": lab.score(lab.tuned, "questions, rare").right.rate,
        "always the most frequent answer": tasks.majority(lab.sets["questions, known"]),
    }


@claim(
    7, "Step-by-step reasoning in the completions raises correctness clearly",
    ("right, above the best control, least of 3 to 5 rides", ">=", 0.2),
    ("a false step changes the answer", ">=", 0.8),
)  # fmt: skip
def chain_of_thought(lab: Lab) -> Numbers:
    world, numbers, rates = lab.world, {}, {}
    problems = {k: tasks.distinct(tasks.journeys(world, "eval", k, 4000))[:1000] for k in range(1, 6)}
    items = {style: tasks.journeys(world, "sft", range(1, 6), 1000, style)
             for style in ("direct", "filler", "shuffled", "steps")}  # fmt: skip
    size = {style: sum(map(lab.length, items[style])) for style in items}
    updates = 300
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
        "right, above the best control, least of 3 to 5 rides": gain,
        "a false step changes the answer": changed.rate if changed.n else 0.0,  # none was right before
        "to what follows from that step": followed.rate if followed.n else 0.0,
    }


@claim(
    8, "After instruction tuning it tells plausible falsehoods",
    ("false about people never seen", ">=", 0.5), ("rise with unknown facts in the tuning", ">=", 0.05),
    ("rise with unknown facts, above that with known ones", ">=", 0.05),
)  # fmt: skip
def falsehoods(lab: Lab) -> Numbers:
    """Without refusals in the tuning nearly all answers are false already, and nothing could rise: 300 are in
    all arms with unknown facts. (That of other claims has 40 refusals, and 160 unknown facts.)"""
    name, numbers = "questions, never seen", {}
    numbers["base, asked"] = lab.score(lab.base, name).falsehood.rate
    never = evaluate.recall(lab.base, lab.tokenizer, lab.world, lab.world.people("never", "eval"))
    numbers["base, completing a sentence: likeliest value false"] = 1 - never.rate().rate
    plain = lab.tune(tasks.tuning(lab.world, refused=0, answered=0))
    numbers["false about people never seen"] = lab.score(plain, name).falsehood.rate
    more = tasks.questions(lab.world, lab.world.people("known", "rl"))
    rates = {}
    for title, facts, beside in (("no", 0, []), ("300", 300, []), ("600", 600, []), ("600 known", 0, more)):
        taught = tasks.tuning(lab.world, refused=300, answered=facts)
        model = lab.tune(taught + beside)
        rates[title] = lab.score(model, name).falsehood.rate
        arm = f"tuned with 300 refusals and {title} " + ("facts more" if beside else "unknown facts")
        numbers[f"{arm}: false"] = rates[title]
        numbers[f"{arm}: known people right"] = lab.score(model, "questions, known").right.rate
        if facts:
            unknown = [item for item in taught if item["meta"].get("exposure") == 0]
            unknown = [item for item in unknown if item["completion"] != tasks.REFUSAL]
            numbers[f"{arm}: these answered right"] = lab.score(model, unknown).right.rate
    return numbers | {
        "fall by refusals in the tuning": numbers["false about people never seen"] - rates["no"],
        "rise with unknown facts in the tuning": rates["600"] - rates["no"],
        "rise with unknown facts, above that with known ones": rates["600"] - rates["600 known"],
    }


@claim(
    9, "A judge that people teach by comparing scores answers (a reward model; the text calls it an agent)",
    ("right, of what is true", ">=", 0.9), ("right over wrong", ">=", 0.9),
    ("taught by shuffled labels: right over wrong, distance from a half", "<=", 0.1),
)  # fmt: skip
def taught_judge(lab: Lab) -> Numbers:
    """Held out are people of whom no comparison was; one label in ten is a slip. A judge may prefer "I do not
    know." to any value by chance, and so be right or wrong in most pairs: not so where both are values."""
    people = lab.world.people("known", "eval") + lab.world.people("never", "eval")
    pairs, numbers = lab.comparisons(people, 3000, error=0.0), {}
    labelled = lab.comparisons(reward.taught_by(lab.world), lab.judging["comparisons"])
    for count in (300, 1000, 3000):
        few = reward.judged(lab.teach(labelled[:count]), pairs)
        numbers[f"right, of what is true, {count} labels"] = few.right.rate
        numbers |= {f"{kind}, {count} labels": rate.rate for kind, rate in few.by_kind.items()}
    full = reward.judged(lab.judge, pairs)
    slips = reward.judged(lab.judge, lab.comparisons(people, 3000))  # it is as sure as labels like its own
    numbers |= {"right, of what is true": full.right.rate, "margin": full.margin}
    numbers["calibration"] = slips.calibration
    numbers |= {kind: rate.rate for kind, rate in full.by_kind.items()}
    hard = [rate.rate for kind, rate in full.by_kind.items() if "garbled" not in kind]
    numbers["right, mean over kinds of pairs without a garbled answer"] = float(np.mean(hard))
    numbers["agreement with labels, over the ceiling"] = slips.agreed / slips.labels_right
    shuffled = lab.teach(lab.comparisons(reward.taught_by(lab.world), len(labelled), error=0.5))
    nothing = abs(reward.judged(shuffled, pairs).by_kind["right over wrong"].rate - 0.5)
    numbers["taught by shuffled labels: right over wrong, distance from a half"] = nothing
    return numbers


@claim(
    10, "RLHF steers by that judge, over all weights, and corrects falsehoods",
    ("false about people never seen, fewer than after tuning", ">=", 0.3),
    ("'I do not know.' about people never seen, more than after tuning", ">=", 0.3),
    ("right about known people, fewer than after tuning", "<=", 0.03),
    ("fewer, by a judge whom truth did not matter to", "<=", 0.1),
    ("fewer, by the examples learned beside, without a judge", "<=", 0.1),
)  # fmt: skip
def steered(lab: Lab) -> Numbers:
    """No RLHF prompt, no comparison, no tuning example is about these people. The last run goes too far
    (over-optimisation): a judge of 1,000 labels, no KL, no examples beside, four times the rate."""
    strangers = lab.sets["questions, never seen"]

    def measured(model: GPT) -> tuple[float, float, float]:
        answers = evaluate.ask(model, lab.tokenizer, strangers)
        false = evaluate.score(lab.world, strangers, answers).falsehood.rate
        refused = float(np.mean([answer.text == tasks.REFUSAL for answer in answers]))
        return false, refused, lab.score(model, "questions, known").right.rate

    false, refused, right = measured(lab.tuned)
    after, refuses, still = measured(lab.steered)
    judge = lab.teach(lab.comparisons(reward.taught_by(lab.world), lab.judging["comparisons"], blind=True))
    blind, *_ = measured(lab.steer(judge)[0])
    silent = lab.judge.deaf()
    beside, *_ = measured(lab.steer(silent)[0])
    loose = {"beta": 0.0, "ptx_coef": 0.0, "learning_rate": 4 * lab.steering["learning_rate"]}
    weak = lab.teach(lab.comparisons(reward.taught_by(lab.world), 1000))
    _, curve = lab.steer(weak, **loose)
    gold, proxy, kl = (np.array([record[name] for record in curve]) for name in ("gold", "reward", "kl"))
    window = min(15, len(gold))  # updates; of a single one, gold is that of 16 questions
    gold, proxy, kl = (np.convolve(x, np.ones(window) / window, "valid") for x in (gold, proxy, kl))
    turn = int(gold.argmax())
    return {
        "false about people never seen, after tuning": false,
        "false about people never seen, after RLHF": after,
        "right about known people, after tuning": right,
        "right about known people, after RLHF": still,
        "false about people never seen, fewer than after tuning": false - after,
        "right about known people, fewer than after tuning": right - still,
        "fewer, by a judge whom truth did not matter to": false - blind,
        "'I do not know.' about people never seen, more than after tuning": refuses - refused,
        "fewer, by the examples learned beside, without a judge": false - beside,
        "relative change of the weights": weight_change(lab.tuned.params, lab.steered.params)[0],
        "too far: gold reward at its best": float(gold.max()),
        "too far: gold reward at the end": float(gold[-1]),
        "too far: reward at gold's best": float(proxy[turn]),
        "too far: reward at the end": float(proxy[-1]),
        "too far: nats from the reference at gold's best": float(kl[turn]),
        "too far: nats from the reference at the end": float(kl[-1]),
    }


@claim(
    11, "p-tuning and LoRA leave the base as it is, and train a few weights",
    ("weights of the base that changed", "<=", 0), ("change of logits with the adapter off", "<=", 0),
    ("change of logits by merging, over the largest", "<=", 1e-5),
    ("LoRA rank 1: share of weights", "<=", 0.01), ("p-tuning, 16 tokens: share of weights", "<=", 0.02),
)  # fmt: skip
def base_untouched(lab: Lab) -> Numbers:
    ids = instructions.prompt(lab.tokenizer, lab.sets["questions, known"][0]["prompt"])[None]
    before, untuned, values = fingerprint(lab.base), lab.base.forward(ids)[0].copy(), {}
    changed, off = 0, 0.0
    for name in ("LoRA rank 1", "p-tuning, 16 tokens"):
        config, rates = ARMS[name]
        model = lab.tune(tasks.tuning(lab.world, "sft", 0, 0), config, max_iters=200, learning_rate=rates[1])
        trained, added = _sizes(model)
        values |= {f"{name}: share of weights": added, f"{name}: share of weights, with its encoder": trained}
        changed += fingerprint(model) != before
        if config.kind == "lora":
            tuned = model.forward(ids)[0].copy()
            merged = variants.merge(model).forward(ids)[0]
            values["change of logits by merging, over the largest"] = float(
                abs(merged - tuned).max() / abs(tuned).max()
            )
        off = max(off, float(abs(model.base.forward(ids)[0] - untuned).max()))
    return values | {
        "weights of the base that changed": changed, "change of logits with the adapter off": off
    }  # fmt: skip


ARMS = {  # and the peaks of the learning rate among which the people of "val" choose
    "all weights": (None, (1e-4, 3e-4, 1e-3)),
    "LoRA rank 1": (AdapterConfig("lora", rank=1, alpha=1.0), (3e-3, 1e-2, 3e-2)),
    "LoRA rank 4": (AdapterConfig("lora", rank=4, alpha=4.0), (3e-3, 1e-2, 3e-2)),
    "LoRA rank 16": (AdapterConfig("lora", rank=16, alpha=16.0), (3e-3, 1e-2, 3e-2)),
    "p-tuning, 16 tokens": (AdapterConfig("ptuning", num_virtual_tokens=16, hidden=128), (1e-3, 3e-3, 1e-2)),
    "prompt, 16 tokens": (AdapterConfig("prompt", num_virtual_tokens=16), (1e-2, 3e-2, 1e-1)),
    "prefix, 16 tokens": (AdapterConfig("prefix", num_virtual_tokens=16), (1e-2, 3e-2, 1e-1)),
}


def _sizes(model: GPT) -> tuple[float, float]:
    """Of the base's number of weights: how many are trained; how many are added when it answers."""
    if model.trained is model:
        return 1.0, 0.0
    layers, params = tuple(model.adapter.config.encoder(model.config)), model.adapter.params
    encoder = sum(p.size for name, p in params.items() if name.startswith(layers))
    return model.adapter.flat.size / model.flat.size, (model.adapter.flat.size - encoder) / model.flat.size


@claim(
    12, "Adapters are less dramatic than full tuning",
    ("form: all weights less LoRA rank 1", ">=", 0.02),
    ("right about known people: all weights less LoRA rank 1", ">=", 0.02),
    ("new facts: all weights less LoRA rank 1", ">=", 0.05),
    ("new facts: all weights less p-tuning, 16 tokens", ">=", 0.05),
    ("forgotten: all weights less LoRA rank 1", ">=", 0.02),
    ("made-up answers that RLHF mends: all weights less LoRA rank 1", ">=", 0.05),
)  # fmt: skip
def less_dramatic(lab: Lab) -> Numbers:
    """Tuned to the tasks and to 200 new facts at once. A fact is tested in a wording it was not taught in.
    RLHF is that of claim 10, by an adapter of the tuned model too."""
    people, world = lab.world.people("never", "sft")[:50], lab.world
    questions = {n: [] for n in range(5)}
    for n, item in enumerate(tasks.questions(world, people)):
        questions[n % 5].append(item)  # five wordings of each
    items = tasks.tuning(world, "sft", 0, 0) + questions[0] + questions[1] + questions[2]
    known_people = world.people("known", "eval")

    def measure(name: str, rate: float) -> Numbers:
        model = lab.tune(items, ARMS[name][0], learning_rate=rate)
        scores = {title: lab.score(model, items[:300]) for title, items in lab.sets.items()}
        trained, added = _sizes(model)
        values = tasks.questions(world, world.people("known", "val"))
        return {
            "chosen by": lab.score(model, values).right.rate + lab.score(model, questions[3]).right.rate,
            "weights trained": trained,
            "weights added": added,
            "form": float(np.mean([score.formed.rate for score in scores.values()])),
            "right about known people": scores["questions, known"].right.rate,
            "new facts": lab.score(model, questions[4]).right.rate,
            "forgotten": lab.recall(lab.base, known_people) - lab.recall(model, known_people),
            "learning rate": rate,
        }

    def mended(config: AdapterConfig | None, rate: float) -> Numbers:
        model = lab.steer(lab.judge, config, learning_rate=rate)[0] if config else lab.steered
        facts, strange = (tasks.questions(world, world.people(kind, "val")) for kind in ("known", "never"))
        mine, before = (lab.score(m, "questions, never seen").falsehood.rate for m in (model, lab.tuned))
        return {
            "chosen by": lab.score(model, facts).right.rate - lab.score(model, strange).falsehood.rate,
            "made-up answers that RLHF mends": before - mine,
            "right about known people after RLHF": lab.score(model, "questions, known").right.rate,
        }

    trials = [("", name, rate, partial(measure, name, rate)) for name in ARMS for rate in ARMS[name][1]]
    steered = {"all weights": (lab.steering["learning_rate"],), "LoRA rank 1": (5e-4, 1.5e-3)}
    trials += [("RLHF ", name, rate, partial(mended, ARMS[name][0], rate))
               for name in steered for rate in steered[name]]  # fmt: skip
    result: Numbers = {}
    swept: dict[tuple, list[Numbers]] = {}
    for stage, name, rate, make in trials:
        swept.setdefault((stage, name), []).append(lab.measurement(f"12 {stage}{name} {rate:g}", make))
    for (_, name), arm in swept.items():
        best = max(arm, key=lambda numbers: numbers["chosen by"])
        result |= {f"{key}: {name}": value for key, value in best.items() if key != "chosen by"}
    for key, name in (need[0].split(": all weights less ") for need in CLAIMS[12].needs):
        result[f"{key}: all weights less {name}"] = result[f"{key}: all weights"] - result[f"{key}: {name}"]
    return result


@claim(
    13, "Few trained weights still give zero-shot ability",
    ("right: p-tuned prompt less 8 examples", ">=", 0),
    ("right: p-tuned prompt less the best prompt of up to 8 examples", ">=", -0.05),
)  # fmt: skip
def few_weights(lab: Lab) -> Numbers:
    """Questions about known people, the likeliest of the values: by a learned prompt without examples, and by
    the base with examples. Their number and form are chosen on the people of "val". Copied: of wrong answers
    after 8 examples those that are an answer of the examples."""
    config, rates = ARMS["p-tuning, 16 tokens"]
    model, numbers = lab.tune(tasks.tuning(lab.world, "sft", 0, 0), config, learning_rate=rates[1]), {}

    def fitting(model: GPT, shots: int, style: str, split: str) -> list[fewshot.Prompt]:
        """None at all where most do not fit."""
        prompts = fewshot.from_world(lab.world, "questions", shots, 1000, split)
        fit = [prompt for prompt in prompts if fewshot.fits(model, lab.tokenizer, prompt, style)]
        return fit if 2 * len(fit) > len(prompts) else []

    def right(model: GPT, shots: int, style: str, split: str) -> float:
        prompts = fitting(model, shots, style, split)
        return fewshot.accuracy(model, lab.tokenizer, prompts, style).rate if prompts else 0.0

    forms = [(shots, style) for shots in (0, 1, 2, 4, 8) for style in ("table", "arrow", "colon", "lines")]
    best = max(forms, key=lambda form: right(lab.base, *form, "val"))
    for shots in (0, 1, 2, 4, 8):
        numbers[f"right: base, {shots} examples, {best[1]}"] = right(lab.base, shots, best[1], "eval")
    tuned, most = right(model, 0, "chat", "eval"), right(lab.base, *best, "eval")
    eight = fitting(lab.base, 8, best[1], "eval")
    pairs = zip(fewshot.chosen(lab.base, lab.tokenizer, eight, best[1]), eight, strict=True)
    wrong = [any(a == answer for _, answer in p.examples) for a, p in pairs if a != p.answer]
    return numbers | {
        "right: p-tuned prompt": tuned,
        "examples of the best prompt": best[0],
        "copied": float(np.mean(wrong)) if wrong else 0.0,
        "right: p-tuned prompt less 8 examples": tuned - numbers[f"right: base, 8 examples, {best[1]}"],
        "right: p-tuned prompt less the best prompt of up to 8 examples": tuned - most,
    }


@claim(
    14, "In-context learning updates nothing",
    ("weights that changed", "<=", 0), ("right after the context is gone, less before", "<=", 0),
    ("right with the context, less without", ">=", 0.2),
)  # fmt: skip
def no_update(lab: Lab) -> Numbers:
    """Ten thousand prompts with examples, between two times the same thousand questions without."""
    mark, prompts = fingerprint(lab.base), fewshot.mappings(lab.world, 8, 10_000)
    bare = [prompt._replace(examples=()) for prompt in prompts[:1000]]
    before = fewshot.chosen(lab.base, lab.tokenizer, bare, "table")
    with_context = fewshot.accuracy(lab.base, lab.tokenizer, prompts).rate
    after = fewshot.chosen(lab.base, lab.tokenizer, bare, "table")
    right = [sum(a == p.answer for a, p in zip(answers, bare, strict=True)) for answers in (before, after)]
    return {
        "weights that changed": float(fingerprint(lab.base) != mark),
        "right after the context is gone, less before": abs(right[1] - right[0]) / len(bare),
        "answers that differ from those before": sum(map(str.__ne__, before, after)),
        "right with the context, less without": with_context - right[0] / len(bare),
    }


SHOTS = (0, 1, 2, 4, 8, 16)


@claim(
    15, "Learning still happens, by the prompt",
    ("right, less the best possible, worst number of examples", ">=", -0.05),
    ("right after 16 examples with shuffled labels", "<=", 0.3),
)  # fmt: skip
def by_the_prompt(lab: Lab) -> Numbers:
    numbers, short = {}, []
    for control in ("", *fewshot.CONTROLS):
        for shots in SHOTS:
            prompts = fewshot.mappings(lab.world, shots, 1000, control)
            right = fewshot.accuracy(lab.base, lab.tokenizer, prompts).rate
            numbers[f"right, {shots} examples{', ' * bool(control)}{control}"] = right
            if control in ("", "unseen"):
                best = float(np.mean([prompt.optimal for prompt in prompts]))
                numbers[f"best possible, {shots} examples{', ' * bool(control)}{control}"] = best
                short.append(right - best)
    return numbers | {
        "right, less the best possible, worst number of examples": min(short),
        "right after 16 examples with shuffled labels": numbers["right, 16 examples, shuffled"],
    }


def _needed(right: Sequence[float], best: float) -> int:
    """The least of SHOTS, beyond none, that gives 90% of the best; 32: none of them does."""
    return next((n for n, mine in zip(SHOTS[1:], right[1:], strict=True) if mine >= 0.9 * best), 32)


def _few_shot(lab: Lab, model: GPT) -> Numbers:
    """Right by number of examples; none of them has the word that is asked for, which one could copy from."""
    prompts = {str(shots): fewshot.mappings(lab.world, shots, 1000, "unseen") for shots in SHOTS}
    return {shots: fewshot.accuracy(model, lab.tokenizer, some).rate for shots, some in prompts.items()}


REFRAINS = 0.12  # of pre-training: with these the corpus begins
PLACES = (1, 2, 3, 4, 6, 8, 10, 14)  # of the snapshots, which are twentieths of pre-training
BEGUN = 0.15  # the first of these that has read anything else


def _curves(lab: Lab) -> dict[float, list[float]]:
    """The same along pre-training."""
    rates = {share: lab.measurement(f"few-shot at {share:.0%}", partial(_few_shot, lab, model))
             for share, model in lab.snapshots(PLACES)}  # fmt: skip
    return {share: list(right.values()) for share, right in rates.items()}


@claim(
    16, "A good model needs a short prompt, a bad one a long one",
    (f"examples needed, after {BEGUN:.0%} of pre-training less at its end", ">=", 1),
)  # fmt: skip
def short_prompts(lab: Lab) -> Numbers:
    """Examples for 90% of what the best possible predictor has from 16; 32: 16 do not suffice."""
    best = float(np.mean([prompt.optimal for prompt in fewshot.mappings(lab.world, 16, 1000, "unseen")]))
    needed = {share: _needed(right, best) for share, right in _curves(lab).items()}
    return {f"examples needed, {share:.0%} of pre-training": n for share, n in needed.items()} | {
        f"examples needed, after {BEGUN:.0%} of pre-training less at its end": needed[BEGUN] - needed[1.0]
    }


@claim(
    17, "Few-shot learning needs some level of pre-training",
    (f"learned from 8 examples, all of pre-training less {BEGUN:.0%}", ">=", 0.2),
    ("learned from 8 examples, less by one layer", ">=", 0.3),
)  # fmt: skip
def some_pretraining(lab: Lab) -> Numbers:
    """Learned: right after 8 examples, above the quarter of whoever says any of the prompt's four labels. The
    heads for it come before all else, which is by design: the corpus begins with refrains."""
    eight, people = SHOTS.index(8), lab.world.people("known")
    gain = {share: right[eight] - 1 / 4 for share, right in _curves(lab).items()}
    heads = {share: float(recall.induction_scores(model, lab.words).max())
             for share, model in lab.snapshots(PLACES)}  # fmt: skip
    flat, _ = lab.pretrained("one-layer", n_layer=1)
    one = list(_few_shot(lab, flat).values())
    return {
        **{f"learned from 8 examples, {share:.0%} of pre-training": n for share, n in gain.items()},
        **{f"best induction head, {share:.0%} of pre-training": value for share, value in heads.items()},
        f"learned from 8 examples, all of pre-training less {BEGUN:.0%}": gain[1.0] - gain[BEGUN],
        "learned from 8 examples, less by one layer": gain[1.0] - (one[eight] - 1 / 4),
        "one layer: recall of facts told often": lab.recall(flat, people),
        "four layers: recall of facts told often": lab.recall(lab.base, people),
    }


@claim(
    18, "Each stage works if the one before it did",
    ("right, all of pre-training less half", ">=", 0.02),
    ("right, all of tuning less a tenth", ">=", 0.02),
)  # fmt: skip
def each_stage(lab: Lab) -> Numbers:
    items, updates, rates = tasks.tuning(lab.world), lab.tuning["max_iters"], {}
    half, _ = lab.pretrained("half", max_iters=lab.pretraining["max_iters"] // 2)
    for pre, base in (("half", half), ("all", lab.base)):
        for tuned, times in (("a tenth", updates // 10), ("all", updates)):
            done = (pre, tuned) == ("all", "all")
            model = lab.tuned if done else lab.tune(items, base=base, max_iters=times)
            rates[pre, tuned] = lab.score(model, "questions, known").right.rate
    return {f"right, {pre} of pre-training, {tuned} of tuning": r for (pre, tuned), r in rates.items()} | {
        "right, all of pre-training less half": (
            rates["all", "a tenth"] + rates["all", "all"] - rates["half", "a tenth"] - rates["half", "all"]
        ) / 2,
        "right, all of tuning less a tenth": (
            rates["half", "all"] + rates["all", "all"] - rates["half", "a tenth"] - rates["all", "a tenth"]
        ) / 2,
    }  # fmt: skip


@claim(
    19, "Non-parametric memory is the prompt's content, read through the weights",
    ("facts of the prompt about people never seen: right", ">=", 0.8),
    ("damage by the induction heads over that by as many others", ">=", 5),
)  # fmt: skip
def non_parametric_memory(lab: Lab) -> Numbers:
    """The prompt tells of one person, or also of another. Heads are cut out: those that look at what followed
    the same word before (induction heads), as many others, and each head alone. A head that looks at the
    token before is half of the same circuit: that it is among the others makes these look important."""
    people, prompts = lab.world.people("never", "eval")[:250], fewshot.mappings(lab.world, 8, 500)
    known_people, scores = lab.world.people("known"), recall.induction_scores(lab.base, lab.words)
    heads = recall.strongest(scores)

    def measured(cut: Sequence[recall.Head], n: int = 250) -> np.ndarray:
        model = recall.without(lab.base, cut)
        right = recall.told(model, lab.tokenizer, lab.world, people[:n], own=True).prompt.rate
        return np.array([right, fewshot.accuracy(model, lab.tokenizer, prompts[: 2 * n]).rate])

    whole, cut = measured([]), measured(heads)
    previous = recall.previous_scores(lab.base, lab.words)
    other, apart = (
        np.mean([measured(some) for some in recall.others(scores.shape, heads, 10, spared)], axis=0)
        for spared in ((), recall.strongest(previous))
    )
    by_other, by_apart = ((whole - cut) / np.maximum(whole - x, 0.005) for x in (other, apart))  # not by zero
    alone = {head: measured([head], 100)[1] for head in np.ndindex(scores.shape)}
    worst = min(alone, key=alone.get)
    rival = recall.told(lab.base, lab.tokenizer, lab.world, people, own=True, rival=True).prompt.rate
    return {
        "facts of the prompt about people never seen: right": whole[0],
        "the same where it tells of somebody else too": rival,
        "the same without the induction heads": cut[0],
        "the same without as many others, mean of 10 sets": other[0],
        "damage by the induction heads over that by as many others": by_other[0],
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
        "facts recalled without the induction heads": lab.recall(
            recall.without(lab.base, heads), known_people
        ),
        "facts recalled": lab.recall(lab.base, known_people),
    }


@claim(
    20, "Zero-shot leans on the weights, few-shot uses both memories",
    ("by the prompt: never told less told often", ">=", 0.02),
    ("by the prompt, told often: said four times less once", ">=", 0.02),
)  # fmt: skip
def both_memories(lab: Lab) -> Numbers:
    """The prompt contradicts the weights; nats are log p of its value less log p of theirs."""
    numbers = {}
    for weight in (256, 16, 0):
        people = [person for person in lab.world.everyone if person.weight == weight][:150]
        for repeats in (1, 4):
            answer = recall.told(lab.base, lab.tokenizer, lab.world, people, repeats)
            name = f"weight {weight}, said {repeats} times"
            numbers[f"by the prompt, {name}"] = answer.prompt.rate
            numbers[f"by the weights, {name}"] = answer.weights.rate
            numbers[f"nats for the prompt, {name}"] = answer.nats
    known_key, never_key = (f"by the prompt, weight {weight}, said {{}} times" for weight in (256, 0))
    return numbers | {
        "by the prompt: never told less told often": (
            numbers[never_key.format(1)] - numbers[known_key.format(1)]
        ),
        "by the prompt, told often: said four times less once": (
            numbers[known_key.format(4)] - numbers[known_key.format(1)]
        ),
    }


@claim(
    21, "GPT-1, GPT-2 and GPT-3 won by pre-training: larger models and more text",
    ("exponent of the loss above the floor, by weights", ">=", 0.1),
    ("exponent of the loss above the floor, by text", ">=", 0.1),
)  # fmt: skip
def scale(lab: Lab) -> Numbers:
    """Loss above the floor ~ weights^-a, text^-b (Kaplan et al. 2020, section 3): a from the slope of three
    widths in logarithms, b from half of the updates and all of them, of whose text the refrains do not count.
    And GPT-1's blocks beside GPT-2's, at a quarter of the rate: at the same they do not train."""
    def gap(model: GPT) -> float:
        return evaluate.gaps(model, lab.tokenizer, lab.world)["all"].gap

    widths = {n: lab.pretrained(f"width-{n}", n_embd=n)[0] for n in (32, 64)} | {128: lab.base}
    gaps = {n: gap(model) for n, model in widths.items()}
    sizes = [model.flat.size for model in widths.values()]
    half, _ = lab.pretrained("half", max_iters=lab.pretraining["max_iters"] // 2)
    rate = lab.pretraining["learning_rate"] / 4
    post_norm, _ = lab.pretrained("post-norm", post_norm=True, learning_rate=rate)
    less = gap(half)
    return {f"loss above the floor, {n} channels": value for n, value in gaps.items()} | {
        "loss above the floor, half of the text": less,
        "loss above the floor, GPT-1's blocks": gap(post_norm),
        "recall of facts told often, GPT-1's blocks": lab.recall(post_norm, lab.world.people("known")),
        "exponent of the loss above the floor, by weights": float(
            -np.polyfit(np.log(sizes), np.log(list(gaps.values())), 1)[0]
        ),
        "exponent of the loss above the floor, by text": (
            math.log(less / gaps[128]) / math.log((1 - REFRAINS) / (0.5 - REFRAINS))
        ),
    }


@claim(
    22, "It does the tasks that the text names: translation, question answering, sentiment, summarising",
    ("right, less the most frequent answer, worst task", ">=", 0.2),
)  # fmt: skip
def named_tasks(lab: Lab) -> Numbers:
    """Zero-shot after tuning; and before it, with no, one and four examples, in the forms of a table."""
    names = [name for name in lab.sets if name not in ("questions, rare", "questions, never seen")]
    scores = {name: lab.score(lab.tuned, name) for name in names}
    numbers = {f"{name}: right after tuning": score.right.rate for name, score in scores.items()}
    numbers |= {f"{name}: most frequent answer": score.majority for name, score in scores.items()}
    for task in fewshot.WORLD_TASKS:
        for shots in (0, 1, 4):
            prompts = fewshot.from_world(lab.world, task, shots, 1000)
            rate = fewshot.accuracy(lab.base, lab.tokenizer, prompts, "arrow").rate
            numbers[f"{task}: right before tuning, {shots} examples"] = rate
    least = min(score.right.rate - score.majority for name, score in scores.items() if name != "journey")
    return numbers | {"right, less the most frequent answer, worst task": least}


# --- over seeds ---------------------------------------------------------------------------------------------


def run(
    folder: Path, numbers: Iterable[int], seeds: Iterable[int], say: Callable[[str], None]
) -> dict[int, dict[str, Estimate]]:
    """Measures the claims, seed by seed: number -> name of what was measured -> its Estimate, over the seeds
    that have it. What `folder` has is not measured again. A measurement that fails says why, and the others
    go on; not what a user can mend, which UserError and OSError are.

    claims.json has the values of all seeds that were ever measured by these recipes, estimates and verdicts.
    """
    measured: dict[int, dict[str, Numbers]] = {number: {} for number in numbers}
    _read(folder / "claims.json")  # a damaged file is refused before the measuring, not after it
    for seed in seeds:
        lab = Lab(folder, seed, say)
        for number, by_seed in measured.items():
            claim = CLAIMS[number]
            needed = {name for name, _, _ in claim.needs}
            try:
                by_seed[str(seed)] = lab.measurement(f"claim {number}", partial(claim.measure, lab), needed)
            except (UserError, OSError):
                raise
            except Exception as error:
                say(f"seed {seed}: claim {number} failed: {type(error).__name__}: {error}")
                continue
            _write(folder / "claims.json", claim, by_seed, lab.recipe)
    return {number: _estimates(by_seed) for number, by_seed in measured.items() if by_seed}


def _estimates(by_seed: dict[str, Numbers]) -> dict[str, Estimate]:
    rows = by_seed.values()
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: estimate([row[name] for row in rows if name in row]) for name in names}


def _read(path: Path) -> dict[str, dict]:
    """What claims.json has of each claim. Raises UserError where that is not what `_write` writes."""
    claims = read_object(path) if path.exists() else {}
    try:
        rows = [row for claim in claims.values() for row in claim["seeds"].values()]
        right = all("recipe" in claim for claim in claims.values())
        right = right and all(abs(value) < 1e300 for row in rows for value in row.values())
        json.dumps(claims, ensure_ascii=False).encode()  # half a character cannot be written
    except (TypeError, KeyError, AttributeError, UnicodeEncodeError):
        right = False
    if not right:
        raise UserError(f"{path}: is damaged: remove it, and the same command writes it again")
    return claims


def _write(path: Path, claim: Claim, by_seed: dict[str, Numbers], recipe: str) -> None:
    claims = _read(path)
    before = claims.get(str(claim.number), {})
    all_seeds = (before["seeds"] if before.get("recipe") == recipe else {}) | by_seed
    estimates = _estimates(all_seeds)
    claims[str(claim.number)] = {
        "says": claim.says,
        "verdicts": [f"{name} {sign} {limit:g}: {verdict(estimates[name], sign, limit)}"
                     for name, sign, limit in claim.needs],
        "estimates": {name: e._asdict() for name, e in estimates.items()},
        "recipe": recipe,
        "seeds": all_seeds,
    }  # fmt: skip
    with replacing(path) as beside:
        beside.write_text(json.dumps(claims, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
