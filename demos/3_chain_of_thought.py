"""Demo 3: chain of thought. The same problems with and without their steps in the completions.

    .venv/bin/python demos/3_chain_of_thought.py [FOLDER]

"You start at Ashford and take the red line, then the blue line. Where do you arrive?" The model of demo 1
knows every ride, because its text tells of journeys ride by ride.

After tuning on answers alone, the model cannot join the rides. After tuning on answers with their steps, it
can, also for problems that no example has. Each step recalls one ride from the text. Three controls do not
help: full stops in place of the steps, the steps in another order, and more training. A false step in the
completion leads to the answer that follows from the false step.
"""

import dataclasses
from pathlib import Path

import common

from tinygpt import GPT
from tinygpt.core.train import TrainConfig
from tinygpt.shell.terminal import say
from tinygpt.stages import evaluate, sft
from tinygpt.text import instructions
from tinygpt.world import World, tasks

TRAIN = TrainConfig(max_iters=300, learning_rate=5e-4, min_lr=5e-5, warmup_iters=10)
STEPS = range(1, 6)


def main(folder: Path) -> None:
    base, tokenizer = common.pretrained(folder)
    world = World(common.SEED)
    problems = {k: tasks.distinct(tasks.journeys(world, "eval", k, 300)) for k in STEPS}

    def tuned(style: str, updates: int) -> GPT:
        model = base.copy()
        items = tasks.journeys(world, "sft", STEPS, 1000, style)
        examples = [instructions.pair(item["prompt"], item["completion"]) for item in items]
        train = dataclasses.replace(TRAIN, max_iters=updates)
        settings = sft.Settings(model=base.config, train=train, block_size=128, batch_size=8)
        sft.in_memory(model, tokenizer, examples, settings).train()
        return model

    def tokens(style: str) -> int:
        items = tasks.journeys(world, "sft", STEPS, 1000, style)
        pairs = [instructions.pair(item["prompt"], item["completion"]) for item in items]
        return sum(len(instructions.encode(tokenizer, messages)[0]) for messages in pairs)

    updates = TRAIN.max_iters
    print(f"{'rides':44}" + "".join(f"{k:8}" for k in STEPS))
    print(f"{'problems, all unseen':44}" + "".join(f"{len(items):8}" for items in problems.values()))
    for style, times, note in (
        ("direct", updates * tokens("direct") // tokens("steps"), "answer alone, as many examples"),
        ("direct", updates, "answer alone, as many tokens"),
        ("filler", updates, "full stops, then the answer"),
        ("shuffled", updates, "steps in another order, then the answer"),
        ("steps", updates, "step by step"),
    ):
        model, cells = tuned(style, times), []
        for items in problems.values():
            score = evaluate.score(world, items, evaluate.ask(model, tokenizer, items))
            cells.append(f"{score.right.rate:8.3f}")
        print(f"{note:44}{''.join(cells)}")
        item = problems[3][0]
        answer = evaluate.ask(model, tokenizer, [item])[0].text
        say(f"  > {item['prompt']}\n    {answer}    (true: {item['meta']['answer']})")
    changed, followed = evaluate.corrupted(model, tokenizer, world, problems[3] + problems[4] + problems[5])
    print(f"\nAfter a false step the answer changes: {changed}. It follows from the false step: {followed}.")
    print("Next: demos/4_reward_model.py")


if __name__ == "__main__":
    with common.command_line(__doc__) as folder:
        main(folder)
