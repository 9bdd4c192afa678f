"""A run in a folder: how all training stages begin, resume and save.

`begin` makes a run, `resume` continues a run, and `saving` saves it during training. At every moment the
folder has a model that can be loaded, or a run from which `resume` writes the model. The model is the newest
one, not the one with the best validation loss: metrics.jsonl shows which that was.

Not here: the loop (`core.train`), the stages (`stages`), the format of the files (`checkpoint`, `adapters`).
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from .. import __version__
from ..core import kernels, train
from ..core.model import GPT
from ..core.optim import AdamW
from ..core.parallel import ALONE, Group, digest
from ..errors import UserError
from ..files.atomic import holds, lock, make_folder, remove, replacing, sync, together, writing
from ..files.jsonfile import parse
from ..stages import reward, variants
from ..stages.adapter import fingerprint
from ..stages.stage import Settings, Stage, Store, names_data
from ..text.tokenizer import Tokenizer
from . import adapters, checkpoint

METRICS = "metrics.jsonl"
MODELS = {"init_from": "--init-from", "reward_from": "--reward-model"}  # fields with paths of models
MOST_RECORD, MOST_BYTES = 1 << 16, 1 << 30  # characters in a line of metrics.jsonl; bytes of the file


def begin(
    cls: type[Stage], folder: Path, settings: Settings, overwrite: bool = False, group: Group = ALONE
) -> Stage:
    """A new run in `folder`. It replaces an older model there only after all checks.

    A kill leaves the older files, or a run that `resume` continues. Process 0 of the group locks and writes
    the folder. Raises UserError for wrong settings or data, and if `folder` has a model and `overwrite` is
    False.
    """
    group.share_size(settings.gradient_accumulation_steps)
    if group.rank == 0:
        needs = [getattr(settings, field) for field in cls.needs]
        check_folder(folder, overwrite, needs if settings.has_model else [*needs, settings.init_from])
        if judge := getattr(settings, "reward_from", ""):
            check_folder(folder, overwrite, [_author(Path(judge)).init_from])
    group.meet()  # the lock has removed old files, before the others write new ones
    data = cls.read(settings, STORE)
    settings, model, tokenizer = cls.start(settings, data, STORE)
    stage = _run(cls, folder, settings, settings.train.optimizer(model, group=group), tokenizer, data)
    if group.rank == 0 and not holds(folder):  # it did not exist before: another process may have made it
        make_folder(folder)
        check_folder(folder, overwrite=False)
    save(folder, stage.optimizer, tokenizer, stage.settings)
    return stage


def resume(cls: type[Stage], folder: Path, group: Group = ALONE, **changes: Sequence[str] | str) -> Stage:
    """The run in `folder`, as its last save left it.

    Process 0 of the group locks the folder. All processes of the group read it. changes: new paths of data or
    models, by the field of the settings. A path of `data` that changes, changes in the other fields too.

    Raises UserError if the folder has no run of the stage `cls`, or another program has the lock. Raises
    UserError, too, if the data or a needed model is missing or is not the one of the beginning.
    """
    if folder.is_dir() and group.rank == 0:
        lock(folder)
    group.meet()  # the lock has completed an interrupted save
    settings, tokenizer = checkpoint.read_run(folder, cls.Settings)
    changes = {name: paths for name, paths in changes.items() if paths}
    before, moved = vars(settings), dict(zip(settings.data, changes.get("data", ()), strict=False))
    fields = {n: tuple(moved.get(path, path) for path in before[n]) for n in before if names_data(n)}
    settings = dataclasses.replace(settings, **fields | changes)
    group.share_size(settings.gradient_accumulation_steps)
    for name, option in MODELS.items():
        path = getattr(settings, name, "")
        is_needed = name in cls.needs or not settings.has_model
        if name in changes and not before[name]:
            raise UserError(f"{folder}: this run began without {option}: leave it out")
        if path and is_needed and not Path(path).exists():
            raise UserError(f"{folder}: the run needs {path}, which is gone: say where it is, as {option}")
    if "init_from" in changes:
        _base(settings)  # raises UserError for another model
    data = cls.read(settings, STORE)
    stage = _run(cls, folder, settings, load(folder, settings, group), tokenizer, data)
    save(folder, stage.optimizer, tokenizer, stage.settings)  # the new paths, and files that are missing
    return stage


def _run(cls: type[Stage], folder: Path, settings: Settings, optimizer: AdamW, *material) -> Stage:
    """The run of a stage, with absolute paths in its settings. material: its tokenizer and its data."""
    stage = cls(settings, optimizer, *material, folder)
    stage.settings = checkpoint.with_paths(stage.settings, os.path.realpath)
    if optimizer.group.size > 1:
        _check_alike(stage)
    return stage


def _check_alike(stage: Stage) -> None:
    """Raises UserError if the processes differ in something that changes the bytes of the weights."""
    settings, optimizer = stage.settings, stage.optimizer
    tokenizer, backend = stage.tokenizer, stage.model.ops.__name__.rpartition(".")[2]
    options = settings.train, settings.model, settings.adapter, settings.batch_size, settings.block_size
    optimizer.group.check_alike({
        "version of tinygpt or NumPy": f"{__version__} {np.__version__}",
        "instruction set": f"{backend} {kernels.isa if kernels.lib else ''}",
        "tokenizer": digest(json.dumps([tokenizer.spec, tokenizer.config()]).encode()),
        "data": settings.fingerprint,
        "settings": digest(repr((*options, settings.gradient_accumulation_steps)).encode()),
        "model": digest(stage.model.flat),
        "adapter": digest(optimizer.trained.flat) if settings.adapter else "",
        "update": str(optimizer.steps),
    })  # fmt: skip


def check_folder(folder: Path, overwrite: bool, needed: Iterable[Path | str] = ()) -> None:
    """Raises UserError if a run must not or cannot be written to `folder`. Locks the folder, if it exists.

    needed: folders of models that the run or its result will read again. `folder` must not be one of these.
    """
    if folder.resolve() in {Path(other).resolve() for other in needed if other}:
        raise UserError(f"{folder}: has a model that this run needs as it is; --out takes another folder")
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise UserError(f"{there}: is a file, and a run needs a folder")
    files = [name for name in (*checkpoint.FILES, *adapters.FILES, METRICS) if (folder / name).exists()]
    if files and not overwrite:
        resume = f"--resume {folder} continues the run there, " * (folder / checkpoint.TRAINER).exists()
        raise UserError(f"{folder}: already has a {files[0]}; {resume}--overwrite replaces it, --out takes "
                        "another folder")  # fmt: skip
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there}: this folder is read-only")
    if folder.exists():
        lock(folder)


def save(folder: Path, optimizer: AdamW, tokenizer: Tokenizer, settings: Settings) -> None:
    """Writes the state of a run. After a full disk or a kill the folder has the older state or this one.

    All processes of a group must call this function together: process 0 writes, the others send moments.
    """
    if optimizer.group.rank:
        for moment in (optimizer.m, optimizer.v):
            optimizer.whole(moment)
        return
    lock(folder)
    with together(folder):
        checkpoint.save_trainer(folder, optimizer, tokenizer, settings)
        if settings.has_model:
            model = optimizer.model
            checkpoint.save(folder, model.merge() if settings.adapter else model, tokenizer)
        else:
            adapters.save(folder, optimizer.model, tokenizer, settings.init_from, settings.init_hash)
        for name in adapters.FILES if settings.has_model else (checkpoint.CONFIG, checkpoint.WEIGHTS):
            remove(folder / name)


def save_model(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Writes a model without a run. Removes the files of an older run or adapter from the folder."""
    lock(folder)
    with together(folder):
        checkpoint.save(folder, model, tokenizer)
        for name in (*adapters.FILES, checkpoint.TRAINER, METRICS):
            remove(folder / name)


