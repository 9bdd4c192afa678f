"""Adapters: what they compute, that the base stays as it is, merging, PEFT's folder; then the command line.

tests/peers/test_adapters_peers.py holds the same to PEFT.
"""

import dataclasses
import hashlib
import json
import math
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tinygpt.check.targets import ADAPTERS
from tinygpt.core import generate, train
from tinygpt.core.config import PROJECTIONS, GPTConfig
from tinygpt.core.model import GPT
from tinygpt.core.train import Batch, TrainConfig
from tinygpt.errors import UserError
from tinygpt.files import tensorfile
from tinygpt.folders import adapters, checkpoint, runs
from tinygpt.shell.cli import main
from tinygpt.stages import answers as evaluate
from tinygpt.stages import lora, sft, variants
from tinygpt.stages.adapter import AdapterConfig, fingerprint
from tinygpt.stages.pretrain import Pretrain
from tinygpt.stages.prompts import nearest
from tinygpt.text.tokenizer import BPETokenizer, CharTokenizer

CONFIG = GPTConfig(vocab_size=13, block_size=16, n_layer=3, n_head=2, n_embd=16)
KINDS = {
    "lora": AdapterConfig("lora", rank=2, alpha=6.0),
    "ptuning": AdapterConfig("ptuning", num_virtual_tokens=3, hidden=5),
    "prompt": AdapterConfig("prompt", num_virtual_tokens=3),
    "prefix": AdapterConfig("prefix", num_virtual_tokens=3),
    "projected prefix": AdapterConfig("prefix", num_virtual_tokens=3, hidden=5),
}
TOKENIZER = CharTokenizer.train("abcdefghijklm")


def make(config: AdapterConfig | None = None, ops=None, dtype=np.float32) -> GPT:
    """A model whose attention matters, with an adapter that changes what it says."""
    model = GPT(CONFIG, np.random.default_rng(0), dtype, ops)
    model.flat *= 1.9
    if config:
        model = variants.create(model, config, np.random.default_rng(1))
        for name, p in model.adapter.params.items():
            if name.endswith("lora_B"):
                p[:] = np.random.default_rng(2).standard_normal(p.shape) * 0.3
    return model


@pytest.fixture(params=KINDS, ids=str)
def config(request) -> AdapterConfig:
    return KINDS[request.param]


def logits(model: GPT, ids, **more):
    return model.forward(ids, **more)[0].copy()


# --- what they compute --------------------------------------------------------------------------------------


def test_lora_is_another_weight(ops, rng):
    """Guards: a scale that is alpha, or 1 (PEFT 2131); a branch at the wrong place; one left out."""
    model, ids = make(KINDS["lora"], ops, np.float64), rng.integers(0, 13, (2, 9))
    plain = make(None, ops, np.float64)
    for name in [n[: -len(".lora_A")] for n in model.adapter.params if n.endswith("lora_A")]:
        a, b = (model.adapter.params[f"{name}.lora_{side}"] for side in "AB")
        plain.params[f"{name}.weight"][:] += 6 / 2 * a.T @ b
    assert len(model.adapter.params) == 2 * 4 * CONFIG.n_layer
    np.testing.assert_allclose(logits(model, ids), logits(plain, ids), rtol=1e-9, atol=1e-12)
    assert np.abs(logits(model, ids) - logits(make(None, ops, np.float64), ids)).max() > 0.1


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_vocabulary_prompt_is_a_text_before_the_text(ops, rng, kind):
    """Guards: a prompt without its positions, text that does not move behind it, keys of the wrong layer."""
    model, ids = make(KINDS[kind], ops, np.float64), rng.integers(0, 13, (2, 9))
    words = np.random.default_rng(1).integers(13, size=(1, 3))
    longer = np.concatenate([np.repeat(words, 2, axis=0), ids], axis=1)
    np.testing.assert_allclose(
        logits(model, ids), logits(make(None, ops, np.float64), longer)[:, 3:], rtol=1e-8
    )


