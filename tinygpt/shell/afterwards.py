"""The results that a training command prints at its end."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..core.train import weight_change
from ..lab import report
from ..stages import evaluate, reward
from ..stages.answers import answers
from ..stages.prompts import nearest
from ..stages.stage import Stage
from ..text import instructions
from ..text.stream import stream
from ..world import corpus
from .progress import command, data_options, shown_token
from .terminal import say
from .worlds import world_of

FEW = 30  # comparisons: the 95 % interval of a rate is up to +-18 % wide


def saved(stage: Stage, following: str = "generate") -> None:
    """Names the folder of a run, and the next command."""
    settings = stage.settings
    base = [] if settings.has_model else [settings.init_from, "--adapter-folder"]
    say(f"\nSaved in {stage.folder}. Next: {command(following, *base, str(stage.folder))}")


def _pretrain(stage: Stage) -> None:
    """A sample of text. Of a world, the loss above the floor, and recall by how often the text has a fact."""
    model, tokenizer = stage.model, stage.tokenizer
    if stage.world is None:
        rng, start = np.random.default_rng(0), stage.val_tokens[:1].tolist()
        text = "".join(stream(model, tokenizer, start, 300, temperature=0.8, rng=rng))
        say(f"\nA sample:\n{text.strip()}")
    else:
        say(f"\n{report.gaps(evaluate.gaps(model, tokenizer, stage.world))}")
        recalled = evaluate.recall_by_exposure(model, tokenizer, stage.world, stage.documents)
        say(f"\n{report.recall(recalled, evaluate.chance(stage.world))}")
    saved(stage)


def _sft(stage: Stage) -> None:
    settings, model, tokenizer = stage.settings, stage.model, stage.tokenizer
    if stage.before is not None:
        say(f"\nThe weights moved by {weight_change(stage.before, model.params)[0]:.1%} of their norm.")
    if settings.adapter and settings.adapter.kind in ("ptuning", "prompt"):
        say("\nEach row of the learned prompt, and the tokens nearest to the row:")
        for i, ids in enumerate(nearest(model).tolist()):
            shown = "  ".join(shown_token(tokenizer.tokens[i]) for i in ids if i < tokenizer.vocab_size)
            say(f"  {i:3}  {shown}")
    _tasks(stage)
    conversations = [example.messages for example in stage.questions[:3]]
    replies = answers(model, tokenizer, [messages[:-1] for messages in conversations], 100)
    for (*before, expected), answer in zip(conversations, replies, strict=True):
        question = before[-1]["content"].strip() if before else ""
        say(f"\n> {question}\n{answer.text}{'' if answer.stopped else ' ...'}")
        say(f"  (in the data: {expected['content'].strip()})")
    saved(stage, "chat")


def _reward(stage: Stage) -> None:
    judge = stage.judge
    judgement = reward.judged(judge, stage.val)
    in_world = any(judgement.by_kind)
    say(f"\nThe preferred answer has the higher score: {judgement.right}.")
    if judgement.right.n < FEW:
        say(f"Too few to judge: {judgement.right.n} comparisons, a tenth of all. Give some hundreds.")
    if in_world:
        say(f"The truth decides; {judgement.labels_right:.1%} of the labels agree with the truth.")
    say(f"Mean difference of the scores: {judgement.margin:.2f}. Error of the judge's certainty: "
        f"{judgement.calibration:.1%}.")  # fmt: skip
    source = world_of(Path(stage.settings.init_from)) if in_world else None
    if source:
        world = corpus.world_of(source)
        people = world.people("known", "eval") + world.people("never", "eval")
        pairs = reward.collect(judge.author, judge.tokenizer, world, people, 2000, error=0)
        others = reward.judged(judge, pairs)
        say(f"About people of no comparison: {others.right}.")
        for kind, rate in others.by_kind.items():
            say(f"  {kind}: {rate}")
    words = ["--init-from", stage.settings.init_from, "--reward-model", str(stage.folder)]
    words += data_options(["world"] if source else stage.settings.data)
    say(f"\nSaved in {stage.folder}. Next: {command('rlhf', *words)}")


def _rlhf(stage: Stage) -> None:
    prompts = list(dict.fromkeys(stage.prompts))[:3]
    ids = [instructions.prompt(stage.tokenizer, prompt) for prompt in prompts]
    room = min(24, stage.model.context - max(map(len, ids)))
    before, after = (answers(model, stage.tokenizer, ids, room)
                     for model in (stage.data.reference, stage.model))  # fmt: skip
    for prompt, old, new in zip(prompts, before, after, strict=True):
        say(f"\n> {instructions.shown(prompt)}\n  before: {old.text}\n  after:  {new.text}")
    _tasks(stage)
    saved(stage, "chat")


def _tasks(stage: Stage) -> None:
    """The scores of a model that was tuned on a world, on people and problems of no tuning set."""
    for source in filter(corpus.is_source, stage.settings.data):
        scores = evaluate.task_scores(stage.model, stage.tokenizer, corpus.world_of(source))
        say(f"\n{report.scores(scores)}")


AFTERWARDS: dict[str, Callable[[Stage], None]] = {
    "pretrain": _pretrain, "sft": _sft, "reward": _reward, "rlhf": _rlhf,
}  # fmt: skip
