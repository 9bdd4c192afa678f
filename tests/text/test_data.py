"""Text files, token streams and batches."""

import os
import re
import shlex
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from tinygpt.core.config import GPTConfig
from tinygpt.core.model import GPT
from tinygpt.errors import UserError
from tinygpt.text import data
from tinygpt.text.tokenizer import BPETokenizer, CharTokenizer

SHAKESPEARE = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tinyshakespeare.txt"
TEXT = "A b\n\n c  d'll\te\u00a0 \u2009f\n gあい う\r\n  \n\n 'éé \u001c x 😀 zzz  " * 3


def text(documents) -> list[str]:
    return ["".join(document) for document in documents]


# --- documents ----------------------------------------------------------------------------------------------


def test_a_folders_texts_in_the_order_of_their_names(tmp_path):
    """Guards: an order that depends on the disk, binaries and hidden files taken for text."""
    for name in ("b.txt", "c.md", "a/z.md", "a/y.rst", ".git/c.txt", ".hidden.txt", "image.png", "c.TXT.bak"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    assert text(data.documents([tmp_path])) == ["a/y.rst", "a/z.md", "b.txt", "c.md"]
    assert text(data.documents([tmp_path / "b.txt", tmp_path / "a"])) == ["b.txt", "a/y.rst", "a/z.md"]
    assert text(data.documents([tmp_path / "image.png"])) == ["image.png"]  # named by the user, so it is text


def test_folders_that_are_links_are_read_once(tmp_path):
    """Guards: a linked folder left out without a word; one that is read twice; a link without end."""
    for name in ("data/b.txt", "data/sub/c.txt", "real/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    for link, to in (("link", "real"), ("again", "real"), ("loop", "data"), ("twin", "data/sub")):
        (tmp_path / "data" / link).symlink_to(tmp_path / to)
    assert text(data.documents([tmp_path / "data"])) == ["real/a.txt", "data/b.txt", "data/sub/c.txt"]


LETTERS = {
    "CP949": "안녕하세요. 오늘은 날씨가 좋습니다.\n", "GB18030": "今天天气很好，我们去散步吧。\n",
    "SHIFT_JIS": "今日は天気がいいですね。カメラも持って。\n",
    "EUC-JP": "今日は天気がいいですね。カメラも持って。\n",
    "BIG5": "今天天氣很好，我們去散步吧。\n", "CP1251": "Сегодня хорошая погода, он сидит дома.\n",
    "CP1252": "Déjà l'été s'achève – «voilà». Füße, Mädchen, niño.\n", "UTF-16": "Ada lives in London.\n",
}  # fmt: skip


@pytest.mark.parametrize("encoding", LETTERS)
@pytest.mark.parametrize("times", [1, 5000])
def test_another_encoding_is_named_with_what_converts_it(tmp_path, encoding, times):
    """Guards: "byte 0 is not UTF-8" to somebody whose editor says ANSI, or whose file is from 2005."""
    path = tmp_path / "old file.txt"
    path.write_bytes((LETTERS[encoding] * times).encode(encoding))
    with pytest.raises(UserError, match=f"it looks like {encoding}.*iconv -f {encoding} -t UTF-8 '") as error:
        list(data.TextFile(path))
    command = str(error.value).partition("converts: ")[2]
    assert shlex.split(command)[:6] == ["iconv", "-f", encoding, "-t", "UTF-8", str(path)]


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"PK\x03\x04\x14\0\xff", b"\0\xff"])
def test_a_file_that_is_no_text_is_named(tmp_path, content):
    """Guards: "it looks like CP1252, which this converts" to somebody with a picture or an archive."""
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match="a.txt: byte . is not UTF-8: it is no text file"):
        list(data.TextFile(tmp_path / "a.txt"))


