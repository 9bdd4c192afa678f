"""Instruction tuning (supervised fine-tuning): predict the assistant's tokens, given all that comes before.

    loss = sum of -log p(token) over the learned tokens of an update / their number

The number is that of the whole update, all its batches together: n small batches are one large batch.
Examples lie side by side in rows (`data.pack`) and do not see one another. All weights are trained, or an
adapter beside them.

The seed decides which tenth of the examples is for validation, who shares a row, and in which order the rows
come in each epoch. Update n takes the next rows of that endless sequence after those of update n - 1, so a
run that was interrupted goes on with the very rows it would have had.

Not here: how an example is written down (`instructions`), the loop (`train`), the folder (`runs`).

References: Ouyang et al. 2022, "Training language models to follow instructions with human feedback", section
3.5; Krell et al. 2021, "Efficient sequence packing without cross-contamination", section 3.2.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..core import train
from ..core.config import GPTConfig
from ..core.model import GPT
from ..core.optim import AdamW
from ..errors import UserError
from ..folders import adapters, checkpoint, runs
from ..text import data, instructions
from ..text.data import Array, Packed, Tokenizer
from ..text.instructions import Example, Message
from ..world import corpus, tasks
from . import variants
from .adapter import LEARNING_RATES, fingerprint


@dataclasses.dataclass(frozen=True)
class Settings(runs.Settings):
    """Those of every run, and what only this stage has. A batch has batch_size rows of block_size tokens."""

    stage: str = "sft"
    val_data: tuple[str, ...] = ()  # none: a tenth of the examples
    packing: bool = True  # False: each example has a row of its own


class Examples(NamedTuple):
    """What the files hold."""

    train: Packed
    val: Packed
    count: int  # of the examples in train
    questions: list[Example]  # the examples in val
    dropped: int  # examples that are too long for a row
    fingerprint: str


class Run(NamedTuple):
    """A run that is ready to go on from update `optimizer.steps`."""

    folder: Path
    settings: Settings
    optimizer: AdamW
    tokenizer: Tokenizer
    examples: Examples
    before: dict[str, Array] | None  # the weights that it began with, if they change and can still be had


def learning_rate(config: GPTConfig, adapter: str = "") -> float:
    """A peak for tuning all weights of a model of this size: 5e-4 at a million, less by the root of the size.
    For an adapter of that kind, the one in `LEARNING_RATES`.

    For GPT-2's 124 million it is 4.5e-5; GPT-1's 117 million were tuned at 6.25e-5 (Radford et al. 2018,
    section 4.1).
    """
    rate = LEARNING_RATES.get(adapter, min(1e-3, 5e-4 * math.sqrt(1e6 / config.size)))
    return float(f"{rate:.1e}")


def begin(
    folder: Path,
    settings: Settings,
    *,
    init_from: Path,
    adapter_folder: Path | None = None,
    overwrite: bool = False,
) -> Run:
    """A new run in `folder` from the model in `init_from`; of settings.model only the dropout is taken.

    settings.adapter: what is trained beside that model, which then stays as it is, and is not copied.
    adapter_folder: an adapter to begin with instead.
    The folder is written last, after all that can be wrong has been checked. Raises UserError, also where
    `folder` has a model and not `overwrite`.
    """
    runs.check_folder(folder, overwrite)
    model, tokenizer = adapters.load_model(init_from, adapter_folder)
    model.config = dataclasses.replace(model.config, dropout=settings.model.dropout)
    if not adapter_folder and settings.adapter:
        rng = np.random.default_rng([settings.train.seed, 0, 3])
        model = variants.create(model, settings.adapter, rng)
    tokenizer.chat_template = instructions.TEMPLATE
    settings = runs.from_model(
        settings, model, init_from, val_data=runs.absolute(settings.val_data),
        adapter=model.adapter.config if adapter_folder else settings.adapter,
    )  # fmt: skip
    examples = read(settings, tokenizer)
    settings = dataclasses.replace(settings, fingerprint=examples.fingerprint)
    optimizer = settings.train.optimizer(model)
    runs.first_save(folder, optimizer, tokenizer, settings)
    before = None if settings.adapter else {name: p.copy() for name, p in model.params.items()}
    return Run(folder, settings, optimizer, tokenizer, examples, before)


def resume(folder: Path, paths: tuple[str, ...] = (), val_paths: tuple[str, ...] = ()) -> Run:
    """The run in `folder` as it was saved last. The paths say where the data is now, if it was moved.

    Raises UserError where there is no run, and where the data is gone or another.
    """
    settings, tokenizer = runs.read(folder, Settings, data=paths, val_data=val_paths)
    examples = read(settings, tokenizer)
    runs.check_data(folder, settings, examples.fingerprint, settings.val_data)
    optimizer = runs.load(folder, settings, tokenizer)
    return Run(folder, settings, optimizer, tokenizer, examples, _weights_before(settings))


def sft(run: Run, report: Callable[[train.Record], None] = lambda record: None) -> None:
    """Trains to the end; saves at every evaluation, at the end and on Ctrl-C, then raising KeyboardInterrupt.

    Each record of `train.train` becomes a line of metrics.jsonl and goes to `report`. Where it was evaluated,
    as at the end, it has `val_loss`, the mean over all learned tokens of the validation examples, and
    `weight_change`, that of all weights together since the beginning, unless the model of then is gone.
    """
    settings, model, examples = run.settings, run.optimizer.model, run.examples

    def batches(n: int, rng: np.random.Generator) -> list[train.Batch]:
        return update(examples.train, settings, n)

    def evaluate() -> train.Record:
        found = {"val_loss": train.mean_loss(model, consecutive(examples.val, settings.batch_size))}
        if run.before is not None:
            found["weight_change"], _ = train.weight_change(run.before, model.params)
        return found

    runs.run(run.folder, run.optimizer, run.tokenizer, settings, batches, evaluate, report)


def tune(model: GPT, tokenizer: Tokenizer, examples: Iterable[list[Message]], settings: Settings,
         report: Callable[[train.Record], None] = lambda record: None) -> None:  # fmt: skip
    """The same training in memory: changes `model` itself, or its adapter, and keeps nothing on disk.

    All examples are trained on. Raises ValueError for one that is longer than a row.
    """
    tokenizer.chat_template = instructions.TEMPLATE
    batches, optimizer = updates(tokenizer, examples, settings), settings.train.optimizer(model)
    train.train(optimizer, lambda n, rng: batches(n), settings.train, report=report)


def updates(
    tokenizer: Tokenizer, examples: Iterable[list[Message]], settings: Settings
) -> Callable[[int], list[train.Batch]]:
    """From the number of an update to its batches, of all these examples."""
    encoded = [instructions.encode(tokenizer, messages) for messages in examples]
    order = np.random.default_rng([settings.train.seed, 0, 1]).permutation(len(encoded))
    rows = _packed([encoded[i] for i in order], settings)
    return lambda n: update(rows, settings, n)


def _weights_before(settings: Settings) -> dict[str, Array] | None:
    if settings.adapter:
        return None
    try:
        model, _ = checkpoint.load(settings.init_from)
    except (UserError, OSError):
        return None
    return model.params if fingerprint(model) == settings.init_hash else None


# --- examples and batches -----------------------------------------------------------------------------------


def read(settings: Settings, tokenizer: Tokenizer) -> Examples:
    """The examples of the settings' files without those too long for a row, shuffled but for val_data's.

    Raises UserError, with file and line, for what is no example, and where there are too few.
    """
    instructions.prompt(tokenizer, "")  # or what the tokenizer lacks would be the first example's fault
    found, dropped = _fitting(settings.data, settings, tokenizer)
    order = np.random.default_rng([settings.train.seed, 0, 1]).permutation(len(found))
    found, n = [found[i] for i in order], max(1, len(found) // 10)
    if settings.val_data:
        val, more = _fitting(settings.val_data, settings, tokenizer, "val")
        dropped += more
    elif len(found) < 2:
        raise UserError(f"{settings.data[0]}: one example is too few: one is to train on, one to validate on")
    else:
        val, found = found[:n], found[n:]
    digest, packed = hashlib.sha256(), []
    for part in (found, val):
        encoded = [pair for _, pair in part]
        for array in (array for pair in encoded for array in pair):
            digest.update(array)
        packed.append(_packed(encoded, settings))
    return Examples(*packed, len(found), [example for example, _ in val], dropped, digest.hexdigest())


def _fitting(
    paths: tuple[str, ...], settings: Settings, tokenizer: Tokenizer, split: str = "sft"
) -> tuple[list[tuple], int]:
    """(example, (ids, learned)) of all that fit a row, and the number of those that do not."""
    found = []
    for example in read_examples(paths, split):
        try:
            found.append((example, instructions.encode(tokenizer, example.messages)))
        except UserError as error:
            raise UserError(f"{example.where}: {error}") from None
    fit = [pair for pair in found if len(pair[1][0]) <= settings.block_size + 1]
    if not fit:
        least, limit = min(len(ids) for _, (ids, _) in found) - 1, settings.model.block_size
        raise UserError(
            f"{paths[0]}: no example fits into block_size {settings.block_size}: the shortest needs {least}, "
            f"and the model has {limit} positions"
        )
    return fit, len(found) - len(fit)


def _packed(encoded: list[tuple[Array, Array]], settings: Settings) -> Packed:
    groups = [encoded] if settings.packing else [[pair] for pair in encoded]
    rows = [data.pack(group, settings.block_size) for group in groups]
    return Packed(*map(np.concatenate, zip(*rows, strict=True)))


def read_examples(paths: tuple[str, ...], split: str = "sft") -> list[Example]:
    """The examples of JSON Lines files, and what worlds have for tuning, or for "val"."""
    found = []
    for path in paths:
        if not corpus.is_source(path):
            found += instructions.read([path])
            continue
        world = corpus.world_of(path)
        for n, messages in enumerate(tasks.conversations(world, tasks.tuning(world, split)), 1):
            found.append(Example(f"{path}:{n}", messages))
    return found


def update(rows: Packed, settings: Settings, n: int) -> list[train.Batch]:
    """The batches of update n: rows in an order drawn anew for each epoch, weights that sum to 1.

    Where there are fewer rows than batch_size, a batch has all of them once.
    """
    R, A = len(rows.ids), settings.gradient_accumulation_steps
    B = min(settings.batch_size, R)
    picked = data.shuffled_places(R, A * B, n, settings.train.seed)
    batches = [_batch(rows, picked[i : i + B]) for i in range(0, A * B, B)]
    learned = max(1, sum(int(batch.weights.sum()) for batch in batches))
    return [batch._replace(weights=batch.weights / np.float32(learned)) for batch in batches]


def consecutive(rows: Packed, count: int) -> Iterator[train.Batch]:
    """All rows, up to `count` at a time; each learned token has weight 1."""
    for i in range(0, len(rows.ids), count):
        yield _batch(rows, np.arange(i, min(i + count, len(rows.ids))))


def _batch(rows: Packed, picked: Array) -> train.Batch:
    """Some of the rows, without the columns after the last that is learned: nothing depends on them.

    Cut at a multiple of 32, so that batches have few shapes: `train` keeps a record of each.
    """
    T = int(np.flatnonzero(rows.weights[picked].any(0)).max(initial=0)) + 1
    return train.Batch(*(part[picked, : -(-T // 32) * 32] for part in rows))
