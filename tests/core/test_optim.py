"""The optimizer: AdamW against its definition, clipping, what decays, what is frozen, the learning rate."""

import math

import numpy as np
import pytest

from tinygpt.core.config import GPTConfig
from tinygpt.core.model import GPT
from tinygpt.core.optim import AdamW, learning_rate

CONFIG = GPTConfig(vocab_size=11, block_size=6, n_layer=2, n_head=2, n_embd=8)


def make(ops, names=None, **settings) -> tuple[GPT, AdamW]:
    model = GPT(CONFIG, np.random.default_rng(0), np.float64, ops)
    return model, AdamW(model, names, **settings)


@pytest.mark.parametrize("names", [None, ["wte.weight", "h.0.ln_1.bias", "h.1.mlp.c_fc.weight", "ln_f.bias"]])
def test_each_tensor_is_updated_by_the_definition(ops, rng, names):
    """Guards: a vector that decays, a span that is off by one tensor, a frozen weight that moves."""
    model, optimizer = make(ops, names, beta1=0.8, beta2=0.95, weight_decay=0.3, grad_clip=0.5)
    expected = {name: p.copy() for name, p in model.params.items()}
    m = {name: np.zeros_like(g) for name, g in optimizer.grads.items()}
    v = {name: np.zeros_like(g) for name, g in optimizer.grads.items()}
    for step in (1, 2, 3):
        optimizer.flat[:] = rng.normal(0, 1, optimizer.flat.shape)
        norm = math.sqrt(sum((g**2).sum() for g in optimizer.grads.values()))
        for name, g in optimizer.grads.items():
            g = g * min(1, 0.5 / norm)
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            update = m[name] / (1 - 0.8**step) / (np.sqrt(v[name] / (1 - 0.95**step)) + 1e-8)
            decay = 0.3 if g.ndim == 2 else 0
            expected[name] += -0.01 * decay * expected[name] - 0.01 * update
        assert optimizer.step(0.01) == pytest.approx(norm, rel=1e-12)
    for name, p in model.params.items():
        np.testing.assert_allclose(p, expected[name], rtol=1e-10, atol=1e-14, err_msg=name)


def test_the_whole_model_is_two_calls(ops):
    """Guards: one call a tensor, which for GPT-2 is 148 instead of 2."""
    model, optimizer = make(ops)
    assert [decays for _, _, decays in optimizer.spans] == [True, False]
    assert optimizer.spans[0][0].start == 0 and optimizer.spans[1][0].stop == model.flat.size


def test_a_small_gradient_is_not_blown_up(ops):
    """Guards: clipping that scales every gradient to the limit."""
    (a, clipped), (b, free) = make(ops, grad_clip=1.0), make(ops, grad_clip=0.0)
    for optimizer in (clipped, free):
        optimizer.flat[:] = 1e-4
        optimizer.step(0.01)
    assert a.flat.tobytes() == b.flat.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_updates_nothing(ops, bad):
    """Guards: weights that are lost by the time anybody looks at the norm."""
    model, optimizer = make(ops)
    before = model.flat.copy()
    optimizer.flat[:] = 1.0
    optimizer.flat[7] = bad
    assert not math.isfinite(optimizer.step(0.01))
    assert (model.flat == before).all() and not optimizer.m.any() and optimizer.steps == 0


def test_the_learning_rate_is_nanogpts():
    """Guards: a warm-up that begins at 0, a cosine over the wrong length."""
    sizes = {"peak": 1e-3, "lowest": 1e-4, "warmup_iters": 100, "max_iters": 2000}
    rate = [learning_rate(step, **sizes) for step in range(2001)]
    assert rate[0] == pytest.approx(1e-3 / 101) and rate[99] == pytest.approx(1e-3 * 100 / 101)
    assert rate[100] == 1e-3 and rate[2000] == 1e-4
    assert rate[1050] == pytest.approx((1e-3 + 1e-4) / 2)  # halfway down
    assert rate[575] == pytest.approx(1e-4 + 0.5 * (1 + math.sqrt(0.5)) * 9e-4)  # a quarter of the way
    assert learning_rate(0, peak=1.0, lowest=0.1, warmup_iters=0, max_iters=1) == 1.0
    assert learning_rate(5, peak=1.0, lowest=0.1, warmup_iters=9, max_iters=9) == 0.6  # all warm-up
