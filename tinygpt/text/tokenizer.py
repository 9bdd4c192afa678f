"""Text to token ids and back: byte-level BPE, as in GPT-2, and single characters.

Special tokens such as <|endoftext|> are ids beside the text: `encode` never yields one, whatever the text
spells, and `special` has their ids for those who build sequences. A tokenizer is saved in two files that
Hugging Face's libraries read with the same ids, and `load` reads theirs.

Not here: Unigram, WordPiece, other splitting rules, normalisation. The algorithm and its references are in
`bpe.py`.
"""

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..files.atomic import make_folder, remove, replacing
from ..files.jsonfile import read_object, read_text
from .bpe import BYTE_OF, CHAR_OF, apply_merges, learn_merges, merge_steps, pieces

END_OF_TEXT = "<|endoftext|>"
MOST_TOKENS = 200_000  # of a vocabulary that is made here: its file is within jsonfile's limits
TEMPLATE = "chat_template.jinja"              # where transformers puts a chat template of its own
CACHED_PIECES, CACHED_LENGTH = 1 << 16, 64    # what a BPETokenizer remembers: 100 MB at the very most


class Explained(NamedTuple):
    """How one piece of a text became tokens.

    `steps` has (None, the piece's bytes one by one), then for each merge (its rank, the tokens after it);
    `ids` are those of the last step's tokens.
    """
    piece: str
    steps: list[tuple[int | None, list[bytes]]]
    ids: list[int]


class _Tokenizer:
    """What both kinds share. tokens[i] is what id i stands for, in UTF-8: perhaps a part of a character."""

    documents = False  # see BPETokenizer

    def __init__(self, tokens: list[bytes], special: dict[str, int], eos: str | None):
        self.tokens = tokens
        self.special = special
        self.eos, self.eos_id = eos, None if eos is None else special[eos]
        self.chat_template: str | None = None  # how a conversation is written, in Hugging Face's words

    @property
    def vocab_size(self) -> int:
        """The number of tokens, special ones included."""
        return len(self.tokens)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes that ids (1-D, integers) stand for. Raises UserError for an id that has no token."""
        ids = np.asarray(ids).ravel()
        unknown = ids[(ids < 0) | (ids >= self.vocab_size)]
        if unknown.size:
            raise UserError(f"id {unknown[0]} is not in this vocabulary of {self.vocab_size} tokens: "
                            "use the tokenizer that the model was trained with")
        return b"".join(map(self.tokens.__getitem__, ids.tolist()))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, with U+FFFD for bytes that are not UTF-8, and special tokens spelled out."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder: Path | str, model_max_length: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json, for `load` and for Hugging Face's AutoTokenizer."""
        folder = Path(folder)
        make_folder(folder)
        config = {
            # Any other class replaces the rules in tokenizer.json by its own.
            "tokenizer_class": "PreTrainedTokenizerFast",
            # Otherwise a text that spells a special token out becomes that token: what a chat template needs,
            # whose result is a text, and must guard against (ours does, in `instructions`).
            "split_special_tokens": self.chat_template is None,
            "clean_up_tokenization_spaces": False,
            "bos_token": self.eos,
            "eos_token": self.eos,
        }
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        remove(folder / TEMPLATE)  # or it would count, and not what is written here
        _write_json(folder / "tokenizer.json", self.to_spec())
        _write_json(folder / "tokenizer_config.json", config)

    def to_spec(self) -> dict:
        """What tokenizer.json holds: with `eos`, all that `from_spec` needs."""
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        added = [{"id": i, "content": name, **flags} for name, i in self.special.items()]
        return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
                "post_processor": None, **self._spec()}


