"""Pre-training: predict each next token of a text, or of the documents of a synthetic world.

A run lives in one folder (`runs`): `begin` makes it, `resume` takes it up where it was saved last, `pretrain`
trains. A text is one stream, cut anywhere; a world's documents are packed whole, each seeing itself only.

Not here: the loop itself (`train`), what is in the files (`checkpoint`), printing (`cli`).

Reference: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", section 3.1.
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..core import train
from ..core.optim import AdamW
from ..errors import UserError
from ..folders import checkpoint, runs
from ..text import data
from ..text import tokenizer as tokenizers
from ..world import World, corpus
from . import variants
from .adapter import fingerprint
from .variants import build

Source = corpus.Corpus | list[data.Document]
EVALUATED = 10**6  # tokens of a text for validation, about: of more, batches from all places of it


@dataclasses.dataclass(frozen=True)
class Settings(runs.Settings):
    """Those of every run. data: files and folders, or one world; none: Python's own texts."""

    stage: str = "pretrain"


class Run(NamedTuple):
    """A run that is ready to go on from update `optimizer.steps`."""

    folder: Path
    settings: Settings
    optimizer: AdamW
    tokenizer: data.Tokenizer
    train_tokens: np.ndarray | data.Packed
    val_tokens: np.ndarray | data.Packed
    world: World | None = None
    documents: int = 0  # of the world's corpus, the refrains apart
    floor: float | None = None  # a world's val loss cannot be less, but for chance


def begin(
    folder: Path,
    settings: Settings,
    *,
    tokenizer: str = "char",
    vocab_size: int = 1024,
    init_from: Path | None = None,
    overwrite: bool = False,
) -> Run:
    """A new run in `folder`: what is there is replaced last, after all that can be wrong has been checked.

    The first file holds the whole run: a kill leaves what was there before, or a run that `resume` takes up.

    tokenizer: "char", "bpe" (both are made from the data; `vocab_size` is for the latter) or a folder that
    has one. init_from: a model's folder, whose weights, sizes and tokenizer are taken; of settings.model only
    the dropout is. settings.adapter: what is trained beside these weights, or beside random ones. The model's
    vocabulary is the tokenizer's. Raises UserError, also where `folder` has a model and not `overwrite`.
    """
    runs.check_folder(folder, overwrite)
    source = _source(settings.data)
    if init_from is not None:
        model, tok = checkpoint.load(init_from)
        model.config = dataclasses.replace(model.config, dropout=settings.model.dropout)
        where, mark = str(Path(init_from).resolve()), fingerprint(model)
        settings = dataclasses.replace(settings, init_from=where, init_hash=mark)
    else:
        tok = _tokenizer(tokenizer, vocab_size, source)
        config = dataclasses.replace(settings.model, vocab_size=tok.vocab_size)
        model = build(config, np.random.default_rng(settings.train.seed))
    if settings.adapter:
        rng = np.random.default_rng([settings.train.seed, 0, 3])
        model = variants.create(model, settings.adapter, rng)
    mark = _fingerprint(source, tok)
    parts = _parts(source, tok, folder, mark, settings.block_size)
    paths = runs.absolute(settings.data)
    settings = dataclasses.replace(settings, model=model.config, data=paths, fingerprint=mark)
    optimizer = settings.train.optimizer(model)
    runs.first_save(folder, optimizer, tok, settings)
    return Run(folder, settings, optimizer, tok, *parts)


def resume(folder: Path, paths: tuple[str, ...] = ()) -> Run:
    """The run in `folder` as it was saved last. `paths`: where the data is now, if it was moved.

    Raises UserError where there is no run, and where the data is gone or another.
    """
    settings, tok = runs.read(folder, Settings, data=paths)
    source = _source(settings.data)
    runs.check_data(folder, settings, _fingerprint(source, tok))
    optimizer = runs.load(folder, settings, tok)
    parts = _parts(source, tok, folder, settings.fingerprint, settings.block_size)
    return Run(folder, settings, optimizer, tok, *parts)


def pretrain(run: Run, report: Callable[[train.Record], None] = lambda record: None) -> None:
    """Trains to the end; saves at every evaluation, at the end and on Ctrl-C, then raising KeyboardInterrupt.

    Each record of `train.train`, with `val_loss` where it was evaluated, over the validation part (EVALUATED
    says of how much of it), becomes a line of metrics.jsonl and goes to `report`.
    """
    settings, model = run.settings, run.optimizer.model
    B, T, n = settings.batch_size, settings.block_size, settings.gradient_accumulation_steps
    mean = np.full((B, T), 1 / (n * B * T), np.float32)

    def batches(step: int, rng: np.random.Generator) -> list[train.Batch]:
        if run.world is None:
            return [train.Batch(*data.random_blocks(run.train_tokens, B, T, rng), mean) for _ in range(n)]
        rows = data.rows_in_order(run.train_tokens, n * B, step, settings.train.seed)
        rows.weights[:] /= rows.weights.sum()
        return _batches(rows, B)

    def evaluate() -> train.Record:
        if run.world is not None:
            val_loss = train.mean_loss(model, _batches(run.val_tokens, B))
            return {"val_loss": val_loss, "val_floor": run.floor}
        every = -(-len(run.val_tokens) // EVALUATED)
        blocks = itertools.islice(data.consecutive_blocks(run.val_tokens, B, T), 0, None, every)
        batches = (train.Batch(ids, targets, np.ones(ids.shape, np.float32)) for ids, targets in blocks)
        return {"val_loss": train.mean_loss(model, batches)}

    runs.run(run.folder, run.optimizer, run.tokenizer, settings, batches, evaluate, report)


def _batches(rows: data.Packed, count: int) -> list[train.Batch]:
    places = range(0, len(rows.ids), count)
    return [train.Batch(*(field[i : i + count] for field in rows)) for i in places]


# --- a text or a world --------------------------------------------------------------------------------------


def _source(paths: tuple[str, ...]) -> Source:
    """What the paths name. Raises UserError for a world beside other data."""
    if not any(map(corpus.is_source, paths)):
        return data.documents(paths)
    if len(paths) > 1:
        raise UserError(f"{', '.join(paths)}: name one world, or only texts")
    return corpus.load(paths[0])


def _fingerprint(source: Source, tok: data.Tokenizer) -> str:
    return data.fingerprint(source.text() if isinstance(source, corpus.Corpus) else source, tok)


def _parts(source: Source, tok: data.Tokenizer, folder: Path, mark: str, block_size: int) -> tuple:
    """The fields of a Run from train_tokens on."""
    if not isinstance(source, corpus.Corpus):
        return data.split(data.stream(source, tok, folder, mark), block_size)
    train_rows, val_rows = (corpus.rows(part, tok, block_size) for part in (source.train, source.validation))
    nats = -sum(map(source.world.logprob, source.validation))
    if not np.isfinite(nats):
        raise UserError("validation.txt has a line that this world cannot say: write the world again")
    floor = nats / float(val_rows.weights.sum(dtype=np.float64))
    return train_rows, val_rows, source.world, corpus.count(source), floor


def _tokenizer(kind: str, vocab_size: int, source: Source) -> data.Tokenizer:
    if kind not in ("char", "bpe"):
        return tokenizers.load(kind)
    if isinstance(source, corpus.Corpus):
        if kind == "char":
            raise UserError("a world's documents stand between end-of-text tokens: use --tokenizer bpe")
        return corpus.train_tokenizer(source, vocab_size)
    if kind == "char":
        return tokenizers.CharTokenizer.train(data.joined(source))
    return tokenizers.BPETokenizer.train(itertools.chain.from_iterable(source), vocab_size)
