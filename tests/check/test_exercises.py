"""The exercises: the forwards equal the project's, its functions solve them, and messages name mistakes.

A test adds a solution, or a mistake, at the end of the file. Of two functions of one name Python takes the
last one.
"""

import ast
import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from solutions import solution

import tinygpt
from tinygpt.check import exercises
from tinygpt.check.contract import is_float, leaves
from tinygpt.check.exercises import EXERCISES
from tinygpt.core import ops
from tinygpt.core.config import GPTConfig
from tinygpt.core.model import GPT, Pass
from tinygpt.lab import texts
from tinygpt.shell.cli import main
from tinygpt.stages import dpo, rlhf, variants
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


def filled(name, function):
    """The text of an exercise that imports `function` as its blank."""
    blank = exercises.blank(name)
    line = f"\n\nfrom {function.__module__} import {function.__name__} as {blank}\n"
    return exercises.code(name) + line


def check(run, name, function):
    """The result of `tinygpt exercise NAME --check` for an exercise with `function` as its blank."""
    Path(f"my_{name}.py").write_text(filled(name, function), encoding="utf-8")
    return run("exercise", name, "--check", f"my_{name}.py")


# --- what the project has of each --------------------------------------------------------------------------


def lora_op(x, w, A, B, alpha):
    """x times the weight that the project merges from the same w, A and B."""
    config = AdapterConfig("lora", rank=len(B), alpha=alpha, targets=("attn.c_attn",))
    model = GPT(GPTConfig(3, block_size=2, n_layer=1, n_head=1, n_embd=len(w)), dtype=np.float64, ops=ops)
    model, name = variants.beside(model, config), "h.0.attn.c_attn"
    model.params[f"{name}.weight"][:] = w
    model.adapter.params[f"{name}.lora_A"][:] = A.T
    model.adapter.params[f"{name}.lora_B"][:] = B
    return ops.linear_forward(x, model.merge().params[f"{name}.weight"])


def policy_gradient_op(logits, ids, advantages):
    nll, _ = ops.cross_entropy_forward(logits, ids)
    return rlhf.policy_gradient(-nll, np.ones(ids.shape), advantages[:, None])


def block_op(x, p):
    config = GPTConfig(3, block_size=5, n_layer=1, n_head=2, n_embd=x.shape[-1])
    model = GPT(config, dtype=np.float64, ops=ops)
    for name, (w, b) in p.items():
        model.params[f"h.0.{name}.weight"][:], model.params[f"h.0.{name}.bias"][:] = w, b
    return model.block(x, 0, Pass())


def rloo_op(logp, rewards):
    advantage = rlhf.leave_one_out(rewards)
    return -np.mean(advantage * logp), None


OPS = {"lora": lora_op, "policy_gradient": policy_gradient_op, "block": block_op, "rloo": rloo_op}
OPS["dpo"] = dpo.dpo
for name in EXERCISES.keys() - OPS.keys() - exercises.STEPS.keys():
    OPS[name] = getattr(ops, f"{name}_forward")


@pytest.mark.parametrize("name", OPS)
def test_the_forward_is_the_projects(name):
    """Guards: an exercise that drifts from the textbook."""
    out, _ = getattr(exercises, f"{name}_forward")(**inputs(name))
    np.testing.assert_allclose(out, OPS[name](**inputs(name))[0], rtol=1e-12, atol=1e-14)


def test_the_steps_of_adamw_make_its_forward():
    """Guards: a forward that differs from many steps of the project."""
    rng = np.random.default_rng(0)
    w, gradients = rng.standard_normal(5), rng.standard_normal((7, 5))
    stepped, m, v = w, np.zeros(5), np.zeros(5)
    for t, g in enumerate(gradients, 1):
        stepped, m, v = solution("adamw")(stepped, g, m, v, t)
    np.testing.assert_allclose(exercises.adamw_forward(w, gradients), stepped, rtol=1e-12)


