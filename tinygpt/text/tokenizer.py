"""Text to token ids and back: byte-level BPE, as in GPT-2, and single characters.

Special tokens such as <|endoftext|> are ids beside the text: `encode` yields one only if the caller asks for
them, and `special` has their ids for those who build sequences. A tokenizer is saved in two files that
Hugging Face's libraries read with the same ids. `load` reads theirs: `gathered` collects all that a folder
says of its tokenizer, and what was read is written again.

Not here: Unigram, WordPiece, other splitting rules, normalisation. The algorithm and its references are in
`bpe.py`.
"""

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..files.atomic import make_folder, remove, replacing
from . import tokenfiles
from .bpe import BYTE_OF, apply_merges, learn_merges, merge_steps, pieces
from .tokenfiles import END_OF_TEXT, FILES, utf8

MOST_TOKENS = 200_000  # of a vocabulary that is made here: its file is within jsonfile's limits
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

    space = False  # see BPETokenizer

    def __init__(self, spec: dict, settings: dict):
        """spec, settings: what tokenizer.json and tokenizer_config.json say, checked by `from_spec`."""
        self.spec, self.settings = spec, settings
        vocab, self.added = tokenfiles.vocabulary(spec)
        self.tokens = [self._bytes(token) for token in sorted(vocab, key=vocab.__getitem__)]
        self.special = {name: vocab[name] for name, token in self.added.items() if token["special"]}
        self.begin = tokenfiles.begins_with(spec)  # the ids that a prompt begins with
        usual = END_OF_TEXT if END_OF_TEXT in self.special else None
        self.eos = tokenfiles.role(settings, "eos_token", usual)
        self.eos_id = None if self.eos is None else self.special[self.eos]
        self.stops = {self.eos_id} - {None}  # the ids that end a text; a model's folder may name others
        template = settings.get("chat_template")  # how a conversation is written, in Hugging Face's words
        self.chat_template: str | None = template if isinstance(template, str) else None
        # A text is searched for the tokens that are not "normalized" first; of several the longest counts.
        self._patterns, longest = [], sorted(self.added, key=len, reverse=True)
        for normalized in (False, True):
            if names := [re.escape(name) for name in longest if self.added[name]["normalized"] is normalized]:
                self._patterns.append(re.compile("|".join(names)))

    @property
    def vocab_size(self) -> int:
        """The number of tokens, special ones included."""
        return len(self.tokens)

    @property
    def documents(self) -> bool:
        """Whether a text begins with the end token and a space, as a document after another one does."""
        return self.space and self.begin == [self.eos_id]

    def role_id(self, role: str) -> int | None:
        """The id of the token that has a role such as "pad_token"."""
        return self.special.get(tokenfiles.role(self.settings, role))

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Ids (n,), int32. special: a special token that the text spells becomes its id.

        Raises UserError for what the vocabulary cannot write: a character that training did not see, a byte
        that a BPE lacks, half a surrogate pair.
        """
        parts = self._parts(text, special)
        ids = [self._encode(part) if i is None else np.array([i], np.int32) for part, i in parts]
        return ids[0] if len(ids) == 1 else np.concatenate(ids)

    def _parts(self, text: str, special: bool) -> list[tuple[str, int | None]]:
        """The text in parts, each with its id if it is an added token."""
        parts = [(text, None)]
        for name in self.spelled(text) if special else ():
            if flags := [flag for flag in tokenfiles.STRIP if self.added[name][flag]]:
                raise UserError(f"the special token {name} has {flags[0]}, which is not supported in a text")
        if special or len(self.added) > len(self.special):
            for pattern in self._patterns:
                parts = [new for old in parts for new in self._cut(pattern, *old, special)]
        return parts

    def _cut(self, pattern: re.Pattern, text: str, i: int | None, special: bool) -> Iterator[tuple]:
        start = 0
        for match in pattern.finditer(text) if i is None else ():
            if special or match[0] not in self.special:
                yield text[start : match.start()], None
                yield match[0], self.added[match[0]]["id"]
                start = match.end()
        yield text[start:], i

    def spelled(self, text: str) -> list[str]:
        """The special tokens that a text spells."""
        return [name for name in self.special if name in text]

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

    def explain(self, text: str) -> Iterator[Explained]:
        """Each piece of a text and its merges, in the order in which `encode` does them."""
        for part, i in self._parts(text, special=False):
            whole = () if i is None else [Explained(part, [(None, [self.tokens[i]])], [i])]
            yield from whole or self._explain(part)

    def save(self, folder: Path | str, model_max_length: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json, for `load` and for Hugging Face's AutoTokenizer.

        Files in which another tool said a part of this are removed: they would count beside these two.
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
        """What tokenizer_config.json says: all that was read there, and the chat template."""
        # Any other class replaces the rules in tokenizer.json by its own.
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= self.settings | ({"add_prefix_space": True} if self.space else {})
        if self.chat_template != self.settings.get("chat_template"):
            # The result of a template is a text, in which the end token must become its id. The template must
            # guard against messages that spell it (ours does, in `instructions`).
            new = {"chat_template": self.chat_template, "split_special_tokens": False, "eos_token": self.eos}
            config |= new
        return config


class CharTokenizer(_Tokenizer):
    """One id per character: simple and small, but it knows no character that training did not see.

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
        vocab, parts = _with_special(sorted(chars), special)
        # A WordLevel model must name a token for unknown words; as it is in no vocabulary, they are an error.
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
        return from_spec(parts | tokenfiles.CHARACTERS | {"model": model}, _settings(special))

    def _encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        ids = self._id_of[codes]
        if ids.size and ids.min() < 0:
            code = codes[ids.argmin()]
            raise UserError(f"the character {chr(code)!r} (U+{code:04X}) is not in this vocabulary: "
                            "train again on text that has it, or use BPE, which takes any text")
        return ids

    def _explain(self, text: str) -> Iterator[Explained]:
        for char, i in zip(text, self.encode(text).tolist(), strict=True):
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
        self._cache: dict[str, bytes] = {}
        # A text is encoded as after a space, so that its first word is the token that it is elsewhere.
        self.space = spec["pre_tokenizer"].get("add_prefix_space") is True

    def _bytes(self, token: str) -> bytes:
        return utf8(token) if token in self.added else bytes(map(BYTE_OF.__getitem__, token))

    @classmethod
    def train(cls, texts: str | Iterable[str], vocab_size: int,
              special: Sequence[str] = (END_OF_TEXT,), documents: bool = False) -> "BPETokenizer":
        """Learn merges until there are vocab_size tokens, or until a small text has no pair left.

        Ids are laid out as GPT-2's: bytes, merges as learned, special tokens; the first of these ends a text.
        documents: a prompt stands after the end token and, as the documents in a stream do, after a space.
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
        for a, b in learn_merges({utf8(word): count for word, count in words.items()}, vocab_size - least):
            merges.append(f"{names[a]} {names[b]}")
            names.append(names[a] + names[b])
        vocab, parts = _with_special(names, special)
        rules = tokenfiles.document_rules(special[0], vocab[special[0]]) if documents else {}
        spec = parts | tokenfiles.BYTE_LEVEL | rules | {"model": tokenfiles.bpe_model(vocab, merges)}
        return from_spec(spec, _settings(special))

    def _encode(self, text: str) -> np.ndarray:
        parts = map(self._encode_piece, pieces(_begun(text, self.space)))
        return np.frombuffer(bytearray().join(parts), np.int32)

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
            return [self._id_of[byte] for byte in utf8(piece)]
        except KeyError as error:
            raise UserError(f"this vocabulary has no token for byte 0x{error.args[0]:02X} of {short(piece)}: "
                            "use one with all 256 bytes") from None

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


def _begun(text: str, space: bool) -> str:
    return " " + text if space and text and text[0] != " " else text


def _with_special(tokens: list[str], special: Sequence[str]) -> tuple[dict[str, int], dict]:
    """Ids for tokens, then for special tokens: the vocabulary, and the first part of a tokenizer.json."""
    for name in special:
        if len(list(pieces(name))) < 2:    # as one piece it could be learned, and then text could spell it
            raise UserError(f"special token {name!r} could be a word of the text: write it as <|name|>")
    vocab = {token: i for i, token in enumerate([*tokens, *special])}
    if len(vocab) < len(tokens) + len(special):
        raise UserError(f"special tokens {short(list(special))}: one comes twice, or is a token of the text")
    added = [{"id": vocab[name], **tokenfiles.flagged(name)} for name in special]
    return vocab, tokenfiles.EMPTY | {"added_tokens": added}


def _settings(special: Sequence[str]) -> dict:
    """The tokenizer_config.json of a new tokenizer. Text that spells a special token stays text there too."""
    eos = next(iter(special), None)
    return {"split_special_tokens": True, "bos_token": eos, "eos_token": eos}


# --- files --------------------------------------------------------------------------------------------------


def load(folder: Path | str) -> CharTokenizer | BPETokenizer:
    """Read the tokenizer in a folder: one that `save` wrote, or another that gives the same ids.

    Takes tokenizer.json with byte-level BPE that splits as GPT-2, or with `save`'s characters; without it,
    GPT-2's vocab.json and merges.txt; and what `gathered` finds beside them. Raises UserError, naming the
    file, for whatever else a file holds.
    """
    path = Path(folder) / FILES[0]
    if not path.exists():
        path = path.with_name("vocab.json")
        if not (path.exists() and path.with_name("merges.txt").exists()):
            raise UserError(f"{folder}: has neither tokenizer.json nor vocab.json and merges.txt")
    return from_spec(*tokenfiles.gathered(path), str(path))


def from_spec(spec: object, settings: object, where: str = FILES[0]) -> CharTokenizer | BPETokenizer:
    """Check everything that a tokenizer.json and a tokenizer_config.json say, and build what they describe.

    where: the file, for messages. Raises UserError. Warns of tokens that no merge makes.
    """
    try:
        return (CharTokenizer if tokenfiles.check(spec, settings, where) else BPETokenizer)(spec, settings)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
