"""Tokenizers against slower restatements of themselves, against mistakes of users, and against bad files."""

import copy
import doctest
import errno
import json
import os
import random
import shutil
import time
import tracemalloc
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tinygpt.errors import UserError
from tinygpt.text import bpe, tokenizer
from tinygpt.text.bpe import apply_merges, learn_merges, merge_steps, pieces
from tinygpt.text.stream import encode_prompt
from tinygpt.text.tokenizer import BPETokenizer, CharTokenizer, load, stream_decoder

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
END = "<|endoftext|>"
MIXED = "It's  a test:\r\n\t한국어 三四 e\u0301 🙂🙂 ½ x_y \x00 \u2028 naïve\n"


@pytest.fixture(scope="module")
def bpe_tokenizer():
    return BPETokenizer.train([MIXED * 3, "## the cat sat on the mat. " * 5], 300, [END, "<|user|>"])


@pytest.fixture(scope="module")
def char_tokenizer():
    return CharTokenizer.train([MIXED, "abcdefghijklmnopqrstuvwxyz<|>"], ["<|end|>"])


@pytest.fixture(params=["bpe", "char"])
def either(request):
    return request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.mark.parametrize("module", [bpe, tokenizer])
def test_docstrings_show_what_the_code_does(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


# --- Splitting ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("split", [
    "", "I|'m| here", "we|'ve| they|'ll| don|'t|'|S", "''|s", " '|s", "a|  | b", "a|   ", " | \x00",
    "a|\n|\n|b", "\t|\t|x", "12|ab|!?", "三四| 五", "〇|三", "Ⅷ½²|x", "x|_|y", " ..._|1", "e|\u0301|a",
    "가나| 다", "🙂🙂| 🙂", "a|\x1c|\u2028|b", "a|\xa0|b", "a| \u3000| b",
])
def test_splits_as_gpt2(split):
    assert list(pieces(split.replace("|", ""))) == (split.split("|") if split else [])


def test_every_code_point_is_split_by_its_unicode_category():
    # Python's own classes differ: \w has "_", str.isnumeric has 一 and 二, \s has U+001C to U+001F.
    white = {*"\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000", *map(chr, range(0x2000, 0x200B))}
    classes = {"L": [], "N": [], "other": [], "white": []}
    for char in map(chr, range(0x110000)):
        category = unicodedata.category(char)[0]
        classes["white" if char in white else category if category in "LN" else "other"].append(char)
    members = ["".join(chars) for chars in classes.values()]
    assert list(pieces("".join(members))) == members


# --- Byte-pair encoding -------------------------------------------------------------------------------------

def slow_merges(words: Counter, count: int) -> list[tuple[int, int]]:
    """learn_merges restated: count all pairs anew before each merge."""
    ids = {byte: i for i, byte in enumerate(bpe.BYTE_OF.values())}
    words = [([ids[byte] for byte in word], times) for word, times in words.items()]
    merges = []
    while len(merges) < count:
        pairs = Counter()
        for word, times in words:
            for pair in pairwise(word):
                pairs[pair] += times
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        rule = {best: (0, 256 + len(merges))}
        merges.append(best)
        words = [(apply_merges(word, rule), times) for word, times in words]
    return merges