def test_the_steps_of_the_kv_cache_make_its_forward():
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 5, 4))
    keys, values, outs = k[:, :0], v[:, :0], []
    for t in range(5):
        new = (a[:, t : t + 1] for a in (q, k, v))
        out, keys, values = solution("kv_cache")(*new, keys, values)
        outs.append(out)
    np.testing.assert_allclose(exercises.kv_cache_forward(q, k, v), np.concatenate(outs, 1), rtol=1e-12)


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_is_accepted(run, name):
    """Guards: an exercise without a solution; a hint that lists other gradients than the checker."""
    result = check(run, name, solution(name))
    assert result.exit_code == 0, result.output
    names = [line.split(":")[0].split("[")[0] for line in result.output.splitlines() if line[0] != "n"]
    source = inspect.getsource(getattr(exercises, exercises.blank(name)))
    grads = [f"d{n}" for n, x in inputs(name).items() if any(is_float(a) for _, a in leaves(x))]
    announced = list(exercises.STEPS.get(name, grads))
    assert list(dict.fromkeys(names)) == [f"ok     {d}" for d in announced]
    assert re.findall(r"\w+", re.search(r"# write (.*) here", source)[1].replace(" and ", " ")) == announced
    if name not in exercises.STEPS:
        first_line = source.split(" -> ")[1].splitlines()[0]
        assert re.findall(r"\b(d\w+) \(", first_line)[: len(grads)] == grads


@pytest.mark.parametrize("name", EXERCISES)
def test_the_blank_is_refused(run, name):
    """Guards: a file that needs more than it imports; a blank that passes, or fails without a message."""
    run("exercise", name)
    source = Path(f"my_{name}.py").read_text(encoding="utf-8")
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    project = ["from tinygpt.core import ops"] * (name == "block")
    assert [ast.unparse(node) for node in imports] == ["import numpy as np", *project]
    command = f"    tinygpt exercise {name} --check my_{name}.py\n"
    assert command in ast.get_docstring(ast.parse(source), clean=False)
    assert max(map(len, source.splitlines())) <= 110
    result = run("exercise", name, "--check", f"my_{name}.py")
    assert result.exit_code == 1 and result.stdout.count("\n") == 1
    names = ", ".join(exercises.STEPS.get(name, ())) or "`return d"
    assert result.stdout.startswith(f"WRONG  {exercises.blank(name)}: ") and names in result.stdout


@pytest.mark.parametrize("name", ["linear", "block"])
def test_gradcheck_takes_the_file_too(run, name):
    """The file has its forward and its inputs."""
    Path(f"my_{name}.py").write_text(filled(name, solution(name)), encoding="utf-8")
    assert run("gradcheck", f"my_{name}.py:{name}").exit_code == 0


def test_a_solution_stands_where_the_file_says():
    """Guards: the name of a function that was renamed."""
    for _, place in EXERCISES.values():
        function, file = place.split(", ")
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
    return solution("lora")(dout, (x, 0 * w, *more))


def no_scale(dout, cache):
    dx, dA, dB = solution("lora")(dout, cache)
    return dx, dA, dB / cache[-1]


def tokens_averaged(dloss, cache):
    return solution("policy_gradient")(dloss, cache) / cache[1].shape[1]


def no_advantages(dloss, cache):
    logp, ids, advantages = cache
    return solution("policy_gradient")(dloss, (logp, ids, np.ones_like(advantages)))


def ids_once(dout, cache):
    ids, shape = cache
    dw = np.zeros(shape)
    dw[ids] += dout
    return dw


def no_stream(dout, cache):
    dx, dp = solution("block")(dout, cache)
    return dx - dout, dp


def decay_in_the_gradient(w, g, m, v, t, *constants):
    _, m, v = solution("adamw")(w, g, m, v, t, *constants)
    return solution("adamw")(w, g + 0.1 * w, m, v, t, *constants)[0], m, v


