"""Adapters beside PEFT: the same base, adapter, data and order give the same logits, losses and folders."""

import json
import os

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
from transformers import AutoModelForCausalLM

from tinygpt.core import train
from tinygpt.core.config import GPTConfig
from tinygpt.core.generate import generate
from tinygpt.core.model import GPT
from tinygpt.core.optim import AdamW
from tinygpt.core.train import Batch
from tinygpt.errors import UserError
from tinygpt.folders import adapters, checkpoint
from tinygpt.stages import variants
from tinygpt.stages.adapter import AdapterConfig
from tinygpt.text.tokenizer import BPETokenizer

TOKENIZER = BPETokenizer.train("the cat sat on the mat", 262)
CONFIG = GPTConfig(262, block_size=48, n_layer=3, n_head=3, n_embd=24)
LORA = {"r": 3, "lora_alpha": 7, "fan_in_fan_out": True}
THEIRS = {
    "lora": lambda: peft.LoraConfig(target_modules=["c_attn", "c_proj", "c_fc"], **LORA),
    "some layers": lambda: peft.LoraConfig(target_modules=["attn.c_proj"], layers_to_transform=[1], **LORA),
    "ptuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=7),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=5),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=5),
    "projected prefix": lambda: peft.PrefixTuningConfig(
        num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=7
    ),
}
OURS = {
    "lora": AdapterConfig("lora", rank=3, alpha=7.0),
    "some layers": AdapterConfig("lora", rank=3, alpha=7.0, targets=("h.1.attn.c_proj",)),
    "ptuning": AdapterConfig("ptuning", num_virtual_tokens=5, hidden=7),
    "prompt": AdapterConfig("prompt", num_virtual_tokens=5),
    "prefix": AdapterConfig("prefix", num_virtual_tokens=5),
    "projected prefix": AdapterConfig("prefix", num_virtual_tokens=5, hidden=7),
}


@pytest.fixture
def base(tmp_path):
    model = GPT(CONFIG, np.random.default_rng(0))
    model.flat *= 2  # at 4 rounding grows to 6e-4 of logits of 20, in torch as here
    checkpoint.save(tmp_path / "base", model, TOKENIZER)
    return tmp_path / "base"


@pytest.fixture(params=THEIRS)
def pair(request, base):
    """PEFT's model with a new adapter, ours with the same numbers in it."""
    torch.manual_seed(0)
    config = THEIRS[request.param]()
    config.task_type = "CAUSAL_LM"
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model, _ = checkpoint.load(base)
    model = variants.create(model, OURS[request.param], np.random.default_rng(0))
    params = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    taken = set()
    for name, p in model.adapter.params.items():
        found = next(n for n in params if n.replace(".default", "").endswith((f".{name}", f".{name}.weight")))
        if name.endswith("lora_B"):
            torch.nn.init.normal_(params[found], std=0.2)
        value = params[found].detach().numpy()
        p[:] = value if "embedding" in name or name.endswith("lora_A") else value.T
        taken.add(found)
    assert taken == set(params)
    return theirs, model


def logits(theirs, ids):
    with torch.no_grad():
        found = theirs.eval()(input_ids=torch.tensor(ids)).logits.numpy()
    theirs.train()
    return found[:, -ids.shape[1] :]


def test_logits(pair, rng):
    theirs, model = pair
    ids = rng.integers(0, 262, (2, 11))
    np.testing.assert_allclose(model.forward(ids)[0], logits(theirs, ids), atol=1e-4)


def test_ten_steps(pair, rng):
    theirs, model = pair
    optimizer = AdamW(model, beta2=0.95, weight_decay=0.01, grad_clip=1.0)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    other = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    theirs.eval()  # no dropout anywhere
    ours, expected = [], []
    for _ in range(10):
        ids = rng.integers(0, 262, (3, 12)).astype(np.int32)
        weights = np.full((3, 11), 1 / 33, np.float32)
        batch = Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), weights)
        ours.append(train.gradients(optimizer)([batch]))
        optimizer.step(1e-2)
        found = theirs(input_ids=torch.tensor(ids[:, :-1]).long()).logits[:, -11:]
        loss = torch.nn.functional.cross_entropy(
            found.reshape(-1, 262), torch.tensor(ids[:, 1:]).long().flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        other.step()
        other.zero_grad()
        expected.append(loss.item())
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) < 1e-3
    assert abs(ours[0] - ours[9]) > 0.01  # it moved


def test_peft_loads_what_we_save(pair, base, tmp_path, rng):
    _, model = pair
    adapters.save(tmp_path / "a", model, TOKENIZER, str(base))
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "a")
    ids = rng.integers(0, 262, (2, 11))
    np.testing.assert_allclose(model.forward(ids)[0], logits(theirs, ids), atol=1e-4)
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")  # finds the base by itself
    np.testing.assert_allclose(model.forward(ids)[0], logits(auto, ids), atol=1e-4)


def test_we_load_what_peft_saves(pair, base, tmp_path, rng):
    theirs, _ = pair
    theirs.save_pretrained(tmp_path / "a")
    model, _ = adapters.load_model(base, tmp_path / "a")
    ids = rng.integers(0, 262, (2, 11))
    np.testing.assert_allclose(model.forward(ids)[0], logits(theirs, ids), atol=1e-4)


