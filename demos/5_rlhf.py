"""Demo 5: RLHF. The judge of demo 4 scores the answers of the model of demo 2. A policy gradient follows.

    .venv/bin/python demos/5_rlhf.py [FOLDER]

In each update the model answers some questions, each several times. An answer that scores better than the
mean of the other answers to the same question becomes likelier (RLOO). A penalty on the distance from the
start (KL, in nats) keeps the model's language. The penalty is needed, because the judge's taste is not
exactly the taste of people. The questions at the end are about people who are in no tuning example,
comparison or RLHF prompt.
"""

from pathlib import Path

import common

from tinygpt.core import train
from tinygpt.lab import report
from tinygpt.shell.terminal import say
from tinygpt.stages import evaluate, recipes, rlhf
from tinygpt.world import World

RECIPE = recipes.RLHF
SETS = ("questions, known", "questions, never seen", "to Korean", "reading", "journey")


def main(folder: Path) -> None:
    judge = common.judge(folder)
    reference, tokenizer, world = judge.author, judge.tokenizer, World(common.SEED)
    model = reference.copy()
    sets = {name: items for name, items in evaluate.named_tasks(world, count=300).items() if name in SETS}
    shown = [*sets["questions, known"][:2], *sets["questions, never seen"][:4]]

    def measure(note: str) -> None:
        print(f"\n=== {note}")
        for item, answer in zip(shown, evaluate.ask(model, tokenizer, shown), strict=True):
            say(f"> {item['prompt']}\n  {answer.text}    (true: {item['completion']})")
        answers = {name: evaluate.ask(model, tokenizer, items) for name, items in sets.items()}
        print("\n" + report.scores({name: evaluate.score(world, sets[name], answers[name]) for name in sets}))

    measure("before")
    rate, updates = RECIPE["learning_rate"], RECIPE["max_iters"]
    how = train.TrainConfig(max_iters=updates, learning_rate=rate, min_lr=rate / 10, warmup_iters=5)
    questions = rlhf.read_prompts(f"world:{common.SEED}")
    config = rlhf.Config(algo="rloo", beta=RECIPE["beta"], ptx_coef=RECIPE["ptx_coef"])
    # Each update also trains on these, so that nothing is forgotten.
    tuning = rlhf.ptx_examples([f"world:{common.SEED}"])
    material = rlhf.Material(reference, judge, questions, [], tuning, world)
    settings = rlhf.Settings(model=model.config, train=how, rl=config, block_size=model.context)
    stage = rlhf.RLHF(settings, how.optimizer(model), tokenizer, material)

    # reward: the judge's score. gold: the score of the simulated people. Only the reward trains the model.
    print(f"\n{'update':>6} {'reward':>7} {'gold':>6} {'KL':>6} {'entropy':>8}")

    def row(record: train.Record) -> None:
        if record["iter"] % 10 in (0, 1):
            print(f"{record['iter']:6} {record['reward']:7.2f} {record['gold']:6.2f} {record['kl']:6.2f} "
                  f"{record['entropy']:8.2f}")  # fmt: skip

    stage.train(row)
    measure("after")
    moved, _ = train.weight_change(reference.params, model.params)
    print(f"\nThe weights moved by {moved:.1%} of their norm. Next: demos/6_adapters.py")


if __name__ == "__main__":
    with common.command_line(__doc__) as folder:
        main(folder)
