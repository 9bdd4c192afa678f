"""Products of operands that are rounded to bfloat16."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from tinygpt.core import kernels, ops
from tinygpt.core.config import GPTConfig
from tinygpt.core.generate import generate
from tinygpt.core.model import GPT
from tinygpt.core.optim import AdamW
from tinygpt.core.train import Batch, gradients

CONFIG = GPTConfig(vocab_size=61, block_size=32, n_layer=2, n_head=2, n_embd=24)
needs_c = pytest.mark.skipif("c" not in kernels.available(), reason="needs the C core")
SHAPES = [(1, 1, 1), (3, 5, 7), (8, 32, 2), (9, 33, 385), (64, 64, 1001), (7, 200, 128), (300, 70, 1537)]


def model(ops, dtype: str = "bfloat16") -> GPT:
    model = GPT(CONFIG, np.random.default_rng(0), ops=ops)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a processor without such products
        model.compute_in(dtype)
    return model


def transposes(a, b):
    """The same product from operands that lie otherwise: NN, NT, TN."""
    return [(a, b), (a, np.ascontiguousarray(b.T).T), (np.ascontiguousarray(a.T).T, b)]


def test_rounding_is_to_the_nearest_and_to_even():
    """Guards: ties, which go to an even digit, and numbers that have no exponent or are none."""
    one, step = np.float32(1), np.float32(2.0**-7)  # from 1 to the next bfloat16
    x = [1, 1 + step / 2, 1 + 3 * step / 2, 1 + step * 0.51, 3.4e38, -0.0, 1e-45, np.inf, np.nan, 257]
    x = np.array(x, np.float32)
    expected = np.array([1, 1, one + 2 * step, one + step, np.inf, -0.0, 0, np.inf, np.nan, 256], np.float32)
    np.testing.assert_array_equal(ops.nearest_bfloat16(x), expected)
    assert np.signbit(ops.nearest_bfloat16(x)[5])
    np.testing.assert_array_equal(ops.nearest_bfloat16(ops.nearest_bfloat16(x)), ops.nearest_bfloat16(x))
    with pytest.raises(TypeError):
        ops.nearest_bfloat16(np.ones(2))


@needs_c
@pytest.mark.parametrize("M, N, K", SHAPES)
def test_a_product_is_that_of_the_rounded_operands(rng, M, N, K):
    """Guards: pairs at an odd end, slices of K, rows that fill no tile; each layout of the operands."""
    a, b = rng.standard_normal((M, K)).astype(np.float32), rng.standard_normal((K, N)).astype(np.float32)
    whole_a, whole_b = (rng.integers(-8, 9, x.shape).astype(np.float32) for x in (a, b))
    near_a, near_b = ops.nearest_bfloat16(a).astype(np.float64), ops.nearest_bfloat16(b).astype(np.float64)
    bound = 2 * (K + 2) * 2.0**-24 * (abs(near_a) @ abs(near_b)) + K * 2.0**-125
    for x, y in transposes(a, b):
        assert (abs(kernels.gemm(x, y, bfloat16=True) - near_a @ near_b) <= bound).all()
    for x, y in transposes(whole_a, whole_b):
        np.testing.assert_array_equal(kernels.gemm(x, y, bfloat16=True), whole_a @ whole_b)
    bias, add = rng.standard_normal(N).astype(np.float32), rng.standard_normal((M, N)).astype(np.float32)
    more = kernels.gemm(a, b, bias, add, bfloat16=True)
    assert (abs(more - (near_a @ near_b + bias + add)) <= bound + 1e-6 * (abs(more) + 2)).all()


@needs_c
def test_the_c_core_rounds_as_numpy_does(rng):
    """Guards: ties, which random numbers do not show: a product by 1 is the rounded number."""
    bits = rng.integers(0x00800000, 0x7F7F0000, 4096).astype(np.uint32)
    bits[::2] = bits[::2] & 0xFFFF0000 | 0x8000  # half of the way between two bfloat16
    x = bits.view(np.float32)[:, None]
    out = kernels.gemm(x, np.ones((1, 1), np.float32), bfloat16=True)
    np.testing.assert_array_equal(out, ops.nearest_bfloat16(x))


@needs_c
def test_infinity_and_nan_survive(rng):
    a, b = np.ones((3, 5), np.float32), np.ones((5, 4), np.float32)
    a[0, 4], a[1, 2] = np.nan, np.inf
    out = kernels.gemm(a, b, bfloat16=True)
    assert np.isnan(out[0]).all() and np.isposinf(out[1]).all() and (out[2] == 5).all()
    with pytest.raises(TypeError, match="float32"):
        kernels.gemm(a.astype(float), b.astype(float), bfloat16=True)


@needs_c
@pytest.mark.parametrize("M, N, K", [(1, 40, 7), (1, 33, 8), (3, 70, 33), (70, 32, 9)])
def test_a_packed_weight_gives_the_same_product(rng, M, N, K):
    """Guards: a pair in another order than an unpacked one's; one row whose strides are those of a column."""
    x, w = rng.standard_normal((M, K)).astype(np.float32), rng.standard_normal((K, N)).astype(np.float32)
    for b in (w, np.ascontiguousarray(w.T).T):
        panels, ready = np.zeros(kernels.panels_size(b, True), np.float32), np.ones(1, np.int32)
        kernels.pack_panels(panels, b, True)
        tape = SimpleNamespace(add=lambda *call: None, panels=lambda *b, copy=(panels, ready): copy)
        row = x.T.copy().T if M == 1 else x  # (1, K) with the strides of (K, 1)
        with kernels.current_tape.use(tape):
            out = kernels.gemm(row, np.full_like(b, np.nan), bfloat16=True)  # the weight itself is not read
        product = ops.nearest_bfloat16(x) @ ops.nearest_bfloat16(w)
        np.testing.assert_allclose(out, product, rtol=1e-5, atol=1e-5)


