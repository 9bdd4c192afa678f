"""The training loop: what it computes, what it must not change, and how it stops."""

import json
import math
import os
import signal

import numpy as np
import pytest

from tinygpt.core import kernels, replay, train
from tinygpt.core.config import GPTConfig
from tinygpt.core.model import GPT
from tinygpt.core.optim import AdamW
from tinygpt.errors import UserError
from tinygpt.folders import runs
from tinygpt.stages import variants
from tinygpt.stages.adapter import AdapterConfig
from tinygpt.stages.variants import build
from tinygpt.text import data

CONFIG = GPTConfig(vocab_size=13, block_size=8, n_layer=2, n_head=2, n_embd=16)
TOKENS = (np.arange(400) ** 2 % 13).astype(np.uint16)
SETTINGS = train.TrainConfig(max_iters=12, eval_interval=4, warmup_iters=2, seed=5)


def make(dropout=0.0, dtype=np.float32, names=None, settings=SETTINGS) -> AdamW:
    config = GPTConfig(**(vars(CONFIG) | {"dropout": dropout}))
    return settings.optimizer(GPT(config, np.random.default_rng(0), dtype), names)


def batches(step, rng):
    return [train.Batch(*data.random_blocks(TOKENS, 4, 8, rng), np.full((4, 8), 1 / 32, np.float32))]


def blocks():
    for ids, targets in data.consecutive_blocks(TOKENS, 4, 8):
        yield train.Batch(ids, targets, np.ones(ids.shape, np.float32))


# --- what it computes ---------------------------------------------------------------------------------------


def test_accumulation_is_the_large_batch(rng):
    """Guards: a mean of means, which weighs a half-masked micro-batch like a full one; a lost micro-batch."""
    ids, targets = data.random_blocks(TOKENS, 10, 8, rng)
    weights = rng.random((10, 8)) * (rng.random((10, 8)) < 0.6)
    weights[3:5] = 0  # one micro-batch has nothing to learn from
    weights /= weights.sum()
    start = np.minimum(rng.integers(0, 4, (10, 8)), np.arange(8)).astype(np.int32)
    positions = rng.integers(0, 8, (10, 8)).astype(np.int32)
    rows = [train.Batch(ids, targets, weights, start, positions)]
    cut = [train.Batch(*(part[i:j] for part in rows[0])) for i, j in [(0, 3), (3, 5), (5, 6), (6, 10)]]
    whole, parts = make(dtype=np.float64), make(dtype=np.float64)
    compute = train.gradients(whole)
    assert train.gradients(parts)(cut) == pytest.approx(compute(rows), rel=1e-13)
    assert np.abs(parts.flat - whole.flat).max() < 1e-13 * np.abs(whole.flat).max() * 10
    expected = whole.model.loss(ids, targets, weights, start=start, positions=positions)
    assert compute(rows) == expected
    before = whole.flat.copy()
    compute(rows)
    assert (whole.flat == before).all()  # and nothing of the last update is left in the next


@pytest.mark.parametrize("field, value", [("ids", 13), ("ids", -1), ("targets", 13), ("positions", 8)])
def test_a_step_reads_nothing_outside(field, value):
    """Guards: an id of a later batch that points past the end of a table."""
    compute = train.gradients(make())
    fields = {name: np.zeros((2, 8), np.int32) for name in ("ids", "targets", "start", "positions")}
    fields["weights"] = np.ones((2, 8), np.float32)
    for _ in range(2):
        compute([train.Batch(**fields)])
    fields[field][1, 3] = value
    with pytest.raises((IndexError, UserError), match=str(value)):
        compute([train.Batch(**fields)])


