"""The checker finds planted bugs and names them, raises no false alarm, and is helpful about mistakes."""

import doctest
import importlib
import json
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import tinygpt
from tinygpt import gradcheck_targets, kernels, ops
from tinygpt.cli import main
from tinygpt.errors import UserError
from tinygpt.gradcheck import gradcheck


def test_the_documented_example_runs():
    module = importlib.import_module("tinygpt.gradcheck")  # `tinygpt.gradcheck` is the function
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0
    assert outcome.failed == 0


def wrong_ones(forward, backward, inputs, **options):
    return {r.name: r for r in gradcheck(forward, backward, inputs, **options) if not r.ok}


# --- planted bugs ------------------------------------------------------------------------------------------


def test_an_attention_whose_key_gradient_lacks_a_transpose(rng):
    """A popular NumPy GPT has this bug. With as many queries as keys every shape is right, so training runs,
    and learns less than it should."""

    def backward(dout, cache):
        q, k, v, probs = cache
        dq, _, dv = ops.attention_backward(dout, cache)
        dprobs = dout[:, None] @ v[:, None].swapaxes(2, 3)
        dscores = q.shape[-1] ** -0.5 * probs * (dprobs - (probs * dprobs).sum(-1, keepdims=True))
        return dq, (dscores @ q[:, None])[:, 0], dv  # should be dscores.swapaxes(2, 3) @ q

    q, k, v = rng.standard_normal((3, 2, 5, 4))
    inputs = {"q": q, "k": k, "v": v, "n_head": 1}
    assert list(wrong_ones(ops.attention_forward, backward, inputs)) == ["dk"]
    with pytest.raises(AssertionError, match=r"^dk: relative error .* at \[\d, \d, \d\]: backward .*"):
        tinygpt.assert_gradients(ops.attention_forward, backward, inputs)


@pytest.mark.parametrize("index", [(0, 0), (2, 3), (3, 7)])
@pytest.mark.parametrize("small", [256, 0])  # element by element; along random directions
def test_one_wrong_element_is_found(rng, index, small):
    """A border case in a loop spoils a single element: it must be named in large tensors too."""

    def backward(dout, cache):
        dx, dw, db = ops.linear_backward(dout, cache)
        dw[index] *= 1.001
        return dx, dw, db

    x, w, b = rng.standard_normal((6, 4)), rng.standard_normal((4, 8)), rng.standard_normal(8)
    wrong = wrong_ones(ops.linear_forward, backward, [x, w, b], small=small)
    assert list(wrong) == ["dw"]
    assert wrong["dw"].index == index
    assert wrong["dw"].analytic == pytest.approx(1.001 * wrong["dw"].numeric, rel=1e-6)


