"""The commands that check gradients and measure speed: exercise, gradcheck, bench."""

import contextlib
import dataclasses
import json
import math
import re
import sys
import textwrap
import traceback
from pathlib import Path

import click

from ..check import bench as benchmarks
from ..check import course, exercises, targets
from ..check.contract import AdviceError
from ..check.gradcheck import Result
from ..check.gradcheck import gradcheck as compare
from ..core.config import DTYPES
from ..errors import UserError
from ..lab import texts
from .options import COUNT_OR_0, FILE, MORE_THAN_0, REAL, lang
from .progress import command
from .terminal import say


@click.command()
@click.argument("name", required=False)
@click.option("--out", type=FILE, show_default="my_NAME.py", help="Where to write it.")
@click.option("--check", "submissions", type=FILE, help="Grade a file, or a folder of files.")
@click.option("--time-limit", type=MORE_THAN_0, default=60.0, help="Seconds for each file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: an object for each gradient or file.")
@lang
def exercise(name: str | None, out: Path | None, submissions: Path | None, time_limit: float,
             as_json: bool, language: str) -> None:  # fmt: skip
    """Write a file with a forward pass, a blank for you to fill in, and a hint. Without NAME: list the names.

    --check grades your file, with the forward, the inputs and the seeds of tinygpt. The file runs in a
    separate process. Exit status 0: everything is right. In a folder, each .py file is a submission and gets
    one row.
    """
    again = ["--lang", language] * (language != texts.LANGUAGES[0])
    if name is None:
        if submissions or out:
            raise click.UsageError("name the exercise: tinygpt exercise NAME --check FILE")
        for each, (about, _) in exercises.EXERCISES.items():
            say(f"{each:16} {about if language == 'en' else texts.text(language, f'exercise {each}')}")
        say("\n" + texts.text(language, "exercise next", command=command("exercise", "linear", *again)))
        sys.exit()
    if name not in exercises.EXERCISES:
        raise UserError(f"there is no exercise {name}: choose from {', '.join(exercises.EXERCISES)}")
    if submissions:
        sys.exit(_grade(name, submissions, time_limit, as_json, language))
    out = out or Path(f"my_{name}.py")
    if out.suffix != ".py":
        raise UserError(f"{out}: does not end in .py; name another file")
    if not str(out).isprintable() or '"' in str(out):
        raise UserError(f"{out}: this name cannot stand in the file itself; name another file")
    following = command("exercise", name, "--check", out.as_posix(), *again)
    source = _file(name, following, language)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(source)
    except FileExistsError:
        raise UserError(f"{out}: exists, perhaps with your work; --out names another file") from None
    about = {"out": out, "blank": exercises.blank(name), "command": following}
    say(texts.text(language, "exercise saved", **about))


def _file(name: str, following: str, language: str) -> str:
    """The file of an exercise. In another language than English its docstrings, hint and comments are
    translated too. The rest is code, shapes and formulas."""

    def paragraph(key: str, **values) -> str:
        return texts.fill(texts.text(language, key, **values), 100)

    blank, (function, file) = exercises.blank(name), exercises.EXERCISES[name][1].split(", ")
    kind = "step" if name in exercises.STEPS else "backward"
    lesson = [f"exercise {name}", {}] if language != "en" else exercises.EXERCISES[name][0]
    head = [paragraph("exercise about", name=name, lesson=lesson),
            paragraph(f"exercise {kind}", blank=blank), "    " + following,
            paragraph("exercise compare", file=file, function=function)]  # fmt: skip
    head, source = '"""' + "\n\n".join(head) + '\n"""\n\n', exercises.code(name)
    if language == "en":
        return head + source
    hint = textwrap.indent(paragraph("exercise hint", hint=[f"exercise {name}, hint", {}]), "    ")
    source = re.sub(r"    Hint: .*?(?=\n    \"{3})", lambda _: hint, source, flags=re.S)
    if (key := f"exercise {name}, forward") in texts.texts():  # others are a formula
        about = textwrap.indent(f'"""{paragraph(key)}\n"""', "    ")
        source = re.sub(rf'(def {name}_forward.*?:\n)    "{{3}}.*?"{{3}}', rf"\1{about}", source, flags=re.S)
    names = re.search("# write (.*) here", source)[1].replace(" and ", ", ")
    source = re.sub("(?<=# )write .* here", texts.text(language, "exercise write", names=names), source)
    for key, pair in texts.texts().items():
        source = source.replace(pair["en"], pair[language]) if key.startswith("code ") else source
    return head + source


