"""Grades submissions of an exercise: `tinygpt exercise NAME --check FILE`.

The forward, the inputs and the upstream gradients are the project's. A process of its own, `submission.py`,
calls the blank that was filled in. It only ever sends numbers: this process compares them with differences,
and nothing that the other prints, changes or returns can make a wrong number right.

This is no sandbox: a submission can read and write the files of the user who grades it, use the network,
start processes that outlive it, and call the project's own solution.
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

from . import exercises, submission
from .contract import leaves
from .gradcheck import Result, gradcheck

MOST = 1 << 23  # bytes of an answer; that of the largest exercise has a tenth


class SubmissionError(Exception):
    """The submission has no answer; the message says why."""


def grade(name: str, path: Path, limit: float) -> list[Result]:
    """A result for each gradient, or one for what is wrong with the file; `limit` in seconds."""
    calls: list = []
    own = exercises.solution(name)

    def recorded(*arguments):
        calls.append(json.dumps(arguments, default=submission.encode))
        return own(*arguments)

    gradcheck(*pair(name, recorded))  # the calls that a right answer gets
    function = exercises.blank(name)
    try:
        answers = iter(_run(path.resolve(), function, f"[{', '.join(calls)}]", limit))
        results = gradcheck(*pair(name, lambda *arguments: _answer(next(answers, {}), arguments)))
    except Exception as error:  # of the submission, or an answer that cannot be judged
        text = " ".join(str(error).split())[:500] or type(error).__name__
        return [Result(function, "wrong", problem=text)]
    if name in exercises.STEPS:
        return [dataclasses.replace(result, name=result.name.removeprefix("d")) for result in results]
    return results


def pair(name: str, function: Callable) -> tuple:
    """What `gradcheck` takes. Of a step the outputs are the gradients of a weighted sum, by its weights."""
    forward, inputs = (getattr(exercises, f"{name}_{part}") for part in ("forward", "inputs"))
    if (outputs := exercises.STEPS.get(name)) is None:
        return forward, function, inputs

    def weights(rng: np.random.Generator) -> dict:
        values = list(inputs(rng).values())
        shapes = [out.shape for out in exercises.solution(name)(*values)]
        numbers = {n: rng.standard_normal(shape) for n, shape in zip(outputs, shapes, strict=True)}
        return numbers | {"arguments": lambda: copy.deepcopy(values)}

    def weighted(arguments: Callable, **numbers) -> tuple:
        right = exercises.solution(name)(*arguments())
        return sum((w * out).sum() for w, out in zip(numbers.values(), right, strict=True)), arguments

    def outputs_of(dout, arguments: Callable) -> list:
        returned = function(*arguments())
        if not isinstance(returned, tuple | list) or len(returned) != len(outputs):
            raise SubmissionError(f"{exercises.blank(name)} must return {', '.join(outputs)}")
        return [dout * np.asarray(out) for out in returned]

    return weighted, outputs_of, weights


def _answer(answer: dict, arguments: tuple) -> object:
    """What the submission returned for a call; what it wrote into its arguments is written here too."""
    if "error" in answer or "returned" not in answer:
        raise SubmissionError(answer.get("error", "it ended before its last answer"))
    for (_, mine), (_, theirs) in zip(leaves(arguments), leaves(answer["arguments"]), strict=True):
        if isinstance(mine, np.ndarray):
            mine[...] = theirs
    return answer["returned"]


def _run(path: Path, function: str, calls: str, limit: float) -> list[dict]:
    """The answers to the calls, from a process that ends within `limit` seconds."""
    with tempfile.TemporaryFile("w+") as request, tempfile.TemporaryFile() as answers:
        request.write(calls)
        request.seek(0)
        process = subprocess.Popen(
            [sys.executable, submission.__file__, path, function], stdin=request, stdout=answers,
            stderr=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            raise SubmissionError(f"it does not end within {limit:g} s") from None
        finally:
            _end(process)
        answers.seek(0)
        text = answers.read(MOST + 1)
    if not text or len(text) > MOST:
        size = "more than 8 MiB of answers" if text else "no answer"
        raise SubmissionError(f"it ended with {size} (exit status {status})")
    answers = json.loads(text, object_hook=submission.decode, parse_int=float)
    if not (isinstance(answers, list) and all(isinstance(answer, dict) for answer in answers)):
        raise SubmissionError("its answer cannot be read")
    return answers


def _end(process: subprocess.Popen) -> None:
    """Ends the process and those it has started, as far as they are still in its group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError, PermissionError):  # Windows; all have ended
        process.kill()
    process.wait()