def test_packed_rows_and_padding_change_nothing(config, ops, rng):
    """TRL 1230: every document of a row sees the prompt, and none another document."""
    model, a, b = make(config, ops, np.float64), *rng.integers(0, 13, (2, 1, 5))
    row = np.concatenate([a, b[:, :4]], axis=1)
    start = np.array([[0] * 5 + [5] * 4], np.int32)
    packed = logits(model, row, start=start, positions=np.arange(9) - start)
    np.testing.assert_allclose(packed[:, :5], logits(model, a), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(packed[:, 5:], logits(model, b[:, :4]), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_gradient_by_differences(ops, name):
    from tinygpt.check.gradcheck import assert_gradients
    from tinygpt.check.targets import model_pair

    pair = model_pair(ops, np.random.default_rng(3), "post-norm" in name, ADAPTERS[name])
    assert_gradients(*pair, rtol=1e-7, small=4)


def test_no_gradient_of_the_base_is_computed(monkeypatch, rng):
    """Guards: a LoRA as slow as full training, because frozen weights' gradients are made and thrown away."""
    from tinygpt.core import ops

    queries, backward = [], ops.linear_backward

    def spy(dout, cache, dw=None, db=None, *more, **options):
        queries.append((cache[1].shape, dw is not False, db is not False))
        return backward(dout, cache, dw, db, *more, **options)

    monkeypatch.setattr(ops, "linear_backward", spy)
    model = make(dataclasses.replace(KINDS["lora"], targets=("h.1.mlp.c_fc", "h.2.attn.c_attn")), ops)
    model.loss(*rng.integers(0, 13, (2, 2, 9)), None, model.adapter.gradients()[1])
    assert not any(db for _, _, db in queries)
    assert [shape for shape, dw, _ in queries if dw] == [(2, 48), (16, 2), (2, 64), (16, 2)]
    assert len(queries) == 1 + 4 + 2 + 4 + 2  # head; block 2 and a branch; block 1 and a branch; no more


def test_generation_is_the_forward_token_by_token(config, ops, rng):
    """Guards: a cache without its prompt, or with two; positions that forget it; a record of another step."""
    model = make(config, ops)
    prompts = [rng.integers(0, 13, n).tolist() for n in (4, 1, 6)]
    for prompt, new in zip(prompts, generate.generate(model, prompts, 5, temperature=0), strict=True):
        text = list(prompt)
        for results in new:
            assert results == logits(model, np.array([text]))[0, -1].argmax()
            text.append(results)
    long = generate.generate(model, prompts, 30, temperature=0)  # beyond the context: read anew
    assert [len(ids) for ids in long] == [30] * 3


def test_there_are_fewer_positions_beside_a_prompt(config):
    """Guards: text that runs over the end of the position table."""
    model = make(config)
    length = 16 - config.prompt_length
    assert model.context == length
    logits(model, np.zeros((1, length), int))
    with pytest.raises(UserError, match=f"{length + 1} tokens is longer"):
        logits(model, np.zeros((1, length + 1), int))
    with pytest.raises(UserError, match="num_virtual_tokens is 16: the model has 16"):
        variants.create(make(), AdapterConfig("prompt", num_virtual_tokens=16), np.random.default_rng(0))


# --- training -----------------------------------------------------------------------------------------------


def batch(rng, shape=(3, 8)) -> Batch:
    start = np.minimum(rng.integers(0, 4, shape), np.arange(shape[1])).astype(np.int32)
    return Batch(
        *rng.integers(0, 13, (2, *shape)), rng.random(shape).astype(np.float32), start, start * 0 + 2
    )


def test_training_leaves_the_base_as_it_was(config, rng):
    """Claim 11: the same bytes, and without the adapter the same logits; yet the loss falls."""
    model, ids = make(config), rng.integers(0, 13, (2, 9))
    before, without = hashlib.sha256(model.flat).hexdigest(), logits(make(), ids)
    optimizer, todo, losses = TrainConfig(weight_decay=0.0).optimizer(model), batch(rng), []
    for _ in range(30):
        losses.append(train.gradients(optimizer)([todo]))
        optimizer.step(1e-2)
    assert losses[-1] < 0.9 * losses[0]
    assert hashlib.sha256(model.base.flat).hexdigest() == before == fingerprint(model)
    np.testing.assert_array_equal(logits(model.base, ids), without)
    assert np.abs(logits(model, ids) - without).max() > 1e-2


def test_dropout_is_for_training_alone(rng):
    """Guards: dropout that evaluation has too, or that training loses since the model's own is 0."""
    model, ids = make(dataclasses.replace(KINDS["lora"], dropout=0.5)), rng.integers(0, 13, (2, 9))
    np.testing.assert_array_equal(logits(model, ids), logits(make(KINDS["lora"]), ids))
    optimizer, todo = TrainConfig().optimizer(model), batch(rng)
    a, b, c = (train.gradients(optimizer)([todo], np.random.default_rng(seed)) for seed in (1, 2, 1))
    assert a == c != b


def test_a_new_lora_changes_nothing_and_a_prompt_is_words(rng):
    """Guards: B that is not zero at the start; A outside Kaiming's bound; a prompt of noise."""
    model = make()
    lora = variants.create(model, KINDS["lora"], rng)
    for name, p in lora.adapter.params.items():
        if name.endswith("lora_B"):
            assert not p.any()
        else:
            assert 0.5 < np.abs(p).max() * math.sqrt(p.shape[1]) <= 1
    ids = rng.integers(0, 13, (2, 9))
    np.testing.assert_array_equal(logits(lora, ids), logits(model, ids))
    table = model.params["wte.weight"]
    prompt = variants.create(model, KINDS["prompt"], rng)
    near = nearest(prompt, 2)
    assert near.shape == (3, 2)
    np.testing.assert_array_equal(table[near[:, 0]], prompt.adapter.params["embedding.weight"])
    noise = variants.create(model, dataclasses.replace(KINDS["prompt"], init="random"), rng)
    assert noise.adapter.params["embedding.weight"].std() == pytest.approx(table.std(), rel=0.5)


# --- merging ------------------------------------------------------------------------------------------------


def test_merging_makes_a_new_model(ops, rng):
    """Claim 11: within 1e-5; and the base stays as it was."""
    model, ids = make(KINDS["lora"], ops), rng.integers(0, 13, (2, 9))
    model.flat /= 5  # as after training: large weights would enlarge the rounding too
    model.adapter.flat *= 0.5
    with_adapter, base = logits(model, ids), model.flat.copy()
    merged = model.merge()
    np.testing.assert_allclose(logits(merged, ids), with_adapter, atol=1e-5)
    assert np.abs(merged.flat - base).max() > 0.03 and merged.trained is merged
    np.testing.assert_array_equal(model.flat, base)
    np.testing.assert_array_equal(logits(model, ids), with_adapter)


def test_a_prompt_cannot_be_merged():
    with pytest.raises(UserError, match="prompt cannot be merged"):
        make(KINDS["prompt"]).merge()


def test_many_adapters_beside_one_base(rng):
    """Guards: an adapter that leaves something of itself in the base, or in another adapter."""
    base, ids = make(), rng.integers(0, 13, (2, 9))
    mark, alone = fingerprint(base), logits(base, ids)
    views = [variants.create(base, config, np.random.default_rng(1)) for config in KINDS.values()]
    before = [logits(view, ids) for view in views]
    todo = batch(rng)
    for view in views:  # each learns while the others are there
        optimizer = TrainConfig().optimizer(view)
        train.gradients(optimizer)([todo])
        optimizer.step(1e-2)
    after = [logits(view, ids) for view in views]
    assert fingerprint(base) == mark
    np.testing.assert_array_equal(logits(base, ids), alone)
    for config, first, last in zip(KINDS.values(), before, after, strict=True):
        view = variants.create(make(), config, np.random.default_rng(1))
        np.testing.assert_array_equal(logits(view, ids), first)
        optimizer = TrainConfig().optimizer(view)
        train.gradients(optimizer)([todo])
        optimizer.step(1e-2)
        np.testing.assert_array_equal(logits(view, ids), last)


def test_a_restart_keeps_the_model_and_forgets_the_moments(rng):
    """ReLoRA: after a merge the model computes what it did, with branches that are new."""
    config = AdapterConfig("lora", rank=2, targets=("mlp.c_fc",), full=True)
    model, ids = make(config), rng.integers(0, 13, (2, 9))
    first, mark = model.base, fingerprint(model)
    optimizer = TrainConfig(weight_decay=0.0).optimizer(model)
    for _ in range(3):
        train.gradients(optimizer)([batch(rng)])
        optimizer.step(1e-2)
    before, base, old = logits(model, ids), model.flat.copy(), model.adapter.flat.copy()
    lora.restart(optimizer, rng)
    np.testing.assert_allclose(logits(model, ids), before, atol=1e-5)
    assert (model.flat != base).mean() > 0.2 and fingerprint(first) == mark
    assert not model.adapter.params["h.0.mlp.c_fc.lora_B"].any()
    a = model.adapter.params["h.0.mlp.c_fc.lora_A"]
    assert not np.isin(a, old).any()
    kept = {n for n in optimizer.grads if "lora" not in n}
    views, end = {}, 0
    for name, g in optimizer.grads.items():
        views[name], end = optimizer.m[end : end + g.size], end + g.size
    assert all(views[n].any() == (n in kept) for n in views)
    train.gradients(optimizer)([batch(rng)])  # and it goes on
    assert optimizer.grads["h.0.mlp.c_fc.lora_B"].any()


def test_the_rate_climbs_anew_after_a_merge():
    config = TrainConfig(max_iters=100, learning_rate=1.0, min_lr=1.0, warmup_iters=0, merge_every=40)
    rates = [config.learning_rate_at(n) for n in range(100)]
    assert rates[:40] == [1] * 40
    assert rates[40:45] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert rates[80:85] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])