def _grade(name: str, path: Path, limit: float, as_json: bool, language: str) -> bool:
    """Grades a file or a folder of files. True if one of them is wrong. JSON is English."""
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: there is no .py file in it")
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    rows = []
    for file in files:
        results = course.grade(name, file, limit)
        worst = max(results, key=Result.badness)
        ok = all(result.ok for result in results)
        if path.is_dir():
            rows.append({"file": str(file.relative_to(path)), "ok": ok, "gradients": [*map(_row, results)]})
            row = str(file.relative_to(path)).replace("\n", "\\n")
            text = f"{'ok' if ok else 'WRONG':6} {row}" + f"  {worst}" * (not ok)
        else:
            rows += map(_row, results)
            text = "\n".join(map(_text, results))
        if not as_json:
            say("\n".join(texts.translated(language, line) for line in text.splitlines()))
    if as_json:
        say(json.dumps(rows, indent=1))
    return not all(row["ok"] for row in rows)


def _text(result: Result, where: str = "") -> str:
    word = result.verdict if result.ok else result.verdict.upper()
    return "\n".join([f"{word:6} {where}{result}", *result.lines()])


def _row(result: Result) -> dict:
    """A result for JSON. JSON has no infinity."""
    row = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    row["ok"] = result.ok
    return {n: None if isinstance(x, float) and not math.isfinite(x) else x for n, x in row.items()}


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

    MODULE:NAME or FILE.py:NAME is your own code: NAME_forward and NAME_backward, with inputs from
    NAME_inputs(rng) or --shape; or an object with forward, backward, params and grads. Without it, every
    operation and the whole model of tinygpt is checked, in each backend.

    A gradient is ok, WRONG, MISSING (backward returns None for it) or NOT JUDGED (the differences are too
    uncertain). Exit status 1: a gradient is wrong or missing. In JSON, ok is null for a gradient that is
    neither right nor a failure.
    """
    rows, failing = [], {"wrong", "not judged" * strict, "missing" * (not allow_missing)}
    if target is None:
        if shapes:
            raise click.UsageError("--shape is for your own code: name it, as in mymodule:layernorm")
        checks = targets.check_project(rtol or 1e-7, atol, seed)
    else:
        try:
            with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
                checks = _check_own(target, shapes, rtol or 1e-6, atol, seed)
        except UserError as error:
            if as_json:
                say(json.dumps([_row(Result(target, "wrong", problem=str(error)))], indent=1))
            if not isinstance(error, AdviceError):
                raise
            say(f"tinygpt: {error}", err=True)
            sys.exit(2)
    for name, backend, result in checks:
        if not as_json:
            say(_text(result, f"{backend:6} {name:23} " * (target is None)))
        ok = None if result.verdict not in ("ok", *failing) else result.ok
        rows.append(_row(result) | {"name": name, "backend": backend, "ok": ok})
    if as_json:
        say(json.dumps(rows, indent=1))
    sys.exit(any(row["verdict"] in failing for row in rows))


def _check_own(target: str, shapes: dict, rtol: float, atol: float, seed: int) -> list[tuple]:
    """Name, "user" and result of each gradient. An exception of the user's code becomes one line."""
    try:
        arguments = targets.find(target, shapes)
        results = compare(*arguments, rtol=rtol, atol=atol, seed=seed)
        return [(result.name, "user", result) for result in results]
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
@click.option("--seconds", default=5.0, type=MORE_THAN_0, help="Seconds for each job.")
@click.option("--quick", is_flag=True, help="A fraction of a second for each number: does it run?")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects, one for each row.")
@click.option("--plot", type=FILE, help="Draw the results of scaling.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32",
              help="Number format of the operands of linear maps; weights and sums stay float32.")
def bench(
    jobs: tuple[str, ...], seconds: float, quick: bool, as_json: bool, plot: Path | None, dtype: str
) -> None:
    """Measure speed, the peak of this machine, and the share of the peak.

    A JOB is peak, gemm, train/SIZE, lora/SIZE, rlhf/small, generate/SIZE/BATCH, numpy/nano or scaling.
    Examples: train/nano, generate/small/64. Without a JOB, all run except scaling and the jobs of GPT-2 124M.
    A time is the median of a training step, or of one token for each prompt.
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
