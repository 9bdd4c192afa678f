"""Texts become token streams, and token streams become batches.

A text is an iterable of strings that can be read several times: a file in parts of some megabytes, or a list
with one string. A part ends before white space, where no tokenizer joins characters. A text is one document,
or several documents with <|endoftext|> between them. A stream is one array of ids, in a file if it is large.
Its last tenth is for validation.

`documents()` without paths returns a corpus that every Python has: its own documentation. `pack` puts many
short sequences into few rows.

Not here: other formats than text, other encodings than UTF-8, instructions (`instructions`).
"""

import ast
import codecs
import contextlib
import hashlib
import itertools
import os
import random
import re
import shlex
import sysconfig
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..core.train import Batch
from ..errors import UserError
from ..files.atomic import make_folder, replacing
from .tokenizer import END_OF_TEXT, Tokenizer

Array = np.ndarray
Text = Iterable[str]

SUFFIXES = (".txt", ".md", ".rst")  # of the files that are read from a folder
CHUNK = 1 << 22  # characters read at a time
IN_MEMORY = 1 << 28  # bytes of ids; a larger stream goes to a file
HEADER = 16  # bytes at the beginning of a file of ids: the number of ids, and the largest id

# --- texts --------------------------------------------------------------------------------------------------


class TextFile:
    """The text of a UTF-8 file, part by part. Bytes that are not UTF-8 raise UserError.

    plain: an <|endoftext|> in the file is text, and separates no documents.
    """

    def __init__(self, path: Path, plain: bool = False) -> None:
        self.path, self.plain = path, plain

    def __iter__(self) -> Iterator[str]:
        text = ""
        with open(self.path, encoding="utf-8-sig", newline="") as file:  # sig: a byte order mark
            try:
                while block := file.read(CHUNK):
                    if "\0" in block:
                        raise UserError(f"{self.path}: has NUL characters: convert the file to UTF-8 text")
                    text += block
                    if cut := _LAST_CUT.match(text):
                        yield cut[0]
                        text = text[cut.end() :]
            except UnicodeDecodeError as error:  # error.object: the block, after an unfinished character
                offset = file.buffer.tell() - len(error.object) + error.start
                problem = f"byte {offset} is not UTF-8{not_utf8(self.path, error.object)}"
                raise UserError(f"{self.path}: {problem}") from None
        yield text


# Up to the last place where white space follows another character. No piece of GPT-2's rule spans it. A space
# is preferred: before other text some tokenizers add one.
_LAST_CUT = re.compile(r"(?s).*\S(?= )|.*\S(?=\n)")


# Encodings, and a pattern of most characters beside ASCII in a text of this encoding: in Western languages
# one or two beside a letter, in Japanese runs with kana. Of equally good encodings the first counts.
_ENCODINGS = {
    "CP1252": "(?<=[A-Za-z])[À-ÿ]{1,2}|[À-ÿ]{1,2}(?=[A-Za-z])|[–-”…€«»]",
    "SHIFT_JIS": "[、。一-鿿]*[ぁ-ヿ][、。ぁ-ヿ一-鿿]*",
    "EUC-JP": "[、。一-鿿]*[ぁ-ヿ][、。ぁ-ヿ一-鿿]*",
    "CP949": "[가-힣]+",
    "CP1251": "[А-яЁё]{2,}",
    "GB18030": "[、。，一-鿿]+",
    "BIG5": "[、。，一-鿿]+",
}


def not_utf8(path: Path, data: bytes) -> str:
    """The remedy for a file that is not UTF-8. data: some of its bytes."""
    data = data[: 1 << 16]
    shares = {"UTF-16": 1.0} if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else {}
    if not shares and b"\0" in data:
        return ": it is no text file, or UTF-16 text: convert it to UTF-8 text"
    for name, usual in _ENCODINGS.items() if not shares else ():
        with contextlib.suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder(name)().decode(data)  # the last character may be cut
            foreign = max(1, sum(char > "\x7f" for char in text))
            shares[name] = sum(len(match[0]) for match in re.finditer(usual, text)) / foreign
    name = max(shares, key=shares.get, default="")
    if shares.get(name, 0) < 0.5:
        return ": convert the file to UTF-8 text"
    path = shlex.quote(str(path))
    return f"; it looks like {name}, which this converts: iconv -f {name} -t UTF-8 {path} >{path}.utf8"


