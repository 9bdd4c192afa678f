"""The command line: one command per stage. Only this file and the demos parse arguments or print."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import click

from . import __version__
from .errors import UserError


class Commands(click.Group):
    """Turns a user's mistake into one line and exit status 2."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except (UserError, OSError) as error:
            click.echo(f"tinygpt: {_one_line(error)}", err=True)
            sys.exit(2)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__)
def main() -> None:
    """A GPT's whole life on one CPU: train it, tune it, prompt it, and check its every gradient."""


# --- tinygpt pretrain ------------------------------------------------------------------------------------------


# --- tinygpt generate, tinygpt chat ----------------------------------------------------------------------------


def _sampling(max_new_tokens: int, stop: str):
    """The arguments that generate and chat share; the two defaults in which they differ."""
    options = (
        click.argument("folder", type=click.Path(path_type=Path)),
        click.option("--max-new-tokens", default=max_new_tokens, type=click.IntRange(0), help="The length."),
        click.option("--temperature", default=0.8, type=click.FloatRange(0), help="0: greedy."),
        click.option("--top-k", default=0, type=click.IntRange(0), help="Only the K likeliest; 0: all."),
        click.option("--top-p", default=1.0, type=click.FloatRange(0, 1, min_open=True),
                     help="Only the likeliest tokens that have this probability together; 1: all."),
        click.option("--stop", default=stop, show_default=repr(stop) if stop else "none", metavar="TEXT",
                     help="End before this text."),
        click.option("--seed", default=1337, type=click.IntRange(0), help="The same seed, the same text."),
    )  # fmt: skip
    return lambda command: functools.reduce(lambda wrapped, option: option(wrapped), options[::-1], command)


def _speaker(folder: Path, max_new_tokens: int, stop: str, seed: int, **sampling):
    """The model, the tokenizer, and a function from a prompt's ids to its continuation, piece by piece."""
    import numpy as np

    from . import checkpoint
    from .generate import stream, until

    warnings.showwarning = lambda message, *_: click.echo(f"tinygpt: {message}", err=True)
    model, tokenizer = checkpoint.load(folder)
    sampling["rng"] = np.random.default_rng(seed)

    def continuation(ids: np.ndarray) -> Iterable[str]:
        return until(stream(model, tokenizer, ids, max_new_tokens, **sampling), stop)

    return model, tokenizer, continuation


def _from_stdin(read: Callable[[], str]) -> str:
    try:
        return read()
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8 text") from None


@main.command()
@_sampling(max_new_tokens=200, stop="")
@click.option("--prompt", default="", help="The text to go on from; - reads standard input.")
@click.option("--num-samples", default=1, type=click.IntRange(1), help="How many, a line of dashes between.")
def generate(prompt: str, num_samples: int, **options) -> None:
    """Let the model in FOLDER (tinygpt's, or GPT-2 as downloaded from the hub) continue a text.

    Prints the prompt and its continuation as it comes. Without a prompt the model begins a text.
    """
    from .generate import encode_prompt

    _, tokenizer, continuation = _speaker(**options)
    if prompt == "-":
        prompt = _from_stdin(sys.stdin.read).removesuffix("\n")
    ids = encode_prompt(tokenizer, prompt)
    for n in range(num_samples):
        click.echo("-" * 15 + "\n" + prompt if n else prompt, nl=False)
        for piece in continuation(ids):
            click.echo(piece, nl=False)
        click.echo()


@main.command()
@_sampling(max_new_tokens=200, stop="\n\n")
def chat(**options) -> None:
    """Talk with the model in FOLDER, line by line; Ctrl-D ends it.

    The model continues the conversation as plain text. What no longer fits its context is forgotten.
    """
    import numpy as np

    model, tokenizer, continuation = _speaker(**options)
    context, person = np.zeros(0, np.int32), sys.stdin.isatty()
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            line = _from_stdin(lambda: input("> " if person else ""))
            try:
                asked = tokenizer.encode(line + "\n")
            except UserError as error:
                if not person:
                    raise
                click.echo(f"tinygpt: {_one_line(error)}", err=True)  # a slip does not end the conversation
                continue
            context = np.concatenate([context, asked])[-max(model.config.block_size, len(asked)) :]
            answer = ""
            for piece in continuation(context):
                click.echo(piece, nl=False)
                answer += piece
            click.echo()
            context = np.concatenate([context, tokenizer.encode(answer + (options["stop"] or "\n"))])
    if person:
        click.echo()


# --- tinygpt tokenizer -----------------------------------------------------------------------------------------


# --- tinygpt gradcheck -----------------------------------------------------------------------------------------


def _shapes(ctx: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict:
    shapes = {}
    for value in values:
        name, _, sizes = value.partition("=")
        if not name or not all(size.strip().isdecimal() for size in sizes.split(",")):
            raise click.BadParameter(f"{value!r} is not name=sizes, such as x=4,8")
        shapes[name] = tuple(map(int, sizes.split(",")))
    return shapes


@main.command()
@click.argument("target", required=False, metavar="[MODULE:NAME]")
@click.option("--shape", "shapes", multiple=True, callback=_shapes, help="An input's shape, x=4,8; repeat.")
@click.option("--tol", type=click.FloatRange(0, min_open=True), help="The largest relative error that passes; "
              "1e-6 for your code and 1e-7 for tinygpt's own, if not given.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, help="Of inputs, upstream gradients, directions.")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects: name, backend, rel_err, ok.")
def gradcheck(target: str | None, shapes: dict, tol: float | None, seed: int, as_json: bool) -> None:
    """Compare hand-written gradients with finite differences.

    Of your own code: MODULE:NAME, or FILE.py:NAME, stands for NAME_forward and NAME_backward with inputs from
    NAME_inputs(rng) or --shape, or for an object with forward, backward, params and grads. Without it: of every
    operation and the whole model of tinygpt, in each backend. Exit status 1 if a gradient is wrong.
    """
    from . import gradcheck_targets as targets

    if target is None:
        if shapes:
            raise click.UsageError("--shape is for your own code: say which, as in mymodule:layernorm")
        found = targets.check_project(tol or 1e-7, seed)
    else:
        found = _check_own(target, shapes, tol or 1e-6, seed)
    rows = []
    for name, backend, result in found:
        if not as_json:
            ok = "ok" if result.ok else "WRONG"
            click.echo(f"{ok:6} {backend:6} {name:23} {result}" if target is None else f"{ok:6} {result}")
        rel_err = result.rel_err if math.isfinite(result.rel_err) else None  # JSON has no infinity
        rows.append({"name": name, "backend": backend, "rel_err": rel_err, "ok": result.ok})
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    sys.exit(not all(row["ok"] for row in rows))


def _check_own(target: str, shapes: dict, tol: float, seed: int) -> list[tuple]:
    """Name, "user" and result of each gradient; what the user's code raises is reported in one line."""
    import numpy as np

    from . import gradcheck_targets as targets
    from .gradcheck import gradcheck

    try:
        pair = targets.find(target, shapes, np.random.default_rng(seed))
        return [(result.name, "user", result) for result in gradcheck(*pair, tol, seed=seed)]
    except targets.MissingInputsError as error:
        click.echo(f"tinygpt: {error}: {error.remedy}", err=True)
        sys.exit(2)
    except UserError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename}, line {frame.lineno}, in {frame.name}"
        raise UserError(f"{target} raised {type(error).__name__}: {error} ({where})") from error
