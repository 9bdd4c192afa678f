"""Policy gradients against enumeration: every answer that a tiny model can give, with its probability."""

import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from tinygpt.core import train
from tinygpt.core.config import GPTConfig
from tinygpt.core.model import GPT
from tinygpt.core.optim import AdamW
from tinygpt.core.train import TrainConfig
from tinygpt.errors import UserError
from tinygpt.folders import adapters, checkpoint, runs
from tinygpt.lab import story
from tinygpt.shell.cli import main
from tinygpt.shell.worlds import world_of
from tinygpt.stages import dpo, reward, rlhf, variants
from tinygpt.stages import samples as sampling
from tinygpt.stages.adapter import AdapterConfig, fingerprint
from tinygpt.stages.rlhf import Config
from tinygpt.stages.samples import Samples
from tinygpt.stages.variants import build
from tinygpt.text import instructions
from tinygpt.text.tokenizer import BPETokenizer
from tinygpt.world import VERSION, World, tasks

EOS, V, LONGEST = 0, 4, 3
CONFIG = GPTConfig(vocab_size=V, block_size=8, n_layer=1, n_head=2, n_embd=8)
PROMPT = [1, 3]


class Tok:
    eos_id, vocab_size, stops, special = EOS, V, {EOS}, {"end": EOS}

    @staticmethod
    def decode(ids) -> str:
        return "".join(map(str, ids))


def make(seed: int, scale: float = 3.0) -> GPT:
    model = GPT(CONFIG, np.random.default_rng(seed), np.float64)
    model.flat *= scale
    return model


def answers(longest: int = LONGEST) -> list[tuple[int, ...]]:
    """All: of fewer tokens and the end, or of `longest` without it."""
    words = range(1, V)
    ended = [(*a, EOS) for n in range(longest) for a in itertools.product(words, repeat=n)]
    return ended + list(itertools.product(words, repeat=longest))


def samples(results: list[tuple[int, ...]]) -> Samples:
    T = len(PROMPT) + max(map(len, results)) - 1
    ids, targets = np.zeros((2, len(results), T), int)
    mask = np.zeros((len(results), T))
    for row, answer in enumerate(results):
        whole = [*PROMPT, *answer]
        n = len(whole) - 1
        ids[row, :n], targets[row, :n], mask[row, len(PROMPT) - 1 : n] = whole[:-1], whole[1:], 1
    stopped = np.array([answer[-1] == EOS for answer in results])
    return Samples(ids, targets, mask, [Tok.decode(a) for a in results], stopped)


ALL = samples(answers())
ONE = samples(answers(1))  # a bandit: one token, and done
RNG = np.random.default_rng(3)
REWARD = RNG.standard_normal(len(ALL.answers))


def probabilities(model: GPT, results: Samples = ALL) -> np.ndarray:
    p = np.exp(sampling.logprobs(model, results).sum(1))
    assert p.sum() == pytest.approx(1, abs=1e-12)
    return p


def gradient(model: GPT, results: Samples, d: np.ndarray) -> np.ndarray:
    """Of a loss by the weights, from its gradient d (N, T) by logp."""
    optimizer = AdamW(model)
    logits, cache = model.forward(results.ids)
    _, c = model.ops.cross_entropy_forward(logits, results.targets)
    model.backward(model.ops.cross_entropy_backward(-d * results.mask, c), cache, optimizer.grads)
    return optimizer.flat.copy()


def slopes(model: GPT, value) -> tuple[np.ndarray, np.ndarray]:
    """Central differences of value() along four random directions, and the directions."""
    directions = np.random.default_rng(0).standard_normal((4, model.flat.size)) / math.sqrt(model.flat.size)
    start, results, eps = model.flat.copy(), [], 1e-5
    for direction in directions:
        sides = []
        for sign in (1, -1):
            model.flat[:] = start + sign * eps * direction
            sides.append(value())
        results.append((sides[0] - sides[1]) / (2 * eps))
    model.flat[:] = start
    return np.array(results), directions


def assert_gradient(model: GPT, mine: np.ndarray, value) -> None:
    truth, directions = slopes(model, value)
    assert abs(truth).max() > 1e-3
    np.testing.assert_allclose(directions @ mine, truth, atol=1e-7 * max(1, abs(truth).max()))


# --- the gradient of what is maximised ----------------------------------------------------------------------


def test_the_policy_gradient_is_that_of_the_expected_reward():
    """E[-r grad log p] over all answers, against differences of -E[r]."""
    model = make(0)
    p = probabilities(model)
    _, d = rlhf.policy_gradient(sampling.logprobs(model, ALL), ALL.mask, (p * REWARD * len(p))[:, None])
    assert_gradient(model, gradient(model, ALL, d), lambda: -(probabilities(model) * REWARD).sum())


def in_pairs(model: GPT, advantage) -> np.ndarray:
    """The expected gradient of an objective of two answers to one question: all pairs, by probability.

    advantage(r (M, 2)) -> (M, 2).
    """
    p = probabilities(model)
    rows = np.stack(np.meshgrid(np.arange(len(p)), np.arange(len(p)), indexing="ij"), -1).reshape(-1, 2)
    a = advantage(rows)
    weight = p[rows[:, 0]] * p[rows[:, 1]]
    per_answer = np.zeros(len(p))  # sum over pairs of weight * A / 2, for each place of the pair
    for side in (0, 1):
        np.add.at(per_answer, rows[:, side], weight * a[:, side] / 2)
    _, d = rlhf.policy_gradient(sampling.logprobs(model, ALL), ALL.mask, (per_answer * len(p))[:, None])
    return gradient(model, ALL, d)


