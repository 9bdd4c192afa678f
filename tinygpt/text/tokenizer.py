"""Text to token ids and back: byte-level byte-pair encoding (BPE), as in GPT-2, and single characters.

A special token such as <|endoftext|> has an id that no ordinary text gets. `encode` gives such an id only if
the caller asks for special tokens. The dict `special` has the id of each special token. `save` writes a
tokenizer in two files. Hugging Face's libraries read these files and give the same ids. `load` reads the
files of other tools, and `save` keeps all settings that `load` has read.

Not here: Unigram, WordPiece, normalisation, and rules that split a text otherwise than GPT-2's. `bpe.py` has
the algorithm of BPE and its references. `tokenfiles.py` says which files and settings are supported.
"""

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..files.atomic import finish, make_folder, remove, replacing
from . import tokenfiles
from .bpe import BYTE_OF, apply_merges, learn_merges, merge_steps, pieces
from .tokenfiles import END_OF_TEXT, FILES, utf8

MOST_TOKENS = 200_000  # of a vocabulary that is trained here: `jsonfile` can read its file
CACHED_PIECES, CACHED_LENGTH = 1 << 16, 64  # pieces, and characters of a piece: at most 100 MB in all


class Explained(NamedTuple):
    """How one piece of a text becomes tokens.

    `steps`: (None, the piece's single bytes), then for each merge (its rank, the tokens after the merge).
    `ids`: the ids of the last step's tokens.
    """

    piece: str
    steps: list[tuple[int | None, list[bytes]]]
    ids: list[int]