class CharTokenizer(_Tokenizer):
    """One id per character: simple and small, but it knows no character that training did not see.

    >>> tokenizer = CharTokenizer.train("hello")
    >>> tokenizer.encode("hole").tolist(), tokenizer.decode([1, 3, 2, 0])
    ([1, 3, 2, 0], 'hole')
    """

    def __init__(self, vocab: dict[str, int], special: dict[str, int], eos: str | None):
        """vocab: token -> id, special ones included, ids 0 .. n-1. special: those that text cannot spell."""
        super().__init__([_utf8(token) for token in sorted(vocab, key=vocab.__getitem__)], special, eos)
        self._id_of = np.full(0x110000, -1, np.int32)
        for char in vocab.keys() - special.keys():
            self._id_of[ord(char)] = vocab[char]

    @classmethod
    def train(cls, texts: str | Iterable[str], special: Sequence[str] = ()) -> "CharTokenizer":
        """Ids for the characters, sorted, then for special tokens; the first of these ends a text."""
        chars: set[str] = set()
        for text in [texts] if isinstance(texts, str) else texts:
            chars.update(text)
        if not chars:
            raise UserError("the training text is empty: give a text with every character that will be used")
        return cls(*_with_special(sorted(chars), special))

    def encode(self, text: str) -> np.ndarray:
        """Ids, int32, one per character. Raises UserError for a character that training did not see."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        ids = self._id_of[codes]
        if ids.size and ids.min() < 0:
            code = codes[ids.argmin()]
            raise UserError(f"the character {chr(code)!r} (U+{code:04X}) is not in this vocabulary: "
                            "train again on text that has it, or use BPE, which takes any text")
        return ids

    def explain(self, text: str) -> Iterator[Explained]:
        """Each character and its id, in the form that BPETokenizer.explain has."""
        for char, i in zip(text, self.encode(text).tolist(), strict=True):
            yield Explained(char, [(None, [self.tokens[i]])], [i])

    def _spec(self) -> dict:
        vocab = {token.decode("utf-8"): i for i, token in enumerate(self.tokens)}
        # A WordLevel model must name a token for unknown words; as it is in no vocabulary, they are an error.
        return _CHARACTERS | {"model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}}


class BPETokenizer(_Tokenizer):
    """Byte-level BPE: takes any text; frequent words are one token, rare ones several.

    >>> tokenizer = BPETokenizer.train("low lower lowest", vocab_size=260)
    >>> [tokenizer.tokens[i] for i in tokenizer.encode("slow lows")]
    [b's', b'low', b' low', b's']
    """

    def __init__(self, vocab: dict[str, int], merges: Iterable[tuple[str, str]],
                 special: dict[str, int], eos: str | None, documents: bool = False):
        """vocab: token -> id, bytes written as in BYTE_OF, special tokens included, ids 0 .. n-1. merges: the
        pairs of tokens to join, in order of rank. special: the tokens that no merge makes. documents: a text
        is encoded as after a space, so that its first word is the token that it is elsewhere, and a prompt
        stands after the end token."""
        super().__init__([_utf8(token) if token in special else bytes(map(BYTE_OF.__getitem__, token))
                          for token in sorted(vocab, key=vocab.__getitem__)], special, eos)
        self._id_of = {byte: vocab[char] for char, byte in BYTE_OF.items() if char in vocab}
        self._merges = {(vocab[a], vocab[b]): (rank, vocab[a + b]) for rank, (a, b) in enumerate(merges)}
        self._cache: dict[str, bytes] = {}
        self.documents = documents

    @classmethod
    def train(cls, texts: str | Iterable[str], vocab_size: int,
              special: Sequence[str] = (END_OF_TEXT,), documents: bool = False) -> "BPETokenizer":
        """Learn merges until there are vocab_size tokens, or until a small text has no pair left.

        Ids are laid out as GPT-2's: bytes, merges as learned, special tokens; the first of these ends a text.
        Raises UserError for an empty text, and for a vocab_size without room for the bytes or too large.
        """
        least = 256 + len(special)
        if vocab_size < least:
            raise UserError(f"vocab_size {vocab_size} is too small: 256 bytes and {len(special)} special "
                            f"token(s) need {least}")
        if vocab_size > MOST_TOKENS:
            raise UserError(f"vocab_size {vocab_size} is too large: at most {MOST_TOKENS:,}")
        texts = [texts] if isinstance(texts, str) else texts
        words = Counter(chain.from_iterable(pieces(_begun(text, documents)) for text in texts))
        if not words:
            raise UserError("the training text is empty: BPE learns from text")
        names, merges = list(BYTE_OF), []
        for a, b in learn_merges({_utf8(word): count for word, count in words.items()}, vocab_size - least):
            merges.append((names[a], names[b]))
            names.append(names[a] + names[b])
        vocab, special_ids, eos = _with_special(names, special)
        return cls(vocab, merges, special_ids, eos, documents)

    def encode(self, text: str) -> np.ndarray:
        """Ids, int32. Raises UserError for half a surrogate pair, and for a byte that a vocabulary lacks."""
        return np.frombuffer(bytearray().join(map(self._encode_piece, pieces(_begun(text, self.documents)))),
                             np.int32)

    def _encode_piece(self, piece: str) -> bytes:
        """A piece's int32 ids as bytes, which are small to keep and fast to join. Text repeats its words."""
        ids = self._cache.get(piece)
        if ids is None:
            ids = np.array(apply_merges(self._byte_ids(piece), self._merges), np.int32).tobytes()
            if len(self._cache) >= CACHED_PIECES:
                self._cache.clear()
            if len(piece) <= CACHED_LENGTH:
                self._cache[piece] = ids
        return ids

    def _byte_ids(self, piece: str) -> list[int]:
        try:
            return [self._id_of[byte] for byte in _utf8(piece)]
        except KeyError as error:
            raise UserError(f"this vocabulary has no token for byte 0x{error.args[0]:02X} of {short(piece)}: "
                            "use one with all 256 bytes") from None

    def explain(self, text: str) -> Iterator[Explained]:
        """Each piece of text and its merges, in the order in which `encode` does them.

        >>> tokenizer = BPETokenizer.train("low lower lowest", vocab_size=260)
        >>> next(tokenizer.explain("lot")).steps
        [(None, [b'l', b'o', b't']), (0, [b'lo', b't'])]
        """
        for piece in pieces(_begun(text, self.documents)):
            ids = self._byte_ids(piece)
            steps = [(None, ids), *merge_steps(ids, self._merges)]
            named = [(rank, [self.tokens[i] for i in ids]) for rank, ids in steps]
            yield Explained(piece, named, steps[-1][1])

    def _spec(self) -> dict:
        names = ["".join(map(CHAR_OF.__getitem__, token)) for token in self.tokens]
        for name, i in self.special.items():
            names[i] = name
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                 "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                 "vocab": {name: i for i, name in enumerate(names)},
                 "merges": [f"{names[a]} {names[b]}" for a, b in sorted(self._merges, key=self._merges.get)]}
        if not self.documents:
            return _BYTE_LEVEL | {"model": model}
        return _BYTE_LEVEL | _document_rules(self.eos, self.eos_id) | {"model": model}