def test_upstream_gradients_are_not_uniform(rng):
    """With dout all ones this softmax gradient of zeros is right: rows of a softmax sum to 1."""

    def forward(x):
        p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
        return p, p

    wrong = wrong_ones(forward, lambda dout, p: np.zeros_like(p), {"x": rng.standard_normal((3, 4))})
    assert list(wrong) == ["dx"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_that_is_not_a_number_is_wrong(value):
    """nan <= tol and nan > tol are both False: a careless comparison lets it pass."""

    def backward(dout, cache):
        return np.array([1.0, value]) * dout

    wrong = wrong_ones(lambda x: (x.copy(), None), backward, {"x": np.ones(2)})
    assert "at [1]" in str(wrong["dx"])
    with np.errstate(invalid="ignore"):
        assert wrong_ones(lambda x: (x * value, None), lambda dout, c: dout, {"x": np.ones(2)})


# --- no false alarms, and no false passes, at zero ---------------------------------------------------------


def keys_with_a_bias(dbias):
    """Attention whose keys share a bias, and a gradient for it. It moves all of a query's scores by the same
    amount, which softmax does not see: the true gradient is zero, both answers are rounding."""

    def forward(q, k, v, bias):
        return ops.attention_forward(q, k + bias, v, 2)

    def backward(dout, cache):
        dq, dk, dv = ops.attention_backward(dout, cache)
        return dq, dk, dv, dk.sum((0, 1)) + dbias

    q, k, v = np.random.default_rng(3).standard_normal((3, 2, 5, 4))
    return forward, backward, {"q": q, "k": k, "v": v, "bias": np.array([0.3, -0.1, 1.2, -0.7])}


def test_a_gradient_of_zero_passes():
    results = {r.name: r for r in gradcheck(*keys_with_a_bias(0), tol=1e-7)}
    assert all(r.ok for r in results.values())
    assert 0 < abs(results["dbias"].analytic) < 1e-15  # rounding, against rounding: both count as zero


@pytest.mark.parametrize("size", [1e-2, 1e-6, 1e-9])
def test_a_gradient_that_should_be_zero_fails(size):
    assert list(wrong_ones(*keys_with_a_bias(size), tol=1e-7)) == ["dbias"]


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1, 1e3, 1e8])
def test_the_scale_of_the_input_does_not_matter(rng, scale):
    """A fixed step is lost in inputs of 1e8 and jumps far beyond those of 1e-8."""

    def forward(x):
        return np.tanh(x / scale), x

    def backward(dout, x, factor=1.0):
        return factor * dout * (1 - np.tanh(x / scale) ** 2) / scale

    x = scale * rng.standard_normal((3, 4))
    tinygpt.assert_gradients(forward, backward, [x], tol=1e-9)
    assert wrong_ones(forward, lambda d, x: backward(d, x, 1.00001), [x])


@pytest.mark.parametrize("seed", range(5))
def test_kinks_near_by_are_no_alarm(seed):
    """Among 2,000 normal numbers several lie within a step of relu's kink; a shorter step gets past them."""
    x = np.random.default_rng(seed).standard_normal((50, 40))
    tinygpt.assert_gradients(lambda x: (np.maximum(x, 0), x), lambda dout, x: dout * (x > 0), [x])


def test_no_false_alarm_at_a_far_away_mean(rng):
    """Where the size of x says little about the step it needs: layernorm of 1000 + noise."""
    x, g, b = 1000 + rng.standard_normal((3, 5)), rng.standard_normal(5), rng.standard_normal(5)
    tinygpt.assert_gradients(ops.layernorm_forward, ops.layernorm_backward, (x, g, b))


# --- what may go in and out --------------------------------------------------------------------------------


def test_outputs_may_be_a_number_or_several(rng):
    x, w = rng.standard_normal((3, 4)), rng.standard_normal(4)
    tinygpt.assert_gradients(lambda x: (np.sum(x**2), x), lambda dout, x: 2 * dout * x, x)

    def forward(x, w):
        return (x @ w, x.sum()), (x, w)

    def backward(douts, cache):
        (dy, ds), (x, w) = douts, cache
        return np.outer(dy, w) + ds, x.T @ dy

    tinygpt.assert_gradients(forward, backward, (x, w))
    by_name = lambda douts, cache: dict(zip("xw", backward(douts, cache), strict=True))  # noqa: E731
    tinygpt.assert_gradients(forward, by_name, {"w": w, "x": x})


def test_what_is_not_a_float_array_is_passed_on(rng):
    """Ids and switches are not differentiated; None and False say that a gradient is not to be checked, which
    is reported, and is no mistake."""

    def forward(ids, w, half, unused):
        assert ids.dtype == np.int64 and half is True and unused.dtype == np.float64
        return w[ids] / 2, (ids, w)

    def backward(dout, cache):
        ids, w = cache
        dw = np.zeros_like(w)
        np.add.at(dw, ids, dout / 2)
        return dw, None

    inputs = np.array([0, 2, 2]), rng.standard_normal((3, 4)).astype(np.float32), True, np.ones(2)
    dw, left_out = gradcheck(forward, backward, inputs)
    assert (dw.name, dw.ok, left_out.ok) == ("dw", True, True)
    assert str(left_out) == "dunused: backward returns None for it" and np.isnan(left_out.rel_err)
    tinygpt.assert_gradients(forward, lambda dout, cache: (backward(dout, cache)[0], False), inputs)