def test_learns_what_counting_anew_for_each_merge_learns():
    # Counts kept up to date go wrong at pairs that overlap ("aaa") and at counts that fall and rise again.
    rng = random.Random(0)
    for _ in range(200):
        letters = rng.choice([b"a", b"ab", b"abc"])
        words = Counter(bytes(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(rng.randint(1, 12)))
        assert learn_merges(words, 20) == slow_merges(words, 20)


def test_applies_merges_as_one_by_one():
    # Few letters and any merges, not only those that training would find: many entries of the heap are stale.
    rng = random.Random(1)
    for _ in range(500):
        merges = {(rng.randrange(3 + n), rng.randrange(3 + n)): (n, 3 + n) for n in range(12)}
        tokens = rng.choices(range(3), k=rng.randint(0, 30))
        *_, (_, last) = [(None, tokens), *merge_steps(tokens, merges)]
        assert apply_merges(tokens, merges) == last


def test_a_long_piece_takes_no_quadratic_time():
    # 200 kB without a space: half a second, or half an hour if each merge looked at all tokens.
    tokenizer = BPETokenizer.train("a" * 64, 300)
    start = time.perf_counter()
    assert tokenizer.decode(tokenizer.encode("a" * 200_000)) == "a" * 200_000
    assert len(BPETokenizer.train("ab" * 100_000, 270).encode("ab" * 8)) == 1
    assert time.perf_counter() - start < 20


def test_cache_is_bounded_and_changes_nothing(bpe_tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "CACHED_PIECES", 5)
    fresh = BPETokenizer(bpe_tokenizer.spec, bpe_tokenizer.settings)
    text = " ".join(f"word{i}" for i in range(50)) + "x" * 1000
    assert fresh.encode(text).tolist() == bpe_tokenizer.encode(text).tolist()
    assert fresh._cached.cache_info().currsize == 5
    fresh._cached.cache_clear()
    assert fresh.encode("x" * 1000 + " a").tolist() == bpe_tokenizer.encode("x" * 1000 + " a").tolist()
    assert fresh._cached.cache_info().currsize == 1  # no long piece


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_gpt2_files_give_gpt2_ids():
    gpt2 = load(DATA / "gpt2")
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert (gpt2.vocab_size, gpt2.eos_id, gpt2.special) == (50257, 50256, {END: 50256})
    text = (DATA / "tinyshakespeare.txt").read_text(encoding="utf-8")
    ids = gpt2.encode(text)
    assert len(ids) == 338_025 and gpt2.decode(ids) == text


# --- Both tokenizers ----------------------------------------------------------------------------------------

def test_text_comes_back_exactly(bpe_tokenizer):
    # minbpe crashed on empty input; unassigned code points have no Unicode category to split by.
    for text in ["", " ", "\n\n", "\x00", "a", "\u0378\U000e0fff", "é" * 99, MIXED, "\r\n \r", "\ufeffx"]:
        ids = bpe_tokenizer.encode(text)
        assert bpe_tokenizer.decode(ids) == text
        assert (ids.dtype, ids.ndim, ids.flags.writeable) == (np.int32, 1, True)


def test_characters_come_back_exactly(char_tokenizer):
    for text in ["", " ", "\x00", "\r\n", MIXED]:
        ids = char_tokenizer.encode(text)
        assert char_tokenizer.decode(ids) == text
        assert (ids.dtype, ids.shape, ids.flags.writeable) == (np.int32, (len(text),), True)


def test_text_never_yields_a_special_id(either):
    assert either.special
    for name in either.special:
        ids = either.encode(f"{name} {name}{name}")
        assert not set(ids.tolist()) & set(either.special.values())
        assert either.decode([either.special[name]]) == name
    assert either.eos_id == min(either.special.values())


@pytest.mark.parametrize("special", [["a"], ["the"], [" the"], [""], ["!!"], [END, END], ["<|\ud800|>"]])
def test_special_tokens_that_text_could_spell_are_refused(special):
    with pytest.raises(UserError):
        CharTokenizer.train("a text", special)
    with pytest.raises(UserError):
        BPETokenizer.train("a text", 300, special)


def test_a_special_token_is_not_mistaken_for_a_learned_one():
    # In files " !" is written as "Ġ!", which the splitting rule takes apart.
    with pytest.raises(UserError, match="Ġ!"):
        BPETokenizer.train("a !", 300, ["Ġ!"])


def test_an_unseen_character_is_named(char_tokenizer):
    # nanoGPT: KeyError.
    with pytest.raises(UserError, match=r"'ж' \(U\+0436\).*train again.*BPE"):
        char_tokenizer.encode("he saж it")


def test_half_a_surrogate_pair_is_named(either):
    with pytest.raises(UserError, match="U.D83D"):
        either.encode("a \ud83d b")
    with pytest.raises(UserError, match="U.D83D"):
        BPETokenizer.train("a \ud83d b", 300)
    with pytest.raises(UserError, match="U.D83D"):
        CharTokenizer.train("a \ud83d b")


@pytest.mark.parametrize("train", [CharTokenizer.train, lambda texts: BPETokenizer.train(texts, 300)])
@pytest.mark.parametrize("texts", ["", [], ["", ""]])
def test_an_empty_corpus_is_refused(train, texts):
    with pytest.raises(UserError, match="empty"):
        train(texts)


def test_a_vocabulary_without_room_for_bytes_is_refused():
    with pytest.raises(UserError, match="257"):
        BPETokenizer.train("text", 256)


@pytest.mark.parametrize("text,size", [("a", 257), ("   ", 259), ("ab ab", 259)])
def test_a_small_corpus_gives_fewer_tokens(text, size):
    tokenizer = BPETokenizer.train(text, 1000)
    assert (tokenizer.vocab_size, tokenizer.decode(tokenizer.encode(text))) == (size, text)


def test_one_text_is_not_taken_for_a_list_of_characters():
    assert BPETokenizer.train("the the", 270).tokens == BPETokenizer.train(iter(["the the"]), 270).tokens
    assert len(BPETokenizer.train("the the", 270).encode("the")) == 1
    assert CharTokenizer.train("ba").tokens == CharTokenizer.train(iter(["b", "a"])).tokens == [b"a", b"b"]


@pytest.mark.parametrize("ids", [[-1], [0, 10**6]])
def test_an_id_without_token_is_refused(either, ids):
    # A negative index would silently count from the end of the vocabulary.
    with pytest.raises(UserError, match="not in this vocabulary"):
        either.decode(ids)


def test_streaming_gives_whole_characters_and_the_same_text(bpe_tokenizer):
    rng = np.random.default_rng(0)
    for ids in (bpe_tokenizer.encode("é 語 🙂 \u0301"), rng.integers(0, bpe_tokenizer.vocab_size, 2000)):
        feed = stream_decoder(bpe_tokenizer)
        parts = [feed(i) for i in ids]
        assert "".join(parts) + feed(final=True) == bpe_tokenizer.decode(ids)
        assert len(ids) == 2000 or ("" in parts and "\ufffd" not in "".join(parts))
    feed = stream_decoder(bpe_tokenizer)
    assert (feed(bpe_tokenizer.encode("é")[0]), feed(final=True)) == ("", "\ufffd")


def test_explanation_ends_with_the_ids_of_encode(either):
    explained = list(either.explain(MIXED))
    assert "".join(part.piece for part in explained) == MIXED
    assert [i for part in explained for i in part.ids] == either.encode(MIXED).tolist()
    for part in explained:
        for _, tokens in part.steps:
            assert b"".join(tokens) == part.piece.encode()
        assert part.steps[-1][1] == [either.tokens[i] for i in part.ids]
        assert [len(tokens) for _, tokens in part.steps] == list(
            range(len(part.steps[0][1]), len(part.steps[-1][1]) - 1, -1))


# --- Files --------------------------------------------------------------------------------------------------

def test_a_saved_tokenizer_is_the_same_when_loaded(either, tmp_path):
    either.save(tmp_path / "new" / "folder", model_max_length=64)
    again = load(tmp_path / "new" / "folder")
    assert type(again) is type(either)
    assert (again.tokens, again.special, again.eos_id) == (either.tokens, either.special, either.eos_id)
    text = "".join(random.Random(0).choices("the cat sat on mat ", k=5000))    # the order of merges matters
    assert again.encode(text).tolist() == either.encode(text).tolist()
    again.save(tmp_path, model_max_length=64)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "new" / "folder" / name).read_bytes()


