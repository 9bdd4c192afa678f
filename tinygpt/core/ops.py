"""The textbook: every operation of a GPT and its gradient, in NumPy, by hand.

Shapes, here and in csrc/tinygpt.h:

    B batch    T time (queries)    S keys, S >= T    C channels    H heads    D = C / H    V vocabulary
    I inputs, O outputs of a linear map    N rows    P positions of a learned prompt    R rank of LoRA

An operation with a gradient is two functions:

    out, cache        = layernorm_forward(x, g, b)
    dx, dg, db        = layernorm_backward(dout, cache)

`dout` is the gradient of a scalar loss L with respect to `out`. A backward returns the gradients of L with
respect to the float inputs of the forward, in the order of the inputs. The cache is an ordinary value. A
backward writes neither to the cache nor to `dout`, so a second call gives the same answer.

Gradients of parameters. `dw=`, `db=` and `dg=` each take an array for the result, or None for a new array, or
False. With False the gradient is not computed, and False stands in its place: gradients of frozen weights
cost no time.

Every function works in float32 and in float64, except with `bfloat16`: only in float32. This file is not
fast. `kernels.py` has the operations under the same names, and most of them call the C core. Tests compare
the two files, and `tinygpt gradcheck` compares both with finite differences.
"""

import numpy as np

from ..errors import UserError

Array = np.ndarray
Grad = Array | bool | None  # an array for the gradient; None: a new array; False: do not compute the gradient


# --- embedding ----------------------------------------------------------------------------------------------


def embedding_forward(ids: Array, w: Array) -> tuple[Array, tuple]:
    """out[b, t] = w[ids[b, t]]: one row of the table `w` for each id.

    ids (B, T) integers in [0, V), w (V, C) -> out (B, T, C). Raises IndexError for an id outside the table.
    """
    check_ids(ids, len(w), "id")
    return w[ids], (ids, w.shape)


def check_ids(ids: Array, below: int, what: str) -> None:
    """Raises IndexError unless all ids are from 0 to below - 1."""
    if ids.size and (ids.min() < 0 or ids.max() >= below):
        raise IndexError(f"{what} {ids.min() if ids.min() < 0 else ids.max()} is outside 0 to {below - 1}")


def embedding_backward(dout: Array, cache: tuple, dw: Grad = None, add: bool = False) -> Grad:
    """dw[v] = the sum of dout[b, t] over all (b, t) with ids[b, t] = v: equal ids share a row of the table.

    dout (B, T, C) -> dw (V, C). With `add` the sum is added to the numbers in `dw`. So the gradient of a tied
    table is a plain sum: the head writes its part, and the embedding adds its own.
    """
    ids, shape = cache
    if dw is False:
        return False
    if dw is None:
        dw = np.zeros(shape, dout.dtype)
    elif not add:
        dw[:] = 0
    np.add.at(dw, ids, dout)
    return dw


# --- linear -------------------------------------------------------------------------------------------------


def linear_forward(
    x: Array, w: Array, b: Array | None = None, add: Array | None = None, bfloat16: bool = False
) -> tuple[Array, tuple]:
    """out = x w + b + add. x (..., I), w (I, O), b (O,) or None, add (..., O) or None -> out (..., O).

    The weight is (in, out), as in GPT-2. The tied head passes `wte.T`, a view. In the last layer of a branch
    `add` is the residual stream. A sum passes its gradient to both sides unchanged, so the gradient of `add`
    is `dout` itself.

    bfloat16: x and w, float32, are rounded by `nearest_bfloat16` before the product, and so is dout in the
    backward. Sums stay float32. Some processors multiply twice as many bfloat16 numbers at a time.
    """
    x, w = operand(x, bfloat16=bfloat16), operand(w, bfloat16=bfloat16)
    out = x @ w
    if add is not None:
        out = out + add
    if b is not None:
        out += b
    return out, (x, w)


def linear_backward(
    dout: Array, cache: tuple, dw: Grad = None, db: Grad = None, add: Array | None = None,
    bfloat16: bool = False,
) -> tuple[Array, Grad, Grad]:  # fmt: skip
    """dx = dout w^T + add, dw = x^T dout, db = the sum of the rows of dout.

    Each follows from out[n, o] = sum_i x[n, i] w[i, o] + b[o]. The slope of out[n, o] along x[n, i] is
    w[i, o]. So dx[n, i] is the sum of dout[n, o] w[i, o] over the outputs o. Every row n uses w[i, o] and
    b[o] once, so their gradients are sums over the rows. `add` is the gradient that reaches x on another
    path. A forward without a bias takes db=False.
    """
    (x, w), factor = cache, operand(dout, bfloat16=bfloat16)
    dx = factor @ w.T
    if add is not None:
        dx = dx + add
    if dw is not False:
        dw = np.matmul(x.reshape(-1, x.shape[-1]).T, factor.reshape(-1, w.shape[1]), out=dw)
    if db is not False:
        db = np.sum(dout.reshape(-1, w.shape[1]), axis=0, out=db)
    return dx, dw, db