def test_it_learns_and_tells_of_every_update():
    """Guards: a loss that is not the model's, records that are missing, a last one without its evaluation."""
    records, settings = [], train.TrainConfig(max_iters=60, learning_rate=1e-2, min_lr=1e-3, eval_interval=25)
    optimizer, used = make(settings=settings), []

    def kept(step, rng):
        used.extend(update := batches(step, rng))
        return update

    train.train(
        optimizer, kept, settings, report=records.append, elapsed_s=100.0,
        evaluate=lambda: {"val_loss": train.mean_loss(optimizer.model, blocks())},
    )  # fmt: skip
    assert [r["iter"] for r in records] == list(range(1, 61))
    assert [r["iter"] for r in records if "val_loss" in r] == [25, 50, 60]
    fields = {"iter", "train_loss", "lr", "grad_norm", "tokens_per_s", "elapsed_s"}
    assert all(set(r) - {"val_loss"} == fields for r in records) and json.dumps(records)
    untrained = make(settings=settings).model.loss(*used[0][:3])
    assert records[0]["train_loss"] == pytest.approx(untrained, rel=1e-6)
    assert records[-1]["val_loss"] < 0.5 * math.log(13)
    assert records[0]["lr"] == pytest.approx(1e-2 / 101) and records[0]["elapsed_s"] >= 100


def test_the_mean_loss_counts_every_target_by_its_weight(rng):
    """Guards: a mean over batches of different sizes that is not the mean over targets; dropout left on."""
    model = make(dropout=0.5).model
    ids, targets = data.random_blocks(TOKENS, 7, 8, rng)
    weights = (rng.random((7, 8)) < 0.5).astype(np.float32)
    logits = model.forward(ids)[0].astype(np.float64)
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    cut = [train.Batch(ids[i:j], targets[i:j], weights[i:j]) for i, j in [(0, 5), (5, 7)]]
    assert train.mean_loss(model, cut) == pytest.approx((nll * weights).sum() / weights.sum(), rel=1e-6)
    assert train.mean_loss(model, [train.Batch(ids, targets, 0 * weights)]) == 0  # not a division by zero


def test_only_the_named_parameters_move():
    """Guards: frozen weights that decay or move."""
    names = ["h.1.attn.c_attn.weight", "h.0.ln_2.bias"]
    optimizer = make(names=names)
    before = {name: p.copy() for name, p in optimizer.model.params.items()}
    train.train(optimizer, batches, SETTINGS)
    moved = [name for name, p in optimizer.model.params.items() if (p != before[name]).any()]
    assert sorted(moved) == sorted(names)


# --- what must not change it --------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_looking_at_a_run_does_not_change_it(dropout):
    """Guards: an evaluation that draws from the run's random numbers or writes into its buffers."""
    plain, watched = make(dropout), make(dropout)
    train.train(plain, batches, SETTINGS)

    def evaluate():
        watched.model.forward(TOKENS[None, :8].astype(np.int32), rng=np.random.default_rng())
        return {"val_loss": train.mean_loss(watched.model, blocks())}

    every = train.TrainConfig(**(vars(SETTINGS) | {"eval_interval": 1}))
    train.train(watched, batches, every, evaluate=evaluate)
    assert watched.model.flat.tobytes() == plain.model.flat.tobytes()


def test_dropout_and_the_seed_do_something():
    """Guards: an option that is read and not used."""
    runs = [make(), make(0.3), make()]
    drawn = set()

    def watched(step, rng):
        (batch,) = batches(step, rng)
        drawn.add(batch.ids.tobytes())
        return [batch]

    for optimizer, seed in zip(runs, (5, 5, 6), strict=True):
        train.train(optimizer, watched, train.TrainConfig(**(vars(SETTINGS) | {"seed": seed})))
    assert len({optimizer.model.flat.tobytes() for optimizer in runs}) == 3
    assert len(drawn) == 24  # two seeds, twelve updates


