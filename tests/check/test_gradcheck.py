"""The checker finds and names planted bugs, raises no false alarm, and explains mistakes of its users."""

import dataclasses
import doctest
import importlib
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import tinygpt
from tinygpt.check import targets
from tinygpt.check.gradcheck import gradcheck
from tinygpt.core import kernels, ops
from tinygpt.errors import UserError
from tinygpt.shell.cli import main


def test_the_documented_example_runs():
    module = importlib.import_module("tinygpt.check.gradcheck")
    outcome = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert outcome.attempted > 0
    assert outcome.failed == 0


def wrong_ones(forward, backward, inputs, **options):
    return {r.name: r for r in gradcheck(forward, backward, inputs, **options) if not r.ok}


# --- planted bugs ------------------------------------------------------------------------------------------


def test_an_attention_whose_key_gradient_lacks_a_transpose(rng):
    """A popular NumPy GPT has this bug. With as many queries as keys every shape is right. So training runs,
    but learns less than it should."""

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
    """A border case in a loop spoils a single element. The message names the element in large tensors too."""

    def backward(dout, cache):
        dx, dw, db = ops.linear_backward(dout, cache)
        dw[index] *= 1.001
        return dx, dw, db

    x, w, b = rng.standard_normal((6, 4)), rng.standard_normal((4, 8)), rng.standard_normal(8)
    wrong = wrong_ones(ops.linear_forward, backward, [x, w, b], small=small)
    assert list(wrong) == ["dw"]
    assert wrong["dw"].index == index
    assert wrong["dw"].backward == pytest.approx(1.001 * wrong["dw"].differences, rel=1e-6)
    assert wrong["dw"].extent == f"{32 if small else 1} of 32 elements one by one"


def test_upstream_gradients_are_not_uniform(rng):
    """If dout is all ones, zeros are the right gradient of softmax: each row sums to 1."""

    def forward(x):
        p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
        return p, p

    wrong = wrong_ones(forward, lambda dout, p: np.zeros_like(p), {"x": rng.standard_normal((3, 4))})
    assert list(wrong) == ["dx"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_that_is_not_a_number_is_wrong(value):
    """nan <= tol and nan > tol are both False: a careless comparison lets nan pass."""

    def backward(dout, cache):
        return np.array([1.0, value]) * dout

    wrong = wrong_ones(lambda x: (x.copy(), None), backward, {"x": np.ones(2)})
    assert "at [1]" in str(wrong["dx"])


# --- no false alarms, and no false passes, at zero ---------------------------------------------------------


def keys_with_a_bias(dbias):
    """Attention whose keys share a bias, and a gradient for this bias. The bias moves all scores of a query
    by the same amount, which softmax cancels. So the true gradient is zero; both answers are rounding."""

    def forward(q, k, v, bias):
        return ops.attention_forward(q, k + bias, v, 2)

    def backward(dout, cache):
        dq, dk, dv = ops.attention_backward(dout, cache)
        return dq, dk, dv, dk.sum((0, 1)) + dbias

    q, k, v = np.random.default_rng(3).standard_normal((3, 2, 5, 4))
    return forward, backward, {"q": q, "k": k, "v": v, "bias": np.array([0.3, -0.1, 1.2, -0.7])}


def test_a_gradient_of_zero_passes():
    results = {r.name: r for r in gradcheck(*keys_with_a_bias(0), rtol=1e-7)}
    assert all(r.ok for r in results.values())
    assert 0 < abs(results["dbias"].backward) < 1e-15  # rounding, against rounding: both count as zero


@pytest.mark.parametrize("size", [1e-2, 1e-6, 1e-9])
def test_a_gradient_that_should_be_zero_fails(size):
    assert list(wrong_ones(*keys_with_a_bias(size), rtol=1e-7)) == ["dbias"]


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1, 1e3, 1e8])
def test_the_scale_of_the_input_does_not_matter(rng, scale):
    """A fixed step is lost in inputs of 1e8 and jumps far beyond those of 1e-8."""

    def forward(x):
        return np.tanh(x / scale), x

    def backward(dout, x, factor=1.0):
        return factor * dout * (1 - np.tanh(x / scale) ** 2) / scale

    x = scale * rng.standard_normal((3, 4))
    tinygpt.assert_gradients(forward, backward, [x], rtol=1e-9)
    assert wrong_ones(forward, lambda d, x: backward(d, x, 1.00001), [x])


@pytest.mark.parametrize("seed", range(5))
def test_kinks_near_by_are_no_alarm(seed):
    """Of 2,000 normal numbers several lie within a step of relu's kink. A shorter step does not reach it."""
    x = np.random.default_rng(seed).standard_normal((50, 40))
    tinygpt.assert_gradients(lambda x: (np.maximum(x, 0), x), lambda dout, x: dout * (x > 0), [x])


def test_no_false_alarm_at_a_far_away_mean(rng):
    """Layernorm of 1000 + noise: the best step is much smaller than the size of x."""
    x, g, b = 1000 + rng.standard_normal((3, 5)), rng.standard_normal(5), rng.standard_normal(5)
    tinygpt.assert_gradients(ops.layernorm_forward, ops.layernorm_backward, (x, g, b))


# --- planted bugs that an earlier judgement let pass, and right gradients that it called wrong --------------

VISIBLE = np.tril(np.ones((4, 4))) > 0


def normal(*shape):
    return lambda rng: rng.standard_normal(shape)


def filled(value):
    """Scores with `value` where a query does not see a key, and the right backward."""
    return lambda x: (np.where(VISIBLE, x, value), None), lambda dout, cache: dout * VISIBLE