MAPS = ["c_attn", "c_proj", "c_fc"]
OPTIONS = {  # what a LoraConfig can say, and whether it is loaded here; else it is refused, by this name
    "target_modules": [("all-linear", True), (r".*c_attn", True), (["c_attn", "q_proj"], True),
                       (r".*\.h\.[02]\..*c_(attn|fc)", True), (["transformer.h.1.attn.c_attn"], True),
                       (["c_attn", "wte"], False), (["c_attn", "lm_head"], False), (["mlp.c_proj"], True)],
    "exclude_modules": [(["mlp.c_proj"], True), (r".*\.h\.1\..*", True), (["h.0.attn.c_attn"], True),
                        (["h.0"], True)],
    "layers_to_transform": [(1, True), ([0, 2], True)],
    "use_rslora": [(True, True)],
    "init_lora_weights": [("gaussian", True), ("orthogonal", True), (False, True), ("pissa", False),
                          ("olora", False), ("pissa_niter_4", False)],
    "rank_pattern": [({"c_fc": 5}, False)],
    "alpha_pattern": [({"c_fc": 5}, False)],
    "bias": [("all", False), ("lora_only", False)],
    "lora_bias": [(True, False)],
    "use_dora": [(True, False)],
    "modules_to_save": [(["wpe"], False)],
    "trainable_token_indices": [([3, 5], False)],
    "alora_invocation_tokens": [([3, 5], False)],
    "lora_dropout": [(0.5, True)],
    "fan_in_fan_out": [(False, True)],
    "lora_alpha": [(16, True), (0.5, True)],
    "r": [(1, True), (24, True)],
}


@pytest.mark.parametrize(("name", "value", "loads"), [
    (name, value, loads) for name, rows in OPTIONS.items() for value, loads in rows
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_every_option_of_a_lora(base, tmp_path, rng, name, value, loads):
    """Guards: a config believed more than the tensors; an option that is read over (PEFT 2208)."""
    usual = {"task_type": "CAUSAL_LM", "target_modules": MAPS, **LORA, "r": 4}
    config = peft.LoraConfig(**usual | {name: value})
    torch.manual_seed(0)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for n, p in theirs.named_parameters():
        if "lora_" in n:
            torch.nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path / "a")
    if not loads:
        words = name if name != "target_modules" else "no part of a LoRA|belongs nowhere|no linear map"
        with pytest.raises(UserError, match=words):
            adapters.load_model(base, tmp_path / "a")
        return
    model, _ = adapters.load_model(base, tmp_path / "a")
    ids = rng.integers(0, 262, (2, 11))
    expected = logits(theirs, ids)
    np.testing.assert_allclose(model.forward(ids)[0], expected, atol=2e-3 * np.abs(expected).max())
    adapters.save(tmp_path / "b", model, TOKENIZER, str(base))
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "b")
    np.testing.assert_allclose(logits(again, ids), expected, atol=2e-3 * np.abs(expected).max())


def test_the_encoder_goes_on_in_peft(pair, base, tmp_path):
    """encoder.safetensors has the names and layout of PEFT's own prompt encoder."""
    from safetensors.torch import load_file

    theirs, model = pair
    if not model.adapter.layers:
        return
    adapters.save(tmp_path / "a", model, TOKENIZER, str(base))
    theirs.prompt_encoder["default"].load_state_dict(load_file(tmp_path / "a" / "encoder.safetensors"))


def test_merged_weights(pair, rng):
    theirs, model = pair
    if model.adapter.config.kind != "lora":
        return
    ours, merged = model.merge(), theirs.merge_and_unload().state_dict()
    for name, p in ours.params.items():
        np.testing.assert_allclose(p, merged[f"transformer.{name}"], atol=1e-6, err_msg=name)


def test_greedy_generation(pair, rng):
    """Our cache against PEFT's forward without a cache: with a prompt or a prefix, the cached `generate` of
    PEFT 0.21.2 gives another text than PEFT's own forward, or raises an IndexError."""
    theirs, model = pair
    ids = rng.integers(0, 262, (1, 6))
    answer = generate(model, list(ids), 10, temperature=0)[0]
    expected = ids
    for _ in range(10):
        best = logits(theirs, expected)[:, -1:].argmax(-1)
        expected = np.concatenate([expected, best], 1)
    assert answer.tolist() == expected[0, 6:].tolist()


def test_kaiming_and_shares(base):
    """A's distribution is PEFT's; the config names the base, as the hub's do."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["mlp.c_fc"], **LORA)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    a = np.concatenate([p.detach().numpy().ravel() for n, p in theirs.named_parameters() if "lora_A" in n])
    model, _ = checkpoint.load(base)
    model = variants.create(
        model, AdapterConfig("lora", 3, targets=("mlp.c_fc",)), np.random.default_rng(0)
    )
    b = np.concatenate([p.ravel() for n, p in model.adapter.params.items() if "lora_A" in n])
    assert np.abs(b).max() <= 24**-0.5 and abs(a.std() / b.std() - 1) < 0.15
    adapters.save(base.parent / "a", model, TOKENIZER, str(base))
    written = json.loads((base.parent / "a" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(base) and written["r"] == 3