def test_rloo_is_unbiased_also_with_the_kl_in_its_reward():
    """Leave-one-out: the baseline is independent of the sample. KL as a cost of each answer has the gradient
    of the KL of whole answers, -beta E[log(policy / reference)]."""
    model, ref = make(0), make(1)
    beta, ref_logp = 0.3, sampling.logprobs(make(1), ALL).sum(1)
    r = REWARD - beta * (sampling.logprobs(model, ALL).sum(1) - ref_logp)
    mine = in_pairs(model, lambda rows: rlhf.leave_one_out(r[rows]))

    def value() -> float:
        p = probabilities(model)
        kl = (p * (np.log(p) - sampling.logprobs(ref, ALL).sum(1))).sum()
        return -((p * REWARD).sum() - beta * kl)

    assert_gradient(model, mine, value)


def test_grpo_with_two_answers_climbs_the_win_rate_against_itself():
    """Where it is biased, and by what: of two rewards only the order is left, (r1 - r2) / deviation is
    +-sqrt(2), so its expected gradient is that of P(better) - P(worse) against the policy as it was."""
    model = make(0)
    r = 1000 * REWARD  # so that the 1e-4 in the deviation is nothing
    mine = in_pairs(model, lambda rows: rlhf.standardised(r[rows]))
    fixed, sign = probabilities(model), np.sign(REWARD[:, None] - REWARD[None, :])
    assert_gradient(model, mine, lambda: -(probabilities(model) @ sign @ fixed) / math.sqrt(2))


def test_advantages_by_hand():
    """Scores 1, 3, 6, 8 in two groups; the first answer is 2 nats likelier than under the reference.

    Guards: a KL with the wrong sign, or in the wrong place; groups across questions; a score that is lost.
    """
    few = samples([(1, 0), (2, 0), (3, 0), (1, 2, 0)])
    scores, old, ref = np.array([1.0, 3.0, 6.0, 8.0]), np.zeros_like(few.mask), np.zeros_like(few.mask)
    old[0, 1], old[0, 2] = -1.0, -0.5
    ref[0, 1], ref[0, 2] = -2.5, -1.0  # the KL's parts 1.5 and 0.5

    def advantage(algo: str, **more) -> np.ndarray:
        config = Config(algo=algo, beta=0.25, num_generations=2, gamma=1.0, lam=1.0)
        return rlhf.experience(few, old, ref, scores, config, **more).advantage

    # With the KL the rewards are 0.5, 3, 6, 8.
    assert advantage("rloo")[:, 0] == pytest.approx([-2.5, 2.5, -2, 2])
    others = [17 / 3, 14.5 / 3, 11.5 / 3, 9.5 / 3]
    assert advantage("reinforce")[:, 0] == pytest.approx(np.array([0.5, 3, 6, 8]) - others)
    half = 1 / math.sqrt(2)
    assert advantage("grpo")[:, 0] == pytest.approx([-half, half, -half, half], abs=1e-4)
    # PPO with values of 1: each place has what is yet to come, less 1; then all places are standardised.
    mask = few.mask > 0
    raw = np.array([0.5 - 1, 0.875 - 1, 2, 2, 5, 5, 7, 7, 7])  # the last place of the first: 1 - 0.5 * 0.25
    ppo = advantage("ppo", values=np.ones_like(old))
    assert ppo[mask] == pytest.approx((raw - raw.mean()) / raw.std())
    e = rlhf.experience(few, old, ref, scores, Config(algo="ppo", beta=0.25, lam=1.0), np.ones_like(old))
    assert e.returns[mask] == pytest.approx(raw + 1)


def test_dpo_learns_from_whole_answers_and_their_end():
    """By hand: log p of both answers, the end token included, against the reference's."""
    tokenizer = BPETokenizer.train("User: Assistant: What is it? red green blue " * 9, 300)
    config = GPTConfig(vocab_size=tokenizer.vocab_size, block_size=64, n_layer=1, n_head=2, n_embd=16)
    model, ref = (GPT(config, np.random.default_rng(seed), np.float64) for seed in (0, 1))
    pairs = [reward.Comparison("What is it?", "red", "green blue"), reward.Comparison("What?", "blue", "red")]

    def logp(m: GPT, prompt: str, answer: str) -> float:
        queries = instructions.prompt(tokenizer, prompt)
        ids = np.concatenate([queries, tokenizer.encode(f" {answer}"), [tokenizer.eos_id]])[None]
        return -m.loss(ids[:, :-1], ids[:, 1:], np.arange(ids.size - 1)[None] >= len(queries) - 1.0)

    margins = [
        sum(sign * (logp(model, pair.prompt, text) - logp(ref, pair.prompt, text))
            for sign, text in ((1, pair.chosen), (-1, pair.rejected))) for pair in pairs
    ]  # fmt: skip
    answers = dpo.samples_of(tokenizer, [dpo.encode(model, tokenizer, pair) for pair in pairs])
    c = answers._replace(ref=sampling.logprobs(ref, answers).sum(1).reshape(2, -1))
    loss, d = dpo.dpo_loss(sampling.logprobs(model, c), None, c, 0.3)
    assert loss == pytest.approx(np.mean([math.log(1 + math.exp(-0.3 * margin)) for margin in margins]))
    assert (d[:2][c.mask[:2] > 0] < 0).all() and (d[2:][c.mask[2:] > 0] > 0).all()