# --- the folder ---------------------------------------------------------------------------------------------


def same(a, b) -> bool:
    return a.params.keys() == b.params.keys() and all(
        np.array_equal(p, b.params[n]) for n, p in a.params.items()
    )


def test_what_is_saved_comes_back(config, tmp_path):
    """PEFT 1247, 1607: the encoder is kept, not only the prompt that it gives."""
    model = make(config)
    adapters.save(tmp_path, model, TOKENIZER, "base")
    results = adapters.load(tmp_path, model.base)
    loaded = results.adapter.config
    assert same(results.adapter, model.adapter) and loaded.kind == config.kind
    assert (loaded.alpha, loaded.rank, loaded.hidden) == (
        (config.alpha, config.rank, 0) if config.kind == "lora" else (8.0, 8, config.hidden)
    )
    assert (tmp_path / "encoder.safetensors").exists() == bool(config.hidden)
    tensors, metadata = tensorfile.tensors(tmp_path / adapters.WEIGHTS)
    assert metadata == {"format": "pt", "base_sha256": fingerprint(model)}
    if config.hidden:
        (tmp_path / "encoder.safetensors").unlink()  # as PEFT has it: the prompt alone
        baked, ids = adapters.load(tmp_path, model.base), np.arange(6)[None]
        assert baked.adapter.config.hidden == 0
        np.testing.assert_allclose(logits(baked, ids), logits(model, ids), atol=1e-5)


