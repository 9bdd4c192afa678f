"""Instruction tuning (supervised fine-tuning): predict the assistant's tokens from all tokens before them.

    loss = sum of -log p(token) over the learned tokens of an update / their number

The number is that of the whole update, all its batches together: n small batches equal one large batch.
Examples lie side by side in rows (`data.pack`) and do not see one another. All weights are trained, or an
adapter instead.

The seed decides which tenth of the examples is for validation, which examples share a row, and the order of
the rows in each epoch. The epochs make one endless sequence of rows. Update n takes the rows after those of
update n - 1, so a run that was interrupted continues with the same rows.

Not here: how an example becomes text (`instructions`), the loop (`train`), the folder (`runs`).

References: Ouyang et al. 2022, "Training language models to follow instructions with human feedback", section
3.5; Krell et al. 2021, "Efficient sequence packing without cross-contamination", section 3.2.
"""

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ..core import train
from ..core.config import GPTConfig
from ..core.model import GPT
from ..core.option import option, written
from ..errors import UserError
from ..text import data, examples, instructions
from ..text.data import Array, Batch, Tokenizer, permuted
from ..text.examples import Example, LeftOutError, Notes
from ..text.instructions import Message
from ..world import corpus, tasks
from . import recipes, stage
from .adapter import AdapterConfig
from .stage import FORMS, Stage, Store, files, folder


@dataclasses.dataclass(frozen=True)
class Settings(stage.Settings):
    """The settings of every run, and those of this stage. A batch: batch_size rows of block_size tokens."""

    stage: str = "sft"
    init_from: str = folder(help="The model to tune, tinygpt's or GPT-2's, with an end-of-text token.",
                            missing="the model to tune")  # fmt: skip
    data: tuple[str, ...] = files(missing="the examples", help=FORMS.format(
        examples.USUAL[1], "the examples of the base's world, or of a folder of tinygpt world. "
        f"Defaults then: {written(recipes.SFT)}."))  # fmt: skip
    val_data: tuple[str, ...] = files(help="Examples to evaluate on, like --data.", shown="a tenth of --data")
    packing: bool = option(True, help="A row for each example, instead of several examples in a row.")
    block_size: int = option(256, "[1, inf)", "Tokens of a row; longer examples are left out.",
                             shown="256, or the model's if less")  # fmt: skip
    batch_size: int = option(8, "[1, inf)", "Rows of a batch.")
    adapter_folder: str = folder(help="Train the adapter there further, instead of a new --adapter.",
                                 alone=("adapter",))  # fmt: skip


def learning_rate(config: GPTConfig) -> float:
    """A peak for tuning all weights of a model: 5e-4 at a million weights, less by the root of their number.

    For GPT-2's 124 million it is 4.5e-5; GPT-1's 117 million were tuned at 6.25e-5 (Radford et al. 2018,
    section 4.1).
    """
    return float(f"{min(1e-3, 5e-4 * math.sqrt(1e6 / config.size)):.1e}")


class Examples(NamedTuple):
    """The data of this stage."""

    train: list[Example]
    val: list[Example]  # empty: a tenth of `train` is for validation
    before: dict[str, Array] | None = None  # the weights at the beginning of the run, if they are there
    notes: Notes | None = None


