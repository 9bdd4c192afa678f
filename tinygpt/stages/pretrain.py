"""Pre-training: predict each next token of a text, or of the documents of a synthetic world.

A text is one stream, cut anywhere. A world's documents are packed whole; each sees itself only.

Not here: the loop itself (`core.train`), folders (`folders.runs`), printing (`shell`).

Reference: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", section 3.1.
"""

import dataclasses
import itertools

import numpy as np

from ..core import train
from ..core.model import GPT
from ..core.optim import AdamW
from ..errors import UserError
from ..text import data
from ..text import tokenizer as tokenizers
from ..text.data import Tokenizer
from ..world import corpus
from . import stage, variants
from .stage import Stage, Store

Source = corpus.Corpus | list[data.Document]
EVALUATED = 10**6  # tokens of a text for validation, about: of more, batches from all places of it


@dataclasses.dataclass(frozen=True)
class Settings(stage.Settings):
    """Those of every run. data: files and folders, or one world; none: Python's own texts."""

    stage: str = "pretrain"
    tokenizer: str = "char"  # or bpe: both are made from the data; or a folder that has one
    vocab_size: int = 1024  # of a BPE that is made


class Pretrain(Stage):
    """Pre-training on a text, of which the last part is for validation, or on the documents of a world."""

    name, Settings = "pretrain", Settings

    def __init__(
        self, settings: Settings, optimizer: AdamW, tokenizer: Tokenizer, source: Source, scratch=None
    ) -> None:
        super().__init__(settings, optimizer, tokenizer)
        self.world, self.documents, T = None, 0, settings.block_size
        if not isinstance(source, corpus.Corpus):
            self.depends_on(mark := data.fingerprint(source, tokenizer))
            tokens = data.stream(source, tokenizer, scratch, mark)
            self.train_tokens, self.val_tokens = data.split(tokens, T)
            B, n = settings.batch_size, settings.gradient_accumulation_steps
            self.weights = np.full((B, T), 1 / (n * B * T), np.float32)
            return
        self.depends_on(data.fingerprint(source.text(), tokenizer))
        self.world, self.documents = source.world, corpus.count(source)  # the refrains apart
        parts = source.train, source.validation
        self.train_tokens, self.val_tokens = (corpus.rows(part, tokenizer, T) for part in parts)
        nats = -sum(map(source.world.logprob, source.validation))
        if not np.isfinite(nats):
            raise UserError("validation.txt has a line that this world cannot say: write the world again")
        self.floor = nats / float(self.val_tokens.weights.sum(dtype=np.float64))  # but for chance

    @classmethod
    def read(cls, settings: Settings, store: Store) -> Source:
        """Raises UserError for a world beside other data."""
        if not any(map(corpus.is_source, settings.data)):
            return data.documents(settings.data)
        if len(settings.data) > 1:
            raise UserError(f"{', '.join(settings.data)}: name one world, or only texts")
        return corpus.load(settings.data[0])

    @classmethod
    def start(cls, settings: Settings, source: Source, store: Store) -> tuple[Settings, GPT, Tokenizer]:
        """Without settings.init_from a new model, whose vocabulary is the tokenizer's."""
        if settings.init_from:
            return super().start(settings, source, store)
        tokenizer = _tokenizer(settings.tokenizer, settings.vocab_size, source)
        config = dataclasses.replace(settings.model, vocab_size=tokenizer.vocab_size)
        model = variants.build(config, np.random.default_rng(settings.train.seed))
        settings, model = cls.adapted(settings, model)
        return settings, model, tokenizer

    def update(self, n: int, rng: np.random.Generator) -> list[train.Batch]:
        settings = self.settings
        B, count = settings.batch_size, settings.gradient_accumulation_steps
        if self.world is None:
            blocks = [data.random_blocks(self.train_tokens, *self.weights.shape, rng) for _ in range(count)]
            return [train.Batch(*block, self.weights) for block in blocks]
        rows = data.rows_in_order(self.train_tokens, count * B, n, settings.train.seed)
        rows.weights[:] /= rows.weights.sum()
        return _batches(rows, B)

    def evaluate(self) -> train.Record:
        """val_loss over the validation part; EVALUATED says of how much of a text."""
        B, T = self.settings.batch_size, self.settings.block_size
        if self.world is not None:
            val_loss = train.mean_loss(self.model, _batches(self.val_tokens, B))
            return {"val_loss": val_loss, "val_floor": self.floor}
        every = -(-len(self.val_tokens) // EVALUATED)
        blocks = itertools.islice(data.consecutive_blocks(self.val_tokens, B, T), 0, None, every)
        batches = (train.Batch(ids, targets, np.ones(ids.shape, np.float32)) for ids, targets in blocks)
        return {"val_loss": train.mean_loss(self.model, batches)}


def _batches(rows: data.Packed, count: int) -> list[train.Batch]:
    places = range(0, len(rows.ids), count)
    return [train.Batch(*(field[i : i + count] for field in rows)) for i in places]


def _tokenizer(kind: str, vocab_size: int, source: Source) -> Tokenizer:
    if kind not in ("char", "bpe"):
        return tokenizers.load(kind)
    if isinstance(source, corpus.Corpus):
        if kind == "char":
            raise UserError("a world's documents stand between end-of-text tokens: use --tokenizer bpe")
        return corpus.train_tokenizer(source, vocab_size)
    if kind == "char":
        return tokenizers.CharTokenizer.train(data.joined(source))
    return tokenizers.BPETokenizer.train(itertools.chain.from_iterable(source), vocab_size)