@needs_c
def test_both_backends_agree_on_loss_and_gradients(rng):
    """Guards: an operand that one of them rounds and the other does not."""
    ids, targets = rng.integers(61, size=(2, 3, 20)).astype(np.int32)
    flats = []
    for backend in (kernels, ops):
        one = model(backend)
        flat, grads = one.gradients()
        flats.append((float(one.loss(ids, targets, None, grads)), flat))
    assert abs(flats[0][0] - flats[1][0]) < 1e-5
    assert abs(flats[0][1] - flats[1][1]).max() < 1e-3 * abs(flats[1][1]).max()  # a tie may fall otherwise
    exact = model(kernels, "float32")
    flat, grads = exact.gradients()
    exact.loss(ids, targets, None, grads)
    assert 2e-3 < abs(flats[0][1] - flat).max() / abs(flat).max() < 0.1  # rounded, and no more than that


@needs_c
def test_replay_and_threads_change_no_bit(rng):
    one = model(kernels)
    optimizer = AdamW(one)
    compute, batch = gradients(optimizer), Batch(*rng.integers(61, size=(2, 3, 20)).astype(np.int32),
                                                 np.full((3, 20), 1 / 60, np.float32))  # fmt: skip
    compute([batch])
    first = optimizer.flat.copy()
    for threads in (1, 3):
        kernels.set_threads(threads)
        compute([batch])
        np.testing.assert_array_equal(optimizer.flat, first)


@needs_c
def test_generation_reads_packed_weights(rng):
    """Guards: a packed pair that is another than that of an unpacked product."""
    one, prompts = model(kernels), [rng.integers(61, size=n).astype(np.int32) for n in (3, 7)]
    texts = generate(one, prompts, 20, temperature=0)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = np.concatenate([prompt, text[:-1]])[None]
        logits, _ = one.forward(ids, keep=False)
        best = logits[0, len(prompt) - 1 :].max(-1)
        chosen = np.take_along_axis(logits[0, len(prompt) - 1 :], text[:, None], -1)[:, 0]
        assert (best - chosen < 1e-2).all()


def test_small_updates_add_up_in_the_weights(ops):
    """Guards: weights that are kept in bfloat16, where 1 + 1e-4 is 1."""
    w, m, v = np.ones(8, np.float32), np.zeros(8, np.float32), np.zeros(8, np.float32)
    for step in range(1, 101):
        ops.adamw(w, np.ones(8, np.float32), m, v, step=step, lr=1e-4, beta1=0.9, beta2=0.99, eps=1e-8,
                  weight_decay=0.0)  # fmt: skip
    np.testing.assert_allclose(w, 0.99, atol=1e-5)


def test_a_wrong_dtype_is_refused():
    with pytest.raises(Exception, match="float32 or bfloat16"):
        GPT(CONFIG).compute_in("float16")