def rewrite(folder: Path, change) -> None:
    tensors, metadata = tensorfile.tensors(folder / adapters.WEIGHTS)
    arrays = {}
    for name, tensor in tensors.items():
        arrays[name] = np.empty(tensor.shape, np.float32)
        tensor.read(arrays[name])
    change(arrays)
    tensorfile.write(folder / adapters.WEIGHTS, arrays, {})


def renamed(arrays):
    for name in list(arrays):
        arrays[name.replace("h.0", "layers.0")] = arrays.pop(name)


def beside(arrays):
    arrays["base_model.model.transformer.h.9.attn.c_attn.lora_A.weight"] = np.zeros((2, 16), np.float32)


def wide(arrays):
    name = next(iter(arrays))
    arrays[name] = np.zeros((2, 5), np.float32)


@pytest.mark.parametrize("change, says", [
    (lambda a: a.clear(), "would do nothing"),
    (renamed, "has no tensor for h.0"),
    (lambda a: a.popitem(), "has no tensor for"),
    (lambda a: a.update(extra=np.zeros(2)), "no part of a LoRA"),
    (wide, "it is for another model"),
    (beside, "belongs nowhere"),
])  # fmt: skip
def test_what_matches_nothing_is_an_error(tmp_path, change, says):
    """PEFT 2115: an adapter whose tensors are not the model's is inert, and nobody is told."""
    model = make(KINDS["lora"])
    adapters.save(tmp_path, model, TOKENIZER, "base")
    rewrite(tmp_path, change)
    with pytest.raises(UserError, match=says):
        adapters.load(tmp_path, model.base)