def operand(x: Array, *, bfloat16: bool) -> Array:
    """x as an operand of a product: x itself, or, with bfloat16, `nearest_bfloat16(x)`."""
    return nearest_bfloat16(x) if bfloat16 else x


def nearest_bfloat16(x: Array) -> Array:
    """x, float32, rounded to bfloat16 and kept as float32. Any shape.

    A bfloat16 is the upper half of a float32: the same exponent, and 8 of the 24 binary digits. Rounding is
    to the nearest, ties to an even last digit. A number beyond the largest bfloat16 becomes infinity. Raises
    TypeError for another type.
    """
    if x.dtype != np.float32:
        raise TypeError(f"bfloat16: the operands are float32, not {x.dtype}")
    bits = np.ascontiguousarray(x).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), x, nearest.view(np.float32))


# --- layer normalisation ------------------------------------------------------------------------------------


def layernorm_forward(x: Array, g: Array, b: Array, eps: float = 1e-5) -> tuple[Array, tuple]:
    """out = g xhat + b, with xhat = (x - mean) rstd and rstd = 1 / sqrt(variance + eps), over the channels.

    x (..., C), g and b (C,) -> out (..., C). Ba, Kiros and Hinton 2016. The variance is the mean of the
    squared deviations: it divides by C, not by C - 1. E[x^2] - E[x]^2 is the same in exact arithmetic, but
    loses digits where the mean is large.
    """
    mean = x.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt(np.square(x - mean).mean(-1, keepdims=True) + x.dtype.type(eps))
    return (x - mean) * rstd * g + b, (x, g, mean, rstd)


def layernorm_backward(
    dout: Array, cache: tuple, dg: Grad = None, db: Grad = None, add: Array | None = None,
) -> tuple[Array, Grad, Grad]:  # fmt: skip
    """dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat)) + add, with dxhat = dout g.

    dg = the sum over the rows of dout xhat, db = the sum over the rows of dout.

    Why two terms are subtracted: xhat has mean 0 and mean square 1 for every x. A change of x along the
    all-ones direction, or along xhat itself, leaves xhat as it is. So dx must have no part along these two
    directions. The two means project dxhat on the directions, and the subtraction removes the projections.
    `add` is the gradient that reaches x along the residual stream.
    """
    x, g, mean, rstd = cache
    rows = tuple(range(x.ndim - 1))  # the axes that g and b do not have: all rows share g and b
    xhat = (x - mean) * rstd
    dxhat = dout * g
    along_ones = dxhat.mean(-1, keepdims=True)
    along_xhat = (dxhat * xhat).mean(-1, keepdims=True)
    dx = rstd * (dxhat - along_ones - xhat * along_xhat)
    if add is not None:
        dx = dx + add
    if dg is not False:
        dg = np.sum(dout * xhat, axis=rows, out=dg)
    if db is not False:
        db = np.sum(dout, axis=rows, out=db)
    return dx, dg, db


# --- GELU ---------------------------------------------------------------------------------------------------

SQRT_2_OVER_PI = float(np.sqrt(2 / np.pi))


def gelu_forward(x: Array) -> tuple[Array, tuple]:
    """out = x/2 (1 + tanh(u)), with u = sqrt(2/pi) (x + 0.044715 x^3): the tanh form that GPT-2 uses.

    Any shape. Hendrycks and Gimpel 2016, section 2.
    """
    t = np.tanh(SQRT_2_OVER_PI * (x + 0.044715 * (x * x * x)))
    return 0.5 * x * (1 + t), (x,)


def gelu_backward(dout: Array, cache: tuple) -> Array:
    """dx = dout ((1 + tanh(u))/2 + x/2 (1 - tanh(u)^2) u'), with u' = sqrt(2/pi) (1 + 3 * 0.044715 x^2).

    The product rule on x/2 times (1 + tanh(u)); tanh' = 1 - tanh^2.
    """
    (x,) = cache
    t = np.tanh(SQRT_2_OVER_PI * (x + 0.044715 * (x * x * x)))
    du = SQRT_2_OVER_PI * (1 + 3 * 0.044715 * (x * x))
    return dout * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * du)