def the_oldest_forgotten(q, k, v, keys, values):
    out, *_ = solution("kv_cache")(q, k, v, keys[:, 1:], values[:, 1:])
    return out, *solution("kv_cache")(q, k, v, keys, values)[1:]


def mean_of_all(dloss, rewards):
    return -dloss * (rewards - rewards.mean(-1, keepdims=True)) / rewards.size


def no_beta(dloss, cache):
    dchosen, drejected = solution("dpo")(dloss, cache)
    return dchosen / cache[-1], drejected


@pytest.mark.parametrize("name, mistake, wrong", [
    ("linear", a_mean_over_the_rows, "db"),
    ("layernorm", statistics_as_constants, "dx"),
    ("cross_entropy", no_onehot, "dlogits"),
    ("attention", a_transpose_lacks, "dv"),
    ("lora", a_frozen_map_passes_nothing, "dx"),
    ("lora", no_scale, "dB"),
    ("policy_gradient", tokens_averaged, "dlogits"),
    ("policy_gradient", no_advantages, "dlogits"),
    ("embedding", ids_once, "dw"),
    ("block", no_stream, "dx"),
    ("adamw", decay_in_the_gradient, "w"),
    ("kv_cache", the_oldest_forgotten, "out"),
    ("rloo", mean_of_all, "dlogp"),
    ("dpo", no_beta, "dchosen"),
])  # fmt: skip
def test_a_mistake_is_named(run, name, mistake, wrong):
    """Guards: inputs that do not show a mistake, such as a scale of 1 or equal advantages."""
    result = check(run, name, mistake)
    assert result.exit_code == 1
    bad = [line for line in result.output.splitlines() if line.startswith("WRONG")]
    assert len(bad) == 1 and re.match(rf"WRONG  {wrong}: relative error .* at \[[\d, ]+\]: backward", bad[0])
    for line in result.output.splitlines():
        assert not re.search("[a-z]{2,} [a-z]{2,}", texts.translated("ko", line)), line


# --- the command -------------------------------------------------------------------------------------------


def test_the_exercises_are_listed(run):
    """Guards: an exercise that is not listed; a file written by the list."""
    result = run("exercise")
    assert result.exit_code == 0 and not list(Path().iterdir())
    listed = result.stdout.split("\n\n")[0].splitlines()
    assert [line.split(maxsplit=1) for line in listed] == [[name, row[0]] for name, row in EXERCISES.items()]
    least = {"linear", "cross_entropy", "gelu", "layernorm", "attention", "lora", "policy_gradient"}
    least |= {"embedding", "block", "adamw", "kv_cache", "rloo", "dpo"}
    assert least <= EXERCISES.keys()


def test_what_is_printed_checks_the_file(run):
    """Guards: a printed command with a wrong path, for a file in another folder."""
    Path("some where").mkdir()
    result = run("exercise", "gelu", "--out", "some where/my_gelu.py")
    assert result.stdout.endswith("Next: tinygpt exercise gelu --check 'some where/my_gelu.py'\n")
    assert "`return dx`" in run("exercise", "gelu", "--check", "some where/my_gelu.py").stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("gleu",), "there is no exercise gleu: choose from linear, embedding, gelu, layernorm, "),
        (("gelu",), "my_gelu.py: exists, perhaps with your work; --out names another file"),
        (("gelu", "--out", "mine"), "mine: does not end in .py"),
        (("gelu", "--out", "nowhere/mine.py"), "nowhere/mine.py: No such file"),
    ],
)
def test_a_mistake_is_one_line_and_loses_nothing(run, args, says):
    """Guards: an afternoon's work overwritten with the blank."""
    Path("my_gelu.py").write_text("mine", encoding="utf-8")
    result = run("exercise", *args)
    assert result.exit_code == 2 and not result.stdout
    assert result.stderr.count("\n") == 1 and says in result.stderr
    assert [path.name for path in Path().iterdir()] == ["my_gelu.py"]
    assert Path("my_gelu.py").read_text(encoding="utf-8") == "mine"