@pytest.mark.parametrize("field, value, says", [
    ("peft_type", "IA3", "peft_type is 'IA3'"), ("use_dora", True, "use_dora is True"),
    ("rank_pattern", {"c_fc": 3}, "rank_pattern"), ("lora_alpha", "8", "'alpha' is '8'"),
    ("r", 0, "rank is 0"), ("target_modules", [], "'' is no linear map"),
    ("kasa_config", {"k": 1}, "kasa_config"),
    ("exclude_modules", ["h.0.mlp.c_fc"], "h.0.mlp.c_fc.lora_.. belongs nowhere"),
])  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(tmp_path, field, value, says):
    model = make(KINDS["lora"])
    adapters.save(tmp_path, model, TOKENIZER, "base")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=says):
        adapters.load(tmp_path, model.base)


@pytest.mark.parametrize("kind, field, value", [
    ("lora", "r", 20_000_000), ("lora", "r", 2**60), ("prompt", "num_virtual_tokens", 2**60),
    ("ptuning", "encoder_hidden_size", 10**8),
])  # fmt: skip
def test_a_hostile_number_takes_no_memory(tmp_path, kind, field, value):
    """Guards: arrays of the sizes in a config, made before these are compared with the tensors' own."""
    model = make(KINDS[kind])
    adapters.save(tmp_path, model, TOKENIZER, "base")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    tracemalloc.start()
    with pytest.raises(UserError, match="for another model|has 16 positions|more than 100,000,000,000"):
        adapters.load(tmp_path, model.base)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_a_wrong_base_is_refused(config, tmp_path):
    model = make(config)
    adapters.save(tmp_path, model, TOKENIZER, "base")
    model.flat[3] += 1e-3
    with pytest.raises(UserError, match="not trained beside the model in other"):
        adapters.load(tmp_path, model.base, "other")


def test_an_encoder_of_another_prompt_is_refused(tmp_path):
    model = make(KINDS["ptuning"])
    adapters.save(tmp_path, model, TOKENIZER, "base")
    rewrite(tmp_path, lambda a: a["prompt_embeddings"].__iadd__(0.01))
    with pytest.raises(UserError, match="one of them is old"):
        adapters.load(tmp_path, model.base)


@pytest.mark.parametrize("fields", [
    {"kind": "ia3"}, {"kind": "lora", "rank": 0}, {"kind": "lora", "alpha": math.nan},
    {"kind": "lora", "dropout": 1},
    {"kind": "prompt", "num_virtual_tokens": 0}, {"kind": "prompt", "init": "text"},
], ids=str)  # fmt: skip
def test_a_config_that_is_none_is_refused(fields):
    with pytest.raises(UserError, match=f"{list(fields)[-1]} is"):
        AdapterConfig(**fields)


# --- the command line ---------------------------------------------------------------------------------------


PAIRS = [{"prompt": f"{a}?", "completion": b} for a, b in zip("abcdefghijkl", "bcdefghijklm", strict=True)]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    text = "".join(map(chr, range(32, 127))) + "\n"
    tokenizer = BPETokenizer.train(text, 270)
    config = GPTConfig(tokenizer.vocab_size, 48, n_layer=2, n_head=2, n_embd=16)
    checkpoint.save(tmp_path / "base", GPT(config, np.random.default_rng(0)), tokenizer)
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS), encoding="utf-8")
    Path("text.txt").write_text("the cat sat on the mat.\n" * 60, encoding="utf-8")
    return tmp_path


def run(*args: str, status: int = 0):
    result = CliRunner().invoke(main, list(args))
    assert result.exit_code == status, (result.output, result.exception)
    return result


