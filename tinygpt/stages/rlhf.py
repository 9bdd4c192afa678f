"""RLHF: samples of the model's own answers, judged by a reward model, steer it by policy gradients.

    maximise  E[ r(x, y) ] - beta KL(policy || reference),    y sampled from the policy

One engine samples and scores answers. An algorithm is an objective: from log-probabilities of the sampled
tokens, a loss and its gradient by them, d. What d does to the weights is what a weighted cross-entropy with
weights -d does: a policy gradient is supervised learning of one's own answers, the better the more.

    reinforce   -A logp                        A = r - mean of the others of the update
    rloo        -min(q A, clip(q) A)           A = r - mean of the other answers to the same question
    ppo         -min(q A, clip(q) A)           A from values by GAE
    grpo        -min(q A, clip(q) A) + beta k3 A = (r - mean) / deviation, of answers to the same question
    dpo         -log sigmoid(beta margin)      no samples: from comparisons

q is the policy as it is over the policy that sampled, of a whole answer in RLOO, of a token in PPO and GRPO.
The first three have the KL in the reward, r = score - beta log(policy / reference), GRPO in the loss, DPO in
its derivation. k1, k2, k3 estimate it from samples; what is reported is exact, over the vocabulary.
On top of each may come the loss of the tuning's own examples (ptx), which keeps what they taught.

References: Williams 1992 (REINFORCE); Ahmadian et al. 2024 (RLOO); Schulman et al. 2015, 2017 (GAE, PPO);
Shao et al. 2024 (GRPO); Rafailov et al. 2023 (DPO); Ziegler et al. 2019, Ouyang et al. 2022 for the whole.
"""

import dataclasses
import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..core import train
from ..core.generate import generate
from ..core.model import GPT
from ..core.optim import AdamW
from ..errors import UserError
from ..folders import adapters, checkpoint, runs
from ..text import instructions
from ..text.data import Array, Tokenizer, shuffled_places
from ..world import World, corpus, preferences, tasks
from . import evaluate as world_evaluate
from . import reward, sft, variants
from .adapter import fingerprint


@dataclasses.dataclass(frozen=True)
class Config:
    """How to sample and to learn from samples, under the names of TRL."""

    algo: str = "rloo"  # or reinforce, ppo, grpo, dpo
    beta: float = 0.4  # how much a nat of KL costs
    num_prompts: int = 16  # of an update
    num_generations: int = 8  # answers to each
    max_new_tokens: int = 16
    num_iterations: int = 1  # updates from the same samples; a resume between them draws new ones
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    ptx_coef: float = 0.0  # weight of the loss of examples beside: Ouyang et al. 2022, equation 2


# --- sampling -----------------------------------------------------------------------------------------------


class Samples(NamedTuple):
    """N answers, those to one question side by side. Padding is on the right: nothing sees it."""

    ids: Array  # (N, T) prompt, answer, padding
    targets: Array  # (N, T)
    mask: Array  # (N, T): 1 where the target is a token of the answer, its end included
    answers: list[str]
    stopped: Array  # (N,)


def sample(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[Array], count: int, max_new_tokens: int,
    rng: np.random.Generator,
) -> Samples:  # fmt: skip
    """`count` answers to each prompt (ids), drawn from the model as it is: temperature 1, nothing ruled out.

    One of max_new_tokens without an end is scored all the same, as if it had ended there.
    """
    asked = [prompt for prompt in prompts for _ in range(count)]
    stop = {tokenizer.eos_id}
    new = generate(model, asked, max_new_tokens, temperature=1.0, stop=stop, rng=rng,
                   vocab_size=tokenizer.vocab_size)  # fmt: skip
    return answered(tokenizer, asked, new)


def answered(tokenizer: Tokenizer, asked: Sequence[Array], new: Sequence[Array]) -> Samples:
    """Prompts and their answers (ids, with the end-of-text id where they end) as `Samples`."""
    whole = [np.concatenate(pair) for pair in zip(asked, new, strict=True)]
    shape = len(whole), max(map(len, whole)) - 1
    ids, targets, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for row, (text, prompt) in enumerate(zip(whole, asked, strict=True)):
        n = len(text) - 1
        ids[row, :n], targets[row, :n], mask[row, len(prompt) - 1 : n] = text[:-1], text[1:], 1
    stopped = np.array([len(a) > 0 and a[-1] == tokenizer.eos_id for a in new])
    answers = [tokenizer.decode(a[: len(a) - end]).strip() for a, end in zip(new, stopped, strict=True)]
    return Samples(ids, targets, mask, answers, stopped)