def test_decomposed_text_is_said(tmp_path):
    """Guards: 165 jamo in place of 826 syllables, in a vocabulary that no keyboard types."""
    composed = "한국어 é "
    (tmp_path / "a.txt").write_text(unicodedata.normalize("NFD", composed) * 10, encoding="utf-8")
    (tmp_path / "b.txt").write_text(composed, encoding="utf-8")
    notes = data.about(data.documents([tmp_path]))
    assert "decomposed (NFD): composed (NFC) it has 60 characters less." in notes  # 2 + 1 + 1 + 1 + 1 jamo, é
    program = re.search("python3 -c '(.*)' <FILE", notes)[1]
    done = subprocess.run([sys.executable, "-c", program], input=(tmp_path / "a.txt").read_bytes(),
                          capture_output=True, env={"PYTHONUTF8": "1"}, check=True)  # fmt: skip
    assert done.stdout.decode() == composed * 10
    assert not data.about(data.documents([tmp_path / "b.txt"]))


@pytest.mark.parametrize(("kind", "words"), [
    ("missing", "no such file"), ("file", "is empty"), ("folder", "has no text"), ("pipe", "several times"),
])  # fmt: skip
def test_what_is_no_text_is_one_line(tmp_path, kind, words):
    """Guards: a traceback, training on nothing, a pipe that is empty at the second reading."""
    path = tmp_path / kind
    {"missing": str, "file": Path.touch, "folder": Path.mkdir, "pipe": os.mkfifo}[kind](path)
    with pytest.raises(UserError, match=f"{kind}: .*{words}") as error:
        data.documents([path])
    assert "\n" not in str(error.value)


def test_text_of_another_encoding_without_a_mark(tmp_path):
    """Guards: training on UTF-16, of which each second byte is 0, as if it were text."""
    (tmp_path / "a.txt").write_bytes("plain words".encode("utf-16-le"))
    with pytest.raises(UserError, match="a.txt: has NUL characters"):
        list(data.TextFile(tmp_path / "a.txt"))


@pytest.mark.parametrize("before", [0, 8190, 100_001])  # Python decodes 8,192 bytes at a time
@pytest.mark.parametrize(("content", "offset"), [
    (b"ab \xff cd", 3), ("é 東京 ".encode() + b"\xe6\x9d", 10), ("é 東 ".encode() + b"\xe6\x9d x", 7),
    (b"\x80", 0),
    (b"\xef\xbb\xbfa\xc3", 4),
])  # fmt: skip
def test_bytes_that_are_not_utf8_are_named_by_their_offset(tmp_path, before, content, offset):
    """Guards: an offset within a block instead of the file's, a cut-off character at the end let through."""
    path = tmp_path / "bad.txt"
    path.write_bytes(b"a" * before + content)
    with pytest.raises(UserError, match=f"bad.txt: byte {before + offset} is not UTF-8"):
        list(data.TextFile(path))


@pytest.mark.parametrize("chunk", [*range(1, 12), 50])
def test_reading_in_chunks_changes_no_token(tmp_path, monkeypatch, chunk):
    """Guards: a word, a run of spaces or a character that is torn by a chunk's end."""
    monkeypatch.setattr(data, "CHUNK", chunk)
    tokenizer = BPETokenizer.train(TEXT, 330)
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    chunks = list(data.TextFile(path))
    assert "".join(chunks) == TEXT and (len(chunks) > 9 or chunk == 50)
    assert (
        np.concatenate([tokenizer.encode(chunk) for chunk in chunks]).tolist()
        == tokenizer.encode(TEXT).tolist()
    )


def test_a_chunk_begins_with_a_space_where_it_can(tmp_path, monkeypatch):
    """Guards: a tokenizer that puts a space before each text puts one before a line within a document."""
    monkeypatch.setattr(data, "CHUNK", 14)
    (tmp_path / "a.txt").write_text("one two\nthree four\nfive six\n", encoding="utf-8")
    chunks = list(data.TextFile(tmp_path / "a.txt"))
    assert len(chunks) > 2 and all(chunk.startswith(" ") for chunk in chunks[1:])


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_the_mark_at_a_files_beginning_is_no_text(tmp_path, monkeypatch, chunk):
    """Guards: U+FEFF as a character of the vocabulary; but only the first is a mark."""
    monkeypatch.setattr(data, "CHUNK", chunk)
    (tmp_path / "a.txt").write_bytes("\ufeffab \ufeffc".encode())
    assert text(data.documents([tmp_path])) == ["ab \ufeffc"]


