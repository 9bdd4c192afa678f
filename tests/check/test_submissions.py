"""The inputs of the exercises: a table of right and wrong submissions, which must be accepted and refused."""

import re
from textwrap import indent

import numpy as np
import pytest

from tinygpt.check import course, exercises
from tinygpt.check.contract import leaves
from tinygpt.check.gradcheck import STREAMS, gradcheck

# An exercise: a right text for its blank; changes of this text that stay right; changes that make it wrong.
# Guards: equal sizes, such as batch = heads; equal constants, such as lr = 1 - beta2; a constant that does
# not differ from point to point; a term that the inputs make 0 or too small to see.
SUBMISSIONS = {
    "linear": (
        "return dout @ w.T, x.T @ dout, dout.sum(0)",
        [("x.T @ dout", "np.einsum('ni,no->io', x, dout)"), ("dout.sum(0)", "np.ones(len(x)) @ dout")],
        [("dout.sum(0)", "dout.mean(0)"), ("dout.sum(0)", "dout[0]"), ("x.T @ dout", "x.T @ dout / len(x)")],
    ),
    "embedding": (
        "dw = np.zeros(shape)\nnp.add.at(dw, ids, dout)\nreturn dw",
        [("np.add.at(dw, ids, dout)", "for i, d in zip(ids.ravel(), dout.reshape(-1, shape[1])): dw[i] += d"),
         ("np.add.at(dw, ids, dout)", "dw += np.einsum('btv,btc->vc', np.eye(shape[0])[ids], dout)")],
        [("np.add.at(dw, ids, dout)", "dw[ids] += dout"),
         ("np.add.at(dw, ids, dout)", "for i, d in zip(ids, dout): dw[i] += d"),
         ("np.add.at(dw, ids, dout)", "for t in range(ids.shape[1]): dw[ids[:, t]] += dout[:, t]"),
         ("np.zeros(shape)", "np.zeros((ids.max() + 1, shape[1]))"),  # the last row has no id
         ("dw, ids,", "dw, np.unique(ids, return_inverse=True)[1].reshape(ids.shape),"),
         ("return", "dw[0] = 0  # as if this id were padding\nreturn")],
    ),
    "gelu": (
        "s = np.sqrt(2 / np.pi)\nt = np.tanh(s * (x + 0.044715 * x**3))\n"
        "return dout * (0.5 * (1 + t) + 0.5 * x * (1 - t**2) * s * (1 + 3 * 0.044715 * x**2))",
        [("(1 - t**2)", "(1 - t) * (1 + t)"), ("(1 - t**2)", "np.cosh(s * (x + 0.044715 * x**3)) ** -2")],
        [("3 * 0.044715", "0.044715"), ("* s * (1", "* (1"), ("(1 - t**2)", "(1 - t) ** 2"),
         ("0.5 * (1 + t) + ", "")],
    ),
    "layernorm": (
        "xhat, d = (x - mean) * rstd, dout * g\n"
        "d = d - d.mean(-1, keepdims=True) - xhat * (d * xhat).mean(-1, keepdims=True)\n"
        "return rstd * d, (dout * xhat).sum((0, 1)), dout.sum((0, 1))",
        [("(d * xhat).mean(-1, keepdims=True)", "np.einsum('btc,btc->bt', d, xhat)[..., None] / x.shape[-1]"),
         ("rstd * d,", "rstd * (d - d.mean(-1, keepdims=True)),")],
        [("(x - mean) * rstd", "(x - mean) / x.std(-1, keepdims=True)"),  # without eps
         ("xhat * (d * xhat)", "xhat * (d * xhat) / np.square(xhat).mean(-1, keepdims=True)"),
         ("(d * xhat).mean(-1, keepdims=True)", "(d * xhat).sum(-1, keepdims=True) / (x.shape[-1] - 1)"),
         ("d.mean(-1", "d.mean(1"), ("(x - mean)", "x"), ("dout * g", "dout"), ("rstd * d,", "d,")],
    ),
    "cross_entropy": (
        "p = np.exp(logits - top) / total\nreturn dnll[..., None] * (p - np.eye(p.shape[-1])[targets])",
        [("np.exp(logits - top) / total", "np.exp(logits - top - np.log(total))"),
         ("np.eye(p.shape[-1])[targets]", "(np.arange(p.shape[-1]) == targets[..., None])")],
        [("np.eye(p.shape[-1])[targets]", "(logits == top)"), ("logits - top", "logits"),
         ("[targets]", "[targets[0]]"), ("dnll[..., None]", "dnll[..., None] / dnll.size")],
    ),
    "attention": (
        "H = P.shape[1]\nq, k, v, d = (attention_split(a, H) for a in (q, k, v, dout))\n"
        "dP = d @ v.swapaxes(2, 3)\nscale = np.sqrt(q.shape[-1])\n"
        "s = P * (dP - (P * dP).sum(-1, keepdims=True)) / scale\n"
        "return [attention_merge(a) for a in (s @ k, s.swapaxes(2, 3) @ q, P.swapaxes(2, 3) @ d)]",
        [("(P * dP).sum", "(d * (P @ v)).sum"),
         ("s.swapaxes(2, 3) @ q", "np.einsum('bhij,bhid->bhjd', s, q)")],
        [("H = P.shape[1]", "H = P.shape[0]"), ("H = P.shape[1]", "H = 2"), ("q.shape[-1]", "len(q)"),
         ("q.shape[-1]", "H"), ("q.shape[-1]", "dout.shape[-1]"),
         ("q.shape[-1]", "q.shape[2]"), (" / scale", ""), ("(P * dP).sum(-1", "(P * dP).sum(-2")],
    ),
    "block": (
        "dp = {}\nd, *dp['mlp.c_proj'] = ops.linear_backward(dout, c8)\n"
        "d, *dp['mlp.c_fc'] = ops.linear_backward(ops.gelu_backward(d, c7), c6)\n"
        "d, *dp['ln_2'] = ops.layernorm_backward(d, c5)\ndx = dout + d\n"
        "d, *dp['attn.c_proj'] = ops.linear_backward(dx, c4)\n"
        "d = np.concatenate(ops.attention_backward(d, c3), -1)\n"
        "d, *dp['attn.c_attn'] = ops.linear_backward(d, c2)\n"
        "d, *dp['ln_1'] = ops.layernorm_backward(d, c1)\nreturn dx + d, dp",
        [("ops.linear_backward(dout, c8)",
          "dout @ c8[1].T, np.einsum('bti,bto->io', c8[0], dout), dout.sum((0, 1))"),
         ("ops.linear_backward(dx, c4)",
          "dx @ c4[1].T, (c4[0].swapaxes(1, 2) @ dx).sum(0), dx.sum(1).sum(0)")],
        [("ops.linear_backward(dout, c8)", "dout @ c8[1].T, c8[0][0].T @ dout[0], dout[0].sum(0)"),
         ("(dx, c4)", "(dout, c4)"), ("dx + d,", "dout + d,"), ("attention_backward(d, c3)",
                                                               "attention_backward(d, c3)[::-1]")],
    ),
    "adamw": (
        "m = beta1 * m + (1 - beta1) * g\nv = beta2 * v + (1 - beta2) * g * g\n"
        "mean, root = m / (1 - beta1**t), np.sqrt(v / (1 - beta2**t))\n"
        "return w - lr * weight_decay * w - lr * mean / (root + eps), m, v",
        [("lr * mean / (root + eps)", "lr * np.sqrt(1 - beta2**t) / (1 - beta1**t) * m / "
                                      "(np.sqrt(v) + eps * np.sqrt(1 - beta2**t))"),
         ("lr * mean / (root + eps)", "lr / (1 - beta1**t) * m / (np.sqrt(v) / np.sqrt(1 - beta2**t) + eps)"),
         ("beta1 * m + (1 - beta1) * g", "m + (1 - beta1) * (g - m)"),
         ("w - lr * weight_decay * w - lr * mean", "(1 - lr * weight_decay) * w - lr * mean"),
         ("w - lr * weight_decay * w - lr * mean / (root + eps)",
          "w - lr * (mean / (root + eps) + weight_decay * w)")],
        [("root + eps", "root"), ("root + eps", "root - eps"), ("root + eps", "np.sqrt(root**2 + eps)"),
         ("root + eps", "np.sqrt(root**2 + eps**2)"), ("root + eps", "np.maximum(root, eps)"),
         ("root + eps", "root + 1e-8"), ("root + eps", "root - 1e-7"),
         ("(root + eps)", "(np.sqrt(v) + eps) * np.sqrt(1 - beta2**t)"),  # eps is not corrected
         ("lr * weight_decay * w", "lr * 0.1 * w"), ("lr * weight_decay", "weight_decay"),
         ("lr * weight_decay", "lr * (1 - beta1)"), ("lr * weight_decay", "(1 - beta2) * weight_decay"),
         ("beta1**t", "beta1"), ("beta2**t", "beta2"), ("beta2**t", "beta2**(t - 1)"),
         ("w - lr * weight_decay * w - lr * mean / (root + eps)",
          "(w - lr * mean / (root + eps)) * (1 - lr * weight_decay)")],
    ),
    "kv_cache": (
        "keys, values = np.concatenate([keys, k], 1), np.concatenate([values, v], 1)\n"
        "s = q @ keys.swapaxes(1, 2) / np.sqrt(q.shape[-1])\np = np.exp(s - s.max(-1, keepdims=True))\n"
        "return p / p.sum(-1, keepdims=True) @ values, keys, values",
        [("p / p.sum(-1, keepdims=True) @ values", "p @ values / p.sum(-1, keepdims=True)"),
         ("q @ keys.swapaxes(1, 2) /", "np.einsum('bic,bjc->bij', q, keys) /")],
        [("q.shape[-1]", "keys.shape[1]"), ("q.shape[-1]", "keys.shape[1] - 1"), ("q.shape[-1]", "len(q)"),
         (" / np.sqrt(q.shape[-1])", ""), ("[keys, k]", "[k, keys]"), ("[values, v]", "[values, k]")],
    ),
    "lora": (
        "dlow = s * dout @ B.T\nreturn dout @ w.T + dlow @ A.T, x.T @ dlow, s * low.T @ dout",
        [("dout @ w.T + dlow @ A.T", "dout @ (w + s * A @ B).T"), ("x.T @ dlow", "s * (x.T @ dout) @ B.T")],
        [("dlow = s", "s = 1.5\ndlow = s"), ("s * low", "low"), ("dout @ w.T + ", ""),
         ("x.T @ dlow", "x.T @ dlow / s"), ("dlow = s", "dlow = s * len(B)"),
         ("dlow @ A.T", "s * dlow @ A.T")],
    ),
    "policy_gradient": (
        "d = np.exp(logp) - np.eye(logp.shape[-1])[ids]\n"
        "return dloss * d * advantages[:, None, None] / len(ids)",
        [("dloss * d * advantages[:, None, None] / len(ids)",
          "d * (dloss / len(ids) * advantages).reshape(-1, 1, 1)"),
         ("d * advantages[:, None, None]", "np.einsum('btv,b->btv', d, advantages)")],
        [("advantages[", "(advantages - advantages.mean())["), ("len(ids)", "ids.size"),
         ("advantages[", "((advantages - advantages.mean()) / (advantages.std() / np.sqrt(2)))["),
         ("advantages[", "np.sign(advantages)["), ("advantages[", "abs(advantages)["),
         ("advantages[", "advantages.clip(0)["), ("/ len(ids)", "/ abs(advantages).sum()"),
         ("advantages[", "np.array([2, -1, -1])["), ("[ids]", "[ids[0]]")],
    ),
    "rloo": (
        "n = rewards.shape[1]\nothers = (rewards.sum(1, keepdims=True) - rewards) / (n - 1)\n"
        "return -dloss * (rewards - others) / rewards.size",
        [("rewards - others", "n * rewards - n * rewards.mean(1, keepdims=True)) / (n - 1"),
         ("(rewards.sum(1, keepdims=True) - rewards)", "rewards @ (1 - np.eye(n))")],
        [("(n - 1)", "len(rewards)"), ("(n - 1)", "n"), ("rewards.size", "n"),
         ("rewards.size", "len(rewards)"), ("rewards.sum(1", "rewards.sum(0"),
         ("rewards - others", "rewards - rewards.mean()")],
    ),
    "dpo": (
        "m = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))\n"
        "g = -beta / (1 + np.exp(m)) / len(m) * dloss\nreturn g, -g",
        [("-beta / (1 + np.exp(m))", "-beta * np.exp(-m) / (1 + np.exp(-m))"),
         ("-beta / (1 + np.exp(m))", "beta * (np.tanh(m / 2) - 1) / 2")],
        [("-beta / (1", "-0.7 / (1"), ("-beta / (1", "-1 / (1"), ("np.exp(m)", "np.exp(-m)"),
         (" / len(m)", ""), ("m = beta", "m = 0.7"), ("return g, -g", "return g, g"),
         ("(chosen - ref_chosen) - (rejected - ref_rejected)", "chosen - rejected")],
    ),
}  # fmt: skip