class SFT(Stage):
    """Tune a model to follow instructions: train it on prompts and their completions.

    The loss is that of the completions and of the end-of-text token after each. Ctrl-C saves, --resume
    continues. `tinygpt chat` talks with the result.
    """

    name, Settings = "sft", Settings
    sizes, unused, most_tokens = ("dropout",), ("merge_every",), 256
    rate = "5e-4 at a million weights, less by the root of their number; an adapter's"
    defaults = {"max_iters": 200, "learning_rate": rate, "warmup_iters": 10, "eval_interval": 50}

    def prepare(self, data: Examples) -> None:
        """Raises UserError, with file and line, for a wrong example, and where there are too few examples."""
        settings, tokenizer, self.before = self.settings, self.tokenizer, data.before
        instructions.prompt(tokenizer, "")  # so that an error of the tokenizer does not name an example
        encoded = permuted(fitting(tokenizer, data.train, settings, self.notes), settings.train.seed)
        val = fitting(tokenizer, data.val, settings, self.notes)
        if settings.data and not data.val:  # in memory nothing is evaluated
            if len(encoded) < 2:
                reason = f"one is to train on, one to validate on. {self.notes}"
                raise UserError(f"{settings.data[0]}: one example is too few: {reason}")
            n = max(1, len(encoded) // 10)
            val, encoded = encoded[:n], encoded[n:]
        self.rows, self.val_rows = (_packed(part, settings) for part in (encoded, val))
        self.example_count, self.questions = len(encoded), [example for example, _ in val]
        digest = hashlib.sha256()
        for array in (array for _, pair in encoded + val for array in pair):
            digest.update(array)
        self.depends_on(digest.hexdigest())

    @classmethod
    def read(cls, settings: Settings, store: Store) -> Examples:
        before, notes = None, Notes()
        if not settings.adapter and not settings.adapter_folder:
            with contextlib.suppress(UserError, OSError):
                before = store.base(settings).params
        train = read_examples(settings.data, "sft", notes)
        return Examples(train, read_examples(settings.val_data, "val", notes), before, notes)

    @classmethod
    def start(cls, settings: Settings, data: Examples, store: Store) -> tuple[Settings, GPT, Tokenizer]:
        if settings.adapter_folder:
            model, tokenizer = store.model(settings.init_from, settings.adapter_folder)
            settings, base = cls.adapted(dataclasses.replace(settings, adapter=None), model.base)
            model.config = base.config
            settings = dataclasses.replace(settings, adapter=model.adapter.config)
        else:
            settings, model, tokenizer = super().start(settings, data, store)
        tokenizer.chat_template = instructions.TEMPLATE
        return settings, model, tokenizer

    @classmethod
    def recipe(cls, options: dict) -> dict[str, object]:
        if not any(map(corpus.is_source, options["data"])):
            return {}
        val = {"val_data": tuple(filter(corpus.is_source, options["data"]))}
        has_adapter = options["adapter"] or options["adapter_folder"]  # which has its own learning rate
        return val | {k: v for k, v in recipes.SFT.items() if not has_adapter or k != "learning_rate"}

    @classmethod
    def complete(cls, options: dict, written: set[str], model: GPTConfig, adapter: AdapterConfig | None):
        if options["learning_rate"] is None:
            options["learning_rate"] = learning_rate(model)
        super().complete(options, written, model, adapter)

    def about(self) -> str:
        (R, T), learned = self.rows.ids.shape, int(self.rows.weights.sum())
        line = f"; {self.example_count:,} examples in {R:,} rows of {T}, {learned:,} tokens of them "
        return line + f"learned; {len(self.questions):,} examples to evaluate on"

    def update(self, n: int, rng: np.random.Generator) -> list[train.Batch]:
        return update(self.rows, self.settings, n)

    def evaluate(self) -> train.Record:
        """The mean loss over all learned tokens of the validation examples, and the change of all weights
        since the beginning. The change needs the first model."""
        if not self.questions:
            return {}
        rows = consecutive(self.val_rows, self.settings.batch_size)
        record = {"val_loss": train.mean_loss(self.model, rows, self.optimizer.group)}
        if self.before is not None:
            record["weight_change"], _ = train.weight_change(self.before, self.model.params)
        return record


def in_memory(
    model: GPT, tokenizer: Tokenizer, examples: Iterable[list[Message]], settings: Settings
) -> SFT:
    """The stage for a model in memory; `train` changes the weights of the model or of its adapter.

    No example is for validation. Raises UserError for an example that is longer than a row.
    """
    numbered = [Example(f"example:{n}", messages) for n, messages in enumerate(examples)]
    tokenizer.chat_template = instructions.TEMPLATE
    sft = SFT(settings, settings.train.optimizer(model), tokenizer, Examples(numbered, [], notes=Notes()))
    if sft.notes:
        raise UserError(str(sft.notes))
    return sft


# --- examples and batches -----------------------------------------------------------------------------------

Encoded = tuple[Example, tuple[Array, Array]]  # an example, its ids, and which ids are learned


def fitting(
    tokenizer: Tokenizer, examples: Iterable[Example], settings: Settings, notes: Notes
) -> list[Encoded]:
    """The examples that fit a row. The others are noted."""

    def encoded(example: Example) -> Encoded:
        ids, learned = instructions.encode(tokenizer, example.messages)
        if len(ids) > settings.block_size + 1:
            raise LeftOutError(f"as longer than the block size, {settings.block_size} tokens")
        return example, (ids, learned)

    return notes.keep(((example.where, example) for example in examples), encoded)


def _packed(encoded: list[Encoded], settings: Settings) -> Batch:
    pairs = [pair for _, pair in encoded]
    groups = [pairs] if settings.packing else [[pair] for pair in pairs]
    rows = [data.pack(group, settings.block_size) for group in groups]
    return Batch(*map(np.concatenate, zip(*rows, strict=True)))


def read_examples(paths: Iterable[str], split: str, notes: Notes | None = None, **which) -> list[Example]:
    """The examples of files, and those of worlds for a split. which: for `tasks.tuning`."""
    together = []
    for path in paths:
        if not corpus.is_source(path):
            together += examples.read([path], examples.EXAMPLE, notes)
            continue
        world = corpus.world_of(path)
        for n, messages in enumerate(tasks.conversations(world, tasks.tuning(world, split, **which)), 1):
            together.append(Example(f"{path}:{n}", messages))
    return together


def update(rows: Batch, settings: Settings, n: int) -> list[train.Batch]:
    """The batches of update n: rows in a new order for each epoch, weights that sum to 1.

    Where there are fewer rows than batch_size, a batch has each row once.
    """
    R, A = len(rows.ids), settings.gradient_accumulation_steps
    B = min(settings.batch_size, R)
    places = data.shuffled_places(R, A * B, n, settings.train.seed)
    batches = [_batch(rows, places[i : i + B]) for i in range(0, A * B, B)]
    learned = max(1, sum(int(batch.weights.sum()) for batch in batches))
    return [batch._replace(weights=batch.weights / np.float32(learned)) for batch in batches]


def consecutive(rows: Batch, count: int) -> Iterator[train.Batch]:
    """All rows, up to `count` in a batch; each learned token has weight 1."""
    for i in range(0, len(rows.ids), count):
        yield _batch(rows, np.arange(i, min(i + count, len(rows.ids))))


def _batch(rows: Batch, places: Array) -> train.Batch:
    """The rows at `places`, cut after the last learned token of these rows. No result depends on the rest.

    The length is rounded up to a multiple of 32, but not beyond the length of the rows. So batches have few
    shapes, and `replay` records the operations once for each shape.
    """
    T = int(np.flatnonzero(rows.weights[places].any(0)).max(initial=0)) + 1
    return train.Batch(*(part[places, : -(-T // 32) * 32] for part in rows))
