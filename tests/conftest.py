"""What several test files use."""

import dataclasses
import os
import signal

import numpy as np
import pytest

from tinygpt.core import kernels
from tinygpt.lab import models as lab
from tinygpt.stages import evaluate, fewshot, recall, recipes, reward
from tinygpt.world import corpus, tasks

signal.signal(signal.SIGINT, signal.default_int_handler)  # under nohup the signal is ignored, in children too
if "c" not in kernels.available():  # or each command would say so, where tests expect one line
    os.environ.setdefault("TINYGPT_BACKEND", "numpy")


@pytest.fixture(params=kernels.available())
def ops(request):
    """The operations, in each backend that works here."""
    return kernels.backend(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def toy(monkeypatch):
    """All that a claim or a story does, too small to show anything."""
    # Few documents make a tokenizer of short tokens, and so long rows.
    changes = {"max_iters": 20, "block_size": 256, "batch_size": 1}
    monkeypatch.setattr(recipes, "PRETRAIN", recipes.PRETRAIN | changes)
    few = {"comparisons": 40, "batch_size": 4, "max_iters": 1}
    monkeypatch.setattr(recipes, "REWARD", recipes.REWARD | few)
    monkeypatch.setattr(recipes, "RLHF", recipes.RLHF | {"max_iters": 1, "num_prompts": 2})
    monkeypatch.setattr(recipes, "QUICK", ({"max_iters": 21}, {}, {}, {}))
    nano = dataclasses.replace(lab.PRESETS["nano"], n_layer=2, n_embd=32)
    monkeypatch.setitem(lab.PRESETS, "nano", nano)
    monkeypatch.setattr(reward, "taught_by", lambda world: world.people("known", "rl")[:2])
    kinds = ("right over wrong", "right over don't know", "don't know over wrong")
    pairs = [reward.Comparison(f"Where {n}?", "Lima.", "Oslo.", kinds[n % 3]) for n in range(9)]
    monkeypatch.setattr(reward, "collect", lambda *given, **how: pairs)
    tune, score, draw, gaps = lab.Lab.tune, lab.Lab.score, corpus.draw, evaluate.gaps
    named, journeys = evaluate.named_tasks, tasks.journeys
    monkeypatch.setattr(
        lab.Lab, "tune",
        lambda lab, items, *adapter, **how: tune(lab, items[-20:], *adapter, **how | {"max_iters": 1}),
    )  # fmt: skip
    monkeypatch.setattr(
        lab.Lab, "score",
        lambda lab, model, items: score(lab, model, (lab.sets[items] if type(items) is str else items)[:3]),
    )  # fmt: skip
    monkeypatch.setattr(evaluate, "named_tasks", lambda world: named(world, count=3))
    monkeypatch.setattr(tasks, "journeys", lambda w, split, k, n, *style: journeys(w, split, k, 5, *style))
    monkeypatch.setattr(corpus, "draw", lambda world: draw(world, 600, 20))
    monkeypatch.setattr(evaluate, "gaps", lambda m, t, w, *count: gaps(m, t, w, 40))
    facts = evaluate.recall
    monkeypatch.setattr(evaluate, "recall", lambda m, t, w, people: facts(m, t, w, list(people)[:2]))
    mappings, from_world, told = fewshot.mappings, fewshot.from_world, recall.told
    monkeypatch.setattr(fewshot, "mappings", lambda w, shots, count, *how: mappings(w, shots, 5, *how))
    few = lambda w, task, shots, count, *split: from_world(w, task, shots, 5, *split)  # noqa: E731
    monkeypatch.setattr(fewshot, "from_world", few)
    monkeypatch.setattr(
        recall, "told", lambda m, t, w, people, *how, **own: told(m, t, w, people[:2], *how, **own)
    )