def test_pythons_own_texts():
    """Guards: a corpus that differs from run to run, that is too small, or whose vocabulary is too large."""
    texts = data.python_texts()
    assert sum(map(len, texts)) > 1_000_000
    assert len(set("".join(texts))) <= 96
    assert len(set(texts)) == len(texts)
    assert any('The "try" statement' in t or '"try" statement' in t for t in texts)  # a topic
    assert any("Serialize ``obj`` to a JSON formatted" in t for t in texts)  # a docstring
    assert texts == data.python_texts()


# --- streams ------------------------------------------------------------------------------------------------


def test_documents_are_kept_apart(tmp_path):
    """Guards: the last word of a document that goes on in the next."""
    documents = [["ab", "c"], ["a"]]
    char = CharTokenizer.train(data.joined(documents))
    assert char.decode(data.stream(documents, char, tmp_path, "mark")) == "abc\n\na"
    assert char.decode(data.stream(documents, char, None, "mark", in_memory=0)) == "abc\n\na"  # no folder
    bpe = BPETokenizer.train("abc", 257)
    assert bpe.decode(data.stream(documents, bpe, tmp_path, "mark")) == "abc<|endoftext|>a"


@pytest.mark.parametrize("chunk", [*range(1, 30), 1000])
@pytest.mark.parametrize("content", [
    "a b\n<|endoftext|>\nc  d\n\n<|endoftext|>\r\n\n e\n",
    "<|endoftext|>a b<|endoftext|><|endoftext|>\nc  d<|endoftext|> e\n<|endoftext|>\n",
])  # fmt: skip
def test_a_marker_separates_documents(tmp_path, monkeypatch, chunk, content):
    """Guards: nshepperd/gpt-2 33: an <|endoftext|> spelled as characters, merged by the BPE, learned as such;
    a marker that a chunk's end tears; an empty document."""
    monkeypatch.setattr(data, "CHUNK", chunk)
    (tmp_path / "a.txt").write_bytes(content.encode())
    (tmp_path / "b.txt").write_bytes(b"f\n")
    texts = data.documents([tmp_path])
    last = " e\n" if content.endswith(" e\n") else " e"
    assert "".join("|" if part is None else part for part in data.parts(texts)) == f"a b|c  d|{last}|f\n"
    assert data.count(texts) == 4 and "4 documents, separated by <|endoftext|>." in data.about(texts)
    bpe = BPETokenizer.train(filter(None, data.parts(texts)), 270)
    stream = data.stream(texts, bpe, tmp_path, "mark")
    assert bpe.decode(stream) == "<|endoftext|>".join(["a b", "c  d", last, "f\n"])
    assert (stream == bpe.eos_id).sum() == 3 and not any(b"|" in token for token in bpe.tokens[256:-1])
    char = CharTokenizer.train(data.joined(texts))
    assert char.decode(data.stream(texts, char, tmp_path, "mark")) == f"a b\n\nc  d\n\n{last}\n\nf\n"

    plain = data.documents([tmp_path], plain=True)
    assert text(plain) == [content, "f\n"] and data.count(plain) == 2 and not data.about(plain)
    assert list(filter(None, data.parts(plain)))[0][:1] == content[0]
    assert bpe.decode(data.stream(plain, bpe, tmp_path, "mark")) == f"{content}<|endoftext|>f\n"
    (tmp_path / "a.txt").write_text("a<|endoftext|>b")
    marks = {data.fingerprint(data.documents([tmp_path / "a.txt"], plain), bpe) for plain in (True, False)}
    assert len(marks | {data.fingerprint([["a\n\nb"]], bpe)}) == 3  # three streams


