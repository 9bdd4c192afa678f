"""The model against transformers (stored results), and the promises of its docstrings."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open

from tinygpt.core.config import PRESETS, GPTConfig
from tinygpt.core.generate import KVCache
from tinygpt.core.model import GPT, Pass
from tinygpt.core.optim import AdamW
from tinygpt.errors import UserError
from tinygpt.stages import variants
from tinygpt.stages.adapter import AdapterConfig
from tinygpt.stages.variants import build

GOLDEN = Path(__file__).parent / "golden"
CONFIG = GPTConfig(vocab_size=13, block_size=9, n_layer=3, n_head=2, n_embd=12)


@pytest.fixture(params=[False, True], ids=["pre-norm", "post-norm"])
def model(request, ops, rng) -> GPT:
    """Three layers in float64, their weights large enough that every one matters."""
    model = build(GPTConfig(**vars(CONFIG) | {"post_norm": request.param}), rng, np.float64, ops)
    model.flat += 0.3 * rng.standard_normal(model.flat.shape)
    return model


def batch(rng, T=9, B=2):
    return rng.integers(13, size=(2, B, T))


# --- against transformers ----------------------------------------------------------------------------------


def relative(output, expected) -> float:
    """max|difference| over max|expected|; infinity for NaN."""
    gap = np.abs(output - expected).max()
    return float(gap / np.abs(expected).max()) if np.isfinite(gap) else math.inf


def hold_to(reference: dict, sizes: dict, steps: dict, post_norm: bool, dtype, ops, tol: float) -> None:
    """Logits, loss, every gradient and a training run agree with what transformers makes of the same weights.

    `reference` is as peers/make_golden.py has it. The loss is computed from the logits in float64.
    """
    sizes = {"block_size" if k == "n_positions" else k: v for k, v in sizes.items()}
    model = build(GPTConfig(**sizes, post_norm=post_norm), None, dtype, ops)
    named = {n.removeprefix("weight."): a for n, a in reference.items() if n.startswith("weight.")}
    assert set(named) == set(model.params)
    for name, array in named.items():
        model.params[name][:] = array
    ids, weights = reference["ids"].astype(np.int64), reference["weights"].astype(dtype)
    flat, grads = model.gradients()
    model.loss(ids[0, :, :-1], ids[0, :, 1:], weights, grads)
    logits, _ = model.forward(ids[0, :, :-1])
    assert relative(logits, reference["logits"]) <= tol
    exact = logits.astype(np.float64)
    nll = np.log(np.exp(exact).sum(-1)) - np.take_along_axis(exact, ids[0, :, 1:, None], -1)[..., 0]
    assert relative((nll * reference["weights"]).sum(), reference["loss"]) <= tol
    for name, grad in grads.items():
        assert relative(grad, reference[f"grad.{name}"]) <= tol, name
    optimizer = AdamW(model, **{k: v for k, v in steps.items() if k != "lr"})
    for step, expected in zip(ids[1:], reference["losses"], strict=True):
        loss = model.loss(step[:, :-1], step[:, 1:], None, optimizer.grads)
        optimizer.step(steps["lr"])
        assert loss == pytest.approx(expected, rel=1e-4)
    C = model.config.n_embd
    for name, p in model.params.items():
        expected = reference[f"after.{name}"]
        if name.endswith("c_attn.bias"):  # a key's has no gradient: AdamW divides rounding by rounding
            p, expected = (np.delete(a, slice(C, 2 * C)) for a in (p, expected))
        assert relative(p, expected) <= 1e-4, name


@pytest.mark.parametrize("kind, post_norm", [("gpt2", False), ("openai-gpt", True)])
@pytest.mark.parametrize("dtype, tol", [(np.float64, 1e-8), (np.float32, 1e-4)])
def test_transformers_stored_results(ops, kind, post_norm, dtype, tol):
    """No gradient check finds a formula that is wrong in forward and backward alike; another GPT-2 does."""
    with safe_open(GOLDEN / f"{kind}.safetensors", "np") as file:
        facts = file.metadata()
        reference = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    hold_to(reference, json.loads(facts["sizes"]), json.loads(facts["steps"]), post_norm, dtype, ops, tol)


# --- configuration and parameters --------------------------------------------------------------------------


def test_the_presets_have_as_many_parameters_as_published():
    """GPT-2's four as in its release (the tied head counted once); nanoGPT's count for its CPU recipe."""
    count = {name: sum(map(math.prod, config.shapes().values())) for name, config in PRESETS.items()}
    assert count["gpt2"] == 124_439_808
    assert count["gpt2-medium"] == 354_823_168
    assert count["gpt2-large"] == 774_030_080
    assert count["gpt2-xl"] == 1_557_611_200
    nano, C = PRESETS["nano"], 128
    block = 12 * C * C + 13 * C  # 3 + 1 + 4 + 4 matrices of C x C; biases 3 + 1 + 4 + 1 and norms 4 times C
    assert count["nano"] == nano.n_layer * block + (nano.vocab_size + nano.block_size + 2) * C


@pytest.mark.parametrize("change, message", [
    ({"n_head": 5}, "n_head 5 does not divide n_embd 12"), ({"n_layer": 0}, "n_layer is 0"),
    ({"vocab_size": -3}, "vocab_size is -3"), ({"block_size": 0}, "block_size is 0"),
    ({"dropout": 1.0}, "dropout is 1.0"), ({"dropout": -0.1}, "dropout is -0.1"),
])  # fmt: skip
def test_impossible_sizes_are_named(change, message):
    with pytest.raises(UserError, match=message):
        GPTConfig(**vars(CONFIG) | change)


def test_initial_weights_have_gpt2s_distribution():
    """Deviation 0.02 at 768 channels, so 0.04 at 192, and less by sqrt(2 layers) into the residual stream:
    without that factor a deep model's stream grows, with it on the wrong matrices training is slower and
    nothing else shows it."""
    model = build(GPTConfig(300, 64, 8, 4, 192), np.random.default_rng(0))
    for name, p in model.params.items():
        if p.ndim == 1:
            assert (p == (".ln_" in f".{name}" and name.endswith("weight"))).all(), name
        else:
            std = 0.04 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.04
            assert abs(p.std() / std - 1) < 5 / math.sqrt(2 * p.size), name  # five standard errors
            assert abs(p.mean()) < 5 * std / math.sqrt(p.size), name
    tokens = np.random.default_rng(1).integers(300, size=(2, 64, 64))
    # It knows nothing yet; its logits, x @ wte.T with x normalised, have a variance of 768 * 0.02^2.
    assert model.loss(*tokens) == pytest.approx(math.log(300) + 768 * 0.02**2 / 2, abs=0.05)


def test_parameters_are_views_of_one_buffer_matrices_first(model):
    """Clipping, AdamW and hashing work on `flat`: a parameter outside it would never be trained."""
    end = 0
    for p in model.params.values():
        assert np.shares_memory(p, model.flat)
        np.testing.assert_array_equal(p.ravel(), model.flat[end : end + p.size])
        end += p.size
    assert end == model.flat.size
    dims = [p.ndim for p in model.params.values()]
    assert dims == sorted(dims, reverse=True)
    assert ("ln_f.weight" in model.params) != model.config.post_norm  # GPT-1 has no norm at the end


# --- forward -----------------------------------------------------------------------------------------------


def test_the_future_is_not_seen(model, rng):
    ids, _ = batch(rng)
    logits, _ = model.forward(ids)
    changed = ids.copy()
    changed[:, 5] = (ids[:, 5] + 1) % 13
    after, _ = model.forward(changed)
    np.testing.assert_array_equal(logits[:, :5], after[:, :5])
    assert (logits[:, 5:] != after[:, 5:]).any(-1).all()


def test_too_long_a_sequence_is_one_line(model, rng):
    with pytest.raises(UserError, match="10 tokens is longer than block_size, 9"):
        model.forward(batch(rng, T=10)[0])
    with pytest.raises(UserError, match="block_size"):
        model.forward(batch(rng, T=1)[0], positions=np.array([9]))


def test_packed_documents_equal_each_alone(model, rng):
    """TRL 1230, 3067: documents in one row, each with its view and its positions from 0, do not mix."""
    ids, _ = batch(rng, B=1)
    start, positions = np.array([[0] * 4 + [4] * 5]), np.array([[*range(4), *range(5)]])
    packed, _ = model.forward(ids, positions=positions, start=start)
    for document in (slice(0, 4), slice(4, 9)):
        alone, _ = model.forward(ids[:, document])
        np.testing.assert_allclose(packed[:, document], alone, rtol=1e-11, atol=1e-13)


def test_a_forward_without_a_cache_gives_the_same_logits(model, rng):
    """keep=False: no array outlives the block that needs it."""
    ids, _ = batch(rng)
    kept, cache = model.forward(ids)
    logits, none = model.forward(ids, keep=False)
    np.testing.assert_array_equal(logits, kept)
    assert cache and not none


@pytest.mark.parametrize("kind", [None, "lora", "ptuning", "prefix"])
def test_places_that_are_picked_have_the_same_logits_and_gradients(model, rng, kind):
    """Guards: rows shifted by a learned prompt, and a gradient lost where a row is not picked."""
    ids, targets = batch(rng)
    if kind:
        model = variants.create(model, AdapterConfig(kind, num_virtual_tokens=2), rng)
        model.trained.flat[:] = 0.3 * rng.standard_normal(model.trained.flat.shape)
        ids, targets = ids[:, :-2], targets[:, :-2]  # the prompt takes two positions
    places, weights = np.array([7, 2, 3], np.int32), rng.standard_normal(3)
    logits, _ = model.forward(ids)
    picked, _ = model.forward(ids, places=places)
    np.testing.assert_allclose(picked, logits.reshape(-1, logits.shape[-1])[places], rtol=1e-11, atol=1e-13)
    spread = np.zeros(ids.size)
    spread[places] = weights
    (all_flat, all_grads), (flat, grads) = model.trained.gradients(), model.trained.gradients()
    expected = model.loss(ids, targets, spread.reshape(ids.shape), all_grads)
    loss = model.loss(ids, targets.ravel()[places], weights, grads, places=places)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(flat, all_flat, rtol=1e-9, atol=1e-12)
    assert abs(flat).max() > 1e-3


def test_results_stay_as_they_are(model, rng):
    """Guards: memory that is used again while somebody still holds it."""
    ids, targets = batch(rng)
    logits, cache = model.forward(ids)
    before, dlogits = logits.copy(), rng.standard_normal(logits.shape)
    grads = [model.gradients() for _ in range(2)]
    model.backward(dlogits, cache, grads[0][1])
    model.loss(targets, ids, None, model.gradients()[1])
    model.backward(dlogits, cache, grads[1][1])  # a second backward from one cache
    np.testing.assert_array_equal(grads[0][0], grads[1][0])
    np.testing.assert_array_equal(logits, before)


def test_a_branch_joins_the_stream_in_one_operation(model, rng, monkeypatch):
    """Guards: a pass over memory for each sum; only that of the two embeddings is left."""
    sums, ops = [], model.ops
    counted = {"residual_forward": lambda *a, **k: (sums.append(1), ops.residual_forward(*a, **k))[1]}
    model.ops = SimpleNamespace(**vars(ops) | counted)
    model.forward(batch(rng)[0])
    assert len(sums) == 1


def test_dropout_needs_a_generator_and_follows_it(model, rng):
    ids, _ = batch(rng)
    plain, _ = model.forward(ids)
    dropping = build(GPTConfig(**vars(model.config) | {"dropout": 0.5}), None, np.float64, model.ops)
    dropping.flat[:] = model.flat
    np.testing.assert_array_equal(dropping.forward(ids)[0], plain)  # evaluation
    runs = [dropping.forward(ids, rng=np.random.default_rng(seed))[0] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()


# --- backward ----------------------------------------------------------------------------------------------


def test_the_tied_tables_gradient_is_the_sum_of_its_two_uses(model, rng):
    """It loses one of the two where a backward overwrites what the other left."""
    ops = model.ops

    def head_only(dout, cache, dw=None, add=False):
        return dw

    def table_only(dout, cache, dw=None, *more, **options):
        grads = ops.linear_backward(dout, cache, dw, *more, **options)
        if dw is not False:  # the head's is the only one wanted
            dw[:] = 0
        return grads

    def gradient(**replaced):
        model.ops = SimpleNamespace(**vars(ops) | replaced)
        flat, grads = model.gradients(["wte.weight"])
        model.loss(ids, targets, None, grads)
        return flat

    ids, targets = batch(rng)
    head, table = gradient(embedding_backward=head_only), gradient(linear_backward=table_only)
    assert np.abs(head).max() > 1e-3
    assert np.abs(table).max() > 1e-3
    np.testing.assert_allclose(gradient(), head + table, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("names", [
    ["h.1.attn.c_attn.weight"], ["h.2.mlp.c_proj.bias", "h.2.ln_2.weight"], ["wte.weight"], ["wpe.weight"],
    ["h.0.ln_1.bias", "h.2.attn.c_proj.weight"], [],
])  # fmt: skip
def test_freezing_changes_no_gradient_that_is_computed(model, rng, names):
    ids, targets = batch(rng)
    _, full = model.gradients()
    model.loss(ids, targets, None, full)
    flat, some = model.gradients(names)
    assert flat.size == sum(model.params[n].size for n in names)
    model.loss(ids, targets, None, some)
    assert set(some) == set(names)
    for name in names:
        np.testing.assert_array_equal(some[name], full[name], name)


@pytest.mark.parametrize("lowest, blocks", [("wpe.weight", 3), ("h.1.ln_2.bias", 2), ("h.2.ln_1.bias", 1)])
def test_nothing_is_computed_below_the_lowest_name(model, rng, monkeypatch, lowest, blocks):
    """Freezing the lower blocks must make a step faster, or nobody would freeze."""
    passed = []
    below = model.block_backward
    monkeypatch.setattr(model, "block_backward", lambda *a: passed.append(1) or below(*a))
    ids, targets = batch(rng)
    model.loss(ids, targets, None, model.gradients([lowest, "h.2.ln_2.weight"])[1])
    assert len(passed) == blocks


@pytest.mark.parametrize("change", [{}, {"post_norm": True}, {"n_layer": 1, "n_embd": 64}], ids=str)
def test_the_size_is_that_of_the_shapes(change):
    """Guards: a formula that forgets a tensor, by which sizes are refused and runs are read."""
    config = GPTConfig(**vars(CONFIG) | change)
    assert config.size == sum(map(math.prod, config.shapes().values()))


@pytest.mark.parametrize("change", [
    {"n_embd": 400_008}, {"n_embd": 12 * 10**400}, {"vocab_size": 10**11}, {"block_size": 10**11},
    {"n_layer": 10**7},
], ids=lambda change: next(iter(change)))  # fmt: skip
def test_sizes_that_no_machine_has_are_refused(change):
    """Guards: a mistyped size that lists names for hours, or fails in numpy."""
    with pytest.raises(UserError, match=next(iter(change))):
        GPTConfig(**vars(CONFIG) | change)


def test_an_unknown_name_is_an_error(model):
    """An adapter or a frozen set that matches nothing would train nothing, silently (PEFT 2115)."""
    with pytest.raises(UserError, match="no parameter is called 'h.0.attn.weight'"):
        model.gradients(["h.0.attn.weight"])


def test_the_loss_is_a_weighted_sum(model, rng):
    """TRL 2175: two halves of a batch, weighted by the whole batch's count, add up to the whole."""
    ids, targets = batch(rng)
    weights = (rng.random(ids.shape) < 0.6) / 7.0
    flat, grads = model.gradients()
    whole, gradient = model.loss(ids, targets, weights, grads), flat.copy()
    parts, total = 0.0, np.zeros_like(flat)
    for row in (slice(0, 1), slice(1, 2)):
        parts += model.loss(ids[row], targets[row], weights[row], grads)
        total += flat
    assert parts == pytest.approx(whole, rel=1e-13)
    np.testing.assert_allclose(total, gradient, rtol=1e-9, atol=1e-14)
    masked = model.loss(ids, targets, np.zeros(ids.shape), grads)
    assert masked == 0
    assert not flat.any()