def test_the_users_arrays_are_not_touched(rng):
    x = rng.standard_normal((3, 4))
    kept = x.copy()
    gradcheck(lambda x: (x.__imul__(2), None), lambda dout, cache: 2 * dout, [x])
    np.testing.assert_array_equal(x, kept)


@pytest.mark.parametrize("forward, backward, message", [
    (lambda x: x, lambda d, c: d, r"must return \(out, cache\)"),
    (lambda x: (x.astype(np.float32), None), lambda d, c: d, "float32"),
    (lambda x: (x > 0, None), lambda d, c: d, "bool"),
    (lambda x: (x + 0, None), lambda d, c: (d, d), "2 gradients; float arrays: x "),
    (lambda x: (x + 0, None), lambda d, c: {"y": d}, "no gradient for 'x'"),
    (lambda x: (x + 0, None), lambda d, c: (None,), "nothing to check"),
    (lambda x: (x + 0, None), lambda d, c: None, "backward returns None, .*: end it with `return dx`"),
])  # fmt: skip
def test_what_cannot_be_checked_is_refused(forward, backward, message):
    """Passing silently would be worst: nothing was checked."""
    with pytest.raises(UserError, match=message):
        gradcheck(forward, backward, {"x": np.ones(3)})
    with pytest.raises(UserError, match="nothing to differentiate"):
        gradcheck(forward, backward, {"x": np.arange(3)})


# --- the contract ------------------------------------------------------------------------------------------


def broken_rules(forward, backward, inputs):
    return {r.name: r.problem for r in gradcheck(forward, backward, inputs) if r.problem}


def test_broken_rules_are_named():
    """Bugs that a single call does not show: EurekaLabs' mlp overwrites its cache, and micrograd answers
    differently the second time (issue 53)."""
    x, total = {"x": np.array([1.0, 2.0, 3.0])}, np.zeros(3)

    def accumulates(dout, cache):
        total[:] += dout
        return total

    def double(x):
        return 2 * x, (x, {"twice": 2 * x})

    assert broken_rules(double, accumulates, x) == {"dx": "backward called twice gives two answers"}
    writes = "backward writes to it"
    for name, where in (
        ("dout", lambda dout, cache: dout),
        ("cache[1]['twice']", lambda dout, cache: cache[1]["twice"]),
        ("x", lambda dout, cache: cache[0]),
    ):
        backward = lambda d, c, where=where: np.multiply(d, 2, out=where(d, c))  # noqa: E731
        assert broken_rules(double, backward, x)[name] == writes
    assert broken_rules(double, lambda d, c: d[:2], x) == {"dx": "its shape is (2,), that of x is (3,)"}
    in_place = broken_rules(lambda x: (x.__imul__(2), None), lambda d, c: 2 * d, x)
    assert in_place == {"x": "forward writes to it"}
    rng = np.random.default_rng(0)
    unseeded = broken_rules(lambda x: (x * rng.random(3), None), lambda d, c: d, x)
    assert unseeded == {"out": "forward called twice gives two answers: fix its random seed"}


def test_what_is_right_is_not_called_wrong(rng):
    """Differences taken with a dout or an x that backward wrote to would call right gradients wrong too. The
    first call may keep an array that the second writes to."""
    kept = []

    def scales(dout, cache):
        dout *= 2
        return dout

    def spoils(dout, cache):
        dx = 2 * dout * cache[0]
        cache[0][:] = 0
        return dx

    def adds_up(dout, cache):
        kept.append(dout)
        return np.add(kept[0], dout, out=kept[0]) if kept[1:] else dout

    for forward, backward, written in (
        (lambda x: (2 * x, None), scales, ["dout"]),
        (lambda x: (x**2, (x,)), spoils, ["cache[0]", "x"]),
        (lambda x: (x + 0, None), adds_up, ["dout"]),
    ):
        assert list(wrong_ones(forward, backward, {"x": rng.standard_normal((3, 4))})) == written


