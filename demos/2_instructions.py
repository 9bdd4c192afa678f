"""Demo 2: instruction tuning. The model of demo 1 learns to answer questions, from prompts and completions.

    .venv/bin/python demos/2_instructions.py [FOLDER]

Pre-training taught the model where people live. The model never saw a question. Now it reads pairs of a
question (the prompt) and an answer (the completion). Only the tokens of the completion count in the loss.

The form of the answers changes completely, and the weights change little. The model answers questions about
people who are in no tuning example. This is zero-shot. It also invents answers about unknown people. At the
end the demo makes requests that are too hard for a model of this size.
"""

from pathlib import Path

import common

from tinygpt.core.train import TrainConfig, weight_change
from tinygpt.folders import checkpoint
from tinygpt.lab import report
from tinygpt.shell.terminal import say
from tinygpt.stages import evaluate, sft
from tinygpt.stages.answers import answers
from tinygpt.text.instructions import prompt
from tinygpt.world import World, tasks

TRAIN = TrainConfig(max_iters=1000, learning_rate=4e-4, min_lr=4e-5, warmup_iters=10)
TOO_HARD = (
    "Write a Python Streamlit program that takes input from the user and stores it in SQLite.",
    "What is the capital of France?",
    "Translate into Korean: I love you.",
)


def main(folder: Path) -> None:
    model, tokenizer = common.pretrained(folder)
    world = World(common.SEED)
    before = {name: p.copy() for name, p in model.params.items()}
    sets = evaluate.named_tasks(world, count=300)
    shown = [sets[name][0] for name in ("questions, known", "to Korean", "reading", "questions, never seen")]

    def measure(note: str) -> None:
        print(f"\n=== {note}")
        for item, answer in zip(shown, evaluate.ask(model, tokenizer, shown), strict=True):
            say(f"> {item['prompt']}\n  {answer.text}    (true: {item['completion']})")
        print()
        scores = {
            name: evaluate.score(world, items, evaluate.ask(model, tokenizer, items))
            for name, items in sets.items()
        }
        print(report.scores(scores))

    measure("before")
    examples = tasks.conversations(world, tasks.tuning(world))
    print(f"\nTuning on {len(examples):,} examples of other people, phrases and problems ...")
    settings = sft.Settings(model=model.config, train=TRAIN, block_size=128, batch_size=8)
    sft.in_memory(model, tokenizer, examples, settings).train()
    measure("after")
    print("\n=== too hard for this model")
    replies = answers(model, tokenizer, [prompt(tokenizer, request) for request in TOO_HARD], 60)
    for request, answer in zip(TOO_HARD, replies, strict=True):
        say(f"> {request}\n  {answer.text}")
    moved, _ = weight_change(before, model.params)
    (folder / "tuned").mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder / "tuned", model, tokenizer)
    print(f"\nThe weights moved by {moved:.1%} of their norm. Next: demos/3_chain_of_thought.py")


if __name__ == "__main__":
    with common.command_line(__doc__) as folder:
        main(folder)
