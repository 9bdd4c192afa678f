"""Demo 0: a GPT learns to write, from nothing, in less than a minute on two cores.

    .venv/bin/python demos/0_first.py

The program writes sentences about 16 invented people. A small GPT with random weights reads these sentences
letter by letter. The GPT has one task: predict the next letter. At several moments the demo shows:

    loss      the mean surprise about the next letter, in nats. 0 is certainty.
    recalled  how many of the 64 facts about the people the GPT completes correctly
    sample    what the GPT writes

Letters come first, then words, then sentences, and at last true sentences. Nothing is saved.
"""

import math
import sys
import time

import numpy as np

from tinygpt import GPT, GPTConfig
from tinygpt.core.generate import generate
from tinygpt.core.optim import AdamW, learning_rate
from tinygpt.text.tokenizer import CharTokenizer
from tinygpt.world import World

SEED, SENTENCES, BLOCK, BATCH, UPDATES = 1337, 4000, 96, 16, 1200
MOMENTS = (0, 25, 50, 100, 200, 400, 800, UPDATES)


def main() -> None:
    # 1. The text. Each sentence is one of 64 facts, four about each person.
    world, rng = World(SEED), np.random.default_rng([SEED, 0])
    facts = [(f"{person.name} {attribute.wordings[0]} ", f"{attribute.values[value]}.")
             for person in world.people("known")[:16]
             for attribute, value in zip(world.lexicon.attributes, person.values, strict=True)]  # fmt: skip
    text = "".join(f"{begin}{end}\n" for begin, end in (facts[n] for n in rng.integers(64, size=SENTENCES)))
    tokenizer = CharTokenizer.train(text)
    ids, letters = tokenizer.encode(text), tokenizer.vocab_size
    print(f"A text of {len(text):,} letters:\n\n{text[:107]}...\n")

    # 2. The model, with random weights.
    config = GPTConfig(letters, BLOCK, n_layer=3, n_head=4, n_embd=96)
    model = GPT(config, np.random.default_rng([SEED, 1]))
    print(f"A GPT with {model.flat.size:,} random weights learns to predict the next of {letters} letters.")
    print(f"A blind guess has loss {math.log(letters):.2f}. The least possible loss is "
          f"{math.log(64) * SENTENCES / len(text):.2f}:\nwhich fact comes next is chance.\n")  # fmt: skip

    def show(update: int, loss: float, seconds: float) -> None:
        ends = generate(model, [tokenizer.encode(begin) for begin, _ in facts], 12, temperature=0)
        recalled = sum(tokenizer.decode(ids).startswith(end)
                       for ids, (_, end) in zip(ends, facts, strict=True))  # fmt: skip
        sample = generate(model, [tokenizer.encode("\n")], 52, rng=np.random.default_rng([SEED, 2]))[0]
        written, bar = tokenizer.decode(sample).replace("\n", " / "), "█" * round(4 * loss)
        print(f"{update:6} {seconds:4.0f} s {loss:6.2f} {bar:16} {recalled:2} of 64  {written}")

    # 3. The loop: read a piece of text, compare each guess with the next letter, move every weight a little.
    optimizer, began = AdamW(model), time.perf_counter()
    print(f"update   time   loss {'':16} recalled  sample")
    for update in range(UPDATES + 1):
        places = rng.integers(len(ids) - BLOCK, size=BATCH)[:, None] + np.arange(BLOCK)
        loss = model.loss(ids[places], ids[places + 1], grads=optimizer.grads)  # forward and backward
        if update in MOMENTS:
            show(update, float(loss), time.perf_counter() - began)
        optimizer.step(learning_rate(update, peak=3e-3, lowest=1e-4, warmup_iters=50, max_iters=UPDATES))
    print("\nAll that the GPT recalls is in its weights now: parametric memory. Next: demos/1_pretrain.py")


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(__doc__)
    main()
