"""Exercises: a forward pass as one would write it down, a backward that is blank, and a hint.

`tinygpt exercise NAME` copies the functions of an exercise from here into a file of the reader's, which then
needs NumPy alone; `tinygpt gradcheck` says whether the blank was filled in right. A function belongs to the
exercise that its name begins with.

The forwards are those of `core/ops.py`, `core/model.py` and `stages/rlhf.py` without what these have for
speed, and those of operations have the same caches: the solution is the project's own backward. Solutions are
not here.
"""

import inspect

import numpy as np

EXERCISES = {  # in the order of learning
    "linear": "what all rows share adds up its gradients",
    "gelu": "a function of each element: product rule and chain rule",
    "layernorm": "an element moves its whole row, through a mean and a variance",
    "cross_entropy": "softmax and logarithm are simpler together than alone",
    "attention": "two products in reverse, with a softmax between them",
    "lora": "a small branch beside a map that is frozen",
    "policy_gradient": "rewards become a gradient (REINFORCE)",
}
ELSEWHERE = {  # solutions that are not in ops.py under the exercise's name
    "lora": "linear_backward in tinygpt/stages/lora.py",
    "policy_gradient": "policy_gradient in tinygpt/stages/rlhf.py, a weighted cross_entropy_backward",
}


def text(name: str, command: str) -> str:
    """The file of an exercise, which `command` will check."""
    solution = ELSEWHERE.get(name, f"{name}_backward in tinygpt/core/ops.py")
    head = f'''"""Exercise {name}: {EXERCISES[name]}.

Fill in {name}_backward. For some loss it gets the gradient of what the forward returns, and
returns the gradients of what the forward takes; any way to the right numbers will do. Then

    {command}

says ok, or which gradient is wrong and at which element. Return None in place of a gradient that you leave
for later: the others are checked. When all are ok, compare with the project's own,
{solution}.
"""

import numpy as np
'''
    functions = [f for key, f in globals().items() if key.startswith(f"{name}_")]
    return "\n\n".join([head, *map(inspect.getsource, functions)])


# --- linear -------------------------------------------------------------------------------------------------


def linear_forward(x, w, b):
    """out = x w + b. x (N, I), w (I, O), b (O,) -> out (N, O)."""
    return x @ w + b, (x, w)


def linear_backward(dout, cache):
    """dout (N, O) -> dx (N, I), dw (I, O), db (O,).

    Hint: write down one element, out[n, o] = sum_i x[n, i] w[i, o] + b[o]. A change of x[n, i] reaches the
    loss through out[n, o], for every o: which sum is that? The same question for w[i, o] and for b[o]. Then
    find the product of matrices that is this sum; the shapes leave little choice.
    """
    x, w = cache
    raise NotImplementedError("write dx, dw and db here")


def linear_inputs(rng):
    normal = rng.standard_normal
    return {"x": normal((5, 4)), "w": normal((4, 3)), "b": normal(3)}


# --- GELU ---------------------------------------------------------------------------------------------------


def gelu_forward(x):
    """out = x/2 (1 + tanh(u)), with u = sqrt(2/pi) (x + 0.044715 x^3). x (...) -> out (...)."""
    u = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    return x / 2 * (1 + np.tanh(u)), (x,)


def gelu_backward(dout, cache):
    """dout (...) -> dx (...).

    Hint: an element of out depends on one of x, so dx is dout times a slope, element by element. x stands
    there twice, in x/2 and in u: a product rule, with a chain rule in its second term. The slope of tanh(u)
    by u is 1 - tanh(u)^2.
    """
    (x,) = cache
    raise NotImplementedError("write dx here")


def gelu_inputs(rng):
    return {"x": 3 * rng.standard_normal((3, 4))}  # far enough out to see both of its straight ends


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
    rstd were constants, dx would be rstd dxhat; but each x moves both, and through them the whole row: two
    more terms, each with a mean over the channels. Or ask what cannot pass: xhat has mean 0 and mean square
    1 whatever x is, so which two directions in dxhat are of no use?
    """
    x, g, mean, rstd = cache
    raise NotImplementedError("write dx, dg and db here")


def layernorm_inputs(rng):
    normal = rng.standard_normal
    return {"x": normal((2, 3, 5)), "g": normal(5), "b": normal(5)}


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

    Hint: nll = log(sum_j exp(logits[j])) - logits[target]. What is the slope of the first term by one of the
    logits, and of the second? `top` is no third term: it cancels. To see whether you are right before you
    check: a row of dlogits sums to 0, as the same number added to all logits of a row changes nothing.
    """
    logits, targets, top, total = cache
    raise NotImplementedError("write dlogits here")


