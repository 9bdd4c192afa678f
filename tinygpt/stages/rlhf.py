"""RLHF: samples of the model's own answers, judged by a reward model, steer it by policy gradients.

    maximise  E[ r(x, y) ] - beta KL(policy || reference),    y sampled from the policy

One engine samples and scores answers. An algorithm is an objective. It maps the log-probabilities of the
sampled tokens to a loss and to d, its gradient by them; `samples` says how the model learns from d.

    reinforce   -A logp                        A = r - mean of the other answers of the update
    rloo        -min(q A, clip(q) A)           A = r - mean of the other answers to the same question
    ppo         -min(q A, clip(q) A)           A from values by GAE
    grpo        -min(q A, clip(q) A) + beta k3 A = (r - mean) / deviation, of answers to the same question
    dpo         -log sigmoid(beta margin)      no samples: from comparisons

q is the present policy over the policy that sampled: of a whole answer in RLOO, of a token in PPO and GRPO.
In the first three the KL is in the reward, r = score - beta log(policy / reference). In GRPO the KL is in the
loss, and in DPO in its derivation. k1, k2 and k3 estimate the KL from samples. The reported KL is exact, over
the vocabulary. The loss of the tuning's own examples (ptx) may be added: it keeps what they taught.

References: Williams 1992 (REINFORCE); Ahmadian et al. 2024 (RLOO); Schulman et al. 2015, 2017 (GAE, PPO);
Shao et al. 2024 (GRPO); Rafailov et al. 2023 (DPO); Ziegler et al. 2019, Ouyang et al. 2022 for the whole.
"""

import dataclasses
import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from ..core import train
from ..core.model import GPT
from ..core.optim import AdamW
from ..core.option import check_options, option
from ..errors import UserError
from ..text import examples, instructions
from ..text.data import Array, Tokenizer, shuffled_places
from ..text.examples import Example, LeftOutError, Notes
from ..text.instructions import Prompt
from ..world import World, corpus, preferences, tasks
from . import dpo, recipes, reward, sft, stage
from . import evaluate as world_evaluate
from .adapter import fingerprint
from .samples import Samples, learn, prompt_ids, sample, scored
from .stage import FORMS, MOST_PASSES, Stage, Store, files, folder

ALGORITHMS = ("reinforce", "rloo", "ppo", "grpo", "dpo")
_SAMPLED, _CLIPPED, _PPO = ({"algo": names} for names in (ALGORITHMS[:4], ALGORITHMS[1:4], ("ppo",)))


