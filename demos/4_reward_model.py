"""Demo 4: the reward model. People compare answers of the model of demo 2, and a judge learns their taste.

    .venv/bin/python demos/4_reward_model.py [FOLDER]

After its tuning the model answers confidently about people of whom it knows nothing. People would rather hear
"I do not know." (here they are simulated: they know the truth, and slip in one comparison of ten). The judge
is the same model with one number as its result. It first says what it thinks itself, then looks at the
answer: what it learns is to compare, and when not to trust itself. It is tested on other people.
"""

from pathlib import Path

import common

from tinygpt.core.train import TrainConfig
from tinygpt.folders import checkpoint
from tinygpt.shell.terminal import say
from tinygpt.stages import recipes, reward
from tinygpt.world import World

COUNTS = (300, 3000, recipes.REWARD["comparisons"])
BATCH, RATE = recipes.REWARD["batch_size"], recipes.REWARD["learning_rate"]


def main(folder: Path) -> None:
    author, tokenizer = common.tuned(folder)
    world = World(common.SEED)
    labelled = reward.collect(author, tokenizer, world, reward.taught_by(world), COUNTS[-1])
    for c in labelled[:4]:
        slip = "" if c.is_right else "    (a slip)"
        say(f"> {c.prompt}\n  better: {c.chosen}    worse: {c.rejected}{slip}")

    # 1. More labels, a better judge, of people of whom no comparison was; shuffled labels teach nothing.
    others = world.people("known", "eval") + world.people("never", "eval")
    pairs = reward.collect(author, tokenizer, world, others, 2000, error=0)
    turned = [c._replace(chosen=c.rejected, rejected=c.chosen) for c in labelled]
    shuffled = [(c, other)[n % 2] for n, (c, other) in enumerate(zip(labelled, turned, strict=True))]
    kinds = sorted({c.kind for c in pairs})
    print(f"\n{'labels':18} {'right':>6}" + "".join(f"  {kind}" for kind in kinds))
    for name, some in [("shuffled", shuffled), *((f"{count:,}", labelled[:count]) for count in COUNTS)]:
        updates = min(3 * len(some), COUNTS[-1]) // BATCH + 1
        train = TrainConfig(max_iters=updates, learning_rate=RATE, min_lr=RATE / 10, warmup_iters=50)
        settings = reward.Settings(model=author.config, train=train, block_size=128, batch_size=BATCH)
        stage = reward.in_memory(author, tokenizer, some, settings)
        stage.train()
        judge = stage.judge
        found = reward.judged(judge, pairs)
        cells = (f"{found.by_kind[kind].rate:{len(kind) + 2}.3f}" for kind in kinds)
        print(f"{name:18} {found.right.rate:6.3f}{''.join(cells)}")

    # 2. What it thinks of some answers; only differences mean anything.
    for question in dict.fromkeys(c.prompt for c in pairs[:4]):
        said = sorted({answer for c in pairs if c.prompt == question for answer in (c.chosen, c.rejected)})
        say(f"\n> {question}    (it would say: {judge.own[question]})")
        for score, answer in sorted(zip(judge([question] * len(said), said), said, strict=True))[::-1]:
            say(f"  {score:6.2f}  {answer}")
    (folder / "judge").mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder / "judge", judge.model, tokenizer)
    print(f"\nSaved in {folder / 'judge'}. Next: demos/5_rlhf.py")


if __name__ == "__main__":
    with common.command_line(__doc__) as folder:
        main(folder)