def test_a_run_in_two_parts_is_the_run():
    """Guards: random numbers, moments or a learning rate that begin anew."""
    whole, first, second = make(0.3), make(0.3), make(0.3)
    train.train(whole, batches, SETTINGS)

    def stop(record):
        if record["iter"] == 7:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train.train(first, batches, SETTINGS, report=stop)
    for name in ("m", "v"):
        getattr(second, name)[:] = getattr(first, name)
    second.model.flat[:], second.steps = first.model.flat, first.steps
    train.train(second, batches, SETTINGS)
    assert second.model.flat.tobytes() == whole.model.flat.tobytes()


# --- how it stops -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "gradient", "evaluation"])
def test_numbers_that_are_not_finite_stop_it_before_harm(where):
    """Guards: a run that goes on with NaN for hours, or overwrites its last good checkpoint with one."""
    optimizer, saves = make(), []

    def broken(step, rng):
        (batch,) = batches(step, rng)
        if step == 6 and where == "loss":
            optimizer.model.params["ln_f.bias"][0] = np.nan
        if step == 6 and where == "gradient":  # a finite loss whose gradients overflow
            batch = batch._replace(weights=np.tile(np.float32([[6e37], [-6e37]]), (2, 8)))
        return [batch]

    def evaluate():
        return {"val_loss": math.nan if where == "evaluation" and optimizer.steps == 8 else 1.0}

    with pytest.raises(train.NonFiniteError, match="lower learning rate") as error:
        train.train(
            optimizer, broken, SETTINGS, evaluate=evaluate, save=lambda: saves.append(optimizer.steps)
        )
    assert saves == [4] and "iteration 4 is kept" in str(error.value)
    what = {"loss": "the loss is nan", "gradient": "norm is", "evaluation": "val_loss is nan"}
    assert what[where] in str(error.value)
    assert optimizer.steps == (8 if where == "evaluation" else 6)
    assert f"iteration {8 if where == 'evaluation' else 7}" in str(error.value)


def test_ctrl_c_finishes_the_update_and_saves():
    """Guards: weights and moments of different updates; a Ctrl-C that is lost, or that cannot be repeated."""
    optimizer, records, saves = make(), [], []
    before = signal.getsignal(signal.SIGINT)

    def interrupted(step, rng):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return batches(step, rng)

    save = lambda: saves.append(optimizer.steps)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        train.train(optimizer, interrupted, SETTINGS, report=records.append, save=save)
    assert saves == [4, 6] and len(records) == 6
    assert signal.getsignal(signal.SIGINT) is before

    def twice(step, rng):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train.train(optimizer, twice, SETTINGS, save=save)
    assert saves == [4, 6] and optimizer.steps == 6


@pytest.mark.parametrize("change", [
    {"max_iters": 0}, {"learning_rate": -1.0}, {"learning_rate": math.nan}, {"learning_rate": math.inf},
    {"min_lr": 1.0}, {"warmup_iters": -1}, {"weight_decay": -0.1}, {"beta1": 1.0}, {"beta2": -0.1},
    {"grad_clip": -1.0}, {"eval_interval": 0}, {"seed": -1},
], ids=str)  # fmt: skip
def test_settings_that_cannot_be(change):
    """Guards: a mistake that shows only as a model that does not learn."""
    with pytest.raises(UserError, match=next(iter(change))):
        train.TrainConfig(**change)


def test_metrics_go_on_where_the_checkpoint_is(tmp_path):
    """Guards: iterations that are told twice after a kill, a torn last line, foreign and damaged lines."""
    path = tmp_path / "metrics.jsonl"
    first, second = '{"iter": 1, "elapsed_s": 0.25, "a": 1}', '{"iter": 2, "elapsed_s": 0.5}'
    path.write_text(
        f'{first}\nnonsense\n[1]\n{{"iter": 1}}\n{{"iter": 1, "elapsed_s": "1"}}\n{"[" * 100_000}\n'
        f'{second}\n{{"iter": 3, "elapsed_s": 0.5}}\n{{"iter": 4, "tr',
        encoding="utf-8",
    )
    assert runs.resume_metrics(path, 2) == json.loads(second)
    assert path.read_text(encoding="utf-8") == f"{first}\n{second}\n"
    assert runs.resume_metrics(tmp_path / "new.jsonl", 0) == {}


