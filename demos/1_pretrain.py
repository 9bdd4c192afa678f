"""Demo 1: pre-training. A GPT learns to predict the next character, from random weights, in a minute or two.

    .venv/bin/python demos/1_pretrain.py [TEXT_FILE ...]

Without a file it reads the documentation that every Python carries. What to watch: the loss starts at the log
of the vocabulary's size, where every character is as likely as any other; samples turn from noise into words.
`tinygpt pretrain` is this loop with checkpoints, validation on the whole split, and every knob.
"""

import sys
import time

import numpy as np

from tinygpt import GPT, GPTConfig, data
from tinygpt.generate import generate
from tinygpt.optim import AdamW, learning_rate
from tinygpt.storage import Workspace
from tinygpt.tokenizer import CharTokenizer

BLOCK, BATCH, UPDATES = 64, 12, 1500


def main() -> None:
    rng = np.random.default_rng(1337)

    # 1. Text becomes a stream of integers; the last tenth is kept to validate on.
    documents = data.documents(sys.argv[1:])
    tokenizer = CharTokenizer.train(data.joined(documents))
    tokens = np.concatenate(list(data.encode(documents, tokenizer)))
    train_tokens, val_tokens = data.split(tokens, BLOCK)
    print(f"{len(tokens):,} characters, {tokenizer.vocab_size} different ones")

    # 2. The model: random weights, with a name and a place in one flat buffer for each.
    config = GPTConfig(vocab_size=tokenizer.vocab_size, block_size=BLOCK, n_layer=4, n_head=4, n_embd=128)
    model = GPT(config, rng)
    print(f"{model.flat.size:,} weights; a blind guess has loss {np.log(tokenizer.vocab_size):.3f}")

    def sample(note: str) -> None:
        prompt = tokenizer.encode("The ")
        new = generate(model, [prompt], 120, temperature=0.8, rng=np.random.default_rng(0))[0]
        print(f"--- {note}\nThe {tokenizer.decode(new)}\n---")

    sample("before")

    # 3. The loop. Each target is the character that follows: the data is its own supervision.
    optimizer, ws, began = AdamW(model), Workspace(), time.perf_counter()
    for update in range(UPDATES):
        ids, targets = data.random_blocks(train_tokens, BATCH, BLOCK, rng)
        loss = model.loss(ids, targets, grads=optimizer.grads, ws=ws)  # forward, and backward into grads
        lr = learning_rate(update, peak=1e-3, lowest=1e-4, warmup_iters=100, max_iters=UPDATES)
        norm = optimizer.step(lr)
        if update % 100 == 0 or update == UPDATES - 1:
            ids, targets = data.random_blocks(val_tokens, 8 * BATCH, BLOCK, np.random.default_rng(0))
            validation = model.loss(ids, targets)
            text = f"update {update:5}  loss {loss:.3f}  validation {validation:.3f}  |gradient| {norm:.2f}"
            print(f"{text}  {time.perf_counter() - began:.1f} s")

    # 4. The same prompt, the same random numbers, other weights.
    sample("after")


if __name__ == "__main__":
    main()
