"""The sizes of a model, and the names and shapes of its parameters.

Names and layout are those of GPT-2 at Hugging Face: weights are (in, out).
"""

from __future__ import annotations

import dataclasses

from ..errors import UserError
from .option import check_options, option

_NEW = ("init_from",)  # with --init-from the sizes are those of that model
DTYPES = ("float32", "bfloat16")  # of the operands of linear maps, see GPT.compute_in
MOST_LAYERS, MOST_WEIGHTS = 1000, 10**11  # more is a mistake: it is refused before it takes memory or time


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The sizes of a model, under nanoGPT's names. Raises UserError for sizes that do not fit together."""

    vocab_size: int = option(50257, "[1, inf)")
    block_size: int = option(1024, "[1, inf)")  # the longest sequence: GPT-2's n_positions
    n_layer: int = option(12, f"[1, {MOST_LAYERS}]", "Blocks.", shown="nano: 4", alone=_NEW)
    n_head: int = option(12, "[1, inf)", "Heads; divides --n-embd.", shown="nano: 4", alone=_NEW)
    n_embd: int = option(768, "[1, inf)", "Channels.", shown="nano: 128", alone=_NEW)
    dropout: float = option(0.0, "[0, 1)", "Of embeddings and branches. Helps where there is little data.")
    post_norm: bool = option(False, help="GPT-1's blocks instead of GPT-2's.", alone=_NEW)
    layer_norm_epsilon: float = option(1e-5, "(0, 1)")
    num_labels: int = 0  # the number of scores of a text, in place of logits of the next token

    def __post_init__(self) -> None:
        check_options(self)
        if self.n_embd % self.n_head:
            raise UserError(f"n_head {self.n_head} does not divide n_embd {self.n_embd}: heads have one size")
        if self.size > MOST_WEIGHTS:
            fields = ("vocab_size", "block_size", "n_layer", "n_embd")
            sizes = ", ".join(f"{field} {getattr(self, field)}" for field in fields)
            raise UserError(f"{sizes}: these make more than {MOST_WEIGHTS:,} weights; choose smaller sizes")

    @property
    def size(self) -> int:
        """The number of weights: C (12 C + 13) in a layer, 2 C in ln_f, and the tables."""
        C, tables = self.n_embd, self.vocab_size + self.block_size + self.num_labels
        return C * (tables + self.n_layer * (12 * C + 13) + 2 * (not self.post_norm))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter by name: matrices, which weight decay shrinks, before vectors."""
        C = self.n_embd
        weights = {"ln_1": (C,), "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C),
                   "ln_2": (C,), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}  # fmt: skip
        shapes = {"wte.weight": (self.vocab_size, C), "wpe.weight": (self.block_size, C)}
        for layer in range(self.n_layer):
            for name, shape in weights.items():
                shapes |= {f"h.{layer}.{name}.weight": shape, f"h.{layer}.{name}.bias": shape[-1:]}
        if not self.post_norm:
            shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
        if self.num_labels:
            shapes |= {"score.weight": (self.num_labels, C)}
        return dict(sorted(shapes.items(), key=lambda item: len(item[1]) == 1))  # a stable sort


PROJECTIONS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # the linear maps of a block


PRESETS = {
    "nano": GPTConfig(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128),
    "small": GPTConfig(vocab_size=1024, block_size=128, n_layer=4, n_head=4, n_embd=256),
    "baby": GPTConfig(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384),
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}
