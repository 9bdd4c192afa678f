"""What several test files use."""

import os
import signal

import numpy as np
import pytest

from tinygpt.core import kernels
from tinygpt.stages import recipes
from tinygpt.stages.recipes import Recipe

signal.signal(signal.SIGINT, signal.default_int_handler)  # under nohup the signal is ignored, in children too
for name in ("LC_ALL", "LC_MESSAGES", "LANG"):  # a Korean locale adds its line about --lang
    os.environ.pop(name, None)
if "c" not in kernels.available():  # or each command would say so, where tests expect one line
    os.environ.setdefault("TINYGPT_BACKEND", "numpy")


@pytest.fixture(params=kernels.available())
def ops(request):
    """The operations, in each backend that works here."""
    return kernels.backend(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# All that a claim or a story does, too small to show anything. Few documents make a tokenizer of short
# tokens, and so long rows.
TOY = Recipe(
    recipes.PRETRAIN | {"max_iters": 20, "block_size": 256, "batch_size": 1, "n_layer": 2, "n_embd": 32},
    recipes.SFT | {"max_iters": 10},
    recipes.REWARD | {"comparisons": 40, "batch_size": 4, "max_iters": 1},
    recipes.RLHF | {"max_iters": 1, "num_prompts": 2},
    world="tiny", questions=6, part=50,
)  # fmt: skip


@pytest.fixture
def toy():
    return TOY
