"""A run in a folder: how all training stages begin, go on and save.

`begin` makes a run, `resume` takes one up, `saving` saves it while it trains. At every moment the folder has
a model that can be loaded, or a run from which `resume` writes that model. The model is always the newest,
not the one with the best validation loss; metrics.jsonl tells which that was.

Not here: the loop (`core.train`), the stages (`stages`), the format of the files (`checkpoint`, `adapters`).
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import __version__
from ..core import kernels, train
from ..core.model import GPT
from ..core.optim import AdamW
from ..core.parallel import ALONE, Alone, digest
from ..errors import UserError
from ..files.atomic import holds, lock, make_folder, remove, replacing, sync, together, writing
from ..files.jsonfile import parse
from ..stages import reward, variants
from ..stages.adapter import fingerprint
from ..stages.stage import Settings, Stage, Store
from . import adapters, checkpoint
from .checkpoint import Tokenizer

METRICS = "metrics.jsonl"
MODELS = {"init_from": "--init-from", "reward_from": "--reward-model"}  # fields that name models
MOST_RECORD, MOST_BYTES = 1 << 16, 1 << 30  # characters in a line of metrics.jsonl; bytes of the file


class Run(NamedTuple):
    """A stage whose state is in a folder."""

    folder: Path
    stage: Stage


def begin(
    cls: type[Stage], folder: Path, settings: Settings, overwrite: bool = False, group: Alone = ALONE
) -> Run:
    """A new run in `folder`. What is there is replaced last, after all that can be wrong has been checked.
    The first file holds the whole run: a kill leaves what was there before, or a run that `resume` takes up.

    Of a group of processes number 0 locks and writes the folder. Raises UserError, also where `folder` has a
    model and not `overwrite`.
    """
    group.shares(settings.gradient_accumulation_steps)
    if group.rank == 0:
        needed = [getattr(settings, field) for field in cls.needs]
        check_folder(folder, overwrite, needed)
        if judge := getattr(settings, "reward_from", ""):
            check_folder(folder, overwrite, [_author(Path(judge)).init_from])
    group.meet()  # or the lock would remove what the others are writing
    data = cls.read(settings, STORE)
    settings, model, tokenizer = cls.start(settings, data, STORE)
    stage = cls(settings, settings.train.optimizer(model, group=group), tokenizer, data, folder)
    stage.settings = checkpoint.with_paths(stage.settings, os.path.realpath)
    _check_alike(stage)
    first_save(folder, stage.optimizer, tokenizer, stage.settings)
    return Run(folder, stage)


def resume(cls: type[Stage], folder: Path, group: Alone = ALONE, **moved: Sequence[str] | str) -> Run:
    """The run in `folder` as it was saved last. The folder is locked from now on.

    moved: the fields of the settings that say where data or a model is now, if it is elsewhere. Another field
    that named the same data moves along. All processes of a group read the folder. Raises UserError where
    there is no run of this stage, where another process goes on with it, and where the data or a model is
    gone or another.
    """
    if folder.is_dir() and group.rank == 0:
        lock(folder)
    group.meet()  # the lock has finished what a kill interrupted
    settings, tokenizer = checkpoint.read_run(folder, cls.Settings)
    if not (settings.data or settings.stage == "pretrain"):
        raise UserError(f"{folder}: this run names no data")
    moved = {name: paths for name, paths in moved.items() if paths}
    before = vars(settings)
    same = [n for n, value in vars(settings).items() if "data" in moved and value == settings.data and value]
    settings = dataclasses.replace(settings, **dict.fromkeys(same, moved.get("data")) | moved)
    group.shares(settings.gradient_accumulation_steps)
    for name, option in MODELS.items():
        path = getattr(settings, name, "")
        is_needed = name in cls.needs or not settings.has_model
        if name in moved and not before[name]:
            raise UserError(f"{folder}: this run began without {option}: leave it out")
        if path and is_needed and not Path(path).exists():
            raise UserError(f"{folder}: the run needs {path}, which is gone: say where it is, as {option}")
    if "init_from" in moved:
        _base(settings)  # or another model would count as the one that the run began with
    data = cls.read(settings, STORE)
    stage = cls(settings, load(folder, settings, tokenizer, group), tokenizer, data, folder)
    stage.settings = checkpoint.with_paths(stage.settings, os.path.realpath)
    _check_alike(stage)
    if moved:  # the run remembers where its data is now, also if it has no updates left
        save(folder, stage.optimizer, tokenizer, stage.settings)
    return Run(folder, stage)


def _check_alike(stage: Stage) -> None:
    """Raises UserError where the processes that train a stage differ in something that their bytes depend
    on."""
    group, settings, optimizer = stage.optimizer.group, stage.settings, stage.optimizer
    if group.size == 1:
        return
    tokenizer, backend = stage.tokenizer, stage.model.ops.__name__.rpartition(".")[2]
    options = settings.train, settings.model, settings.adapter, settings.batch_size, settings.block_size
    group.alike({
        "version of tinygpt or NumPy": f"{__version__} {np.__version__}",
        "instruction set": f"{backend} {kernels.isa if kernels.lib else ''}",
        "tokenizer": digest(json.dumps([tokenizer.spec, tokenizer.config()]).encode()),
        "data": settings.fingerprint,
        "settings": digest(repr((*options, settings.gradient_accumulation_steps)).encode()),
        "model": digest(stage.model.flat),
        "adapter": digest(optimizer.trained.flat),
        "update": str(optimizer.steps),
    })  # fmt: skip


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
    files = [name for name in (*checkpoint.FILES, *adapters.FILES, METRICS) if (folder / name).exists()]
    if files and not overwrite:
        resume = f"--resume {folder} goes on with the run there, " * (folder / checkpoint.TRAINER).exists()
        raise UserError(f"{folder}: already has a {files[0]}; {resume}--overwrite replaces it, --out takes "
                        "another folder")  # fmt: skip
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there}: this folder is read-only")
    if folder.exists():
        lock(folder)


def first_save(folder: Path, optimizer: AdamW, tokenizer: Tokenizer, settings: Settings) -> None:
    """Writes a new run. After a full disk or a kill the folder has what was there before, or the new run."""
    is_writer = optimizer.group.rank == 0
    if is_writer and not settings.has_model:
        check_folder(folder, True, needed=(settings.init_from,))
    if is_writer and not holds(folder):  # it was not there when the run began: nobody may have written since
        make_folder(folder)
        check_folder(folder, overwrite=False)
    save(folder, optimizer, tokenizer, settings)


def save(folder: Path, optimizer: AdamW, tokenizer: Tokenizer, settings: Settings) -> None:
    """Writes a run as it is. After a full disk or a kill the folder has the older state or this one.

    Of several processes number 0 writes, and all call this function: they have the moments.
    """
    if optimizer.group.rank:
        for moment in (optimizer.m, optimizer.v):
            optimizer.whole(moment)
        return
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


def load(folder: Path, settings: Settings, tokenizer: Tokenizer, group: Alone = ALONE) -> AdamW:
    """The optimizer and its model as they were saved last; settings and tokenizer are from `read_run`.

    The model's files are written anew, as a kill may have come between them and the run's own. Raises
    UserError where the base of an adapter is gone, or another.
    """
    if not settings.has_model:
        model, _ = checkpoint.load(settings.init_from)
        adapters.check_base(model, settings.init_hash, folder, settings.init_from)
        model.config = settings.model
    else:
        model = variants.build(settings.model)
    if settings.adapter:
        model = variants.beside(model, settings.adapter)
    optimizer = settings.train.optimizer(model, group=group)
    checkpoint.load_trainer(folder, optimizer)
    if group.rank == 0:
        _export(folder, model, tokenizer, settings)
    return optimizer


# --- what stages begin with ---------------------------------------------------------------------------------


def _base(settings: Settings) -> GPT:
    model, _ = checkpoint.load(settings.init_from)
    if settings.init_hash not in ("", fingerprint(model)):
        raise UserError(f"{settings.init_from}: has another model than the one that this run began with")
    return model


def _author(judge: Path) -> Settings:
    """The settings of the run that made a judge: they say from which model it was made."""
    if not (judge / checkpoint.TRAINER).exists():
        checkpoint.load(judge, judge=True)  # or this says what is wrong
        raise UserError(f"{judge}: has a judge without the run that says which model it was made from: give "
                        "a folder that tinygpt reward wrote")  # fmt: skip
    if not checkpoint.read_config(judge).num_labels:
        checkpoint.load(judge, judge=True)  # which says that a judge is something else
    return checkpoint.read_run(judge, reward.Settings)[0]


def load_judge(folder: Path | str) -> reward.Judge:
    """The judge in a folder that `tinygpt reward` wrote. Raises UserError, also where its author has gone."""
    folder = Path(folder)
    model, tokenizer = checkpoint.load(folder, judge=True)
    try:
        author = _base(_author(folder))
    except (UserError, OSError) as error:
        remedy = f"tinygpt reward --resume {folder} --init-from FOLDER says where it is"
        needs = f"this judge needs the model that it was made from: {error}; {remedy}"
        raise UserError(f"{folder}: {needs}") from error
    return reward.Judge(model, author, tokenizer)


STORE = Store(adapters.load_model, _base, load_judge)


# --- while a run trains -------------------------------------------------------------------------------------


def saving(run: Run, report: Callable[[train.Record], None]) -> dict:
    """What `Stage.train` needs for a run in a folder: it saves at every evaluation, at the end and on Ctrl-C.

    Each record becomes a line of metrics.jsonl and goes to `report`.
    """
    folder, stage = run
    metrics, group = folder / METRICS, stage.optimizer.group
    state = stage.optimizer, stage.tokenizer, stage.settings
    if group.rank:
        return {"save": lambda: save(folder, *state)}

    def save_all() -> None:
        with contextlib.suppress(FileNotFoundError):
            sync(metrics)  # the record of an update is on the disk before the update is
        try:
            save(folder, *state)
        except UserError:
            if holds(folder) or group.size > 1:
                raise
            save(folder, *state)  # the folder was removed in the middle of the save

    def log(record: train.Record) -> None:
        if removed := not holds(folder):
            make_folder(folder)
            lock(folder)
        with writing(metrics), open(metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if removed and group.size == 1:
            save_all()
        report(record)

    elapsed_s = resume_metrics(metrics, stage.optimizer.steps).get("elapsed_s", 0.0)
    return {"report": log, "save": save_all, "elapsed_s": elapsed_s}


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
