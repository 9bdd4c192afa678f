"""Exercises: a forward pass in plain NumPy, a blank, and a hint.

`tinygpt exercise NAME` copies the functions of an exercise from here into a file of the reader's. `tinygpt
exercise NAME --check FILE` says whether the reader filled in the blank correctly (`course.py`). The name of a
function begins with the name of its exercise. The blank is a backward. AdamW and the KV cache have no
gradient. There the blank is a step, and the forward defines the result of all steps.

The forwards are those of `core` and `stages` without the code for speed. The caches of operations are the
same, so the project's own backward solves the exercise.
"""

import inspect

import numpy as np

from ..core import ops

EXERCISES = {  # in the order of learning: the lesson; the project's own solution and its file
    "linear": ("gradients of what all rows share add up", "linear_backward, core/ops.py"),
    "embedding": ("a row that is used twice learns twice", "embedding_backward, core/ops.py"),
    "gelu": ("a function of each element: product rule and chain rule", "gelu_backward, core/ops.py"),
    "layernorm": ("an element moves its row, through mean and variance", "layernorm_backward, core/ops.py"),
    "cross_entropy": ("softmax and logarithm are simpler together", "cross_entropy_backward, core/ops.py"),
    "attention": ("two products in reverse, a softmax between them", "attention_backward, core/ops.py"),
    "block": ("a stream with two branches, whose gradients add up", "block_backward, core/model.py"),
    "adamw": ("two running averages replace all earlier gradients", "adamw, core/ops.py"),
    "kv_cache": ("keys and values of earlier tokens are kept", "attention_forward, core/ops.py"),
    "lora": ("a small branch beside a map that is frozen", "linear_backward, stages/lora.py"),
    "policy_gradient": ("rewards become a gradient (REINFORCE)", "policy_gradient, stages/rlhf.py"),
    "rloo": ("each answer is measured against the others", "leave_one_out, stages/rlhf.py"),
    "dpo": ("comparisons steer a model without a judge", "dpo, stages/dpo.py"),
}
STEPS = {"adamw": ("w", "m", "v"), "kv_cache": ("out", "keys", "values")}  # the results of their blank


def blank(name: str) -> str:
    """The name of the function that is to be written."""
    return f"{name}_step" if name in STEPS else f"{name}_backward"


def code(name: str) -> str:
    """The code of an exercise's file."""
    functions = [inspect.getsource(f) for key, f in globals().items() if key.startswith(f"{name}_")]
    imports = "import numpy as np\n"
    if any("ops." in function for function in functions):
        imports += "\nfrom tinygpt.core import ops\n"
    return "\n\n".join([imports, *functions])


# --- linear -------------------------------------------------------------------------------------------------


def linear_forward(x, w, b):
    """out = x w + b. x (N, I), w (I, O), b (O,) -> out (N, O)."""
    return x @ w + b, (x, w)


def linear_backward(dout, cache):
    """dout (N, O) -> dx (N, I), dw (I, O), db (O,).

    Hint: write down one element, out[n, o] = sum_i x[n, i] w[i, o] + b[o]. A change of x[n, i] reaches the
    loss through out[n, o], for every o. Which sum is that? Ask the same for w[i, o] and for b[o]. Then find
    the matrix product that is this sum; the shapes leave little choice.
    """
    x, w = cache
    # write dx, dw and db here


def linear_inputs(rng):
    x, w, b = map(rng.standard_normal, [(5, 4), (4, 3), 3])
    return {"x": x, "w": w, "b": b}


# --- embedding ----------------------------------------------------------------------------------------------


def embedding_forward(ids, w):
    """out = w[ids], a row of the table for each id. ids (B, T) integers, w (V, C) -> out (B, T, C)."""
    return w[ids], (ids, w.shape)


def embedding_backward(dout, cache):
    """dout (B, T, C) -> dw (V, C).

    Hint: ids get no gradient. A row of w reaches the loss through each place where its id stands. How often
    is that? `dw[ids] += dout` looks right, but is wrong for an id that stands twice. Look at np.add.at.
    """
    ids, shape = cache
    # write dw here