def load(folder: Path, settings: Settings, group: Group = ALONE) -> AdamW:
    """The optimizer and its model, as the last save left them. settings: from `read_run`.

    Raises UserError if the base of an adapter is missing, or another model.
    """
    model = variants.build(settings.model) if settings.has_model else _base(settings)
    model.config = settings.model
    if settings.adapter:
        model = variants.beside(model, settings.adapter)
    optimizer = settings.train.optimizer(model, group=group)
    checkpoint.load_trainer(folder, optimizer)
    return optimizer


# --- the models with which stages begin ---------------------------------------------------------------------


def _base(settings: Settings) -> GPT:
    model, _ = checkpoint.load(settings.init_from)
    if settings.init_hash not in ("", fingerprint(model)):
        remedy = "give its own base, as --init-from"
        raise UserError(f"{settings.init_from}: has another model than the base of this run: {remedy}")
    return model


def _author(judge: Path) -> Settings:
    """The settings of the run that made a judge. Their init_from is the model with which the run began."""
    if not (judge / checkpoint.TRAINER).exists() or not checkpoint.read_config(judge).num_labels:
        checkpoint.load(judge, judge=True)  # raises UserError unless this is a judge
        raise UserError(f"{judge}: has a judge without its run, which names the model that the judge needs: "
                        "give a folder that tinygpt reward wrote")  # fmt: skip
    return checkpoint.read_run(judge, reward.Settings)[0]


