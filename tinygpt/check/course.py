"""Grades submissions of an exercise: `tinygpt exercise NAME --check FILE`.

The forward, the inputs and the gradients of the outputs (`dout`) are the project's. Each submission runs in a
process of its own (`submission.py`), which calls the student's function and returns numbers. The grader's
process compares these numbers with finite differences. So no print of a submission, and no change of a
variable, makes a wrong number right.

This is no sandbox. A submission can read and write the grader's files, and use the network. It can start
processes that continue after the grading. It can also call the project's own solution.
"""

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import UserError
from . import exercises, submission
from .contract import is_float, leaves
from .gradcheck import Result, gradcheck

MOST = 1 << 23  # bytes of all answers; those of the largest exercise have a tenth


def grade(name: str, path: Path, limit: float) -> list[Result]:
    """A result for each gradient, or one result with the problem of the file. `limit` is in seconds.

    Two runs of `gradcheck` make the same calls, as they do not depend on the answers. The first records the
    calls. The second gets the submission's answers to these calls.
    """
    calls, function = [], exercises.blank(name)
    _, _, inputs = pair(name, None)
    floats = [x for x in inputs(np.random.default_rng(0)).values() if any(is_float(a) for _, a in leaves(x))]

    def recorded(*arguments):
        calls.append(json.dumps(arguments, default=submission.encode))
        return [0.0 if is_float(x) else None for x in floats]  # any answer that `gradcheck` can judge

    gradcheck(*pair(name, recorded))
    try:
        answers = iter(_run(path.resolve(), function, f"[{', '.join(calls)}]", limit))
        results = gradcheck(*pair(name, lambda *arguments: _answer(next(answers, {}), arguments)))
    except Exception as error:  # the submission failed, or its answers cannot be judged
        text = " ".join(str(error).split())[:500] or type(error).__name__
        return [Result(function, "wrong", problem=text)]
    if name in exercises.STEPS:
        return [dataclasses.replace(result, name=result.name.removeprefix("d")) for result in results]
    return results


def pair(name: str, function: Callable) -> tuple:
    """The arguments of `gradcheck`. For a step, the forward is the weighted sum of the right outputs. So the
    gradients of this sum with respect to its weights are the outputs."""
    forward, inputs = (getattr(exercises, f"{name}_{part}") for part in ("forward", "inputs"))
    if (outputs := exercises.STEPS.get(name)) is None:
        return forward, function, inputs

    def weights(rng: np.random.Generator) -> dict:
        values = list(inputs(rng).values())
        shapes = [out.shape for out in exercises.RIGHT[name](*values)]
        numbers = {n: rng.standard_normal(shape) for n, shape in zip(outputs, shapes, strict=True)}
        return numbers | {"arguments": lambda: copy.deepcopy(values)}

    def weighted(arguments: Callable, **numbers) -> tuple:
        right = exercises.RIGHT[name](*arguments())
        return sum((w * out).sum() for w, out in zip(numbers.values(), right, strict=True)), arguments

    def outputs_of(dout, arguments: Callable) -> list:
        returned = function(*arguments())
        if not isinstance(returned, tuple | list) or len(returned) != len(outputs):
            raise UserError(f"{exercises.blank(name)} must return {', '.join(outputs)}")
        return [dout * np.asarray(out) for out in returned]

    return weighted, outputs_of, weights


def _answer(answer: dict, arguments: tuple) -> object:
    """The submission's result of a call. The arguments get the content that the submission gave its own."""
    if "returned" not in answer:
        raise UserError(answer.get("error", "it ended before its last answer"))
    for (_, mine), (_, theirs) in zip(leaves(arguments), leaves(answer["arguments"]), strict=True):
        if isinstance(mine, np.ndarray):
            mine[...] = theirs
    return answer["returned"]


def _run(path: Path, function: str, calls: str, limit: float) -> list[dict]:
    """The answers to the calls, from a process that ends within `limit` seconds."""
    with tempfile.TemporaryFile() as answers:  # a pipe would stay open in a process that the file starts
        process = subprocess.Popen(
            [sys.executable, submission.__file__, path, function, str(limit)], stdin=subprocess.PIPE,
            stdout=answers, stderr=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        try:
            process.communicate(calls.encode(), limit)
        except subprocess.TimeoutExpired:
            raise UserError(f"it does not end within {limit:g} s") from None
        finally:
            _end(process)
        answers.seek(0)
        text = answers.read(MOST + 1)
    if not text or len(text) > MOST:
        size = "more than 8 MiB of answers" if text else "no answer"
        raise UserError(f"it ended with {size} (exit status {process.returncode})")
    return json.loads(text, object_hook=submission.decode, parse_int=float)


def _end(process: subprocess.Popen) -> None:
    """Ends the process, and the processes that it has started if they are still in its group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError, PermissionError):  # Windows; all have ended
        process.kill()
    process.wait()