def test_a_save_that_a_crash_interrupted_is_completed(tmp_path):
    """Guards: the old tokenizer beside a finished list of renames, without a model in the folder."""
    CharTokenizer.train("abc").save(tmp_path)
    CharTokenizer.train("xyz").save(tmp_path / "new")
    (tmp_path / "new" / "tokenizer.json").rename(tmp_path / ".tokenizer.json.1.part")
    (tmp_path / ".to-do.json").write_text('[[".tokenizer.json.1.part", "tokenizer.json"]]')
    assert load(tmp_path).encode("xyz").size == 3 and not (tmp_path / ".to-do.json").exists()


def test_without_special_tokens_there_is_no_end_of_text(tmp_path):
    CharTokenizer.train("abc").save(tmp_path)
    assert (load(tmp_path).special, load(tmp_path).eos_id) == ({}, None)


def test_saved_files_say_what_transformers_must_know(either, tmp_path):
    # Without the class characters are dropped; without split_special_tokens text can inject special tokens.
    either.save(tmp_path, model_max_length=64)
    eos = next(iter(either.special))
    assert json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")) == {
        "tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True, "model_max_length": 64,
        "clean_up_tokenization_spaces": False, "eos_token": eos, "bos_token": eos}
    assert sorted(os.listdir(tmp_path)) == ["tokenizer.json", "tokenizer_config.json"]
    # Written to be read: "Ġthe", not "\\u0120the".
    assert "\\u0" not in (tmp_path / "tokenizer.json").read_text(encoding="utf-8").replace("\\u0000", "")