def logprobs(model: GPT, samples: Samples) -> Array:
    """log p of each target (N, T), float64, 0 where the mask is 0."""
    logits, _ = model.forward(samples.ids, keep=False)
    nll, _ = model.ops.cross_entropy_forward(logits, samples.targets)
    return -(nll * samples.mask).astype(np.float64)


def exact_kl(logits: Array, reference: Array) -> tuple[Array, Array]:
    """KL(policy || reference) and the policy's entropy over the whole vocabulary, in nats: of the logits of
    both, (..., V), two arrays (...)."""
    logp, other = _log_softmax(logits), _log_softmax(reference)
    p = np.exp(logp)
    return np.einsum("...v,...v", p, logp - other), -np.einsum("...v,...v", p, logp)


def _log_softmax(logits: Array) -> Array:
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


# --- advantages ---------------------------------------------------------------------------------------------


def leave_one_out(r: Array) -> Array:
    """r - mean of the others, along the last axis: a baseline that does not depend on the sample."""
    n = r.shape[-1]
    return (r - r.mean(-1, keepdims=True)) * (n / max(n - 1, 1))


def standardised(r: Array) -> Array:
    """(r - mean) / deviation, along the last axis, as GRPO and TRL have it, with n - 1 in the variance."""
    spread = r.std(-1, ddof=1, keepdims=True) if r.shape[-1] > 1 else 0.0
    return (r - r.mean(-1, keepdims=True)) / (spread + 1e-4)


def gae(rewards: Array, values: Array, mask: Array, gamma: float, lam: float) -> Array:
    """Advantages (N, T) of the masked places: A[t] = d[t] + gamma lam A[t + 1], with d[t] = r[t] + gamma
    V[t + 1] - V[t], and V and A 0 after the last place. Schulman et al. 2015, equation 16."""
    found, after, value = np.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t] > 0
        delta = rewards[:, t] + gamma * value - values[:, t]
        after = np.where(here, delta + gamma * lam * after, 0.0)
        value = np.where(here, values[:, t], 0.0)
        found[:, t] = after
    return found


# --- objectives: from logp (N, T) of the sampled tokens, the loss and d loss / d logp -----------------------


def policy_gradient(logp: Array, mask: Array, advantage: Array) -> tuple[float, Array]:
    """-A log p(answer), mean over the answers: in expectation its gradient is that of -E[r], though it is no
    measure of anything itself. advantage (N, T) or (N, 1)."""
    weights = advantage * mask / len(logp)
    return float(-(weights * logp).sum()), -weights


def clipped(
    logp: Array, old: Array, mask: Array, advantage: Array, cliprange: float, per_token: Array | None = None
) -> tuple[float, Array]:
    """-min(q A, clip(q, 1 - c, 1 + c) A) with q = exp(logp - old). Where the clip decides there is no
    gradient: the policy has gone far enough that way. Schulman et al. 2017, equation 7.

    per_token (N, T): how much each place counts; by default all places alike, 1 in sum.
    """
    weights = mask / max(mask.sum(), 1) if per_token is None else per_token
    ratio = np.exp(logp - old)
    plain, held = ratio * advantage, np.clip(ratio, 1 - cliprange, 1 + cliprange) * advantage
    return float(-(weights * np.minimum(plain, held)).sum()), np.where(plain <= held, -weights * plain, 0.0)


# Estimates of the KL by a sampled token, and their derivatives by its logp; GRPO takes the last.


def k1(logp: Array, ref: Array) -> tuple[Array, Array]:
    """log(policy / reference): unbiased as a number; in the loss its gradient is zero in the mean."""
    return logp - ref, np.ones_like(logp)


def k2(logp: Array, ref: Array) -> tuple[Array, Array]:
    """Half its square: biased as a number; its gradient is that of the reverse KL, KL(policy || ref)."""
    return (logp - ref) ** 2 / 2, logp - ref


