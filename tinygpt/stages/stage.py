"""What all training stages share. A stage is an object with batches, a computation, an evaluation and
settings.

A subclass says how the stage differs from next-token prediction:

    Settings   what a run depends on, apart from its tokenizer
    read       the data that the settings name
    start      the model, the tokenizer and the settings that a new run begins with
    update     the batches of an update
    compute    the gradients of an update; by default those of next-token prediction
    evaluate   what is measured now and then

`train` trains, in memory if nobody hands in `save`. A stage knows no folder: `Store` gives it what older runs
have saved, and `folders.runs` saves it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..core import train
from ..core.config import GPTConfig
from ..core.model import GPT
from ..core.optim import AdamW
from ..core.option import check_options, option
from ..errors import UserError
from ..text.data import Tokenizer
from ..text.examples import Notes
from . import lora, variants
from .adapter import LEARNING_RATES, AdapterConfig, fingerprint

MOST_TOKENS = 10**9  # in a batch: no memory holds more


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run depends on, apart from its tokenizer: saved with it, and all that resuming needs."""

    model: GPTConfig
    train: train.TrainConfig
    stage: str = ""  # the command that goes on with it
    data: tuple[str, ...] = ()  # files and folders
    fingerprint: str = ""  # of what is made from them
    init_from: str = ""  # the folder of the model that it began with
    init_hash: str = ""  # of the weights there, as they were
    adapter: AdapterConfig | None = None  # what is trained beside that model, if not itself
    block_size: int = option(64, "[1, inf)")  # of the training sequences: at most the model's
    batch_size: int = option(12, "[1, inf)", "Sequences at a time.")
    gradient_accumulation_steps: int = option(1, "[1, inf)", "Batches an update.")

    def __post_init__(self) -> None:
        check_options(self)
        limit, beside = self.model.block_size, ""
        if self.adapter:
            self.adapter.shapes(self.model)  # which says what does not fit
            if P := self.adapter.prompt_length:
                limit, beside = limit - P, f" beside a prompt of {P}"
        if self.block_size > limit:
            raise UserError(f"block_size is {self.block_size}: the model has only {limit} positions{beside}")
        if self.train.merge_every and not (self.adapter and self.adapter.kind == "lora"):
            raise UserError("merge_every is for an adapter that can be merged, which is lora")
        if self.batch_size * self.block_size > MOST_TOKENS:
            raise UserError(
                f"batch_size is {self.batch_size}: with block_size {self.block_size} it must be at most "
                f"{MOST_TOKENS // self.block_size}; gradient_accumulation_steps adds up small batches"
            )

    @property
    def paths(self) -> list[str]:
        """The paths of all data."""
        fields = (value for name, value in vars(self).items() if name == "data" or name.endswith("_data"))
        return list(dict.fromkeys(path for paths in fields for path in paths))

    @property
    def size(self) -> int:
        """The number of weights that are trained."""
        if not self.adapter:
            return self.model.size
        return sum(map(math.prod, self.adapter.shapes(self.model).values()))

    @property
    def has_model(self) -> bool:
        """Whether the run's folder has a whole model: also where it trains an adapter beside weights that are
        nowhere else, drawn from the seed or merged. Otherwise it has the adapter alone."""
        return bool(not self.adapter or self.train.merge_every or not self.init_from)

    @property
    def has_base(self) -> bool:
        """Whether the run's own file has the weights of the model too, beside those of its adapter."""
        return bool(self.adapter) and self.has_model


class Store(NamedTuple):
    """What older runs have saved, for stages that begin with it. Each raises UserError where it is not
    there."""

    model: Callable[..., tuple[GPT, Tokenizer]]  # of a folder, and perhaps of an adapter's folder
    base: Callable[[Settings], GPT]  # the model that a run began with, unchanged
    judge: Callable[[str], object]  # the reward.Judge in a folder


