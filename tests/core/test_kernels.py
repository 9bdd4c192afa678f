"""The C core against the textbook: odd sizes, extreme inputs, strides, threads, instruction sets, processes.

The reference is `ops.py` in float64 on the same numbers: a figure is the C core's own error, without NumPy's.
"""

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from tinygpt.check.contract import is_float
from tinygpt.core import kernels, ops
from tinygpt.errors import UserError

SIZES = [1, 3, 7, 17, 33, 65, 129, 257]
LIMIT = {np.float32: 1e-5, np.float64: 1e-12}  # of max|C - NumPy| / max|NumPy|
needs_c = pytest.mark.skipif("c" not in kernels.available(), reason="the C core is not built here")


@pytest.fixture(params=["base", "avx2", "avx512", "avx512bf16"])
def c(request):
    """The C backend, with each instruction set that this machine has."""
    if "c" not in kernels.available():
        pytest.skip("the C core is not built here")
    if not kernels.lib.tinygpt_choose_isa(request.param.encode()):
        pytest.skip(f"no {request.param} here")
    yield kernels
    kernels.lib.tinygpt_choose_isa(kernels.isa.encode())


@pytest.fixture(params=[np.float32, np.float64])
def dtype(request):
    return request.param


def error(output, expected, unit: float = 0.0) -> float:
    """max|difference| / max|expected|, the worst of a tuple; infinity for NaN. Where all that is expected is
    zero, terms of size `unit` were to cancel, and the difference is compared with that."""
    if isinstance(expected, tuple):
        return max(error(g, e, unit) for g, e in zip(output, expected, strict=True))
    assert output.shape == expected.shape
    gap = np.abs(output.astype(np.float64) - expected).max(initial=0)
    top = np.abs(expected).max(initial=0) or unit
    return 0.0 if gap == 0 else float(gap / top) if gap < np.inf and top else np.inf


def compare(c, name, dtype, inputs, dout, unit=0.0):
    """Forward and backward of one operation in both backends."""
    results = []
    for backend, kind in ((c, dtype), (ops, np.float64)):
        cast = [a.astype(dtype).astype(kind) if is_float(a) else a for a in (*inputs, dout)]
        out, cache = getattr(backend, f"{name}_forward")(*cast[:-1])
        grads = getattr(backend, f"{name}_backward")(cast[-1], cache)
        results.append((out, *grads) if isinstance(grads, tuple) else (out, grads))
    output, expected = results
    assert all(g.dtype == dtype for g in output)
    assert error(output, expected, unit) <= LIMIT[dtype]


# --- agreement ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0, 1, 1e4])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", ["embedding", "layernorm", "gelu", "residual", "dropout", "cross_entropy"])
def test_rows(c, rng, dtype, name, n, scale):
    """Sizes around every vector width leave every possible tail; 0 and 1e4 are where shortcuts break."""
    x, dout = scale * rng.standard_normal((5, n)), rng.standard_normal((5, n))
    inputs = {
        "embedding": (rng.integers(0, 3, (5,)), x),
        "layernorm": (x, rng.standard_normal(n), rng.standard_normal(n)),
        "gelu": (x,),
        "residual": (x, dout),
        "dropout": (x, 0.3, 12345),
        "cross_entropy": (x, rng.integers(0, n, 5)),
    }[name]
    unit = 316 * np.abs(dout).max()  # layernorm of one channel: dx = rstd (dout - dout), rstd = 1e-5**-0.5
    compare(c, name, dtype, inputs, dout[:, 0] if name == "cross_entropy" else dout, unit)