def cross_entropy_inputs(rng):
    return {"logits": rng.standard_normal((2, 3, 5)), "targets": rng.integers(5, size=(2, 3))}


# --- causal multi-head attention ----------------------------------------------------------------------------


def attention_split(x, n_head):
    """(B, T, C) -> (B, H, T, D): head h has the channels h D to (h + 1) D."""
    B, T, C = x.shape
    return x.reshape(B, T, n_head, C // n_head).swapaxes(1, 2)


def attention_merge(x):
    """(B, H, T, D) -> (B, T, C), the inverse."""
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

    Hint: split everything into heads. Both products are exercise `linear` without a bias: the second gives
    dP and dv, the first, once dscores is known, dq and dk. Of the softmax between them take one row, P[j] =
    exp(s[j]) / sum_i exp(s[i]): a score moves its own P[j] and, through the sum, the whole row. So dscores
    has two terms, and each of its rows sums to 0. The mask needs nothing: P is 0 there.
    """
    q, k, v, P = cache  # P.shape[1] is n_head
    raise NotImplementedError("write dq, dk and dv here")


def attention_inputs(rng):
    q, k, v = rng.standard_normal((3, 2, 5, 6))
    return {"q": q, "k": k, "v": v, "n_head": 2}


# --- LoRA ---------------------------------------------------------------------------------------------------


def lora_forward(x, w, A, B, alpha):
    """out = x w + s (x A) B, with s = alpha / R. x (N, I), w (I, O), A (I, R), B (R, O) -> out (N, O)."""
    s, low = alpha / A.shape[1], x @ A
    return x @ w + s * (low @ B), (x, w, A, B, low, s)


def lora_backward(dout, cache):
    """dout (N, O) -> dx (N, I), dA (I, R), dB (R, O); w is frozen and gets none.

    Hint: the branch is exercise `linear` twice: begin with dlow, the gradient with respect to low = x A. x
    is used twice, and its gradients add up: what is frozen does not change, but passes gradients on. Training
    begins with B = 0. Which of dA and dB is 0 then, and why does it learn all the same?
    """
    x, w, A, B, low, s = cache
    raise NotImplementedError("write dx, dA and dB here")


def lora_inputs(rng):
    normal = rng.standard_normal
    w = rng.integers(-3, 4, (4, 12))  # frozen: gradcheck asks for no gradient of whole numbers
    return {"x": normal((5, 4)), "w": w, "A": normal((4, 2)), "B": normal((2, 12)), "alpha": 3.0}


# --- policy gradient ----------------------------------------------------------------------------------------


def policy_gradient_forward(logits, ids, advantages):
    """loss = the mean over the answers of -advantage log p(answer), log p(answer) = sum_t log p(ids[t]).

    logits (B, T, V), ids (B, T) sampled from their softmax, advantages (B,): how much better than expected
    an answer was judged -> loss, a number. Williams 1992 (REINFORCE).
    """
    logits = logits - logits.max(-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))  # (B, T, V), of all tokens
    answers = np.take_along_axis(logp, ids[..., None], -1)[..., 0].sum(-1)  # (B,)
    return np.mean(-advantages * answers), (logp, ids, advantages)


def policy_gradient_backward(dloss, cache):
    """dloss, a number -> dlogits (B, T, V).

    Hint: -log p(ids[t]) is the nll of exercise `cross_entropy`, and the loss is a weighted sum of them all:
    with which weights? So answers are learned as texts are, the good ones towards, the bad ones away. Both
    ids and advantages depend on the model, but count as given: that this is right in the mean is the theorem.
    """
    logp, ids, advantages = cache
    raise NotImplementedError("write dlogits here")


def policy_gradient_inputs(rng):
    logits, ids = rng.standard_normal((3, 4, 5)), rng.integers(5, size=(3, 4))
    return {"logits": logits, "ids": ids, "advantages": np.array([2, -1, -1])}  # given: whole numbers
