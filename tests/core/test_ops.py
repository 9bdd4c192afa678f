"""Every operation and its gradient, in each backend: finite differences, written-out references, edges."""

import numpy as np
import pytest

from tinygpt import assert_gradients
from tinygpt.check.targets import model_pair, project_pairs
from tinygpt.core import ops as reference

TOL = 1e-7
NAMES = [name for name, _ in project_pairs(reference, np.random.default_rng(0)) if "model" not in name]


@pytest.mark.parametrize("name", NAMES)
def test_gradients(ops, rng, name):
    """Guards every formula of ops.py and csrc/, and the contract: backward twice gives the same answer
    (micrograd 53) and writes to nothing that it is given."""
    assert_gradients(*dict(project_pairs(ops, rng))[name], rtol=TOL)


@pytest.mark.parametrize("post_norm", [False, True])
def test_gradients_of_the_whole_model(ops, rng, post_norm):
    assert_gradients(*model_pair(ops, rng, post_norm), rtol=TOL, small=4)


# --- embedding, linear -------------------------------------------------------------------------------------


def test_embedding_backward_adds_where_it_is_told_to(ops, rng):
    """The tied table's gradient is the head's part plus this one: overwriting loses the head."""
    ids = np.array([[0, 2, 2], [2, 1, 0]])
    w, dout = rng.standard_normal((4, 3)), rng.standard_normal((2, 3, 3))
    _, cache = ops.embedding_forward(ids, w)
    dw = np.ones_like(w)
    assert ops.embedding_backward(dout, cache, dw, add=True) is dw
    by_hand = np.ones_like(w)
    for b in range(2):
        for t in range(3):
            by_hand[ids[b, t]] += dout[b, t]
    np.testing.assert_allclose(dw, by_hand, rtol=1e-14)
    assert (dw[3] == 1).all()  # no id names row 3
    np.testing.assert_allclose(ops.embedding_backward(dout, cache, dw), by_hand - 1, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("bad", [-1, 4])
def test_an_id_outside_the_table_is_named(ops, bad):
    """-1 would silently be the last row in NumPy, and anything in C."""
    with pytest.raises(IndexError, match=str(bad)):
        ops.embedding_forward(np.array([[0, bad]]), np.zeros((4, 3)))


def test_linear_writes_where_it_is_told(ops, rng):
    x, w, b = rng.standard_normal((2, 5, 6)), rng.standard_normal((6, 3)), rng.standard_normal(3)
    dout, buffers = rng.standard_normal((2, 5, 3)), [np.empty_like(a) for a in (w, b)]
    _, cache = ops.linear_forward(x, w, b)
    grads = ops.linear_backward(dout, cache, *buffers)[1:]
    for grad, buffer, expected in zip(grads, buffers, ops.linear_backward(dout, cache)[1:], strict=True):
        assert grad is buffer
        np.testing.assert_array_equal(buffer, expected)


def test_false_skips_a_gradient(ops, rng):
    """Freezing: what is not asked for comes back as False, and the others are the same to the last bit."""
    x, w, b, dout = (rng.standard_normal(s) for s in ((4, 6), (6, 3), 3, (4, 3)))
    g, db, dln = rng.standard_normal(6), rng.standard_normal(6), rng.standard_normal((4, 6))
    for backward, d, cache in (
        (ops.linear_backward, dout, ops.linear_forward(x, w, b)[1]),
        (ops.layernorm_backward, dln, ops.layernorm_forward(x, g, db)[1]),
    ):
        full = backward(d, cache)
        for index in (1, 2):
            some = backward(d, cache, *(None if i == index else False for i in (1, 2)))
            assert [s is False for s in some] == [False, index != 1, index != 2]
            np.testing.assert_array_equal(some[0], full[0])
            np.testing.assert_array_equal(some[index], full[index])
    assert ops.embedding_backward(dout, (np.zeros(4, np.int32), (5, 3)), dw=False) is False


# --- layer normalisation, GELU -----------------------------------------------------------------------------


def test_layernorm_far_from_zero(ops, rng):
    """E[x^2] - E[x]^2 would cancel: at a mean of 10,000 in float32 nothing would be left of the variance."""
    x = (1e4 + rng.standard_normal((3, 64))).astype(np.float32)
    out, _ = ops.layernorm_forward(x, np.ones(64, np.float32), np.zeros(64, np.float32))
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(out, exact, atol=2e-3)


def test_layernorm_of_a_constant_row_is_its_bias(ops):
    out, cache = ops.layernorm_forward(np.full((1, 8), 3.0), np.ones(8), np.arange(8.0))
    np.testing.assert_array_equal(out[0], np.arange(8.0))
    assert np.isfinite(ops.layernorm_backward(np.ones((1, 8)), cache)[0]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gelu_at_its_ends(ops, dtype):
    """llm.c 19: a fast-math tanh gave NaN at large inputs. GELU is 0 far on the left, x far on the right."""
    x = np.array([-3e38, -1e4, -30, -20, -10, 0, 10, 20, 30, 1e4, 3e38], dtype)
    with np.errstate(over="ignore"):  # x^3 is infinite at both ends, tanh of it is not
        out, _ = ops.gelu_forward(x)
    np.testing.assert_allclose(out, np.maximum(x, 0), atol=1e-6)
    x = x[1:-1]
    dx = ops.gelu_backward(np.ones_like(x), (x,))
    np.testing.assert_allclose(dx, np.heaviside(x, 0.5), atol=1e-6)


# --- attention ---------------------------------------------------------------------------------------------


def test_visible_keys():
    """The rule, written out key by key: own position always, then the document, then the prefix."""
    start = np.array([[0, 0, 2], [3, 1, 9]])  # 3 is after query 0 and 9 after query 2: each still sees itself
    visible = reference.visible_keys(2, 3, 5, start + 1, prefix=1)
    for b in range(2):
        for i in range(3):
            own = 2 + i  # three queries at the end of five keys
            expected = [key <= own and (key == own or key >= start[b, i] + 2 or key < 1) for key in range(5)]
            assert visible[b, 0, i].tolist() == expected, (b, i)
    within = reference.visible_keys(2, 5, 5, start, prefix=2)  # two queries stand in the prefix
    for b, i, key in np.ndindex(2, 5, 5):
        expected = key <= i and (key == i or key < 2 or key >= 2 + start[b, i - 2])
        assert within[b, 0, i, key] == expected


def slowly(q, k, v, n_head, start=None, prefix=0):
    """Attention one head, one query, one key at a time."""
    (B, T, C), S = q.shape, k.shape[1]
    visible, out = reference.visible_keys(B, T, S, start, prefix), np.zeros(q.shape)
    for b, head, i in np.ndindex(B, n_head, T):
        h = slice(head * C // n_head, (head + 1) * C // n_head)
        keys = np.flatnonzero(visible[b, 0, i])
        weight = np.exp([q[b, i, h] @ k[b, s, h] / np.sqrt(C // n_head) for s in keys])
        out[b, i, h] = weight @ v[b, keys, h] / weight.sum()
    return out


@pytest.mark.parametrize("T, S, start, prefix", [
    (5, 5, None, 0), (1, 1, None, 0), (1, 6, None, 0), (3, 6, None, 0),
    (3, 3, [[0, 0, 2], [1, 1, 1]], 0), (3, 6, [[1, 1, 3], [0, 7, 0]], 2), (3, 5, [[2, 2, 2], [0, 1, 2]], 2),
    (5, 5, [[0, 0, 2], [1, 1, 1]], 2), (4, 6, [[0, 0], [0, 1]], 4), (1, 3, [[0], [1]], 1),
    (2, 2, [[], []], 2),
])  # fmt: skip
def test_attention_against_loops(ops, rng, T, S, start, prefix):
    q, k, v = rng.standard_normal((2, T, 6)), rng.standard_normal((2, S, 6)), rng.standard_normal((2, S, 6))
    start = None if start is None else np.array(start, np.int64)
    out, _ = ops.attention_forward(q, k, v, 2, start, prefix)
    np.testing.assert_allclose(out, slowly(q, k, v, 2, start, prefix), rtol=1e-12, atol=1e-14)


def test_a_cache_with_room_left_has_the_gradients_of_its_keys(ops, rng):
    """Guards: gradients of keys that forward did not read, with the numbers that memory happens to have."""
    q, k, v, dout = rng.standard_normal((4, 2, 3, 6))
    room = rng.standard_normal((2, 2, 5, 6))
    room[:, :, :3] = k, v
    expected = ops.attention_backward(dout, ops.attention_forward(q, k, v, 2)[1])
    cache = ops.attention_forward(q, *room, 2, length=np.array(3))[1]
    for result, right in zip(ops.attention_backward(dout, cache), expected, strict=True):
        np.testing.assert_allclose(result, right, rtol=1e-12)
    packed = ops.attention_backward(dout, cache, packed=True)
    np.testing.assert_allclose(packed, np.concatenate(expected, -1), rtol=1e-12)


def test_a_view_begins_at_an_id_that_fits(ops, rng):
    """Guards: 2**32, which is 0 in 32 bits."""
    q = rng.standard_normal((1, 3, 6))
    start = np.full((1, 3), 1 << 32)
    out = ops.attention_forward(q, q, q, 2, np.full((1, 3), 3))[0]  # each query sees its own key only
    try:
        np.testing.assert_allclose(ops.attention_forward(q, q, q, 2, start)[0], out)
    except IndexError as error:
        assert "start" in str(error)


def test_packed_documents_do_not_see_each_other(ops, rng):
    """TRL 1230, 3067: outputs and gradients of two documents in one row equal those of each alone."""
    q, k, v, dout = rng.standard_normal((4, 1, 7, 6))
    start = np.array([[0, 0, 0, 3, 3, 3, 3]])
    packed, cache = ops.attention_forward(q, k, v, 2, start)
    packed_grads = ops.attention_backward(dout, cache)
    for document in (slice(0, 3), slice(3, 7)):
        alone, cache = ops.attention_forward(*(np.ascontiguousarray(a[:, document]) for a in (q, k, v)), 2)
        np.testing.assert_allclose(packed[:, document], alone, rtol=1e-12)
        for together, own in zip(packed_grads, ops.attention_backward(dout[:, document], cache), strict=True):
            np.testing.assert_allclose(together[:, document], own, rtol=1e-12, atol=1e-14)


def test_one_key_has_no_gradient(ops, rng):
    """T = 1: the softmax of one number is 1, whatever the query and the key are."""
    q, k, v, dout = rng.standard_normal((4, 2, 1, 6))
    out, cache = ops.attention_forward(q, k, v, 2)
    np.testing.assert_allclose(out, v, rtol=1e-15)
    dq, dk, dv = ops.attention_backward(dout, cache)
    np.testing.assert_allclose(dq, 0, atol=1e-15)
    np.testing.assert_allclose(dk, 0, atol=1e-15)
    np.testing.assert_allclose(dv, dout, rtol=1e-15)


def test_attention_with_huge_scores(ops, rng):
    """exp overflows at 89 in float32: the largest score is taken off first (llm.c started its at -10000)."""
    q, k, v = (rng.standard_normal((1, 4, 6)).astype(np.float32) for _ in range(3))
    for factor in (1e4, -1e4):
        out, cache = ops.attention_forward(np.float32(1e4) * q, np.float32(factor) * k, v, 2)
        assert np.isfinite(out).all()
        assert all(np.isfinite(g).all() for g in ops.attention_backward(v, cache))


# --- dropout -----------------------------------------------------------------------------------------------


def test_dropout_is_a_function_of_its_seed(ops, rng):
    x = rng.standard_normal((50, 40))
    again, other = ops.dropout_forward(x, 0.3, 5)[0], ops.dropout_forward(x, 0.3, 6)[0]
    np.testing.assert_array_equal(ops.dropout_forward(x, 0.3, 5)[0], again)
    assert (again != other).any()
    np.testing.assert_array_equal(again == 0, ~reference.dropout_mask(x.shape, 0.3, 5))  # in C as in NumPy


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean(ops, rate):
    """200,000 coins: the share of zeros is within 5 standard errors of the rate; those kept are scaled up."""
    x = np.ones(200_000)
    out, cache = ops.dropout_forward(x, rate, 2**63 - 1)
    assert abs((out == 0).mean() - rate) <= 5 * np.sqrt(rate * (1 - rate) / x.size)
    np.testing.assert_allclose(out[out != 0], 1 / (1 - rate))
    np.testing.assert_array_equal(ops.dropout_backward(x, cache), out)


# --- cross-entropy -----------------------------------------------------------------------------------------


def test_cross_entropy_against_its_definition(ops, rng):
    logits, targets = rng.standard_normal((3, 4, 7)), rng.integers(7, size=(3, 4))
    nll, _ = ops.cross_entropy_forward(logits, targets)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(probs, targets[..., None], -1)[..., 0])
    np.testing.assert_allclose(nll, expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cross_entropy_with_huge_logits(ops, dtype):
    """A confident model must be able to be wrong: nll is the gap between the logits, not infinity or NaN."""
    logits, targets = np.array([[1e4, -1e4, 0], [1e4, -1e4, 0]], dtype), np.array([0, 1])
    nll, cache = ops.cross_entropy_forward(logits, targets)
    np.testing.assert_allclose(nll, [0, 2e4], rtol=1e-6)
    dlogits = ops.cross_entropy_backward(np.ones(2, dtype), cache)
    np.testing.assert_allclose(dlogits, [[0, 0, 0], [1, -1, 0]], atol=1e-6)


def test_a_weight_of_zero_is_a_mask(ops):
    """nanochat 590, 811: a masked row gives zeros even where its logits are not numbers."""
    logits, targets = np.array([[0.0, 1.0], [np.inf, np.nan], [2.0, 0.0]]), np.array([0, 1, 1])
    with np.errstate(invalid="ignore"):
        _, cache = ops.cross_entropy_forward(logits, targets)
        dlogits = ops.cross_entropy_backward(np.array([0.5, 0.0, 2.0]), cache)
    np.testing.assert_array_equal(dlogits[1], 0)
    np.testing.assert_allclose(dlogits.sum(-1), 0, atol=1e-15)  # softmax and one-hot both sum to 1
    assert (dlogits[[0, 2]] != 0).all()


@pytest.mark.parametrize("bad", [-100, 3])
def test_a_target_outside_the_vocabulary_is_an_error(ops, bad):
    """-100 is PyTorch's mask; here the mask is a weight of 0."""
    with pytest.raises(IndexError, match="target"):
        ops.cross_entropy_forward(np.zeros((2, 3)), np.array([0, bad]))


# --- the optimizer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3, 1000])
def test_squares(ops, rng, length):
    for n in (0, 1, 7, 100_003):
        x = rng.standard_normal(n).astype(np.float32)
        expected = [(x[i : i + length].astype(np.float64) ** 2).sum() for i in range(0, n, length)]
        np.testing.assert_allclose(ops.squares(x, length), expected, rtol=1e-9)


@pytest.mark.parametrize("n", [1, 7, 100_003])
def test_adamw_against_the_paper(ops, rng, n):
    """Loshchilov and Hutter 2019, algorithm 2, line by line, five steps, with clipping's factor. Decay is
    decoupled: it shrinks the weight and never enters the moments (Adam with L2 is another optimizer)."""
    w = rng.standard_normal(n)
    m, v, expected, em, ev = np.zeros(n), np.zeros(n), w.copy(), np.zeros(n), np.zeros(n)
    lr, b1, b2, eps, decay, scale = 0.01, 0.9, 0.95, 1e-8, 0.1, 0.7
    for step in range(1, 6):
        g = rng.standard_normal(n)
        ops.adamw(w, g, m, v, step=step, lr=lr, beta1=b1, beta2=b2, eps=eps, weight_decay=decay, scale=scale)
        em = b1 * em + (1 - b1) * scale * g
        ev = b2 * ev + (1 - b2) * (scale * g) ** 2
        m_hat, v_hat = em / (1 - b1**step), ev / (1 - b2**step)
        expected = expected - lr * decay * expected - lr * m_hat / (np.sqrt(v_hat) + eps)
    for output, formula in ((w, expected), (m, em), (v, ev)):
        np.testing.assert_allclose(output, formula, rtol=1e-11, atol=1e-13)
