"""The world that the word "world" stands for, and the world of a model's folder."""

import contextlib
from pathlib import Path

from ..errors import UserError
from ..folders import checkpoint
from ..world.corpus import is_source
from . import registry
from .terminal import say


def name_world(values: dict, names: list[str], base: str | None) -> None:
    """Replaces "world" by the world of the base's training, else by a folder of that name, else by the world
    of --seed."""
    if any("world" in values[name] for name in names):
        usual = "world" if Path("world").exists() else f"world:{values['seed']}"
        source = world_of(Path(base)) if base else usual
        if source is None:
            say(f"{base}: no world of its training is there. So --data world is {usual}.", err=True)
            source = usual
        for name in names:
            values[name] = tuple(source if path == "world" else path for path in values[name])


def world_of(folder: Path, wanted: str = "") -> str | None:
    """The world of a model's training, or None.

    wanted: the data that the user has to name if there is no world. Raises UserError then.
    """
    from ..lab import story

    source, before, seen = None, folder, set()
    while before and source is None and (at := Path(before).resolve()) not in seen:
        seen.add(at)  # a model that was tuned on files has a base, perhaps in the same folder
        sources, before = (), ""
        for stage in registry.STAGES:
            with contextlib.suppress(UserError):
                settings, _ = checkpoint.read_run(at, stage.Settings)
                sources, before = settings.data, settings.init_from
        source = next(filter(is_source, sources), None) or story.world_of(at)
    if wanted and source is None:
        raise UserError(f"{folder}: was trained on no world: give {wanted} as --data FILE")
    return source
