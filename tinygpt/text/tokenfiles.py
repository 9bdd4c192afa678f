"""What a folder says of its tokenizer, in tokenizer.json and the files beside it.

`gathered` collects what transformers would collect, in the form of the two files that `tokenizer` writes.
`check` refuses by name whatever these say and `tokenizer` does not do.

Not here: what the tokenizers do (`tokenizer`, `bpe`).

References: https://github.com/huggingface/transformers, version 5.24, and
https://github.com/huggingface/tokenizers
"""

import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from reprlib import repr as short

from ..errors import UserError
from ..files.jsonfile import read_object, read_text
from .bpe import BYTE_OF

END_OF_TEXT = "<|endoftext|>"
FILES = "tokenizer.json", "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"  # where transformers puts a chat template of its own
OLDER_FILES = TEMPLATE, "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"

# What tokenizer.json says beside its vocabulary.
EMPTY = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "post_processor": None}
CHARACTERS = {
    "normalizer": None,
    "pre_tokenizer": {
        "type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
    "decoder": {"type": "Fuse"},
}
_GPT2_RULE = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTE_LEVEL = {"normalizer": None, "pre_tokenizer": _GPT2_RULE, "decoder": _GPT2_RULE}
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
STRIP = "single_word", "lstrip", "rstrip"  # with which a token is more than the text that spells it


def bpe_model(vocab: dict[str, int], merges: list[str]) -> dict:
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocab, "merges": merges}


def _begun_by(name: str, i: int) -> dict:
    """The post_processor that puts a token before a text."""
    a, b = ({"Sequence": {"id": part, "type_id": 0}} for part in "AB")
    token = {"SpecialToken": {"id": name, "type_id": 0}}
    return {"type": "TemplateProcessing", "single": [token, a], "pair": [token, a, token, b],
            "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]}}}


def document_rules(eos: str, eos_id: int) -> dict:
    """What tokenizer.json says where a text begins with the end token and a space."""
    rule = _GPT2_RULE | {"add_prefix_space": True}
    return {"pre_tokenizer": rule, "post_processor": _begun_by(eos, eos_id)}


# The values with which a file means the ids that are given here; None also where there is no value.
_CHARACTER_RULES = {name: (value,) for name, value in CHARACTERS.items()}
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
# Of a tokenizer_class. The first two take only vocabulary, merges and post_processor from tokenizer.json.
_CLASSES = "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"
_USUAL_CLASS = {"gpt2": "GPT2Tokenizer", "openai-gpt": "OpenAIGPTTokenizer"}
_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def gathered(path: Path) -> tuple[dict, dict]:
    """What tokenizer.json and tokenizer_config.json would say if these two said all that a folder says.

    path: tokenizer.json or vocab.json; the other files are beside it. The rules are those of transformers
    5.24, `PreTrainedTokenizerBase._from_pretrained` and `GPT2Tokenizer`. Raises UserError.
    """
    settings, model, roles, ids = (
        read_object(file) if (file := path.with_name(name)).exists() else {}
        for name in (FILES[1], "config.json", "special_tokens_map.json", "added_tokens.json")
    )
    if (file := path.with_name(TEMPLATE)).exists():
        settings["chat_template"] = read_text(file)
    usual = _USUAL_CLASS.get(str(model.get("model_type")), _CLASSES[-1])
    rules = settings.pop("tokenizer_class", None) or model.get("tokenizer_class") or usual
    if rules not in list(_CLASSES):
        raise UserError(f"{path}: the tokenizer_class {short(rules)} has rules of its own: save the "
                        "tokenizer as a PreTrainedTokenizerFast, with transformers")
    adds = "add_bos_token", "add_eos_token", "add_prefix_space"
    begins, ends, space = (settings.pop(name, None) for name in adds)
    if path.name == FILES[0]:
        spec, begins, is_gpt2 = EMPTY | read_object(path), None, rules in _CLASSES[:2]
    elif ends:
        raise UserError(f"{path}: add_eos_token, an end token after each text, is not supported")
    else:
        lines = read_text(path.with_name("merges.txt")).split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        spec, is_gpt2 = EMPTY | BYTE_LEVEL | {"model": bpe_model(read_object(path), merges)}, True
    own = _at(spec, "pre_tokenizer.add_prefix_space")
    if is_gpt2:
        if own is not None:
            spec["pre_tokenizer"] = spec["pre_tokenizer"] | {"add_prefix_space": space or False}
    elif space not in (None, own):
        raise UserError(f"{path}: add_prefix_space is {short(own)}, in {FILES[1]} it is {short(space)}")
    try:
        spec["added_tokens"] = _all_added(spec, settings, roles, ids, is_gpt2)
        if begins:
            bos = role(settings, "bos_token")
            spec["post_processor"] = _begun_by(bos, vocabulary(spec)[0][bos])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError, AttributeError, KeyError):
        raise UserError(f"{path.parent}: the files list added or special tokens in an unknown form") from None
    return spec, settings