@pytest.mark.parametrize("vocab_size", [300, 70_000])
def test_a_stream_on_disk_is_the_one_in_memory(tmp_path, vocab_size):
    """Guards: chunks lost where memory ends and the file begins, ids over 65535 cut to two bytes."""
    tokenizer = BPETokenizer.train(TEXT, 300)
    tokenizer.tokens += [b"?"] * (vocab_size - tokenizer.vocab_size)
    documents = [[TEXT, " " + TEXT], [TEXT]]
    memory = data.stream(documents, tokenizer, tmp_path, "mark")
    assert not list(tmp_path.iterdir())
    disk = data.stream(documents, tokenizer, tmp_path, "mark", in_memory=100)
    assert isinstance(disk, np.memmap)
    assert disk.dtype == memory.dtype == (np.uint16 if vocab_size == 300 else np.uint32)
    assert disk.tolist() == memory.tolist()


def test_a_stream_on_disk_is_found_again_and_only_for_its_text(tmp_path, monkeypatch):
    """Guards: encoding gigabytes anew on each resume, and training on the ids of another text."""
    tokenizer, limit = BPETokenizer.train(TEXT, 300), {"in_memory": 10}
    mark, other = (data.fingerprint([[text]], tokenizer) for text in (TEXT, TEXT + "x"))
    assert len({mark, other, data.fingerprint([[TEXT]], BPETokenizer.train(TEXT, 270))}) == 3
    assert data.fingerprint([[TEXT[:9], TEXT[9:]]], tokenizer) == mark  # however it is read
    first = data.stream([[TEXT]], tokenizer, tmp_path, mark, **limit)
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "encode", None)  # whoever calls it fails
        again = data.stream([[TEXT]], tokenizer, tmp_path, mark, **limit)
    assert again.tolist() == first.tolist()
    changed = data.stream([[TEXT + "x"]], tokenizer, tmp_path, other, **limit)
    assert tokenizer.decode(changed) == TEXT + "x"
    assert len(list(tmp_path.iterdir())) == 1  # the old text's is not kept


# --- batches ------------------------------------------------------------------------------------------------


def test_split_and_blocks_are_nanogpts():
    """Guards: a validation part that leaks into training, a block that is left out or counted twice."""
    tokens = np.arange(1001, dtype=np.uint16)
    train, val = data.split(tokens, 7)
    assert len(train) == 900 and val.tolist() == list(range(900, 1001))
    blocks = list(data.consecutive_blocks(val, 4, 7))
    ids, targets = (np.concatenate(part) for part in zip(*blocks, strict=True))
    assert [len(b[0]) for b in blocks] == [4, 4, 4, 2] and ids.dtype == targets.dtype == np.int32
    assert ids.ravel().tolist() == list(range(900, 998)) and (targets == ids + 1).all()
    assert [sum(len(b) for b, _ in data.consecutive_blocks(tokens[:n], 4, 7)) for n in (14, 15)] == [1, 2]


def test_tiny_shakespeare_has_1742_blocks(tmp_path):
    """Guards: a whole-split validation loss that is over another split than nanoGPT's."""
    if not SHAKESPEARE.exists():
        pytest.skip("needs tiny Shakespeare")
    documents = data.documents([SHAKESPEARE])
    tokenizer = CharTokenizer.train(data.joined(documents))
    train, val = data.split(data.stream(documents, tokenizer, tmp_path, "mark"), 64)
    assert (tokenizer.vocab_size, len(train), len(val)) == (65, 1_003_854, 111_540)
    assert sum(len(ids) for ids, _ in data.consecutive_blocks(val, 12, 64)) == 1742


@pytest.mark.parametrize(("count", "block"), [(10, 9), (80, 8), (0, 1)])
def test_a_split_shorter_than_a_block_is_one_line(count, block):
    """Guards: a division by zero, or a run that never sees a validation loss."""
    with pytest.raises(UserError, match=f"a block of {block} needs {block + 1}"):
        data.split(np.zeros(count, np.uint16), block)


