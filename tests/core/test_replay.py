"""Replay: the function's results, from the function's operations, or the function itself."""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from tinygpt.core import kernels, memory, ops, replay
from tinygpt.core.replay import Packs, recorded

pytestmark = pytest.mark.skipif(kernels.lib is None, reason="the C core is not built")


@pytest.fixture
def model(rng):
    """What `recorded` reads of a model: its operations and the memory of its weights, (4, 4)."""
    weights = rng.standard_normal((4, 4))
    return SimpleNamespace(ops=kernels, flat=weights, trained=SimpleNamespace(flat=weights))


@pytest.fixture
def tapes(monkeypatch):
    """All tapes that are made from here on."""
    made, tape = [], replay.Tape
    monkeypatch.setattr(replay, "Tape", lambda *args: made.append(tape(*args)) or made[-1])
    return made


def called(function):
    """The function, and a list that grows with each call of it."""
    calls = []

    def counted(*args, **named):
        calls.append(1)
        return function(*args, **named)

    return counted, calls


def test_a_replay_reads_new_inputs_and_live_weights(model, rng):
    """Guards: a replay with the numbers of its recording; a result that the next replay overwrites."""
    function, calls = called(lambda x: kernels.gelu_forward(kernels.linear_forward(x, model.flat)[0])[0])
    step, results = recorded(function, model), []
    for _ in range(4):
        x, model.flat[:] = rng.standard_normal((3, 4)), rng.standard_normal((4, 4))
        results.append((step(x), ops.gelu_forward(x @ model.flat)[0]))
    for result, expected in results:
        np.testing.assert_allclose(result, expected, rtol=1e-11, atol=1e-12)
    assert len(calls) == 1
    step(rng.standard_normal((5, 4)))
    assert len(calls) == 2  # another shape


def test_other_weights_are_recorded_anew(model, rng):
    """Guards: gradients in a buffer, or weights in a model, that was replaced."""
    step = recorded(lambda x: kernels.linear_forward(x, model.flat)[0], model)
    x = rng.standard_normal((3, 4))
    step(x), step(x)
    older = weakref.ref(model.flat)
    model.flat = model.trained.flat = rng.standard_normal((4, 4))
    np.testing.assert_allclose(step(x), x @ model.flat)
    assert older() is None  # nobody keeps them


LOAN = []  # an array that another tape's arena has lent


@pytest.mark.parametrize("function", [
    lambda x, w, other: kernels.gelu_forward(kernels.linear_forward(x, w)[0] * 2)[0],  # NumPy between two
    lambda x, w, other: kernels.gelu_forward(x[:, ::2])[0],  # of every second column, copied
    lambda x, w, other: kernels.linear_forward(x, other)[0],  # a weight that nobody named
    lambda x, w, other: kernels.linear_forward(x.astype(np.float32), w.astype(np.float32))[0],
    lambda x, w, other: kernels.dropout_forward(x, 0.5, int(other[0, 0] * 1e6))[0],
    lambda x, w, other: kernels.relu_backward(kernels.gelu_forward(x)[0], (x - other[0, 0],)),
    lambda x, w, other: np.exp(x),  # no operation at all
    lambda x, w, other: kernels.gelu_forward(x)[0] + 1,
    lambda x, w, other: kernels.linear_forward(x, LOAN[0])[0],
], ids=["numpy", "copy", "unknown", "types", "dropout", "cache", "none", "result", "loan"])  # fmt: skip
def test_what_a_replay_could_not_repeat_is_refused(model, rng, tapes, function):
    """Guards: a result of an earlier call."""
    other, LOAN[:] = rng.random((4, 4)), []
    with memory.current_arena.use(memory.Arena()):
        LOAN.append(memory.empty((4, 4), np.float64))
    step = recorded(lambda x: function(x, model.flat, other), model)
    for _ in range(3):
        x, other[:], LOAN[0][:] = rng.standard_normal((3, 4)), rng.random((4, 4)), rng.random((4, 4))
        np.testing.assert_array_equal(step(x), function(x, model.flat, other))
    assert [tape.is_whole for tape in tapes] == [False]


def test_a_refused_function_keeps_no_memory(model, rng, monkeypatch):
    arena = memory.Arena()
    monkeypatch.setattr(replay, "Arena", lambda: arena)
    step = recorded(lambda x: kernels.gelu_forward(x)[0] * kernels.gelu_forward(x)[0], model)
    step(rng.standard_normal((3, 4)))
    assert not arena.free


def test_other_arguments_have_tapes_of_their_own(model, rng):
    step = recorded(lambda x, eps: kernels.layernorm_forward(x, model.flat[0], model.flat[1], eps)[0], model)
    x = rng.standard_normal((3, 4))
    for eps in (1e-5, 1.0, 1e-5, 1.0):
        expected = ops.layernorm_forward(x, model.flat[0], model.flat[1], eps)[0]
        np.testing.assert_allclose(step(x, eps), expected, rtol=1e-11)


def test_the_result_must_be_an_array(model, rng):
    """Guards: a number of the first call, for ever."""
    for function in (np.sum, lambda y: float(y.sum())):
        with pytest.raises(TypeError, match="must return an array"):
            recorded(lambda x, f=function: f(kernels.gelu_forward(x)[0]), model)(rng.standard_normal((3, 4)))