def steps_of(x):
    """Twenty numbers from 1e-9 to 1e10."""
    return np.sign(x) * 10.0 ** np.linspace(-9, 10, x.size)


FAR = 1e5 + np.random.default_rng(5).standard_normal((3, 7))
SQUARE = (lambda x, w: (x @ w, (x, w)), lambda dout, c: (dout @ c[1].T, dout.T @ c[0]),
          lambda rng: [rng.standard_normal((5, 4)), rng.standard_normal((4, 4))])  # fmt: skip
RELU = lambda x: (np.maximum(x, 0), x)  # noqa: E731
ZEROS = lambda rng: np.where(rng.random((4, 5)) < 0.3, 0, rng.standard_normal((4, 5)))  # noqa: E731


def unit_backward(dout, x):
    """The backward of x / max(norm of the row, 1e-12)."""
    n = np.linalg.norm(x, axis=-1, keepdims=True)
    along = (dout * x).sum(-1, keepdims=True) * x / np.maximum(n, 1e-12) ** 3
    return dout / np.maximum(n, 1e-12) - np.where(n > 1e-12, along, 0)


WRONG = {
    "dout.T x for x.T dout, dout of x's shape": SQUARE,
    "x for dout": (lambda x: (np.tanh(x), x), lambda dout, x: x * (1 - np.tanh(x) ** 2), normal(3, 4)),
    "a factor of 3 beside an element of 1e7": (
        lambda x: (x * [1e7, 1], None), lambda dout, c: dout * [1e7, 3], normal(4, 2)),
    "a factor of 3 beside an element of 1e11": (
        lambda x: (x * [1e11, 1], None), lambda dout, c: dout * [1e11, 3], normal(4, 2)),
    "a mask of -1e30 forgotten": (filled(-1e30)[0], lambda dout, c: dout, normal(4, 4)),
    "a mask of -1e9 forgotten": (filled(-1e9)[0], lambda dout, c: dout, normal(4, 4)),
    "5 % too much beside a mask of -1e30": (
        filled(-1e30)[0], lambda dout, c: 1.05 * dout * VISIBLE, normal(4, 4)),
    "nothing beside an added mask of -1e9": (
        lambda x: (x + np.where(VISIBLE, 0, -1e9), None), lambda dout, c: 0 * dout, normal(4, 4)),
    "5e-5 too much, 1e6 added": (lambda x: (x + 1e6, None), lambda dout, c: 1.00005 * dout, normal(3)),
    "a factor of 7, 1e10 added": (lambda x: (x + 1e10, None), lambda dout, c: 7 * dout, normal(3)),
    "2 for 3 in the small one of two outputs": (
        lambda x: ((1e8 * x[:2].sum(), 3 * x[2:]), None),
        lambda dout, c: np.array([1e8 * dout[0], 1e8 * dout[0], *2 * dout[1]]), normal(4)),
    "a factor of 7 where all is tiny": (
        lambda x: (1e-30 * np.sum(x**2), x), lambda dout, x: 7e-30 * x * dout, normal(3)),
    "straight through a rounding": (lambda x: (np.round(x, 2), None), lambda dout, c: dout, normal(20)),
    "outside a kink's two slopes": (RELU, lambda dout, x: dout * np.where(x == 0, 1.5, x > 0), ZEROS),
    "a factor of 1.00001 in a large tensor": (
        lambda x: (np.tanh(x), x), lambda dout, x: 1.00001 * dout * (1 - np.tanh(x) ** 2), normal(30, 40)),
    "a factor of 1.01, in float32": (
        lambda x: (np.tanh(x.astype(np.float32)).astype(np.float64), x),
        lambda dout, x: 1.01 * dout * (1 - np.tanh(x) ** 2), normal(20)),
}  # fmt: skip
RIGHT = {
    "a mask of -inf": (*filled(-np.inf), normal(4, 4)),
    "a mask of -1e30": (*filled(-1e30), normal(4, 4)),
    "a mask of -1e30 subtracted": (
        lambda x: (x - 1e30 * ~VISIBLE, None), lambda dout, c: dout * VISIBLE, normal(4, 4)),
    "a logarithm of 1e6 to 0.5": (
        lambda x: (np.log(x), x), lambda dout, x: dout / x, lambda rng: np.array([1e6, 2e5, 3, 1, 0.5])),
    "kinks at 1e-9 to 1e10": (
        lambda x: (np.abs(x), x), lambda dout, x: dout * np.sign(x),
        lambda rng: steps_of(rng.standard_normal(20))),
    "a square root of 1e-9 to 1e10": (
        lambda x: (np.sqrt(x), x), lambda dout, x: dout / np.sqrt(4 * x), lambda rng: steps_of(np.ones(20))),
    "relu at 0": (RELU, lambda dout, x: dout * (x > 0), ZEROS),
    "relu at 0, half the slope": (RELU, lambda dout, x: dout * np.heaviside(x, 0.5), ZEROS),
    "layer normalisation at a mean of 1e5": (
        lambda x: ops.layernorm_forward(x, np.ones(7), np.zeros(7)),
        lambda dout, c: ops.layernorm_backward(dout, c)[0], lambda rng: 1e5 + rng.standard_normal((3, 7))),
    "a bias of zeros behind a mean of 1e5": (
        lambda b: ops.layernorm_forward(FAR + b, np.ones(7), np.zeros(7)),
        lambda dout, c: ops.layernorm_backward(dout, c)[0].sum(0), lambda rng: np.zeros(7)),
    "a small bias behind a mean of 1e5": (
        lambda b: ops.layernorm_forward(FAR + b, np.ones(7), np.zeros(7)),
        lambda dout, c: ops.layernorm_backward(dout, c)[0].sum(0), lambda rng: 1e-3 * rng.random(7)),
    "zeros beside 3e8": (
        lambda x: (np.tanh(x), x), lambda dout, x: dout / np.cosh(np.clip(x, -300, 300)) ** 2,
        lambda rng: np.array([0, 0, 3e8, -3e8, 0])),
    "a variance that cancels": (
        lambda x: ((x * x).mean(-1) - x.mean(-1) ** 2, x),
        lambda dout, x: 2 * dout[:, None] * (x - x.mean(-1, keepdims=True)) / 6,
        lambda rng: 100 + rng.standard_normal((4, 6))),
    "a step that is a millionth wide": (
        lambda x: (np.tanh(1e6 * (x - 1)), x), lambda dout, x: 1e6 * dout / np.cosh(1e6 * (x - 1)) ** 2,
        lambda rng: 1 + 2e-6 * rng.standard_normal(20)),
    "1e-9 to 1e10 in a large tensor": (
        lambda x: (np.sqrt(x), x), lambda dout, x: dout / np.sqrt(4 * x), lambda rng: steps_of(np.ones(300))),
    "1e10 added": (lambda x: (x + 1e10, None), lambda dout, c: dout, normal(3)),
    "leaky relu at 0": (
        lambda x: (np.where(x > 0, x, 0.1 * x), x), lambda dout, x: dout * np.where(x >= 0, 1, 0.1), ZEROS),
    "relu of nothing": (RELU, lambda dout, x: dout * (x >= 0), lambda rng: np.zeros((3, 5))),
    "relu of a padded row and a bias of zeros": (
        lambda x, w, b: (np.maximum(x @ w + b, 0), (x, w, x @ w + b > 0)),
        lambda dout, c: ((dout * c[2]) @ c[1].T, c[0].T @ (dout * c[2]), (dout * c[2]).sum(0)),
        lambda rng: [np.vstack([np.zeros(3), rng.standard_normal((3, 3))]), rng.standard_normal((3, 4)),
                     np.zeros(4)]),
    "a norm of 0, bounded by 1e-12": (
        lambda x: (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12), x), unit_backward,
        lambda rng: np.vstack([np.zeros(3), rng.standard_normal((2, 3))])),
    "a logarithm of 0 + 1e-10": (
        lambda x: (np.log(x + 1e-10), x), lambda dout, x: dout / (x + 1e-10), lambda rng: np.eye(3)),
    "a square at 0": (lambda x: (x * x, x), lambda dout, x: 2 * dout * x, lambda rng: np.zeros(3)),
    "bumps far from zero": (
        lambda x: (np.exp(-50 * (x - np.round(x)) ** 2), x - np.round(x)),
        lambda dout, r: -100 * dout * r * np.exp(-50 * r**2),
        lambda rng: np.round(50 * rng.standard_normal(20)) + 0.1 * rng.standard_normal(20)),
    "a forward that insists on its domain": (
        lambda x: (np.log(x), x) if (x > 0).all() else 1 / 0, lambda dout, x: dout / x,
        lambda rng: rng.random(9)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_gradient_is_caught_with_every_seed(name):
    for seed in range(10):
        assert any(r.verdict == "wrong" for r in gradcheck(*WRONG[name], seed=seed)), seed


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_gradient_is_no_false_alarm(name):
    for seed in range(10):
        assert all(r.ok for r in gradcheck(*RIGHT[name], seed=seed)), seed


@pytest.mark.parametrize("seed", range(3))
def test_dout_shares_no_random_stream_with_the_inputs(seed):
    """Guards: inputs drawn from the checker's seed, as in most tests. dout was equal to the first input."""
    forward, backward, inputs = SQUARE
    for rng in np.random.default_rng(seed), np.random.default_rng([seed, 1]):
        with pytest.raises(AssertionError, match="^dw: relative error"):
            tinygpt.assert_gradients(forward, backward, inputs(rng), seed=seed)


def test_a_layer_that_keeps_its_first_input_is_caught():
    """Guards: a judgement at one point only. There the first input gives the right gradient."""
    kept = []

    def forward(x):
        kept.append(x.copy())
        return x**2, None

    for inputs in np.arange(1.0, 4.0), lambda rng: rng.standard_normal(3), lambda rng: np.arange(1.0, 4.0):
        kept.clear()
        wrong = wrong_ones(forward, lambda dout, c: 2 * dout * kept[0], inputs)
        assert list(wrong) == ["dx"]


def test_a_second_point_outside_the_domain_is_said():
    """Guards: no word about a single point; an exception of the user's own check of the domain."""
    forward = lambda p: (np.log(p) if abs(p.sum() - 1) < 1e-4 else 1 / 0, p)  # noqa: E731
    (result,) = gradcheck(forward, lambda dout, p: dout / p, np.array([0.2, 0.3, 0.5]))
    assert result.ok and "only one point is judged" in result.notes[0] and "ZeroDivision" in result.notes[0]


def test_what_is_hidden_is_not_judged():
    """Guards: an offset beside which every gradient is ok; differences that are no numbers."""
    forward, backward = lambda x: (x + 1e14, None), lambda dout, c: 1.01 * dout
    (hidden,) = gradcheck(forward, backward, np.ones(3))
    assert hidden.verdict == "not judged" and "outputs round by 0.02" in hidden.problem
    with pytest.raises(AssertionError, match="outputs round by 0.02"):
        tinygpt.assert_gradients(forward, backward, np.ones(3))
    assert wrong_ones(forward, lambda dout, c: 2 * dout, np.ones(3))
    nowhere = lambda x: (x if (x == 1).all() else x + np.nan, None)  # noqa: E731
    (outside,) = gradcheck(nowhere, lambda dout, c: dout, np.ones(3))
    assert (outside.verdict, outside.problem) == ("not judged", "forward is not finite beside it")
    raises = lambda x: (x if (x == 1).all() else 1 / 0, None)  # noqa: E731
    (outside,) = gradcheck(raises, lambda dout, c: dout, np.ones(3))
    assert outside.verdict == "not judged" and "forward raises ZeroDivisionError" in outside.problem


def test_no_false_alarm_where_noise_is_a_millionth_and_bends_are_near():
    """Guards two safeguards. An estimate that contradicts smaller steps does not count. A gradient is wrong
    only if other steps confirm the first. Without one of the two some of these seeds give WRONG."""
    inputs = lambda rng: 1e6 + rng.standard_normal((3, 7))  # noqa: E731
    forward = lambda x: ops.layernorm_forward(x, np.ones(7), np.zeros(7))  # noqa: E731
    for seed in range(100):
        (result,) = gradcheck(forward, lambda d, c: ops.layernorm_backward(d, c)[0], inputs, seed=seed)
        assert result.verdict != "wrong", seed


def test_float32_inside_is_no_false_alarm():
    """Guards: rounding to float32 in the middle of a forward that returns float64."""
    forward = lambda x: (np.tanh(x.astype(np.float32)).astype(np.float64), x)  # noqa: E731
    backward = lambda dout, x: dout * (1 - np.tanh(x) ** 2)  # noqa: E731
    for seed in range(20):
        (result,) = gradcheck(forward, backward, normal(20), seed=seed)
        assert result.ok or re.search("outputs round by (9e-08|[12]e-07)", result.problem)


def test_atol_lets_small_errors_pass():
    backward = lambda dout, c: dout * 1.0001  # noqa: E731
    assert wrong_ones(lambda x: (x + 0, None), backward, np.ones(3), atol=1e-5)
    tinygpt.assert_gradients(lambda x: (x + 0, None), backward, np.ones(3), atol=1e-3)


@pytest.mark.parametrize("shape", [(4, 5), (40, 50)])
@pytest.mark.parametrize("seed", range(5))
def test_a_kink_is_named_with_its_input(shape, seed):
    """Guards: relu at 0 called wrong, without a note about the kink, in a small or in a large tensor."""
    x = 1.0 + np.arange(np.prod(shape)).reshape(shape)
    x[2, 3] = 0
    (result,) = gradcheck(RELU, lambda dout, x: dout * (x > 0), x, seed=seed)
    assert result.ok
    assert re.match(r"x\[2, 3\] = 0 is a kink: slopes -?0 and -?\d+\.\d+$", result.notes[0])
    assert ("1 of 2,000 elements one by one" in result.extent) == (x.size == 2000)


@pytest.mark.parametrize("seed", range(3))
def test_kinks_in_a_large_tensor_hide_nothing(seed):
    """relu of a relu: half of 2,000 inputs are 0. The checker finds a wrong element at 0 and elsewhere."""
    inputs = lambda rng: np.maximum(rng.standard_normal((40, 50)), 0) + np.eye(40, 50, 4)  # noqa: E731
    spoiled = np.ones((40, 50))
    spoiled[3, 7] = 1.01
    (right,) = gradcheck(RELU, lambda dout, x: dout * (x > 0), inputs, seed=seed)
    assert right.ok and re.search(r"; 65 of \d{3} such elements are judged$", right.notes[0])
    assert "4 random directions, 65 of 2,000 elements" in right.extent
    (wrong,) = gradcheck(RELU, lambda dout, x: dout * (x > 0) * spoiled, inputs, seed=seed)
    assert (wrong.verdict, wrong.index) == ("wrong", (3, 7))
    (wrong,) = gradcheck(RELU, lambda dout, x: dout * np.where(x == 0, 1.5, x > 0), inputs, seed=seed)
    assert wrong.verdict == "wrong"


def test_a_kink_of_several_outputs_is_not_called_wrong():
    """Guards: a false alarm at a padded row. An output is a sum of several relus. The right gradient, 0, is
    not between the left and the right slope of the sum."""
    rng = np.random.default_rng(0)
    W1, W2 = rng.standard_normal((3, 8)), rng.standard_normal((8, 4))
    forward = lambda x: (np.maximum(x @ W1, 0) @ W2, x)  # noqa: E731
    backward = lambda dout, x: ((dout @ W2.T) * (x @ W1 > 0)) @ W1.T  # noqa: E731
    for seed in range(3):
        x = np.vstack([np.zeros(3), rng.standard_normal((2, 3))])
        assert gradcheck(forward, backward, x, seed=seed)[0].verdict == "not judged"


def test_kinks_in_a_loss_are_not_called_wrong():
    """Guards: a false alarm where pixels are 0 and biases are 0, as in the first state of a network."""
    rng = np.random.default_rng(0)
    W1, W2 = rng.standard_normal((4, 5)), rng.standard_normal((30, 6))

    def forward(x):
        a = x.reshape(-1, 4) @ W1
        y = np.maximum(a, 0).reshape(len(x), -1) @ W2
        return (y**2).mean(), (x.shape, a, y)

    def backward(dout, cache):
        shape, a, y = cache
        da = ((2 * dout * y / y.size) @ W2.T).reshape(a.shape) * (a > 0)
        return (da @ W1.T).reshape(shape)

    for seed in range(4):
        x = rng.random((3, 24))
        x[:, 12:] = 0
        assert gradcheck(forward, backward, x, seed=seed)[0].verdict == "not judged"


def test_a_gradient_of_zero_may_be_rounded():
    """Guards: a false alarm for a bias before a normalisation, whose gradient is 0 but for its rounding."""
    def forward(x, W1, W2, b, W3):
        h = np.maximum(x @ W1, 0)
        a = h @ W2 + b
        s = np.sqrt(a.var(0) + 1e-7)
        y = (a - a.mean(0)) / s
        return y @ W3, (x, W1, W2, W3, h, y, s)

    def backward(dout, cache):
        x, W1, W2, W3, h, y, s = cache
        dy = dout @ W3.T
        da = (dy - dy.mean(0) - y * (dy * y).mean(0)) / s
        dh = (da @ W2.T) * (h > 0)
        return dh @ W1.T, x.T @ dh, h.T @ da, da.sum(0), y.T @ dout

    for seed in range(25):
        rng = np.random.default_rng(seed)
        sizes = {"x": (5, 4), "W1": (4, 8), "W2": (8, 6), "b": (6,), "W3": (6, 2)}
        inputs = {name: rng.standard_normal(size) for name, size in sizes.items()}
        assert all(r.verdict != "wrong" for r in gradcheck(forward, backward, inputs, seed=seed))


def test_a_kink_at_one_of_two_points_is_noted():
    """Guards: a note that is lost when the worse of two points is reported."""
    points = iter([np.array([1.0, 0.0]), np.array([1.0, 2.0])] * 4)
    for _ in range(4):
        (result,) = gradcheck(RELU, lambda dout, x: dout * (x > 0), lambda rng: next(points))
        assert result.ok and "x[1] = 0 is a kink" in result.notes[0]


def test_two_sets_of_steps_that_disagree_do_not_judge():
    """Guards: an error that was set to 0 because a second judgement did not confirm the first."""
    x = np.array([0.0, 0.0, 1e8, -1e8])
    for factor in (1.05, 1.01):
        backward = lambda dout, x, f=factor: f * dout / np.cosh(np.clip(x, -300, 300)) ** 2  # noqa: E731
        for seed in range(5):
            assert not gradcheck(lambda x: (np.tanh(x), x), backward, x, seed=seed)[0].ok


def test_the_rule_that_is_broken_is_not_lost():
    """Guards: a broken rule and an ok with the same name, of which only the last was kept."""
    calls = []

    def backward(dout, x):
        calls.append(None)
        return 2 * x * dout * (1 + 1e-9 * (len(calls) == 9))  # the second call at the second point

    (result,) = gradcheck(lambda x: (x * x, x), backward, np.array([1.0, 2.0]))
    assert str(result) == "dx: backward called twice gives two answers"


@pytest.mark.parametrize("x", [[1e-310, 1], [5e-324, 1], [1e200, 1], [1e-200, 1e-200], [np.inf, 1, -np.inf]])
def test_no_number_is_too_large_or_too_small(x):
    """Guards: an OverflowError of the checker. The command line blamed the user's line for the error."""
    forward = lambda x: (2 * np.clip(x, -9e307, 9e307), x)  # noqa: E731
    assert gradcheck(forward, lambda dout, x: 2.0 * dout * np.isfinite(x), np.array(x))[0].ok


def test_a_backward_that_is_not_linear_is_caught():
    """Guards: gradients that are cut off at a limit far above or below every ordinary dout."""
    for cut in (lambda d: np.clip(d, -9, 9), lambda d: d * (np.abs(d) > 1e-4)):
        (result,) = gradcheck(lambda x: (2 * x, x), lambda d, x, cut=cut: 2 * cut(d), np.ones(4))
        assert "dx: backward is not linear in dout: 1024 dout must give 1024 gradients" in str(result)


def test_a_backward_without_dout_is_named():
    """Guards: the message "is dout cut off?" for the most common mistake in a loss."""
    (result,) = gradcheck(lambda x: (np.sum(x * x), x), lambda dout, x: 2 * x, np.ones(4))
    assert str(result) == "dx: backward does not depend on dout: multiply by it (chain rule)"
    for scaled in lambda d: d / np.linalg.norm(d), np.sign:
        (result,) = gradcheck(lambda x: (x * x, x), lambda dout, x, f=scaled: 2 * x * f(dout), np.ones(4))
        assert "not linear in dout" in result.problem and not result.diagnosis


def test_the_order_of_a_dict_does_not_matter(rng):
    """Guards: right gradients called wrong because the dict has another order than forward's parameters."""
    inputs = {"w": rng.standard_normal((4, 2)), "x": rng.standard_normal((3, 4))}
    backward = lambda dout, c: (dout @ c[1].T, c[0].T @ dout)  # noqa: E731
    tinygpt.assert_gradients(lambda x, w: (x @ w, (x, w)), backward, inputs)


def test_zeros_move_at_the_second_point():
    """Guards: a term that a bias of zeros hides, as at the beginning of every training."""
    forward = lambda x, b: (np.tanh(x) * (1 + b), (x, b))  # noqa: E731
    backward = lambda d, c: (d * (1 - np.tanh(c[0]) ** 2), (d * np.tanh(c[0])).sum(0))  # noqa: E731
    inputs = lambda rng: {"x": rng.standard_normal((5, 4)), "b": np.zeros(4)}  # noqa: E731
    for points in inputs, inputs(np.random.default_rng(0)):
        assert list(wrong_ones(forward, backward, points)) == ["dx"]


def test_caches_of_all_kinds():
    """Guards: exceptions of the checker at a cache that is unusual, but right."""
    @dataclasses.dataclass(slots=True)
    class Cache:
        x: np.ndarray
        owner: object = None

    nest = {"objects": np.array([np.ones(2), None], object), "nan": np.array([complex(np.nan)])}
    nest["itself"], ring = nest, Cache(np.ones(2))
    ring.owner = ring
    forward = lambda x: (x * x, [Cache(x), nest, ring])  # noqa: E731
    tinygpt.assert_gradients(forward, lambda d, c: 2 * d * c[0].x, np.ones(3))


@pytest.mark.parametrize("out", [(), None, {"y": 1.0}, (np.ones(2), (np.ones(2), np.ones(3)))], ids=str)
def test_an_out_that_is_none_is_one_line(out):
    with pytest.raises(UserError, match="out must be an array, a number or a tuple of these, and no nest"):
        gradcheck(lambda x: (out, None), lambda d, c: d, np.ones(2))


def test_arrays_without_axes_and_without_elements():
    inputs = {"x": np.ones(2), "t": np.array(3.0), "none": np.ones((0, 3))}
    forward = lambda x, t, none: (x * t, (x, t, none))  # noqa: E731
    backward = lambda dout, c: (dout * c[1], np.sum(dout * c[0]), c[2].copy())  # noqa: E731
    assert [r.verdict for r in gradcheck(forward, backward, inputs)] == ["ok"] * 3
    assert gradcheck(lambda x: (x[:0], x), lambda dout, x: 0 * x, np.ones(3))[0].ok


def test_tolerances_must_be_positive():
    for options in ({"rtol": 0}, {"rtol": np.nan}, {"atol": -1}):
        with pytest.raises(UserError, match="must be more than 0"):
            gradcheck(lambda x: (x + 0, None), lambda dout, c: dout, np.ones(2), **options)


def test_notes_are_no_failures():
    """A float32 gradient, and a shape in which exchanged axes do not show."""
    x = np.random.default_rng(1).standard_normal((3, 3))
    (result,) = gradcheck(lambda x: (2 * x, None), lambda dout, c: (2 * dout).astype(np.float32), x)
    assert result.ok and 0 < result.rel_err < 1e-6
    assert [note.split(":")[0] for note in result.notes] == ["backward returns float32 for x", "x is 3 x 3"]
    assert not gradcheck(lambda x: (2 * x, None), lambda dout, c: 2 * dout, x[:2])[0].notes


def test_one_wrong_element_of_a_million():
    """The error is 1 % of an ordinary gradient. The report says how many elements were judged alone."""
    x = np.random.default_rng(1).standard_normal((1000, 1000))

    def backward(dout, x):
        dx = 2 * x * dout
        dx[777, 3] += 0.01 * np.sqrt(np.mean(dx**2))
        return dx

    (result,) = gradcheck(lambda x: (x * x, x), backward, x)
    assert (result.verdict, result.index) == ("wrong", (777, 3))
    assert result.extent == "1 of 1,000,000 elements one by one"
    (result,) = gradcheck(lambda x: (x * x, x), lambda dout, x: 2 * x * dout, x[:100])
    assert result.ok and result.extent == "4 random directions, 0 of 100,000 elements one by one"


def test_pytest_does_not_show_the_checkers_source(tmp_path):
    """Guards: forty lines of this project above the one line with the mistake."""
    (tmp_path / "test_mine.py").write_text(textwrap.dedent("""
        import numpy as np, tinygpt

        def test_it():
            tinygpt.assert_gradients(lambda x: (2 * x, None), lambda dout, cache: dout, np.ones(2))
    """), encoding="utf-8")  # fmt: skip
    run = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_mine.py"],
                         cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert "E       AssertionError: dx: relative error 5.0e-01" in run.stdout
    assert "gradcheck.py" not in run.stdout and "failures :=" not in run.stdout


def test_the_readmes_test_file(mine, tmp_path):
    """Guards: an example of the README that does not run, or has another output than the README says."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    source = re.search(r"<!-- test file -->\n```python\n(.*?)```", readme, re.DOTALL)[1]
    file = tmp_path / "test_mine.py"
    for right, passed in (False, "1 failed"), (True, "1 passed"):
        if right:
            right_one = "return p * (dout - (p * dout).sum(-1, keepdims=True)) "
            source = source.replace("return p * dout ", right_one)
        file.write_text(source, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file.name]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert passed in run.stdout
        result = mine("test_mine.py:softmax")
        assert result.exit_code == (0 if right else 1)
        assert right or re.search(r"^WRONG  dx: .*$", readme, re.MULTILINE)[0] == result.output.strip()


def test_a_backward_that_uses_up_its_cache_is_named():
    """Guards: a KeyError in a line of the checker, at the second call of backward."""
    (result,) = gradcheck(lambda x: (2 * x, {"y": 1}), lambda dout, c: dout * 2 * c.pop("y"), np.ones(2))
    assert str(result).startswith("cache: backward raises KeyError when it is called again ('y'): keep what")


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
    """Ids and switches have no gradient. None and False leave out a gradient. This is a failure unless the
    caller allows it."""

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
    assert (dw.name, dw.ok, left_out.verdict) == ("dw", True, "missing")
    assert str(left_out) == "dunused: backward returns no gradient for it" and np.isnan(left_out.rel_err)
    with_false = lambda dout, cache: (backward(dout, cache)[0], False)  # noqa: E731
    tinygpt.assert_gradients(forward, with_false, inputs, allow_missing=True)
    with pytest.raises(AssertionError, match="^dunused: backward returns no gradient for it$"):
        tinygpt.assert_gradients(forward, with_false, inputs)


def test_the_users_arrays_are_not_touched(rng):
    x = rng.standard_normal((3, 4))
    copy = x.copy()
    gradcheck(lambda x: (x.__imul__(2), None), lambda dout, cache: 2 * dout, [x])
    np.testing.assert_array_equal(x, copy)


@pytest.mark.parametrize("forward, backward, message", [
    (lambda x: x, lambda d, c: d, r"must return \(out, cache\)"),
    (lambda x: (x.astype(np.float32), None), lambda d, c: d, "float32"),
    (lambda x: (x > 0, None), lambda d, c: d, "bool"),
    (lambda x: (x * [1, np.nan, 1], None), lambda d, c: 0 * d, "nan for these inputs"),
    (lambda x: (x + 0, None), lambda d, c: (d, d), "2 gradients; float arrays: x "),
    (lambda x: (x + 0, None), lambda d, c: {"y": d}, "no gradient for x; it must return numbers for x"),
    (lambda x: (x + 0, None), lambda d, c: {"x": d, "y": d}, "a gradient for y; it must return"),
    (lambda x: (x + 0, None), lambda d, c: d * 1j, "complex128 for x; it must return numbers"),
    (lambda x: (x + 0, None), lambda d, c: (None,), "nothing to check"),
    (lambda x: (x + 0, None), lambda d, c: None, "backward returns None, .*: end it with `return dx`"),
])  # fmt: skip
def test_what_cannot_be_checked_is_refused(forward, backward, message):
    """Guards: success, though nothing was checked."""
    with pytest.raises(UserError, match=message):
        gradcheck(forward, backward, {"x": np.ones(3)})
    for nothing in np.arange(3), np.ones((0, 3)):
        with pytest.raises(UserError, match="nothing to differentiate"):
            gradcheck(forward, backward, {"x": nothing})


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize("kind", [np.matrix, np.ma.MaskedArray])
def test_other_kinds_of_arrays_are_refused(kind):
    """Guards: a mask that is dropped; a * of matrices that becomes a product of elements."""
    with pytest.raises(UserError, match=rf"^x\['a'\] is a {kind.__name__}: pass a plain array$"):
        gradcheck(lambda x: (x["a"], None), lambda dout, c: {"a": dout}, {"x": {"a": kind(np.ones((3, 3)))}})


# --- the contract ------------------------------------------------------------------------------------------


def broken_rules(forward, backward, inputs):
    return {r.name: r.problem for r in gradcheck(forward, backward, inputs) if r.problem}


def test_broken_rules_are_named():
    """Bugs that a single call does not show: EurekaLabs' mlp overwrites its cache. micrograd gives another
    answer the second time (issue 53)."""
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
    assert unseeded == {"out": "forward called twice gives two answers: make its random numbers from a seed"}


def test_what_is_right_is_not_called_wrong(rng):
    """Guards: right gradients called wrong too, because backward has written to dout or x. The first call may
    keep an array to which the second call writes."""
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


def test_an_input_whose_name_begins_like_another():
    """Guards: the gradient of x1 left out because that of x is."""
    forward = lambda x, x1: (x * x1, (x, x1))  # noqa: E731
    results = gradcheck(forward, lambda dout, c: (None, 2 * dout * c[0]), [np.ones(3), np.ones(3)])
    assert [r.verdict for r in results] == ["missing", "wrong"]


def test_one_gradient_for_several_is_counted(rng):
    x, w, b = rng.standard_normal((3, 2)), rng.standard_normal((2, 4)), rng.standard_normal(4)
    for backward, says in (
        (lambda dout, cache: dout, r"^backward returns 1 gradient; float arrays: x, w, b \(write None"),
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

        def hidden_forward(x):
            return x + 1e14, x

        def hidden_backward(dout, x):
            return 1.01 * dout

        def noisy_forward(x):
            print("hello from forward")
            return 2 * x, x

        def noisy_backward(dout, x):
            return 2 * dout

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

        class Listed(Linear):
            def __init__(self):
                self.params, self.grads = 7, 8

        class Single(Linear):
            def __init__(self):
                super().__init__()
                self.params["w"] = self.params["w"].astype(np.float32)

        class Sized(Linear):
            def __init__(self, size):
                super().__init__()

        class Keeps(Linear):
            def backward(self, dout):
                self.first = getattr(self, "first", self.x)
                self.grads["w"] += self.first.T @ dout  # of the first call for ever
                self.grads["b"] += dout.sum(0)
                return dout @ self.params["w"].T

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


def test_what_is_left_out_is_a_failure(mine):
    """Half an exercise must not look like a whole one."""
    shapes = "--shape", "x=3,4", "--shape", "g=4"
    for extra, status, ok in ((), 1, False), (("--allow-missing",), 0, None):
        result = mine("mine:half", *shapes, *extra)
        assert result.exit_code == status, result.output
        dx, dg = result.output.splitlines()
        assert dx.startswith("ok     dx: ") and dg == "MISSING dg: backward returns no gradient for it"
        dx, dg = json.loads(mine("mine:half", *shapes, *extra, "--json").output)
        assert dx["ok"] is True
        assert (dg["name"], dg["rel_err"], dg["ok"], dg["verdict"]) == ("dg", None, ok, "missing")


def test_what_is_not_judged_is_said(mine):
    """Guards: silence about a gradient that the differences cannot judge."""
    for extra, status in ((), 0), (("--strict",), 1):
        result = mine("mine:hidden", "--shape", "x=3", *extra)
        assert result.exit_code == status
        assert result.output.startswith("NOT JUDGED dx: uncertain differences: outputs round")
    assert json.loads(mine("mine:hidden", "--shape", "x=3", "--json").output)[0]["ok"] is None


def test_json_is_alone_on_standard_output(mine):
    """Guards: prints of forward in the middle of the JSON that another program reads."""
    result = mine("mine:noisy", "--shape", "x=3", "--json")
    assert json.loads(result.stdout)[0]["ok"] is True
    assert "hello from forward" in result.stderr


@pytest.mark.parametrize("target", ["mine:axis", "mine.py:axis"])
def test_the_users_own_line_is_named(mine, target):
    """An exception may come from NumPy. The message names the last line of the user's file."""
    lines = Path("mine.py").read_text(encoding="utf-8").splitlines()
    line = 1 + lines.index("    return np.sum(x, axis=5), x")
    result = mine(target, "--shape", "x=2,3")
    assert f"mine.py, line {line}, in axis_forward)" in result.output and result.exit_code == 2
    result = mine("mine:elsewhere", "--shape", "data=2,3")
    assert re.search(r"raised .* \(.*statistics\.py, line", result.output)


@pytest.mark.parametrize("target", ["mine:Linear", "mine:layer"])
def test_a_users_layer(mine, target):
    """The gradients of its parameters are checked too. They may add up from call to call."""
    rows = json.loads(mine(target, "--shape", "x=3,4", "--json").output)
    verdicts = [(row["name"], row["ok"]) for row in rows]
    assert verdicts == [("dx", True), ("grads['w']", True), ("grads['b']", False)]
    assert all({"name", "backend", "rel_err", "ok", "verdict", "notes"} <= set(row) for row in rows)
    rows = json.loads(mine("mine:Keeps", "--shape", "x=3,4", "--json").output)
    assert [row["name"] for row in rows if row["ok"] is False] == ["grads['w']"]


def test_the_lines_to_add_are_printed(mine):
    """A reader pastes these lines. They must be Python, and name the parameters that have no default."""
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
    (["mine:Listed", "--shape", "x=3"], "mine:Listed raised TypeError: 'int' object is not subscriptable"),
    (["mine:Single", "--shape", "x=3,4"], "params['w'] is float32: parameters must be float64 arrays"),
    (["mine:Sized", "--shape", "x=3,4"], "'size'): write them, as in \"mine:Sized(4, 3)\""),
    (["mine:Sized(1, 2)", "--shape", "x=3,4"], "mine:Sized(1, 2) needs other arguments (Sized"),
    (["mine:crash", "--shape", "x=2,3"], "mine:crash raised ValueError: cannot reshape"),
    (["mine:scale", "--shape", "x=2,3"], "missing 1 required positional argument: 'g'"),
    (["mine:scale", "--shape", "y=2,3"], "unexpected keyword argument 'y'"),
    (["mine:scale", "--shape", "x=2,z"], "'x=2,z' is not name=sizes"),
    (["mine:scale", "--tol", "0"], "--rtol"),
    (["--shape", "x=2"], "--shape is for your own code"),
])  # fmt: skip
def test_mistakes_give_one_line(mine, arguments, message):
    result = mine(*arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    *usage, line = result.output.strip().splitlines()
    assert message in line
    assert not usage or usage[0].startswith("Usage:")


def test_a_layer_that_needs_arguments(mine):
    assert "WRONG  grads['b']" in mine("mine.py:Sized(2)", "--shape", "x=3,4").output


def test_what_is_no_layer_gets_the_conventions(mine):
    """Guards: an AttributeError, and a table that is printed in one line."""
    result = mine("mine:Half", "--shape", "x=3,4")
    assert result.exit_code == 2 and result.stderr.startswith("tinygpt: a Half has no backward. A layer is")
    assert "\n    parameters   " in result.stderr


def test_json_says_what_could_not_be_checked(mine):
    """Guards: a SyntaxError that another program reads as no JSON at all."""
    for target in "typo.py:f", "mine:Half", "mine:scale", "nowhere:f":
        result = mine(target, "--json")
        (row,) = json.loads(result.stdout)
        assert result.exit_code == 2 and row["ok"] is False and row["problem"] and row["name"] == target
    (row,) = json.loads(mine("mine:wrong", "--json").stdout)
    assert row["index"] == [1, 2] and row["diagnosis"] == "it is wrong at [1, 2] only"


def test_the_projects_own_table(monkeypatch):
    """Every operation in every backend is right. A wrong one changes the exit status to 1."""
    result = CliRunner().invoke(main, ["gradcheck", "--strict", "--json"])
    assert result.exit_code == 0
    rows = json.loads(result.output)
    assert all(row["ok"] for row in rows)
    for backend in kernels.available():
        names = {row["name"] for row in rows if row["backend"] == backend}
        for function in dir(ops):
            if function.endswith("_backward"):
                assert function.removesuffix("_backward") in names
        assert {"whole model", "whole model, post-norm"} < names
    assert max(row["rel_err"] for row in rows) <= 1e-7

    def spoiled(ops, rng):
        yield "gelu", (ops.gelu_forward, lambda dout, cache: dout, {"x": rng.standard_normal(5)})

    monkeypatch.setattr(targets, "project_pairs", spoiled)
    result = CliRunner().invoke(main, ["gradcheck"])
    assert result.exit_code == 1
    assert "WRONG  numpy  gelu" in result.output