def load_judge(folder: Path | str) -> reward.Judge:
    """The judge in a folder that `tinygpt reward` wrote. Raises UserError, also if its author is missing."""
    folder = Path(folder)
    model, tokenizer = checkpoint.load(folder, judge=True)
    try:
        author = _base(_author(folder))
    except (UserError, OSError) as error:
        remedy = f"tinygpt reward --resume {folder} --init-from FOLDER says where it is"
        needs = f"this judge needs the model with which its training began: {error}; {remedy}"
        raise UserError(f"{folder}: {needs}") from error
    return reward.Judge(model, author, tokenizer)


STORE = Store(adapters.load_model, _base, load_judge)


# --- while a run trains -------------------------------------------------------------------------------------


def saving(stage: Stage, report: Callable[[train.Record], None]) -> dict:
    """The arguments with which `Stage.train` saves a run: at every evaluation, at the end and on Ctrl-C.

    Each record becomes a line of metrics.jsonl, and then `report` receives it.
    """
    folder, group = stage.folder, stage.optimizer.group
    metrics, state = folder / METRICS, (stage.optimizer, stage.tokenizer, stage.settings)
    if group.rank:
        return {"save": lambda: save(folder, *state)}

    def write_again(write: Callable[[], None]) -> bool:
        """Calls write(). Where the folder was removed, makes the folder and calls write() again.

        Returns whether the folder was removed.
        """
        try:
            if holds(folder):
                write()
                return False
        except UserError:
            if holds(folder) or group.size > 1:
                raise
        lock(folder)
        write()
        return True

    def save_all() -> None:
        with contextlib.suppress(FileNotFoundError):
            sync(metrics)  # the record of an update is on the disk before the update is
        write_again(lambda: save(folder, *state))

    def log(record: train.Record) -> None:
        def append() -> None:
            with writing(metrics), open(metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

        if write_again(append) and group.size == 1:
            save_all()
        report(record)

    elapsed_s = resume_metrics(metrics, stage.optimizer.steps).get("elapsed_s", 0.0)
    return {"report": log, "save": save_all, "elapsed_s": elapsed_s}


# --- metrics.jsonl ------------------------------------------------------------------------------------------


def resume_metrics(path: Path, step: int) -> train.Record:
    """Cuts a file of records to those of the first `step` updates. Returns the last record, or {}."""
    last = {}
    with replacing(path) as beside, beside.open("w", encoding="utf-8") as new:
        for line in _lines(path):
            # A kill may leave half a line. All lines that are not records of `train` are dropped.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = parse(line)
                if record["iter"] <= step and type(record["elapsed_s"]) is float:
                    new.write(json.dumps(record) + "\n")
                    last = record
    return last


def _lines(path: Path) -> Iterator[str]:
    """The lines of a regular file; a line of more than MOST_RECORD characters comes in parts."""
    if path.is_file():
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: has more than {MOST_BYTES:,} bytes: move it away to continue the run")
        with path.open(encoding="utf-8", errors="replace") as file:
            while line := file.readline(MOST_RECORD):
                yield line