# --- recorded steps -----------------------------------------------------------------------------------------


needs_c = pytest.mark.skipif("c" not in kernels.available(), reason="the C core was not built")
VARIANTS = {
    "GPT-2": ({}, None, True),
    "GPT-1": ({"post_norm": True}, None, True),
    "LoRA": ({}, AdapterConfig("lora", rank=2, alpha=2.0), True),
    "LoRA, all else trained": ({}, AdapterConfig("lora", rank=2, alpha=2.0, full=True), True),
    "LoRA, scaled": ({}, AdapterConfig("lora", rank=2, alpha=3.0), False),  # what NumPy computes is refused
    "prompt": ({}, AdapterConfig("prompt", num_virtual_tokens=3), False),
    "p-tuning": ({}, AdapterConfig("ptuning", num_virtual_tokens=3, hidden=5), False),
    "prefix": ({}, AdapterConfig("prefix", num_virtual_tokens=3), False),
}


@needs_c
@pytest.mark.parametrize("name", VARIANTS)
def test_a_replayed_step_is_the_step(name, rng, monkeypatch):
    """Guards: a replay with the numbers of its first batch, or with weights that have moved since, or without
    what NumPy computed between the calls."""
    changes, adapter, is_recorded = VARIANTS[name]

    def fresh() -> AdamW:
        model = build(GPTConfig(13, 16, 3, 2, 16, **changes), np.random.default_rng(0), ops=kernels)
        return AdamW(variants.create(model, adapter, np.random.default_rng(1)) if adapter else model)

    tapes, expect = [], replay.Tape
    monkeypatch.setattr(replay, "Tape", lambda *args: tapes.append(expect(*args)) or tapes[-1])
    recorded, plain = fresh(), fresh()
    compute = train.gradients(recorded)
    for n in range(8):
        shape = 3 + n % 2, 8
        ids, targets = rng.integers(0, 13, (2, *shape)).astype(np.int32)
        start = np.minimum(rng.integers(0, 4, shape), np.arange(8)).astype(np.int32)
        more = {"start": start, "positions": rng.integers(0, 13, shape).astype(np.int32)} if n > 3 else {}
        batch = train.Batch(ids, targets, rng.random(shape).astype(np.float32), **more)
        loss = plain.model.loss(*batch[:3], plain.grads, **more)
        assert compute([batch], np.random.default_rng(n)) == loss  # as `train` does
        np.testing.assert_array_equal(recorded.flat, plain.flat)
        recorded.step(1e-2)
        plain.step(1e-2)
    assert [tape.is_whole for tape in tapes] == [is_recorded] * len(tapes) and len(tapes) == 4


@needs_c
@pytest.mark.parametrize("change", [
    lambda batch: train.Batch(*(np.asfortranarray(a) for a in batch)),
    lambda batch: batch._replace(positions=batch.positions[0]),
    lambda batch: batch._replace(positions=batch.positions[:1]),
], ids=["columns first", "(T,)", "(1, T)"])  # fmt: skip
def test_odd_batches_are_not_those_of_before(rng, change):
    """Guards: a replay with a copy of its first batch's arrays."""
    optimizer = make()
    compute = train.gradients(optimizer)
    for _ in range(3):
        ids, targets, start, positions = rng.integers(0, 8, (4, 3, 8)).astype(np.int32)
        start = np.minimum(start, np.arange(8, dtype=np.int32))
        batch = change(train.Batch(ids, targets, rng.random((3, 8)).astype(np.float32), start, positions))
        loss = compute([batch])
        flat, grads = optimizer.model.gradients()
        more = {"start": batch.start, "positions": batch.positions}
        assert loss == optimizer.model.loss(*batch[:3], grads, **more)
        assert (optimizer.flat == flat).all()