def documents(paths: Sequence[Path | str] = (), plain: bool = False) -> list[Text]:
    """The text files at these paths, those of a folder sorted by name; without paths Python's own texts.

    In a folder and the folders below it, files count that end in .txt, .md or .rst, except hidden files and
    empty files. Links to folders are followed, and each folder is read once. Raises UserError for a path that
    is missing, is no file, or is empty.
    """
    if not paths:
        return [[text] for text in python_texts()]
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            names = _walk(path, SUFFIXES, lambda name: name.startswith("."))
            texts = [file for file in names if file.is_file() and file.stat().st_size]
            if not texts:
                raise UserError(f"{path}: has no text: in a folder, files in {', '.join(SUFFIXES)} are taken")
            files += texts
        elif not path.exists():
            raise UserError(f"{path}: no such file or folder")
        elif not path.is_file():
            raise UserError(f"{path}: is not a file that can be read several times: save the text to a file")
        elif not path.stat().st_size:
            raise UserError(f"{path}: is empty: name a file with text")
        else:
            files.append(path)
    return [TextFile(path, plain) for path in files]


def _walk(folder: Path, suffixes: tuple[str, ...], skip: Callable[[str], bool]) -> list[Path]:
    """The files in a folder and below it, sorted, that end in one of `suffixes` and have no name to skip."""
    paths, places = [], {folder.resolve()}
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for name in folders.copy():
            place = Path(parent, name).resolve()
            if skip(name) or place in places:
                folders.remove(name)
            places.add(place)
        paths += [Path(parent, name) for name in files if name.endswith(suffixes) and not skip(name)]
    return sorted(paths)


def python_texts() -> list[str]:
    """About 2 MB of English that every Python has: pydoc's topics and the standard library's docstrings.

    The sources are parsed, not imported. Tests and repeated docstrings are left out. Curly quotes become
    straight, and the few texts with other characters than ASCII are left out: the vocabulary has at most 96
    characters. The order is shuffled, always in the same way: the last tenth is a fair sample of the whole.
    """
    from pydoc_data.topics import topics

    texts = [text for _, text in sorted(topics.items())]
    texts += _docstrings(Path(sysconfig.get_path("stdlib")))
    texts = [text.strip().translate(_STRAIGHT) for text in texts]
    texts = list(dict.fromkeys(text for text in texts if re.fullmatch(r"[ -~\n]+", text)))
    random.Random(0).shuffle(texts)
    return texts


_STRAIGHT = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "..."})
_NO_PROSE = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages"}


def _docstrings(library: Path) -> Iterator[str]:
    for path in _walk(library, (".py",), _NO_PROSE.__contains__):
        nodes = [ast.parse(path.read_bytes())]
        while nodes:  # like ast.walk, but not into expressions, which would take most of the time
            node = nodes.pop()
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield ast.get_docstring(node) or ""
            nodes += [n for n in ast.iter_child_nodes(node) if isinstance(n, (ast.stmt, ast.excepthandler))]


# --- documents ----------------------------------------------------------------------------------------------

_MARK = re.compile(rf"[\r\n]*{re.escape(END_OF_TEXT)}[\r\n]*")


def parts(texts: Iterable[Text]) -> Iterator[str | None]:
    """The texts, chunk by chunk, with None between two documents.

    A document ends where its text ends, and at an <|endoftext|>. Line ends around an <|endoftext|> belong to
    it. Empty documents are left out.
    """
    has_text = False
    for text in texts:
        ends, after_mark = has_text, False
        for chunk in text:
            for n, part in enumerate([chunk] if getattr(text, "plain", False) else _MARK.split(chunk)):
                if n:
                    ends, after_mark = has_text, True
                if after_mark:  # in this chunk or in the one before
                    part = part.lstrip("\r\n")
                if part:
                    if ends:
                        yield None
                    yield part
                    has_text, ends, after_mark = True, False, False


def joined(texts: Iterable[Text], between: str = "\n\n") -> Iterator[str]:
    """All text, chunk by chunk, with a blank line between documents."""
    return (between if part is None else part for part in parts(texts))


