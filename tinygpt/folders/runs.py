"""A run in a folder: what all training stages do with theirs.

A run begins with `check_folder` and `first_save`, is taken up with `read` and `load`, and trains with `run`.
At every moment the folder has a model that can be loaded, or a run from which `load` writes that model. The
model is always the newest, not the one with the best validation loss; metrics.jsonl tells which that was.

Not here: the loop itself (`train`), what is in the files (`checkpoint`), the data (each stage's).
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..core import train
from ..core.config import GPTConfig
from ..core.model import GPT
from ..core.optim import AdamW
from ..errors import UserError
from ..files.atomic import holds, lock, make_folder, remove, replacing, sync, together, writing
from ..files.jsonfile import parse
from ..stages import lora, variants
from ..stages.adapter import AdapterConfig, fingerprint
from ..stages.variants import build
from . import adapters, checkpoint
from .checkpoint import Tokenizer

METRICS = "metrics.jsonl"
MOST_RECORD, MOST_BYTES = 1 << 16, 1 << 30  # characters in a line of metrics.jsonl; bytes of the file
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
    block_size: int = 64  # of the training sequences: at most the model's
    batch_size: int = 12
    gradient_accumulation_steps: int = 1  # batches of that size for each update

    def __post_init__(self) -> None:
        for name in ("block_size", "batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
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


AnySettings = TypeVar("AnySettings", bound=Settings)


def check_folder(folder: Path, overwrite: bool, needed: Iterable[Path | str] = ()) -> None:
    """Raises UserError unless a run can be written here. If the folder exists, it is locked from now on; if
    not, `first_save` makes it.

    needed: folders of models that the run, or what it trains, cannot do without.
    """
    if folder.resolve() in {Path(other).resolve() for other in needed if other}:
        raise UserError(f"{folder}: has a model that this run needs as it is; --out takes another folder")
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise UserError(f"{there}: is a file, and a run needs a folder")
    found = [name for name in (*checkpoint.FILES, *adapters.FILES, METRICS) if (folder / name).exists()]
    if found and not overwrite:
        resume = f"--resume {folder} goes on with the run there, " * (folder / checkpoint.TRAINER).exists()
        raise UserError(f"{folder}: already has a {found[0]}; {resume}--overwrite replaces it, --out takes "
                        "another folder")  # fmt: skip
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there}: this folder is read-only")
    if folder.exists():
        lock(folder)


def absolute(paths: Sequence[Path | str]) -> tuple[str, ...]:
    """Paths that a run can be resumed with from any folder; "world:1337" is none, and stays as it is."""
    return tuple(p if (p := str(path)).startswith("world:") else str(Path(p).resolve()) for path in paths)


def from_model(settings: AnySettings, model: GPT, folder: Path, **more) -> AnySettings:
    """The settings of a run that begins with the model in `folder`; `more` are other fields."""
    return dataclasses.replace(
        settings, model=model.config, data=absolute(settings.data), init_from=str(Path(folder).resolve()),
        init_hash=fingerprint(model), **more,
    )  # fmt: skip


def read(folder: Path, kind: type[AnySettings], **paths: Sequence[str]) -> tuple[AnySettings, Tokenizer]:
    """Settings and tokenizer of the run in `folder`, which is locked from now on. paths: fields that say
    where data is now, if given any.

    Raises UserError where there is no run of that stage, or another process goes on with it.
    """
    if folder.is_dir():
        lock(folder)
    settings, tokenizer = checkpoint.read_run(folder, kind)
    if not (settings.data or settings.stage == "pretrain"):
        raise UserError(f"{folder}: this run names no data")
    moved = {name: absolute(found) for name, found in paths.items() if found}
    return dataclasses.replace(settings, **moved), tokenizer


def check_data(folder: Path, settings: Settings, mark: str, beside: tuple[str, ...] = ()) -> None:
    """Raises UserError unless `mark`, of what was read now, is that of the beginning of the run in `folder`.

    beside: paths of what was read besides settings.data.
    """
    if mark != settings.fingerprint:
        source = ", ".join((*settings.data, *beside)) or "the documentation of this Python"
        raise UserError(f"{source}: not the data that the run in {folder} began with; it needs that")


def first_save(folder: Path, optimizer: AdamW, tokenizer: Tokenizer, settings: Settings) -> None:
    """Writes a new run. After a full disk or a kill the folder has what was there before, or the new run."""
    if not settings.has_model:
        check_folder(folder, True, needed=(settings.init_from,))
    if not holds(folder):  # the folder was not there when the run began: nobody may have written there since
        make_folder(folder)
        check_folder(folder, overwrite=False)
    save(folder, optimizer, tokenizer, settings)


def save(folder: Path, optimizer: AdamW, tokenizer: Tokenizer, settings: Settings) -> None:
    """Writes a run as it is. After a full disk or a kill the folder has the older state or this one."""
    make_folder(folder)
    lock(folder)
    with together(folder):
        checkpoint.save_trainer(folder, optimizer, tokenizer, settings, settings.has_base)
        _export(folder, optimizer.model, tokenizer, settings)


def save_model(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Writes a model that is not a run's: what an older run or an adapter left in the folder goes."""
    make_folder(folder)
    lock(folder)
    with together(folder):
        checkpoint.save(folder, model, tokenizer)
        for name in (*adapters.FILES, checkpoint.TRAINER, METRICS):
            remove(folder / name)


