"""The reward model: a judge of answers, taught by comparisons.

    loss = -log sigmoid(score(chosen) - score(rejected))      Bradley and Terry 1952; Ouyang et al. 2022, 3.5

It is the GPT with another head, one number instead of logits (`GPTConfig.num_labels`), read at the last token
of a text. That text is the conversation, the answer, and the question once more: the judge stands where it
would have to answer itself, and compares.

    <|endoftext|>User: Where does Ada live?
    Assistant: Paris<|endoftext|>User: Where does Ada live?
    Assistant:

Only differences of scores mean anything: a constant on all of them changes no loss.

Not here: whose comparisons they are (`world.preferences` simulates people, `tinygpt label` asks one), what
the scores are used for (`rlhf`).
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import checkpoint, instructions, runs, train
from ..data import Array, Packed, Tokenizer, pack
from ..errors import UserError
from ..evaluate import Rate, wilson
from ..generate import generate
from ..model import GPT
from ..optim import AdamW
from ..storage import Workspace
from ..world import TASKS, World, preferences, raw_integers, tasks

ROWS = 16  # at a time, where nothing is trained


@dataclasses.dataclass(frozen=True)
class Settings(runs.Settings):
    """Those of every run. A batch has batch_size comparisons, packed into rows of block_size tokens."""

    stage: str = "reward"


class Comparison(NamedTuple):
    """An answer that was preferred to another one, as `{"prompt", "chosen", "rejected"}` in a file."""

    prompt: str
    chosen: str
    rejected: str
    kind: str = ""  # what is compared with what, where that is known
    is_right: bool = True  # False: an annotator's slip, where that is known


class Run(NamedTuple):
    """A run that is ready to go on from update `optimizer.steps`."""

    folder: Path
    settings: Settings
    optimizer: AdamW
    tokenizer: Tokenizer
    train: list[Comparison]
    val: list[Comparison]


# --- texts and scores ---------------------------------------------------------------------------------------


def encode(tokenizer: Tokenizer, prompt: str, answer: str) -> Array:
    """The ids (n,) of what the judge reads; its score is read at the last one."""
    question = {"role": "user", "content": prompt}
    return instructions.prompt(tokenizer, [question, {"role": "assistant", "content": answer}, question])


def marked(texts: Sequence[Array], block_size: int) -> Packed:
    """Texts side by side in rows; none sees another. At the last token of text n is the weight n + 1.

    Raises UserError for a text that is longer than a row.
    """
    longest = max(map(len, texts))
    if longest > block_size:
        raise UserError(f"a question with its answer has {longest} tokens, and a row {block_size}")
    last = (np.append(np.zeros(len(ids)), n) for n, ids in enumerate(texts, 1))
    return pack(((np.append(ids, 0), mark) for ids, mark in zip(texts, last, strict=True)), block_size)


def read(outputs: Array, marks: Array) -> tuple[Array, tuple[Array, Array]]:
    """Of outputs (B, T, 1) those at marks (B, T), in their order, (N,), and where they stand."""
    b, t = np.nonzero(marks)
    order = np.argsort(marks[b, t])
    return outputs[b[order], t[order], 0], (b[order], t[order])


def scores(model: GPT, texts: Sequence[Array], ws: Workspace | None = None) -> Array:
    """The score of each text (ids), (N,)."""
    rows, ws, found = marked(texts, model.context), ws or Workspace(), np.zeros(len(texts), np.float64)
    for at in range(0, len(rows.ids), ROWS):
        ids, _, marks, start, positions = (field[at : at + ROWS] for field in rows)
        outputs, _ = model.forward(ids, ws, start=start, positions=positions, keep=False)
        values, (b, t) = read(outputs, marks)
        found[marks[b, t].astype(int) - 1] = values
    return found


def bradley_terry(chosen: Array, rejected: Array) -> tuple[float, Array, Array]:
    """The mean of -log sigmoid(chosen - rejected) over (N,), and its gradients by both."""
    margin = (chosen - rejected).astype(np.float64)
    d = -1 / (1 + np.exp(margin)) / len(margin)  # d/dx of -log sigmoid(x) is -sigmoid(-x)
    return float(np.logaddexp(0, -margin).mean()), d, -d


def loss(
    optimizer: AdamW, batches: Sequence[Packed], ws: Workspace, rng: np.random.Generator | None = None
) -> float:
    """For `train.train`: the loss of a batch of 2 N texts, chosen and rejected in turn; its gradients."""
    (rows,), model = batches, optimizer.model
    outputs, cache = model.forward(rows.ids, ws, start=rows.start, positions=rows.positions, rng=rng)
    values, (b, t) = read(outputs, rows.weights)
    found, chosen, rejected = bradley_terry(values[::2], values[1::2])
    dscores = np.zeros_like(outputs)
    dscores[b[::2], t[::2], 0], dscores[b[1::2], t[1::2], 0] = chosen, rejected
    model.backward(dscores, cache, optimizer.grads)
    return found


class Judgement(NamedTuple):
    """How a reward model judges comparisons of which the truth is known."""

    right: Rate  # the better answer has the higher score
    by_kind: dict[str, Rate]
    margin: float  # mean score of the better answer less that of the other
    calibration: float  # mean distance of sigmoid(margin) to what was labelled, over ten bins of it
    labels_right: float  # the ceiling for whoever is held to the labels instead


def judge(model: GPT, tokenizer: Tokenizer, comparisons: Sequence[Comparison]) -> Judgement:
    """Against what is true, not against the labels: a slip counts the other way round."""
    texts = [encode(tokenizer, c.prompt, answer) for c in comparisons for answer in (c.chosen, c.rejected)]
    values = scores(model, texts)
    labelled = values[::2] - values[1::2]
    true = np.where([c.is_right for c in comparisons], labelled, -labelled)
    kinds = np.array([c.kind for c in comparisons])
    by_kind = {kind: wilson(int((true[kinds == kind] > 0).sum()), int((kinds == kind).sum()))
               for kind in sorted(set(kinds.tolist()))}  # fmt: skip
    # For each comparison both orders, so that a bin has its mirror image.
    sure = 1 / (1 + np.exp(-np.concatenate([labelled, -labelled])))
    was = np.repeat([1.0, 0.0], len(labelled))
    bins = np.minimum((10 * sure).astype(int), 9)
    off = [abs(sure[bins == n].sum() - was[bins == n].sum()) for n in range(10)]
    return Judgement(
        wilson(int((true > 0).sum()), len(true)), by_kind, float(true.mean()), sum(off) / len(sure),
        float(np.mean([c.is_right for c in comparisons])),
    )  # fmt: skip


# --- training -----------------------------------------------------------------------------------------------


def with_head(model: GPT, seed: int) -> GPT:
    """The model with a score head, small and random, instead of its table as head."""
    config = dataclasses.replace(model.config, num_labels=1)
    found = GPT(config, np.random.default_rng([seed, 0, 4]), model.flat.dtype.type, model.ops)
    for name, p in model.params.items():
        found.params[name][:] = p
    return found


def fit(model: GPT, tokenizer: Tokenizer, comparisons: Sequence[Comparison], settings: Settings,
        report: Callable[[train.Record], None] = lambda record: None) -> None:  # fmt: skip
    """Trains a model with a score head in memory."""
    texts = _texts(tokenizer, comparisons)
    optimizer = settings.train.optimizer(model)
    train.train(optimizer, lambda n, rng: [batch(texts, settings, n)], settings.train, compute=loss,
                report=report)  # fmt: skip


def batch(texts: Sequence[tuple[Array, Array]], settings: Settings, n: int) -> Packed:
    """The comparisons of update n, packed; each epoch has another order."""
    B, seed = min(settings.batch_size, len(texts)), settings.train.seed
    places = range(n * B, (n + 1) * B)
    order = {epoch: np.random.default_rng([seed, epoch, 2]).permutation(len(texts))
             for epoch in {place // len(texts) for place in places}}  # fmt: skip
    picked = [texts[order[place // len(texts)][place % len(texts)]] for place in places]
    return marked([ids for pair in picked for ids in pair], settings.block_size)


def _texts(tokenizer: Tokenizer, comparisons: Iterable[Comparison]) -> list[tuple[Array, Array]]:
    return [(encode(tokenizer, c.prompt, c.chosen), encode(tokenizer, c.prompt, c.rejected))
            for c in comparisons]  # fmt: skip


def begin(folder: Path, settings: Settings, *, init_from: Path, overwrite: bool = False) -> Run:
    """A new run from a model that was tuned to instructions, or another one."""
    runs.check_folder(folder, overwrite)
    model, tokenizer = checkpoint.load(init_from)
    tokenizer.chat_template = instructions.TEMPLATE
    model = with_head(model, settings.train.seed)
    settings = dataclasses.replace(
        settings, model=dataclasses.replace(model.config, dropout=settings.model.dropout),
        data=runs.absolute(settings.data), init_from=str(Path(init_from).resolve()),
    )  # fmt: skip
    model.config = settings.model
    found, mark = _comparisons(settings, tokenizer)
    settings = dataclasses.replace(settings, fingerprint=mark)
    optimizer = settings.train.optimizer(model)
    runs.first_save(folder, optimizer, tokenizer, settings)
    return Run(folder, settings, optimizer, tokenizer, *found)


def resume(folder: Path, paths: tuple[str, ...] = ()) -> Run:
    """The run in `folder` as it was saved last; the paths say where the comparisons are now."""
    settings, tokenizer = checkpoint.read_run(folder, Settings)
    if paths:
        settings = dataclasses.replace(settings, data=runs.absolute(paths))
    found, mark = _comparisons(settings, tokenizer)
    if mark != settings.fingerprint:
        given = ", ".join(settings.data)
        raise UserError(f"{given}: not the comparisons that the run in {folder} began with; it needs those")
    return Run(folder, settings, runs.load(folder, settings, tokenizer), tokenizer, *found)


def reward(run: Run, report: Callable[[train.Record], None] = lambda record: None) -> None:
    """Trains to the end; saves, and tells of each update, as all stages do (`runs.run`)."""
    settings, model, texts = run.settings, run.optimizer.model, _texts(run.tokenizer, run.train)

    def evaluate() -> train.Record:
        found = judge(model, run.tokenizer, run.val)
        return {"val_right": found.right.rate, "val_margin": found.margin}

    runs.run(run.folder, run.optimizer, run.tokenizer, settings,
             lambda n, rng: [batch(texts, settings, n)], evaluate, report, compute=loss)  # fmt: skip


def _comparisons(settings: Settings, tokenizer: Tokenizer) -> tuple[tuple[list, list], str]:
    """Those to train on, those of a tenth of the prompts to validate on, and what both depend on."""
    found = [c for path in settings.data for c in read_file(path)]
    prompts = sorted({c.prompt for c in found})
    if len(prompts) < 2:
        raise UserError(f"{settings.data[0]}: one prompt is too few: one is to validate on")
    longest = max(len(encode(tokenizer, c.prompt, text)) for c in found for text in (c.chosen, c.rejected))
    if longest > settings.block_size:
        raise UserError(f"a question with its answer has {longest} tokens, and block_size is "
                        f"{settings.block_size}")  # fmt: skip
    order = np.random.default_rng([settings.train.seed, 0, 1]).permutation(len(prompts))
    held_out = {prompts[i] for i in order[: max(1, len(prompts) // 10)]}
    parts = [c for c in found if c.prompt not in held_out], [c for c in found if c.prompt in held_out]
    return parts, hashlib.sha256(repr(found).encode()).hexdigest()


def read_file(path: str | Path) -> list[Comparison]:
    """The comparisons of a JSON Lines file. Raises UserError, with file and line."""
    found, form = [], '{"prompt": "...", "chosen": "...", "rejected": "..."}'
    for where, row in instructions.objects(path, form):
        texts = [row.get(key) for key in ("prompt", "chosen", "rejected")]
        meta = row["meta"] if isinstance(row.get("meta"), dict) else {}
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: a line is {form}")
        if texts[1].strip() == texts[2].strip():
            raise UserError(f"{where}: chosen and rejected are the same")
        found.append(Comparison(*texts, str(meta.get("kind", "")), bool(meta.get("is_right", True))))
    return found


# --- comparisons of a world ---------------------------------------------------------------------------------


def collect(
    model: GPT, tokenizer: Tokenizer, world: World, count: int, error: float, seed: int = 0,
    blind: bool = False,
) -> list[dict]:  # fmt: skip
    """Comparisons that simulated people make (`world.preferences`) of a tuned model's answers.

    Asked are people for tuning and for RLHF, and people of whom no document tells. Of each fact they see what
    the model says, drawn four times, "I do not know." and two values at random: what it may come to say.
    """
    people = world.people("known", "sft") + world.people("known", "rl") + world.people("never", "rl")
    items = tasks.questions(world, people)
    first = {(item["meta"]["about"][0], item["meta"]["attribute"]): item for item in items}
    rng, integers = np.random.default_rng(seed), raw_integers(world.seed, TASKS, 31, seed)
    asked = [instructions.prompt(tokenizer, item["prompt"]) for item in first.values() for _ in range(4)]
    room = model.context - max(map(len, asked))
    drawn, ws = [], Workspace()
    for at in range(0, len(asked), 256):
        drawn += generate(model, asked[at : at + 256], min(8, room), temperature=1.0, rng=rng,
                          stop={tokenizer.eos_id}, ws=ws, vocab_size=tokenizer.vocab_size)  # fmt: skip
    values = {attribute.name: attribute.values for attribute in world.lexicon.attributes}
    answers = {}
    for n, fact in enumerate(first):
        said = [tokenizer.decode(ids[ids != tokenizer.eos_id]).strip() for ids in drawn[4 * n : 4 * n + 4]]
        some = [values[fact[1]][next(integers) % len(values[fact[1]])] for _ in range(2)]
        answers[fact] = [*filter(None, said), tasks.REFUSAL, *(f"{value}." for value in some)]
    known = [(item, answers[item["meta"]["about"][0], item["meta"]["attribute"]]) for item in items]
    return preferences.compared(world, known, count, error, seed, blind)
