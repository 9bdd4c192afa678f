"""What torch.autograd.gradcheck and jax.test_util.check_grads say of planted mistakes.

    python tests/peers/test_gradcheck_peers.py      prints the README's table; a missing library has "-"

Each mistake is written once, for three libraries of arrays: `m` is numpy, torch or jax.numpy. All three
checkers have their default settings, and float64.
"""

import numpy as np
import pytest

from tinygpt.check.gradcheck import gradcheck

SQUARE = np.random.default_rng(0).standard_normal((4, 4))
NORMAL = np.random.default_rng(1).standard_normal((4, 4))
LARGE = np.random.default_rng(2).standard_normal((40, 50))
SCALES = np.array([1e7, 1.0, 1.0, 1.0])
ONE_WRONG = np.ones((40, 50))
ONE_WRONG[31, 7] = 1.01
ZEROS = np.array([0.0, -1.0, 2.0, 0.0])
STATE: dict = {}


def tanh(m, x):
    return m.tanh(x)


def softmax(m, x):
    e = m.exp(x)
    return e / e.sum(-1)[:, None]


def dtanh(m, dout, x):
    return dout * (1 - m.tanh(x) ** 2)


def first_input(m, dout, x):
    return dtanh(m, dout, STATE.setdefault("x", x))


def adds_up(m, dout, x):
    STATE["dx"] = STATE.get("dx", 0) + dtanh(m, dout, x)
    return STATE["dx"]


def writes(m, dout, x):
    if m.__name__ == "jax.numpy":
        pytest.skip("arrays of JAX are never written to")
    dout *= 2
    return dtanh(m, dout, x) / 2


MISTAKES = {  # forward, backward, x
    "a factor of 1.01": (tanh, lambda m, d, x: 1.01 * dtanh(m, d, x), NORMAL),
    "a factor of 1.0001": (tanh, lambda m, d, x: 1.0001 * dtanh(m, d, x), NORMAL),
    "a transpose missing, square matrices": (
        lambda m, w: m.asarray(SQUARE) @ w, lambda m, d, w: m.asarray(SQUARE) @ d, NORMAL),
    "a term of softmax missing": (softmax, lambda m, d, x: softmax(m, x) * d, NORMAL),
    "dout ignored in a loss": (lambda m, x: (x**2).sum(), lambda m, d, x: 2 * x, NORMAL),
    "3 for 1 beside a gradient of 1e7": (
        lambda m, x: x * m.asarray(SCALES), lambda m, d, x: d * m.asarray(SCALES * [1, 3, 1, 1]), NORMAL),
    "3e-6 for 1e-6 beside a gradient of 1": (
        lambda m, x: x * m.asarray(SCALES / 1e7),
        lambda m, d, x: d * m.asarray(SCALES / 1e7 * [1, 3, 1, 1]), NORMAL),
    "1.0001 times, 1e6 added to the output": (lambda m, x: x + 1e6, lambda m, d, x: 1.0001 * d, NORMAL),
    "1 % too much in 1 of 2,000 elements": (
        tanh, lambda m, d, x: dtanh(m, d, x) * m.asarray(ONE_WRONG), LARGE),
    "backward keeps its first input": (tanh, first_input, NORMAL),
    "backward adds up from call to call": (tanh, adds_up, NORMAL),
    "backward writes to dout": (tanh, writes, NORMAL),
}  # fmt: skip
RIGHT = {
    "relu at 0": (lambda m, x: x * (x > 0), lambda m, d, x: d * (x > 0), ZEROS),
    "a square root of 1e-9 to 1e10": (
        lambda m, x: m.sqrt(x), lambda m, d, x: d / m.sqrt(4 * x), 10.0 ** np.linspace(-9, 10, 20)),
    "a mask of -1e30": (
        lambda m, x: m.where(m.asarray(SQUARE) > 0, x, m.asarray(-1e30)),
        lambda m, d, x: d * (m.asarray(SQUARE) > 0), NORMAL),
}  # fmt: skip


def ours(forward, backward, x) -> bool:
    results = gradcheck(lambda x: (forward(np, x), x), lambda d, x: backward(np, d, x), x)
    return all(result.ok for result in results)


def torchs(forward, backward, x) -> bool:
    torch = pytest.importorskip("torch")

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return forward(torch, x)

        @staticmethod
        def backward(ctx, dout):
            return backward(torch, dout, *ctx.saved_tensors)

    given = torch.tensor(x, requires_grad=True)
    return torch.autograd.gradcheck(Function.apply, (given,), raise_exception=False)


def jaxs(forward, backward, x) -> bool:
    jax = pytest.importorskip("jax")
    from jax import test_util

    jax.config.update("jax_enable_x64", True)
    function = jax.custom_vjp(lambda x: forward(jax.numpy, x))
    function.defvjp(lambda x: (forward(jax.numpy, x), x), lambda x, d: (backward(jax.numpy, d, x),))
    try:
        test_util.check_grads(function, (jax.numpy.asarray(x),), order=1, modes=["rev"])
    except AssertionError:
        return False
    return True


def accepts(checker, case: tuple) -> bool | None:
    """Whether a checker calls a case right; None without its library."""
    STATE.clear()
    try:
        return checker(*case)
    except pytest.skip.Exception:
        return None


@pytest.mark.parametrize("name", MISTAKES)
def test_ours_catches(name):
    assert accepts(ours, MISTAKES[name]) is False


@pytest.mark.parametrize("name", RIGHT)
def test_ours_accepts(name):
    assert accepts(ours, RIGHT[name]) is True


if __name__ == "__main__":
    print("| mistake | tinygpt | torch | jax |\n|---|---|---|---|")
    words = {True: "accepted", False: "caught", None: "-"}
    for cases in MISTAKES, RIGHT:
        for name, case in cases.items():
            row = [words[accepts(checker, case)] for checker in (ours, torchs, jaxs)]
            print(f"| {name} |", " | ".join(row), "|")