def test_random_blocks_reach_every_place():
    """Guards: a last token that is never a target, a first that is never read, targets that are not next."""
    tokens = np.arange(20, dtype=np.uint16)
    ids, targets = data.random_blocks(tokens, 500, 4, np.random.default_rng(0))
    assert ids.shape == (500, 4) and ids.dtype == np.int32
    assert (targets == ids + 1).all() and ids.min() == 0 and targets.max() == 19
    again, _ = data.random_blocks(tokens, 500, 4, np.random.default_rng(0))
    assert (ids == again).all()


# --- packing ------------------------------------------------------------------------------------------------


def _examples(count: int, longest: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 2, count)
    return [(rng.integers(1, 50, n), rng.integers(0, 2, n)) for n in lengths]


def test_packed_rows_hold_every_example_once_and_alone():
    """Guards: examples cut or lost, a first id that is a target, padding that counts."""
    examples = _examples(200, 16)
    packed, contents = data.pack(examples, 16), []
    for ids, targets, weights, start, positions in zip(*packed, strict=True):
        place = np.arange(16)
        for begin in np.unique(start):
            mine = np.flatnonzero(start == begin)
            assert (mine == begin + place[: len(mine)]).all() and (positions[mine] == mine - begin).all()
            if targets[begin]:  # ids are 1 or more: else this is padding
                contents.append((ids[begin], *targets[mine], *weights[mine]))
            else:
                assert len(mine) == 1 and weights[begin] == 0
    assert sorted(contents) == sorted((*ids, *supervised[1:]) for ids, supervised in examples)


def test_packed_losses_are_those_of_each_example_alone():
    """Guards: TRL 1230 and 3067, packed examples that attend to each other."""
    config = GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=8)
    model = GPT(config, np.random.default_rng(1))
    examples = _examples(30, 16)
    packed = data.pack(examples, 16)
    alone = 0.0
    for ids, supervised in examples:
        ids, weights = ids[None].astype(np.int32), supervised[None, 1:].astype(np.float32)
        alone += model.loss(ids[:, :-1], ids[:, 1:], weights)
    together = model.loss(*packed[:3], start=packed.start, positions=packed.positions)
    assert len(packed.ids) < len(examples) and abs(together - alone) < 1e-4 * alone


def test_a_row_closes_behind_its_younger_ones():
    """Guards: a last, short example in the first row that has room, far from its neighbours."""
    long, short = np.arange(7), np.arange(3)
    packed = data.pack([(ids, np.ones(len(ids))) for ids in [*[long] * 40, short]], 8)
    assert packed.weights[0].sum() == 6 and packed.weights[40 - 32 :].sum() == 6 * 32 + 2


def test_packing_wastes_little_and_keeps_neighbours_together():
    examples = _examples(3000, 60)
    packed = data.pack(examples, 128)
    assert sum(len(ids) - 1 for ids, _ in examples) > 0.97 * packed.ids.size
    assert [p.shape for p in data.pack([], 8)] == [(0, 8)] * 5


@pytest.mark.parametrize("n", [0, 1, 10])
def test_an_example_that_fits_no_row_is_refused(n):
    with pytest.raises(ValueError, match=f"of {n} ids"):
        data.pack([(np.ones(n), np.ones(n))], 8)


@pytest.mark.parametrize("damage", ["cut", "empty", "odd", "larger id", "older form", "a pipe"])
def test_a_damaged_file_of_ids_is_made_again(tmp_path, damage):
    """Guards: training on other text without a word, after a copy that was cut short; a traceback; a hang."""
    tokenizer = CharTokenizer.train(TEXT)
    arguments = [[[TEXT]], tokenizer, tmp_path, "mark", 10]
    right = np.array(data.stream(*arguments))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    if damage == "a pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("no pipes here")
        file.unlink()
        os.mkfifo(file)
    else:
        file.write_bytes({
            "cut": whole[: len(whole) // 2], "empty": b"", "odd": whole[:-1],
            "larger id": whole[:-2] + b"\xff\xff", "older form": whole[16:],
        }[damage])  # fmt: skip
    np.testing.assert_array_equal(data.stream(*arguments), right)
    assert file.read_bytes() == whole
