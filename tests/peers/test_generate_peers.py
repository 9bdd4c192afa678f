"""Generation against transformers: its `generate` and its logits processors, and GPT-2 as the hub has it.

TINYGPT_FULL=1 builds the 124M model in full; the default is as wide a vocabulary with two small layers.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tinygpt.core import kernels, ops
from tinygpt.core.config import GPTConfig
from tinygpt.core.generate import generate
from tinygpt.core.model import GPT

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
st = pytest.importorskip("safetensors.torch")

GPT2 = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "gpt2"
FULL = "TINYGPT_FULL" in os.environ
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3], [40, 41], [12, 60, 33, 2, 2]]


def peer(config: GPTConfig) -> "transformers.GPT2LMHeadModel":
    """transformers' model with random weights, large enough that every token matters and texts wander."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
            n_layer=config.n_layer, n_head=config.n_head,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = "ln_" in name and name.endswith("weight")
            p.copy_(gain + torch.randn_like(p) * (0.6 if p.ndim == 2 else 0.2))
    return model


@pytest.mark.parametrize("backend", kernels.available())
def test_greedy_tokens_of_a_padded_batch(backend):
    """Guards: a cache, padding or position that differs from the reference's, from 7 tokens to all 64."""
    config = GPTConfig(vocab_size=65, block_size=64, n_layer=3, n_head=4, n_embd=32)
    theirs, ours = peer(config), GPT(config, ops=kernels.backend(backend))
    for name, p in ours.params.items():
        p[:] = theirs.state_dict()["transformer." + name].numpy()
    T = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (T - len(p)) + p for p in PROMPTS])
    seen = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in PROMPTS])
    settings = {"do_sample": False, "max_new_tokens": 64 - T, "pad_token_id": 0, "eos_token_id": None}
    expected = theirs.generate(ids, attention_mask=seen, **settings)[:, T:]
    new = generate(ours, PROMPTS, 64 - T, temperature=0)
    assert [tokens.tolist() for tokens in new] == expected.tolist()
    assert all(len(set(tokens)) > 9 for tokens in expected.tolist())  # a stuck model would prove nothing


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.0, 50, 1.0), (1.0, 0, 0.9), (1.3, 40, 0.5)]
)
def test_probabilities_are_the_logits_processors(temperature, top_k, top_p):
    """Guards: an order of temperature, top-k and top-p other than the field's, or one token more or fewer."""
    logits = np.random.default_rng(0).normal(0, 2, (8, 5000))
    chain = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(temperature)])
    chain += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    chain += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    expected = chain(None, torch.tensor(logits)).softmax(-1).numpy()
    got = ops.probabilities(logits, temperature, top_k, top_p)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A folder as the hub has it: names without prefix, buffers of masks, no lm_head."""
    if not GPT2.is_dir():
        pytest.skip("needs ../shared/data/gpt2")
    folder = tmp_path_factory.mktemp("hub") / "gpt2"
    config = GPTConfig() if FULL else GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=32)
    model = peer(config)
    tensors = {name.removeprefix("transformer."): t for name, t in model.state_dict().items()}
    del tensors["lm_head.weight"]
    mask = torch.ones(config.block_size, config.block_size).tril()[None, None]
    tensors |= {f"h.{layer}.attn.bias": mask.clone() for layer in range(config.n_layer)}
    shutil.copytree(GPT2, folder)
    st.save_file(tensors, folder / "model.safetensors")
    fields = {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": config.block_size,
        "n_embd": config.n_embd, "n_head": config.n_head, "n_layer": config.n_layer,
        "n_positions": config.block_size, "resid_pdrop": 0.1, "vocab_size": 50257,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


def test_gpt2_as_downloaded(hub):
    """Guards the user's first command: `tinygpt generate gpt2-folder` writes what transformers writes."""
    pytest.importorskip("tinygpt.folders.checkpoint")
    from tinygpt.shell.cli import main

    prompt = "Hello, my name is Zoë and 東京"
    args = ["generate", str(hub), "--prompt", prompt, "--max-new-tokens", "20", "--temperature", "0"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    theirs = transformers.GPT2LMHeadModel.from_pretrained(hub).eval()
    tokenizer = transformers.GPT2TokenizerFast(str(hub / "vocab.json"), str(hub / "merges.txt"))
    ids = tokenizer(prompt, return_tensors="pt")
    new = theirs.generate(**ids, do_sample=False, max_new_tokens=20, pad_token_id=50256)
    assert result.stdout == tokenizer.decode(new[0], skip_special_tokens=True) + "\n"