class Stage:
    """A training stage, ready to go on from update `optimizer.steps`."""

    name, out = "", ""  # of its command; the folder, if that has another name
    Settings = Settings
    sizes: tuple[str, ...] = ()  # fields of the model's config that are options
    unused: tuple[str, ...] = ()  # options of the settings' parts that have no meaning here
    defaults: dict[str, object] = {}  # of options, where they are not those of the dataclasses
    most_tokens = 1 << 30  # the default of block_size, where the model has as many positions
    needs: tuple[str, ...] = ()  # fields of the settings that name folders which must stay as they are

    def __init__(
        self, settings: Settings, optimizer: AdamW, tokenizer: Tokenizer, data=None, scratch=None
    ) -> None:
        """data: what `read` gave. scratch: a folder for files that can be made again, or None.

        A subclass makes its data ready, and adds to the notes of `read` which examples it leaves out.
        """
        self.settings, self.optimizer, self.tokenizer = settings, optimizer, tokenizer
        self.notes = getattr(data, "notes", None) or Notes()
        self.model, self.compute = optimizer.model, train.gradients(optimizer)
        for model in (self.model, *self.others(data)):
            model.compute_in(settings.train.dtype)

    def others(self, data) -> Iterable[GPT]:
        """The models in `data` that compute beside the one that is trained."""
        return ()

    @classmethod
    def recipe(cls, options: dict) -> dict[str, object]:
        """Defaults of options that depend on where the data or the model come from."""
        return {}

    @classmethod
    def complete(
        cls, options: dict, given: set[str], model: GPTConfig, adapter: AdapterConfig | None
    ) -> None:
        """Puts in the defaults that depend on other options, of which the user has `given` some, and on the
        model and the adapter."""
        if adapter and "learning_rate" not in given:
            options["learning_rate"] = LEARNING_RATES[adapter.kind]
        if options["min_lr"] is None:
            options["min_lr"] = options["learning_rate"] / 10
        if options.get("block_size") is None:
            room = model.block_size - (adapter.prompt_length if adapter else 0)
            options["block_size"] = max(1, min(cls.most_tokens, room))

    def about(self) -> str:
        """What the data are, for the line that the command prints before it trains."""
        return ""

    def depends_on(self, mark: str) -> None:
        """Takes down the hash of all that the updates depend on, apart from the settings. Raises UserError
        where the run began with other data."""
        if self.settings.fingerprint not in ("", mark):
            source = ", ".join(self.settings.paths) or "the documentation of this Python"
            raise UserError(f"{source}: not the data that this run began with; it needs that")
        self.settings = dataclasses.replace(self.settings, fingerprint=mark)

    @classmethod
    def of(cls, settings: Settings) -> type[Stage]:
        """The stage itself, or the variant that the settings ask for."""
        return cls

    @classmethod
    def read(cls, settings: Settings, store: Store) -> object:
        """The data that the settings name, before the tokenizer has seen it."""

    @classmethod
    def start(cls, settings: Settings, data, store: Store) -> tuple[Settings, GPT, Tokenizer]:
        """What a new run begins with: the model in settings.init_from, perhaps with a new adapter. Of
        settings.model only the dropout is taken."""
        model, tokenizer = store.model(settings.init_from)
        settings, model = cls.adapted(settings, model)
        return settings, model, tokenizer

    @staticmethod
    def adapted(settings: Settings, model: GPT) -> tuple[Settings, GPT]:
        """The settings of a run that begins with this model, and the model with the adapter of the
        settings."""
        config = dataclasses.replace(model.config, dropout=settings.model.dropout)
        mark = fingerprint(model) if settings.init_from else ""
        model.config, settings = config, dataclasses.replace(settings, model=config, init_hash=mark)
        if settings.adapter:
            rng = np.random.default_rng([settings.train.seed, 0, 3])
            model = variants.create(model, settings.adapter, rng)
        return settings, model

    def batches(self, n: int, rng: np.random.Generator) -> Sequence:
        """The batches of update n, before which it may be time to merge an adapter (ReLoRA)."""
        every = self.settings.train.merge_every
        if every and n and n % every == 0:
            lora.restart(self.optimizer, np.random.default_rng([self.settings.train.seed, n, 3]))
        return self.update(n, rng)

    def update(self, n: int, rng: np.random.Generator) -> Sequence:
        """The batches of update n; rng is of this update alone."""
        raise NotImplementedError

    def evaluate(self) -> train.Record:
        return {}

    def train(self, report: Callable[[train.Record], None] = lambda record: None, **saving) -> None:
        """Trains to the end. `report` gets the record of each update; saving: `save` and `elapsed_s` of
        `core.train.train`."""
        train.train(
            self.optimizer, self.batches, self.settings.train, compute=self.compute, evaluate=self.evaluate,
            report=report, **saving,
        )  # fmt: skip