def test_a_sampled_estimate_is_unbiased_within_its_error():
    """RLOO as it runs: sampled by the engine, in groups of four."""
    model, tokenizer = make(0), Tok()
    config = Config(algo="rloo", beta=0.0, num_generations=4)
    by_answer = dict(zip(ALL.answers, REWARD, strict=True))
    truth, directions = slopes(model, lambda: -(probabilities(model) * REWARD).sum())
    rng, results = np.random.default_rng(5), []
    optimizer = AdamW(model)
    for _ in range(60):
        drawn = sampling.sample(model, tokenizer, [np.array(PROMPT)] * 40, 4, LONGEST, rng)
        # The engine takes the end token off; a full-length answer has none.
        ends = ["0" * bool(stopped) for stopped in drawn.stopped]
        score = np.array([by_answer[a + end] for a, end in zip(drawn.answers, ends, strict=True)])
        logp = sampling.logprobs(model, drawn)
        e = rlhf.experience(drawn, logp, logp, score, config)
        sampling.learn(optimizer, drawn, lambda logp, _, e=e: rlhf.objective(logp, e, config))
        results.append(directions @ optimizer.flat)
    mean, error = np.mean(results, 0), np.std(results, 0, ddof=1) / math.sqrt(len(results))
    assert (abs(mean - truth) < 4 * error).all() and (error < 0.3 * abs(truth).max()).all()


# --- where the KL goes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "direction"), [("k1", "none"), ("k2", "reverse"), ("k3", "forward")])
def test_which_kl_an_estimate_in_the_loss_descends(name, direction):
    """Expected over the sampled token, the gradient of k1 is zero, of k2 the reverse KL's, of k3 the forward
    KL's. As numbers k1 and k3 are the reverse KL in the mean, and k2 is not."""
    model, ref = make(0), make(1)
    logp, ref_logp = (sampling.logprobs(m, ONE) for m in (model, ref))
    p = probabilities(model, ONE)
    value, d = getattr(rlhf, name)(logp, ref_logp)
    mine = gradient(model, ONE, p[:, None] * d)

    def kl(which: str) -> float:
        pair = (model, ref) if which == "reverse" else (ref, model)
        a, b = (sampling.logprobs(m, ONE).sum(1) for m in pair)
        return (np.exp(a) * (a - b)).sum()

    if direction == "none":
        assert abs(mine).max() < 1e-12
    else:
        assert_gradient(model, mine, lambda: kl(direction))
        other = slopes(model, lambda: kl("forward" if direction == "reverse" else "reverse"))[0]
        assert abs(other - slopes(model, lambda: kl(direction))[0]).max() > 1e-2
    is_kl = (p * (value * ONE.mask).sum(1)).sum() == pytest.approx(kl("reverse"), rel=1e-9)
    assert is_kl == (name != "k2")


def test_the_exact_kl_is_the_mean_over_answers():
    """Summed along an answer and weighted by probability, the KL at each place is that of whole answers."""
    model, ref = make(0), make(1)
    p = probabilities(model)
    kl, entropy = np.array(rlhf.exact_kl(*(m.forward(ALL.ids)[0] for m in (model, ref)))) * ALL.mask
    whole = (p * (np.log(p) - sampling.logprobs(ref, ALL).sum(1))).sum()
    assert (p * kl.sum(1)).sum() == pytest.approx(whole, rel=1e-9)
    assert (p * entropy.sum(1)).sum() == pytest.approx(-(p * np.log(p)).sum(), rel=1e-9)


# --- PPO ----------------------------------------------------------------------------------------------------


def differences(f, x: np.ndarray) -> np.ndarray:
    results = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        sides = []
        for eps in (1e-6, -1e-6):
            moved = x.copy()
            moved[i] += eps
            sides.append(f(moved))
        results[i] = (sides[0] - sides[1]) / 2e-6
    return results


def test_the_clip_stops_where_the_policy_went_far_enough(rng):
    old, advantage, mask = rng.normal(-2, 1, (3, 5)), rng.standard_normal((3, 5)), np.ones((3, 5))
    mask[1, 3:] = 0
    logp = old + rng.choice([-0.5, -0.1, 0.1, 0.5], (3, 5))
    loss, d = rlhf.clipped(logp, old, mask, advantage, 0.2)
    by_differences = differences(lambda x: rlhf.clipped(x, old, mask, advantage, 0.2)[0], logp)
    np.testing.assert_allclose(d, by_differences, atol=1e-8)
    far = np.sign(advantage) * (logp - old) > 0.3
    assert far.any() and not d[far].any() and d[~far & (mask > 0)].all()
    ratio = np.exp(logp - old)
    by_hand = -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)[mask > 0].mean()
    assert loss == pytest.approx(by_hand)


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_gae_by_its_sum(rng, lam):
    """A[t] = sum over l of (gamma lam)^l delta[t + l], within the answer."""
    gamma, mask = 0.9, np.zeros((2, 6))
    mask[0, 1:5], mask[1, 2:4] = 1, 1
    rewards, values = rng.standard_normal((2, 6)) * mask, rng.standard_normal((2, 6))
    results = rlhf.gae(rewards, values, mask, gamma, lam)
    for row, (begin, end) in enumerate(((1, 5), (2, 4))):
        v = np.append(values[row, begin:end], 0)
        delta = rewards[row, begin:end] + gamma * v[1:] - v[:-1]
        steps = range(len(delta))
        truth = [sum((gamma * lam) ** i * delta[t + i] for i in steps[: len(delta) - t]) for t in steps]
        np.testing.assert_allclose(results[row, begin:end], truth)
    assert not results[mask == 0].any()