def stream_decoder(tokenizer: CharTokenizer | BPETokenizer) -> Callable[..., str]:
    """A function that takes ids as they come and returns the text that they complete, whole characters only.

    The bytes of a character may come with several ids: they wait until it is whole. feed(final=True) ends the
    text and gives U+FFFD for what still waits. All that was returned, joined, is decode of all ids.

    >>> tokenizer = BPETokenizer.train("x", vocab_size=257)
    >>> feed = stream_decoder(tokenizer)
    >>> [feed(i) for i in tokenizer.encode("né")], feed(final=True)
    (['n', '', 'é'], '')
    """
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return lambda *ids, final=False: utf8.decode(tokenizer.decode_bytes(ids), final)


def _begun(text: str, documents: bool) -> str:
    return " " + text if documents and text and text[0] != " " else text


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"U+{ord(text[error.start]):04X} is half of a surrogate pair, no character: "
                        "read the text with the encoding that it was written in") from None


def _with_special(tokens: list[str], special: Sequence[str]) -> tuple[dict, dict, str | None]:
    """Ids for tokens, then for special tokens: vocab, special and eos, as the constructors take them."""
    for name in special:
        if len(list(pieces(name))) < 2:    # as one piece it could be learned, and then text could spell it
            raise UserError(f"special token {name!r} could be a word of the text: write it as <|name|>")
    vocab = {token: i for i, token in enumerate([*tokens, *special])}
    if len(vocab) < len(tokens) + len(special):
        raise UserError(f"special tokens {short(list(special))}: one comes twice, or is a token of the text")
    return vocab, {name: vocab[name] for name in special}, next(iter(special), None)


