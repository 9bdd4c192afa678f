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
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..core import train
from ..core.model import GPT
from ..core.optim import AdamW
from ..core.option import check_options, option
from ..errors import UserError
from ..text import examples, instructions
from ..text.data import Array, Tokenizer, shuffled_places
from ..text.examples import Example, Notes
from ..text.instructions import Prompt
from ..world import World, corpus, preferences, tasks
from . import evaluate as world_evaluate
from . import recipes, reward, sft, stage
from .adapter import fingerprint
from .samples import Samples, learn, prompt_ids, sample, scored
from .stage import Stage, Store

ALGORITHMS = ("reinforce", "rloo", "ppo", "grpo", "dpo")
_SAMPLED, _CLIPPED, _PPO = ({"algo": names} for names in (ALGORITHMS[:4], ALGORITHMS[1:4], ("ppo",)))


@dataclasses.dataclass(frozen=True)
class Config:
    """How to sample and to learn from samples, under the names of TRL."""

    algo: str = option("rloo", ALGORITHMS, "How to learn from scores or, dpo, from comparisons.")
    beta: float = option(0.4, "[0, inf)", "What a nat of KL to the reference costs.")
    num_prompts: int = option(16, "[1, inf)", "Of an update.", only=_SAMPLED)
    num_generations: int = option(8, "[1, inf)", "Answers to each.", only=_SAMPLED)
    max_new_tokens: int = option(16, "[1, inf)", "Of an answer.", only=_SAMPLED)
    num_iterations: int = option(1, "[1, inf)", "Updates from the same answers.", only=_CLIPPED)
    cliprange: float = option(0.2, "[0, inf)", "Of the ratio of new to old probabilities.", only=_CLIPPED)
    cliprange_value: float = option(0.2, "[0, inf)", "ppo: of the values.", only=_PPO)
    vf_coef: float = option(0.1, "[0, inf)", "ppo: weight of the values' loss.", only=_PPO)
    gamma: float = option(1.0, "[0, 1]", "ppo: what later rewards count.", only=_PPO)
    lam: float = option(0.95, "[0, 1]", "ppo: of GAE.", only=_PPO)
    ptx_coef: float = option(  # Ouyang et al. 2022, equation 2
        0.0, "[0, inf)", "Weight of the loss of the tuning's examples, learned beside.", only=_SAMPLED,
        shown=f"{recipes.RLHF['ptx_coef']} with --data world, else 0",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_options(self)


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
    advantages, after, value = np.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t] > 0
        delta = rewards[:, t] + gamma * value - values[:, t]
        after = np.where(here, delta + gamma * lam * after, 0.0)
        value = np.where(here, values[:, t], 0.0)
        advantages[:, t] = after
    return advantages


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


def value_loss(values: Array, e: Experience, config: Config) -> tuple[float, Array]:
    """Half the squared distance of PPO's values (N, T) to the returns, clipped as the ratio is, and its
    gradient by them: none where the clip decides."""
    mask = e.samples.mask / e.samples.mask.sum()
    near = np.clip(values, e.values - config.cliprange_value, e.values + config.cliprange_value)
    plain, held = values - e.returns, near - e.returns
    worse = plain**2 >= held**2
    loss = 0.5 * (mask * np.maximum(plain**2, held**2)).sum()
    return float(loss), mask * np.where(worse, plain, 0.0)


class Rollout(NamedTuple):
    """Samples, and what others think of them."""

    samples: Samples
    questions: list[Prompt]
    scores: Array  # (N,) of the judge
    ref: Array  # (N, T) log p under the reference
    ref_logits: Array  # (places of answers, V)
    values: Array | None  # (N, T), of PPO

    @property
    def ids(self) -> Array:
        return self.samples.ids


Judging = Callable[[list[Prompt], list[str]], Array]  # questions, answers -> scores (N,)


@dataclasses.dataclass(eq=False)
class Trainer:
    """What updates from samples need: `batches` and `compute` are for `train.train`."""

    optimizer: AdamW  # of the policy
    reference: GPT
    tokenizer: Tokenizer
    config: Config
    prompts: Sequence[tuple[Prompt, Array]]  # a question, its ids
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
        ref, ref_logits, *_ = scored(self.reference, samples, keep=False)
        values = None
        if self.values is not None:
            outputs, _ = self.values.model.forward(samples.ids, places=samples.places, keep=False)
            values = samples.spread(outputs[:, 0])
        scores = self.judge(questions, samples.answers)
        self.last, self.experience = Rollout(samples, questions, scores, ref, ref_logits, values), None
        return [self.last]

    def compute(self, batches, rng: np.random.Generator) -> train.Record:
        """For `train.train`: the gradients of one update, and what there is to watch."""
        (r,), config, optimizer = batches, self.config, self.optimizer
        mask, N = r.samples.mask, len(r.scores)
        record = {"train_loss": 0.0, "reward": float(r.scores.mean())}

        def loss(logp: Array, logits: Array) -> tuple[float, Array]:
            if self.experience is None:  # the policy has not changed since it sampled
                self.experience = experience(r.samples, logp, r.ref, r.scores, config, r.values)
            parts = (exact_kl(logits[i : i + 64], r.ref_logits[i : i + 64])
                     for i in range(0, len(logits), 64))  # a copy of all would be the largest thing here
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
        outputs, cache = model.forward(e.samples.ids, places=e.samples.places)  # (places, 1)
        loss, d = value_loss(e.samples.spread(outputs[:, 0]), e, self.config)
        dvalues = self.config.vf_coef * d[e.samples.mask > 0][:, None]  # (places, 1)
        model.backward(dvalues.astype(outputs.dtype), cache, self.values.grads)
        self.values.step(self.value_rate(self.optimizer.steps))
        return loss


