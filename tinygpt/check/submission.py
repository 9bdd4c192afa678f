"""Runs a function of a student's file: `python submission.py FILE FUNCTION SECONDS`, started by `course.py`.

Standard input has the arguments of each call, standard output gets the answers, both in JSON. What the
student's code prints goes to standard error. The process may use SECONDS of each processor. Nothing here
decides whether an answer is right.
"""

import contextlib
import importlib.machinery
import importlib.util
import json
import math
import os
import sys
import traceback

import numpy as np


def encode(value: object) -> object:
    """For json.dumps: an array as a dict with its type and shape; a NumPy number as a Python number."""
    if isinstance(value, np.ndarray):
        return {"array": value.ravel().tolist(), "dtype": str(value.dtype), "shape": value.shape}
    return value.item()


def decode(value: dict) -> object:
    """For json.loads: a dict of `encode` as an array. Raises ValueError for one without numbers."""
    if set(value) != {"array", "dtype", "shape"}:
        return value
    if np.dtype(value["dtype"]).kind not in "fiub":
        raise ValueError(f"an array of {value['dtype']}")
    return np.array(value["array"], value["dtype"]).reshape([int(n) for n in value["shape"]])


def main(path: str, function: str, limit: str) -> None:
    with contextlib.suppress(ImportError):  # on Windows there is no limit
        import resource

        # an endless loop must end even when the grader was killed
        seconds = math.ceil(float(limit)) * (os.cpu_count() or 1)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    calls, results = json.load(sys.stdin, object_hook=decode), os.dup(1)
    os.dup2(2, 1)
    sys.path[0] = os.path.dirname(path)
    answers = []
    try:
        loader = importlib.machinery.SourceFileLoader("submission", path)  # a link may lead to any name
        spec = importlib.util.spec_from_file_location("submission", path, loader=loader)
        module = sys.modules["submission"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for arguments in calls:
            returned = getattr(module, function)(*arguments)
            answer = {"returned": returned, "arguments": arguments}
            try:  # now: a later call may write to these arrays
                answers.append(json.dumps(answer, default=encode))
            except Exception as error:
                text = f"{function} returns a value that is no array: {error}"
                answers.append(json.dumps({"error": text}))
                break
    except BaseException as error:  # SystemExit too
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f" (line {frame.lineno})" for frame in frames if frame.filename == path]
        answers.append(json.dumps({"error": f"{type(error).__name__}: {error}" + "".join(lines[-1:])}))
    with open(results, "w", encoding="utf-8") as file:
        file.write(f"[{','.join(answers)}]")
    os._exit(0)  # also with threads that the file has started


if __name__ == "__main__":
    main(*sys.argv[1:])
