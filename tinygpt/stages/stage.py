"""The common part of all training stages. A stage is an object with batches, a computation, an evaluation
and settings.

A subclass has:

    Settings   all that a run depends on, except its tokenizer
    read       the data that the settings name
    start      the model, the tokenizer and the settings of a new run
    prepare    the data, ready for updates
    update     the batches of an update
    compute    the gradients of an update; by default those of next-token prediction
    evaluate   the numbers of an evaluation

`train` trains, in memory if the caller gives no `save`. A stage neither loads nor saves a model: `Store`
loads the models of older runs, and `folders.runs` saves the stage.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
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

MOST_TOKENS = 10**9  # of a batch: no memory holds more
MOST_PASSES = 3  # through comparisons: with more passes a model would learn a small file by heart
folder = partial(option, "", metavar="FOLDER")  # an option that names a folder
files = partial(option, (), metavar="FILE")  # an option that names files
FORMS = "JSON Lines: {}, or another form of demos/formats.md; repeat. world: {}"  # help of such an option


def names_data(field: str) -> bool:
    """Whether a field of `Settings` has paths of data."""
    return field == "data" or field.endswith("_data")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that a run depends on, except its tokenizer. The file of the run has both."""

    model: GPTConfig
    train: train.TrainConfig
    stage: str = ""  # the command that continues the run
    data: tuple[str, ...] = ()  # files and folders
    fingerprint: str = ""  # of the prepared data
    init_from: str = ""  # the folder of the model at the beginning
    init_hash: str = ""  # of that model's weights at the beginning
    adapter: AdapterConfig | None = None  # trained instead of the model; None: the model is trained
    block_size: int = option(64, "[1, inf)")  # of the training sequences: at most the model's
    batch_size: int = option(12, "[1, inf)", "Sequences of a batch.")
    gradient_accumulation_steps: int = option(1, "[1, inf)", "Batches of an update.")

    def __post_init__(self) -> None:
        check_options(self)
        limit, beside = room(self.model, self.adapter), ""
        if self.adapter:
            self.adapter.shapes(self.model)  # raises UserError where the adapter does not fit the model
            beside = f" beside a prompt of {P}" if (P := self.adapter.prompt_length) else ""
        if self.block_size > limit:
            raise UserError(f"block_size is {self.block_size}: the model has only {limit} positions{beside}")
        if self.train.merge_every and not (self.adapter and self.adapter.kind == "lora"):
            raise UserError("merge_every is for an adapter that can be merged, which is lora")
        if self.batch_size > (most := MOST_TOKENS // self.block_size):
            rule = f"at most {most}; gradient_accumulation_steps adds up small batches"
            raise UserError(f"batch_size is {self.batch_size}: with this block_size it must be {rule}")

    @property
    def size(self) -> int:
        """The number of weights that are trained."""
        shapes = self.adapter.shapes(self.model).values() if self.adapter else ()
        return sum(map(math.prod, shapes)) or self.model.size

    @property
    def has_model(self) -> bool:
        """Whether the run's folder has a whole model, and not an adapter alone.

        Where an adapter is trained, the folder has a model if the weights of the base are nowhere else: they
        were drawn from the seed, or are merged.
        """
        return bool(not self.adapter or self.train.merge_every or not self.init_from)

    @property
    def has_base(self) -> bool:
        """Whether the run's own file has the weights of the model, beside those of its adapter."""
        return bool(self.adapter) and self.has_model


def room(model: GPTConfig, adapter: AdapterConfig | None) -> int:
    """The positions that a model with an adapter has for a text."""
    return model.block_size - (adapter.prompt_length if adapter else 0)


class Store(NamedTuple):
    """Reads models of older runs, for stages that begin with them. Each function raises UserError where there
    is no such model."""

    model: Callable[..., tuple[GPT, Tokenizer]]  # of a folder, and perhaps of an adapter's folder
    base: Callable[[Settings], GPT]  # the model at the beginning of a run, unchanged
    judge: Callable[[str], object]  # the reward.Judge in a folder


class Stage:
    """A training stage, ready for update `optimizer.steps`."""

    name, out = "", ""  # of its command; the folder, if that has another name
    Settings = Settings
    sizes: tuple[str, ...] = ()  # fields of the model's config that are options
    unused: tuple[str, ...] = ()  # options of the settings' parts that have no meaning here
    defaults: dict[str, object] = {}  # of options, where they differ from those of the dataclasses
    most_tokens = 1 << 30  # the default of block_size, where the model has as many positions
    most_updates = 0  # the default of max_iters; fewer, if `MOST_PASSES` passes through the data need fewer
    needs: tuple[str, ...] = ()  # fields of the settings that name folders which must stay unchanged

    def __init__(
        self, settings: Settings, optimizer: AdamW, tokenizer: Tokenizer, data=None, folder=None
    ) -> None:
        """data: the result of `read`. folder: of the run, or None."""
        self.settings, self.optimizer, self.tokenizer, self.folder = settings, optimizer, tokenizer, folder
        notes = getattr(data, "notes", None)
        self.notes = Notes() if notes is None else notes
        self.model, self.compute = optimizer.model, train.gradients(optimizer)
        for model in (self.model, *self.others(data)):
            model.compute_in(settings.train.dtype)
        self.prepare(data)

    def prepare(self, data) -> None:
        """Makes the result of `read` ready for updates. Notes which examples are left out."""

    def others(self, data) -> Iterable[GPT]:
        """The models in `data` that compute, and are not trained."""
        return ()

    @classmethod
    def recipe(cls, options: dict) -> dict[str, object]:
        """Defaults of options that depend on the source of the data or of the model."""
        return {}

    @classmethod
    def complete(cls, options: dict, written: set[str], model: GPTConfig, adapter: AdapterConfig | None):
        """Puts in the defaults that depend on other options, on the model and on the adapter.

        written: the options that the user wrote.
        """
        if options["max_iters"] is None:
            count, most = cls.count(options), cls.most_updates
            each = options["batch_size"] * options.get("gradient_accumulation_steps", 1)
            options["max_iters"] = most if count is None else min(most, -(-MOST_PASSES * count // each))
            if "warmup_iters" not in written:
                options["warmup_iters"] = min(options["warmup_iters"], options["max_iters"] // 25)
        if adapter and "learning_rate" not in written:
            options["learning_rate"] = LEARNING_RATES[adapter.kind]
        if options["min_lr"] is None:
            options["min_lr"] = options["learning_rate"] / 10
        if options.get("block_size") is None:
            options["block_size"] = max(1, min(cls.most_tokens, room(model, adapter)))

    @classmethod
    def count(cls, options: dict) -> int | None:
        """The number of examples. None: the number does not limit the updates."""

    def about(self) -> str:
        """The size of the data, for the line that the command prints before it trains."""
        return ""

    def depends_on(self, mark: str) -> None:
        """Stores the hash of all data. Raises UserError where the run began with other data."""
        if self.settings.fingerprint not in ("", mark):
            fields = (value for name, value in vars(self.settings).items() if names_data(name))
            paths = dict.fromkeys(path for paths in fields for path in paths)
            source = ", ".join(paths) or "the documentation of this Python"
            raise UserError(f"{source}: not the data that this run began with: give that data as --data")
        self.settings = dataclasses.replace(self.settings, fingerprint=mark)

    @classmethod
    def read(cls, settings: Settings, store: Store) -> object:
        """The data that the settings name, before any tokenizer."""

    @classmethod
    def start(cls, settings: Settings, data, store: Store) -> tuple[Settings, GPT, Tokenizer]:
        """The beginning of a new run: the model in settings.init_from, perhaps with a new adapter. Of
        settings.model only the dropout is used."""
        model, tokenizer = store.model(settings.init_from)
        return *cls.adapted(settings, model), tokenizer

    @staticmethod
    def adapted(settings: Settings, model: GPT) -> tuple[Settings, GPT]:
        """The settings of a run that begins with this model, and the model with the adapter of the
        settings."""
        model.config = dataclasses.replace(model.config, dropout=settings.model.dropout)
        mark = fingerprint(model) if settings.init_from else ""
        if settings.adapter:
            rng = np.random.default_rng([settings.train.seed, 0, 3])
            model = variants.create(model, settings.adapter, rng)
        return dataclasses.replace(settings, model=model.config, init_hash=mark), model

    def batches(self, n: int, rng: np.random.Generator) -> Sequence:
        """The batches of update n. Before some updates an adapter is merged (ReLoRA)."""
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
        """Trains to the end. `report` gets the record of each update. saving: `save` and `elapsed_s` of
        `core.train.train`."""
        how = {"compute": self.compute, "evaluate": self.evaluate, "report": report}
        train.train(self.optimizer, self.batches, self.settings.train, **how, **saving)