def test_a_copy_has_the_weights_and_nothing_in_common(model):
    other = model.copy()
    assert other.flat.tobytes() == model.flat.tobytes() and not np.shares_memory(other.flat, model.flat)
    other.params["wte.weight"][:] = 0
    assert model.params["wte.weight"].any() and not other.flat[: other.params["wte.weight"].size].any()


def test_a_part_can_go_backwards_twice(ops):
    """Guards: a gradient that is written to, where the stream's own is added: a second call shows it."""
    rng = np.random.default_rng(0)
    for config in (CONFIG, dataclasses.replace(CONFIG, post_norm=True)):
        model = build(config, rng, np.float64, ops)
        x = rng.standard_normal((2, 5, config.n_embd))
        _, cache = model.block(x, 0, Pass())
        _, grads = model.gradients()
        dx = rng.standard_normal(x.shape)
        before, first = dx.copy(), model.block_backward(dx, cache, grads)
        assert (dx == before).all()
        np.testing.assert_array_equal(model.block_backward(dx, cache, grads), first)


def test_a_cache_of_keys_has_no_backward(ops):
    model = build(CONFIG, np.random.default_rng(0), np.float64, ops)
    past = KVCache(model, 1, 8)
    model.forward(np.array([[1, 2]]), past=past, keep=False)
    with pytest.raises(ValueError, match="keep=False"):
        model.forward(np.array([[3]]), past=past)