def test_a_failed_save_leaves_the_old_file(either, tmp_path, monkeypatch):
    either.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()

    def full_disk(path, text, **options):
        path.write_bytes(b"{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(UserError, match="No space"):
        either.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["tokenizer.json", "tokenizer_config.json"]


def saved_spec(tokenizer, folder: Path) -> dict:
    tokenizer.save(folder)
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


def write_spec(folder: Path, spec: object) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")


def test_load_takes_the_forms_that_hub_files_have(bpe_tokenizer, tmp_path):
    # The hub's GPT-2 has no model.type, merges as text, a post_processor; newer files have merges as lists.
    spec = saved_spec(bpe_tokenizer, tmp_path)
    del spec["model"]["type"], spec["model"]["ignore_merges"], spec["pre_tokenizer"]["use_regex"]
    spec["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    for merges in (spec["model"]["merges"], [merge.split(" ") for merge in spec["model"]["merges"]]):
        spec["model"]["merges"] = merges
        write_spec(tmp_path, spec)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|user|>"}}))
        assert load(tmp_path).eos_id == bpe_tokenizer.special["<|user|>"]
        assert load(tmp_path).encode(MIXED).tolist() == bpe_tokenizer.encode(MIXED).tolist()


def test_vocab_and_merges_are_read_where_there_is_no_tokenizer_json(bpe_tokenizer, tmp_path):
    model = saved_spec(bpe_tokenizer, tmp_path)["model"]
    other = tmp_path / "other"
    other.mkdir()
    del model["vocab"]["<|user|>"]
    (other / "vocab.json").write_text(json.dumps(model["vocab"]))
    # Merges can begin with "#" too: only the line that states the version is none.
    assert "# #" in model["merges"]
    (other / "merges.txt").write_text("#version: 0.2\n" + "\n".join(model["merges"]) + "\n", encoding="utf-8")
    assert load(other).encode(MIXED + "##").tolist() == bpe_tokenizer.encode(MIXED + "##").tolist()
    assert load(other).special == {END: bpe_tokenizer.eos_id}
    CharTokenizer.train("abc").save(other)
    assert isinstance(load(other), CharTokenizer)


def test_a_byte_without_token_is_named(tmp_path):
    # Hugging Face's trainer leaves bytes out that it has not seen, and its encoder then drops them.
    spec = saved_spec(BPETokenizer.train("a", 257), tmp_path)
    vocab = {token: i for i, token in enumerate(t for t in spec["model"]["vocab"] if t != "!" and t != END)}
    spec["model"]["vocab"], spec["added_tokens"][0]["id"] = vocab, 255
    write_spec(tmp_path, spec)
    assert load(tmp_path).decode(load(tmp_path).encode("ab")) == "ab"
    with pytest.raises(UserError, match="byte 0x21"):
        load(tmp_path).encode("a!")


def test_a_tokenizer_of_documents_begins_them_with_a_space(tmp_path):
    """Guards: a first word that is another token than later ones; a file that says something else."""
    ours = BPETokenizer.train(["wug dax wug", "wug"], 262, documents=True)
    assert ours.encode("wug").tolist() == ours.encode(" wug").tolist() and len(ours.encode("wug")) == 1
    assert ours.decode(ours.encode("wug")) == " wug" and not len(ours.encode(""))
    assert [step.ids for step in ours.explain("wug")] == [ours.encode("wug").tolist()]
    ours.save(tmp_path)
    theirs = load(tmp_path)
    assert theirs.documents and theirs.encode("wug dax").tolist() == ours.encode("wug dax").tolist()
    assert encode_prompt(theirs, "wug").tolist() == [theirs.eos_id, *theirs.encode("wug")]
    assert encode_prompt(theirs, "").tolist() == [theirs.eos_id]
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    write_spec(tmp_path, spec | {"post_processor": None})
    theirs = load(tmp_path)
    assert theirs.space and not theirs.documents
    assert encode_prompt(theirs, "wug").tolist() == ours.encode("wug").tolist()


REFUSED = [    # where in tokenizer.json, what is put there, what the error must name
    ("normalizer", {"type": "NFC"}, "NFC"),
    ("pre_tokenizer", {"type": "Metaspace"}, "Metaspace"),
    ("pre_tokenizer", None, "pre_tokenizer"),
    ("pre_tokenizer.add_prefix_space", "no", "add_prefix_space"),
    ("pre_tokenizer.use_regex", False, "use_regex"),
    ("decoder", {"type": "WordPiece"}, "WordPiece"),
    ("model", {"type": "Unigram", "vocab": []}, "Unigram"),
    ("model", {"type": "WordLevel", "vocab": {}}, "pre_tokenizer"),
    ("model.type", "WordPiece", "WordPiece"),
    ("model.byte_fallback", True, "byte_fallback"),
    ("model.ignore_merges", True, "ignore_merges"),
    ("model.dropout", 0.1, "dropout"),
    ("model.continuing_subword_prefix", "##", "##"),
    ("model.merges", ["a b c"], "a b c"),
    ("model.merges", [["a", "zzz"]], "zzz"),
    ("model.merges", [[1, 2]], "pair"),
    ("model.merges", None, "merges"),
    ("model.vocab", None, "vocab"),
    ("model.vocab.a", 10**30, "gap"),
    ("model.vocab.a", 1, "gap"),
    ("model.vocab.a", True, "gap"),
    ("model.vocab.a", 64.0, "gap"),
    ("model.vocab.\u4e00", 300, "byte-level"),
    ("added_tokens", [{"id": 7, "content": "zz", "special": False}], "zz.* has the id 7"),
    ("added_tokens", [{"id": 300, "content": "zz", "special": 0}], "zz.* no token"),
    ("post_processor", {"type": "RobertaProcessing"}, "RobertaProcessing"),
    ("post_processor", {"type": "TemplateProcessing", "single": []}, "post_processor"),
    ("added_tokens", [{"id": 64, "content": "a", "special": True}], "spell"),
    ("added_tokens", [{"id": 5, "content": END, "special": True}], "one id"),
    ("added_tokens", [{"id": 300, "content": "\ud800", "special": True}], "D800"),
    ("added_tokens", "x", "added_tokens"),
    ("added_tokens", [{"id": 300, "content": "<a>"}, {"id": 300, "content": "<b>"}], "<b>.* 300.* one id"),
    ("added_tokens", ["<a>"], "<a>.* the id None"),
    ("post_processor", {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "B"}}]}, "'B'"),
]