def k3(logp: Array, ref: Array) -> tuple[Array, Array]:
    """reference / policy - 1 - log of it: unbiased and never negative; its gradient is, in the mean, that of
    the forward KL, KL(reference || policy). Schulman 2020, "Approximating KL divergence"."""
    ratio = np.exp(ref - logp)
    return ratio - 1 - (ref - logp), 1 - ratio


def dpo(chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, beta: float):
    """-log sigmoid(beta (log-ratio of the chosen - that of the rejected)), the mean over N pairs, from the
    log-probabilities of whole answers (N,); its gradient by the first two. Rafailov et al. 2023, eq. 7."""
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    d = -beta / (1 + np.exp(margin)) / len(margin)
    return float(np.logaddexp(0, -margin).mean()), d, -d


# --- one update ---------------------------------------------------------------------------------------------


class Experience(NamedTuple):
    """What an objective knows of samples."""

    samples: Samples
    old: Array  # (N, T) log p under the policy that sampled
    ref: Array  # (N, T) under the reference
    scores: Array  # (N,) of the reward model
    advantage: Array  # (N, T) or (N, 1)
    returns: Array | None = None  # (N, T), what the values of PPO are to become
    values: Array | None = None  # (N, T), what they were


def experience(
    samples: Samples, old: Array, ref: Array, scores: Array, config: Config, values: Array | None = None
) -> Experience:
    """Advantages from scores (N,), by the algorithm."""
    mask, groups = samples.mask, (-1, config.num_generations)
    with_kl = scores - config.beta * (old - ref).sum(1)
    if config.algo == "ppo":
        rewards = -config.beta * (old - ref)
        last = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
        rewards[np.arange(len(last)), last] += scores
        advantage = gae(rewards, values, mask, config.gamma, config.lam)
        returns = advantage + values
        mean = (advantage * mask).sum() / mask.sum()
        spread = math.sqrt((mask * (advantage - mean) ** 2).sum() / mask.sum())
        return Experience(samples, old, ref, scores, (advantage - mean) / (spread + 1e-8), returns, values)
    if config.algo == "grpo":
        advantage = standardised(scores.reshape(groups)).ravel()
    elif config.algo == "rloo":
        advantage = leave_one_out(with_kl.reshape(groups)).ravel()
    else:
        advantage = leave_one_out(with_kl)
    return Experience(samples, old, ref, scores, advantage[:, None])


def objective(logp: Array, e: Experience, config: Config) -> tuple[float, Array]:
    """The loss of an algorithm and d loss / d logp, both (N, T)."""
    mask = e.samples.mask
    if config.algo == "ppo":
        return clipped(logp, e.old, mask, e.advantage, config.cliprange)
    if config.algo == "grpo":
        weights = mask / np.maximum(mask.sum(1, keepdims=True), 1) / len(mask)
        loss, d = clipped(logp, e.old, mask, e.advantage, config.cliprange, weights)
        kl, dkl = k3(logp, e.ref)
        return loss + float(config.beta * (weights * kl).sum()), d + config.beta * weights * dkl
    if config.algo == "rloo":
        whole, old = logp.sum(1, keepdims=True), e.old.sum(1, keepdims=True)
        loss, d = clipped(whole, old, np.ones_like(whole), e.advantage, config.cliprange)
        return loss, d * mask
    return policy_gradient(logp, mask, e.advantage)


def learn(
    optimizer: AdamW, samples: Samples, objective: Callable[[Array, Array], tuple[float, Array]]
) -> float:
    """Puts the gradients of objective(logp (N, T), logits (N, T, V)) into `optimizer.flat`; the loss."""
    model = optimizer.model
    logits, cache = model.forward(samples.ids)
    nll, c_nll = model.ops.cross_entropy_forward(logits, samples.targets)
    loss, d = objective(-(nll * samples.mask).astype(np.float64), logits)
    weights = (-d * samples.mask).astype(logits.dtype)
    dlogits = model.ops.cross_entropy_backward(weights, c_nll)
    del logits, c_nll  # the largest arrays of all
    model.backward(dlogits, cache, optimizer.grads)
    return loss


def value_loss(values: Array, e: Experience, config: Config) -> tuple[float, Array]:
    """Half the squared distance of PPO's values (N, T) to the returns, clipped as the ratio is, and its
    gradient by them: none where the clip decides."""
    mask = e.samples.mask / e.samples.mask.sum()
    near = np.clip(values, e.values - config.cliprange_value, e.values + config.cliprange_value)
    plain, held = values - e.returns, near - e.returns
    worse = plain**2 >= held**2
    loss = 0.5 * (mask * np.maximum(plain**2, held**2)).sum()
    return float(loss), mask * np.where(worse, plain, 0.0)


