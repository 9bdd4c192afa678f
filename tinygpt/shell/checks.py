"""The commands that check gradients and measure speed: exercise, gradcheck, bench."""

import contextlib
import json
import math
import sys
import traceback
from pathlib import Path

import click

from ..check import bench as benchmarks
from ..check import exercises, targets
from ..check.gradcheck import gradcheck as compare
from ..core.config import DTYPES
from ..errors import UserError
from .options import COUNT_OR_0, FILE, MORE_THAN_0, REAL
from .progress import command
from .terminal import say


@click.command()
@click.argument("name", required=False)
@click.option("--out", type=FILE, show_default="my_NAME.py", help="Where to write it.")
def exercise(name: str | None, out: Path | None) -> None:
    """Write a file with a forward pass, a blank backward for you to fill in, and a hint.

    `tinygpt gradcheck` then says whether your gradients are right. Without a NAME: list the exercises.
    """
    if name is None:
        for known, about in exercises.EXERCISES.items():
            say(f"{known:16} {about}")
        say(f"\nNext: {command('exercise', 'linear')}")
        sys.exit()
    if name not in exercises.EXERCISES:
        raise UserError(f"there is no exercise {name}: known are {', '.join(exercises.EXERCISES)}")
    out = out or Path(f"my_{name}.py")
    if out.suffix != ".py":
        raise UserError(f"{out}: does not end in .py, by which gradcheck finds it; name another file")
    if not str(out).isprintable() or '"' in str(out):
        raise UserError(f"{out}: this name cannot stand in the file itself; name another file")
    following = command("gradcheck", f"{out.as_posix()}:{name}")
    text = exercises.text(name, following)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{out}: exists, with work of yours perhaps; --out names another file") from None
    say(f"Saved {out}. Fill in {name}_backward. Next: {following}")


def _shapes(ctx: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict:
    shapes = {}
    for value in values:
        name, _, sizes = value.partition("=")
        if not name or not all(size.strip().isdecimal() and int(size) for size in sizes.split(",")):
            raise click.BadParameter(f"{value!r} is not name=sizes, such as x=4,8")
        if name in shapes:
            raise click.BadParameter(f"{name} has two shapes")
        shapes[name] = tuple(map(int, sizes.split(",")))
    return shapes


@click.command()
@click.argument("target", required=False, metavar="[MODULE:NAME]")
@click.option("--shape", "shapes", multiple=True, callback=_shapes, help="An input's shape, x=4,8; repeat.")
@click.option("--rtol", "--tol", type=MORE_THAN_0,
              help="Relative error that passes.  [default: 1e-6; 1e-7 for tinygpt itself]")  # fmt: skip
@click.option("--atol", type=REAL, default=0.0, help="Absolute error that passes.")
@click.option("--seed", type=COUNT_OR_0, default=0, help="Of inputs, upstream gradients, directions.")
@click.option("--strict", is_flag=True, help="Exit status 1 if a gradient could not be judged, too.")
@click.option("--allow-missing", is_flag=True, help="Exit status 0 if backward leaves out a gradient.")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects, one for each gradient.")
def gradcheck(target: str | None, shapes: dict, rtol: float | None, atol: float, seed: int, strict: bool,
              allow_missing: bool, as_json: bool) -> None:  # fmt: skip
    """Compare hand-written gradients with finite differences.

    Of your own code: MODULE:NAME, or FILE.py:NAME, stands for NAME_forward and NAME_backward with inputs
    from NAME_inputs(rng) or --shape, or for an object with forward, backward, params and grads. Without it:
    of every operation and the whole model of tinygpt, in each backend.

    A gradient is ok, WRONG, MISSING (backward returns None for it) or NOT JUDGED (the differences are too
    uncertain to say). Exit status 1 if one is wrong or missing. In JSON, ok is null for what is neither right
    nor a failure.
    """
    if target is None:
        if shapes:
            raise click.UsageError("--shape is for your own code: say which, as in mymodule:layernorm")
        checks = targets.check_project(rtol or 1e-7, atol, seed)
    else:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            checks = _check_own(target, shapes, rtol or 1e-6, atol, seed)
    rows, failing = [], {"wrong", "not judged" * strict, "missing" * (not allow_missing)}
    for name, backend, result in checks:
        word = result.verdict if result.ok else result.verdict.upper()
        if not as_json:
            say(f"{word:6} {backend:6} {name:23} {result}" if target is None else f"{word:6} {result}")
            for note in result.notes:
                say(f"note   {note}")
        rel_err = result.rel_err if math.isfinite(result.rel_err) else None  # JSON has no infinity
        ok = None if result.verdict not in ("ok", *failing) else result.ok
        rows.append({"name": name, "backend": backend, "rel_err": rel_err, "ok": ok})
        rows[-1] |= {"verdict": result.verdict, "problem": result.problem, "notes": result.notes}
    if as_json:
        say(json.dumps(rows, indent=1))
    sys.exit(any(row["verdict"] in failing for row in rows))


def _check_own(target: str, shapes: dict, rtol: float, atol: float, seed: int) -> list[tuple]:
    """Name, "user" and result of each gradient; what the user's code raises is reported in one line."""
    try:
        pair = targets.find(target, shapes)
        return [(result.name, "user", result) for result in compare(*pair, rtol, atol, seed=seed)]
    except targets.MissingInputsError as error:
        say(f"tinygpt: {error}: {error.remedy}", err=True)
        sys.exit(2)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        module = sys.modules.get(Path(target.rpartition(":")[0]).name.removesuffix(".py"))
        frames = traceback.extract_tb(error.__traceback__)
        frame = ([f for f in frames if f.filename == getattr(module, "__file__", None)] or frames)[-1]
        where = f"{frame.filename}, line {frame.lineno}, in {frame.name}"
        raise UserError(f"{target} raised {type(error).__name__}: {error} ({where})") from error


@click.command()
@click.argument("jobs", nargs=-1, metavar="[JOB]...")
@click.option("--seconds", default=5.0, type=MORE_THAN_0, help="For each job.")
@click.option("--quick", is_flag=True, help="A fraction of a second for each figure: does it run?")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects, one for each row.")
@click.option("--plot", type=FILE, help="Draw what scaling found.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", help="Of what linear maps multiply.")
def bench(
    jobs: tuple[str, ...], seconds: float, quick: bool, as_json: bool, plot: Path | None, dtype: str
) -> None:
    """Measure speed, and the share of what this machine can do at most, which is measured too.

    A JOB is peak, gemm, train/SIZE, lora/SIZE, rlhf/small, generate/SIZE/BATCH, numpy/nano or scaling, such
    as train/nano or generate/small/64; without one, all but scaling and those of GPT-2 124M. A time is the
    median of a training step, or of a token for each prompt.
    """
    rows, draw = [], benchmarks.plotter(plot, jobs) if plot else None
    for row in benchmarks.run(list(jobs), 0.2 if quick else seconds, dtype):
        cells = ["" if value is None else f"{value:,}" for name, value in row.items() if name != "job"]
        if not as_json:
            if not rows:
                say(f"{'':21}" + "".join(f"{name:>19}" for name in row if name != "job"))
            say(f"{row['job']:21}" + "".join(f"{cell:>19}" for cell in cells))
        rows.append(row)
    if as_json:
        say(json.dumps(rows, indent=1))
    if plot:
        draw(rows)
        say(f"Drawn in {plot}.", err=True)
