"""Demo 1: pre-training. From random weights a GPT learns to predict the next token. All weights change.

    .venv/bin/python demos/1_pretrain.py [FOLDER]

The text is about invented people. The program that invents these people knows everything about them. So the
demo can compute how well any model can predict the text, and which facts only the text can have taught. The
text starts with repeated word lists. They teach the model to copy from its context.

The demo takes about four minutes on two cores. It saves the model in FOLDER. The later demos load that model.
`tinygpt pretrain --data world` does the same, with checkpoints on the way and an option for every setting.
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
    # 1. Documents become rows of tokens. A row holds several documents. No document sees another.
    print("Writing the text of a world ...")
    world = World(common.SEED)
    text = corpus.draw(world)
    tokenizer = corpus.train_tokenizer(text, vocab_size=2048)
    rows = corpus.rows(text.train, tokenizer, BLOCK)
    print(f"{len(text.train):,} documents, such as: {text.train[-1]}")

    # 2. The model. Its weights are random. Each weight array has a name and a place in one flat buffer.
    config = GPTConfig(tokenizer.vocab_size, BLOCK, n_layer=4, n_head=4, n_embd=128)
    model = GPT(config, np.random.default_rng(common.SEED))
    random = {name: p.copy() for name, p in model.params.items()}
    print(f"{model.flat.size:,} weights; a blind guess has loss {np.log(tokenizer.vocab_size):.3f}")

    name = world.people("known", "eval")[0].name

    def sample(note: str) -> None:
        print(f"--- {note}")
        for begin in (f"{name} lives in", "From Ashford the red line goes to", "The Korean for cat is"):
            new = generate(model, [encode_prompt(tokenizer, begin)], 8, temperature=0)[0]
            say(f"{begin} |{tokenizer.decode(new)}")
        print("---")

    sample("before")

    # 3. The loop. The target of each token is the next token: the text supervises itself.
    optimizer, began = AdamW(model, beta2=0.98), time.perf_counter()
    for update in range(UPDATES):
        ids, targets, weights, start, positions = data.rows_in_order(rows, BATCH, update)
        weights /= weights.sum()  # padding has weight 0
        packing = {"start": start, "positions": positions}  # first visible token, own position
        loss = model.loss(ids, targets, weights, optimizer.grads, **packing)  # forward and backward
        lr = learning_rate(update, peak=2e-3, lowest=1e-4, warmup_iters=700, max_iters=UPDATES)
        norm = optimizer.step(lr)
        if update % 250 == 0 or update == UPDATES - 1:
            seconds = time.perf_counter() - began
            print(f"update {update:5}  loss {loss:.3f}  |gradient| {norm:.2f}  {seconds:.0f} s")

    # 4. The same beginnings after training, the loss above the floor, and the recall of facts.
    sample("after")
    print(report.gaps(evaluate.gaps(model, tokenizer, world)))
    print('\nThe weights remember facts that the text says often. This is "parametric memory".')
    print(report.recall(evaluate.recall_by_exposure(model, tokenizer, world), evaluate.chance(world)))
    moved, _ = weight_change(random, model.params)
    print(f"\nThe weights moved by {moved:.0%} of their norm.")
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder, model, tokenizer)
    print(f"Saved in {folder}. Next: demos/2_instructions.py")


if __name__ == "__main__":
    with common.command_line(__doc__) as folder:
        main(folder)