def _all_added(spec: dict, settings: dict, roles: dict, ids: dict, is_gpt2: bool) -> list[dict]:
    """The added tokens of all files, then the special tokens that are in no list, which get the next ids.

    roles, ids: special_tokens_map.json and added_tokens.json, which older versions of transformers wrote in
    place of added_tokens_decoder. Puts the roles into the settings.
    """
    _is_of_characters(spec)
    listed = {token["id"]: token for token in vocabulary(spec)[1].values()}
    if (decoder := settings.pop("added_tokens_decoder", None)) is None:
        settings |= roles
    extras = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    extras = list(extras.values() if isinstance(extras, dict) else extras)

    def special(names: Iterable[str]) -> list[dict]:
        values = (value for name in names if (value := settings.get(name)) is not None)
        return [flagged(value, special=True) for value in (*values, *extras)]

    if decoder is None:
        names = [token["content"] for token in special(_ROLES)]
        older = ((int(i), name, name in names) for name, i in ids.items())
        listed = {i: flagged(name, special=is_in, normalized=not is_in) for i, name, is_in in older} | listed
    else:
        listed = ({} if is_gpt2 else listed) | {int(i): flagged(token) for i, token in decoder.items()}
    if is_gpt2:  # the roles that its class has by itself
        for name in _ROLES[:3]:
            settings.setdefault(name, END_OF_TEXT)
    own = sorted(name for name in settings.keys() - set(_ROLES) if name.endswith("_token"))
    vocab, added = dict(spec["model"]["vocab"]), {}
    for i, token in [*sorted(listed.items()), *((None, token) for token in special((*_ROLES, *own)))]:
        name = token["content"]
        if i is None and name in added:
            added[name]["special"] = True
        else:
            added[name] = {"id": vocab.setdefault(name, len(vocab)), **token}
        if i not in (None, vocab[name]):
            raise UserError(f"added token {short(name)} has two ids, {i} and {vocab[name]}")
    return sorted(added.values(), key=lambda token: token["id"])


def _is_of_characters(spec: object) -> bool:
    """Whether a tokenizer.json is of characters, else of bytes. Raises UserError for other rules."""
    characters = _at(spec, "model.type") == "WordLevel"
    for name, allowed in (_CHARACTER_RULES if characters else _BYTE_LEVEL_RULES).items():
        if (value := _at(spec, name)) not in allowed:
            raise UserError(f"{name} is {short(value)}, only {short(allowed[0])} is supported (byte-level "
                            "BPE with GPT-2's splitting rule, or tinygpt's characters)")
    return characters