def test_one_gradient_for_several_is_counted(rng):
    x, w, b = rng.standard_normal((3, 2)), rng.standard_normal((2, 4)), rng.standard_normal(4)
    for backward, says in (
        (lambda dout, cache: dout, r"^backward returns 1 gradient; float arrays: x, w, b \(None"),
        (lambda dout, cache: None, r"^backward returns None, .*: end it with `return dx, dw, db`$"),
        (lambda dout, cache: (None, None, False), "nothing to check"),
    ):
        with pytest.raises(UserError, match=says):
            gradcheck(ops.linear_forward, backward, [x, w, b])


# --- the command line --------------------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with a user's module, and a function that runs `tinygpt gradcheck` in it."""
    (tmp_path / "mine.py").write_text(textwrap.dedent("""
        import numpy as np

        def scale_forward(x, g, power=2):
            return x * g**power, (x, g)

        def scale_backward(dout, cache):
            x, g = cache
            return dout * g**2, (2 * x * g * dout).sum(0)

        def wrong_forward(x):
            return x**3, x

        def wrong_backward(dout, x):
            return dout * 3 * np.where(x == x[1, 2], 1.1 * x, x)**2

        def wrong_inputs(rng):
            return rng.standard_normal((3, 4))

        def lonely_forward(x):
            return x, x

        def crash_forward(x):
            return x.reshape(7), x

        crash_backward = scale_backward

        def half_backward(dout, cache):
            return scale_backward(dout, cache)[0], None

        half_forward = scale_forward

        def axis_forward(x):
            return np.sum(x, axis=5), x

        axis_backward = scale_backward

        def elsewhere_backward(dout, x):
            return dout

        from statistics import mean as elsewhere_forward

        class Linear:
            def __init__(self):
                w = np.random.default_rng(0).standard_normal((4, 2))
                self.params = {"w": w, "b": np.zeros(2)}
                self.grads = {"w": np.zeros((4, 2)), "b": np.zeros(2)}

            def forward(self, x):
                self.x = x
                return x @ self.params["w"] + self.params["b"]

            def backward(self, dout):
                self.grads["w"] += self.x.T @ dout
                self.grads["b"] += dout.mean(0)  # should be the sum
                return dout @ self.params["w"].T

        layer = Linear()

        class Half(Linear):
            backward = None
            def __init__(self):
                self.params = {}
    """), encoding="utf-8")  # fmt: skip
    (tmp_path / "needs.py").write_text("import no_such_thing", encoding="utf-8")
    (tmp_path / "typo.py").write_text("def f(:", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield lambda *arguments: CliRunner().invoke(main, ["gradcheck", *arguments])
    for module in ("mine", "needs", "typo"):
        sys.modules.pop(module, None)


@pytest.mark.parametrize("target", ["mine:scale", "mine.py:scale", "mine:scale_forward"])
def test_a_users_pair_passes(mine, target):
    result = mine(target, "--shape", "x=3,4", "--shape", "g=4")
    assert result.exit_code == 0, result.output
    assert [line.split(":")[0] for line in result.output.splitlines()] == ["ok     dx", "ok     dg"]


def test_a_users_bug_is_named_with_its_element(mine):
    result = mine("mine:wrong")
    assert result.exit_code == 1
    assert result.output.startswith("WRONG  dx: relative error")
    assert "at [1, 2]" in result.output
    assert mine("mine:wrong", "--tol", "0.5").exit_code == 0


def test_what_is_left_out_is_said(mine):
    """Half an exercise must not look like a whole one."""
    shapes = "--shape", "x=3,4", "--shape", "g=4"
    result = mine("mine:half", *shapes)
    assert result.exit_code == 0, result.output
    dx, dg = result.output.splitlines()
    assert dx.startswith("ok     dx: ") and dg == "skip   dg: backward returns None for it"
    dx, dg = json.loads(mine("mine:half", *shapes, "--json").output)
    assert dx["ok"] is True
    assert dg == {"name": "dg", "backend": "user", "rel_err": None, "ok": None}


@pytest.mark.parametrize("target", ["mine:axis", "mine.py:axis"])
def test_the_users_own_line_is_named(mine, target):
    """Of an exception in NumPy or elsewhere, the last line that is the user's."""
    lines = Path("mine.py").read_text(encoding="utf-8").splitlines()
    line = 1 + lines.index("    return np.sum(x, axis=5), x")
    result = mine(target, "--shape", "x=2,3")
    assert f"mine.py, line {line}, in axis_forward)" in result.output and result.exit_code == 2
    result = mine("mine:elsewhere", "--shape", "data=2,3")
    assert re.search(r"raised .* \(.*statistics\.py, line", result.output)


@pytest.mark.parametrize("target", ["mine:Linear", "mine:layer"])
def test_a_users_layer(mine, target):
    """Its parameters' gradients are checked too, and that they add up from call to call is no fault."""
    rows = json.loads(mine(target, "--shape", "x=3,4", "--json").output)
    found = [(row["name"], row["ok"]) for row in rows]
    assert found == [("dx", True), ("grads['w']", True), ("grads['b']", False)]
    assert all(set(row) == {"name", "backend", "rel_err", "ok"} for row in rows)


def test_the_lines_to_add_are_printed(mine):
    """They are what a reader pastes: they must be Python, and name the parameters that have no default."""
    result = mine("mine:scale")
    assert result.exit_code == 2
    start, end = result.output.index("    def "), result.output.index("\n\nor say ")
    namespace = {}
    exec(textwrap.dedent(result.output[start:end]), namespace)
    assert list(namespace["scale_inputs"](np.random.default_rng(0))) == ["x", "g"]
    assert "--shape x=4,8 --shape g=4,8" in result.output[end:]


@pytest.mark.parametrize("arguments, message", [
    (["mine"], "write module:name"),
    (["nowhere:f"], "nowhere cannot be imported: ModuleNotFoundError"),
    (["nowhere.py:f"], "nowhere.py: there is no such file"),
    (["needs:f"], "No module named 'no_such_thing'"),
    (["typo:f"], "typo cannot be imported: SyntaxError"),
    (["mine:scael"], "mine has no scael_forward; is it scale_forward?"),
    (["mine:lonely"], "mine has no lonely_backward"),
    (["mine:Half"], "mine:Half has forward, but not grads"),
    (["mine:crash", "--shape", "x=2,3"], "mine:crash raised ValueError: cannot reshape"),
    (["mine:scale", "--shape", "x=2,3"], "missing 1 required positional argument: 'g'"),
    (["mine:scale", "--shape", "y=2,3"], "unexpected keyword argument 'y'"),
    (["mine:scale", "--shape", "x=2,z"], "'x=2,z' is not name=sizes"),
    (["mine:scale", "--tol", "0"], "--tol"),
    (["--shape", "x=2"], "--shape is for your own code"),
])  # fmt: skip
def test_mistakes_give_one_line(mine, arguments, message):
    result = mine(*arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    *usage, line = result.output.strip().splitlines()
    assert message in line
    assert not usage or usage[0].startswith("Usage:")


def test_the_projects_own_table(monkeypatch):
    """Every operation in every backend; one that fails turns the exit status to 1."""
    result = CliRunner().invoke(main, ["gradcheck", "--json"])
    assert result.exit_code == 0
    rows = json.loads(result.output)
    for backend in kernels.available():
        names = {row["name"] for row in rows if row["backend"] == backend}
        for function in dir(ops):
            if function.endswith("_backward"):
                assert function.removesuffix("_backward") in names
        assert {"whole model", "whole model, post-norm"} < names
    assert max(row["rel_err"] for row in rows) <= 1e-7

    def spoiled(ops, rng):
        yield "gelu", (ops.gelu_forward, lambda dout, cache: dout, {"x": rng.standard_normal(5)})

    monkeypatch.setattr(gradcheck_targets, "project_pairs", spoiled)
    result = CliRunner().invoke(main, ["gradcheck"])
    assert result.exit_code == 1
    assert "WRONG  numpy  gelu" in result.output
