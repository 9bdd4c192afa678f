"""Options of commands. The fields of dataclasses (`core.option`) define most options and their checks."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import click
from click.core import ParameterSource

from ..core.config import DTYPES
from ..core.option import inside
from ..errors import UserError
from ..lab import texts
from .terminal import say


class Number(click.ParamType):
    """An int or a float in an interval such as "[0, 1)". `core.option` has the text of the error."""

    def __init__(self, kind: type, interval: str) -> None:
        self.kind, self.interval, self.name = kind, interval, "n" if kind is int else "x"

    def convert(self, value, param, ctx):
        number = (click.INT if self.kind is int else click.FLOAT).convert(value, param, ctx)
        right, rule = inside(number, self.interval)
        if not right:
            raise UserError(f"{_name(param)} is {number}: it must be {rule}")
        return number


def _name(param: click.Parameter) -> str:
    return max(param.opts, key=len)


COUNT, COUNT_OR_0 = Number(int, "[1, inf)"), Number(int, "[0, inf)")
REAL, MORE_THAN_0 = Number(float, "[0, inf)"), Number(float, "(0, inf)")


class PathType(click.Path):
    """A path, which --help calls `name`. Refuses an empty text, for example of an unset shell variable."""

    def __init__(self, name: str, path_type: type = Path) -> None:
        super().__init__(path_type=path_type)
        self.name = name

    def convert(self, value, param, ctx):
        if not str(value):
            raise UserError(f"{_name(param)} is an empty text: give a path")
        return super().convert(value, param, ctx)


PATH, FOLDER, FILE = map(PathType, ("path", "folder", "file"))
DATA = PathType("path", str)  # a file, a folder, or a world such as world:7


def together(options: Iterable[Callable]) -> Callable:
    """One decorator from several, in the order in which --help lists them."""
    options = list(options)[::-1]
    return lambda command: functools.reduce(lambda wrapped, option: option(wrapped), options, command)


def out(default: str, what: str = "model", holds: str = "the model") -> Callable:
    return together([
        click.option("--out", default=default, type=PATH, help=f"Folder for {holds}."),
        click.option("--overwrite", is_flag=True, help=f"Replace the {what} that is there."),
    ])  # fmt: skip


adapter_folder_option = click.option(
    "--adapter-folder", type=FOLDER, help="An adapter that was trained beside this model."
)


def sampling(stop: str | None, shown: str, temperature: str = "0.8", required: bool = True):
    """The arguments that generate and chat share."""
    return together([
        click.argument("folder", type=FOLDER, required=required),
        adapter_folder_option,
        click.option("--max-new-tokens", default=200, type=COUNT_OR_0, help="The length."),
        click.option("--temperature", default=0.8, type=REAL, help="0: greedy.", show_default=temperature),
        click.option("--top-k", default=0, type=COUNT_OR_0, help="Only the K likeliest; 0: all."),
        click.option("--top-p", default=1.0, type=Number(float, "(0, 1]"),
                     help="Only the likeliest tokens, up to this sum of probabilities; 1: all."),
        click.option("--stop", default=stop, show_default=shown, metavar="TEXT", help="End before TEXT."),
        click.option("--seed", default=1337, type=COUNT_OR_0, help="The same seed, the same text."),
        click.option("--dtype", default="float32", type=click.Choice(DTYPES),
                     help="Number format of the operands of linear maps; weights and sums stay float32. With "
                          "bfloat16, weights are read from a packed copy: half of the memory traffic."),
    ])  # fmt: skip


def check_out(out: Path, name: str = "", what: str = "", overwrite: bool = False) -> None:
    """Refuses an `out` that is a file, and without --overwrite a folder that has the file `name`."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out names a folder")
    if name and (out / name).exists() and not overwrite:
        raise UserError(f"{out}: has a {what}; --overwrite replaces it, --out names another folder")


