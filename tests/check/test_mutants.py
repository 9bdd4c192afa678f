"""A sample of the mutants and of the right backwards. `python tests/check/mutants.py` judges all."""

import inspect
import sys

import numpy as np
import pytest
from mutants import false_alarms, judge, judged_elsewhere, mutants, own_pairs, reason, targets

SAMPLE = 25  # mutants of each function


@pytest.mark.parametrize("name", targets())
def test_every_mutant_is_caught(name):
    """Guards: a wrong gradient that passes; a row whose inputs do not show a mistake."""
    made = list(mutants(targets()[name]))
    rng = np.random.default_rng([7, len(made)])
    for n in rng.permutation(len(made))[:SAMPLE]:
        change, mutant = made[n]
        verdict, sentences = judge(name, mutant, seed=int(n) % 20)
        assert verdict != "missed", change
        assert not [sentence for sentence in sentences if sentence.startswith("wrong: ")], change
        assert verdict != "equal" or reason(change) or judged_elsewhere(name), change


@pytest.mark.parametrize("name", [name for name in targets() if not name.startswith("exercise")])
def test_every_line_of_a_backward_runs_in_its_rows(name):
    """Guards: a line of a backward that no row of `tinygpt gradcheck` runs."""
    function, lines = targets()[name], set()

    def trace(frame, event, argument):
        if frame.f_code is function.__code__:
            lines.add(frame.f_lineno)
            return trace
        return None

    for forward, backward, inputs in own_pairs(name, function, 0):
        out, cache = forward(**inputs)
        dout = tuple(map(np.ones_like, out)) if isinstance(out, tuple) else np.ones_like(out)
        tracer = sys.gettrace()
        sys.settrace(trace)
        try:
            backward(dout, cache)
        finally:
            sys.settrace(tracer)
    source, first = inspect.getsourcelines(function)
    code = {line for _, _, line in function.__code__.co_lines() if line is not None and line > first}
    missing = [source[line - first].strip() for line in sorted(code - lines)]
    assert not missing


def test_the_right_backwards_are_no_false_alarm():
    assert not list(false_alarms(range(2), models=False))
