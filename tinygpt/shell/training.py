"""The commands of the training stages. A stage's Settings define the options of its command."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click

from ..core import parallel
from ..core.config import PRESETS, GPTConfig
from ..core.train import TrainConfig
from ..folders import adapters, checkpoint, runs
from ..stages.adapter import AdapterConfig
from ..stages.stage import Settings, Stage, names_data
from . import afterwards, beforehand, registry
from .cli import IN_PARALLEL
from .options import (
    COUNT,
    FOLDER,
    MORE_THAN_0,
    check,
    chosen,
    fields,
    flag,
    from_fields,
    out,
    refuse,
    together,
    written_options,
)
from .progress import command, data_options, progress
from .terminal import say
from .worlds import name_world

SHOW = "Print the first N examples, token by token, and stop."
EXTRA = {"sft": [click.option("--show", type=COUNT, help=SHOW)]}
HANG = "With mpiexec: the processes end if one of them is silent for so many seconds."
FIRST = ("init_from", "reward_model", "data")


def commands() -> Iterator[click.Command]:
    """The commands of all stages."""
    return map(command_of, registry.STAGES)


def command_of(stage: type[Stage]) -> click.Command:
    """The command of a stage."""
    options, data = list(_options(stage)), ", ".join(map(flag, _moved(stage)))
    resume = f"Continue the run in FOLDER, with its settings. If its data or models moved: {data}."

    hang_timeout = click.option("--hang-timeout", type=MORE_THAN_0, default=1800.0,
                                metavar="SECONDS", help=HANG)  # fmt: skip
    decorate = together([
        *from_fields((option for option in options if option[0] in FIRST), stage.defaults),
        out(stage.out or stage.name),
        click.option("--resume", type=FOLDER, help=resume),
        *EXTRA.get(stage.name, ()),
        *([hang_timeout] if stage.name in IN_PARALLEL else ()),
        *from_fields((option for option in options if option[0] not in FIRST), stage.defaults),
    ])  # fmt: skip
    return click.command(stage.name, help=inspect.getdoc(stage))(decorate(partial(_run, stage, options)))


def _parts(stage: type[Stage]) -> dict[str, type]:
    """The fields of a stage's Settings that are dataclasses. Each dataclass has a part of the options."""
    own = {f.name: type(f.default) for f in dataclasses.fields(stage.Settings)}
    parts = {name: cls for name, cls in own.items() if dataclasses.is_dataclass(cls)}
    return {"model": GPTConfig, **parts, "adapter": AdapterConfig, "train": TrainConfig}


def _options(stage: type[Stage]) -> Iterator[tuple]:
    """(name, field, type) of each option of a stage."""
    yield from fields(stage.Settings, stage.unused)
    for part, cls in _parts(stage).items():
        if part == "adapter" and "adapter" in stage.unused:
            continue
        for option in fields(cls, stage.unused):
            if part != "model" or option[0] in stage.sizes:
                yield option


def _data(stage: type[Stage]) -> list[str]:
    """The options that name data."""
    return [name for name, *_ in fields(stage.Settings) if names_data(name)]


def _moved(stage: type[Stage]) -> dict[str, str]:
    """The options that name data and models, and their fields of the settings."""
    names = {name: field.name for name, field, _ in fields(stage.Settings)}
    return {name: field for name, field in names.items() if name in _data(stage) or field in runs.MODELS}


def _run(stage: type[Stage], options: list[tuple], hang_timeout: float = 1800, **values) -> None:
    """Begins or resumes a run, and trains to the end or until Ctrl-C. Then process 0 shows the results."""
    group = parallel.join(hang_timeout)
    run = _train(stage, options, values, group)
    group.leave()
    if group.rank == 0:
        afterwards.AFTERWARDS.get(stage.name, afterwards.saved)(run)