SHORT = ("--max-iters", "4", "--eval-interval", "2", "--warmup-iters", "0")
SFT = (
    "sft",
    "--init-from",
    "base",
    "--data",
    "pairs.jsonl",
    *SHORT,
    "--batch-size",
    "2",
    "--block-size",
    "32",
)


def tree(path: Path) -> dict:
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.parametrize("kind, more", [
    ("lora", ("--lora-rank", "2", "--lora-dropout", "0.1")), ("ptuning", ("--num-virtual-tokens", "4")),
    ("prompt", ("--num-virtual-tokens", "4")),
    ("prefix", ("--num-virtual-tokens", "4", "--encoder-hidden", "3")),
])  # fmt: skip
def test_tuning_an_adapter_from_end_to_end(folder, kind, more):
    """Guards: a copy of the base; a base that is written to; a command that does not know of adapters."""
    before = tree(folder / "base")
    result = run(*SFT, "--adapter", kind, *more, "--out", "tuned")
    assert (
        "trained (" in result.output and "chat" in result.output and "--adapter-folder tuned" in result.output
    )
    assert ("nearest" in result.output) == (kind in ("ptuning", "prompt"))
    assert tree(folder / "base") == before
    assert not {"model.safetensors", "config.json"} & set(tree(folder / "tuned"))
    text = run(
        "generate", "base", "--adapter-folder", "tuned", "--prompt", "a?", "--max-new-tokens", "5"
    ).output
    assert text.startswith("a?")
    chat = CliRunner().invoke(main, ["chat", "base", "--adapter-folder", "tuned"], input="a?\n")
    assert chat.exit_code == 0, chat.output
    again = run("generate", "tuned", status=2)
    assert "--adapter-folder tuned" in again.stderr and again.stderr.count("\n") == 1
    result = run(
        "merge", "base", "--adapter-folder", "tuned", "--out", "merged", status=0 if kind == "lora" else 2
    )
    if kind == "lora":
        model, tokenizer = adapters.load_model("base", "tuned")
        merged, _ = checkpoint.load("merged")
        ids = np.arange(9)[None]
        np.testing.assert_allclose(logits(merged, ids), logits(model, ids), atol=1e-5)
        assert tokenizer.chat_template  # tuned to instructions, though the base is not


@pytest.mark.parametrize("kind", ["lora", "ptuning", "prefix"])
def test_a_run_that_was_interrupted_goes_on_bit_for_bit(folder, kind):
    whole = *SFT, "--adapter", kind, *(() if kind == "lora" else ("--num-virtual-tokens", "4"))
    run(*whole, "--out", "whole")
    run(*whole, "--out", "cut")
    state = tree(folder / "cut")
    shutil.rmtree("cut")
    settings = checkpoint.read_run(folder / "whole", sft.Settings)[0]
    half = dataclasses.replace(settings, train=dataclasses.replace(settings.train, max_iters=4))
    start_ids = runs.begin(sft.SFT, Path("cut"), half)
    calls = []

    def stop(record):
        calls.append(record)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start_ids.train(**runs.saving(start_ids, stop))
    run("sft", "--resume", "cut")
    for name in (adapters.WEIGHTS, adapters.ENCODER):
        assert tree(folder / "cut").get(name) == state.get(name)


def test_resuming_needs_the_same_base(folder):
    run(*SFT, "--adapter", "lora", "--out", "tuned")
    model, tokenizer = checkpoint.load("base")
    model.flat[0] += 1
    checkpoint.save(folder / "base", model, tokenizer)
    assert "another model" in run("sft", "--resume", "tuned", status=2).stderr
    assert "not trained beside" in run("generate", "base", "--adapter-folder", "tuned", status=2).stderr


def test_training_goes_on_from_an_adapter(folder):
    run(*SFT, "--adapter", "ptuning", "--num-virtual-tokens", "4", "--encoder-hidden", "6", "--out", "first")
    run(*SFT, "--adapter-folder", "first", "--learning-rate", "1e-9", "--out", "second")
    model, _ = checkpoint.load("base")
    a, b = (adapters.load(name, model).adapter for name in ("first", "second"))
    assert b.config.hidden == 6
    np.testing.assert_allclose(a.flat, b.flat, atol=1e-6)