def embedding_inputs(rng):
    ids = rng.permutation(6)[[[0, 2, 2, 5], [1, 2, 0, 4]]]  # the last row of w has no id
    return {"ids": ids, "w": rng.standard_normal((7, 3))}


# --- GELU ---------------------------------------------------------------------------------------------------


def gelu_forward(x):
    """out = x/2 (1 + tanh(u)), with u = sqrt(2/pi) (x + 0.044715 x^3). x (...) -> out (...)."""
    u = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    return x / 2 * (1 + np.tanh(u)), (x,)


def gelu_backward(dout, cache):
    """dout (...) -> dx (...).

    Hint: an element of out depends on one element of x, so dx is dout times a slope, element by element.
    The formula has x twice, in x/2 and in u. So by the product rule the slope has two terms. The term with
    the slope of tanh(u) needs the chain rule too. The slope of tanh(u) with respect to u is 1 - tanh(u)^2.
    """
    (x,) = cache
    # write dx here


def gelu_inputs(rng):
    return {"x": 3 * rng.standard_normal((3, 4))}  # wide enough for both straight ends of GELU


# --- layer normalisation ------------------------------------------------------------------------------------


def layernorm_forward(x, g, b, eps=1e-5):
    """out = g xhat + b, with xhat = (x - mean) rstd and rstd = 1 / sqrt(variance + eps), over the channels.

    x (B, T, C), g and b (C,) -> out (B, T, C).
    """
    mean = x.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt(np.square(x - mean).mean(-1, keepdims=True) + eps)
    return g * (x - mean) * rstd + b, (x, g, mean, rstd)


def layernorm_backward(dout, cache):
    """dout (B, T, C) -> dx (B, T, C), dg (C,), db (C,).

    Hint: all rows share g and b. For dx begin with dxhat, the gradient with respect to xhat. If mean and
    rstd were constants, dx would be rstd dxhat. But each x moves both, and through them the whole row. This
    makes two more terms, each with a mean over the channels. Another way: xhat has mean 0 and mean square 1
    for every x. Which two directions in dxhat have no effect then?
    """
    x, g, mean, rstd = cache
    # write dx, dg and db here


def layernorm_inputs(rng):
    x, g, b = map(rng.standard_normal, [(2, 3, 5), 5, 5])
    x[0] *= 0.01  # so small that eps matters
    return {"x": x, "g": g, "b": b}


# --- softmax cross-entropy ----------------------------------------------------------------------------------


def cross_entropy_forward(logits, targets):
    """nll = -log softmax(logits)[target], one for each target.

    logits (B, T, V), targets (B, T) integers in [0, V) -> nll (B, T).
    """
    top = logits.max(-1, keepdims=True)  # softmax does not change, and exp cannot overflow
    total = np.exp(logits - top).sum(-1, keepdims=True)
    at_target = np.take_along_axis(logits, targets[..., None], -1)
    return (np.log(total) - (at_target - top))[..., 0], (logits, targets, top, total)


def cross_entropy_backward(dnll, cache):
    """dnll (B, T) -> dlogits (B, T, V).

    Hint: nll = log(sum_j exp(logits[j])) - logits[target]. What is the slope of the first term with respect
    to one logit, and the slope of the second term? `top` is no third term: it cancels. A test before you
    check: the same number added to all logits of a row changes nothing, so a row of dlogits sums to 0.
    """
    logits, targets, top, total = cache
    # write dlogits here


def cross_entropy_inputs(rng):
    return {"logits": rng.standard_normal((2, 3, 5)), "targets": rng.integers(5, size=(2, 3))}


# --- causal multi-head attention ----------------------------------------------------------------------------