def _train(stage: type[Stage], options: list[tuple], values: dict, group: parallel.Group) -> Stage:
    run = _begin_or_resume(stage, options, values, group)
    settings, model = run.settings, run.model
    each = group.share_size(settings.gradient_accumulation_steps)
    if group.size > 1 and each & (each - 1):
        say(f"Each process has {each} batches: so the weights depend on the number of processes. With 1, 2, "
            "4 or 8 batches each they do not.")  # fmt: skip
    total, trained = model.flat.size, model.trained.flat.size
    beside = f", {trained:,} trained ({trained / total:.2%})" if model.trained is not model else ""
    say(f"{total:,} weights{beside}{run.about()}")
    if run.notes:
        say(run.notes)
    if run.optimizer.steps >= settings.train.max_iters:
        say(f"All {run.optimizer.steps} updates of this run are made.")
        if settings.stage in ("pretrain", "sft") and settings.has_model:
            words = ["--init-from", str(run.folder), *data_options(settings.data), "--out", "more"]
            say(f"To train more: {command(settings.stage, *words)}")
    try:
        run.train(**runs.saving(run, progress(settings.train.max_iters)))
    except KeyboardInterrupt:
        say(f"\nStopped. To continue: {command(settings.stage, '--resume', str(run.folder))}")
        group.leave()
        sys.exit(130)
    return run


def _begin_or_resume(
    stage: type[Stage], options: list[tuple], values: dict, group: parallel.Group
) -> Stage:
    written, data, folder = written_options(), _data(stage), Path(values.pop("out"))
    name_world(values, data, values["resume"] or values.get("init_from"))
    if values["resume"]:
        moved = _moved(stage)
        refuse(written - {"resume", "hang_timeout", *moved}, "--resume takes all settings from its folder")
        paths = {field: values[name] for name, field in moved.items()}
        return runs.resume(stage, values["resume"], group, **paths)
    values |= {name: value for name, value in stage.recipe(values).items() if name not in written}
    _ask_for(options, values)
    check(options, values, written)
    if values.get("show"):
        beforehand.show(values["init_from"], values["data"], values["show"])
        sys.exit()
    settings = _settings(stage, values, written)
    if stage.name in beforehand.BEFOREHAND:
        settings = beforehand.BEFOREHAND[stage.name](settings, folder, values["overwrite"], group)
    return runs.begin(stage, folder, settings, values["overwrite"], group)


def _ask_for(options: list[tuple], values: dict) -> None:
    """Names the options that the user must write."""
    missing = []
    for name, field, _ in options:
        about = field.metadata
        has_meaning = all(values[other] in allowed for other, allowed in about.get("only", {}).items())
        if about.get("missing") and has_meaning and not values[name]:
            missing.append(f"{about['missing']} as {flag(name)}")
    if missing:
        *first, last = missing
        raise click.UsageError("give " + (", ".join(first) + " and " if first else "") + last)


def _settings(stage: type[Stage], values: dict, written: set[str]) -> Settings:
    """The Settings from the options."""
    if values.get("init_from"):
        base = checkpoint.read_config(Path(values["init_from"]))
    else:
        base = PRESETS[values.get("preset", "nano")]
        values["block_size"] = values.get("block_size") or base.block_size
        base = dataclasses.replace(base, block_size=values["block_size"])
    sizes = {name: values[name] for name in stage.sizes if values[name] is not None}
    model, adapter = dataclasses.replace(base, **sizes), None
    if values.get("adapter_folder"):
        adapter = adapters.load_model(values["init_from"], values["adapter_folder"])[0].adapter.config
    elif values.get("adapter"):
        if values["lora_alpha"] is None:
            values["lora_alpha"] = float(values["lora_rank"])
        if values["encoder_hidden"] is None:
            values["encoder_hidden"] = model.n_embd if values["adapter"] == "ptuning" else 0
        adapter = AdapterConfig(**chosen(AdapterConfig, values, stage.unused))
    stage.complete(values, written, model, adapter)
    own = chosen(stage.Settings, values, stage.unused)
    own |= {"model": model, "adapter": adapter, "block_size": values["block_size"]}
    for name, cls in _parts(stage).items():
        if name not in own:
            own[name] = cls(**chosen(cls, values, stage.unused))
    return stage.Settings(**own)