# --- the layers of a prompt encoder (stages/prompts.py) -----------------------------------------------------


def relu_forward(x: Array) -> tuple[Array, tuple]:
    """out = max(x, 0), any shape."""
    out = np.maximum(x, 0)
    return out, (out,)


def relu_backward(dout: Array, cache: tuple) -> Array:
    """dx = dout where out > 0, else 0."""
    return dout * (cache[0] > 0)


def tanh_forward(x: Array) -> tuple[Array, tuple]:
    """out = tanh(x), any shape."""
    out = np.tanh(x)
    return out, (out,)


def tanh_backward(dout: Array, cache: tuple) -> Array:
    """dx = dout (1 - out^2)."""
    return dout * (1 - np.square(cache[0]))


# --- causal multi-head attention ----------------------------------------------------------------------------


def visible_keys(B: int, T: int, S: int, start: Array | None = None, prefix: int = 0) -> Array:
    """Which keys each query sees: booleans (B, 1, T, S).

    The queries are the last T of S positions: query i of row b stands at key S - T + i. It sees its own key
    always, the first `prefix` keys, and the keys from start[b, i] to its own. start counts keys after the
    prefix. Its shape is (B, min(T, S - prefix)): a query that stands in the prefix has no start. None is 0
    for all.

    This one rule covers causality, the KV cache (T < S), and a learned prompt (prefix). It covers packed
    documents (start: where the document begins) and padding on the left (start: where the text begins).
    """
    key = np.arange(S)
    place = np.arange(S - T, S)[None, None, :, None]  # (1, 1, T, 1): each query's own key
    first = np.zeros((B, 1, T, 1), np.int64)
    if start is not None:
        first[:, 0, max(0, prefix - (S - T)) :, 0] = prefix + start
    first = np.minimum(first, place)
    return np.broadcast_to((key <= place) & ((key >= first) | (key < prefix)), (B, 1, T, S))