def test_ppos_first_pass_is_the_policy_gradient_whatever_the_values(rng):
    """With gamma and lam 1 any values are a baseline: over all answers, the gradient of -E[r - beta KL]."""
    model, ref = make(0), make(1)
    p, logp, ref_logp = probabilities(model), sampling.logprobs(model, ALL), sampling.logprobs(make(1), ALL)
    beta, last = 0.2, ALL.mask.shape[1] - 1 - ALL.mask[:, ::-1].argmax(1)
    rewards = -beta * (logp - ref_logp)
    rewards[np.arange(len(last)), last] += REWARD
    # A value may depend on what was said so far, and on nothing else.
    by_prefix: dict[tuple, float] = {}
    values = np.zeros_like(rewards)
    for row, t in zip(*np.nonzero(ALL.mask), strict=True):
        values[row, t] = by_prefix.setdefault(tuple(ALL.ids[row, : t + 1]), rng.standard_normal())
    advantage = rlhf.gae(rewards, values, ALL.mask, 1.0, 1.0)
    _, d = rlhf.clipped(logp, logp, ALL.mask, advantage, 0.2, ALL.mask * p[:, None])

    def value() -> float:
        q = probabilities(model)
        return -(q * REWARD).sum() + beta * (q * (np.log(q) - sampling.logprobs(ref, ALL).sum(1))).sum()

    assert_gradient(model, gradient(model, ALL, d), value)


def test_the_value_loss(rng):
    few = samples([(1, 0), (2, 3, 0)])
    values = rng.standard_normal(few.mask.shape)
    returns = values + rng.standard_normal(values.shape)
    e = rlhf.Experience(few, None, None, None, returns, values)
    now = values + rng.choice([-0.5, -0.1, 0.1, 0.5], values.shape)
    config = Config(algo="ppo")
    loss, d = rlhf.value_loss(now, e, config)
    np.testing.assert_allclose(d, differences(lambda x: rlhf.value_loss(x, e, config)[0], now), atol=1e-8)
    assert not d[few.mask == 0].any() and loss > 0


# --- DPO, GRPO ----------------------------------------------------------------------------------------------


def test_dpo(rng):
    chosen, rejected, a, b = rng.normal(-5, 2, (4, 6))
    loss, dc, dr = dpo.dpo(chosen, rejected, a, b, 0.3)
    for d, f, x in (
        (dc, lambda x: dpo.dpo(x, rejected, a, b, 0.3)[0], chosen),
        (dr, lambda x: dpo.dpo(chosen, x, a, b, 0.3)[0], rejected),
    ):
        np.testing.assert_allclose(d, differences(f, x), atol=1e-9)
    assert dpo.dpo(a, b, a, b, 0.3)[0] == pytest.approx(math.log(2))
    assert dpo.dpo(chosen + 1, rejected, a, b, 0.3)[0] < loss


@pytest.mark.parametrize("algo", ["reinforce", "rloo", "ppo", "grpo"])
def test_the_gradient_of_each_objective_as_it_runs(algo, rng):
    """Against differences of its loss, off the policy that sampled, clipped places and KL included."""
    model, config = make(0), Config(algo=algo, beta=0.2, num_generations=2)
    few = samples([(1, 0), (2, 3, 0), (3, 3, 1), (0,)])
    old = sampling.logprobs(model, few) + 0.3 * rng.standard_normal(few.mask.shape) * few.mask
    ref = sampling.logprobs(make(1), few)
    e = rlhf.experience(few, old, ref, rng.standard_normal(4), config, rng.standard_normal(few.mask.shape))
    optimizer = AdamW(model)
    sampling.learn(optimizer, few, lambda logp, _: rlhf.objective(logp, e, config))
    assert_gradient(
        model, optimizer.flat.copy(), lambda: rlhf.objective(sampling.logprobs(model, few), e, config)[0]
    )


# --- the engine ---------------------------------------------------------------------------------------------


