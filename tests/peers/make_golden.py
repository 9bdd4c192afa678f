"""What transformers computes for tiny random models: logits, loss, every gradient, ten training steps.

    python tests/peers/make_golden.py          writes tests/core/golden/gpt2.safetensors and
    openai-gpt.safetensors

so that tests/core/test_model.py can hold tinygpt to them where torch is not installed. test_transformers.py
computes the same afresh. GPT-2 has pre-norm (Radford et al. 2019), openai-gpt post-norm (2018).
"""

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

GOLDEN = Path(__file__).resolve().parents[1] / "core" / "golden"
SIZES = {"vocab_size": 19, "n_positions": 12, "n_embd": 12, "n_layer": 2, "n_head": 2}
STEPS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "grad_clip": 1.0}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def build(kind: str, sizes: dict, seed: int):
    """A model in float64 with random weights that float32 holds exactly: deviation 0.3, gains about 1."""
    if kind == "gpt2":
        config = transformers.GPT2Config(**sizes, **NO_DROPOUT, attn_implementation="eager")
        model = transformers.GPT2LMHeadModel(config)
    else:
        model = transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**sizes, **NO_DROPOUT))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = ".ln_" in name and name.endswith("weight")
            p.copy_(gain + 0.3 * torch.randn(p.shape, generator=generator))
    return model.double().eval()


def our_name(name: str) -> str:
    """tinygpt's name, which is GPT-2's without its prefix."""
    name = name.removeprefix("transformer.")
    return name.replace("tokens_embed", "wte").replace("positions_embed", "wpe")


def parameters(model) -> dict[str, torch.Tensor]:
    """Every parameter once: the tied head is the token table."""
    return {our_name(name): p for name, p in model.named_parameters()}


def batch(ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())


def loss_of(model, ids: np.ndarray, weights: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the weighted sum of the negative log-likelihoods, in float64."""
    x, y = batch(ids)
    logits = model(x).logits
    nll = torch.nn.functional.cross_entropy(logits.double().transpose(1, 2), y, reduction="none")
    return logits, (nll * torch.from_numpy(weights)).sum()


def reference(kind: str, sizes: dict, seed: int = 0, dtype=torch.float64) -> dict[str, np.ndarray]:
    """Inputs and what transformers makes of them, as named arrays; gradients are `grad.NAME`, and so on."""
    rng, T = np.random.default_rng(seed), sizes["n_positions"]
    model = build(kind, sizes, seed).to(dtype)
    ids = rng.integers(sizes["vocab_size"], size=(11, 3, T + 1))  # a batch to differentiate, ten to train on
    weights = rng.random((3, T)) * (rng.random((3, T)) < 0.8)  # some are masked
    found = {f"weight.{n}": p.detach().numpy().copy() for n, p in parameters(model).items()}
    logits, loss = loss_of(model, ids[0], weights)
    loss.backward()
    found |= {f"grad.{n}": p.grad.numpy().copy() for n, p in parameters(model).items()}
    losses, after = train(model, ids[1:])
    found |= {f"after.{n}": p for n, p in after.items()}
    found |= {"logits": logits.detach().numpy(), "loss": np.array(loss.item()), "losses": losses}
    return found | {"ids": ids, "weights": weights}


def train(model, batches: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """nanoGPT's optimizer, one batch a step: the losses, and the weights at the end."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": STEPS["weight_decay"]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    betas = STEPS["beta1"], STEPS["beta2"]
    optimizer, losses = torch.optim.AdamW(groups, lr=STEPS["lr"], betas=betas, eps=STEPS["eps"]), []
    for ids in batches:
        mean = np.full((ids.shape[0], ids.shape[1] - 1), 1 / (ids.shape[0] * (ids.shape[1] - 1)))
        _, loss = loss_of(model, ids, mean)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), STEPS["grad_clip"])
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses), {n: p.detach().numpy().copy() for n, p in parameters(model).items()}


if __name__ == "__main__":
    for kind in ("gpt2", "openai-gpt"):
        arrays = reference(kind, SIZES)
        single = {n: a.astype(np.float32) for n, a in arrays.items() if n.startswith(("weight.", "after."))}
        single["ids"] = arrays["ids"].astype(np.uint8)
        made_by = {"torch": torch.__version__, "transformers": transformers.__version__}
        facts = {"sizes": json.dumps(SIZES), "steps": json.dumps(STEPS)}
        save_file(arrays | single, GOLDEN / f"{kind}.safetensors", facts | made_by)
