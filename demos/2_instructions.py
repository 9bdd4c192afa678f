"""Demo 2: instruction tuning. The model of demo 1 learns to answer questions, from prompts and completions.

    .venv/bin/python demos/2_instructions.py [FOLDER]

Pre-training told it where people live; it never saw a question. The loss is now that of the completions
alone. Fine-tuning is a fine adjustment: the form of its answers changes altogether, the weights hardly; it
answers zero-shot about people who are in no tuning example; and where it knows nothing, as confidently.
"""

from pathlib import Path

import common

from tinygpt.core.train import TrainConfig, weight_change
from tinygpt.folders import checkpoint
from tinygpt.lab import report
from tinygpt.shell.terminal import say
from tinygpt.stages import evaluate, sft
from tinygpt.world import World, tasks

TRAIN = TrainConfig(max_iters=1000, learning_rate=4e-4, min_lr=4e-5, warmup_iters=10)


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
    moved, _ = weight_change(before, model.params)
    (folder / "tuned").mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder / "tuned", model, tokenizer)
    print(f"\nThe weights moved by {moved:.1%} of their norm. Next: demos/3_chain_of_thought.py")


if __name__ == "__main__":
    with common.command_line(__doc__) as folder:
        main(folder)
