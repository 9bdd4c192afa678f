"""The operations of `ops.py` in C: the same names, arguments and results, in float32 and float64.

A function here checks shapes and fills one struct of csrc/tinygpt.h with pointers and sizes. The arithmetic
is in csrc/. Arrays of another type, and arrays with strides that the C core cannot use, are copied first. A
cache is not that of `ops`: a forward and its backward must come from the same backend.

Environment variables: TINYGPT_BACKEND is numpy or c. TINYGPT_ISA is the instruction set of the C core: base,
avx2, avx512 or avx512bf16. TINYGPT_THREADS is the number of threads. Where the C core is not built, `backend`
returns NumPy, with one warning.
"""

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np

from ..errors import UserError
from . import memory, ops
from .ops import Array, Grad

try:
    from .._core import ffi, lib
except ImportError:
    lib = None


def available() -> tuple[str, ...]:
    """The names of the backends of this installation, the fastest first."""
    return ("c", "numpy") if lib else ("numpy",)


def backend(name: str | None = None) -> ModuleType:
    """The module of operations of the backend "c" or "numpy". None: TINYGPT_BACKEND, or the fastest one.

    Raises UserError for another name, and for "c" where the C core is not built.
    """
    choice = name or os.environ.get("TINYGPT_BACKEND")
    name = choice or available()[0]
    if name not in ("c", "numpy"):
        raise UserError(f"backend {name!r}: TINYGPT_BACKEND is c or numpy")
    if name == "c" and not lib:
        raise UserError(f"backend c: the C core is not built here; {_remedy()}")
    if not lib and not choice:
        slower = f"no C core here, running on NumPy, which is slower: {_remedy()}"
        warnings.warn(f"{slower}; TINYGPT_BACKEND=numpy silences this", stacklevel=2)
    return sys.modules[__name__] if name == "c" else ops


def _remedy() -> str:
    """How the user gets the C core. setup.py writes a file where there is a compiler and the build fails."""
    try:
        compiler = (Path(__file__).parent.parent / "_build_error.txt").read_text(encoding="utf-8")
    except OSError:
        if (Path(__file__).parents[2] / "setup.py").exists():
            return "this is the source folder: pip install -e . builds the core here"
        return "install a C compiler, then tinygpt again"
    return f"{compiler} failed to build it; install tinygpt again with pip install -v, which shows why"


def set_threads(n: int) -> None:
    """Sets the number of threads of the C core, the calling thread included. No result depends on n."""
    if n < 1:
        raise UserError(f"{n} threads: there must be at least 1")
    lib.tinygpt_set_threads(min(n, 1 << 16))


def _configure() -> str:
    """Applies TINYGPT_ISA and TINYGPT_THREADS; returns the name of the instruction set."""
    name, threads = os.environ.get("TINYGPT_ISA"), os.environ.get("TINYGPT_THREADS") or None
    isa = lib.tinygpt_choose_isa(os.fsencode(name) if name else ffi.NULL)
    if not isa:
        raise UserError(f"TINYGPT_ISA={name}: not an instruction set of this machine; base always works")
    if threads is not None and not (threads.isdecimal() and int(threads) > 0):
        raise UserError(f"TINYGPT_THREADS={threads}: it must be a whole number of at least 1")
    set_threads(int(threads or processors()))
    lib.tinygpt_keep_memory()
    return ffi.string(isa).decode()


def has_bfloat16() -> bool:
    """Whether the instruction set multiplies bfloat16. If not, the C core rounds the operands and multiplies
    them as float32, which is slower than float32 without rounding."""
    return bool(lib) and isa == "avx512bf16"


