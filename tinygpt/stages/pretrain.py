"""Pre-training: predict each next token of a text, or of the documents of a synthetic world.

A text is one stream, cut anywhere. A world's documents are packed whole; each document sees only itself.

Not here: the loop itself (`core.train`), folders (`folders.runs`), printing (`shell`).

Reference: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", section 3.1.
"""

import dataclasses
import itertools

import numpy as np

from ..core import train
from ..core.config import PRESETS, GPTConfig
from ..core.model import GPT
from ..core.option import option, written
from ..errors import UserError
from ..text import data
from ..text import tokenizer as tokenizers
from ..text.data import Tokenizer
from ..text.tokenizer import END_OF_TEXT
from ..world import corpus
from . import recipes, stage, variants
from .adapter import AdapterConfig
from .stage import Stage, Store, folder

Source = corpus.Corpus | list[data.Text]
FINE_TUNING = {"max_iters": 200, "learning_rate": 3e-5, "warmup_iters": 10, "eval_interval": 50}
_NEW = ("init_from",)  # the option beside which an option of a new model has no meaning
EVALUATED = 10**6  # about so many tokens of a text are for validation


@dataclasses.dataclass(frozen=True)
class Settings(stage.Settings):
    """The settings of every run, and those of this stage. data: files and folders, or one world; by default
    Python's own texts."""

    stage: str = "pretrain"
    data: tuple[str, ...] = option(
        (), help="A UTF-8 text file, or a folder of .txt, .md and .rst files; repeat. world: the synthetic "
        "world that --seed makes, or the folder that tinygpt world wrote. Defaults then: "
        f"{written(recipes.PRETRAIN)}.", metavar="PATH", shown="Python's own documentation",
    )  # fmt: skip
    plain_text: bool = option(False, help=f"Take {END_OF_TEXT} in a file as text. Otherwise it separates "
                              "documents.")  # fmt: skip
    tokenizer: str = option("char", help="The kind of tokens.", metavar="char|bpe|FOLDER", alone=_NEW)
    vocab_size: int = option(1024, "[1, inf)", "With --tokenizer bpe.", only={"tokenizer": ("bpe",)})
    init_from: str = folder(help="Begin with the model there, tinygpt's or GPT-2's, and its tokenizer. "
                            f"Defaults then: --block-size 64 {written(FINE_TUNING)}.")  # fmt: skip
    preset: str = option("nano", tuple(PRESETS), "Sizes, which the next four change.", alone=_NEW)
    block_size: int = option(64, "[1, inf)", "Tokens of context.", shown="nano: 64")

    def __post_init__(self) -> None:
        if self.adapter and not self.init_from and self.adapter.kind != "lora":
            raise UserError(f"adapter {self.adapter.kind} needs a trained model: give it as --init-from")
        super().__post_init__()