def attention_split(x, n_head):
    """(B, T, C) -> (B, H, T, D): head h has the channels from h D to (h + 1) D."""
    B, T, C = x.shape
    return x.reshape(B, T, n_head, C // n_head).swapaxes(1, 2)


def attention_merge(x):
    """(B, H, T, D) -> (B, T, C), the inverse of attention_split."""
    B, H, T, D = x.shape
    return x.swapaxes(1, 2).reshape(B, T, H * D)


def attention_forward(q, k, v, n_head):
    """For each head: out = P v with P = softmax(q k^T / sqrt(D)), where query i sees the keys 0 to i.

    q, k and v (B, T, C) -> out (B, T, C). The cache has P, (B, H, T, T).
    """
    T, D = q.shape[1], q.shape[2] // n_head
    scores = attention_split(q, n_head) @ attention_split(k, n_head).swapaxes(2, 3) / np.sqrt(D)
    scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
    P = np.exp(scores - scores.max(-1, keepdims=True))
    P /= P.sum(-1, keepdims=True)
    return attention_merge(P @ attention_split(v, n_head)), (q, k, v, P)


def attention_backward(dout, cache):
    """dout (B, T, C) -> dq (B, T, C), dk (B, T, C), dv (B, T, C).

    Hint: split everything into heads. Both products are exercise `linear` without a bias. The second gives
    dP and dv. The first gives dq and dk, after you have dscores. For the softmax between them take one row,
    P[j] = exp(s[j]) / sum_i exp(s[i]). A score moves its own P[j] and, through the sum, the whole row. So
    dscores has two terms, and each of its rows sums to 0. The mask needs no code: P is 0 there.
    """
    q, k, v, P = cache  # P.shape[1] is n_head
    # write dq, dk and dv here


def attention_inputs(rng):
    q, k, v = rng.standard_normal((3, 4, 5, 6))
    return {"q": q, "k": k, "v": v, "n_head": 3}


# --- a block ------------------------------------------------------------------------------------------------


def block_forward(x, p):
    """GPT-2's block, from tinygpt's operations: x + attention(layernorm(x)), then x + mlp(layernorm(x)).

    x (B, T, C); p has (weight, bias) of ln_1, attn.c_attn, attn.c_proj, ln_2, mlp.c_fc, mlp.c_proj.
    """
    a, c1 = ops.layernorm_forward(x, *p["ln_1"])
    qkv, c2 = ops.linear_forward(a, *p["attn.c_attn"])
    y, c3 = ops.attention_forward(*np.split(qkv, 3, -1), n_head=2)
    y, c4 = ops.linear_forward(y, *p["attn.c_proj"])
    x = x + y
    m, c5 = ops.layernorm_forward(x, *p["ln_2"])
    f, c6 = ops.linear_forward(m, *p["mlp.c_fc"])
    g, c7 = ops.gelu_forward(f)
    f, c8 = ops.linear_forward(g, *p["mlp.c_proj"])
    return x + f, (c1, c2, c3, c4, c5, c6, c7, c8)


def block_backward(dout, cache):
    """dout (B, T, C) -> dx (B, T, C), dp (a dict like p, with (dweight, dbias) for each name).

    Hint: call the backward of each operation, the last operation first: ops.linear_backward(dout, c8) gives
    three gradients. The forward uses x twice: in the sum x + ..., and as the input of the LayerNorm. So the
    gradient of x is the sum of two gradients. There are two such places. ops.attention_backward gives dq, dk
    and dv: put these three side by side again.
    """
    c1, c2, c3, c4, c5, c6, c7, c8 = cache
    # write dx and dp here


def block_inputs(rng):
    sizes = {"ln_1": (4,), "attn.c_attn": (4, 12), "attn.c_proj": (4, 4), "ln_2": (4,), "mlp.c_fc": (4, 16)}
    p = {name: (rng.standard_normal(n), rng.standard_normal(n[-1])) for name, n in sizes.items()}
    p["mlp.c_proj"] = rng.standard_normal((16, 4)), rng.standard_normal(4)
    return {"x": rng.standard_normal((3, 5, 4)), "p": p}


# --- AdamW --------------------------------------------------------------------------------------------------


def adamw_forward(w, gradients, lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1):
    """The weights (n,) after some gradients (T, n). Each step uses the averages of all gradients so far.

    In an average, a gradient has the weight beta^age. Divided by 1 - beta^t, as here, the weights sum to 1.
    """
    for t in range(1, len(gradients) + 1):
        age, past = np.arange(t)[::-1], np.array(gradients[:t])
        mean = (1 - beta1) / (1 - beta1**t) * (beta1**age @ past)
        square = (1 - beta2) / (1 - beta2**t) * (beta2**age @ past**2)
        w = w - lr * weight_decay * w - lr * mean / (np.sqrt(square) + eps)
    return w


def adamw_step(w, g, m, v, t, lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1):
    """One gradient g (n,), the t-th from 1 -> the new w, m and v (n,).

    Hint: m and v begin at 0 and hold the two averages without their divisors. How does m follow from the
    last m and g alone? The divisors 1 - beta^t correct the start at 0, and are not stored in m and v. The
    weight decay multiplies the old w, and does not use the averages: this is the W in AdamW.
    """
    # write w, m and v here


def adamw_inputs(rng):
    w, g, m, v = rng.standard_normal((4, 6))
    size = np.array([1, 0, 1e-8, 1e-7, 1, 1])  # so small that eps matters
    lr, beta1, beta2, eps, decay = rng.uniform(0.5, 0.9, 5).tolist()
    constants = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": 1e-7 * eps, "weight_decay": decay}
    arrays = {"w": w, "g": size * g, "m": size * m, "v": np.square(size * v)}
    return {**arrays, "t": int(rng.integers(2, 6)), **constants}


# --- KV cache -----------------------------------------------------------------------------------------------


def kv_cache_forward(q, k, v):
    """Attention with one head over a whole text: token t sees the tokens 0 to t. All (B, T, C)."""
    T, C = q.shape[1:]
    scores = np.where(np.tri(T, dtype=bool), q @ k.swapaxes(1, 2) / np.sqrt(C), -np.inf)
    P = np.exp(scores - scores.max(-1, keepdims=True))
    return P / P.sum(-1, keepdims=True) @ v


def kv_cache_step(q, k, v, keys, values):
    """One more token: q, k and v (B, 1, C) -> out (B, 1, C), and all keys and values (B, S + 1, C).

    keys and values (B, S, C) are those of the S earlier tokens.

    Hint: a token's key and value do not depend on later tokens, so the earlier keys and values stay as they
    are. The new token sees all earlier keys and its own key. So its row of scores needs no mask.
    """
    # write out, keys and values here


def kv_cache_inputs(rng):
    (q, k, v), (keys, values) = rng.standard_normal((3, 2, 1, 6)), rng.standard_normal((2, 2, 3, 6))
    return {"q": q, "k": k, "v": v, "keys": keys, "values": values}


# --- LoRA ---------------------------------------------------------------------------------------------------


def lora_forward(x, w, A, B, alpha):
    """out = x w + s (x A) B, with s = alpha / R. x (N, I), w (I, O), A (I, R), B (R, O) -> out (N, O)."""
    s, low = alpha / A.shape[1], x @ A
    return x @ w + s * (low @ B), (x, w, A, B, low, s)


def lora_backward(dout, cache):
    """dout (N, O) -> dx (N, I), dA (I, R), dB (R, O); w is frozen and gets none.

    Hint: the branch is exercise `linear` twice, without b, times s. Begin with dlow, the gradient with
    respect to low = x A. The forward uses x twice, so dx is a sum of two gradients. The frozen w passes one
    of them on, but does not change. Training begins with B = 0. Which of dA and dB is 0 then, and why does
    the branch learn anyway?
    """
    x, w, A, B, low, s = cache
    # write dx, dA and dB here


def lora_inputs(rng):
    w = rng.integers(-3, 4, (4, 12))  # frozen: gradcheck checks no gradient of integers
    x, A, B = map(rng.standard_normal, [(5, 4), (4, 2), (2, 12)])
    return {"x": x, "w": w, "A": A, "B": B, "alpha": float(rng.uniform(1, 9))}


# --- policy gradient ----------------------------------------------------------------------------------------


def policy_gradient_forward(logits, ids, advantages):
    """loss = the mean over the answers of -advantage log p(answer), log p(answer) = sum_t log p(ids[t]).

    logits (B, T, V), ids (B, T) sampled from their softmax, advantages (B,) -> loss, a number. The advantage
    says how much better than expected an answer was judged. Williams 1992 (REINFORCE).
    """
    logits = logits - logits.max(-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))  # (B, T, V), of all tokens
    answers = np.take_along_axis(logp, ids[..., None], -1)[..., 0].sum(-1)  # (B,)
    return np.mean(-advantages * answers), (logp, ids, advantages)