def attention_forward(
    q: Array, k: Array, v: Array, n_head: int, start: Array | None = None, prefix: int = 0,
    length: Array | None = None,
) -> tuple[Array, tuple]:  # fmt: skip
    """For each head: out = softmax(q k^T / sqrt(D), over the visible keys) v. Vaswani et al. 2017, 3.2.

    q (B, T, C), k and v (B, S, C) -> out (B, T, C). Head h has channels h D to (h + 1) D of each. `start` and
    `prefix` say which keys are visible, see `visible_keys`. Without them query i sees keys 0 to S - T + i.
    length (), int64: only the first `length` keys count, as in a KV cache that is not full.
    """
    if length is not None:
        k, v = k[:, :length], v[:, :length]
    (B, T, C), S = q.shape, k.shape[1]
    visible = visible_keys(B, T, S, start, prefix)
    scores = _split(q, n_head) @ _split(k, n_head).swapaxes(2, 3)  # (B, H, T, S)
    scores *= (C // n_head) ** -0.5
    scores = np.where(visible, scores, -np.inf)
    scores -= scores.max(-1, keepdims=True)  # softmax does not change, and exp cannot overflow
    probs = np.exp(scores)
    probs /= probs.sum(-1, keepdims=True)
    return _merge(probs @ _split(v, n_head)), (q, k, v, probs)


def attention_backward(dout: Array, cache: tuple, packed: bool = False) -> tuple[Array, Array, Array] | Array:
    """The steps of the forward in reverse order, with r = 1 / sqrt(D):

        out = P v              dv = P^T dout,  dP = dout v^T
        P = softmax(scores)    dscores = P (dP - sum of P dP over the keys)
        scores = r q k^T       dq = r dscores k,  dk = r dscores^T q

    Why a sum over the keys: all P of a query are divided by one total, so one score moves all of them.

    dout (B, T, C) -> dq (B, T, C), dk and dv (B, S, C). With `packed` the result is one array (B, T, 3C),
    with the three side by side, as `attn.c_attn` makes q, k and v.
    """
    q, k, v, probs = cache
    n_head = probs.shape[1]
    scale = (q.shape[-1] // n_head) ** -0.5
    dout = _split(dout, n_head)
    dprobs = dout @ _split(v, n_head).swapaxes(2, 3)  # (B, H, T, S)
    dscores = scale * probs * (dprobs - (probs * dprobs).sum(-1, keepdims=True))
    dq = _merge(dscores @ _split(k, n_head))
    dk = _merge(dscores.swapaxes(2, 3) @ _split(q, n_head))
    dv = _merge(probs.swapaxes(2, 3) @ dout)
    return np.concatenate([dq, dk, dv], -1) if packed else (dq, dk, dv)


def _split(x: Array, n_head: int) -> Array:
    B, T, C = x.shape
    return x.reshape(B, T, n_head, C // n_head).transpose(0, 2, 1, 3)  # (B, H, T, D)


def _merge(x: Array) -> Array:
    B, H, T, D = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, T, H * D)  # (B, T, C)


def append_rows(cache: Array, x: Array, length: Array) -> None:
    """Writes x (B, T, C), keys or values, to positions length - T to length of cache (B, S, C).

    length (), int64. Raises ValueError where the cache has no such positions.
    """
    check_room(x.shape[1], length, cache.shape[1])
    cache[:, length - x.shape[1] : length] = x


def check_room(T: int, length: Array, S: int) -> None:
    """Raises ValueError unless T new positions, `length` in all, fit into a cache of S positions."""
    if not T <= length <= S:
        raise ValueError(f"append_rows: {T} positions, {length} in all, do not fit into a cache of {S}")


def advance(length: Array, n: int) -> None:
    """Adds n to length (), int64, in place."""
    length += n


# --- residual connection and dropout ------------------------------------------------------------------------


def residual_forward(x: Array, branch: Array) -> tuple[Array, None]:
    """out = x + branch, any shape. He et al. 2015."""
    return x + branch, None


def residual_backward(dout: Array, cache: None = None) -> tuple[Array, Array]:
    """dx = dbranch = dout: a sum passes its gradient to both sides. Both results are `dout`, not copies."""
    return dout, dout


def dropout_forward(x: Array, rate: float, seed: int) -> tuple[Array, tuple]:
    """Sets each element to 0 with probability `rate`. Divides the others by 1 - rate: the expectation stays.

    Any shape. Srivastava et al. 2014. The mask says which elements stay. It depends only on `rate`, the seed
    and the place of the element. So backward computes the mask again, and C, NumPy and any number of threads
    give the same mask.
    """
    keep = dropout_mask(x.shape, rate, seed)
    return x * (keep * x.dtype.type(1 / (1 - rate))), (rate, seed)


def dropout_backward(dout: Array, cache: tuple) -> Array:
    """dx = dout times the same mask and scale: the forward of `dout`."""
    return dropout_forward(dout, *cache)[0]


def dropout_mask(shape: tuple, rate: float, seed: int) -> Array:
    """Booleans, True with probability 1 - rate. `shape` is that of the result.

    A hash of the element's number + 1 and the seed: the output function of SplitMix64 (Steele, Lea and Flood
    2014, figure 18). The upper 24 bits of the hash are compared with the rate.
    """
    z = np.arange(1, np.prod(shape, dtype=np.int64) + 1, dtype=np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(40) >= np.uint64(round(rate * 2**24))).reshape(shape)


# --- softmax cross-entropy ----------------------------------------------------------------------------------


def cross_entropy_forward(logits: Array, targets: Array) -> tuple[Array, tuple]:
    """nll = -log softmax(logits)[target], in nats, for each target.

    logits (..., V), targets (...) integers in [0, V) -> nll (...). The loss is sum(weights * nll). Weights of
    1 / (number of targets) give the mean. Weight 0 is a mask. Weights of advantage / (number of answers) give
    a policy gradient. So `dnll` of backward is the weight of each target. Raises IndexError for a target
    outside the vocabulary: mask a target by weight 0, not by an id such as -100.
    """
    check_ids(targets, logits.shape[-1], "target")
    top = logits.max(-1, keepdims=True)  # softmax does not change, and exp cannot overflow
    total = np.exp(logits - top).sum(-1, keepdims=True)
    nll = np.log(total) - (np.take_along_axis(logits, targets[..., None], -1) - top)
    return nll[..., 0], (logits, targets, top, total)


def cross_entropy_backward(dnll: Array, cache: tuple) -> Array:
    """dlogits = weight (softmax(logits) - onehot(target)).

    A step against dlogits makes a target of positive weight likelier, and of negative weight less likely.

    dnll (...), the weight of each target -> dlogits (..., V). Weight 0 gives zeros, even for infinite logits.
    """
    logits, targets, top, total = cache
    at = targets[..., None]
    dlogits = np.exp(logits - top)
    dlogits /= total
    np.put_along_axis(dlogits, at, np.take_along_axis(dlogits, at, -1) - 1, -1)
    dlogits *= dnll[..., None]
    dlogits[dnll == 0] = 0
    return dlogits


def weighted_sum(nll: Array, weights: Array) -> Array:
    """sum(weights * nll), both of one shape -> (), float64. Its gradient with respect to nll is `weights`."""
    products = np.zeros(nll.shape, np.result_type(nll, weights))
    np.multiply(nll, weights, out=products, where=weights != 0)  # the nll of a masked target may be infinite
    return np.asarray(products.sum(dtype=np.float64))


# --- sampling: functions of the logits ----------------------------------------------------------------------


NOT_FINITE = "the logits are not finite: the model's training diverged, or its file is damaged"


def probabilities(logits: Array, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Array:
    """The distribution of the next token, for `sample`: logits (..., V) -> (..., V), of the same dtype.

    softmax(logits / temperature), with two cuts. The first cut keeps the `top_k` likeliest tokens. The second
    keeps the likeliest tokens that together have `top_p` of the rest; top_k 0 and top_p 1 cut nothing. Each
    cut also keeps all tokens that are as likely as the last one. At temperature 0 the likeliest token, the
    first of equals, has probability 1. Raises UserError if the largest logit is not finite, or one is NaN.
    """
    V, top = logits.shape[-1], logits.max(-1, keepdims=True)
    if not np.isfinite(top).all():
        raise UserError(NOT_FINITE)
    if temperature == 0:
        probs = np.zeros_like(logits)
        np.put_along_axis(probs, logits.argmax(-1)[..., None], 1, -1)
        return probs
    scaled = (logits - top) / max(temperature, 1e-6)  # a float32 holds no 1e-300, and 0 / 0 is NaN
    if 0 < top_k < V:
        scaled[scaled < np.partition(scaled, V - top_k)[..., V - top_k, None]] = -np.inf
    probs = np.exp(scaled, out=scaled)
    probs /= probs.sum(-1, keepdims=True)
    if top_p < 1:
        probs[probs < _least_in_nucleus(probs, top_p)] = 0
        probs /= probs.sum(-1, keepdims=True)
    return probs


def _least_in_nucleus(probs: Array, top_p: float) -> Array:
    """The least probability (..., 1) among the likeliest tokens that together have top_p."""
    likeliest = np.sort(probs)[..., ::-1]
    before = (likeliest.cumsum(-1, dtype=np.float64) < top_p).sum(-1, keepdims=True)
    return np.take_along_axis(likeliest, np.minimum(before, probs.shape[-1] - 1), -1)  # rounding: sum < top_p


def sample(
    logits: Array, uniform: Array, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Array:
    """One id per row: the first id whose cumulative probability exceeds the row's uniform number.

    logits (B, V), uniform (B,) in [0, 1) -> ids (B,). Raises UserError as `probabilities` does.
    """
    mass = probabilities(logits, temperature, top_k, top_p).cumsum(-1, dtype=np.float64)
    return (mass > (uniform * mass[:, -1])[:, None]).argmax(-1)  # the last mass is 1, up to rounding


# --- the optimizer's two passes over all weights ------------------------------------------------------------


def squares(x: Array, length: int) -> Array:
    """The sum of squares of each part of `length` numbers, in float64: x (N,) -> (ceil(N / length),)."""
    parts = (x[i : i + length] for i in range(0, x.size, length))
    return np.array([np.square(part, dtype=np.float64).sum() for part in parts])


def adamw(
    w: Array, g: Array, m: Array, v: Array, *, step: int, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, scale: float = 1.0,
) -> None:  # fmt: skip
    """One AdamW update of w and of its moments m and v, all 1-D, in place. Loshchilov and Hutter 2019.

        g <- scale g                                scale: the factor of gradient clipping
        m <- beta1 m + (1 - beta1) g                mean of gradients
        v <- beta2 v + (1 - beta2) g^2              mean of squared gradients
        w <- w - lr weight_decay w - lr mhat / (sqrt(vhat) + eps)

    m and v start at zero: mhat = m / (1 - beta1^step) and vhat = v / (1 - beta2^step) correct this. `step`
    counts from 1.
    """
    g = g * w.dtype.type(scale)
    m += (1 - beta1) * (g - m)
    v += (1 - beta2) * (g * g - v)
    w *= 1 - lr * weight_decay
    w -= (lr / (1 - beta1**step)) * m / (np.sqrt(v / (1 - beta2**step)) + eps)