def check(spec: object, settings: object, where: str) -> bool:
    """Whether the tokenizer is of characters, else of bytes. Raises UserError for anything that these files
    say and that is not honoured. Warns, naming the file `where`, of tokens that no merge makes."""
    characters = _is_of_characters(spec)
    vocab, added = vocabulary(spec)
    ids = vocab.values()
    if not all(type(i) is int for i in ids) or set(ids) != set(range(len(vocab))):
        raise UserError(f"the ids of its {len(vocab)} tokens are not 0, 1, 2 ... without gap or repetition")
    special = [name for name, token in added.items() if token["special"]]
    for name in added.keys() - special:
        flags = [flag for flag in STRIP if added[name][flag]]
        if flags or re.search(r"\S[ \n]", name):  # a text may be cut before a space
            what = flags[0] if flags else "a space inside"
            raise UserError(f"added token {short(name)} has {what}, which is not supported")
    plain = vocab.keys() - added.keys()
    if characters:
        foreign = [token for token in plain if len(token) != 1]
        spelled = [name for name in special if len(name) == 1]
    else:
        merges = merge_list(spec, vocab)
        foreign = [token for token in plain if not token or not BYTE_OF.keys() >= set(token)]
        spelled = set(special) & ({a + b for a, b in merges} | BYTE_OF.keys())
    if foreign:
        kind = "one character" if characters else "in byte-level writing"
        raise UserError(f"token {short(min(foreign))} is not {kind}")
    if spelled:
        raise UserError(f"special token {short(min(spelled))} is one that text can spell")
    if not isinstance(settings, dict) or role(settings, "eos_token") not in (None, *special):
        raise UserError(f"the eos_token {short(_at(settings, 'eos_token'))} is not one of its special tokens")
    if not set(begins_with(spec)) <= set(ids):
        raise UserError("the post_processor puts ids before a text that are not in the vocabulary")
    utf8(json.dumps([spec | {"model": None}, settings], ensure_ascii=False))  # `save` writes it
    longer = {name for name in plain if len(name) > 1}
    if not characters and (lost := longer - {a + b for a, b in merges}):
        warnings.warn(f"{where}: no merge makes {len(lost):,} of {len(longer):,} tokens: the merges may have "
                      "been cut, get the files again", stacklevel=2)
    return characters


def vocabulary(spec: dict) -> tuple[dict[str, int], dict[str, dict]]:
    """The ids of all tokens, and the added ones among them with their flags."""
    vocab, tokens, added = _at(spec, "model.vocab"), _at(spec, "added_tokens") or [], {}
    if not isinstance(vocab, dict) or not isinstance(tokens, list):
        raise UserError(f"model.vocab is no object, or added_tokens no list: {short(vocab)}, {short(tokens)}")
    vocab = dict(vocab)
    for token in tokens:
        i, token = _at(token, "id"), flagged(token)
        name = token["content"]
        if type(i) is not int or vocab.setdefault(name, i) != i:
            raise UserError(f"added token {short(name)} has two ids, {short(i)} and {short(vocab.get(name))}")
        added[name] = {"id": i, **token}
    return vocab, added


def flagged(value: object, **flags: bool) -> dict:
    """A token with its flags, of a text or of an object that has some of them."""
    own = value if isinstance(value, dict) else {"content": value}
    values = {flag: own.get(flag, usual) for flag, usual in _FLAGS.items()} | flags
    name = own.get("content")
    if not isinstance(name, str) or not name or not all(isinstance(value, bool) for value in values.values()):
        raise UserError(f"{short(value)} is no token: a token is a text, with flags that are true or false")
    return {"content": name, **values}


def role(settings: dict, name: str, default: str | None = None) -> str | None:
    """The token that has a role such as "eos_token"."""
    value = settings.get(name, default)
    return None if value is None else flagged(value)["content"]


def begins_with(spec: dict) -> list[int]:
    """The ids that the post_processor puts before a text. Raises UserError for one that does more."""
    begin, rule = [], _at(spec, "post_processor")
    steps = _at(rule, "processors") if _at(rule, "type") == "Sequence" else [rule]
    try:
        for step in steps:
            if _at(step, "type") == "TemplateProcessing":
                *before, text = step["single"]
                names = [part["SpecialToken"]["id"] for part in before]
                begin += [int(i) for name in names for i in step["special_tokens"][name]["ids"]]
                right = "Sequence" in text
            else:
                right = step is None or _at(step, "type") == "ByteLevel"
            if not right:
                raise ValueError
    except (TypeError, ValueError, KeyError):
        raise UserError(f"the post_processor {short(rule)} does more than put tokens before a "
                        "text, which is all that is supported") from None
    return begin


def merge_list(spec: dict, vocab: dict[str, int]) -> list[tuple[str, str]]:
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


def utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"U+{ord(text[error.start]):04X} is half of a surrogate pair, no character: "
                        "read the text with the encoding that it was written in") from None