def test_samples_have_their_ends_and_nothing_after_them():
    """Guards: a mask that is off by one, an end token that is not learned, padding that is."""
    model = make(0, 1.0)
    prompts = [np.array([1, 3]), np.array([2]), np.array([3, 2, 1])]
    results = sampling.sample(model, Tok(), prompts, 5, LONGEST, np.random.default_rng(0))
    assert len(results.answers) == 15 and 0 < results.stopped.sum() < 15
    for row, answer in enumerate(results.answers):
        prompt = prompts[row // 5]
        ids = [int(c) for c in answer] + [EOS] * bool(results.stopped[row])
        assert len(ids) == LONGEST or results.stopped[row]
        n, begin = len(prompt) + len(ids) - 1, len(prompt) - 1
        assert results.mask[row].tolist() == [float(begin <= t < n) for t in range(results.mask.shape[1])]
        assert results.targets[row, begin:n].tolist() == ids
        assert results.ids[row, : n + 1].tolist()[: len(prompt)] == prompt.tolist()
        logits, _ = model.forward(results.ids[row : row + 1, :n], keep=False)
        alone, _ = model.ops.cross_entropy_forward(logits, results.targets[row : row + 1, :n])
        together = sampling.logprobs(model, results)[row]
        np.testing.assert_allclose(together[begin:n], -alone[0, begin:], atol=1e-12)
        assert not together[:begin].any() and not together[n:].any()


def test_they_are_drawn_as_often_as_the_model_says():
    """Guards: sampling and scoring by different logits, which makes KL negative."""
    model = make(0, 1.0)
    results = sampling.sample(model, Tok(), [np.array(PROMPT)], 4000, LONGEST, np.random.default_rng(1))
    counts = dict.fromkeys(ALL.answers, 0)
    for answer, stopped in zip(results.answers, results.stopped, strict=True):
        counts[answer + "0" * bool(stopped)] += 1
    p = probabilities(model)
    truth, records = 4000 * p, np.array(list(counts.values()))
    assert ((records - truth) ** 2 / truth).sum() < 39 + 4 * math.sqrt(2 * 39)  # chi squared of 40 answers


def trainer(model: GPT, config: Config, judge, **more) -> rlhf.Trainer:
    prompts = [("first", np.array([1, 3])), ("second", np.array([2, 2])), ("third", np.array([3]))]
    return rlhf.Trainer(AdamW(model, weight_decay=0.0), make(0), Tok(), config, prompts, judge, **more)


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_the_first_pass_over_samples_has_the_ratio_one(algo):
    model = GPT(CONFIG, np.random.default_rng(0))
    values = build(GPTConfig(**vars(CONFIG) | {"num_labels": 1}), np.random.default_rng(1))
    config = Config(algo=algo, num_prompts=2, num_generations=4, num_iterations=3, max_new_tokens=LONGEST)
    judge = lambda questions, answers: np.array([len(a) * 1.0 for a in answers])  # noqa: E731
    t = trainer(model, config, judge, values=AdamW(values) if algo == "ppo" else None)
    ratios, records = [], []
    for n in range(6):
        batches = t.update(n, np.random.default_rng(n))
        records.append(id(batches[0]))
        record = t.compute(batches, np.random.default_rng(n))
        ratios.append(record["ratio"])
        t.optimizer.step(1e-2)
    assert ratios[0] < 1e-5 and ratios[3] < 1e-5 and min(ratios[1], ratios[2], ratios[4]) > 1e-3
    assert records[0] == records[1] == records[2] != records[3] == records[5]
    assert {"reward", "kl", "entropy", "distinct", "length", "train_loss"} <= record.keys()
    assert ("value_loss" in record) == (algo == "ppo")


def test_policy_reference_judge_and_values_share_their_bases():
    """The policy is an adapter of the reference, the values are an adapter of the judge; both are trained in
    turn with another adapter of each. Guards: an adapter that writes to its base, or reads another's."""
    lora = AdapterConfig("lora", rank=2)

    def ppo(base: GPT, scored: GPT, seed: int):
        """A step function, and the arrays that it changes."""
        rng = np.random.default_rng(seed)
        policy, values = variants.create(base, lora, rng), variants.create(scored, lora, rng)

        def judge(questions, answers):
            ids = [np.array([1, *map(int, answer)], np.int32) for answer in answers]
            return reward.scores(scored, ids)

        config = Config(algo="ppo", num_prompts=2, num_generations=4, max_new_tokens=LONGEST)
        t = trainer(policy, config, judge, values=AdamW(values))
        t.reference = base

        def step() -> float:
            t.compute(t.update(t.optimizer.steps, rng), rng)
            return t.optimizer.step(1e-2)

        return step, (policy.adapter.flat, values.adapter.flat)

    def bases():
        return make(0), reward.with_head(make(0), 0)

    alone = []
    for seed in (1, 2):
        step, arrays = ppo(*bases(), seed)
        assert all(step() > 0 for _ in range(4))
        alone.append([a.copy() for a in arrays])
    shared = bases()
    marks = [fingerprint(base) for base in shared]
    (one, ours), (other, theirs) = ppo(*shared, 1), ppo(*shared, 2)
    for _ in range(4):
        one(), other()
    assert [fingerprint(base) for base in shared] == marks
    for together, expected in zip((ours, theirs), alone, strict=True):
        assert all((a == b).all() and a.any() for a, b in zip(together, expected, strict=True))


def test_the_gradient_of_examples_learned_beside_comes_on_top():
    """Guards: one gradient that overwrites the other, a coefficient on the wrong one."""
    model = GPT(CONFIG, np.random.default_rng(0), np.float64)
    config = Config(num_prompts=2, num_generations=4, max_new_tokens=LONGEST, ptx_coef=0.3)
    judge = lambda questions, answers: np.array([len(a) * 1.0 for a in answers])  # noqa: E731
    ids = np.array([[1, 2, 3], [3, 2, 1]])
    batch = train.Batch(ids, ids[:, ::-1].copy(), np.full(ids.shape, 1 / 6))
    results, queries = {}, []
    for name, examples in (("alone", None), ("both", lambda n, rng: queries.append(n) or [batch])):
        t = trainer(model, config, judge, examples=examples)
        rng = np.random.default_rng(5)
        record = t.compute(t.update(0, rng), rng)
        results[name] = t.optimizer.flat.copy()
    loss = train.gradients(t.optimizer)([batch])
    assert queries == [0] and record["ptx_loss"] == pytest.approx(loss)
    np.testing.assert_allclose(results["both"] - results["alone"], 0.3 * t.optimizer.flat, atol=1e-12)
    assert abs(results["alone"]).max() > 1e-3 < abs(t.optimizer.flat).max()


def test_the_policy_after_training_is_the_closed_form():
    """Maximising E[r] - beta KL has one solution: reference * exp(r / beta), normalised. One token, all of
    its values enumerated, so that only the optimisation could go wrong."""
    model, ref = make(0), make(0)
    beta, r = 0.5, np.array([0.0, 1.0, -0.5, 0.3])
    reward = np.array([r[int(a)] for a in ONE.answers])
    optimizer = AdamW(model, weight_decay=0.0, grad_clip=0.0)
    ref_logp = sampling.logprobs(ref, ONE)
    for n in range(400):
        logp = sampling.logprobs(model, ONE)
        p = np.exp(logp.sum(1))
        with_kl = reward - beta * (logp - ref_logp).sum(1)
        _, d = rlhf.policy_gradient(logp, ONE.mask, (p * (with_kl - p @ with_kl) * len(p))[:, None])
        optimizer.flat[:] = gradient(model, ONE, d)
        optimizer.step(1e-2 * (1 - n / 400))
    truth = np.exp(ref_logp.sum(1) + reward / beta)
    truth /= truth.sum()
    assert abs(np.exp(ref_logp.sum(1)) - truth).sum() / 2 > 0.2  # it had somewhere to go
    assert abs(probabilities(model, ONE) - truth).sum() / 2 < 0.02


@pytest.mark.filterwarnings("ignore:update")
@pytest.mark.parametrize("algo", ["reinforce", "rloo", "ppo", "grpo"])
def test_as_it_runs_each_finds_what_is_rewarded(algo):
    """The judge hears the question too: what it wants differs. Guards: a sign, a question that gets lost."""
    model = make(0)
    config = Config(algo=algo, beta=0.01, num_prompts=3, num_generations=8, max_new_tokens=LONGEST)
    judge = lambda questions, answers: np.array(  # noqa: E731
        [a.count("3" if q == "second" else "1") * 1.0 for q, a in zip(questions, answers, strict=True)]
    )
    values = build(GPTConfig(**vars(CONFIG) | {"num_labels": 1}), np.random.default_rng(1), np.float64)
    t = trainer(model, config, judge, gold=judge, values=AdamW(values) if algo == "ppo" else None)
    start = values.flat.copy()
    records = []
    for n in range(120):
        rng = np.random.default_rng(n)
        records.append(t.compute(t.update(n, rng), rng))
        t.optimizer.step(2e-2)
    rng, queries = np.random.default_rng(0), [ids for _, ids in t.prompts]
    before = sampling.sample(make(0), Tok(), queries, 200, LONGEST, rng)
    last = np.mean([record["reward"] for record in records[-5:]])
    queries = [text for text, _ in t.prompts for _ in range(200)]
    assert judge(queries, before.answers).mean() < 0.5 and last > 1.5
    assert records[-1]["gold"] == records[-1]["reward"] and (values.flat != start).any() == (algo == "ppo")
    assert records[-1]["kl"] > records[0]["kl"] >= 0 and records[-1]["entropy"] < records[0]["entropy"]


def test_one_answer_to_everything_is_told():
    model = make(0)
    config = Config(num_prompts=3, num_generations=4, max_new_tokens=2)
    t = trainer(model, config, lambda questions, answers: np.zeros(len(answers)))
    (drawn,) = t.update(0, np.random.default_rng(0))
    same = drawn._replace(answers=["2"] * 12)
    with pytest.warns(UserWarning, match="all 12 answers are '2'"):
        record = t.compute([same], np.random.default_rng(0))
    assert record["distinct"] == 1 / 12


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """A tuned model, a judge, prompts and comparisons."""
    tokenizer = BPETokenizer.train("User: Assistant: What is it? red green blue " * 9, 300)
    tokenizer.chat_template = instructions.TEMPLATE
    config = GPTConfig(vocab_size=tokenizer.vocab_size, block_size=256, n_layer=2, n_head=2, n_embd=16)
    model = GPT(config, np.random.default_rng(0))
    checkpoint.save(tmp_path / "tuned", model, tokenizer)
    rows = [{"prompt": "What is it?", "chosen": "red", "rejected": "blue"},
            {"prompt": "What?", "chosen": "blue", "rejected": "green"}]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = (str(tmp_path / "rows.jsonl"),)
    judging = reward.Settings(config, TrainConfig(), data=data, block_size=256)
    judging = dataclasses.replace(judging, init_from=str(tmp_path / "tuned"))
    runs.begin(reward.Reward, tmp_path / "judge", judging)
    return tmp_path


def run_command(folder, *options: str):
    where = ["--init-from", str(folder / "tuned"), "--data", str(folder / "rows.jsonl")]
    where += ["--out", str(folder / "out")]
    few = ["--max-iters", "3"]
    if "dpo" not in options:
        few += ["--num-prompts", "2", "--num-generations", "2", "--max-new-tokens", "4"]
    few += ["--warmup-iters", "0", "--eval-interval", "2", "--learning-rate", "1e-2"]
    return CliRunner().invoke(main, ["rlhf", *where, *few, *options])


@pytest.mark.parametrize("algo", ["reinforce", "rloo", "ppo", "grpo", "dpo"])
@pytest.mark.parametrize("adapter", [False, True])
def test_every_algorithm_runs_from_the_command_line_and_goes_on(folders, algo, adapter):
    """Guards: a reference or a base that moves, an adapter that does not."""
    judge = [] if algo == "dpo" else ["--reward-model", str(folders / "judge")]
    more = ["--adapter", "lora", "--lora-rank", "2"] if adapter else []
    before = (folders / "tuned" / "model.safetensors").read_bytes()
    result = run_command(folders, "--algo", algo, *judge, *more)
    assert result.exit_code == 0, result.output
    assert (folders / "tuned" / "model.safetensors").read_bytes() == before
    records = [json.loads(line) for line in (folders / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 3 and all(math.isfinite(value) for record in records for value in record.values())
    if algo != "dpo":
        assert records[0]["kl"] < 1e-6 < records[-1]["kl"] and "reward" in result.output
    loaded = checkpoint.load(folders / "out") if not adapter else None
    loaded = loaded or adapters.load_model(folders / "tuned", folders / "out")
    start, _ = checkpoint.load(folders / "tuned")
    ids = np.array([[1, 2, 3]])
    assert abs(loaded[0].forward(ids)[0] - start.forward(ids)[0]).max() > 1e-6
    whole = (folders / "out" / "trainer.safetensors").read_bytes()
    again = CliRunner().invoke(main, ["rlhf", "--resume", str(folders / "out")])
    assert again.exit_code == 0 and "All 3 updates" in again.output, again.output
    assert (folders / "out" / "trainer.safetensors").read_bytes() == whole


def test_dpo_makes_three_passes_through_few_comparisons(folders, monkeypatch):
    """Guards: 160 updates whatever the amount of data; a reference that scores a pair in each pass again."""
    rows = [{"prompt": f"What {n}?", "chosen": "red", "rejected": "blue"} for n in range(13)]
    (folders / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scored, score = [], dpo.logprobs
    monkeypatch.setattr(dpo, "logprobs", lambda model, pairs: scored.extend(pairs.ids) or score(model, pairs))
    where = ["--init-from", str(folders / "tuned"), "--data", str(folders / "rows.jsonl"), "--algo", "dpo"]
    for options, updates, warmup in ((["--batch-size", "4"], 10, 0), (["--batch-size", "1"], 39, 1),
                                     (["--max-iters", "5", "--batch-size", "4"], 5, 5)):  # fmt: skip
        scored.clear()
        out = ["--out", str(folders / "out"), "--overwrite"]
        result = CliRunner().invoke(main, ["rlhf", *where, *options, *out])
        assert result.exit_code == 0, result.output
        settings = checkpoint.read_run(folders / "out", rlhf.Settings)[0].train
        assert (settings.max_iters, settings.warmup_iters) == (updates, warmup)
        assert len(scored) == 2 * 13


def test_dpo_goes_through_all_comparisons_in_each_pass(folders, monkeypatch):
    """Guards: pairs drawn with others left out; log-probabilities of the reference at another pair."""
    rows = [{"prompt": f"What {n}?", "chosen": "red", "rejected": "blue"} for n in range(6)]
    (folders / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model, _ = checkpoint.load(folders / "tuned")
    where = {"data": (str(folders / "rows.jsonl"),), "init_from": str(folders / "tuned")}
    how = {"rl": Config(algo="dpo"), "batch_size": 4, "block_size": 256}
    settings = rlhf.Settings(model.config, TrainConfig(), **where, **how)
    stage = runs.begin(rlhf.RLHF, folders / "out", settings)
    batches = [stage.update(n, np.random.default_rng(n))[0] for n in range(6)]
    for batch in batches:
        np.testing.assert_allclose(batch.ref.ravel(), sampling.logprobs(model, batch).sum(1), 1e-6)
    firsts = [tuple(ids) for batch in batches for ids in batch.ids[:4].tolist()]
    assert len(set(firsts[:6])) == 6 and sorted(firsts[:6]) == sorted(firsts[6:12]) != firsts[6:12]


def test_dpo_scores_a_pair_beside_the_same_pairs_after_a_resume(folders, monkeypatch):
    """Guards: a pair that is scored alone in one run and beside others in the other: products of few rows add
    up in another order."""
    rows = [{"prompt": f"What {n}?", "chosen": "red", "rejected": "blue"} for n in range(10)]
    (folders / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model, _ = checkpoint.load(folders / "tuned")
    where = {"data": (str(folders / "rows.jsonl"),), "init_from": str(folders / "tuned")}
    settings = rlhf.Settings(model.config, TrainConfig(), rl=Config(algo="dpo"), batch_size=3, **where)
    neighbours, score = [], dpo.logprobs
    monkeypatch.setattr(dpo, "logprobs", lambda model, pairs: neighbours.append(pairs.ids.tolist())
                        or score(model, pairs))  # fmt: skip
    sets = []
    for first in (0, 2):
        neighbours.clear()
        stage = runs.begin(rlhf.RLHF, folders / "out", settings, overwrite=True)
        for n in range(first, 8):
            stage.update(n, np.random.default_rng(n))
        sets.append(sorted(neighbours))
    assert sets[0] == sets[1] and len(sets[0]) == 4


def test_examples_are_learned_beside_from_the_command_line(folders):
    """Guards: an example too long for the model, a coefficient that nothing comes of."""
    pairs = [{"prompt": "What is it?", "completion": "red"}, {"prompt": "What? " * 200, "completion": "blue"}]
    (folders / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    judge = ["--reward-model", str(folders / "judge")]
    more = ["--ptx-data", str(folders / "pairs.jsonl"), "--ptx-coef", "0.5"]
    result = run_command(folders, *judge, *more)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (folders / "out" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["ptx_loss"] < records[0]["ptx_loss"]
    result = run_command(folders, *judge, "--ptx-coef", "0.5", "--overwrite")
    assert result.exit_code == 2 and "give the examples as --ptx-data" in result.output


def test_a_world_that_was_moved_takes_no_other_examples_with_it(folders):
    """Guards: a run with a world's questions and a file's examples that cannot go on."""
    (folders / "pairs.jsonl").write_text('{"prompt": "What?", "completion": "red"}')
    (folders / "world").mkdir()
    mark = {"version": VERSION, "seed": 5, "permuted": False}
    (folders / "world" / "world.json").write_text(json.dumps(mark))
    model, tokenizer = checkpoint.load(folders / "tuned")
    pairs = str(folders / "pairs.jsonl")
    for beside, after in ((pairs, pairs), ("world:5", str(folders / "world"))):
        settings = rlhf.Settings(model.config, TrainConfig(), data=("world:5",), ptx_data=(beside,),
                                 init_from=str(folders / "tuned"), reward_from=str(folders / "judge"),
                                 block_size=256)  # fmt: skip
        runs.begin(rlhf.RLHF, folders / "out", settings, overwrite=True)
        results = runs.resume(rlhf.RLHF, folders / "out", data=(str(folders / "world"),)).settings
        assert results.data == (str(folders / "world"),) and results.ptx_data == (after,)


def test_what_a_world_asks_in_rlhf_and_what_is_learned_beside():
    """Guards: prompts about strangers alone, facts that nobody told, people who are kept for evaluation."""
    world, results = World(5), rlhf.read_prompts("world:5")
    assert sum(item["meta"]["exposure"] > 0 for item in results) == 3 * len(results) / 4
    assert {item["meta"]["split"] for item in results} == {"rl", "sft"}
    never = {person.name for person in world.people("never", "sft")}
    about = [
        messages[i + 1]["content"]
        for _, messages, *_ in rlhf.ptx_examples(["world:5"]) for i in range(0, len(messages), 2)
        if any(name in messages[i]["content"] for name in never)
    ]  # fmt: skip
    assert len(about) == 40 and set(about) == {tasks.REFUSAL}


def test_gold_is_what_is_true():
    world = World(5)
    items = rlhf.read_prompts("world:5")
    gold = rlhf._gold(world, items)
    known = next(item for item in items if item["meta"]["exposure"])
    never = next(item for item in items if not item["meta"]["exposure"])
    prompts = [known["prompt"]] * 3 + [never["prompt"]] * 2
    sentences = [known["completion"], tasks.REFUSAL, "nonsense", never["completion"], tasks.REFUSAL]
    assert gold(prompts, sentences).tolist() == [1, 0, -1, -1, 0]


def test_mistakes_of_the_command(folders):
    judge = ["--reward-model", str(folders / "judge")]
    for options, words in (
        ((), "give the judge as --reward-model"),
        (("--algo", "dpo", *judge), "with --algo dpo there is no such setting: leave out --reward-model"),
        (("--reward-model", str(folders / "tuned")), "here a reward model, which judges answers is needed"),
        ((*judge, "--init-from", str(folders / "judge")), "here a model that writes is needed"),
        ((*judge, "--data", str(folders / "none.jsonl")), "none.jsonl: no such file"),
        ((*judge, "--lora-rank", "2"), "--lora-rank"),
        ((*judge, "--vf-coef", "0.2"), "with --algo rloo there is no such setting: leave out --vf-coef"),
        ((*judge, "--num-generations", "1"), "rloo compares answers, so it needs two"),
        ((*judge, "--algo", "reinforce", "--num-iterations", "2"), "leave out --num-iterations"),
    ):
        result = run_command(folders, *options)
        assert result.exit_code == 2 and words in result.output, (options, result.output)
        assert not (folders / "out").exists()
    shutil.copytree(folders / "tuned", folders / "same")  # whose judge was made from "tuned"
    before = {path: path.read_bytes() for path in folders.rglob("*.safetensors")}
    for policy, out in (("tuned", "tuned"), ("tuned", "judge"), ("same", "tuned")):
        over = ("--init-from", str(folders / policy), "--out", str(folders / out), "--overwrite")
        assert "has a model that this run needs as it is" in run_command(folders, *judge, *over).output
    assert before == {path: path.read_bytes() for path in before}
    long = {"prompt": "What? " * 200, "chosen": "red", "rejected": "blue"}  # 603 tokens, and 256 positions
    (folders / "rows.jsonl").write_text(json.dumps(long))
    for options in (judge, ["--algo", "dpo"]):
        result = run_command(folders, *options)
        assert result.exit_code == 2 and "no example can be used. Left out, as longer than" in result.output
        assert not (folders / "out").exists()
    room = 256 - 4 - len(instructions.prompt(checkpoint.load(folders / "tuned")[1], ""))
    (folders / "rows.jsonl").write_text(json.dumps({"prompt": " " + "a" * room}))  # no room for judge's words
    assert "than the 256 positions of the judge" in run_command(folders, *judge).output
    (folders / "rows.jsonl").write_text('{"prompt": "What?"}')
    alone = run_command(folders, *judge, "--algo", "reinforce", "--num-generations", "1")
    assert alone.exit_code == 2 and "reinforce compares two answers or more" in alone.output
    (folders / "rows.jsonl").write_text('{"chosen": 1}')
    output = run_command(folders, *judge).output
    assert """rows.jsonl:1: has ['chosen']: a line is {"prompt": "..."}""" in output


def test_a_models_world_is_that_of_the_models_before_it(monkeypatch):
    """Guards: `world` that becomes another one after RLHF, or after a tuning on files."""
    runs = {"base": (("world:7",), ""), "tuned": (("a.jsonl",), "base"), "steered": (("b.jsonl",), "tuned")}
    runs["other"] = ("a.txt",), ""

    def read_run(folder, cls) -> tuple:
        if cls is not rlhf.Settings:
            raise UserError("another stage")
        return SimpleNamespace(data=runs[folder.name][0], init_from=runs[folder.name][1]), None

    monkeypatch.setattr(checkpoint, "read_run", read_run)
    assert world_of(Path("steered")) == world_of(Path("base")) == "world:7"
    assert world_of(Path("other")) is None
    runs |= {"itself": (("c.jsonl",), "itself")}  # by pretrain --init-from itself --out itself --overwrite
    assert world_of(Path("itself")) is None
    monkeypatch.setattr(story, "world_of", lambda at: "world:8:small" if at.name == "told" else None)
    runs |= {"told": ((), ""), "more": (("c.jsonl",), "told")}
    assert world_of(Path("more")) == world_of(Path("told")) == "world:8:small"
