"""Demo 6: adapters. Demo 2 again, with a few extra weights beside the model of demo 1. The base stays fixed.

    .venv/bin/python demos/6_adapters.py [FOLDER]

LoRA adds a product of two thin matrices to each weight matrix. p-tuning learns 16 vectors that stand before
the text. They act like words that no vocabulary has. The demo computes no gradient of the base and changes no
byte of it. With the adapter off, the logits are the same before and after the training.
"""

from pathlib import Path

import common
import numpy as np

from tinygpt.core.train import TrainConfig
from tinygpt.shell.terminal import say
from tinygpt.stages import evaluate, sft, variants
from tinygpt.stages.adapter import AdapterConfig, fingerprint
from tinygpt.stages.prompts import nearest
from tinygpt.text.instructions import prompt
from tinygpt.world import World, tasks

UPDATES = 1000  # each
ARMS = (
    ("all weights", None, 4e-4),
    ("LoRA, rank 8", AdapterConfig("lora", rank=8), 3e-3),
    ("LoRA, rank 1", AdapterConfig("lora", rank=1, alpha=1.0), 3e-3),
    ("p-tuning, 16 tokens", AdapterConfig("ptuning", num_virtual_tokens=16, hidden=128), 1e-3),
)
SETS = ("questions, known", "questions, never seen", "to Korean", "summary", "journey")


def main(folder: Path) -> None:
    base, tokenizer = common.pretrained(folder)
    world = World(common.SEED)
    sets = {name: items for name, items in evaluate.named_tasks(world, count=300).items() if name in SETS}
    examples = tasks.conversations(world, tasks.tuning(world))
    question = prompt(tokenizer, sets["questions, known"][0]["prompt"])[None]
    untuned, mark = base.forward(question)[0], fingerprint(base)

    def row(name: str, model, trained: str) -> None:
        formed, cells = [], ""
        for title, items in sets.items():
            score = evaluate.score(world, items, evaluate.ask(model, tokenizer, items))
            formed.append(score.formed.rate)
            cells += f"{score.right.rate:{len(title) + 2}.3f}"
        print(f"{name:22}{trained:>16}{np.mean(formed):13.3f}{cells}")

    print(f"{'':22}{'weights trained':>16}  well-formed" + "".join(f"  {name}" for name in sets))
    row("base, not tuned", base, "")
    for name, config, rate in ARMS:
        rng = np.random.default_rng(common.SEED)
        model = base.copy() if config is None else variants.create(base, config, rng)
        train = TrainConfig(max_iters=UPDATES, learning_rate=rate, min_lr=rate / 10, warmup_iters=10)
        settings = sft.Settings(model=model.config, train=train, block_size=model.context, batch_size=8)
        sft.in_memory(model, tokenizer, examples, settings).train()
        size = model.trained.flat.size
        row(name, model, f"{size:,} {size / model.flat.size:.1%}")
        if config is not None and config.kind == "lora":
            merged = model.merge()
            change = abs(merged.forward(question)[0] - model.forward(question)[0]).max()
            print(f"{'':22}merged into the weights: the logits change by {change:.0e}")
        elif config is not None:
            words = tokenizer.decode(nearest(model, 1)[:, 0])
            say(f"{'':22}the words nearest to its 16 vectors: {words}")

    same = (base.forward(question)[0] == untuned).all()
    print(f"\nSHA-256 of the base before {mark[:16]}..., after {fingerprint(base)[:16]}...")
    print(f"Without an adapter its logits are {'the same, bit for bit' if same else 'DIFFERENT'}.")
    print("Next: demos/7_in_context.py")


if __name__ == "__main__":
    with common.command_line(__doc__) as folder:
        main(folder)
