"""Demo 4: the reward model. People compare answers of the model of demo 2, and a judge learns from them.

    .venv/bin/python demos/4_reward_model.py [FOLDER]

After its tuning, the model invents answers about unknown people. People prefer the answer "I do not know."
The people here are simulated: they know the truth, and err in one comparison of ten.

The judge is a copy of the model with one number as its output. The judge reads the question, the model's own
answer, and the answer to score. So it learns to compare the two answers, and to mistrust the model's own
answer about unknown people. The test uses other people than the training.
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

    # 1. More labels make a better judge. Shuffled labels teach nothing. The pairs are about other people.
    others = world.people("known", "eval") + world.people("never", "eval")
    pairs = reward.collect(author, tokenizer, world, others, 2000, error=0)
    swapped = [c._replace(chosen=c.rejected, rejected=c.chosen) for c in labelled]
    shuffled = [(c, other)[n % 2] for n, (c, other) in enumerate(zip(labelled, swapped, strict=True))]
    kinds = sorted({c.kind for c in pairs})
    print(f"\n{'labels':18} {'right':>6}" + "".join(f"  {kind}" for kind in kinds))
    for name, labels in [("shuffled", shuffled), *((f"{count:,}", labelled[:count]) for count in COUNTS)]:
        updates = min(3 * len(labels), COUNTS[-1]) // BATCH + 1
        train = TrainConfig(max_iters=updates, learning_rate=RATE, min_lr=RATE / 10, warmup_iters=50)
        settings = reward.Settings(model=author.config, train=train, block_size=128, batch_size=BATCH)
        stage = reward.in_memory(author, tokenizer, labels, settings)
        stage.train()
        judge = stage.judge
        judgement = reward.judged(judge, pairs)
        cells = (f"{judgement.by_kind[kind].rate:{len(kind) + 2}.3f}" for kind in kinds)
        print(f"{name:18} {judgement.right.rate:6.3f}{''.join(cells)}")

    # 2. The scores of some answers. Only the difference of two scores has a meaning.
    for question in dict.fromkeys(c.prompt for c in pairs[:4]):
        answers = sorted({answer for c in pairs if c.prompt == question for answer in (c.chosen, c.rejected)})
        say(f"\n> {question}    (the model's own answer: {judge.thoughts[question]})")
        scores = judge([question] * len(answers), answers)
        for score, answer in sorted(zip(scores, answers, strict=True), reverse=True):
            say(f"  {score:6.2f}  {answer}")
    (folder / "judge").mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder / "judge", judge.model, tokenizer)
    print(f"\nSaved in {folder / 'judge'}. Next: demos/5_rlhf.py")


if __name__ == "__main__":
    with common.command_line(__doc__) as folder:
        main(folder)