def test_an_exception_leaves_no_tape(model, rng):
    fails, x = [True], rng.standard_normal((3, 4))

    def function(x):
        y, _ = kernels.gelu_forward(x)
        if fails:
            raise KeyboardInterrupt
        return y

    step = recorded(function, model)
    with pytest.raises(KeyboardInterrupt):
        step(x)
    fails.clear()
    for _ in range(3):
        np.testing.assert_array_equal(step(x), kernels.gelu_forward(x)[0])
    assert kernels.current_tape.value is None


def test_a_cache_that_is_full_is_an_error(model, rng):
    """Guards: rows behind the end of a KV cache."""
    length, rows = np.zeros((), np.int64), np.zeros((1, 5, 4))
    cache = rows[:, :3]  # what is behind it belongs to somebody else

    def function(x):
        kernels.advance(length, 1)
        kernels.append_rows(cache, x, length)
        return kernels.attention_forward(x, cache, cache, 1, length=length)[0]

    step, x = recorded(function, model, length, rows), rng.standard_normal((1, 1, 4))
    for _ in range(3):
        step(x)
    with pytest.raises(IndexError, match="full"):
        step(x)
    assert rows[0, :3].any(1).all() and not rows[0, 3:].any()


def test_operations_in_numpy_are_replayed(model, rng, tapes):
    """Between calls to the C core, at the end, and where they change an array in place."""
    length = np.zeros((), np.int64)

    def function(x):
        y, _ = kernels.relu_forward(kernels.linear_forward(x, model.flat)[0])
        kernels.advance(length, 2)
        return kernels.weighted_sum(kernels.gelu_forward(y)[0], x)

    step = recorded(function, model, length)
    for n in range(3):
        x = rng.standard_normal((3, 4))
        expected = (ops.gelu_forward(np.maximum(x @ model.flat, 0))[0] * x).sum()
        np.testing.assert_allclose(step(x), expected, rtol=1e-11, atol=1e-12)
        assert length == 2 * (n + 1)
    assert [tape.is_whole for tape in tapes] == [True]


def test_ids_are_checked_in_a_replay(model):
    """Guards: a row past the end of the table; half of a function's effects before the error."""
    length = np.zeros((), np.int64)

    def function(ids):
        kernels.advance(length, 1)
        return kernels.embedding_forward(ids, model.flat)[0]

    step = recorded(function, model, length)
    for ids in ([0, 3], [1, 2]):
        np.testing.assert_array_equal(step(np.array(ids, np.int32)), model.flat[ids])
    for wrong in (4, -1, 2**31 - 1, -(2**31)):
        with pytest.raises(IndexError, match=f"id {wrong} "):
            step(np.array([0, wrong], np.int32))
    assert length == 6  # once for each call


def test_tapes_are_few(model, rng, tapes):
    """Guards: memory for each shape that ever came."""
    function, calls = called(lambda x: kernels.gelu_forward(x)[0])
    step = recorded(function, model, most=3)
    for rows in (1, 2, 3, 1, 4, 1, 2):
        step(rng.standard_normal((rows, 4)))
    assert len(calls) == 5  # 1, 2, 3, 4, and 2 again, which was the one that was not used for longest


def test_packed_weights_are_read_from_copies(model, rng):
    """Guards: a packed copy of an activation or of an input, which would be stale; one copy for each tape."""

    def squared(x):
        y, _ = kernels.linear_forward(x, model.flat)
        return kernels.linear_forward(y, model.flat)[0]

    function, calls = called(squared)
    packs = Packs(3), Packs(2)
    step, w = recorded(function, model, packs=packs[0]), model.flat.copy()
    tanh = lambda y: kernels.tanh_forward(y)[0]  # noqa: E731
    product = recorded(lambda x, y: kernels.linear_forward(x, tanh(y))[0], model, packs=packs[1])
    for _ in range(4):
        x, y = rng.standard_normal((2, 4)), rng.standard_normal((4, 4))
        packs[1].count()
        np.testing.assert_allclose(product(x, y), x @ np.tanh(y), rtol=1e-11)
    for n, rows in enumerate((2, 2, 2, 2, 1, 1)):
        x = rng.standard_normal((rows, 4))
        packs[0].count()
        np.testing.assert_allclose(step(x), x @ w @ w, rtol=1e-11, atol=1e-12)
        if n == 2:
            model.flat[:] = np.nan  # nobody reads them any more
    assert len(calls) == 2


def test_a_recording_within_a_recording(model, rng):
    """Guards: operations that the outer tape does not see."""
    inner = recorded(lambda x: kernels.gelu_forward(x)[0], model)
    outer = recorded(lambda x: kernels.gelu_forward(inner(x))[0], model)
    for _ in range(4):
        x = rng.standard_normal((3, 4))
        np.testing.assert_allclose(outer(x), ops.gelu_forward(ops.gelu_forward(x)[0])[0], rtol=1e-11)


def test_a_tapes_memory_is_used_again_but_not_while_it_is_held(model, rng):
    """Guards: a block that is lent twice; as much memory as all results of a step together."""
    arena = replay.Arena()

    def many(x):
        first = y = kernels.gelu_forward(x)[0]
        view = first[1:]
        del first
        for _ in range(20):
            y = kernels.gelu_forward(y)[0]
        return kernels.residual_forward(y[1:], view)[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "Arena", lambda: arena)
        step = recorded(many, model)
    for rows in (64, 64, 32, 32):
        x = rng.standard_normal((rows, 64))
        expected = [ops.gelu_forward(x)[0]]
        for _ in range(20):
            expected.append(ops.gelu_forward(expected[-1])[0])
        np.testing.assert_allclose(step(x), expected[-1][1:] + expected[0][1:], rtol=1e-11)
    assert len(arena.free) == 2  # of four: each tape keeps its result
