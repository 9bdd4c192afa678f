"""The options of each stage on the synthetic world.

Measurements on the seeds 1337 and 1 to 4 decided the options. Nobody looked at seed 1338, the seed of the
README's table. The options of RLHF were measured on the people of "eval" in the worlds 1337, 1 and 2. A model
learns to copy from the context only with this beta2 and the long warm-up. With a learning rate of 2.5e-4 for
tuning, 76 % of the readings of a passage were right in one order of batches.
"""

import dataclasses

PRETRAIN = {
    "tokenizer": "bpe", "vocab_size": 2048, "block_size": 128, "batch_size": 8, "max_iters": 4600,
    "learning_rate": 2e-3, "min_lr": 1e-4, "beta2": 0.98, "warmup_iters": 700, "eval_interval": 920,
}  # fmt: skip
SFT = {"max_iters": 1000, "learning_rate": 4e-4, "eval_interval": 250}
REWARD = {
    "comparisons": 20_000, "batch_size": 16, "max_iters": 1250, "learning_rate": 3e-4, "warmup_iters": 50,
    "eval_interval": 250,
}  # fmt: skip
RLHF = {
    "max_iters": 160, "learning_rate": 5e-5, "warmup_iters": 5, "beta": 0.4, "ptx_coef": 1.0,
    "eval_interval": 40,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A whole life: the options of each stage, under their names in the commands, and sizes."""

    pretrain: dict
    sft: dict
    reward: dict
    rlhf: dict
    world: str = ""  # a size of `world.SIZES`
    questions: int = 300  # questions, problems or prompts for each rate of a story
    part: int = 1  # the questions, prompts and documents of a claim are divided by this number

    def computed_in(self, dtype: str) -> "Recipe":
        """The same recipe with all stages in this dtype, see `GPT.compute_in`."""
        if dtype == "float32":
            return self
        stages = ("pretrain", "sft", "reward", "rlhf")
        return dataclasses.replace(self, **{name: getattr(self, name) | {"dtype": dtype} for name in stages})


FULL = Recipe(PRETRAIN, SFT, REWARD, RLHF)
QUICK = Recipe(  # RLHF is too short to change much
    PRETRAIN | {"max_iters": 1250, "warmup_iters": 550, "eval_interval": 625},
    SFT | {"max_iters": 250, "eval_interval": 125},
    REWARD | {"comparisons": 6400, "max_iters": 400, "eval_interval": 200},
    RLHF | {"max_iters": 30, "learning_rate": 1e-4, "eval_interval": 15},
    world="small", questions=100,
)  # fmt: skip