def test_an_adapter_does_not_replace_its_base(folder):
    before = tree(folder / "base")
    result = run(*SFT, "--adapter", "lora", "--out", "base", "--overwrite", status=2)
    assert "needs as it is" in result.stderr and tree(folder / "base") == before


def test_a_folder_has_one_or_the_other(folder):
    """Guards: a model's folder with the adapter of an older run beside it, which would be loaded."""
    run(*SFT, "--adapter", "ptuning", "--num-virtual-tokens", "4", "--out", "out")
    run(*SFT, "--adapter", "prompt", "--num-virtual-tokens", "4", "--out", "out", "--overwrite")
    assert adapters.ENCODER not in tree(folder / "out")
    run(*SFT, "--out", "out", "--overwrite")
    assert not set(adapters.FILES) & set(tree(folder / "out"))
    run(*SFT, "--adapter", "lora", "--out", "out", "--overwrite")
    assert not {"config.json", "model.safetensors", "encoder.safetensors"} & set(tree(folder / "out"))
    result = run(*SFT, "--adapter", "lora", "--out", "out", status=2)
    assert "already has" in result.stderr


PRETRAIN = ("pretrain", "--data", "text.txt", *SHORT, "--n-layer", "2", "--n-embd", "16", "--n-head", "2",
            "--block-size", "16", "--batch-size", "2", "--adapter", "lora", "--lora-rank", "2")  # fmt: skip
AGAIN = "pretrain", "--init-from", "base", "--data", "text.txt"


@pytest.mark.parametrize("more", [(), ("--merge-every", "3")], ids=["LoRA", "ReLoRA"])
def test_pretraining_with_low_rank_from_random_weights(folder, more):
    """Claim 4. Its folder has a whole model, and a run that goes on with the base that is nowhere else."""
    run(*PRETRAIN, *more, "--out", "whole")
    model, _ = checkpoint.load("whole")
    first = GPT(model.config, np.random.default_rng(1337))
    moved = model.params["h.0.mlp.c_fc.weight"] - first.params["h.0.mlp.c_fc.weight"]
    assert np.linalg.matrix_rank(moved, tol=1e-4 * np.linalg.norm(moved)) == (4 if more else 2)
    assert (model.params["wte.weight"] != first.params["wte.weight"]).any()
    results = runs.resume(Pretrain, folder / "whole")
    np.testing.assert_array_equal(results.model.merge().flat, model.flat)
    run("generate", "whole", "--max-new-tokens", "5")


@pytest.mark.parametrize("args, says", [
    ((*SFT, "--lora-rank", "2"), "with no --adapter there is no such setting: leave out --lora-rank"),
    ((*SFT, "--adapter", "prompt", "--lora-rank", "2"), "with --adapter prompt there is no such setting"),
    ((*SFT, "--adapter", "lora", "--num-virtual-tokens", "2"), "with --adapter lora there is no such"),
    ((*SFT, "--adapter", "lora", "--lora-targets", "q_proj"), "'q_proj' is no linear map"),
    ((*SFT, "--adapter", "prefix", "--num-virtual-tokens", "40"), "the model has only 8 positions"),
    ((*SFT, "--adapter", "prefix", "--num-virtual-tokens", "48"), "num_virtual_tokens is 48: the"),
    ((*AGAIN, "--adapter", "prompt", "--num-virtual-tokens", "48"), "num_virtual_tokens is 48: the"),
    ((*PRETRAIN[:-4], "--adapter", "prompt"), "needs a trained model"),
    ((*PRETRAIN[:-4], "--merge-every", "2"), "merge_every is for an adapter"),
    (("merge", "base"), "--adapter-folder"),
    (("merge", "base", "--adapter-folder", "base"), "has no adapter_config.json"),
    (("generate", "base", "--adapter-folder", "nowhere"), "has no adapter_config.json"),
], ids=str)  # fmt: skip
def test_a_mistake_is_one_line(folder, args, says):
    result = run(*args, status=2)
    assert says in result.stderr