@dataclasses.dataclass(frozen=True)
class Config:
    """How to sample, and how to learn from samples, under the names of TRL."""

    algo: str = option("rloo", ALGORITHMS, "How to learn from scores or, dpo, from comparisons.")
    beta: float = option(0.4, "[0, inf)", "Cost of a nat of KL to the reference.")
    num_prompts: int = option(16, "[1, inf)", "Prompts of an update.", only=_SAMPLED)
    num_generations: int = option(8, "[1, inf)", "Answers to each prompt.", only=_SAMPLED)
    max_new_tokens: int = option(16, "[1, inf)", "Tokens of an answer.", only=_SAMPLED)
    num_iterations: int = option(1, "[1, inf)", "Updates from the same answers.", only=_CLIPPED)
    cliprange: float = option(0.2, "[0, inf)", "Clips the ratio of new to old probabilities.", only=_CLIPPED)
    cliprange_value: float = option(0.2, "[0, inf)", "ppo: clips the values.", only=_PPO)
    vf_coef: float = option(0.1, "[0, inf)", "ppo: weight of the values' loss.", only=_PPO)
    gamma: float = option(1.0, "[0, 1]", "ppo: discount of later rewards.", only=_PPO)
    lam: float = option(0.95, "[0, 1]", "ppo: lambda of GAE.", only=_PPO)
    ptx_coef: float = option(  # Ouyang et al. 2022, equation 2
        0.0, "[0, inf)", "Weight of the loss of the tuning's examples.", only=_SAMPLED,
        shown=f"{recipes.RLHF['ptx_coef']} with --data world, else 0",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_options(self)


def exact_kl(logits: Array, reference: Array) -> tuple[Array, Array]:
    """KL(policy || reference) and the policy's entropy over the whole vocabulary, in nats.

    Both arguments are logits (..., V), both results arrays (...).
    """
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
    """Advantages (N, T) of the masked places. Schulman et al. 2015, equation 16.

        A[t] = d[t] + gamma lam A[t + 1]        d[t] = r[t] + gamma V[t + 1] - V[t]

    V and A are 0 after the last place.
    """
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
    """-A log p(answer), mean over the answers. advantage (N, T) or (N, 1).

    The expectation of its gradient is the gradient of -E[r]. Its value measures nothing.
    """
    weights = advantage * mask / len(logp)
    return float(-(weights * logp).sum()), -weights


def clipped(
    logp: Array, old: Array, mask: Array, advantage: Array, cliprange: float, per_token: Array | None = None
) -> tuple[float, Array]:
    """-min(q A, clip(q, 1 - c, 1 + c) A) with q = exp(logp - old). Where the clip decides the gradient is 0:
    the policy has moved far enough. Schulman et al. 2017, equation 7.

    per_token (N, T): the weight of each place; by default all places have the same weight, 1 in sum.
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
    """Samples, and the numbers that an objective needs of them."""

    samples: Samples
    old: Array  # (N, T) log p under the policy that sampled
    ref: Array  # (N, T) log p under the reference
    advantage: Array  # (N, T) or (N, 1)
    returns: Array | None = None  # (N, T), the targets of PPO's values
    values: Array | None = None  # (N, T), PPO's values at the time of sampling


def experience(
    samples: Samples, old: Array, ref: Array, scores: Array, config: Config, values: Array | None = None
) -> Experience:
    """Advantages from scores (N,), by the algorithm."""
    mask, groups, returns = samples.mask, (-1, config.num_generations), None
    with_kl = scores - config.beta * (old - ref).sum(1)
    if config.algo == "ppo":
        rewards = -config.beta * (old - ref)
        last = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
        rewards[np.arange(len(last)), last] += scores
        advantage = gae(rewards, values, mask, config.gamma, config.lam)
        returns = advantage + values
        mean = (advantage * mask).sum() / mask.sum()
        spread = math.sqrt((mask * (advantage - mean) ** 2).sum() / mask.sum())
        advantage = (advantage - mean) / (spread + 1e-8)
    elif config.algo == "grpo":
        advantage = standardised(scores.reshape(groups)).reshape(-1, 1)
    elif config.algo == "rloo":
        advantage = leave_one_out(with_kl.reshape(groups)).reshape(-1, 1)
    else:
        advantage = leave_one_out(with_kl)[:, None]
    return Experience(samples, old, ref, advantage, returns, values)


def objective(logp: Array, e: Experience, config: Config) -> tuple[float, Array]:
    """The loss of an algorithm, and d loss / d logp (N, T)."""
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
    """Half the squared distance of PPO's values (N, T) to the returns, and its gradient by the values.

    The values are clipped like the ratio: where the clip decides the gradient is 0.
    """
    mask = e.samples.mask / e.samples.mask.sum()
    near = np.clip(values, e.values - config.cliprange_value, e.values + config.cliprange_value)
    plain, held = values - e.returns, near - e.returns
    loss = 0.5 * (mask * np.maximum(plain**2, held**2)).sum()
    return float(loss), mask * np.where(plain**2 >= held**2, plain, 0.0)


Judging = Callable[[list[Prompt], list[str]], Array]  # questions, answers -> scores (N,)


@dataclasses.dataclass(eq=False)
class Trainer:
    """Makes updates from samples: `update` and `compute` are for `train.train`."""

    optimizer: AdamW  # of the policy
    reference: GPT
    tokenizer: Tokenizer
    config: Config
    prompts: Sequence[tuple[Prompt, Array]]  # a question, its ids
    judge: Judging
    values: AdamW | None = None  # of PPO
    gold: Judging | None = None
    seed: int = 0
    value_rate: Callable[[int], float] = lambda n: 1e-4  # learning rate of the values in update n, from 0
    examples: Callable[[int, object], Sequence[train.Batch]] | None = None  # of the tuning, as `Stage.update`

    def __post_init__(self) -> None:
        self.last: tuple = ()  # the last samples, and the numbers that other models give them
        self.experience: Experience | None = None  # of the last samples, from their first update on
        self.has_warned, self.learn_examples = False, train.gradients(self.optimizer)

    def update(self, n: int, rng: np.random.Generator) -> list[Samples]:
        """For update n, samples of the present policy; the same samples for `num_iterations` updates."""
        c = self.config
        if n % c.num_iterations and self.last:
            return [self.last[0]]
        B = min(c.num_prompts, len(self.prompts))
        places = shuffled_places(len(self.prompts), B, n // c.num_iterations, self.seed)
        questions, ids = zip(*(self.prompts[place] for place in places), strict=True)
        model = self.optimizer.model
        samples = sample(model, self.tokenizer, ids, c.num_generations, c.max_new_tokens, rng)
        questions = [question for question in questions for _ in range(c.num_generations)]
        ref, ref_logits, *_ = scored(self.reference, samples, keep=False)
        values = None
        if self.values is not None:
            outputs, _ = self.values.model.forward(samples.ids, places=samples.places, keep=False)
            values = samples.spread(outputs[:, 0])
        scores = self.judge(questions, samples.answers)
        self.last, self.experience = (samples, questions, scores, ref, ref_logits, values), None
        return [samples]

    def compute(self, batches: Sequence[Samples], rng: np.random.Generator) -> train.Record:
        """For `train.train`: the gradients of one update, and a record of the policy."""
        (samples,), config, optimizer = batches, self.config, self.optimizer
        _, questions, scores, ref, ref_logits, values = self.last
        N, answers, record = len(scores), samples.answers, {"train_loss": 0.0}

        def loss(logp: Array, logits: Array) -> tuple[float, Array]:
            if self.experience is None:  # the policy has not changed since it sampled
                self.experience = experience(samples, logp, ref, scores, config, values)
            old = self.experience.old
            parts = (exact_kl(logits[i : i + 64], ref_logits[i : i + 64])
                     for i in range(0, len(logits), 64))  # a copy of all would be the largest thing here
            kl, entropy = map(np.concatenate, zip(*parts, strict=True))
            record.update(
                reward=float(scores.mean()), kl=float(kl.sum() / N), kl_k1=float((old - ref).sum() / N),
                entropy=float(entropy.mean()), ratio=float(abs(np.exp(logp - old) - 1).max()),
                length=float(samples.mask.sum() / N), distinct=len(set(answers)) / N,
            )  # fmt: skip
            return objective(logp, self.experience, config)

        record["train_loss"] = learn(optimizer, samples, loss)
        if self.examples is not None:
            of_samples = optimizer.flat.copy()
            record["ptx_loss"] = self.learn_examples(self.examples(optimizer.steps, rng), rng)
            optimizer.flat *= config.ptx_coef
            optimizer.flat += of_samples
        if self.gold is not None:
            record["gold"] = float(self.gold(questions, answers).mean())
        if self.values is not None:
            record["value_loss"] = self._learn_values(self.experience)
        if len(set(answers)) == 1 < N and not self.has_warned:
            self.has_warned = True
            same = f"update {optimizer.steps + 1}: all {N} answers are {answers[0]!r}"
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
    """The settings of every run, and those of this stage. data: files of prompts, or worlds; for DPO, files
    of comparisons."""

    stage: str = "rlhf"
    init_from: str = folder(help="The model to steer, from tinygpt sft. It stays as it is: the reference.",
                            missing="the model")  # fmt: skip
    reward_from: str = folder(help="The judge, from tinygpt reward; dpo has none.", name="reward_model",
                              only=_SAMPLED, missing="the judge")  # fmt: skip
    data: tuple[str, ...] = files(missing="the prompts", help=FORMS.format(
        f"{examples.USUAL[0]}, for dpo {examples.USUAL[2]}", "questions about people of the base's world."
    ))  # fmt: skip
    rl: Config = Config()
    reward_hash: str = ""  # of the judge's weights
    ptx_data: tuple[str, ...] = files(help="The tuning's examples, as tinygpt sft reads them; repeat.",
                                      only=_SAMPLED, shown="the world of --data")  # fmt: skip
    batch_size: int = option(32, "[1, inf)", "dpo: comparisons of an update.", only={"algo": ("dpo",)})

    def __post_init__(self) -> None:
        super().__post_init__()
        c, n = self.rl, self.rl.num_generations
        if c.algo in ("rloo", "grpo") and n < 2 or c.algo == "reinforce" and n * c.num_prompts < 2:
            raise UserError(f"num_generations is {n}: {c.algo} compares answers, so it needs two")
        if c.algo == "reinforce" and c.num_iterations > 1:
            reason = "reinforce learns from the present policy's answers only; other algorithms correct"
            raise UserError(f"num_iterations is {c.num_iterations}: {reason}")
        if c.ptx_coef and self.data and not self.ptx_data:
            raise UserError(f"ptx_coef is {c.ptx_coef}: give the examples as --ptx-data")
        if any(map(corpus.is_source, self.data)) and len(self.data) > 1:
            raise UserError(f"{', '.join(self.data)}: name one world, or only files")


class Material(NamedTuple):
    """The data and models that the settings name."""

    reference: GPT
    judge: reward.Judge | None  # None for DPO
    prompts: list[tasks.Item]  # a world's questions, or {"prompt": ...}
    comparisons: list[reward.Comparison]  # for DPO
    examples: list[Example]  # of the tuning, learned with the samples
    world: World | None = None
    notes: Notes | None = None


class RLHF(Stage):
    """Steer a tuned model by a judge of its answers: sample, score, make answers with high scores likelier.

    Shows the reward, the exact KL to the reference, the entropy, and how many answers differ. In a world it
    also shows gold: what people would truly feel. Ctrl-C saves, --resume continues.
    """

    name, Settings, needs = "rlhf", Settings, ("init_from", "reward_from")
    # Answers are scored without dropout.
    unused = ("merge_every", "lora_dropout", "gradient_accumulation_steps")
    most_updates = recipes.RLHF["max_iters"]
    defaults = recipes.RLHF | {"max_iters": f"{most_updates}; dpo: {MOST_PASSES} passes if less"}

    @classmethod
    def recipe(cls, options: dict) -> dict[str, object]:
        if options["algo"] == "dpo":
            return {}
        worlds = tuple(filter(corpus.is_source, options["data"]))
        coefficient = recipes.RLHF["ptx_coef"] if worlds or options["ptx_data"] else 0.0
        return {"ptx_data": worlds, "ptx_coef": coefficient}

    @classmethod
    def count(cls, options: dict) -> int | None:
        is_dpo = options["algo"] == "dpo"
        return sum(len(reward.read_file(path)) for path in options["data"]) if is_dpo else None

    def others(self, data: Material) -> Iterable[GPT]:
        return (data.reference, *((data.judge.model, data.judge.author) if data.judge else ()))

    def about(self) -> str:
        if self.settings.rl.algo == "dpo":
            return f"; {len(self.prompts):,} comparisons"
        return f"; {len(set(self.prompts)):,} different prompts"

    def prepare(self, data: Material) -> None:
        """A question that leaves no room for its answer is left out, and so is a comparison."""
        texts = [[item["prompt"] for item in data.prompts], [tuple(c[:5]) for c in data.comparisons],
                 [example.messages for example in data.examples]]  # fmt: skip
        self.depends_on(hashlib.sha256(repr(texts).encode()).hexdigest())
        self.data, learning = data, self._from_pairs if self.settings.rl.algo == "dpo" else self._from_samples
        self.update, self.compute = learning(data, self.settings, self.settings.train)

    def _from_pairs(self, data: Material, settings: Settings, how: train.TrainConfig) -> tuple:
        encode = partial(dpo.encode, self.model, self.tokenizer)
        pairs = self.notes.keep(((c.where, c) for c in data.comparisons), lambda c: (c.prompt, encode(c)))
        self.prompts, pairs = zip(*pairs, strict=True)
        return dpo.learning(self.optimizer, data.reference, self.tokenizer, pairs, settings.rl.beta,
                            settings.batch_size, how.seed)  # fmt: skip

    def _from_samples(self, data: Material, settings: Settings, how: train.TrainConfig) -> tuple:
        if data.judge.tokenizer.spec != self.tokenizer.spec:
            raise UserError(f"{settings.reward_from}: this judge has another tokenizer than the model")
        mark = fingerprint(data.judge.model)
        if settings.reward_hash not in ("", mark):
            raise UserError(f"{settings.reward_from}: is another judge than the one that the run began with")
        self.settings = dataclasses.replace(settings, reward_hash=mark)
        items = ((item.get("where", ""), item["prompt"]) for item in data.prompts)
        longest, limit = settings.rl.max_new_tokens, data.judge.model.context

        def encode(prompt: Prompt) -> tuple[Prompt, Array]:
            ids = prompt_ids(self.model, self.tokenizer, prompt, longest)
            if len(reward.encode(self.tokenizer, limit, prompt, "", "")) + longest > limit:
                raise LeftOutError(f"as longer, with its answer, than the {limit} positions of the judge")
            return prompt, ids

        pairs = self.notes.keep(items, encode)
        self.prompts, ptx = [prompt for prompt, _ in pairs], None
        if settings.rl.algo == "reinforce" and settings.rl.num_generations * len(pairs) < 2:
            raise UserError("num_generations is 1, for one prompt: reinforce compares two answers or more")
        if data.examples and settings.rl.ptx_coef:
            rows = sft.Settings(data.reference.config, how, block_size=self.model.context, batch_size=4)
            tuning = sft.Examples(data.examples, [], notes=self.notes)
            ptx = sft.SFT(rows, self.optimizer, self.tokenizer, tuning).update
        trainer = Trainer(
            self.optimizer, data.reference, self.tokenizer, settings.rl, pairs, data.judge,
            how.optimizer(data.judge.model.copy()) if settings.rl.algo == "ppo" else None,
            _gold(data.world, data.prompts) if data.world else None, how.seed, how.learning_rate_at, ptx,
        )  # fmt: skip
        return trainer.update, trainer.compute

    @classmethod
    def read(cls, settings: Settings, store: Store) -> Material:
        notes, reference = Notes(), store.base(settings)
        if settings.rl.algo == "dpo":
            comparisons = [c for path in settings.data for c in reward.read_file(path, notes)]
            return Material(reference, None, [], comparisons, [], notes=notes)
        prompts = [item for path in settings.data for item in read_prompts(path, notes)]
        source = next(filter(corpus.is_source, settings.data), None)
        world, judge = corpus.world_of(source) if source else None, store.judge(settings.reward_from)
        ptx = ptx_examples(settings.ptx_data, notes)
        return Material(reference, judge, prompts, [], ptx, world, notes)

    @classmethod
    def start(cls, settings: Settings, data: Material, store: Store) -> tuple[Settings, GPT, Tokenizer]:
        settings, model, tokenizer = super().start(settings, data, store)
        instructions.check_tuned(tokenizer, settings.init_from)
        if model.config.vocab_size != tokenizer.vocab_size:
            sizes = f"{model.config.vocab_size} rows, and its tokenizer {tokenizer.vocab_size} tokens"
            reason = "so samples and scores would have different probabilities"
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


def ptx_examples(paths: Iterable[str], notes: Notes | None = None) -> list[Example]:
    """The tuning's examples of files and worlds, which are learned with the samples.

    Of a world, facts that pre-training cannot teach are left out: their answers teach a model to make up
    facts, and RLHF shall mend that.
    """
    return sft.read_examples(paths, "sft", notes, answered=0)


def read_prompts(path: str, notes: Notes | None = None) -> list[tasks.Item]:
    """A world's questions about people for RLHF, or {"prompt", "where": file:line} for each prompt of a file.

    Three of four are about people of whom documents tell, because users ask about such people. With questions
    about strangers alone a policy learns to answer nothing at all.
    """
    if corpus.is_source(path):
        world = corpus.world_of(path)
        known, tuned, never = (tasks.questions(world, world.people(*which)) for which in
                               (("known", "rl"), ("known", "sft"), ("never", "rl")))  # fmt: skip
        return 8 * known + 2 * tuned + never
    prompts = examples.read([path], examples.PROMPT, notes)
    return [{"prompt": example.prompt, "where": example.where} for example in prompts]


def _gold(world: World, items: Sequence[tasks.Item]) -> Judging:
    """What the simulated people would feel about each answer: 1, 0 or -1 (`preferences.utility`)."""
    by_prompt = {item["prompt"]: item for item in items}
    return lambda questions, answers: np.array(
        [preferences.utility(world, by_prompt[q], a) for q, a in zip(questions, answers, strict=True)], float
    )