# --- the stage ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings(stage.Settings):
    """Those of every run. data: files with a prompt in each line, or worlds; for DPO, comparisons."""

    stage: str = "rlhf"
    init_from: str = option(
        "", help="The model to steer, from tinygpt sft; it stays as it is, as the reference.",
        metavar="FOLDER", missing="the model",
    )  # fmt: skip
    reward_from: str = option("", help="The judge, from tinygpt reward; dpo has none.", name="reward_model",
                              metavar="FOLDER", only=_SAMPLED, missing="the judge")  # fmt: skip
    data: tuple[str, ...] = option(
        (), help=f"JSON Lines: {examples.USUAL[0]}, for dpo {examples.USUAL[2]}, or another form of the "
        "README; repeat. world: questions about people of the base's world.", metavar="FILE",
        missing="the prompts",
    )  # fmt: skip
    rl: Config = Config()
    reward_hash: str = ""  # of the judge's weights
    ptx_data: tuple[str, ...] = option(
        (), help="These examples: as tinygpt sft takes them; repeat.", metavar="FILE", only=_SAMPLED,
        shown="the world of --data",
    )  # fmt: skip
    batch_size: int = option(32, "[1, inf)", "dpo: comparisons of an update.", only={"algo": ("dpo",)})
    block_size: int = 64  # no option here: a question and its answer have a row of the model's length
    gradient_accumulation_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        c = self.rl
        few = c.num_generations if c.algo in ("rloo", "grpo") else c.num_generations * c.num_prompts
        if c.algo in ("reinforce", "rloo", "grpo") and few < 2:
            raise UserError(
                f"num_generations is {c.num_generations}: {c.algo} compares answers, so it needs two"
            )
        if c.algo == "reinforce" and c.num_iterations > 1:
            reason = "reinforce learns from its own answers only; others correct for it"
            raise UserError(f"num_iterations is {c.num_iterations}: {reason}")
        if c.ptx_coef and self.data and not self.ptx_data:
            raise UserError(f"ptx_coef is {c.ptx_coef}: give the examples as --ptx-data")
        if any(map(corpus.is_source, self.data)) and len(self.data) > 1:
            raise UserError(f"{', '.join(self.data)}: name one world, or only files")


class Material(NamedTuple):
    """What the settings name."""

    reference: GPT
    judge: reward.Judge | None  # None for DPO
    prompts: list[tasks.Item]  # a world's questions, or {"prompt": ...}
    comparisons: list[reward.Comparison]  # for DPO
    examples: list[Example]  # learned beside
    world: World | None = None
    notes: Notes | None = None