@pytest.mark.parametrize("D", [1, 16, 33])
@pytest.mark.parametrize("T, S", [(1, 1), (1, 65), (7, 17), (33, 33), (129, 257)])
def test_attention(c, rng, dtype, T, S, D):
    q, k, v = (rng.standard_normal((2, n, 2 * D)) for n in (T, S, S))
    start = np.sort(rng.integers(0, S, (2, T)))
    inside = max(0, T - S // 2)  # queries that stand in the longer prefix
    for more in ((), (start,), (start[:, T - min(T, S - 1) :], 1), (start[:, inside:] // 2, S - S // 2)):
        # a query that sees one key gives dq = scale (dout v - dout v) k
        compare(c, "attention", dtype, (q, k, v, 2, *more), rng.standard_normal(q.shape), unit=1.0)


@pytest.mark.parametrize("D", [1, 16, 32, 33, 64])
@pytest.mark.parametrize("S", [1, 2, 15, 16, 17, 40])
def test_decoding(c, rng, dtype, S, D):
    """One query for each row, against the first S rows of a longer cache, in which NaN lies behind them."""
    B, H, room = 3, 5, S + 2
    q, k, v = (rng.standard_normal((B, n, H * D)).astype(dtype) for n in (1, room, room))
    k[:, S:] = v[:, S:] = np.nan
    for start, prefix in ((None, 0), (rng.integers(0, S + 1, (B, 1)), 0), (np.full((B, 1), S), S // 2)):
        out, _ = c.attention_forward(q, k[:, :S], v[:, :S], H, start, prefix)
        exact = (a.astype(np.float64) for a in (q, k[:, :S], v[:, :S]))
        assert error(out, ops.attention_forward(*exact, H, start, prefix)[0]) <= LIMIT[dtype]


@pytest.mark.parametrize("T, S", [(33, 33), (1, 1), (1, 33)])
@pytest.mark.parametrize("scale", [0, 1e4])
def test_attention_at_extremes(c, rng, dtype, scale, T, S):
    """Scores of 0 make every key equal; at 1e8 one takes all, and exp of anything else must not overflow."""
    q, k, v = (scale * rng.standard_normal((2, n, 34)) for n in (T, S, S))
    compare(c, "attention", dtype, (q, k, v, 2), rng.standard_normal(q.shape), unit=scale**2)


GEMMS = [(1, 1, 1), (3, 7, 17), (17, 1, 33), (1, 257, 33), (65, 3, 7), (33, 65, 129), (257, 129, 65)]
GEMMS += [(130, 530, 401), (401, 97, 771)]  # more than one block of every kind, and a piece for each thread


@pytest.mark.parametrize("M, N, K", GEMMS)
@pytest.mark.parametrize("scale", [0, 1, 1e4])
def test_linear(c, rng, dtype, M, N, K, scale):
    """The three products NN (out), NT (dx) and TN (dw), of which every training step consists."""
    w, b = rng.standard_normal((K, N)), rng.standard_normal(N)
    compare(c, "linear", dtype, (scale * rng.standard_normal((M, K)), w, b), rng.standard_normal((M, N)))


@pytest.mark.parametrize("M, N, K", GEMMS)
def test_the_tied_head(c, rng, dtype, M, N, K):
    """A weight that is a transposed view, and a gradient written through one."""
    x, table, dout = (rng.standard_normal(s).astype(dtype) for s in ((M, K), (N, K), (M, N)))
    out, cache = c.linear_forward(x, table.T)
    dtable = np.empty_like(table)
    dx, dw, db = c.linear_backward(dout, cache, dw=dtable.T, db=False)
    expected, (ex_dx, ex_dw, _) = ops.linear_forward(x, table.T)[0], ops.linear_backward(dout, (x, table.T))
    assert error((out, dx, dtable), (expected, ex_dx, ex_dw.T)) <= LIMIT[dtype]
    assert np.shares_memory(dw, dtable)
    assert db is False


@pytest.mark.parametrize("M, N, K", [*GEMMS, (5, 40, 30), (8, 33, 500)])
def test_sums_with_the_stream(c, rng, dtype, M, N, K):
    """What is added stays as it is."""
    x, w, b, stream = (rng.standard_normal(s).astype(dtype) for s in ((M, K), (K, N), (N,), (M, N)))
    for weights in (w, np.ascontiguousarray(w.T).T):
        for bias in (b, None):
            expected = ops.linear_forward(x, weights, bias, stream)[0]
            assert error((c.linear_forward(x, weights, bias, stream)[0],), (expected,)) <= LIMIT[dtype]
    dx, expected = (o.linear_backward(stream, (x, w), False, False, add=x)[0] for o in (c, ops))
    assert error((dx,), (expected,)) <= LIMIT[dtype]
    dout, g = rng.standard_normal((M, N)).astype(dtype), rng.standard_normal(N).astype(dtype)
    expected = ops.layernorm_backward(dout, ops.layernorm_forward(stream, g, b)[1], add=stream)
    before = stream.copy()
    output = c.layernorm_backward(dout, c.layernorm_forward(stream, g, b)[1], add=stream)
    assert (stream == before).all() and error(output, expected, 316 * np.abs(dout).max()) <= LIMIT[dtype]


@pytest.mark.parametrize("n", [*SIZES, 100_003])
def test_the_optimizers_passes(c, rng, dtype, n):
    state = [rng.standard_normal(n).astype(dtype) for _ in range(3)] + [rng.random(n).astype(dtype)]
    settings = {"step": 3, "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    mine, reference = [a.copy() for a in state], [a.astype(np.float64) for a in state]
    c.adamw(*mine, **settings, scale=0.5)
    ops.adamw(*reference, **settings, scale=0.5)
    assert error(tuple(mine), tuple(reference)) <= LIMIT[dtype]
    for length in (1, 100, n):
        np.testing.assert_allclose(c.squares(state[0], length), ops.squares(state[0], length), rtol=1e-7)


EVERY_1009TH = np.arange(0, 2**32, 1009, dtype=np.uint64).astype(np.uint32).view(np.float32)


def exp_in_c(x):
    """exp(x) as cross-entropy's backward makes it, given a largest logit of 0 and a sum of 1."""
    logits, one = np.append(x, np.float32(0))[None], np.ones(1, np.float32)
    cache = (logits, np.array([x.size], np.int32), 0 * one, one)
    return kernels.cross_entropy_backward(one, cache)[0, :-1]


def test_exp_over_the_whole_range(c):
    """Of all floats every 1009th, from infinity to infinity, within 2 units in the last place of libm's."""
    x = EVERY_1009TH
    output, with_nan = exp_in_c(x), np.isnan(x)
    assert np.isnan(output[with_nan]).all() and not np.isnan(output[~with_nan]).any()
    x, output = x[~with_nan], output[~with_nan]
    with np.errstate(over="ignore", under="ignore"):
        exact = np.exp(x.astype(np.float64))
    assert np.isinf(output[x > 88.7229]).all()
    assert (output[x < -86.7] == 0).all()
    inner = (x > -86.5) & (x < 88.72)
    ulp = np.spacing(exact[inner].astype(np.float32)).astype(np.float64)
    assert (np.abs(output[inner] - exact[inner]) <= 2 * ulp).all()


def test_gelu_over_the_whole_range(c):
    """Within 3 units in the last place of x, and its slope within 2e-6, of the textbook's in double."""
    x = EVERY_1009TH[np.abs(EVERY_1009TH) < 1e12]
    exact, cache = ops.gelu_forward(x.astype(np.float64))
    output = kernels.gelu_forward(x)[0]
    assert (np.abs(output - exact) <= 3 * np.spacing(np.abs(x)).astype(np.float64)).all()
    slope = kernels.gelu_backward(np.ones_like(x), (x,))
    assert np.abs(slope - ops.gelu_backward(np.ones(x.shape), cache)).max() < 2e-6


def test_gelu_far_out(c, dtype):
    """llm.c 19: -Ofast broke GELU at large inputs."""
    x = np.array([-1e4, -88.5, -30, -20, -10.1, -5, -1e-4, -0.0, 1e-30, 5, 10.1, 20, 30, 88.5, 1e4])
    compare(c, "gelu", dtype, (x,), np.ones_like(x))


# --- memory ------------------------------------------------------------------------------------------------


def test_queries_keys_and_values_are_views(c, rng, dtype):
    """As in the model: three views of one (B, T, 3C) array, and so are their gradients."""
    C, dout = 34, rng.standard_normal((2, 9, 34)).astype(dtype)
    qkv = rng.standard_normal((2, 9, 3 * C)).astype(dtype)
    views = [qkv[..., i * C : (i + 1) * C] for i in range(3)]
    out, cache = c.attention_forward(*views, 2)
    dqkv = c.attention_backward(dout, cache, packed=True)
    alone, cache = c.attention_forward(*(np.ascontiguousarray(v) for v in views), 2)
    np.testing.assert_array_equal(out, alone)
    np.testing.assert_array_equal(dqkv, np.concatenate(c.attention_backward(dout, cache), -1))


def test_no_rows(c, dtype):
    """A batch of nothing: gradients of weights are zero, not what was in memory."""
    w, nothing = np.ones((4, 3), dtype), np.empty((0, 4), dtype)
    out, cache = c.linear_forward(nothing, w, np.ones(3, dtype))
    assert out.shape == (0, 3)
    dw, db = np.full((4, 3), np.nan, dtype), np.full(3, np.nan, dtype)
    dx, dw, db = c.linear_backward(out, cache, dw=dw, db=db)
    assert dx.shape == (0, 4)
    np.testing.assert_array_equal(dw, 0)
    np.testing.assert_array_equal(db, 0)


@needs_c
@pytest.mark.parametrize("call", [
    lambda x: kernels.linear_forward(x, np.ones((5, 3))),
    lambda x: kernels.layernorm_forward(x, np.ones(5), np.ones(4)),
    lambda x: kernels.residual_forward(x, np.ones((2, 5))),
    lambda x: kernels.linear_forward(x, np.ones((4, 5)), add=np.empty((2, 4))),
    lambda x: kernels.attention_backward(  # more keys than queries
        x[None, :1], kernels.attention_forward(x[None, :1], x[None], x[None], 2)[1], packed=True
    ),
    lambda x: kernels.attention_forward(x[None], x[None, :1], x[None, :1], 2),
    lambda x: kernels.attention_forward(x[None], x[None], x[None], 3),
    lambda x: kernels.cross_entropy_forward(x, np.zeros(3, int)),
])  # fmt: skip
def test_shapes_are_checked_before_c_sees_them(call):
    """In C a wrong shape is not an error but somebody else's memory."""
    with pytest.raises(ValueError):
        call(np.ones((2, 4)))


def readonly(x):
    x.flags.writeable = False
    return x


@pytest.mark.parametrize(("call", "error"), [
    (lambda x: kernels.gemm(x, x.T, out=readonly(np.zeros((3, 3)))), ValueError),
    (lambda x: kernels.gemm(x, x.T, out=np.zeros((6, 6))[::2, ::2]), ValueError),
    (lambda x: kernels.append_rows(readonly(np.zeros((1, 9, 4))), x[None], 3), ValueError),
    (lambda x: kernels.append_rows(np.zeros((1, 9, 4)), x[None], 2), ValueError),
    (lambda x: kernels.append_rows(np.zeros((1, 9, 4)), x[None], 10), ValueError),
    (lambda x: kernels.attention_forward(x[None], x[None], x[None], 2, prefix=-1), ValueError),
    (lambda x: kernels.gelu_forward(x.astype(">f8")), TypeError),
    (lambda x: kernels.gelu_forward(x.astype(np.float16)), TypeError),
    (lambda x: kernels.embedding_forward(np.array([np.nan]), x), TypeError),
    (lambda x: kernels.embedding_backward(x, (np.array([0, 1, 9], np.int32), (3, 4))), IndexError),
    (lambda x: kernels.attention_backward(
        x[None], kernels.attention_forward(*x[None, None].repeat(3, 0), 2)[1], readonly(np.zeros((1, 3, 4)))
    ), ValueError),
])  # fmt: skip
@needs_c
def test_what_c_cannot_take_is_refused(call, error):
    """Guards: writes into read-only memory (a crash in a mapped file), endless recursion, foreign byte order
    read as ours, an id that is not a number as an index."""
    with pytest.raises(error):
        call(np.ones((3, 4)))


@needs_c
def test_what_c_cannot_walk_is_copied(rng):
    """Guards: strides that are negative, or no whole elements, and operands of another type, read as they
    lie: beyond the array's end, for a smaller type."""
    x = rng.standard_normal((3, 4))
    field = np.zeros((3, 4), [("x", "f8"), ("pad", "i4")])
    field["x"] = x
    for a in (x[::-1], x[:, ::-1], field["x"]):
        assert np.allclose(kernels.gemm(a, x.T), a @ x.T)
        assert np.allclose(kernels.gelu_forward(a)[0], ops.gelu_forward(a)[0])
        expected = ops.attention_forward(a[None], x[None], x[None], 2)[0]
        assert np.allclose(kernels.attention_forward(a[None], x[None], x[None], 2)[0], expected)
    single = x.astype(np.float32)
    expected = ops.attention_forward(x[None], single[None], single[None], 2)[0]
    assert np.allclose(kernels.attention_forward(x[None], single[None], single[None], 2)[0], expected)
    db = kernels.linear_backward(single[:, :2], (x, np.ones((4, 2))), dw=False)[2]
    assert np.allclose(db, single[:, :2].sum(0))


@needs_c
def test_nothing_is_nothing():
    """Guards: a division by the size of an empty vocabulary, which kills the process."""
    nll, cache = kernels.cross_entropy_forward(np.zeros((0, 0)), np.zeros(0, int))
    assert nll.shape == (0,) and kernels.cross_entropy_backward(nll, cache).shape == (0, 0)
    assert kernels.gemm(np.zeros((0, 3)), np.zeros((3, 2))).shape == (0, 2)
    assert np.array_equal(kernels.gemm(np.zeros((2, 0)), np.zeros((0, 3)), np.ones(3)), np.ones((2, 3)))


@needs_c
def test_a_query_that_sees_itself_alone_has_no_gradient(rng):
    """Guards: rounding where the gradient is exactly zero; AdamW makes whole updates of it."""
    q, k, v, dout = rng.standard_normal((4, 2, 1, 12)).astype(np.float32)
    dq, dk, _ = kernels.attention_backward(dout, kernels.attention_forward(q, k, v, 3)[1])
    assert not dq.any() and not dk.any()


@pytest.mark.parametrize("M", [1, 2, 3, 7, 8, 9, 31, 64, 65])
@pytest.mark.parametrize("N, K", [(1, 1), (33, 7), (64, 17), (100, 33)])
def test_packed_weights(c, rng, dtype, M, N, K):
    """A multiply that reads a packed copy of the weight, also of the tied head's transposed view. Guards:
    rows of the result past the last, which are another's memory."""
    x, out = rng.standard_normal((M, K)).astype(dtype), np.full((M + 1, N), np.nan, dtype)
    for w in (rng.standard_normal((K, N)).astype(dtype), rng.standard_normal((N, K)).astype(dtype).T):
        panels, packed = np.empty(-(-N // 32) * 32 * K, dtype), np.ones(1, np.int32)
        c.pack_panels(panels, w)
        tape = SimpleNamespace(add=lambda *call: None, panels=lambda *b, copy=(panels, packed): copy)
        for bias in (None, rng.standard_normal(N).astype(dtype)):
            with c.current_tape.use(tape):
                c.gemm(x, np.full_like(w, np.nan), bias, out=out[:M])  # the weight itself is not read
            assert error(out[:M], ops.linear_forward(x, w, bias)[0]) <= LIMIT[dtype]
            assert np.isnan(out[M]).all()


@pytest.mark.parametrize(("name", "value"), [
    ("TINYGPT_THREADS", "99999999999999999999"), ("TINYGPT_THREADS", "0"), ("TINYGPT_ISA", "\udcff"),
])  # fmt: skip
@needs_c
def test_odd_variables(name, value):
    """Guards: a traceback for a number that C has no room for, or for bytes that are not UTF-8."""
    result = python("from tinygpt.core import kernels; print(kernels.isa)", **{name: value})
    assert (result.returncode == 0) == (value.startswith("9"))
    assert "OverflowError" not in result.stderr and "UnicodeEncodeError" not in result.stderr


# --- threads and processes ---------------------------------------------------------------------------------

TRAIN = """
    import hashlib, numpy as np
    from tinygpt.core import kernels
    from tinygpt.core.model import GPT, GPTConfig
    rng = np.random.default_rng(0)
    model = GPT(GPTConfig(101, 33, 2, 2, 66, dropout=0.1), rng)
    ids = rng.integers(101, size=(5, 34))
    flat, grads = model.gradients()
    m, v = np.zeros_like(flat), np.zeros_like(flat)
    for step in range(1, 6):
        loss = model.loss(ids[:, :-1], ids[:, 1:], None, grads, rng=np.random.default_rng(step))
        scale = min(1, 1 / model.ops.squares(flat, 100).sum() ** 0.5)
        model.ops.adamw(model.flat, flat, m, v, step=step, lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-8,
                        weight_decay=0.1, scale=scale)
    print(loss, hashlib.sha256(model.flat.tobytes()).hexdigest())
"""


def python(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a program in a fresh interpreter, with only these TINYGPT_ variables; a hang fails the test."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TINYGPT_")}
    path = os.pathsep.join(filter(None, [os.getcwd(), kept.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        env={**kept, "PYTHONPATH": path, **environment}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@needs_c
def test_the_same_seed_gives_the_same_bytes_for_any_number_of_threads():
    runs = {n: python(TRAIN, TINYGPT_THREADS=n, TINYGPT_BACKEND="c").stdout for n in "1237"}
    assert len(runs["1"].split()) == 2
    assert len(set(runs.values())) == 1, runs


GENERATE = """
    import numpy as np
    from tinygpt.core import generate
    from tinygpt.core.model import GPT, GPTConfig
    rng = np.random.default_rng(0)
    model = GPT(GPTConfig(301, 64, 2, 2, 66), rng)
    model.flat[:] *= 20
    prompts = [rng.integers(301, size=1 + i % 9) for i in range(40)]
    print(np.concatenate(generate.generate(model, prompts, 40, rng=rng, stop=range(9))).tolist())
"""


@needs_c
def test_the_same_seed_gives_the_same_text_for_any_number_of_threads():
    runs = {n: python(GENERATE, TINYGPT_THREADS=n).stdout for n in "1237"}
    assert len(runs["1"]) > 1000 and len(set(runs.values())) == 1


@needs_c
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set_trains_alike(isa):
    """Not to the same bytes: each adds in its own order."""
    run = python(TRAIN, TINYGPT_ISA=isa)
    if "not an instruction set of this machine" in run.stderr:
        pytest.skip(f"no {isa} here")
    expected = float(python(TRAIN, TINYGPT_BACKEND="numpy").stdout.split()[0])
    assert float(run.stdout.split()[0]) == pytest.approx(expected, rel=1e-5)


@needs_c
def test_python_threads_may_call_at_the_same_time(rng):
    """The pool serves one caller; the others do their work alone, with the same answers."""
    x, w = rng.standard_normal((200, 150)), rng.standard_normal((150, 170))
    expected, _ = kernels.linear_forward(x, w)
    with ThreadPoolExecutor(4) as pool:
        for out, _ in pool.map(lambda _: kernels.linear_forward(x, w), range(200)):
            np.testing.assert_array_equal(out, expected)


@needs_c
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_can_compute():
    """The child has none of its parent's threads: waiting for them would hang, as multiprocessing may."""
    run = python("""
        import os, warnings, numpy as np
        from tinygpt.core import kernels
        warnings.simplefilter("ignore")  # Python 3.12 warns of fork where there are threads
        x = np.ones((300, 300))
        expected = kernels.linear_forward(x, x)[0]
        for _ in range(5):
            if not (child := os.fork()):
                os._exit(not (kernels.linear_forward(x, x)[0] == expected).all())
            assert os.waitpid(child, 0)[1] == 0
            assert (kernels.linear_forward(x, x)[0] == expected).all()
        print("done")
    """, TINYGPT_THREADS="2")  # fmt: skip
    assert run.stdout == "done\n", run.stderr


# --- choosing ----------------------------------------------------------------------------------------------


def test_the_backend_is_chosen_by_name(monkeypatch):
    monkeypatch.setenv("TINYGPT_BACKEND", "numpy")
    assert kernels.backend() is ops
    monkeypatch.setenv("TINYGPT_BACKEND", "fortran")
    with pytest.raises(UserError, match="TINYGPT_BACKEND is c or numpy"):
        kernels.backend()
    assert kernels.backend("numpy") is ops


def test_both_backends_have_the_same_functions():
    for name in dir(ops):
        if name.endswith(("_forward", "_backward")) or name in ("adamw", "squares"):
            assert callable(getattr(kernels, name)), name


@needs_c
@pytest.mark.parametrize("variable, value", [
    ("TINYGPT_THREADS", "0"), ("TINYGPT_THREADS", "-1"), ("TINYGPT_THREADS", "two"), ("TINYGPT_ISA", "mmx"),
])  # fmt: skip
def test_a_wrong_variable_is_one_line(variable, value):
    run = python("from tinygpt.shell.cli import main; main()", "gradcheck", **{variable: value})
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
    assert f"{variable}={value}" in run.stderr


def test_without_the_c_core_it_works_and_says_so_once():
    program = """
        import sys
        sys.modules["tinygpt._core"] = None  # as where there is no compiler: importing it fails
        from tinygpt import GPT, GPTConfig
        from tinygpt.core import kernels, ops
        for _ in range(2):
            assert GPT(GPTConfig(5, 4, 1, 1, 4)).ops is ops
        print(*kernels.available())
    """
    run = python(program)
    assert run.stdout == "numpy\n", run.stderr
    assert run.stderr.count("no C core here") == 1
    assert python(program, TINYGPT_BACKEND="numpy").stderr == ""


def test_a_build_that_failed_is_said(tmp_path, monkeypatch):
    """Guards: "install a C compiler" where there is one, and the build failed (GCC 14, current clang)."""
    monkeypatch.setattr(kernels, "lib", None)
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "core" / "kernels.py"))
    monkeypatch.delenv("TINYGPT_BACKEND", raising=False)
    with pytest.warns(UserWarning, match="no C core here.*install a C compiler"):
        kernels.backend()
    (tmp_path / "_build_error.txt").write_text("gcc", encoding="utf-8")
    with pytest.warns(UserWarning, match="no C core here.*gcc failed to build it.*pip install -v"):
        kernels.backend()
    with pytest.raises(UserError, match="gcc failed to build it"):
        kernels.backend("c")


@needs_c
@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory as Linux does")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer takes all addresses")
def test_without_memory_there_is_a_memory_error():
    """Guards: a process that is aborted, with its last save, where a kernel finds no memory of its own."""
    run = python("""
        import resource, numpy as np
        from tinygpt.core import kernels
        logits, uniform = np.zeros((1, 50_000_000), np.float32), np.zeros(1)
        kernels.sample(logits[:, :1000], uniform)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), resource.RLIM_INFINITY))
        for _ in range(2):
            try:
                kernels.sample(logits, uniform)
            except MemoryError as error:
                print(error)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(kernels.sample(logits, uniform))
    """, TINYGPT_THREADS="1")  # fmt: skip
    assert run.stdout == "the C core's sample\nthe C core's sample\n[0]\n", run.stderr
    assert run.returncode == 0


@needs_c
def test_an_axis_of_one_may_have_any_stride(rng):
    """Guards: a negative stride handed to C as a huge positive one."""
    x, w = rng.standard_normal((1, 3, 4))[::-1], rng.standard_normal((4, 5))
    np.testing.assert_allclose(kernels.linear_forward(x, w)[0], x @ w)
    q = rng.standard_normal((1, 3, 4))[::-1]
    out, _ = kernels.attention_forward(q, q, q, 2)
    np.testing.assert_allclose(out, ops.attention_forward(q, q, q, 2)[0])
