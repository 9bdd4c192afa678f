"""The text of a world: drawn anew from its seed, or read from a folder that `write` made.

    corpus.txt, validation.txt    documents, one per line
    tasks/TASK.SPLIT.jsonl        prompt, completion and meta, one item per line
    world.json                    version, seed, permuted, size

The corpus begins with refrains alone: one for ten of the documents after them, in a small world one for
three. In about 550 updates they teach the model to copy from its context. A corpus that mixes refrains with
the other documents from the beginning hardly teaches this. This is pre-pre-training (Hu et al. 2025, "Between
Circuits and Chomsky"). It needs the documents in their order.

In tables that a model reads from its context, nothing stands between a word and its label. Then the same
copying reads these tables. With "hat -> dax" a model must look two tokens back. In so few minutes it learned
this in some seeds only.

`World.logprob` and `stages.evaluate` follow world.json. If somebody edits the text, the floor is no longer
true.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..files.atomic import lock, make_folder, replacing
from ..files.jsonfile import read_object, read_text
from ..text.data import Array, Batch, Tokenizer, pack
from ..text.tokenizer import BPETokenizer
from . import CORPUS, PRIMER, SIZES, VALIDATION, VERSION, World
from .tasks import task_sets

DOCUMENTS, HELD_OUT = 133_000, 2_000  # for training (with refrains 4.6 million tokens), and for validation
REFRAINS = {"": 10, "small": 3, "tiny": 3}  # documents for each refrain; "small" has 2/3 as many refrains
SAMPLE = 20_000  # documents, enough to train a tokenizer
MARK = "world.json"
MOST_BYTES = 1 << 30  # of the texts of a world; a million documents have 140 MB


class Corpus(NamedTuple):
    world: World
    train: list[str]
    validation: list[str]

    def text(self) -> list[Iterable[str]]:
        """The two texts, for `data.fingerprint`."""
        return [["\n".join(self.train)], ["\n".join(self.validation)]]


def draw(world: World, documents: int = 0, held_out: int = 0) -> Corpus:
    """documents: their number for training, without refrains; 0: DOCUMENTS, divided for a small world.

    held_out: their number for validation; 0: HELD_OUT, but at most a tenth of the usual `documents`.
    """
    usual = DOCUMENTS // world.part
    documents, held_out = documents or usual, held_out or min(HELD_OUT, usual // 10)

    def texts(count: int, *stream) -> list[str]:
        return [document for _, document in itertools.islice(world.documents(*stream), count)]

    train = texts(documents // REFRAINS[world.size], PRIMER, "refrain") + texts(documents, CORPUS)
    return Corpus(world, train, texts(held_out, VALIDATION))


def count(corpus: Corpus) -> int:
    """The number of documents for training, without the refrains at the beginning."""
    return len(corpus.train) - len(corpus.train) // (REFRAINS[corpus.world.size] + 1)


def is_source(source: str) -> bool:
    """Whether this names a world: "world:SEED", perhaps with ":permuted" and a size, or a world's folder."""
    return source.startswith("world:") or (Path(source) / MARK).exists()


def load(source: str) -> Corpus:
    """The corpus that a source names. Raises UserError."""
    world, folder = world_of(source), Path(source)
    if not (folder / MARK).exists():
        return draw(world)
    names = "corpus.txt", "validation.txt"
    texts = [read_text(folder / name, most=MOST_BYTES).splitlines() for name in names]
    if not all(texts):
        raise UserError(f"{folder}: a text of this world is empty: write the world again")
    return Corpus(world, *texts)


def world_of(source: str) -> World:
    """The world that a source names. Raises UserError, also for a folder of another version."""
    path = Path(source) / MARK
    if not path.exists():
        seed, *more = source.removeprefix("world:").split(":")
        size = next(filter(SIZES.get, more), "")
        if not seed.isdecimal() or sorted(more) not in ([], ["permuted"], [size], ["permuted", size]):
            raise UserError(f"{source}: a world's seed is a number, as in world:1337 or world:1337:permuted")
        return World(int(seed), "permuted" in more, size)
    raw = read_object(path)
    if raw.get("version") != VERSION:
        raise UserError(f"{path}: has version {short(raw.get('version'))}, and tinygpt now writes version "
                        f"{VERSION}: write the world again")  # fmt: skip
    seed, permuted, size = raw.get("seed"), raw.get("permuted"), raw.get("size", "")
    if type(seed) is not int or seed < 0 or type(permuted) is not bool or size not in list(SIZES):
        raise UserError(f"{path}: seed, permuted or size is wrong: write the world again")
    return World(seed, permuted, size)


def write(folder: Path, corpus: Corpus) -> None:
    """Writes the folder. world.json comes last: a folder with this file is complete."""
    lock(folder)
    make_folder(folder / "tasks")
    (folder / MARK).unlink(missing_ok=True)
    world = corpus.world
    mark = {"version": VERSION, "seed": world.seed, "permuted": world.permuted}
    mark |= {"size": world.size} if world.size else {}
    for name, lines in (
        ("corpus.txt", corpus.train),
        ("validation.txt", corpus.validation),
        *((f"tasks/{name}.jsonl", (json.dumps(item, ensure_ascii=False) for item in items))
          for name, items in task_sets(world).items()),
        (MARK, [json.dumps(mark)]),
    ):
        with replacing(folder / name) as beside:
            beside.write_bytes("".join(f"{line}\n" for line in lines).encode())


def train_tokenizer(corpus: Corpus, vocab_size: int) -> BPETokenizer:
    """BPE over documents and over the questions of tuning, so that these have no rare spellings."""
    texts = [document + "\n" for document in corpus.train[-SAMPLE:]]
    for name, items in task_sets(corpus.world).items():
        if name.endswith(".sft"):
            texts += [f"User: {item['prompt']}\nAssistant: {item['completion']}\n" for item in items]
    return BPETokenizer.train(texts, vocab_size, documents=True)


def encoded(tokenizer: Tokenizer, document: str) -> Array:
    """A document's ids between two end-of-text ids: a model predicts its first token and its end too."""
    return np.concatenate([[tokenizer.eos_id], tokenizer.encode(document), [tokenizer.eos_id]])


def rows(documents: Sequence[str], tokenizer: Tokenizer, block_size: int) -> Batch:
    """Documents packed into rows; each sees only itself. Raises UserError if a document does not fit."""
    if tokenizer.eos_id is None:
        raise UserError("this tokenizer has no end-of-text token, which separates documents: use BPE")
    ids = [encoded(tokenizer, document) for document in documents]
    longest = max(map(len, ids)) - 1
    if longest > block_size:
        raise UserError(f"the longest document has {longest} tokens and block_size is {block_size}: give a "
                        "larger one, or a larger vocab_size")
    return pack(((i, np.ones(len(i), np.float32)) for i in ids), block_size)