def lang(command: Callable) -> Callable:
    """Adds the option --lang, as the argument `language`. Without the option, a user whose locale is Korean
    gets one line that names the option, where the command has Korean texts."""

    def language(ctx: click.Context, option: click.Parameter, value: str | None) -> str:
        options = ctx.params  # click reads the options on the command line first
        has_no_story = ctx.info_name == "chat" and not options.get("story_folder")
        is_english = has_no_story or bool(options.get("as_json"))
        locale = texts.language_of(os.environ)
        if value is None and not is_english and locale != texts.LANGUAGES[0]:
            say(texts.text(locale, "language"), err=True)
        return value or texts.LANGUAGES[0]

    kind, usual = click.Choice(texts.LANGUAGES), texts.LANGUAGES[0]
    return click.option("--lang", "language", type=kind, show_default=usual, callback=language,
                        help="en: English; ko: 한국어.")(command)  # fmt: skip


def written_options() -> set[str]:
    """The names of the options on the user's command line."""
    ctx = click.get_current_context()
    return {name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}


def refuse(names: set[str], reason: str) -> None:
    if names:
        raise click.UsageError(f"{reason}: leave out {', '.join(sorted(map(flag, names)))}")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# --- options from dataclasses -------------------------------------------------------------------------------


def fields(cls: type, leave_out: Iterable[str] = ()) -> Iterator[tuple[str, dataclasses.Field, object]]:
    """(option's name, field, type) of each field of a dataclass that is an option."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = field.metadata.get("name", field.name)
        if field.metadata.get("help") and name not in leave_out:
            yield name, field, hints[field.name]


def from_fields(options: Iterable[tuple], defaults: dict | None = None) -> Iterator[Callable]:
    """The click options of such fields.

    defaults: other defaults than the fields'. For a number, the default may be a text that tells how the
    number depends on other options. Then the value is None, or (), if the user does not write the option.
    """
    for name, field, kind in options:
        default, about = (defaults or {}).get(name, field.default), field.metadata
        if kind is bool:
            how = {"is_flag": True, "flag_value": not default, "default": default, "show_default": False}
            yield click.option(flag(f"no_{name}" if default else name), name, help=about["help"], **how)
            continue
        how = {"metavar": about.get("metavar"), "multiple": bool(get_args(kind))}
        how["show_default"] = default not in ("", None, ())
        shown = default if kind is not str and isinstance(default, str) else about.get("shown")
        if shown:
            how["show_default"], default = shown, () if how["multiple"] else None
        if isinstance(about["allowed"], tuple):
            how["type"] = click.Choice(about["allowed"])
        elif kind in (int, float):
            how["type"] = Number(kind, about["allowed"])
        yield click.option(flag(name), default=default, help=about["help"], **how)


def check(options: Iterable[tuple], values: dict, written: set[str]) -> None:
    """Refuses an option that has no meaning together with the others."""
    reasons: dict[str, set[str]] = {}
    for name, field, _ in options:
        if name in written and (values[name] == "" or values[name] == ("",)):
            raise click.UsageError(f"{flag(name)} is empty")
        for other, allowed in field.metadata.get("only", {}).items() if name in written else ():
            if values[other] not in allowed:
                having = f"{flag(other)} {values[other]}" if values[other] else f"no {flag(other)}"
                reasons.setdefault(f"with {having} there is no such setting", set()).add(name)
        for other in field.metadata.get("alone", ()) if name in written else ():
            if values.get(other):
                reasons.setdefault(f"with {flag(other)} there is no such setting", set()).add(name)
    for reason, names in reasons.items():
        refuse(names, reason)


def chosen(cls: type, values: dict, leave_out: Iterable[str] = ()) -> dict[str, object]:
    """Field -> value, for the fields of a dataclass that have a value in the options."""
    pairs = ((field.name, values.get(name)) for name, field, _ in fields(cls, leave_out))
    return {name: value for name, value in pairs if value is not None and value != ()}