def test_evaluations_take_an_adapter(folder):
    run(*SFT, "--adapter", "lora", "--out", "tuned")
    model, tokenizer = adapters.load_model("base", "tuned")
    assert len(evaluate.answers(model, tokenizer, ["a?", "b?"], 4)) == 2


def test_a_run_whose_settings_lie_takes_no_memory(folder):
    """Guards: a base as large as the settings say, made before this is compared with the file."""
    run(*PRETRAIN, "--merge-every", "3", "--out", "whole")
    path = folder / "whole" / "trainer.safetensors"
    tensors, metadata = tensorfile.tensors(path)
    arrays = {name: np.empty(tensor.shape, np.float32) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        tensor.read(arrays[name])
    state = json.loads(metadata["tinygpt"])
    for change in ({"vocab_size": 30_000_000}, {"block_size": 2**20}):
        lie = state | {"settings": state["settings"] | {"model": state["settings"]["model"] | change}}
        for base in (arrays["base"], arrays["base"][:-1]):
            tensorfile.write(path, arrays | {"base": base}, {"tinygpt": json.dumps(lie)})
            tracemalloc.start()
            result = run("pretrain", "--resume", "whole", status=2)
            assert tracemalloc.get_traced_memory()[1] < 64 << 20
            tracemalloc.stop()
            assert result.stderr.count("\n") == 1 and "in its settings" in result.stderr
    tensorfile.write(path, arrays | {"base": arrays["base"][:-1]}, metadata)
    assert "base: its" in run("pretrain", "--resume", "whole", status=2).stderr


def test_merging_leaves_one_model_and_no_older_run(folder):
    """Guards: an older run's file in the folder of a merged model, from which --resume put back the old one;
    a base that was replaced by the merged model, while the adapter needs it."""
    run(*SFT, "--adapter", "lora", "--out", "tuned")
    run(*PRETRAIN, "--out", "old")
    run("merge", "base", "--adapter-folder", "tuned", "--out", "old", "--overwrite")
    assert {path.name for path in Path("old").iterdir()} == {path.name for path in Path("base").iterdir()}
    assert "nothing to resume" in run("pretrain", "--resume", "old", status=2).stderr
    for needed in "base", "tuned":
        before = {path.name: path.read_bytes() for path in Path(needed).iterdir()}
        result = run("merge", "base", "--adapter-folder", "tuned", "--out", needed, "--overwrite", status=2)
        assert "--out takes another folder" in result.stderr
        assert {path.name: path.read_bytes() for path in Path(needed).iterdir()} == before


def test_peft_selects_maps_in_many_ways(tmp_path):
    """Guards: names that PEFT 0.21 writes for "all-linear", and a scale that is read over."""
    model = make(KINDS["lora"])
    adapters.save(tmp_path, model, TOKENIZER, "base")
    path, ids = tmp_path / "adapter_config.json", np.arange(6)[None]
    raw = json.loads(path.read_text())
    full = [f"transformer.h.{layer}.{name}" for layer in range(3) for name in PROJECTIONS]
    for change in ({"target_modules": "all-linear"}, {"target_modules": full}, {"target_modules": r".*c_.*"},
                   {"exclude_modules": ["lm_head"]}, {"layers_to_transform": [0, 1, 2]}):  # fmt: skip
        path.write_text(json.dumps(raw | change))
        assert same(adapters.load(tmp_path, model.base).adapter, model.adapter)
    path.write_text(json.dumps(raw | {"use_rslora": True, "lora_alpha": 6 / math.sqrt(2)}))
    results = adapters.load(tmp_path, model.base)
    np.testing.assert_allclose(logits(results, ids), logits(model, ids), atol=1e-5)
    (tmp_path / adapters.WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin, which can run code"):
        adapters.load(tmp_path, model.base)


def test_targets_that_are_no_names_are_ignored_as_a_pattern_is(tmp_path):
    """Guards: a TypeError of sorted, in a traceback. The tensors say which maps have a branch."""
    model = make(KINDS["lora"])
    adapters.save(tmp_path, model, TOKENIZER, "base")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["c_attn", 1]}))
    assert adapters.load(tmp_path, model.base).adapter.config.targets
