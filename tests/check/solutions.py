"""The project's own solution of each exercise, for the tests and for mutants.py."""
import numpy as np

from tinygpt.check import exercises
from tinygpt.core import ops
from tinygpt.core.config import GPTConfig
from tinygpt.core.model import GPT
from tinygpt.stages import rlhf
from tinygpt.stages.dpo import dpo


def solution(name):
    return getattr(ops, f"{name}_backward", None) or exercises.RIGHT.get(name) or globals()[f"_{name}"]


def _block(dout, cache):
    config = GPTConfig(2, block_size=1, n_layer=1, n_head=2, n_embd=dout.shape[-1])
    model = GPT(config, dtype=np.float64, ops=ops)
    grads = {name: np.zeros(w.shape) for name, w in model.params.items()}
    parts = ["ln_1", "attn.c_attn", None, "attn.c_proj", "ln_2", "mlp.c_fc", None, "mlp.c_proj"]
    caches = [(f"h.0.{part}", c) if part else c for part, c in zip(parts, cache, strict=True)]
    caches[3], caches[7] = (caches[3], None), (caches[7], None)  # no dropout
    dx = model.block_backward(dout, (*caches[:3], None, None, *caches[3:]), grads)  # places: None
    return dx, {p: (grads[f"h.0.{p}.weight"], grads[f"h.0.{p}.bias"]) for p in filter(None, parts)}


def _lora(dout, cache):
    x, w, A, B, low, s = cache
    dlow, dB, _ = ops.linear_backward(s * dout, (low, B), db=False)
    dx, dA, _ = ops.linear_backward(dlow, (x, A), db=False)
    dx, _, _ = ops.linear_backward(dout, (x, w), dw=False, db=False, add=dx)
    return dx, dA, dB


def _policy_gradient(dloss, cache):
    logp, ids, advantages = cache
    nll, c_nll = ops.cross_entropy_forward(logp, ids)
    _, d = rlhf.policy_gradient(-nll, np.ones(ids.shape), advantages[:, None])
    return ops.cross_entropy_backward(-dloss * d, c_nll)


def _rloo(dloss, rewards):
    return -dloss * rlhf.leave_one_out(rewards) / rewards.size


def _dpo(dloss, cache):
    _, dchosen, drejected = dpo(*cache)
    return dloss * dchosen, dloss * drejected
