"""The exercises: their forwards are the project's, its backwards solve them, and mistakes are named.

A solution, or a mistake, is put in place of the blank below it in the file, where Python takes the last one.
"""

import ast
import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import tinygpt
from tinygpt.check import exercises
from tinygpt.check.contract import is_float
from tinygpt.check.exercises import EXERCISES
from tinygpt.core import ops
from tinygpt.core.config import GPTConfig
from tinygpt.core.model import GPT
from tinygpt.shell.cli import main
from tinygpt.stages import rlhf, variants
from tinygpt.stages.adapter import AdapterConfig


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield lambda *args: CliRunner().invoke(main, args)
    for name in EXERCISES:
        sys.modules.pop(f"my_{name}", None)


def inputs(name):
    return getattr(exercises, f"{name}_inputs")(np.random.default_rng(0))


def check(run, name, backward):
    """What `tinygpt gradcheck` says of an exercise that is filled in with `backward`."""
    assert run("exercise", name).exit_code == 0
    with Path(f"my_{name}.py").open("a", encoding="utf-8") as file:
        file.write(f"\n\nfrom {backward.__module__} import {backward.__name__} as {name}_backward\n")
    return run("gradcheck", f"my_{name}:{name}")


# --- what the project has of each --------------------------------------------------------------------------


def lora_op(x, w, A, B, alpha):
    """x times the weight that the project merges from the same w, A and B."""
    config = AdapterConfig("lora", rank=len(B), alpha=alpha, targets=("attn.c_attn",))
    model = GPT(GPTConfig(3, block_size=2, n_layer=1, n_head=1, n_embd=len(w)), dtype=np.float64, ops=ops)
    model, name = variants.beside(model, config), "h.0.attn.c_attn"
    model.params[f"{name}.weight"][:] = w
    model.adapter.params[f"{name}.lora_A"][:] = A.T
    model.adapter.params[f"{name}.lora_B"][:] = B
    return ops.linear_forward(x, variants.merge(model).params[f"{name}.weight"])


def lora_backward(dout, cache):
    x, w, A, B, low, s = cache
    dlow, dB, _ = ops.linear_backward(s * dout, (low, B), db=False)
    dx, dA, _ = ops.linear_backward(dlow, (x, A), db=False)
    dx, _, _ = ops.linear_backward(dout, (x, w), dw=False, db=False, add=dx)
    return dx, dA, dB


def policy_gradient_op(logits, ids, advantages):
    nll, _ = ops.cross_entropy_forward(logits, ids)
    return rlhf.policy_gradient(-nll, np.ones(ids.shape), advantages[:, None])


def policy_gradient_backward(dloss, cache):
    logp, ids, advantages = cache
    nll, c_nll = ops.cross_entropy_forward(logp, ids)
    _, d = rlhf.policy_gradient(-nll, np.ones(ids.shape), advantages[:, None])
    return ops.cross_entropy_backward(-dloss * d, c_nll)


OPS = {"lora": lora_op, "policy_gradient": policy_gradient_op}
SOLUTIONS = {"lora": lora_backward, "policy_gradient": policy_gradient_backward}
for name in EXERCISES.keys() - OPS:
    OPS[name], SOLUTIONS[name] = getattr(ops, f"{name}_forward"), getattr(ops, f"{name}_backward")