def is_accepted(name: str, body: str) -> bool:
    """Whether all gradients of a submission are ok. A submission may also fail, as with a wrong shape."""
    scope = {}
    exec(re.sub("    # write .* here", lambda _: indent(body, "    "), exercises.code(name)), scope)
    try:
        with np.errstate(all="ignore"):
            return all(r.ok for r in gradcheck(*course.pair(name, scope[exercises.blank(name)])))
    except ValueError:
        return False


@pytest.mark.parametrize("name", exercises.EXERCISES)
def test_right_submissions_are_accepted_and_wrong_ones_refused(name):
    body, right, wrong = SUBMISSIONS[name]
    assert is_accepted(name, body)
    assert all(body.count(old) == 1 for old, _ in right + wrong)
    assert [new for old, new in right if not is_accepted(name, body.replace(old, new))] == []
    assert [new for old, new in wrong if is_accepted(name, body.replace(old, new))] == []


@pytest.mark.parametrize("name", exercises.EXERCISES)
def test_nothing_is_equal_at_the_two_points(name):
    """Guards: a constant that a submission could write as a number."""
    points = np.random.default_rng([0, STREAMS[0]])  # those of the grader
    first, second = (getattr(exercises, f"{name}_inputs")(points) for _ in range(2))
    for (path, a), (_, b) in zip(leaves(first), leaves(second), strict=True):
        assert not np.array_equal(a, b) or path == "n_head", path  # which a student reads in the cache