# --- Files --------------------------------------------------------------------------------------------------

# What tokenizer.json says beside its vocabulary.
_CHARACTERS = {
    "normalizer": None,
    "pre_tokenizer": {
        "type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
    "decoder": {"type": "Fuse"},
}
_GPT2_RULE = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BYTE_LEVEL = {"normalizer": None, "pre_tokenizer": _GPT2_RULE, "decoder": _GPT2_RULE}


def _document_rules(eos: str, eos_id: int) -> dict:
    """What it says for `documents`: a space, and the end token, before a text."""
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    token = {"SpecialToken": {"id": eos, "type_id": 0}}
    return {
        "pre_tokenizer": _GPT2_RULE | {"add_prefix_space": True},
        "post_processor": {"type": "TemplateProcessing", "single": [token, a], "pair": [token, a, token, b],
                           "special_tokens": {eos: {"id": eos, "ids": [eos_id], "tokens": [eos]}}},
    }  # fmt: skip



# The values with which a file means the ids that are given here; None also where there is no value. Where no
# space is added, a post_processor may be anything: it only adds special tokens, which `encode` leaves to its
# caller.
_CHARACTER_RULES = {name: (value,) for name, value in _CHARACTERS.items()}
_BYTE_LEVEL_RULES = {
    "normalizer": (None,),
    "pre_tokenizer.type": ("ByteLevel",),
    "pre_tokenizer.add_prefix_space": (False, True),
    "pre_tokenizer.use_regex": (True, None),
    "decoder.type": ("ByteLevel",),
    "model.type": ("BPE", None),
    "model.dropout": (None, 0),
    "model.continuing_subword_prefix": (None, ""),
    "model.end_of_word_suffix": (None, ""),
    "model.byte_fallback": (False, None),
    "model.ignore_merges": (False, None),
}


def load(folder: Path | str) -> CharTokenizer | BPETokenizer:
    """Read the tokenizer in a folder: one that `save` wrote, or another that gives the same ids.

    Takes tokenizer.json with byte-level BPE that splits as GPT-2, or with `save`'s characters; without it,
    GPT-2's vocab.json and merges.txt. Raises UserError, naming the file, for whatever else a file holds.
    """
    folder = Path(folder)
    path, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    settings = read_object(config) if config.exists() else {}
    eos = settings.get("eos_token", END_OF_TEXT)
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if not isinstance(eos, str | None):
        raise UserError(f"{config}: eos_token should be a string or null, is {short(eos)}")
    if path.exists():
        spec = read_object(path)
    else:
        path, merges = folder / "vocab.json", folder / "merges.txt"
        if not (path.exists() and merges.exists()):
            raise UserError(f"{folder}: has neither tokenizer.json nor vocab.json and merges.txt")
        vocab, lines = read_object(path), read_text(merges).split("\n")
        added = [{"id": vocab[eos], "content": eos, "special": True}] if eos in vocab else []
        spec = _BYTE_LEVEL | {"added_tokens": added, "model": {
            "vocab": vocab, "merges": [line for line in lines if line and not line.startswith("#version")]}}
    template = read_text(folder / TEMPLATE) if (folder / TEMPLATE).exists() else settings.get("chat_template")
    try:
        return from_spec(spec, eos, template)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def from_spec(spec: object, eos: str | None, chat_template: object = None) -> CharTokenizer | BPETokenizer:
    """Check everything that a tokenizer.json says, and build what it describes. Raises UserError.

    chat_template: a string is kept as it is; anything else, such as a list of several, is not.
    """
    characters = _at(spec, "model.type") == "WordLevel"
    for name, allowed in (_CHARACTER_RULES if characters else _BYTE_LEVEL_RULES).items():
        if (value := _at(spec, name)) not in allowed:
            raise UserError(f"{name} is {short(value)}, only {short(allowed[0])} is supported (byte-level "
                            "BPE with GPT-2's splitting rule, or tinygpt's characters)")
    vocab, special = _vocabulary(spec)
    if eos not in special:
        if eos not in (None, END_OF_TEXT):
            raise UserError(f"the eos_token {short(eos)} is not one of its special tokens")
        eos = None
    documents = _at(spec, "pre_tokenizer.add_prefix_space") is True
    if documents and (eos is None or not _document_rules(eos, special[eos]).items() <= spec.items()):
        raise UserError("pre_tokenizer.add_prefix_space is true, which is only supported where the "
                        "post_processor begins a text with the eos_token")
    plain = vocab.keys() - special.keys()
    if characters:
        foreign = [token for token in plain if len(token) != 1]
        spelled = [name for name in special if len(name) == 1]
    else:
        merges = _merge_list(spec, vocab)
        foreign = [token for token in plain if not token or not BYTE_OF.keys() >= set(token)]
        spelled = special.keys() & ({a + b for a, b in merges} | BYTE_OF.keys())
    if foreign:
        kind = "one character" if characters else "in byte-level writing"
        raise UserError(f"token {short(min(foreign))} is not {kind}")
    if spelled:
        raise UserError(f"special token {short(min(spelled))} is one that text can spell")
    tokenizer = CharTokenizer(vocab, special, eos) if characters else \
        BPETokenizer(vocab, merges, special, eos, documents)
    tokenizer.chat_template = chat_template if isinstance(chat_template, str) else None
    return tokenizer


def _vocabulary(spec: dict) -> tuple[dict[str, int], dict[str, int]]:
    """The ids of all tokens, and of the special ones among them."""
    vocab, added, special = _at(spec, "model.vocab"), _at(spec, "added_tokens") or [], {}
    if not isinstance(vocab, dict) or not isinstance(added, list):
        raise UserError(f"model.vocab is no object, or added_tokens no list: {short(vocab)}, {short(added)}")
    vocab = dict(vocab)
    for token in added:
        name, i = _at(token, "content"), _at(token, "id")
        if not isinstance(name, str) or not name or _at(token, "special") is not True:
            raise UserError(f"added token {short(token)} is not special, only special ones are supported")
        if vocab.setdefault(name, i) != i:
            raise UserError(f"added token {short(name)} has two ids, {short(i)} and {short(vocab[name])}")
        special[name] = vocab[name]
    ids = vocab.values()
    if not all(type(i) is int for i in ids) or set(ids) != set(range(len(vocab))):
        raise UserError(f"the ids of its {len(vocab)} tokens are not 0, 1, 2 ... without gap or repetition")
    return vocab, special


def _merge_list(spec: dict, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges, which a file has as ["a", "b"] or as "a b"."""
    merges, pairs = _at(spec, "model.merges"), []
    if not isinstance(merges, list):
        raise UserError(f"model.merges should be a list, is {short(merges)}")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(token, str) for token in pair):
            raise UserError(f"merge {short(merge)} is not a pair of tokens")
        if not {*pair, "".join(pair)} <= vocab.keys():
            raise UserError(f"merge {short(merge)} is of tokens that are not in the vocabulary")
        pairs.append((pair[0], pair[1]))
    return pairs


def _at(spec: object, name: str) -> object:
    """_at({"a": {"b": 1}}, "a.b") is 1; None where there is nothing of that name."""
    for key in name.split("."):
        spec = spec.get(key) if isinstance(spec, dict) else None
    return spec


def _write_json(path: Path, value: dict) -> None:
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, ensure_ascii=False, indent=2), encoding="utf-8", newline="\n")
