"""The common part of all adapters: a few weights beside a model that stays as it is.

`lora` and `prompts` are the adapters; `variants` puts them on a model.
"""

import dataclasses
import hashlib
import math

import numpy as np

from ..core.config import MOST_WEIGHTS, PROJECTIONS, GPTConfig
from ..core.memory import Parameters
from ..core.model import GPT
from ..core.option import check_options, option
from ..errors import UserError

LEARNING_RATES = {"lora": 1e-3, "ptuning": 1e-3, "prompt": 1e-2, "prefix": 1e-2}  # the default peaks
KINDS = tuple(LEARNING_RATES)
_LORA, _PROMPT = {"adapter": KINDS[:1]}, {"adapter": KINDS[1:]}  # the kinds that have an option


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The kind and the sizes of an adapter. Raises UserError for sizes that make no adapter."""

    kind: str = option("lora", KINDS, "Train a few weights beside the model, which stays as it is.",
                       name="adapter", shown="none")  # fmt: skip
    rank: int = option(8, "[1, inf)", "Rank of each low-rank branch.", name="lora_rank", only=_LORA)
    alpha: float = option(8.0, "(0, inf)", "A branch counts alpha / rank.", name="lora_alpha", only=_LORA,
                          shown="the rank")  # fmt: skip
    dropout: float = option(0.0, "[0, 1)", "Dropout of the branches' input.", name="lora_dropout", only=_LORA)
    targets: tuple[str, ...] = option(
        PROJECTIONS, help="Maps with a branch, such as c_attn or h.0.mlp.c_proj; repeat.",
        name="lora_targets", metavar="NAME", only=_LORA, shown="all",
    )  # fmt: skip
    full: bool = False  # LoRA: train copies of all parameters without a branch, as ReLoRA does
    num_virtual_tokens: int = option(20, "[1, inf)", "Length of a learned prompt.", only=_PROMPT)
    hidden: int = option(0, "[0, inf)", "Channels of the MLP that makes the prompt; 0: no MLP.", only=_PROMPT,
                         name="encoder_hidden", shown="ptuning: those of the model; prefix: 0")  # fmt: skip
    init: str = option("vocab", ("vocab", "random"), "First rows of a prompt without an MLP.",
                       name="prompt_init", only=_PROMPT)  # fmt: skip

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def prompt_length(self) -> int:
        """The positions that the adapter takes."""
        return 0 if self.kind == "lora" else self.num_virtual_tokens

    def encoder(self, base: GPTConfig) -> dict[str, tuple[int, int]]:
        """The layers, (in, out), of the MLP that makes the prompt, under PEFT's names."""
        C, H = base.n_embd, self.hidden
        if H and self.kind == "ptuning":
            return {"mlp_head.0": (C, H), "mlp_head.2": (H, H), "mlp_head.4": (H, C)}
        if H and self.kind == "prefix":
            return {"transform.0": (C, H), "transform.2": (H, 2 * base.n_layer * C)}
        return {}

    def shapes(self, base: GPTConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter beside a model like `base`, matrices first. Raises UserError for
        a target that matches nothing, and for a prompt that leaves no position."""
        shapes = self._lora_shapes(base) if self.kind == "lora" else self._prompt_shapes(base)
        if sum(map(math.prod, shapes.values())) > MOST_WEIGHTS:
            raise UserError(f"adapter: has more than {MOST_WEIGHTS:,} weights; choose smaller sizes")
        return dict(sorted(shapes.items(), key=lambda item: len(item[1]) == 1))

    def _prompt_shapes(self, base: GPTConfig) -> dict[str, tuple[int, ...]]:
        if (P := self.num_virtual_tokens) >= (limit := base.block_size):
            raise UserError(f"adapter: num_virtual_tokens is {P}: the model has {limit} positions")
        layers = self.encoder(base)
        width = base.n_embd * (2 * base.n_layer if self.kind == "prefix" and not layers else 1)
        shapes = {"embedding.weight": (P, width)}
        for name, shape in layers.items():
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[1:]}
        return shapes

    def _lora_shapes(self, base: GPTConfig) -> dict[str, tuple[int, ...]]:
        shapes, missed = {}, set(self.targets)
        for name, shape in base.shapes().items():
            module = name.removesuffix(".weight")
            matches = {t for t in self.targets if f".{module}".endswith(f".{t}")}
            if matches and module.endswith(PROJECTIONS):
                shapes[f"{module}.lora_A"] = (self.rank, shape[0])  # transposed in memory: A^T
                shapes[f"{module}.lora_B"] = (self.rank, shape[1])
                missed -= matches
            elif self.full:
                shapes[name] = shape
        if missed or not self.targets:
            names = ", ".join(PROJECTIONS)
            raise UserError(f"adapter: the target {min(missed, default='')!r} is no linear map: {names} are")
        return shapes


def fingerprint(model: GPT) -> str:
    """The SHA-256 of a model's own weights, without its adapter."""
    return hashlib.sha256(model.flat).hexdigest()


class Adapter(Parameters):
    """An adapter's weights, at first zero."""

    def __init__(self, config: AdapterConfig, base: GPTConfig, dtype: type = np.float32) -> None:
        super().__init__(config.shapes(base), dtype)
        self.config, self.layers = config, config.encoder(base)


class Adapted(GPT):
    """A view of the model `base`, with the weights of `adapter` beside those of `base`. Only the weights of
    the adapter are trained."""

    base: GPT
    adapter: Adapter

    def copy(self) -> GPT:
        raise UserError("a model with an adapter is a view: copy its base, or merge the adapter")

    @property
    def trained(self) -> Parameters:
        return self.adapter

    def initialise(self, rng: np.random.Generator) -> None:
        """Draws the first weights of the adapter."""
        raise NotImplementedError

    def merge(self) -> GPT:
        """A new model with the adapter in its weights. Raises UserError where that cannot be."""
        kind = self.adapter.config.kind
        raise UserError(f"an adapter of kind {kind} cannot be merged: only lora changes weights")
