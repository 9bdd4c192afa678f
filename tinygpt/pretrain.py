"""Pre-training: predict each next token of a text, or of the documents of a synthetic world.

A run lives in one folder: `begin` makes it, `resume` takes it up where it was saved last, `pretrain` trains.
At every moment the folder has a model that can be loaded, or a run from which `resume` writes that model. The
model is always the newest, not the one with the best validation loss; metrics.jsonl tells which that was.

A text is one stream, cut anywhere. A world's documents are packed whole into rows, each seeing itself only.

Not here: the loop itself (`train`), what is in the files (`checkpoint`), printing (`cli`).

Reference: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", section 3.1.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import checkpoint, data, train
from . import tokenizer as tokenizers
from .atomic import sync, writing
from .errors import UserError
from .model import GPT, GPTConfig
from .optim import AdamW
from .world import World, corpus

METRICS = "metrics.jsonl"
MOST_TOKENS = 10**9  # in a batch: no memory holds more


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run depends on, apart from its tokenizer: saved with it, and all that `resume` needs."""

    model: GPTConfig
    train: train.TrainConfig
    data: tuple[str, ...] = ()  # files and folders, or one world; none: Python's own texts
    fingerprint: str = ""  # of the text and the vocabulary
    block_size: int = 64  # of the training sequences: at most the model's
    batch_size: int = 12
    gradient_accumulation_steps: int = 1  # batches of that size for each update

    def __post_init__(self) -> None:
        for name in ("block_size", "batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.block_size > self.model.block_size:
            limit = self.model.block_size
            raise UserError(f"block_size is {self.block_size}: the model has only {limit} positions")
        if self.batch_size * self.block_size > MOST_TOKENS:
            raise UserError(
                f"batch_size is {self.batch_size}: with block_size {self.block_size} it must be at most "
                f"{MOST_TOKENS // self.block_size}; gradient_accumulation_steps adds up small batches"
            )


class Run(NamedTuple):
    """A run that is ready to go on from update `optimizer.steps`."""

    folder: Path
    settings: Settings
    optimizer: AdamW
    tokenizer: data.Tokenizer
    train_tokens: np.ndarray | data.Packed
    val_tokens: np.ndarray | data.Packed
    world: World | None = None


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
    the dropout is. The model's vocabulary is the tokenizer's. Raises UserError, also where `folder` has a
    model and not `overwrite`.
    """
    _check_folder(folder, overwrite)
    source = _source(settings.data)
    if init_from is not None:
        model, tok = checkpoint.load(init_from)
        model.config = dataclasses.replace(model.config, dropout=settings.model.dropout)
    else:
        tok = _tokenizer(tokenizer, vocab_size, source)
        config = dataclasses.replace(settings.model, vocab_size=tok.vocab_size)
        model = GPT(config, np.random.default_rng(settings.train.seed))
    mark = _fingerprint(source, tok)
    parts = _parts(source, tok, folder, mark, settings.block_size)
    paths = _absolute(settings.data)
    settings = dataclasses.replace(settings, model=model.config, data=paths, fingerprint=mark)
    optimizer = settings.train.optimizer(model)
    checkpoint.save_trainer(folder, optimizer, tok, settings)  # also the largest: a full disk changes nothing
    checkpoint.save(folder, model, tok)
    return Run(folder, settings, optimizer, tok, *parts)


def resume(folder: Path, paths: tuple[str, ...] = ()) -> Run:
    """The run in `folder` as it was saved last. `paths`: where the data is now, if it was moved.

    The model's files are written anew, as a kill may have come between them and the run's own. Raises
    UserError where there is no run, and where the data is gone or another.
    """
    settings, tok = checkpoint.read_run(folder, Settings)
    if paths:
        settings = dataclasses.replace(settings, data=_absolute(paths))
    source = _source(settings.data)
    if _fingerprint(source, tok) != settings.fingerprint:
        given = ", ".join(settings.data) or "the documentation of this Python"
        raise UserError(f"{given}: is not the text that the run in {folder} began with; it needs that text")
    optimizer = settings.train.optimizer(GPT(settings.model))
    checkpoint.load_trainer(folder, optimizer)
    checkpoint.save(folder, optimizer.model, tok)
    parts = _parts(source, tok, folder, settings.fingerprint, settings.block_size)
    return Run(folder, settings, optimizer, tok, *parts)


def pretrain(run: Run, report: Callable[[train.Record], None] = lambda record: None) -> None:
    """Trains to the end; saves at every evaluation, at the end and on Ctrl-C, then raising KeyboardInterrupt.

    Each record of `train.train`, with `val_loss` where it was evaluated, over the whole validation part,
    becomes a line of metrics.jsonl and goes to `report`.
    """
    settings, model = run.settings, run.optimizer.model
    B, T, n = settings.batch_size, settings.block_size, settings.gradient_accumulation_steps
    mean = np.full((B, T), 1 / (n * B * T), np.float32)

    def batches(step: int, rng: np.random.Generator) -> list[train.Batch]:
        if run.world is None:
            return [train.Batch(*data.random_blocks(run.train_tokens, B, T, rng), mean) for _ in range(n)]
        rows = data.shuffled_rows(run.train_tokens, n * B, step, settings.train.seed)
        rows.weights[:] /= rows.weights.sum()
        return _batches(rows, B)

    def evaluate() -> train.Record:
        if run.world is not None:
            return {"val_loss": train.mean_loss(model, _batches(run.val_tokens, B))}
        blocks = data.consecutive_blocks(run.val_tokens, B, T)
        batches = (train.Batch(ids, targets, np.ones(ids.shape, np.float32)) for ids, targets in blocks)
        return {"val_loss": train.mean_loss(model, batches)}

    def save() -> None:
        sync(metrics)  # the record of an update is on the disk before the update is
        checkpoint.save_trainer(run.folder, run.optimizer, run.tokenizer, settings)
        checkpoint.save_weights(run.folder, model)

    def log(record: train.Record) -> None:
        with writing(metrics), open(metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        report(record)

    metrics = run.folder / METRICS
    records = train.resume_metrics(metrics, run.optimizer.steps)
    elapsed_s = records[-1]["elapsed_s"] if records else 0.0
    train.train(
        run.optimizer, batches, settings.train, evaluate=evaluate, report=log, save=save, elapsed_s=elapsed_s
    )


def _batches(rows: data.Packed, count: int) -> list[train.Batch]:
    places = range(0, len(rows.ids), count)
    return [train.Batch(*(field[i : i + count] for field in rows)) for i in places]


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Raises UserError, or OSError, unless a run can be written here; makes the folder."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, and a run needs a folder")
    found = [name for name in (*checkpoint.FILES, METRICS) if (folder / name).exists()]
    if found and not overwrite:
        raise UserError(
            f"{folder}: already has a {found[0]}; --resume {folder} goes on with the run there, --overwrite "
            "replaces it, --out takes another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: this folder is read-only")


def _absolute(paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(p if p.startswith("world:") else str(Path(p).resolve()) for p in paths)


# --- a text or a world --------------------------------------------------------------------------------------


def _source(paths: tuple[str, ...]) -> corpus.Corpus | list[data.Document]:
    """What the paths name. Raises UserError for a world beside other data."""
    if not any(map(corpus.is_source, paths)):
        return data.documents(paths)
    if len(paths) > 1:
        raise UserError(f"{', '.join(paths)}: a world is trained on alone: name one world, or only texts")
    return corpus.load(paths[0])


def _fingerprint(source: corpus.Corpus | list[data.Document], tok: data.Tokenizer) -> str:
    return data.fingerprint(source.text() if isinstance(source, corpus.Corpus) else source, tok)


def _parts(source, tok: data.Tokenizer, folder: Path, mark: str, block_size: int) -> tuple:
    """The last fields of a Run: what to train on, what to evaluate on, and the world, if it is one."""
    if not isinstance(source, corpus.Corpus):
        return data.split(data.stream(source, tok, folder, mark), block_size)
    parts = (corpus.rows(part, tok, block_size) for part in (source.train, source.validation))
    return *parts, source.world


def _tokenizer(kind: str, vocab_size: int, source) -> data.Tokenizer:
    if kind not in ("char", "bpe"):
        return tokenizers.load(kind)
    if isinstance(source, corpus.Corpus):
        if kind == "char":
            raise UserError("a world's documents stand between end-of-text tokens: use --tokenizer bpe")
        return corpus.train_tokenizer(source, vocab_size)
    if kind == "char":
        return tokenizers.CharTokenizer.train(data.joined(source))
    return tokenizers.BPETokenizer.train(itertools.chain.from_iterable(source), vocab_size)