class _Tokenizer:
    """The base of both kinds. tokens[i] is the text of id i in UTF-8, perhaps a part of a character."""

    space = False  # see BPETokenizer

    def __init__(self, spec: dict, settings: dict):
        """spec, settings: tokenizer.json and tokenizer_config.json, checked by `from_spec`."""
        self.spec, self.settings = spec, settings
        vocab, self.added = tokenfiles.vocabulary(spec)
        self.tokens = [self._bytes(token) for token in sorted(vocab, key=vocab.__getitem__)]
        self.special = {name: vocab[name] for name, token in self.added.items() if token["special"]}
        self.begin = tokenfiles.begins_with(spec)  # the first ids of each prompt
        usual = END_OF_TEXT if END_OF_TEXT in self.special else None
        self.eos = tokenfiles.role(settings, "eos_token", usual)
        self.eos_id = None if self.eos is None else self.special[self.eos]
        self.stops = {self.eos_id} - {None}  # the ids that end a text; a model's folder may name others
        template = settings.get("chat_template")  # a conversation as text, in Hugging Face's form
        self.chat_template: str | None = template if isinstance(template, str) else None
        # Tokens that are not "normalized" are searched first. Of several at one place the longest counts.
        names = sorted(self.added, key=len, reverse=True)
        groups = ([n for n in names if self.added[n]["normalized"] is flag] for flag in (False, True))
        self._patterns = [re.compile("|".join(map(re.escape, group))) for group in groups if group]

    @property
    def vocab_size(self) -> int:
        """The number of tokens, special ones included."""
        return len(self.tokens)

    @property
    def documents(self) -> bool:
        """Whether a prompt begins with the end token and a space, like a document within a stream."""
        return self.space and self.begin == [self.eos_id]

    def role_id(self, role: str) -> int | None:
        """The id of the token that has a role such as "pad_token"."""
        return self.special.get(tokenfiles.role(self.settings, role))

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Ids (n,), int32. With `special`, the name of a special token in the text becomes the token's id.

        Raises UserError for text that the vocabulary cannot write: an unseen character, a byte that a BPE
        lacks, half a surrogate pair.
        """
        parts = self._parts(text, special)
        return np.concatenate([self._encode(part) if i is None else np.int32([i]) for part, i in parts])

    def _parts(self, text: str, special: bool) -> list[tuple[str, int | None]]:
        """The text in parts: (part, None), and (an added token, its id)."""
        parts = [(text, None)]
        for name in self.spelled(text) if special else ():
            if flags := [flag for flag in tokenfiles.STRIP if self.added[name][flag]]:
                raise UserError(f"the special token {name} has {flags[0]}, which is not supported in a text")
        for pattern in self._patterns if special or len(self.added) > len(self.special) else ():
            texts, parts = parts, []
            for part, i in texts:
                start = 0
                for match in pattern.finditer(part) if i is None else ():
                    if special or match[0] not in self.special:
                        parts += [(part[start : match.start()], None), (match[0], self.added[match[0]]["id"])]
                        start = match.end()
                parts.append((part[start:], i))
        return parts

    def spelled(self, text: str) -> list[str]:
        """The special tokens that a text spells."""
        return [name for name in self.special if name in text]

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of ids (1-D, integers). Raises UserError for an id without a token."""
        ids = np.asarray(ids).ravel()
        unknown = ids[(ids < 0) | (ids >= self.vocab_size)]
        if unknown.size:
            raise UserError(f"id {unknown[0]} is not in this vocabulary: use the tokenizer of the model")
        return b"".join(map(self.tokens.__getitem__, ids.tolist()))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids. Bytes that are not UTF-8 become U+FFFD, special tokens their names."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def explain(self, text: str) -> Iterator[Explained]:
        """Each piece of a text and its merges, in the order in which `encode` does them."""
        for part, i in self._parts(text, special=False):
            whole = () if i is None else [Explained(part, [(None, [self.tokens[i]])], [i])]
            yield from whole or self._explain(part)

    def save(self, folder: Path | str, model_max_length: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json, for `load` and for Hugging Face's AutoTokenizer.

        Other files that describe a tokenizer are removed: readers would add them to these two.
        """
        folder = Path(folder)
        make_folder(folder)
        for name in tokenfiles.OLDER_FILES:
            remove(folder / name)
        length = {} if model_max_length is None else {"model_max_length": model_max_length}
        for name, value in zip(FILES, (self.spec, self.config() | length), strict=True):
            with replacing(folder / name) as beside:
                text = json.dumps(value, ensure_ascii=False, indent=2)
                beside.write_text(text, encoding="utf-8", newline="\n")

    def config(self) -> dict:
        """The contents of tokenizer_config.json: all settings that were read, and the chat template."""
        # Any other class would replace the rules in tokenizer.json by its own rules.
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= self.settings | ({"add_prefix_space": True} if self.space else {})
        if self.chat_template != self.settings.get("chat_template"):
            # A template makes a text, in which the end token must become its id. The template must refuse
            # messages that spell the end token (the one of `instructions` does).
            new = {"chat_template": self.chat_template, "split_special_tokens": False, "eos_token": self.eos}
            config |= new
        return config


class CharTokenizer(_Tokenizer):
    """One id per character: simple and small, but it cannot write characters that are not in its text.

    >>> tokenizer = CharTokenizer.train("hello")
    >>> tokenizer.encode("hole").tolist(), tokenizer.decode([1, 3, 2, 0])
    ([1, 3, 2, 0], 'hole')
    """

    def __init__(self, spec: dict, settings: dict):
        super().__init__(spec, settings)
        self._id_of = np.full(0x110000, -1, np.int32)
        for char, i in spec["model"]["vocab"].items():
            if char not in self.added:
                self._id_of[ord(char)] = i

    def _bytes(self, token: str) -> bytes:
        return utf8(token)

    @classmethod
    def train(cls, texts: str | Iterable[str], special: Sequence[str] = ()) -> "CharTokenizer":
        """Ids for the characters, sorted, then for special tokens; the first of these ends a text."""
        chars: set[str] = set()
        for text in [texts] if isinstance(texts, str) else texts:
            chars.update(text)
        if not chars:
            raise UserError("the training text is empty: give a text with every character that will be used")
        # A WordLevel model must name a token for unknown words. No vocabulary has <unk>: they are an error.
        model = {"type": "WordLevel", "vocab": {}, "unk_token": "<unk>"}
        return _trained(sorted(chars), special, tokenfiles.CHARACTERS, model)

    def _encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        ids = self._id_of[codes]
        if ids.size and ids.min() < 0:
            code = codes[ids.argmin()]
            raise UserError(f"the character {chr(code)!r} (U+{code:04X}) is not in this vocabulary: train "
                            "again on text that has it, or use BPE, which takes any text")
        return ids

    def _explain(self, text: str) -> Iterator[Explained]:
        for char, i in zip(text, self._encode(text).tolist(), strict=True):
            yield Explained(char, [(None, [self.tokens[i]])], [i])


class BPETokenizer(_Tokenizer):
    """Byte-level BPE: takes any text; frequent words are one token, rare ones several.

    >>> tokenizer = BPETokenizer.train("low lower lowest", vocab_size=260)
    >>> [tokenizer.tokens[i] for i in tokenizer.encode("slow lows")]
    [b's', b'low', b' low', b's']
    """

    def __init__(self, spec: dict, settings: dict):
        super().__init__(spec, settings)
        vocab = spec["model"]["vocab"]
        self._id_of = {byte: vocab[char] for char, byte in BYTE_OF.items() if char in vocab}
        pairs = enumerate(tokenfiles.merge_list(spec, vocab))
        self._merges = {(vocab[a], vocab[b]): (rank, vocab[a + b]) for rank, (a, b) in pairs}
        self._cached = lru_cache(CACHED_PIECES)(self._encode_piece)  # text repeats its words
        # Whether a text is encoded as after a space. Its first word is then the same token as elsewhere.
        self.space = spec["pre_tokenizer"].get("add_prefix_space") is True

    def _bytes(self, token: str) -> bytes:
        return utf8(token) if token in self.added else bytes(map(BYTE_OF.__getitem__, token))

    @classmethod
    def train(cls, texts: str | Iterable[str], vocab_size: int,
              special: Sequence[str] = (END_OF_TEXT,), documents: bool = False) -> "BPETokenizer":
        """Learn merges until there are vocab_size tokens, or until a small text has no pair left.

        The order of ids is that of GPT-2: bytes, merges as learned, special tokens. The first special token
        is the end token. With `documents`, prompts begin with the end token and a space, as documents do in a
        model's training. Raises UserError for an empty text, for a wrong special token, and for a vocab_size
        outside 256 + len(special) to MOST_TOKENS.
        """
        least = 256 + len(special)
        if not least <= vocab_size <= MOST_TOKENS:
            size = "small" if vocab_size < least else "large"
            raise UserError(f"vocab_size {vocab_size} is too {size}: give {least} (256 bytes, special "
                            f"tokens) to {MOST_TOKENS}")
        texts = [texts] if isinstance(texts, str) else texts
        words = Counter(chain.from_iterable(pieces(_begun(text, documents)) for text in texts))
        if not words:
            raise UserError("the training text is empty: BPE learns from text")
        names, merges = list(BYTE_OF), []
        for a, b in learn_merges({utf8(word): count for word, count in words.items()}, vocab_size - least):
            merges.append(f"{names[a]} {names[b]}")
            names.append(names[a] + names[b])
        model = tokenfiles.BPE_MODEL | {"vocab": {}, "merges": merges}
        return _trained(names, special, tokenfiles.BYTE_LEVEL, model, documents)

    def _encode(self, text: str) -> np.ndarray:
        parts = [self._cached(piece) if len(piece) <= CACHED_LENGTH else self._encode_piece(piece)
                 for piece in pieces(_begun(text, self.space))]  # fmt: skip
        return np.frombuffer(bytearray().join(parts), np.int32)

    def _encode_piece(self, piece: str) -> bytes:
        """A piece's int32 ids as bytes, which are small to cache and fast to join."""
        return np.array(apply_merges(self._byte_ids(piece), self._merges), np.int32).tobytes()

    def _byte_ids(self, piece: str) -> list[int]:
        try:
            return [self._id_of[byte] for byte in utf8(piece)]
        except KeyError as error:
            raise UserError(f"this vocabulary has no token for byte 0x{error.args[0]:02X} of {short(piece)}: "
                            "use a vocabulary with all 256 bytes") from None

    def _explain(self, text: str) -> Iterator[Explained]:
        """`explain` of a part without added tokens.

        >>> tokenizer = BPETokenizer.train("low lower lowest", vocab_size=260)
        >>> next(tokenizer.explain("lot")).steps
        [(None, [b'l', b'o', b't']), (0, [b'lo', b't'])]
        """
        for piece in pieces(_begun(text, self.space)):
            ids = self._byte_ids(piece)
            steps = [(None, ids), *merge_steps(ids, self._merges)]
            named = [(rank, [self.tokens[i] for i in ids]) for rank, ids in steps]
            yield Explained(piece, named, steps[-1][1])


Tokenizer = CharTokenizer | BPETokenizer


def stream_decoder(tokenizer: Tokenizer) -> Callable[..., str]:
    """A function that takes the next ids and returns the text that they complete, whole characters only.

    Several ids may share the bytes of one character: the function returns the character after its last byte.
    Called with final=True it ends the text, with U+FFFD for an incomplete character. All returned texts,
    joined, are `decode` of all ids.

    >>> tokenizer = BPETokenizer.train("x", vocab_size=257)
    >>> feed = stream_decoder(tokenizer)
    >>> [feed(i) for i in tokenizer.encode("né")], feed(final=True)
    (['n', '', 'é'], '')
    """
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return lambda *ids, final=False: utf8.decode(tokenizer.decode_bytes(ids), final)


def _begun(text: str, space: bool) -> str:
    return " " + text if space and text and text[0] != " " else text


def _trained(tokens: list[str], special: Sequence[str], rules: dict, model: dict,
             documents: bool = False) -> Tokenizer:
    """A new tokenizer. Ids are for tokens, then for special tokens.

    rules, model: parts of its tokenizer.json; the model's vocabulary is filled in here.
    """
    for name in special:
        if len(list(pieces(name))) < 2:  # BPE could learn it as one piece, and then text could spell it
            raise UserError(f"special token {name!r} could be a word of the text: write it as <|name|>")
    vocab = {token: i for i, token in enumerate([*tokens, *special])}
    if len(vocab) < len(tokens) + len(special):
        raise UserError(f"special tokens {short(list(special))}: one comes twice, or is a token of the text")
    added = [{"id": vocab[name], **tokenfiles.flagged(name)} for name in special]
    eos = next(iter(special), None)
    begin = tokenfiles.SPACED | tokenfiles.begun_by(eos, vocab[eos]) if documents else {}
    spec = tokenfiles.EMPTY | {"added_tokens": added} | rules | begin | {"model": model | {"vocab": vocab}}
    # Text that spells a special token stays text, also in Hugging Face's libraries.
    return from_spec(spec, {"split_special_tokens": True, "bos_token": eos, "eos_token": eos})


# --- files --------------------------------------------------------------------------------------------------


def load(folder: Path | str) -> Tokenizer:
    """Read the tokenizer in a folder, one of `save` or of another tool.

    Reads tokenizer.json, or else GPT-2's vocab.json and merges.txt, and the files beside them. The tokenizer
    must be byte-level BPE that splits as GPT-2, or `save`'s characters. For any other setting it raises
    UserError, which names the file.
    """
    finish(Path(folder))
    path = Path(folder) / FILES[0]
    if not path.exists():
        path = path.with_name("vocab.json")
        if not (path.exists() and path.with_name("merges.txt").exists()):
            raise UserError(f"{folder}: has neither tokenizer.json nor vocab.json and merges.txt")
    return from_spec(*tokenfiles.gathered(path), str(path))


def from_spec(spec: object, settings: object, where: str = FILES[0]) -> Tokenizer:
    """Build the tokenizer of a tokenizer.json and a tokenizer_config.json, after a check of all settings.

    where: the name of the file in messages. Raises UserError. Warns of tokens that no merge makes.
    """
    try:
        return (CharTokenizer if tokenfiles.check(spec, settings, where) else BPETokenizer)(spec, settings)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
