"""Pre-training: predict each next token of a text.

A run lives in one folder (`runs`): `begin` makes it, `resume` takes it up where it was saved last, `pretrain`
trains. Not here: the loop itself (`train`), what is in the files (`checkpoint`), printing (`cli`).

Reference: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", section 3.1.
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import checkpoint, data, runs, train
from . import tokenizer as tokenizers
from .errors import UserError
from .finetune import adapters
from .model import GPT
from .optim import AdamW


@dataclasses.dataclass(frozen=True)
class Settings(runs.Settings):
    """Those of every run; without files or folders as data it reads Python's own texts."""

    stage: str = "pretrain"


class Run(NamedTuple):
    """A run that is ready to go on from update `optimizer.steps`."""

    folder: Path
    settings: Settings
    optimizer: AdamW
    tokenizer: data.Tokenizer
    train_tokens: np.ndarray
    val_tokens: np.ndarray


def begin(
    folder: Path,
    settings: Settings,
    *,
    tokenizer: str = "char",
    vocab_size: int = 1024,
    init_from: Path | None = None,
    overwrite: bool = False,
) -> Run:
    """A new run in `folder`, which is written last, after all that can be wrong has been checked.

    The first file holds the whole run: a kill leaves what was there before, or a run that `resume` takes up.

    tokenizer: "char", "bpe" (both are made from the data; `vocab_size` is for the latter) or a folder that
    has one. init_from: a model's folder, whose weights, sizes and tokenizer are taken; of settings.model only
    the dropout is. settings.adapter: what is trained beside these weights, or beside random ones. The model's
    vocabulary is the tokenizer's. Raises UserError, also where `folder` has a model and not `overwrite`.
    """
    runs.check_folder(folder, overwrite)
    documents = data.documents(settings.data)
    if init_from is not None:
        model, tok = checkpoint.load(init_from)
        model.config = dataclasses.replace(model.config, dropout=settings.model.dropout)
        where, mark = str(Path(init_from).resolve()), adapters.fingerprint(model)
        settings = dataclasses.replace(settings, init_from=where, init_hash=mark)
    else:
        tok = _tokenizer(tokenizer, vocab_size, documents)
        config = dataclasses.replace(settings.model, vocab_size=tok.vocab_size)
        model = GPT(config, np.random.default_rng(settings.train.seed))
    if settings.adapter.kind:
        rng = np.random.default_rng([settings.train.seed, 0, 3])
        model.adapter = adapters.create(model, settings.adapter, rng)
    mark = data.fingerprint(documents, tok)
    parts = data.split(data.stream(documents, tok, folder, mark), settings.block_size)
    paths = runs.absolute(settings.data)
    settings = dataclasses.replace(settings, model=model.config, data=paths, fingerprint=mark)
    optimizer = settings.train.optimizer(model)
    runs.first_save(folder, optimizer, tok, settings)
    return Run(folder, settings, optimizer, tok, *parts)


def resume(folder: Path, paths: tuple[str, ...] = ()) -> Run:
    """The run in `folder` as it was saved last. `paths`: where the data is now, if it was moved.

    Raises UserError where there is no run, and where the data is gone or another.
    """
    settings, tok = checkpoint.read_run(folder, Settings)
    if paths:
        settings = dataclasses.replace(settings, data=runs.absolute(paths))
    documents = data.documents(settings.data)
    if data.fingerprint(documents, tok) != settings.fingerprint:
        source = ", ".join(settings.data) or "the documentation of this Python"
        raise UserError(f"{source}: is not the text that the run in {folder} began with; it needs that text")
    optimizer = runs.load(folder, settings, tok)
    tokens = data.stream(documents, tok, folder, settings.fingerprint)
    return Run(folder, settings, optimizer, tok, *data.split(tokens, settings.block_size))


def pretrain(run: Run, report: Callable[[train.Record], None] = lambda record: None) -> None:
    """Trains to the end; saves at every evaluation, at the end and on Ctrl-C, then raising KeyboardInterrupt.

    Each record of `train.train`, with `val_loss` where it was evaluated, over the whole validation part,
    becomes a line of metrics.jsonl and goes to `report`.
    """
    settings, model = run.settings, run.optimizer.model
    B, T, n = settings.batch_size, settings.block_size, settings.gradient_accumulation_steps
    mean = np.full((B, T), 1 / (n * B * T), np.float32)

    def batches(step: int, rng: np.random.Generator) -> list[train.Batch]:
        return [train.Batch(*data.random_blocks(run.train_tokens, B, T, rng), mean) for _ in range(n)]

    def evaluate() -> train.Record:
        blocks = data.consecutive_blocks(run.val_tokens, B, T)
        batches = (train.Batch(ids, targets, np.ones(ids.shape, np.float32)) for ids, targets in blocks)
        return {"val_loss": train.mean_loss(model, batches)}

    runs.run(run.folder, run.optimizer, run.tokenizer, settings, batches, evaluate, report)


def _tokenizer(kind: str, vocab_size: int, documents: list[data.Document]) -> data.Tokenizer:
    if kind == "char":
        return tokenizers.CharTokenizer.train(data.joined(documents))
    if kind == "bpe":
        return tokenizers.BPETokenizer.train(itertools.chain.from_iterable(documents), vocab_size)
    return tokenizers.load(kind)
