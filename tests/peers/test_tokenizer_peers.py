"""Our ids against those of Hugging Face's libraries, and our splitting rule against the one it restates.

TINYGPT_FULL=1 runs the figures of the README: 100,000 random strings and all of the standard library.
"""

import contextlib
import json
import os
import random
import sysconfig
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from tinygpt.text.stream import encode_prompt
from tinygpt.text.tokenizer import BPETokenizer, CharTokenizer, load, pieces

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
FULL = "TINYGPT_FULL" in os.environ
END = "<|endoftext|>"

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")

# Each pool is one script or one trap; a random string draws short runs from several of them.
POOLS = [
    "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJ", "0123456789", " ", "    ", " \n\t\r", "'",
    ".,;:!?-_()[]{}\"#@", "$€£+<=>^`|~©®°±×÷",
    ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "\u2019s", " 's", "''s", "can't", "d'll've"],
    [END, "<|", "|>", "<s>", "[PAD]"],
    "가각간갇갈한국어를쓴다", "\u1112\u1161\u11ab", "日本語の文章カタカナ",
    "一二三四五六七八九十百千万〇〡〩㊀㈠", "²³¹½¾ⅧⅣ①⑳⒈𝟘𝟙", "١٢٣۴۵६७८",
    "éèüßñøæœ", "e\u0301o\u0308\u0327\u20dd\u0300", "абвгдЖЩъ", "αβγΩ", "אבגשלום",
    "مرحبا", "नमस्तेक्ष", "ไทยกำ",
    "🙂🎉❤\ufe0f👩\u200d🚀🇫🇷🏽", "𝔘𝔫𝔦𠀀𠮷𐌰𒀀",
    "\x00\x01\x1c\x1d\x1e\x1f\x7f\x80\x85\xa0\xad",
    "\u1680\u2000\u2003\u2009\u200a\u200b\u2028\u2029\u202f\u205f\u2060\u3000\ufeff",
]


def random_strings(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)

    def anything() -> str:
        while unicodedata.category(char := chr(rng.randrange(0x110000))) in ("Cn", "Cs"):
            pass
        return char

    def string() -> str:
        parts = []
        for _ in range(rng.randint(1, 8)):
            pool = rng.choice(POOLS)
            parts += rng.choices(pool, k=rng.randint(1, 6)) if rng.random() < 0.93 else [anything()]
        return "".join(parts)

    return [string() for _ in range(count)]


def stdlib_texts() -> list[str]:
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.rglob("*.py") if "site-packages" not in path.parts)
    texts = []
    for path in files if FULL else files[::40]:
        with contextlib.suppress(UnicodeDecodeError):    # some test files are in other encodings on purpose
            texts.append(path.read_bytes().decode("utf-8"))
    return texts


def assert_same_ids(ours, theirs, texts: list[str]) -> int:
    """The number of ids, when both give the same and decode them to the text."""
    total = 0
    for text, encoding in zip(texts, theirs.encode_batch(texts, add_special_tokens=False), strict=True):
        ids = ours.encode(text)
        assert ids.tolist() == encoding.ids, f"{text[:200]!r}"
        assert ours.decode(ids) == text
        total += len(ids)
    return total