class Comparisons(NamedTuple):
    """What DPO learns from: N chosen answers, then the N rejected ones; the reference's log p of each."""

    samples: Samples
    ref: Array  # (2 N,)

    @property
    def ids(self) -> Array:
        return self.samples.ids


def compared(tokenizer: Tokenizer, reference: GPT, pairs: Sequence[reward.Comparison]) -> Comparisons:
    """Comparisons as DPO takes them: question, answer and the end-of-text token."""
    asked = [instructions.prompt(tokenizer, pair.prompt) for pair in pairs]
    texts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    samples = answered(tokenizer, asked * 2, [_answer_ids(tokenizer, text) for text in texts])
    return Comparisons(samples, logprobs(reference, samples).sum(1))


def _answer_ids(tokenizer: Tokenizer, text: str) -> Array:
    """The ids of an answer, with its end."""
    return np.append(tokenizer.encode(f" {text.strip()}"), np.int32(tokenizer.eos_id))


def dpo_loss(logp: Array, logits: Array | None, c: Comparisons, beta: float) -> tuple[float, Array]:
    """`dpo` of log-probabilities by token, (2 N, T), and its gradient by them, for `learn`."""
    (chosen, rejected), refs = np.split(logp.sum(1), 2), np.split(c.ref, 2)
    loss, dchosen, drejected = dpo(chosen, rejected, *refs, beta)
    return loss, np.concatenate([dchosen, drejected])[:, None] * c.samples.mask


class Rollout(NamedTuple):
    """Samples, and what others think of them."""

    samples: Samples
    questions: list[str]
    scores: Array  # (N,) of the judge
    ref: Array  # (N, T) log p under the reference
    ref_logits: Array  # (places of answers, V)
    values: Array | None  # (N, T), of PPO

    @property
    def ids(self) -> Array:
        return self.samples.ids


Judging = Callable[[list[str], list[str]], Array]  # questions, answers -> scores (N,)


