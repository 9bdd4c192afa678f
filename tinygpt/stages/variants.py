"""The parts of a model: those of GPT-2, or those of a variant in their place.

A variant is a subclass of GPT that replaces some parts of any model. Variants compose. A GPT-1 with a score
head and low-rank branches is all three variants: each calls the next variant for all other parts.
"""

from __future__ import annotations

import copy
import functools
from types import ModuleType

import numpy as np

from ..core.config import GPTConfig
from ..core.model import GPT
from ..errors import UserError
from .adapter import Adapted, Adapter, AdapterConfig
from .gpt1 import GPT1
from .lora import LoRA
from .prompts import Prefix, Prompt
from .score import Score

ADAPTERS = {"lora": LoRA, "ptuning": Prompt, "prompt": Prompt, "prefix": Prefix}


def build(
    config: GPTConfig, rng: np.random.Generator | None = None, dtype: type = np.float32,
    ops: ModuleType | None = None,
) -> GPT:  # fmt: skip
    """The model that a configuration describes; the arguments are those of GPT."""
    cls = GPT1 if config.post_norm else GPT
    return (_joined(Score, cls) if config.num_labels else cls)(config, rng, dtype, ops)


@functools.cache
def _joined(variant: type[GPT], cls: type[GPT]) -> type[GPT]:
    return type(f"{variant.__name__}{cls.__name__}", (variant, cls), {})


def beside(model: GPT, config: AdapterConfig) -> Adapted:
    """The model with a new adapter, whose weights are zero, as a view: the model itself stays as it is.

    Raises UserError for a config that does not fit.
    """
    if isinstance(model, Adapted):
        raise UserError("the model has an adapter already: give its base")
    adapter = Adapter(config, model.config, model.flat.dtype)
    other = copy.copy(model)  # a shallow copy: both models have the same arrays
    other.__class__ = _joined(ADAPTERS[config.kind], type(model))
    other.base, other.adapter, other.prefix = model, adapter, config.prompt_length
    other.params = model.params | {name: p for name, p in adapter.params.items() if name in model.params}
    return other


def create(model: GPT, config: AdapterConfig, rng: np.random.Generator) -> Adapted:
    """The model with a new adapter, ready to be trained. Raises UserError for a config that does not fit."""
    other = beside(model, config)
    other.initialise(rng)
    return other
