"""Demo 1: pre-training. From random weights, a GPT learns to predict the next token; all weights change.

    .venv/bin/python demos/1_pretrain.py [FOLDER]

The text is about invented people, of whom everything is known: so it is known how well it can be predicted
at all, and what the model could only have learned here. It begins with words said over and over; on these the
model learns to copy. Takes about four minutes; all other demos begin with the model that is saved in FOLDER.

`tinygpt pretrain --data world` is the same, with checkpoints on the way and every knob.
"""

import time
from pathlib import Path

import common
import numpy as np

from tinygpt import GPT, GPTConfig
from tinygpt.core.generate import generate
from tinygpt.core.optim import AdamW, learning_rate
from tinygpt.core.train import weight_change
from tinygpt.folders import checkpoint
from tinygpt.lab import report
from tinygpt.shell.terminal import say
from tinygpt.stages import evaluate
from tinygpt.text import data
from tinygpt.text.stream import encode_prompt
from tinygpt.world import World, corpus

BLOCK, BATCH, UPDATES = 128, 8, 4600


def main(folder: Path) -> None:
    # 1. Documents become rows of tokens. A row holds several, and none sees another.
    print("Writing the text of a world ...")
    world = World(common.SEED)
    text = corpus.draw(world)
    tokenizer = corpus.train_tokenizer(text, vocab_size=2048)
    rows = corpus.rows(text.train, tokenizer, BLOCK)
    print(f"{len(text.train):,} documents, such as: {text.train[-1]}")

    # 2. The model: random weights, with a name and a place in one flat buffer for each.
    config = GPTConfig(tokenizer.vocab_size, BLOCK, n_layer=4, n_head=4, n_embd=128)
    model = GPT(config, np.random.default_rng(common.SEED))
    random = {name: p.copy() for name, p in model.params.items()}
    print(f"{model.flat.size:,} weights; a blind guess has loss {np.log(tokenizer.vocab_size):.3f}")

    known = world.people("known", "eval")[0]

    def sample(note: str) -> None:
        print(f"--- {note}")
        for begin in (f"{known.name} lives in", "From Ashford the red line goes to", "The Korean for cat is"):
            new = generate(model, [encode_prompt(tokenizer, begin)], 8, temperature=0)[0]
            say(f"{begin} |{tokenizer.decode(new)}")
        print("---")

    sample("before")

    # 3. The loop. Each target is the token that follows: the text is its own supervision.
    optimizer, began = AdamW(model, beta2=0.98), time.perf_counter()
    for update in range(UPDATES):
        ids, targets, weights, start, positions = data.rows_in_order(rows, BATCH, update)
        weights /= weights.sum()  # padding has none
        packing = {"start": start, "positions": positions}  # what each token sees, and where it stands
        loss = model.loss(ids, targets, weights, optimizer.grads, **packing)  # forward and backward
        lr = learning_rate(update, peak=2e-3, lowest=1e-4, warmup_iters=700, max_iters=UPDATES)
        norm = optimizer.step(lr)
        if update % 250 == 0 or update == UPDATES - 1:
            took = time.perf_counter() - began
            print(f"update {update:5}  loss {loss:.3f}  |gradient| {norm:.2f}  {took:.0f} s")

    # 4. The same beginnings, other weights; and what is known about them.
    sample("after")
    print(report.gaps(evaluate.gaps(model, tokenizer, world)))
    print("\nWhat it read often it remembers, in its weights: \"parametric memory\".")
    print(report.recall(evaluate.recall_by_exposure(model, tokenizer, world), evaluate.chance(world)))
    moved, _ = weight_change(random, model.params)
    print(f"\nThe weights moved by {moved:.0%} of their norm.")
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder, model, tokenizer)
    print(f"Saved in {folder}. Next: demos/2_instructions.py")


if __name__ == "__main__":
    with common.command_line(__doc__) as folder:
        main(folder)