def count(texts: Iterable[Text]) -> int:
    """The number of documents."""
    return 1 + sum(part is None for part in parts(texts))


def about(texts: Sequence[Text]) -> str:
    """Notes for the user about the texts, one line each."""
    lines, n = "", count(texts)
    if n > len(texts):
        lines += f"\n{n:,} documents, separated by {END_OF_TEXT}. With --plain-text this marker is text."
    chunks = (part for part in parts(texts) if part and not unicodedata.is_normalized("NFC", part))
    length = sum(len(part) - len(unicodedata.normalize("NFC", part)) for part in chunks)
    if length > 0:
        program = 'import sys, unicodedata as u; sys.stdout.write(u.normalize("NFC", sys.stdin.read()))'
        lines += (f"\nThe text is decomposed (NFD): composed (NFC) it has {length:,} characters less. This "
                  f"command composes it: python3 -c '{program}' <FILE >NEW")  # fmt: skip
    return lines


def fingerprint(texts: Iterable[Text], tokenizer: Tokenizer) -> str:
    """SHA-256 of all text and of the tokens. Merges and settings of the tokenizer are not in it."""
    digest = hashlib.sha256()
    for part in itertools.chain(tokenizer.tokens, (chunk.encode() for chunk in joined(texts, "\0"))):
        digest.update(part)
    return digest.hexdigest()


# --- streams ------------------------------------------------------------------------------------------------


def encode(texts: Iterable[Text], tokenizer: Tokenizer) -> Iterator[Array]:
    """The ids of all documents, chunk by chunk.

    Between two documents stands the tokenizer's end-of-text id, or a blank line if it has no such id.
    """
    for part in parts(texts):
        if part is None and tokenizer.eos_id is not None:
            yield np.array([tokenizer.eos_id])
        else:
            yield tokenizer.encode("\n\n" if part is None else part)


