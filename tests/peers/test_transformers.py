"""Logits, loss, every gradient and ten training steps, against transformers with the same random weights.

What tests/core/test_model.py has in store, computed afresh with the installed versions, at odd and least
sizes.
"""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from make_golden import STEPS, reference
from test_model import hold_to

SIZES = [
    {"vocab_size": 101, "n_positions": 33, "n_embd": 40, "n_layer": 3, "n_head": 5},
    {"vocab_size": 7, "n_positions": 1, "n_embd": 6, "n_layer": 1, "n_head": 6},  # T = 1 and D = 1
]


@pytest.mark.parametrize("kind", ["gpt2", "openai-gpt"])
@pytest.mark.parametrize("sizes", SIZES, ids=["odd", "least"])
@pytest.mark.parametrize("dtype, tol", [("float64", 1e-8), ("float32", 1e-4)])
def test_gpt_is_what_transformers_computes(ops, kind, sizes, dtype, tol):
    expected = reference(kind, sizes, seed=1, dtype=torch.float64)
    hold_to(expected, sizes, STEPS, kind == "openai-gpt", np.dtype(dtype), ops, tol)