def processors() -> int:
    """The number of processors that this process may use: in a container fewer than the machine has."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # cgroups 2: "max 100000", or microseconds and period
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        count = min(count, max(1, int(quota) // int(period)))
    return count


# --- from arrays to pointers --------------------------------------------------------------------------------


def _pointer(a: Array | bool | None):
    if a is None or a is False:  # no argument, or a gradient that is not computed
        return ffi.NULL
    if a.flags.c_contiguous:
        return ffi.from_buffer(a)  # the fastest way, for contiguous arrays only
    return ffi.cast("void *", a.__array_interface__["data"][0])


def _run(op: str, dtype: np.dtype, *fields) -> None:
    """Runs `op` on a struct of these fields, in the order of tinygpt.h; arrays become pointers."""
    if dtype.char not in "fd" or not dtype.isnative:
        raise TypeError(f"{op}: arrays are float32 or float64 in the machine's byte order, not {dtype.str}")
    number, struct = _OPS[op]
    args = ffi.new(struct, [f if type(f) in (int, float) else _pointer(f) for f in fields])
    if status := lib.tinygpt_run(number, dtype.char == "d", args):
        raise IndexError(op) if status == 2 else MemoryError(f"the C core's {op}")
    if (tape := current_tape.value) is not None:
        tape.add(op, (number, dtype.char == "d", args), fields)


current_tape = memory.Current()  # the tape that records this thread's operations, see replay.py


def _in_numpy(function: Callable) -> Callable:
    """An operation on few numbers: NumPy is fast enough, and C needs no kernel."""

    @functools.wraps(function)
    def operation(*args, **named):
        result = function(*args, **named)
        if (tape := current_tape.value) is not None:
            tape.add_numpy(function, args, named, result)
        return result

    return operation


def _like(a: Array, dtype: np.dtype, shape: tuple) -> Array:
    """`a` as a contiguous array of this type. Raises ValueError if `a` has another shape."""
    if a.shape != shape:
        raise ValueError(f"expected an array of shape {shape}, not {a.shape}")
    return np.ascontiguousarray(a, dtype)


def _strided(a: Array, dtype: np.dtype) -> Array:
    """`a` in this type, with strides of whole elements that are not negative; a copy only if necessary."""
    a = np.asarray(a, dtype)
    if any(s < 0 or s % a.itemsize for s in a.strides):
        return np.array(a, order="C")  # ascontiguousarray keeps an odd stride of an axis of length 1
    return a


def _rows(a: Array, dtype: np.dtype) -> Array:
    """`_strided`, for `a` (B, S, C) whose rows must be contiguous, with or without gaps between the rows."""
    a = _strided(a, dtype)
    return a if a.strides[2] == a.itemsize or a.shape[2] == 1 else np.ascontiguousarray(a)


def _strides(*arrays: Array) -> list[int]:
    return [s // a.itemsize for a in arrays for s in a.strides[:2]]


def _destination(out: Array, dtype: np.dtype, shape: tuple, layout: bool) -> Array:
    """`out`. Raises ValueError for another type or shape, a read-only array, or if `layout` is False."""
    if out.shape != tuple(shape) or out.dtype != dtype or not (layout and out.flags.writeable):
        raise ValueError(f"out: not a writable {dtype} array of shape {tuple(shape)}, or with odd strides")
    return out


def _result(out: Grad, dtype: np.dtype, shape: tuple) -> Grad:
    """A new array for None, False for False, else `out`, checked."""
    if out is None:
        return memory.empty(shape, dtype)
    return out if out is False else _destination(out, dtype, shape, out.flags.c_contiguous)


_FLOAT32 = np.dtype(np.float32)  # for an operation without real numbers


def _ids(ids: Array, below: int, what: str) -> Array:
    """`ids` as a contiguous int32 array. Raises IndexError unless all are from 0 to below - 1."""
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{what}s are integers, not {ids.dtype}")
    rows = np.ascontiguousarray(ids, np.int32)
    try:
        if rows is not ids and (rows != ids).any():  # a number of more than 32 bits
            raise IndexError
        _run("check_ids", _FLOAT32, memory.empty(1, np.int32), rows, rows.size, below)
    except IndexError:
        ops.check_ids(ids, below, what)  # raises, with the id in the message
    return rows


# --- the operations: ops.py has their docstrings and formulas -----------------------------------------------


def embedding_forward(ids: Array, w: Array) -> tuple[Array, tuple]:
    w, ids = np.ascontiguousarray(w), _ids(ids, len(w), "id")
    out = memory.empty((*ids.shape, w.shape[1]), w.dtype)
    _run("embedding_forward", w.dtype, out, w, ids, ids.size, w.shape[1])
    return out, (ids, w.shape)


def embedding_backward(dout: Array, cache: tuple, dw: Grad = None, add: bool = False) -> Grad:
    ids, shape = cache
    if dw is False:
        return False
    ids = _ids(ids, shape[0], "id")  # again: the cache may hold the caller's array, which may have changed
    dout = _like(dout, dout.dtype, (*ids.shape, shape[1]))
    add, dw = add and dw is not None, _result(dw, dout.dtype, shape)
    _run("embedding_backward", dout.dtype, dw, dout, ids, shape[0], ids.size, shape[1], int(add))
    return dw


def gemm(
    a: Array, b: Array, bias: Array | None = None, add: Array | None = None, out: Array | None = None,
    bfloat16: bool = False,
) -> Array:  # fmt: skip
    """a (M, K) times b (K, N), plus bias (N,) on every row, plus add (M, N): (M, N), in `out` if it is given.

    a and b may have any strides, so `.T` costs nothing. The rows of out must be contiguous, or, without bias
    and add, the columns. With add, all of out must be contiguous. bfloat16: a and b, float32, are first
    rounded to bfloat16. Raises ValueError for shapes or strides that do not fit, TypeError for bfloat16 of
    float64.
    """
    if bfloat16 and a.dtype != np.float32:
        raise TypeError(f"bfloat16: the operands are float32, not {a.dtype}")
    (M, K), N = a.shape, b.shape[1]
    if b.shape[0] != K:
        raise ValueError(f"shapes {a.shape} and {b.shape} do not multiply")
    a, size = _strided(a, a.dtype), a.itemsize
    b = _strided(b, a.dtype)
    if out is None:
        out = memory.empty((M, N), a.dtype)
    elif out.strides[1] != size and out.strides[0] == size and bias is None and add is None:
        return gemm(b.T, a.T, out=out.T, bfloat16=bfloat16).T  # contiguous columns: compute the transpose
    rows = (out.strides[1] == size or N == 1) and (out.strides[0] >= N * size or M == 1)
    _destination(out, a.dtype, (M, N), rows and out.strides[0] % size == 0)
    strides = [s // size for s in (out.strides[0], *a.strides, *b.strides)]
    if add is not None and out.strides[0] != N * size:
        raise ValueError("gemm: where something is added, the rows of out have no gaps")
    bias = None if bias is None else _like(bias, a.dtype, (N,))
    add = None if add is None else _like(add, a.dtype, (M, N))
    tape = current_tape.value if a.strides[1] == size else None
    panels, packed = tape.panels(b, bfloat16) if tape is not None else (None, None)
    _run("gemm", a.dtype, out, a, b, bias, add, panels, packed, M, N, K, *strides, int(bfloat16))
    return out


def panels_size(b: Array, bfloat16: bool = False) -> int:
    """The number of elements of `panels`: N rounded up to 32, times K or, in bfloat16, K / 2 rounded up."""
    K, N = b.shape
    return -(-N // 32) * 32 * (-(-K // 2) if bfloat16 else K)


def pack_panels(panels: Array, b: Array, bfloat16: bool = False) -> None:
    """Fills `panels` with b (K, N) in the order in which `gemm` reads. A few rows times these panels take no
    longer than reading them from memory."""
    K, N = b.shape
    _run("pack_panels", b.dtype, panels, b, N, K, *(s // b.itemsize for s in b.strides), int(bfloat16))


def linear_forward(
    x: Array, w: Array, b: Array | None = None, add: Array | None = None, bfloat16: bool = False
) -> tuple[Array, tuple]:
    add = None if add is None else add.reshape(-1, w.shape[1])
    out = gemm(x.reshape(-1, x.shape[-1]), w, b, add, bfloat16=bfloat16)
    return out.reshape(*x.shape[:-1], w.shape[1]), (x, w)


def linear_backward(
    dout: Array, cache: tuple, dw: Grad = None, db: Grad = None, add: Array | None = None,
    bfloat16: bool = False,
) -> tuple[Array, Grad, Grad]:  # fmt: skip
    x, w = cache
    dout = np.asarray(dout, x.dtype)
    x_rows, dout_rows = x.reshape(-1, w.shape[0]), dout.reshape(-1, w.shape[1])
    add = None if add is None else add.reshape(x_rows.shape)
    dx = gemm(dout_rows, w.T, None, add, bfloat16=bfloat16).reshape(x.shape)
    if dw is not False:
        dw = gemm(x_rows.T, dout_rows, out=dw, bfloat16=bfloat16)
    if db is not False:
        db, dout_rows = _result(db, x.dtype, w.shape[1:]), np.ascontiguousarray(dout_rows)
        _run("column_sum", x.dtype, db, dout_rows, *dout_rows.shape)
    return dx, dw, db


def layernorm_forward(x: Array, g: Array, b: Array, eps: float = 1e-5) -> tuple[Array, tuple]:
    x, channels = np.ascontiguousarray(x), x.shape[-1:]
    g, b = _like(g, x.dtype, channels), _like(b, x.dtype, channels)
    out, (mean, rstd) = memory.empty(x.shape, x.dtype), memory.empty((2, *x.shape[:-1]), x.dtype)
    _run("layernorm_forward", x.dtype, out, mean, rstd, x, g, b, mean.size, x.shape[-1], float(eps))
    return out, (x, g, mean, rstd)


def layernorm_backward(
    dout: Array, cache: tuple, dg: Grad = None, db: Grad = None, add: Array | None = None,
) -> tuple[Array, Grad, Grad]:  # fmt: skip
    x, g, mean, rstd = cache
    dout = _like(dout, x.dtype, x.shape)
    dg, db = _result(dg, x.dtype, g.shape), _result(db, x.dtype, g.shape)
    dx = memory.empty(x.shape, x.dtype)
    add = None if add is None else _like(add, x.dtype, x.shape)
    _run("layernorm_backward", x.dtype, dx, dg, db, dout, x, g, mean, rstd, add, mean.size, x.shape[-1])
    return dx, dg, db


def gelu_forward(x: Array) -> tuple[Array, tuple]:
    x, out = np.ascontiguousarray(x), memory.empty(x.shape, x.dtype)
    _run("gelu_forward", x.dtype, out, x, x.size)
    return out, (x,)


def gelu_backward(dout: Array, cache: tuple) -> Array:
    (x,) = cache
    dx = memory.empty(x.shape, x.dtype)
    _run("gelu_backward", x.dtype, dx, _like(dout, x.dtype, x.shape), x, x.size)
    return dx


relu_forward, relu_backward = map(_in_numpy, (ops.relu_forward, ops.relu_backward))
tanh_forward, tanh_backward = map(_in_numpy, (ops.tanh_forward, ops.tanh_backward))
advance, weighted_sum = map(_in_numpy, (ops.advance, ops.weighted_sum))


def attention_forward(
    q: Array, k: Array, v: Array, n_head: int, start: Array | None = None, prefix: int = 0,
    length: Array | None = None,
) -> tuple[Array, tuple]:  # fmt: skip
    (B, T, C), S = q.shape, k.shape[1] if length is None else int(length)
    if k.shape != (B, k.shape[1], C) or v.shape != k.shape or not T <= S <= k.shape[1] or C % n_head:
        shapes = f"q {q.shape}, k {k.shape}, v {v.shape} and {n_head} heads"
        raise ValueError(f"attention: {shapes} do not fit together")
    if not 0 <= prefix <= S:
        raise ValueError(f"attention: prefix is {prefix}: it must be 0 to {S}, the number of keys")
    q, k, v = _rows(q, q.dtype), _rows(k, q.dtype), _rows(v, q.dtype)
    if start is not None:
        start = _like(_ids(start, (1 << 31) - 1, "start"), np.int32, (B, min(T, S - prefix)))
    out, length = memory.empty(q.shape, q.dtype), None if length is None else np.asarray(length, np.int64)
    sizes = B, T, S, int(n_head), C // int(n_head), int(prefix)
    _run("attention_forward", q.dtype, out, q, k, v, start, length, *sizes, *_strides(q, k, v))
    return out, (q, k, v, start, sizes)


def attention_backward(dout: Array, cache: tuple, packed: bool = False) -> tuple[Array, Array, Array] | Array:
    q, k, v, start, sizes = cache
    k, v = k[:, : sizes[2]], v[:, : sizes[2]]  # of a KV cache that is not full: the keys that forward read
    if packed and k.shape != q.shape:
        raise ValueError("attention: packed gradients need as many keys as queries")
    dout = _like(dout, q.dtype, q.shape)
    if packed:
        C, dqkv = q.shape[2], memory.empty((*q.shape[:2], 3 * q.shape[2]), q.dtype)
        grads = [dqkv[..., :C], dqkv[..., C : 2 * C], dqkv[..., 2 * C :]]
    else:
        grads = [memory.empty(x.shape, x.dtype) for x in (q, k, v)]
    strides = *_strides(q, k, v), *_strides(*grads)
    _run("attention_backward", q.dtype, *grads, dout, q, k, v, start, *sizes, *strides)
    return dqkv if packed else tuple(grads)


def append_rows(cache: Array, x: Array, length: Array) -> None:
    (B, T, C), x = x.shape, _rows(x, cache.dtype)
    S = cache.shape[1]
    ops.check_room(T, length, S)
    _destination(cache, cache.dtype, (B, S, C), _rows(cache, cache.dtype) is cache)
    _run("append_rows", cache.dtype, cache, x, np.asarray(length, np.int64), B, T, S, C, *_strides(cache, x))


def sample(
    logits: Array, uniform: Array, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Array:
    (B, V), logits = logits.shape, _rows(logits[None], logits.dtype)[0]
    uniform, ids = _like(uniform, np.float64, (B,)), np.empty(B, np.int32)
    sizes = B, V, logits.strides[0] // logits.itemsize, max(0, min(int(top_k), V))
    _run("sample", logits.dtype, ids, logits, uniform, *sizes, float(temperature), float(top_p))
    if B and ids.min() < 0:
        raise UserError(ops.NOT_FINITE)
    return ids


def residual_forward(x: Array, branch: Array) -> tuple[Array, None]:
    out, x = memory.empty(x.shape, x.dtype), np.ascontiguousarray(x)
    _run("residual_forward", x.dtype, out, x, _like(branch, x.dtype, x.shape), x.size)
    return out, None


residual_backward = ops.residual_backward  # no arithmetic


def dropout_forward(x: Array, rate: float, seed: int) -> tuple[Array, tuple]:
    out, x = memory.empty(x.shape, x.dtype), np.ascontiguousarray(x)
    _run("dropout_forward", x.dtype, out, x, x.size, int(seed), round(rate * 2**24), 1 / (1 - rate))
    return out, (rate, seed)


def dropout_backward(dout: Array, cache: tuple) -> Array:
    return dropout_forward(dout, *cache)[0]


def cross_entropy_forward(logits: Array, targets: Array) -> tuple[Array, tuple]:
    V, logits = logits.shape[-1], np.ascontiguousarray(logits)
    targets = _like(_ids(targets, V, "target"), np.int32, logits.shape[:-1])
    nll, top, total = memory.empty((3, *targets.shape), logits.dtype)
    _run("cross_entropy_forward", logits.dtype, nll, top, total, logits, targets, targets.size, V)
    return nll, (logits, targets, top, total)


def cross_entropy_backward(dnll: Array, cache: tuple) -> Array:
    logits, targets, top, total = cache
    targets = _ids(targets, logits.shape[-1], "target")  # again: the caller's array may have changed
    dlogits, dnll = memory.empty(logits.shape, logits.dtype), _like(dnll, logits.dtype, targets.shape)
    sizes = targets.size, logits.shape[-1]
    _run("cross_entropy_backward", logits.dtype, dlogits, dnll, logits, top, total, targets, *sizes)
    return dlogits


def squares(x: Array, length: int) -> Array:
    out, x = np.zeros(-(-x.size // length)), np.ascontiguousarray(x)
    if x.size:
        _run("squares", x.dtype, out, x, x.size, length)
    return out


def adamw(
    w: Array, g: Array, m: Array, v: Array, *, step: int, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, scale: float = 1.0,
) -> None:  # fmt: skip
    w, m, v, g = (*(_result(a, w.dtype, w.shape) for a in (w, m, v)), _like(g, w.dtype, w.shape))
    rate, shrink, correction2 = lr / (1 - beta1**step), 1 - lr * weight_decay, 1 / (1 - beta2**step)
    factors = (scale, beta1, beta2, eps, rate, shrink, correction2)
    _run("adamw", w.dtype, w, m, v, g, w.size, *map(float, factors))


if lib:
    isa = _configure()
    _NAMES = [name[3:] for name in dir(lib) if name.startswith("OP_")]
    _OPS = {op: (getattr(lib, f"OP_{op}"), ffi.typeof(f"struct {op} *")) for op in _NAMES}
    # a function of both backends has one docstring, in ops.py
    for _name, _function in vars(ops).items():
        if callable(_function) and _name in globals() and not globals()[_name].__doc__:
            globals()[_name].__doc__ = _function.__doc__