def stream(texts: Iterable[Text], tokenizer: Tokenizer, folder: Path | None, mark: str,
           in_memory: int = IN_MEMORY) -> Array:  # fmt: skip
    """The ids of `encode` as one array (N,), uint16, or uint32 for a large vocabulary.

    A stream of more than `in_memory` bytes goes to a file in `folder` and is mapped. The next call finds this
    file by `mark`, the texts' fingerprint. A damaged file is made again. folder None: the stream stays in
    memory.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    file = folder and folder / f"tokens-{mark[:16]}.bin"
    if file and (tokens := _mapped(file, dtype)) is not None:
        return tokens
    chunks, head, size = (ids.astype(dtype) for ids in encode(texts, tokenizer)), [], 0
    for ids in chunks:
        head.append(ids)
        size += ids.nbytes
        if file and size > in_memory:
            break
    else:
        return np.concatenate(head)
    make_folder(folder)
    for old in set(folder.glob("tokens-*.bin")) - {file}:  # another process may be making the same file
        old.unlink(missing_ok=True)
    count = largest = 0
    with replacing(file) as beside, open(beside, "wb") as out:
        out.write(bytes(HEADER))
        for ids in itertools.chain(head, chunks):
            out.write(ids)
            count, largest = count + ids.size, max(largest, int(ids.max(initial=0)))
        out.seek(0)
        out.write(np.array([count, largest], "<u8"))
    return np.memmap(file, dtype, "r", HEADER)


def _mapped(file: Path, dtype: np.dtype) -> Array | None:
    """The ids in a file of `stream`, or None if their number or the largest differs from its header."""
    if not file.is_file() or (size := file.stat().st_size) <= HEADER:
        return None
    count, largest = map(int, np.fromfile(file, "<u8", 2))
    if size != HEADER + count * dtype.itemsize:
        return None
    tokens = np.memmap(file, dtype, "r", HEADER)
    return tokens if tokens.max() == largest else None


def split(tokens: Array, block_size: int) -> tuple[Array, Array]:
    """The first nine tenths for training and the last tenth for validation, as in nanoGPT.

    Raises UserError if a part has less than block_size + 1 tokens: a block and the target of its last token.
    """
    n = int(0.9 * len(tokens))
    for name, part in (("training", tokens[:n]), ("validation", tokens[n:])):
        if len(part) <= block_size:
            raise UserError(f"the {name} part of the text has {len(part)} tokens, and a block of {block_size}"
                            f" needs {block_size + 1}: give more text or a smaller block size")  # fmt: skip
    return tokens[:n], tokens[n:]


# --- batches ------------------------------------------------------------------------------------------------


def random_blocks(tokens: Array, count: int, block_size: int,
                  rng: np.random.Generator) -> tuple[Array, Array]:  # fmt: skip
    """Ids and the ids that follow each of them, both (count, block_size) int32, from uniform places."""
    return _blocks(tokens, rng.integers(len(tokens) - block_size, size=count), block_size)


def consecutive_blocks(tokens: Array, count: int, block_size: int) -> Iterator[tuple[Array, Array]]:
    """The whole stream in blocks, at most `count` at a time. Tokens that do not fill a block are left out."""
    starts = np.arange(0, len(tokens) - block_size, block_size)
    for i in range(0, len(starts), count):
        yield _blocks(tokens, starts[i : i + count], block_size)


def _blocks(tokens: Array, starts: Array, block_size: int) -> tuple[Array, Array]:
    places = starts[:, None] + np.arange(block_size)  # (B, T)
    return tokens[places].astype(np.int32), tokens[places + 1].astype(np.int32)


def shuffled_places(size: int, count: int, step: int, seed: int) -> Array:
    """The `count` of `size` places whose turn is in update `step`, (count,).

    Each epoch takes all places once, in an order of its own. An update may end one epoch and begin the next.
    """
    return _turns(size, count, step, lambda epoch: np.random.default_rng([seed, epoch, 2]).permutation(size))


def _turns(size: int, count: int, step: int, order: Callable[[int], Array]) -> Array:
    turns = range(step * count, (step + 1) * count)
    orders = {epoch: order(epoch) for epoch in {turn // size for turn in turns}}
    return np.array([orders[turn // size][turn % size] for turn in turns])


def permuted(items: Sequence, seed: int) -> list:
    """The items in an order that the seed decides."""
    return [items[i] for i in np.random.default_rng([seed, 0, 1]).permutation(len(items))]


# --- packing ------------------------------------------------------------------------------------------------


def pack(examples: Iterable[tuple[Array, Array]], block_size: int, open_rows: int = 32) -> Batch:
    """Sequences side by side in rows. None is cut, none sees another, and each counts its own positions.

    An example is (ids (n,), supervised (n,)) with n >= 2. `supervised` has the weight of each id as a target;
    the first id is never a target. The example takes n - 1 places of the oldest open row with enough room. A
    row is closed when `open_rows` younger rows are open: the examples of a row were near each other. Padding
    has weight 0 and sees only itself. Raises ValueError for an example of less than 2 ids or more than
    block_size + 1 ids.
    """
    parts, free, count = [], {}, 0  # free: open row -> places left, oldest first
    for ids, supervised in examples:
        n = len(ids) - 1
        if not 0 < n <= block_size or len(supervised) != n + 1:
            raise ValueError(f"an example of {n + 1} ids, {len(supervised)} weights: rows take {block_size}")
        row = next((row for row, places in free.items() if places >= n), count)
        if row == count:
            free[row], count = block_size, count + 1
            if len(free) > open_rows:
                del free[next(iter(free))]
        parts.append((row, block_size - free[row], ids, supervised))
        free[row] -= n
        if not free[row]:
            del free[row]
    dtypes = (np.float32 if name == "weights" else np.int32 for name in Batch._fields)
    packed = Batch(*(np.zeros((count, block_size), dtype) for dtype in dtypes))
    packed.start[:] = np.arange(block_size)
    for row, begin, ids, supervised in parts:
        n = len(ids) - 1
        values = ids[:-1], ids[1:], supervised[1:], begin, np.arange(n)
        for field, value in zip(packed, values, strict=True):
            field[row, begin : begin + n] = value
    return packed


def rows_in_order(rows: Batch, count: int, step: int, seed: int = 0) -> Batch:
    """The `count` rows of update `step`: in the first epoch in their order, in later epochs at random."""
    n = len(rows.ids)
    places = _turns(n, count, step, lambda epoch: np.random.default_rng([seed, epoch]).permutation(n)
                    if epoch else np.arange(n))  # fmt: skip
    return rows.at(places)