@pytest.mark.parametrize("where,value,named", REFUSED)
def test_what_would_give_other_ids_is_refused_by_name(bpe_tokenizer, tmp_path, where, value, named):
    spec = saved_spec(bpe_tokenizer, tmp_path)
    *path, last = where.split(".")
    part = spec
    for key in path:
        part = part[key]
    part[last] = value
    write_spec(tmp_path, spec)
    with pytest.raises(UserError, match=rf"tokenizer\.json: .*{named}"):
        load(tmp_path)


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"])
def test_what_is_no_json_is_one_line_that_names_the_file(tmp_path, name, content):
    for other in ("vocab.json", "merges.txt"):
        (tmp_path / other).write_text('{"a": 1}')
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=str(tmp_path)) as error:
        load(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_an_eos_token_that_is_none_is_named(either, tmp_path):
    # Ignored, it would mean a model that never stops.
    either.save(tmp_path)
    for eos in (7, ["a"], {"content": 7}, ""):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        with pytest.raises(UserError, match="is no token"):
            load(tmp_path)


def test_a_folder_without_tokenizer_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=f"{folder}.*tokenizer.json"):
            load(folder)


def test_a_huge_id_allocates_nothing(char_tokenizer, tmp_path):
    spec = saved_spec(char_tokenizer, tmp_path)
    spec["model"]["vocab"]["a"] = 2**40
    write_spec(tmp_path, spec)
    tracemalloc.start()
    with pytest.raises(UserError):
        load(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


JUNK = [None, True, False, 0, 1, -1, 1.5, 10**30, float("nan"), "", "a", "a b", "\ud800", "x" * 99, END,
        "BPE", "WordLevel", [], {}, [[]], [1, 2], ["a", "b"], {"type": "BPE"}, {"content": []}, {"a": 0}]


def mutate_value(rng: random.Random, spec: object) -> object:
    """Somewhere in spec, put junk in place of a value, or drop, double or rename it."""
    if not isinstance(spec, dict | list) or not spec or rng.random() < 0.15:
        return copy.deepcopy(rng.choice(JUNK))
    key = rng.choice(list(spec)) if isinstance(spec, dict) else rng.randrange(len(spec))
    action = rng.choice(["descend"] * 4 + ["drop", "double", "swap"])
    if action == "drop":
        del spec[key]
    elif action == "double" and isinstance(spec, list):
        spec.insert(rng.randrange(len(spec) + 1), spec[key])
    elif action == "double":
        spec[rng.choice(["a", "", "type", "\u4e00", "\ud800", key + key])] = spec[key]
    elif action == "swap":
        other = rng.choice(list(spec)) if isinstance(spec, dict) else rng.randrange(len(spec))
        spec[key], spec[other] = spec[other], spec[key]
    else:
        spec[key] = mutate_value(rng, spec[key])
    return spec


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    at, length = rng.randrange(len(data) + 1), rng.choice([1, 1, 4, 100, len(data)])
    new = [b"", bytes([rng.randrange(256)]), b"{", b"]", b'"', b"9" * 50, b"[" * 2000, data[at:at + 9] * 2]
    return data[:at] + rng.choice(new) + data[at + length:]


def test_mutated_files_are_one_line_or_a_working_tokenizer(bpe_tokenizer, char_tokenizer, tmp_path):
    rng = random.Random(0)
    originals = []
    for kind in (bpe_tokenizer, char_tokenizer):
        kind.save(tmp_path)
        originals.append({name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)})
    model = json.loads(originals[0]["tokenizer.json"])["model"]
    originals.append({"vocab.json": json.dumps(model["vocab"]).encode(),
                      "merges.txt": "\n".join(["#version: 0.2", *model["merges"]]).encode()})
    refused = 0
    count = 10_000 if "TINYGPT_FULL" in os.environ else 400
    for _ in range(count):
        for name in os.listdir(tmp_path):
            os.remove(tmp_path / name)
        files = dict(rng.choice(originals))
        name = rng.choice(list(files))
        if name.endswith(".json") and rng.random() < 0.7:
            spec = json.loads(files[name])
            for _ in range(rng.randint(1, 3)):
                spec = mutate_value(rng, spec)
            files[name] = json.dumps(spec).encode()
        else:
            files[name] = mutate_bytes(rng, files[name])
        for file, data in files.items():
            (tmp_path / file).write_bytes(data)
        try:
            loaded = load(tmp_path)
            loaded.decode(range(loaded.vocab_size))
            for text in ("", "the cat 한\x00", MIXED):
                assert loaded.decode(loaded.encode(text)) == text
            loaded.save(tmp_path / "again")
            assert load(tmp_path / "again").tokens == loaded.tokens
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 500
        finally:
            shutil.rmtree(tmp_path / "again", ignore_errors=True)
    assert count / 4 < refused < count


