"""Which parts a model consists of: GPT-2's, and those that a variant puts in their place.

A variant is a subclass of GPT that replaces some parts of any model. Variants compose: a GPT-1 with a score
head and low-rank branches is all three, and each asks the next for what it does not replace.
"""

from __future__ import annotations

import copy
import functools
from types import ModuleType

import numpy as np

from .config import GPTConfig
from .gpt1 import GPT1
from .model import GPT
from .score import Score


def build(
    config: GPTConfig,
    rng: np.random.Generator | None = None,
    dtype: type = np.float32,
    ops: ModuleType | None = None,
) -> GPT:
    """The model that a configuration describes; the arguments are those of GPT."""
    cls = GPT1 if config.post_norm else GPT
    return (_joined(Score, cls) if config.num_labels else cls)(config, rng, dtype, ops)


def view(variant: type[GPT], model: GPT) -> GPT:
    """A shallow copy of a model with the parts of a variant. Both models have the same arrays."""
    other = copy.copy(model)
    other.__class__ = _joined(variant, type(model))
    return other


@functools.cache
def _joined(variant: type[GPT], cls: type[GPT]) -> type[GPT]:
    return type(f"{variant.__name__}{cls.__name__}", (variant, cls), {})