class RLHF(Stage):
    """Steer a tuned model by a judge of its answers: sample, score, make what scored well likelier.

    Shows the reward, in a world also what people would truly feel (gold), the exact KL to the reference, the
    entropy, and how many answers differ. Ctrl-C saves, --resume goes on.
    """

    name, Settings, needs = "rlhf", Settings, ("init_from", "reward_from")
    unused, defaults = ("merge_every", "lora_dropout"), recipes.RLHF  # answers are scored without dropout

    @classmethod
    def recipe(cls, options: dict) -> dict[str, object]:
        if options["algo"] == "dpo":
            return {}
        worlds = tuple(filter(corpus.is_source, options["data"]))
        coefficient = recipes.RLHF["ptx_coef"] if worlds or options["ptx_data"] else 0.0
        return {"ptx_data": worlds, "ptx_coef": coefficient}

    def others(self, data: Material) -> Iterable[GPT]:
        return (data.reference, *((data.judge.model, data.judge.author) if data.judge else ()))

    def about(self) -> str:
        return f"; {len(self.prompts):,} prompts"

    def __init__(
        self, settings: Settings, optimizer: AdamW, tokenizer: Tokenizer, data: Material, scratch=None
    ) -> None:
        """A question that may not fit the model together with its answer is left out."""
        super().__init__(settings, optimizer, tokenizer, data)
        self.data = data
        texts = [[item["prompt"] for item in data.prompts], [tuple(c[:5]) for c in data.comparisons],
                 [example.messages for example in data.examples]]  # fmt: skip
        self.depends_on(hashlib.sha256(repr(texts).encode()).hexdigest())
        self.prepare()

    def prepare(self) -> None:
        settings, data = self.settings, self.data
        if data.judge.tokenizer.spec != self.tokenizer.spec:
            raise UserError(f"{settings.reward_from}: this judge has another tokenizer than the model")
        mark = fingerprint(data.judge.model)
        if settings.reward_hash not in ("", mark):
            raise UserError(f"{settings.reward_from}: is another judge than the one that the run began with")
        self.settings = dataclasses.replace(settings, reward_hash=mark)
        how = settings.train
        items = ((item.get("where", ""), item["prompt"]) for item in data.prompts)
        room = self.model, self.tokenizer
        pairs = self.notes.keep(items, lambda p: (p, prompt_ids(*room, p, settings.rl.max_new_tokens)))
        self.prompts = [prompt for prompt, _ in pairs]
        trainer = Trainer(
            self.optimizer, data.reference, self.tokenizer, settings.rl, pairs, data.judge,
            how.optimizer(data.judge.model.copy()) if settings.rl.algo == "ppo" else None,
            _gold(data.world, data.prompts) if data.world else None, how.seed, how.learning_rate_at,
            self._beside(),
        )  # fmt: skip
        self.update, self.compute = trainer.batches, trainer.compute

    def _beside(self) -> Callable[[int], list[train.Batch]] | None:
        """The batches of examples that are learned beside."""
        if not (self.data.examples and self.settings.rl.ptx_coef):
            return None
        rows = sft.Settings(model=self.data.reference.config, train=self.settings.train,
                            block_size=self.model.context, batch_size=4)  # fmt: skip
        return sft.updates(self.tokenizer, self.data.examples, rows, self.notes)

    @classmethod
    def of(cls, settings: Settings) -> type[Stage]:
        from .dpo import DPO

        return DPO if settings.rl.algo == "dpo" else RLHF

    @classmethod
    def read(cls, settings: Settings, store: Store) -> Material:
        notes = Notes()
        prompts = [item for path in settings.data for item in read_prompts(path, notes)]
        beside = [example for path in settings.ptx_data for example in _examples(path, notes)]
        source = next(filter(corpus.is_source, settings.data), None)
        world, judge = corpus.world_of(source) if source else None, store.judge(settings.reward_from)
        return Material(store.base(settings), judge, prompts, [], beside, world, notes)

    @classmethod
    def start(cls, settings: Settings, data: Material, store: Store) -> tuple[Settings, GPT, Tokenizer]:
        settings, model, tokenizer = super().start(settings, data, store)
        instructions.check_tuned(tokenizer, settings.init_from)
        if model.config.vocab_size != tokenizer.vocab_size:
            sizes = f"{model.config.vocab_size} rows, and its tokenizer {tokenizer.vocab_size} tokens"
            reason = "what is sampled and what is scored would differ"
            raise UserError(f"{settings.init_from}: has {sizes}: {reason}")
        return settings, model, tokenizer

    def evaluate(self) -> train.Record:
        if (world := self.data.world) is None:
            return {}
        record = {}
        for kind in ("known", "never"):
            items = tasks.distinct(tasks.questions(world, world.people(kind, "val")))
            score = world_evaluate.score(world, items, world_evaluate.ask(self.model, self.tokenizer, items))
            record |= {f"val_right_{kind}": score.right.rate, f"val_false_{kind}": score.falsehood.rate}
        return record


def _examples(path: str, notes: Notes) -> list[Example]:
    if corpus.is_source(path):
        return world_examples(corpus.world_of(path))
    return examples.read([path], examples.EXAMPLE, notes)


def world_examples(world: World) -> list[Example]:
    """A world's examples for tuning, without facts that pre-training cannot have taught: those teach to make
    up facts, which RLHF is to mend."""
    talks = tasks.conversations(world, tasks.tuning(world, answered=0))
    return [Example(f"world:{world.seed}:{n}", messages) for n, messages in enumerate(talks, 1)]


def read_prompts(path: str, notes: Notes | None = None) -> list[tasks.Item]:
    """A world's questions about people for RLHF, or {"prompt", "where": file:line} for each prompt of a file.

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
    prompts = examples.read([path], examples.PROMPT, notes)
    return [{"prompt": example.prompt, "where": example.where} for example in prompts]


def _gold(world: World, items: Sequence[tasks.Item]) -> Judging:
    """What the simulated people would feel about each answer: 1, 0 or -1 (`preferences.utility`)."""
    by_prompt = {item["prompt"]: item for item in items}

    def gold(questions: list[str], answers: list[str]) -> Array:
        pairs = zip(questions, answers, strict=True)
        return np.array([preferences.utility(world, by_prompt[q], a) for q, a in pairs], float)

    return gold
