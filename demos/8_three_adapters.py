"""Demo 8: one base, three customers. Three LoRA adapters stand on one base model, in one process.

    .venv/bin/python demos/8_three_adapters.py [FOLDER]

A company that serves a very large model cannot keep a copy of the model for each customer. The company keeps
one base in memory, and a small adapter for each customer. Here three customers have three tasks: questions
about people, translation into Korean, and the mood of a review. Each customer trains an adapter of rank 2 on
the base of demo 1. All three adapters stay in memory, and requests arrive in turn.

Each adapter answers its own task. The base is the same to the byte at the end.
"""

from pathlib import Path

import common
import numpy as np

from tinygpt.core.train import TrainConfig
from tinygpt.shell.terminal import say
from tinygpt.stages import evaluate, sft, variants
from tinygpt.stages.adapter import AdapterConfig, fingerprint
from tinygpt.text import instructions
from tinygpt.world import World, tasks

UPDATES = 400  # for each customer
CONFIG = AdapterConfig("lora", rank=2, alpha=2.0)


def main(folder: Path) -> None:
    base, tokenizer = common.pretrained(folder)
    world, mark = World(common.SEED), fingerprint(base)
    lessons = {
        "people": tasks.questions(world, world.people("known", "sft")),
        "Korean": [item for item in tasks.translations(world, "sft") if item["meta"]["task"] == "to Korean"],
        "reviews": tasks.sentiments(world, "sft", 1200),
    }
    sets = evaluate.named_tasks(world, count=300)
    exams = {"people": "questions, known", "Korean": "to Korean", "reviews": "sentiment"}
    exams = {customer: sets[name] for customer, name in exams.items()}

    # 1. Each customer trains an adapter. The three models are views: they share the arrays of the base.
    models = {}
    for seed, (customer, items) in enumerate(lessons.items()):
        model = variants.create(base, CONFIG, np.random.default_rng([common.SEED, seed]))
        train = TrainConfig(max_iters=UPDATES, learning_rate=3e-3, min_lr=3e-4, warmup_iters=10)
        settings = sft.Settings(model=base.config, train=train, block_size=128, batch_size=8)
        examples = [instructions.pair(item["prompt"], item["completion"]) for item in items]
        sft.in_memory(model, tokenizer, examples, settings).train()
        models[customer] = model
    assert all(np.shares_memory(model.flat, base.flat) for model in models.values())
    large, small = base.flat.nbytes / 1e6, sum(model.trained.flat.nbytes for model in models.values()) / 1e6
    print(f"In memory: one base of {large:.2f} MB, three adapters of {small:.2f} MB together")

    # 2. The same request to the base and to each adapter.
    for items in exams.values():
        say(f"\n> {items[0]['prompt']}    (true: {items[0]['completion']})")
        for customer, model in {"no adapter": base, **models}.items():
            say(f"  {customer:10}  {evaluate.ask(model, tokenizer, items[:1])[0].text}")

    # 3. Every adapter on every task.
    print(f"\n{'right answers':14}" + "".join(f"{customer:>10}" for customer in exams))
    for name, model in {"no adapter": base, **models}.items():
        answers = (evaluate.ask(model, tokenizer, items) for items in exams.values())
        scores = (evaluate.score(world, *pair) for pair in zip(exams.values(), answers, strict=True))
        print(f"{name:14}" + "".join(f"{score.right.rate:10.0%}" for score in scores))
    verdict = "the same" if fingerprint(base) == mark else "DIFFERENT"
    print(f"\nSHA-256 of the base: {mark[:16]}... before, {fingerprint(base)[:16]}... after: {verdict}.")


if __name__ == "__main__":
    with common.command_line(__doc__) as folder:
        main(folder)