def _export(folder: Path, model: GPT, tokenizer: Tokenizer, settings: Settings) -> None:
    """Writes the folder that others read: a model's, or an adapter's, and removes the files of the other."""
    with together(folder):
        if settings.has_model:
            whole = variants.merge(model) if settings.adapter else model
            checkpoint.save(folder, whole, tokenizer)
        else:
            adapters.save(folder, model, tokenizer, settings.init_from, settings.init_hash)
        for name in adapters.FILES if settings.has_model else (checkpoint.CONFIG, checkpoint.WEIGHTS):
            remove(folder / name)


def load(folder: Path, settings: Settings, tokenizer: Tokenizer) -> AdamW:
    """The optimizer and its model as they were saved last; settings and tokenizer are from `read_run`.

    The model's files are written anew, as a kill may have come between them and the run's own. Raises
    UserError where the base of an adapter is gone, or another.
    """
    if not settings.has_model:
        model, _ = checkpoint.load(settings.init_from)
        adapters.check_base(model, settings.init_hash, folder, settings.init_from)
        model.config = settings.model
    else:
        model = build(settings.model)
    if settings.adapter:
        model = variants.beside(model, settings.adapter)
    optimizer = settings.train.optimizer(model)
    checkpoint.load_trainer(folder, optimizer)
    _export(folder, model, tokenizer, settings)
    return optimizer


def run(
    folder: Path,
    optimizer: AdamW,
    tokenizer: Tokenizer,
    settings: Settings,
    batches: Callable[[int, np.random.Generator], Sequence[train.Batch]],
    evaluate: Callable[[], train.Record],
    report: Callable[[train.Record], None],
    **how,
) -> None:
    """`train.train` to the end; saves at every evaluation, at the end and on Ctrl-C, then KeyboardInterrupt.

    Other arguments go to `train.train`.
    Each of its records becomes a line of metrics.jsonl and goes to `report`.
    """
    metrics = folder / METRICS

    def save_all() -> None:
        with contextlib.suppress(FileNotFoundError):
            sync(metrics)  # the record of an update is on the disk before the update is
        try:
            save(folder, optimizer, tokenizer, settings)
        except UserError:
            if holds(folder):
                raise
            save(folder, optimizer, tokenizer, settings)  # the folder was removed in the middle of the save

    def restarted(n: int, rng: np.random.Generator) -> Sequence[train.Batch]:
        """The batches of update n, before which it may be time for a merge."""
        if settings.train.merge_every and n and n % settings.train.merge_every == 0:
            lora.restart(optimizer, np.random.default_rng([settings.train.seed, n, 3]))
        return batches(n, rng)

    def log(record: train.Record) -> None:
        if removed := not holds(folder):
            make_folder(folder)
            lock(folder)
        with writing(metrics), open(metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if removed:
            save_all()
        report(record)

    elapsed_s = resume_metrics(metrics, optimizer.steps).get("elapsed_s", 0.0)
    train.train(
        optimizer, restarted, settings.train, evaluate=evaluate, report=log, save=save_all,
        elapsed_s=elapsed_s, **how,
    )  # fmt: skip


# --- metrics.jsonl ------------------------------------------------------------------------------------------


def resume_metrics(path: Path, step: int) -> train.Record:
    """Cuts a file of records back to those of the first `step` updates, and returns the last, {} if none."""
    last = {}
    with replacing(path) as beside, beside.open("w", encoding="utf-8") as new:
        for line in _lines(path):
            # A kill cuts a line short; whatever else is not a record of `train` goes too.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = parse(line)
                if record["iter"] <= step and type(record["elapsed_s"]) is float:
                    new.write(json.dumps(record) + "\n")
                    last = record
    return last


def _lines(path: Path) -> Iterator[str]:
    """The lines of a regular file; a line of more than a record's length comes in parts."""
    if path.is_file():
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: has more than {MOST_BYTES:,} bytes: move it away, and the run goes on")
        with path.open(encoding="utf-8", errors="replace") as file:
            while line := file.readline(MOST_RECORD):
                yield line