# --- folders of other tools ---------------------------------------------------------------------------------


def folder_with(path: Path, *, json_file: bool = False, **files) -> Path:
    """GPT-2's two files without an end token in them, or tokenizer.json, and other files. 266 tokens."""
    spec = BPETokenizer.train("the cat sat on the mat " * 9, 266, special=()).spec
    model = spec["model"]
    path.mkdir(exist_ok=True)
    (path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (path / "merges.txt").write_text("\n".join(model["merges"]), encoding="utf-8")
    if json_file:
        (path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return path


def test_a_slow_tokenizers_files_count(tmp_path):
    """Guards: an end token that nobody finds, so that a text never ends (transformers 26500)."""
    ours = load(folder_with(tmp_path, added_tokens={"<|end|>": 266, "<user>": 267},
                             special_tokens_map={"eos_token": {"content": "<|end|>", "lstrip": False}}))
    assert (ours.eos_id, ours.stops) == (266, {266})
    assert ours.encode("the<user> cat<|end|>").tolist()[1] == 267  # an ordinary added token
    assert ours.special == {"<|end|>": 266, END: 268}  # which GPT2Tokenizer has for bos and unk
    assert ours.encode("<|end|>", special=True).tolist() == [266]


def test_roles_come_back_and_stale_files_go(tmp_path):
    """Guards: a padding token that is lost in fine-tuning; tokens of an older model beside the new one."""
    roles = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|start|>", "pad_token": "[PAD]",
             "additional_special_tokens": ["<tool>"], "padding_side": "left"}
    first = load(folder_with(tmp_path / "a", tokenizer_config=roles))
    old = folder_with(tmp_path / "b", added_tokens={"<old>": 266}, special_tokens_map={"eos_token": "<old>"})
    first.save(old)
    assert sorted(os.listdir(old)) == ["tokenizer.json", "tokenizer_config.json"]
    again = load(old)
    assert (again.spec, again.config()) == (first.spec, first.config())
    assert again.special == {"<|start|>": 266, END: 267, "[PAD]": 268, "<tool>": 269}
    assert (again.role_id("pad_token"), again.settings["padding_side"]) == (268, "left")
    assert encode_prompt(again, "").tolist() == [266]
    again.chat_template = "a template"  # as tuning sets it: its text must become tokens
    again.save(old)
    config = json.loads((old / "tokenizer_config.json").read_text())
    assert (config["split_special_tokens"], config["eos_token"], config["pad_token"]) == (False, END, "[PAD]")


def test_a_prompt_begins_with_what_the_files_say(tmp_path):
    """Guards: a BOS or a space that transformers puts before a text, and we do not."""
    base = load(folder_with(tmp_path / "plain"))
    ids, space = (base.encode(text).tolist() for text in ("the cat", " the cat"))
    bos = load(folder_with(tmp_path / "bos", tokenizer_config={"add_bos_token": True}))
    assert encode_prompt(bos, "the cat").tolist() == [266, *ids] and bos.encode("the cat").tolist() == ids
    config = {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True, "add_bos_token": True}
    spaced = load(folder_with(tmp_path / "space", json_file=True, tokenizer_config=config))
    assert encode_prompt(spaced, "the cat").tolist() == space  # tokenizer.json says that there is no BOS
    for name, first in ("bos", bos), ("space", spaced):
        first.save(tmp_path / name)
        again = load(tmp_path / name)
        assert encode_prompt(again, "the cat").tolist() == encode_prompt(first, "the cat").tolist()


@pytest.mark.parametrize(("named", "files"), [
    ("add_eos_token", {"tokenizer_config": {"add_eos_token": True}}),
    ("RobertaTokenizer", {"tokenizer_config": {"tokenizer_class": "RobertaTokenizer"}}),
    ("OpenAIGPTTokenizer", {"config": {"model_type": "openai-gpt"}}),
    ("<x>.* has the id 300, and should have 266", {"added_tokens": {"<x>": 300}}),
    ("<x>.* lstrip", {"tokenizer_config": {"added_tokens_decoder": {"266": {
        "content": "<x>", "lstrip": True, "special": False}}}}),
    ("a b.* a space inside", {"added_tokens": {"a b": 266}}),
    ("unknown form", {"tokenizer_config": {"added_tokens_decoder": ["x"]}}),
    ("unknown form", {"tokenizer_config": {"additional_special_tokens": "<tool>"}}),
    ("no bos_token", {"tokenizer_config": {"add_bos_token": True, "bos_token": None}}),
    ("unknown form", {"added_tokens": {"<x>": None}}),
    ("add_prefix_space", {"json_file": True, "tokenizer_config": {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True}}),
])  # fmt: skip
def test_what_other_files_say_and_is_not_honoured_is_named(tmp_path, named, files):
    with pytest.raises(UserError, match=named):
        load(folder_with(tmp_path, **files))


def test_merges_that_were_cut_are_named(tmp_path):
    """Guards: half a download, which gives other ids without a word."""
    folder_with(tmp_path)
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").split("\n")
    (tmp_path / "merges.txt").write_text("\n".join(merges[:5]), encoding="utf-8")
    cut = rf"vocab\.json: no merge makes {len(merges) - 5} of {len(merges)} tokens"
    with pytest.warns(UserWarning, match=cut):
        load(tmp_path)


def test_of_tokens_in_a_text_the_first_and_then_the_longest_counts(tmp_path):
    """Guards: a part of a token taken for the whole; what is said of a prompt that spells special tokens."""
    tokens = {name: 266 + n for n, name in enumerate(["<a>", "<a><b>", "<a", "<s>"])}
    ours = load(folder_with(tmp_path, added_tokens=tokens, tokenizer_config={"eos_token": "<s>"}))
    assert ours.encode("<a><b><a><a").tolist() == [267, 266, 268]
    assert ours.encode("x<s><a>", special=True).tolist() == [ours.encode("x")[0], 269, 266]
    assert 269 not in ours.encode("x<s><a>") and ours.spelled("x<s><a>") == ["<s>"]
    assert [part.ids for part in ours.explain("<a>x")] == [[266], ours.encode("x").tolist()]
    with pytest.warns(UserWarning, match="the prompt spells <s>, which is taken as characters"):
        encode_prompt(ours, "x<s>")