class Pretrain(Stage):
    """Train a model to predict the next token of a text.

    Without options: a small model, one character at a time, on Python's own documentation, in about two
    minutes. The last tenth of the text is for validation. val loss is the mean over this tenth. Of
    more than a million tokens it takes half a million to a million, evenly spread. A world has its own
    validation text. Ctrl-C saves, --resume continues. Without --init-from the model begins at random. With
    --adapter lora the maps of a random model stay random, except for merges, and their branches are trained.
    All weights without a branch are trained too. The folder then has the whole model.
    """

    name, out, Settings = "pretrain", "out", Settings
    sizes, most_tokens = ("n_layer", "n_head", "n_embd", "post_norm", "dropout"), 64

    @classmethod
    def recipe(cls, options: dict) -> dict[str, object]:
        if options["init_from"]:
            return FINE_TUNING
        return recipes.PRETRAIN if any(map(corpus.is_source, options["data"])) else {}

    @classmethod
    def complete(cls, options: dict, written: set[str], model: GPTConfig, adapter: AdapterConfig | None):
        if not options["init_from"]:
            written = written | {"learning_rate"}  # of a model that begins at random
        super().complete(options, written, model, adapter)

    def about(self) -> str:
        parts = self.train_tokens, self.val_tokens
        n, n_val = (part.size if self.world is None else int(part.weights.sum()) for part in parts)
        kinds = f"{self.model.config.vocab_size:,} kinds of token"
        return f", {kinds}; {n:,} tokens to train on, {n_val:,} to evaluate on{self.texts}"

    def prepare(self, source: Source) -> None:
        self.world, self.documents, self.texts, T = None, 0, "", self.settings.block_size
        if not isinstance(source, corpus.Corpus):
            self.depends_on(mark := data.fingerprint(source, self.tokenizer))
            self.texts = data.about(source)
            tokens = data.stream(source, self.tokenizer, self.folder, mark)
            self.train_tokens, self.val_tokens = data.split(tokens, T)
            return
        self.depends_on(data.fingerprint(source.text(), self.tokenizer))
        self.world, self.documents = source.world, corpus.count(source)  # without the refrains
        self.train_tokens, self.val_tokens = (corpus.rows(part, self.tokenizer, T)
                                              for part in (source.train, source.validation))  # fmt: skip
        nats = -sum(map(source.world.logprob, source.validation))
        if not np.isfinite(nats):
            raise UserError("validation.txt has a line that this world cannot say: write the world again")
        self.floor = nats / float(self.val_tokens.weights.sum(dtype=np.float64))  # up to chance

    @classmethod
    def read(cls, settings: Settings, store: Store) -> Source:
        """Raises UserError for a world beside other data."""
        if not any(map(corpus.is_source, settings.data)):
            return data.documents(settings.data, settings.plain_text)
        if len(settings.data) > 1:
            raise UserError(f"{', '.join(settings.data)}: name one world, or only texts")
        return corpus.load(settings.data[0])

    @classmethod
    def start(cls, settings: Settings, source: Source, store: Store) -> tuple[Settings, GPT, Tokenizer]:
        """Without settings.init_from a new model; the tokenizer decides its vocabulary."""
        if settings.init_from:
            return super().start(settings, source, store)
        tokenizer = _tokenizer(settings.tokenizer, settings.vocab_size, source)
        config = dataclasses.replace(settings.model, vocab_size=tokenizer.vocab_size)
        model = variants.build(config, np.random.default_rng(settings.train.seed))
        if settings.adapter:
            adapter = dataclasses.replace(settings.adapter, full=True)
            settings = dataclasses.replace(settings, adapter=adapter)
        return *cls.adapted(settings, model), tokenizer

    def update(self, n: int, rng: np.random.Generator) -> list[train.Batch]:
        B, count = self.settings.batch_size, self.settings.gradient_accumulation_steps
        if self.world is None:
            shape = B, self.settings.block_size
            weights = np.full(shape, 1 / (count * B * shape[1]), np.float32)
            blocks = (data.random_blocks(self.train_tokens, *shape, rng) for _ in range(count))
            return [train.Batch(*block, weights) for block in blocks]
        rows = data.rows_in_order(self.train_tokens, count * B, n, self.settings.train.seed)
        rows.weights[:] /= rows.weights.sum()
        return _batches(rows, B)

    def evaluate(self) -> train.Record:
        """val_loss over the validation part, or over about EVALUATED tokens of a long text."""
        B, T = self.settings.batch_size, self.settings.block_size
        if self.world is not None:
            val_loss = train.mean_loss(self.model, _batches(self.val_tokens, B), self.optimizer.group)
            return {"val_loss": val_loss, "val_floor": self.floor}
        every = -(-len(self.val_tokens) // EVALUATED)
        blocks = itertools.islice(data.consecutive_blocks(self.val_tokens, B, T), 0, None, every)
        batches = (train.Batch(ids, targets, np.ones(ids.shape, np.float32)) for ids, targets in blocks)
        return {"val_loss": train.mean_loss(self.model, batches, self.optimizer.group)}


def _batches(rows: train.Batch, count: int) -> list[train.Batch]:
    return [rows.at(slice(i, i + count)) for i in range(0, len(rows.ids), count)]


def _tokenizer(kind: str, vocab_size: int, source: Source) -> Tokenizer:
    if kind not in ("char", "bpe"):
        return tokenizers.load(kind)
    if isinstance(source, corpus.Corpus):
        if kind == "char":
            raise UserError("a world's documents stand between end-of-text tokens: use --tokenizer bpe")
        return corpus.train_tokenizer(source, vocab_size)
    if kind == "char":
        special = [END_OF_TEXT] * (data.count(source) > len(source))
        return tokenizers.CharTokenizer.train(data.joined(source), special)
    return tokenizers.BPETokenizer.train(filter(None, data.parts(source)), vocab_size)