@pytest.mark.parametrize("name", EXERCISES)
def test_the_forward_is_the_projects(name):
    """Guards: an exercise that drifts from the textbook."""
    out, _ = getattr(exercises, f"{name}_forward")(**inputs(name))
    np.testing.assert_allclose(out, OPS[name](**inputs(name))[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_is_accepted(run, name):
    """Guards: an exercise that cannot be solved, or that announces other gradients than are asked for."""
    result = check(run, name, SOLUTIONS[name])
    assert result.exit_code == 0, result.output
    grads = [f"d{n}" for n, x in inputs(name).items() if is_float(x)]
    assert [line.split(":")[0] for line in result.output.splitlines()] == [f"ok     {d}" for d in grads]
    blank = inspect.getsource(getattr(exercises, f"{name}_backward"))
    first_line = blank.split(" -> ")[1].splitlines()[0]
    assert re.findall(r"\b(d\w+) \(", first_line) == grads
    assert re.findall(r"\bd\w+", re.search(r"write (.*) here", blank)[1]) == grads


@pytest.mark.parametrize("name", EXERCISES)
def test_the_blank_is_refused(run, name):
    """Guards: a file that needs more than NumPy, or whose blank fails before it says what is missing."""
    run("exercise", name)
    source = Path(f"my_{name}.py").read_text(encoding="utf-8")
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in imports] == ["import numpy as np"]
    assert f"    tinygpt gradcheck my_{name}.py:{name}\n" in ast.get_docstring(ast.parse(source), clean=False)
    assert max(map(len, source.splitlines())) <= 110
    result = run("gradcheck", f"my_{name}.py:{name}")
    assert result.exit_code == 2 and not result.stdout and result.stderr.count("\n") == 1
    assert re.search(rf"write d.* here \(.*my_{name}\.py, line \d+, in {name}_backward", result.stderr)


def test_a_solution_stands_where_the_file_says():
    """Guards: a reader who is sent to a function that was renamed."""
    for name in EXERCISES:
        function, file = re.search(r"(\w+) in tinygpt/(\S+\.py)", exercises.text(name, "")).groups()
        source = (Path(tinygpt.__file__).parent / file).read_text(encoding="utf-8")
        assert f"def {function}(" in source


# --- typical mistakes --------------------------------------------------------------------------------------


def a_mean_over_the_rows(dout, cache):
    dx, dw, db = ops.linear_backward(dout, cache)
    return dx, dw, db / len(dout)


def statistics_as_constants(dout, cache):
    x, g, mean, rstd = cache
    return rstd * dout * g, *ops.layernorm_backward(dout, cache)[1:]


def no_onehot(dnll, cache):
    return ops.cross_entropy_backward(dnll, cache) + dnll[..., None] * (cache[1][..., None] == np.arange(5))


def a_transpose_lacks(dout, cache):
    q, k, v, P = cache
    dq, dk, dv = ops.attention_backward(dout, cache)
    return dq, dk, exercises.attention_merge(P @ exercises.attention_split(dout, P.shape[1]))


def a_frozen_map_passes_nothing(dout, cache):
    x, w, *more = cache
    return lora_backward(dout, (x, 0 * w, *more))


def no_scale(dout, cache):
    dx, dA, dB = lora_backward(dout, cache)
    return dx, dA, dB / cache[-1]


def tokens_averaged(dloss, cache):
    return policy_gradient_backward(dloss, cache) / cache[1].shape[1]


def no_advantages(dloss, cache):
    logp, ids, advantages = cache
    return policy_gradient_backward(dloss, (logp, ids, np.ones_like(advantages)))


@pytest.mark.parametrize("name, mistake, wrong", [
    ("linear", a_mean_over_the_rows, "db"),
    ("layernorm", statistics_as_constants, "dx"),
    ("cross_entropy", no_onehot, "dlogits"),
    ("attention", a_transpose_lacks, "dv"),
    ("lora", a_frozen_map_passes_nothing, "dx"),
    ("lora", no_scale, "dB"),
    ("policy_gradient", tokens_averaged, "dlogits"),
    ("policy_gradient", no_advantages, "dlogits"),
])  # fmt: skip
def test_a_mistake_is_named(run, name, mistake, wrong):
    """Guards: inputs at which a mistake does not show, such as a scale of 1 or advantages that are equal."""
    result = check(run, name, mistake)
    assert result.exit_code == 1
    bad = [line for line in result.output.splitlines() if line.startswith("WRONG")]
    assert len(bad) == 1 and re.match(rf"WRONG  {wrong}: relative error .* at \[[\d, ]+\]: backward", bad[0])


# --- the command -------------------------------------------------------------------------------------------


def test_the_exercises_are_listed(run):
    """Guards: one that is there and not shown, or a file written by a mere look."""
    result = run("exercise")
    assert result.exit_code == 0 and not list(Path().iterdir())
    listed = result.stdout.split("\n\n")[0].splitlines()
    assert [line.split(maxsplit=1) for line in listed] == [list(row) for row in EXERCISES.items()]
    least = {"linear", "cross_entropy", "gelu", "layernorm", "attention", "lora", "policy_gradient"}
    assert least <= EXERCISES.keys()


def test_what_is_printed_checks_the_file(run):
    """Guards: a command that is not the file's, in another folder too."""
    Path("some where").mkdir()
    result = run("exercise", "gelu", "--out", "some where/my_gelu.py")
    assert result.stdout.endswith("Next: tinygpt gradcheck 'some where/my_gelu.py:gelu'\n")
    assert "write dx here" in run("gradcheck", "some where/my_gelu.py:gelu").stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("gleu",), "there is no exercise gleu: known are linear, gelu, layernorm, "),
        (("gelu",), "my_gelu.py: exists, with work of yours perhaps; --out names another file"),
        (("gelu", "--out", "mine"), "mine: does not end in .py"),
        (("gelu", "--out", "nowhere/mine.py"), "nowhere/mine.py: No such file"),
    ],
)
def test_a_mistake_is_one_line_and_loses_nothing(run, args, says):
    """Guards: an afternoon's work replaced by the blank."""
    Path("my_gelu.py").write_text("mine", encoding="utf-8")
    result = run("exercise", *args)
    assert result.exit_code == 2 and not result.stdout
    assert result.stderr.count("\n") == 1 and says in result.stderr
    assert [path.name for path in Path().iterdir()] == ["my_gelu.py"]
    assert Path("my_gelu.py").read_text(encoding="utf-8") == "mine"
