"""Which world the word "world" and a model's folder mean."""

import contextlib
from pathlib import Path

from ..errors import UserError
from ..folders import checkpoint
from ..world.corpus import is_source
from . import registry


def name_world(values: dict, names: list[str], base: str | None) -> None:
    """Puts in the place of "world" the world that the base was trained on, or the folder of that name, or the
    world of --seed."""
    if any("world" in values[name] for name in names):
        usual = "world" if Path("world").exists() else f"world:{values['seed']}"
        source = (world_of(Path(base)) if base else None) or usual
        for name in names:
            values[name] = tuple(source if path == "world" else path for path in values[name])


def world_of(folder: Path, wanted: str = "") -> str | None:
    """The world that a model was trained on, or None. wanted: what to ask the user for instead of None."""
    from ..lab import story

    source, before, seen = None, folder, set()
    while before and source is None and (at := Path(before).resolve()) not in seen:
        seen.add(at)  # a model that was tuned on files has a base, which may be itself as it was before
        sources, before = (), ""
        for stage in registry.STAGES:
            with contextlib.suppress(UserError):
                settings, _ = checkpoint.read_run(at, stage.Settings)
                sources, before = settings.data, settings.init_from
        source = next(filter(is_source, sources), None) or story.world_of(at)
    if wanted and source is None:
        raise UserError(f"{folder}: was trained on no world: give {wanted} as --data FILE")
    return source