def policy_gradient_backward(dloss, cache):
    """dloss, a number -> dlogits (B, T, V).

    Hint: -log p(ids[t]) is the nll (negative log-likelihood) of exercise `cross_entropy`. The loss is the sum
    of all nll, each times a factor. Which factor? With these factors a model learns from answers as from
    texts, but bad answers get less likely. The numbers ids and advantages depend on the model, but count as
    constants. The policy gradient theorem: the expectation of this gradient, over answers that the model
    samples, is minus the gradient of the expected reward.
    """
    logp, ids, advantages = cache
    # write dlogits here


def policy_gradient_inputs(rng):
    logits, ids = rng.standard_normal((3, 4, 5)), rng.integers(5, size=(3, 4))
    advantages = np.array([0, -9, 9]) + rng.integers(1, 5, 3)  # constants: integers
    return {"logits": logits, "ids": ids, "advantages": advantages}


# --- RLOO ---------------------------------------------------------------------------------------------------


def rloo_forward(logp, rewards):
    """Of every two answers to a question, the better one becomes likelier relative to the other one.

        loss = -the mean of (r_i - r_j) (logp_i - logp_j) / 2, over the questions and the pairs i < j

    logp (B, n) of n answers to each of B questions, rewards (B, n) integers -> loss, a number.
    """
    B, n = logp.shape
    gaps = rewards[:, :, None] - rewards[:, None, :]  # (B, n, n), each pair twice
    return -(gaps * (logp[:, :, None] - logp[:, None, :])).sum() / (2 * n * (n - 1) * B), rewards