@dataclasses.dataclass(eq=False)
class Trainer:
    """What updates from samples need: `batches` and `compute` are for `train.train`."""

    optimizer: AdamW  # of the policy
    reference: GPT
    tokenizer: Tokenizer
    config: Config
    prompts: Sequence[tuple[str, Array]]  # a question's text, its ids
    judge: Judging
    values: AdamW | None = None  # of PPO
    gold: Judging | None = None
    seed: int = 0
    value_rate: Callable[[int], float] = lambda n: 1e-4  # of update n, counted from 0
    examples: Callable[[int], Sequence[train.Batch]] | None = None  # learned beside, likewise

    def __post_init__(self) -> None:
        self.last, self.warned = None, False
        self.experience: Experience | None = None  # of the last rollout, from its first update on
        self.learn_examples = train.gradients(self.optimizer)

    def batches(self, n: int, rng: np.random.Generator) -> list[Rollout]:
        """For update n, samples of the policy as it is; the same again for `num_iterations` updates."""
        c = self.config
        if n % c.num_iterations and self.last is not None:
            return [self.last]
        B = min(c.num_prompts, len(self.prompts))
        places = shuffled_places(len(self.prompts), B, n // c.num_iterations, self.seed)
        picked = [self.prompts[place] for place in places]
        model = self.optimizer.model
        samples = sample(model, self.tokenizer, [ids for _, ids in picked], c.num_generations,
                         c.max_new_tokens, rng)  # fmt: skip
        questions = [text for text, _ in picked for _ in range(c.num_generations)]
        logits, _ = self.reference.forward(samples.ids, keep=False)
        nll, _ = self.reference.ops.cross_entropy_forward(logits, samples.targets)
        ref, ref_logits = -(nll * samples.mask).astype(np.float64), logits[samples.mask > 0]
        values = None
        if self.values is not None:
            outputs, _ = self.values.model.forward(samples.ids, keep=False)
            values = outputs[..., 0].astype(np.float64)
        scores = self.judge(questions, samples.answers)
        self.last, self.experience = Rollout(samples, questions, scores, ref, ref_logits, values), None
        return [self.last]

    def compute(self, batches, rng: np.random.Generator) -> train.Record:
        """For `train.train`: the gradients of one update, and what there is to watch."""
        (r,), config, optimizer = batches, self.config, self.optimizer
        mask, N = r.samples.mask, len(r.scores)
        b, t = np.nonzero(mask)
        record = {"train_loss": 0.0, "reward": float(r.scores.mean())}

        def loss(logp: Array, logits: Array) -> tuple[float, Array]:
            if self.experience is None:  # the policy has not changed since it sampled
                self.experience = experience(r.samples, logp, r.ref, r.scores, config, r.values)
            parts = (exact_kl(logits[b[i : i + 64], t[i : i + 64]], r.ref_logits[i : i + 64])
                     for i in range(0, len(b), 64))  # a copy of all logits would be the largest thing here
            kl, entropy = map(np.concatenate, zip(*parts, strict=True))
            record.update(
                kl=float(kl.sum() / N), kl_k1=float((self.experience.old - r.ref).sum() / N),
                entropy=float(entropy.mean()),
                ratio=float(abs(np.exp(logp - self.experience.old) - 1).max()),
            )  # fmt: skip
            return objective(logp, self.experience, config)

        record["train_loss"] = learn(optimizer, r.samples, loss)
        record |= {"length": float(mask.sum() / N), "distinct": len(set(r.samples.answers)) / N}
        if self.examples is not None:
            of_samples, examples = optimizer.flat.copy(), self.examples(optimizer.steps)
            record["ptx_loss"] = self.learn_examples(examples, rng)
            optimizer.flat *= config.ptx_coef
            optimizer.flat += of_samples
        if self.gold is not None:
            record["gold"] = float(self.gold(r.questions, r.samples.answers).mean())
        if self.values is not None:
            record["value_loss"] = self._learn_values(self.experience)
        if len(set(r.samples.answers)) == 1 < N and not self.warned:
            self.warned = True
            same = f"update {optimizer.steps + 1}: all {N} answers are {r.samples.answers[0]!r}"
            warnings.warn(f"{same}: a larger beta or a lower rate keeps them apart", stacklevel=2)
        return record

    def _learn_values(self, e: Experience) -> float:
        model = self.values.model
        outputs, cache = model.forward(e.samples.ids)
        loss, d = value_loss(outputs[..., 0].astype(np.float64), e, self.config)
        model.backward((self.config.vf_coef * d)[..., None].astype(outputs.dtype), cache, self.values.grads)
        self.values.step(self.value_rate(self.optimizer.steps))
        return loss


def trainer(
    optimizer: AdamW, reference: GPT, judge: reward.Judge, items: Sequence[tasks.Item], config: Config,
    how: train.TrainConfig, world: World | None = None, examples: Sequence[list[instructions.Message]] = (),
) -> Trainer:  # fmt: skip
    """A Trainer for questions {"prompt": ...}; of a world it knows what simulated people would feel.

    examples: conversations that are learned beside, as many as fit the model, if config.ptx_coef is not 0.
    """
    asked = [(item["prompt"], instructions.prompt(judge.tokenizer, item["prompt"])) for item in items]
    values = how.optimizer(judge.model.copy()) if config.algo == "ppo" else None
    gold, beside = _gold(world, items) if world else None, None
    tokenizer, size = judge.tokenizer, optimizer.model.context
    examples = examples if config.ptx_coef else ()
    fit = [said for said in examples if len(instructions.encode(tokenizer, said)[0]) <= size]
    if fit:
        rows = sft.Settings(model=reference.config, train=how, block_size=size, batch_size=4)
        beside = sft.updates(tokenizer, fit, rows)
    return Trainer(optimizer, reference, tokenizer, config, asked, judge, values, gold, how.seed,
                   how.learning_rate_at, beside)  # fmt: skip


# --- a run in a folder --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings(runs.Settings):
    """Those of every run. data: files with a prompt in each line, or worlds; for DPO, comparisons."""

    stage: str = "rlhf"
    rl: Config = Config()
    reward_from: str = ""  # the folder of the judge
    reward_hash: str = ""  # of its weights
    ptx_data: tuple[str, ...] = ()  # examples that are learned beside: files of pairs, or a world


class Run(NamedTuple):
    """A run that is ready to go on from update `optimizer.steps`."""

    folder: Path
    settings: Settings
    optimizer: AdamW
    tokenizer: Tokenizer
    reference: GPT
    judge: reward.Judge | None
    prompts: list[tasks.Item]  # a world's questions, or {"prompt": ...}
    comparisons: list[reward.Comparison]
    examples: list[list[instructions.Message]]  # learned beside


def begin(folder: Path, settings: Settings, *, init_from: Path, overwrite: bool = False) -> Run:
    """A new run from a model that was tuned to instructions; all its weights are trained, or an adapter."""
    runs.check_folder(folder, overwrite, needed=(init_from, settings.reward_from))
    model, tokenizer = checkpoint.load(init_from)
    instructions.check_tuned(tokenizer, init_from)
    c = settings.rl
    few = c.num_generations if c.algo in ("rloo", "grpo") else c.num_generations * c.num_prompts
    if c.algo in ("reinforce", "rloo", "grpo") and few < 2:
        raise UserError(f"num_generations is {c.num_generations}: {c.algo} compares answers, so it needs two")
    if c.algo == "reinforce" and c.num_iterations > 1:
        raise UserError("num_iterations: reinforce learns from its own answers only; others correct for it")
    if any(map(corpus.is_source, settings.data)) and len(settings.data) > 1:
        raise UserError(f"{', '.join(settings.data)}: name one world, or only files")
    if model.config.vocab_size != tokenizer.vocab_size:
        sizes = f"{model.config.vocab_size} rows, and its tokenizer {tokenizer.vocab_size} tokens"
        raise UserError(f"{init_from}: has {sizes}: what is sampled and what is scored would differ")
    if settings.adapter:
        model = variants.create(model, settings.adapter, np.random.default_rng(settings.train.seed))
    settings = runs.from_model(
        settings, model, init_from, ptx_data=runs.absolute(settings.ptx_data),
        reward_from=str(Path(settings.reward_from).resolve()) if settings.reward_from else "",
    )  # fmt: skip
    run = _run(folder, settings, settings.train.optimizer(model), tokenizer)
    if run.judge:
        taught, _ = checkpoint.read_run(Path(settings.reward_from), reward.Settings)
        runs.check_folder(folder, overwrite, needed=(taught.init_from,))  # what it reads before an answer
    hashes = {"reward_hash": fingerprint(run.judge.model) if run.judge else ""}
    run = run._replace(settings=dataclasses.replace(settings, fingerprint=_fingerprint(run), **hashes))
    runs.first_save(folder, run.optimizer, tokenizer, run.settings)
    return run


def resume(folder: Path, paths: tuple[str, ...] = ()) -> Run:
    """The run in `folder` as it was saved last. PPO's values begin anew.

    paths: where the data is now, if it was moved; of a world also what is learned beside.
    """
    was, _ = checkpoint.read_run(folder, Settings)
    beside = paths if was.ptx_data == was.data else ()  # a world has both
    settings, tokenizer = runs.read(folder, Settings, data=paths, ptx_data=beside)
    run = _run(folder, settings, runs.load(folder, settings, tokenizer), tokenizer)
    runs.check_data(folder, settings, _fingerprint(run), settings.ptx_data)
    if run.judge is not None and fingerprint(run.judge.model) != settings.reward_hash:
        raise UserError(f"{settings.reward_from}: is another judge than the one of the run in {folder}")
    return run


def _run(folder: Path, settings: Settings, optimizer: AdamW, tokenizer: Tokenizer) -> Run:
    reference, _ = checkpoint.load(settings.init_from)
    adapters.check_base(reference, settings.init_hash, folder, settings.init_from)
    prompts, comparisons, judge = [], [], None
    if settings.rl.algo == "dpo":
        comparisons = [c for path in settings.data for c in reward.read_file(path)]
    else:
        prompts = [item for path in settings.data for item in read_prompts(path)]
        judge = reward.load(Path(settings.reward_from))
        if judge.tokenizer.to_spec() != tokenizer.to_spec():
            raise UserError(f"{settings.reward_from}: this judge has another tokenizer than the model")
    if not prompts and not comparisons:
        raise UserError(f"{', '.join(settings.data)}: is empty")
    _check_room(settings, optimizer.model.context, tokenizer, prompts, comparisons)
    examples = [messages for path in settings.ptx_data for messages in _examples(path)]
    return Run(folder, settings, optimizer, tokenizer, reference, judge, prompts, comparisons, examples)


def _check_room(
    settings: Settings, context: int, tokenizer: Tokenizer, prompts: Sequence[tasks.Item],
    comparisons: Sequence[reward.Comparison],
) -> None:  # fmt: skip
    """Raises UserError for a question that may not fit the model together with its answer: whichever update
    came to it first would end the run."""
    room = settings.rl.max_new_tokens
    texts = [(item["prompt"], room) for item in prompts]
    for c in comparisons:
        texts += [(c.prompt, len(_answer_ids(tokenizer, said))) for said in (c.chosen, c.rejected)]
    # The last token of an answer is a target and takes no place.
    longest = max(len(instructions.prompt(tokenizer, asked)) + n - 1 for asked, n in texts)
    if longest > context:
        raise UserError(f"{', '.join(settings.data)}: a question needs {longest} positions with its answer, "
                        f"and the model has {context}")  # fmt: skip


def _fingerprint(run: Run) -> str:
    return hashlib.sha256(repr((run.prompts, run.comparisons, run.examples)).encode()).hexdigest()


def _examples(path: str) -> list[list[instructions.Message]]:
    if corpus.is_source(path):
        return world_examples(corpus.world_of(path))
    return [example.messages for example in instructions.read([path])]


def world_examples(world: World) -> list[list[instructions.Message]]:
    """A world's examples for tuning, as conversations, without facts that pre-training cannot have taught:
    those teach to make up facts, which RLHF is to mend."""
    return tasks.conversations(world, tasks.tuning(world, answered=0))


def read_prompts(path: str) -> list[tasks.Item]:
    """A world's questions about people for RLHF, or those of a JSON Lines file.

    Three of four are about people whom documents tell of, as those are whom one asks about: a policy that is
    asked about strangers alone learns to say nothing at all.
    """
    if corpus.is_source(path):
        world = corpus.world_of(path)
        known, tuned, never = (
            tasks.questions(world, world.people(*who))
            for who in (("known", "rl"), ("known", "sft"), ("never", "rl"))
        )
        return 8 * known + 2 * tuned + never
    return [row for _, row in instructions.objects(path, '{"prompt": "..."}', "prompt")]


def rlhf(run: Run, report: Callable[[train.Record], None] = lambda record: None) -> None:
    """Trains to the end; saves, and tells of each update, as all stages do (`runs.run`)."""
    settings, model, config = run.settings, run.optimizer.model, run.settings.rl
    source = next(filter(corpus.is_source, settings.data), None)
    world = corpus.world_of(source) if source else None
    if config.algo == "dpo":

        def batches(n: int, rng: np.random.Generator) -> list[Comparisons]:
            drawn = rng.integers(len(run.comparisons), size=settings.batch_size)
            return [compared(run.tokenizer, run.reference, [run.comparisons[i] for i in drawn])]

        def compute(batches, rng) -> float:
            (c,) = batches
            return learn(run.optimizer, c.samples, partial(dpo_loss, c=c, beta=config.beta))

    else:
        learner = trainer(run.optimizer, run.reference, run.judge, run.prompts, config, settings.train, world,
                          run.examples)  # fmt: skip
        batches, compute = learner.batches, learner.compute

    def evaluate() -> train.Record:
        if world is None:
            return {}
        found = {}
        for kind in ("known", "never"):
            items = tasks.distinct(tasks.questions(world, world.people(kind, "val")))
            score = world_evaluate.score(world, items, world_evaluate.ask(model, run.tokenizer, items))
            found |= {f"val_right_{kind}": score.right.rate, f"val_false_{kind}": score.falsehood.rate}
        return found

    runs.run(run.folder, run.optimizer, run.tokenizer, settings, batches, evaluate, report, compute=compute)


def _gold(world: World, items: Sequence[tasks.Item]) -> Judging:
    """What the simulated people would feel about each answer: 1, 0 or -1 (`preferences.utility`)."""
    by_prompt = {item["prompt"]: item for item in items}

    def gold(questions: list[str], answers: list[str]) -> Array:
        pairs = zip(questions, answers, strict=True)
        return np.array([preferences.utility(world, by_prompt[q], a) for q, a in pairs], float)

    return gold