@pytest.fixture(scope="module")
def gpt2():
    """GPT-2's tokenizer, ours and theirs; theirs as a user text meets it, without special tokens."""
    files = [str(DATA / "gpt2" / name) for name in ("vocab.json", "merges.txt")]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*files))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    return load(DATA / "gpt2"), theirs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tokenizer that we trained on English and random strings, and `tokenizers` with the file we wrote."""
    folder = tmp_path_factory.mktemp("trained")
    ours = BPETokenizer.train([*stdlib_texts()[::3], *random_strings(2000, seed=1)], vocab_size=2000)
    ours.save(folder)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True    # what split_special_tokens in our tokenizer_config.json sets
    return ours, theirs


@needs_data
def test_tiny_shakespeare_has_the_known_number_of_gpt2_ids(gpt2):
    text = (DATA / "tinyshakespeare.txt").read_text(encoding="utf-8")
    assert assert_same_ids(*gpt2, [text]) == 338_025


@needs_data
def test_gpt2_ids_of_random_strings(gpt2):
    assert_same_ids(*gpt2, random_strings(100_000 if FULL else 5_000, seed=2))


@needs_data
def test_gpt2_ids_of_the_standard_library(gpt2):
    assert_same_ids(*gpt2, stdlib_texts())


def test_our_ids_of_random_strings(trained):
    assert_same_ids(*trained, random_strings(100_000 if FULL else 5_000, seed=3))


def test_our_ids_of_the_standard_library(trained):
    assert_same_ids(*trained, stdlib_texts())


def test_random_ids_decode_the_same(trained):
    # Random ids cut characters anywhere: both must put as many U+FFFD.
    ours, theirs = trained
    rng = np.random.default_rng(4)
    for ids in rng.integers(0, ours.vocab_size, (2000, 12)).tolist():
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def probes():
    """Each assigned code point beside one of every class, and beside spaces: enough to tell its class."""
    return [f"a{char}a1{char}1!{char}!\n{char}\n {char}  {char}'{char}" for char in map(chr, range(0x110000))
            if unicodedata.category(char) not in ("Cn", "Cs", "Co")]


def test_every_assigned_code_point_is_split_as_by_regex(probes):
    regex = pytest.importorskip("regex")
    rule = regex.compile(r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")
    for text in probes:
        assert list(pieces(text)) == rule.findall(text)


def test_every_assigned_code_point_is_split_as_by_tokenizers(probes):
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    for text in probes if FULL else probes[::20]:
        assert list(pieces(text)) == [text[a:b] for _, (a, b) in split(text)]


@pytest.mark.parametrize("texts", [
    ["aaaa aaa aa a aaaaa", "abababab ababab"],
    random_strings(3000, seed=5),
    pytest.param(None, id="shakespeare", marks=needs_data),
])
def test_both_trainers_learn_the_same_merges(texts):
    texts = texts or [(DATA / "tinyshakespeare.txt").read_text(encoding="utf-8")]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=1024, special_tokens=[END], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    merges = [tuple(pair) for pair in json.loads(theirs.to_str())["model"]["merges"]]
    ours = BPETokenizer.train(texts, vocab_size=1024)
    assert [tuple(pair.split(" ")) for pair in ours.spec["model"]["merges"]] == merges
    assert ours.vocab_size == theirs.get_vocab_size()


def test_load_takes_what_tokenizers_wrote(tmp_path):
    # Their trainer puts special tokens first and, unasked, leaves out bytes that it did not see.
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    theirs.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    texts = ["the cat sat on the mat\n", "그 고양이"] * 5
    theirs.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=80, special_tokens=["<pad>", END], show_progress=False))
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load(tmp_path)
    assert (ours.special, ours.eos_id) == ({"<pad>": 0, END: 1}, 1)
    assert_same_ids(ours, theirs, texts)
    with pytest.raises(ValueError, match="no token for byte 0x58"):
        ours.encode("X")    # they drop it without a word


@pytest.fixture(params=["bpe", "bpe_two_special", "char", "char_special"])
def folder(request, tmp_path):
    """A tokenizer of each kind, and a folder that transformers takes for a model's."""
    text = "".join(chr(i) for i in range(0x250)) + "한국어 🙂 \u2028<|endoftext|> <|user|> Hello  world\r\n"
    special = {"bpe": [END], "bpe_two_special": [END, "<|user|>"], "char": [], "char_special": ["<|end|>"]}
    names = special[request.param]
    ours = (BPETokenizer.train(text, 300, names) if "bpe" in request.param
            else CharTokenizer.train(text, names))
    ours.save(tmp_path, model_max_length=64)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    return ours, tmp_path, text


def test_auto_tokenizer_gives_our_ids(folder):
    # It once dropped characters (without PreTrainedTokenizerFast), joined " ." to "." (clean_up), and made
    # special tokens of user text (without split_special_tokens).
    transformers = pytest.importorskip("transformers")
    ours, path, text = folder
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    for sample in [text, "Hello world .", " leading", "trailing \n", "\n\n", "\x00", "", END, "<|user|>"]:
        ids = theirs(sample).input_ids
        assert ours.encode(sample).tolist() == ids
        assert theirs.decode(ids) == sample
    assert (len(theirs), theirs.eos_token_id, theirs.model_max_length) == (ours.vocab_size, ours.eos_id, 64)
    assert {name: theirs.convert_tokens_to_ids(name) for name in ours.special} == ours.special


def test_load_takes_what_transformers_wrote(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours, path, text = folder
    transformers.AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert (again.tokens, again.special, again.eos_id) == (ours.tokens, ours.special, ours.eos_id)
    assert again.encode(text).tolist() == ours.encode(text).tolist()


@needs_data
def test_gpt2_through_our_files_is_still_gpt2(gpt2, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours, _ = gpt2
    ours.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    hub = transformers.GPT2TokenizerFast.from_pretrained(DATA / "gpt2")
    assert (theirs.eos_token_id, hub.eos_token_id, ours.eos_id) == (50256, 50256, 50256)
    for text in random_strings(300, seed=6):
        assert theirs(text).input_ids == hub(text).input_ids == ours.encode(text, special=True).tolist()


def test_a_tokenizer_of_documents_is_the_same_there(tmp_path):
    """Also through AutoTokenizer: a text's ids are those of a prompt, the end token first."""
    ours = BPETokenizer.train(stdlib_texts()[:5], vocab_size=1000, documents=True)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ["The first word", " a space", "\n\tx", "사과", *random_strings(500, seed=3)]:
        assert theirs(text)["input_ids"] == encode_prompt(ours, text).tolist(), text
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text).tolist()