def rloo_backward(dloss, rewards):
    """dloss, a number -> dlogp (B, n).

    Hint: collect the terms with logp_i. The factor of logp_i is -1 / (B n) times RLOO's advantage, which is
    r_i minus the mean reward of the n - 1 other answers. You need no pairs. Kool et al. 2019; Ahmadian et al.
    2024.
    """
    # write dlogp here


def rloo_inputs(rng):
    return {"logp": rng.standard_normal((3, 5)), "rewards": rng.integers(-3, 4, (3, 5))}


# --- DPO ----------------------------------------------------------------------------------------------------


def dpo_forward(chosen, rejected, ref_chosen, ref_rejected, beta):
    """loss = the mean of -log sigmoid(beta ((chosen - ref_chosen) - (rejected - ref_rejected))).

    All (N,): log-probabilities of answers. The reference model is frozen. Rafailov et al. 2023.
    """
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return np.mean(np.log(1 + np.exp(-margin))), (chosen, rejected, ref_chosen, ref_rejected, beta)


def dpo_backward(dloss, cache):
    """dloss, a number -> dchosen (N,), drejected (N,).

    Hint: the slope of -log sigmoid(m) is -sigmoid(-m): a pair that is right by a wide margin teaches little.
    Then take the slope of m with respect to chosen and to rejected.
    """
    chosen, rejected, ref_chosen, ref_rejected, beta = cache
    # write dchosen and drejected here


def dpo_inputs(rng):
    refs = rng.integers(-9, -2, (2, 5))  # frozen: integers get no gradient
    chosen, rejected = refs + rng.standard_normal((2, 5))
    frozen = {"ref_chosen": refs[0], "ref_rejected": refs[1], "beta": float(rng.uniform(0.2, 2))}
    return {"chosen": chosen, "rejected": rejected, **frozen}


# --- the steps' right results -------------------------------------------------------------------------------


def _adamw(w, g, m, v, t, lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1):
    w, m, v = w.copy(), m.copy(), v.copy()
    ops.adamw(w, g, m, v, step=t, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
    return w, m, v


def _kv_cache(q, k, v, keys, values):
    keys, values = np.concatenate([keys, k], 1), np.concatenate([values, v], 1)
    return ops.attention_forward(q, keys, values, 1)[0], keys, values


RIGHT = {"adamw": _adamw, "kv_cache": _kv_cache}
