"""What all adapters share: a few weights beside a model that stays as it is."""

import numpy as np

from ..config import AdapterConfig, GPTConfig
from ..model import GPT
from ..storage import Parameters


class Adapter(Parameters):
    """An adapter's weights, at first zero."""

    def __init__(self, config: AdapterConfig, base: GPTConfig, dtype: type = np.float32) -> None:
        super().__init__(config.shapes(base), dtype)
        self.config, self.layers = config, config.encoder(base)


class Adapted(GPT):
    """A view of the model `base`, with the weights of `adapter` beside its own: only those are trained."""

    base: GPT
    adapter: Adapter

    def copy(self) -> GPT:
        return self.base.copy()

    @property
    def trained(self) -> Parameters:
        return self.adapter
