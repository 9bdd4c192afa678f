"""The files of a folder that describe its tokenizer: tokenizer.json and those beside it.

`gathered` collects everything that transformers would collect, in the form of the two files that `tokenizer`
writes. `check` refuses by name each setting that `tokenizer` does not support.

Not here: the tokenizers (`tokenizer`) and their algorithm (`bpe`).

References: https://github.com/huggingface/transformers, version 5.24, and
https://github.com/huggingface/tokenizers
"""

import json
import re
import warnings
from pathlib import Path
from reprlib import repr as short

from ..errors import UserError
from ..files.jsonfile import read_object, read_text
from .bpe import BYTE_OF

END_OF_TEXT = "<|endoftext|>"
FILES = "tokenizer.json", "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"  # where transformers puts a chat template
OLDER_FILES = TEMPLATE, "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"

# The contents of tokenizer.json beside its vocabulary.
EMPTY = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "post_processor": None}
CHARACTERS = {
    "normalizer": None,
    "pre_tokenizer": {
        "type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
    "decoder": {"type": "Fuse"},
}
_GPT2_RULE = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTE_LEVEL = {"normalizer": None, "pre_tokenizer": _GPT2_RULE, "decoder": _GPT2_RULE}
SPACED = {"pre_tokenizer": _GPT2_RULE | {"add_prefix_space": True}}
BPE_MODEL = {  # and vocab, merges
    "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
    "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
}
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
STRIP = "single_word", "lstrip", "rstrip"  # flags with which more than the token's own text matters

# The supported values. None is also a value that is missing.
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
# Supported classes. The first two take only vocabulary, merges and post_processor from tokenizer.json.
_CLASSES = "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"
_USUAL_CLASS = {"gpt2": "GPT2Tokenizer", "openai-gpt": "OpenAIGPTTokenizer"}
_ADDED = "bos_token", "eos_token", "prefix_space"  # add_...: what a class adds to each text
_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def begun_by(name: str, i: int) -> dict:
    """The part of tokenizer.json that puts the token of this name and id before a text."""
    a, b = ({"Sequence": {"id": part, "type_id": 0}} for part in "AB")
    token = {"SpecialToken": {"id": name, "type_id": 0}}
    return {"post_processor": {
        "type": "TemplateProcessing", "single": [token, a], "pair": [token, a, token, b],
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]}}}}


def gathered(path: Path) -> tuple[dict, dict]:
    """The contents of tokenizer.json and tokenizer_config.json, if these two said all that a folder says.

    path: tokenizer.json or vocab.json; the other files are beside it. The rules are those of transformers
    5.24, `PreTrainedTokenizerBase._from_pretrained` and `GPT2Tokenizer`. Raises UserError.
    """
    settings, model, roles, ids = (
        read_object(file) if (file := path.with_name(name)).exists() else {}
        for name in (FILES[1], "config.json", "special_tokens_map.json", "added_tokens.json")
    )
    if (file := path.with_name(TEMPLATE)).exists():
        settings["chat_template"] = read_text(file)
    if is_whole := path.name == FILES[0]:
        spec = EMPTY | read_object(path)
    else:
        lines = read_text(path.with_name("merges.txt")).split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        spec = EMPTY | BYTE_LEVEL | {"model": BPE_MODEL | {"vocab": read_object(path), "merges": merges}}
    usual = _USUAL_CLASS.get(str(model.get("model_type")), _CLASSES[-1])
    rules = settings.pop("tokenizer_class", None) or model.get("tokenizer_class") or usual
    begins, ends, space = (settings.pop(f"add_{name}", None) for name in _ADDED)
    is_gpt2, inside = not is_whole or rules in _CLASSES[:2], _at(spec, "pre_tokenizer.add_prefix_space")
    try:
        if rules not in list(_CLASSES):
            raise UserError(f"the tokenizer_class {short(rules)} has rules of its own: save the tokenizer as "
                            "a PreTrainedTokenizerFast, with transformers")
        if ends and not is_whole:
            raise UserError("add_eos_token, an end token after each text, is not supported")
        if is_gpt2 and inside is not None:
            spec["pre_tokenizer"] = spec["pre_tokenizer"] | {"add_prefix_space": space or False}
        elif not is_gpt2 and space not in (None, inside):
            raise UserError(f"add_prefix_space is {short(inside)}, in {FILES[1]} {short(space)}: change one")
        _is_of_characters(spec)
        spec["added_tokens"] = _all_added(spec, settings, roles, ids, is_gpt2)
        if begins is True and not is_whole:
            if (bos := role(settings, "bos_token")) is None:
                raise UserError("add_bos_token is true, and no bos_token is named")
            spec |= begun_by(bos, vocabulary(spec)[0][bos])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError, AttributeError, KeyError):
        problem = "added or special tokens have an unknown form: save the tokenizer again, with transformers"
        raise UserError(f"{path.parent}: {problem}") from None
    return spec, settings


def _all_added(spec: dict, settings: dict, roles: dict, ids: dict, is_gpt2: bool) -> list[dict]:
    """The added tokens that the files list, then the special tokens that no file lists.

    A token that the vocabulary lacks gets the next id. roles, ids: the contents of special_tokens_map.json
    and added_tokens.json. Both count only without added_tokens_decoder. Puts the roles into `settings`.
    """
    listed = {token["id"]: token for token in vocabulary(spec)[1].values()}
    if (decoder := settings.pop("added_tokens_decoder", None)) is None:
        settings |= roles
    extras = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    extras = [] + (list(extras.values()) if isinstance(extras, dict) else extras)  # TypeError if no list

    def special(names: tuple[str, ...]) -> list[dict]:
        values = [settings[name] for name in names if settings.get(name) is not None]
        return [flagged(value, special=True) for value in values + extras]

    if decoder is None:
        names = [token["content"] for token in special(_ROLES)]
        older = ((int(i), name, name in names) for name, i in ids.items())
        listed = {i: flagged(name, special=is_in, normalized=not is_in) for i, name, is_in in older} | listed
    else:
        listed = ({} if is_gpt2 else listed) | {int(i): flagged(token) for i, token in decoder.items()}
    if is_gpt2:  # the roles that its class has without any file
        for name in _ROLES[:3]:
            settings.setdefault(name, END_OF_TEXT)
    others = sorted(name for name in settings.keys() - set(_ROLES) if name.endswith("_token"))
    vocab, added = dict(spec["model"]["vocab"]), {}
    for i, token in [*sorted(listed.items()), *((None, token) for token in special((*_ROLES, *others)))]:
        name = token["content"]
        if i is None and name in added:
            added[name]["special"] = True
        else:
            added[name] = {"id": vocab.setdefault(name, len(vocab)), **token}
        if i not in (None, vocab[name]):
            raise UserError(f"added token {short(name)} has the id {short(i)}, and should have {vocab[name]}")
    return sorted(added.values(), key=lambda token: token["id"])


def _is_of_characters(spec: object) -> bool:
    """Whether a tokenizer.json is of characters; if not, it is of bytes. Raises UserError for other rules."""
    characters = _at(spec, "model.type") == "WordLevel"
    for name, allowed in (_CHARACTER_RULES if characters else _BYTE_LEVEL_RULES).items():
        if (value := _at(spec, name)) not in allowed:
            raise UserError(f"{name} is {short(value)}, only {short(allowed[0])} is supported: the tokenizer "
                            "must be byte-level BPE with GPT-2's splitting rule, or tinygpt's characters")
    return characters


def check(spec: object, settings: object, where: str) -> bool:
    """Whether the tokenizer is of characters; if not, it is of bytes.

    Raises UserError for each setting of the two files that is not supported. Warns, naming the file `where`,
    of tokens that no merge makes.
    """
    characters = _is_of_characters(spec)
    vocab, added = vocabulary(spec)
    ids = vocab.values()
    if not all(type(i) is int for i in ids) or set(ids) != set(range(len(vocab))):
        raise UserError(f"the ids of its {len(vocab)} tokens are not 0, 1, 2 ... without gap or repetition")
    special = [name for name, token in added.items() if token["special"]]
    for name in added.keys() - special:
        flags = [flag for flag in STRIP if added[name][flag]]
        if flags or re.search(r"\S[ \n]", name):  # a text may be cut before a space
            problem = flags[0] if flags else "a space inside"
            raise UserError(f"added token {short(name)} has {problem}, which is not supported")
    plain = vocab.keys() - added.keys()
    if characters:
        foreign = [token for token in plain if len(token) != 1]
        spelled = [name for name in special if len(name) == 1]
    else:
        made = {a + b for a, b in merge_list(spec, vocab)}
        foreign = [token for token in plain if not token or not BYTE_OF.keys() >= set(token)]
        spelled = set(special) & (made | BYTE_OF.keys())
    if foreign:
        kind = "one character" if characters else "in byte-level writing"
        raise UserError(f"token {short(min(foreign))} is not {kind}")
    if spelled:
        raise UserError(f"special token {short(min(spelled))} is one that text can spell: rename it")
    if not isinstance(settings, dict) or role(settings, "eos_token") not in (None, *special):
        raise UserError(f"the eos_token {short(_at(settings, 'eos_token'))} is not one of its special tokens")
    if not set(begins_with(spec)) <= set(ids):
        raise UserError("the post_processor puts ids before a text that are not in the vocabulary")
    utf8(json.dumps([spec | {"model": None}, settings], ensure_ascii=False))  # `save` writes them
    longer = {name for name in plain if len(name) > 1}
    if not characters and (lost := longer - made):
        warnings.warn(f"{where}: no merge makes {len(lost):,} of {len(longer):,} tokens: the merges may have "
                      "been cut, get the files again", stacklevel=2)
    return characters


def vocabulary(spec: dict) -> tuple[dict[str, int], dict[str, dict]]:
    """The ids of all tokens, and the added tokens with their flags."""
    vocab, tokens = _at(spec, "model.vocab"), _at(spec, "added_tokens") or []
    for name, value, kind in (("model.vocab", vocab, dict), ("added_tokens", tokens, list)):
        if not isinstance(value, kind):
            raise UserError(f"{name} is {short(value)}: the file is damaged, get it again")
    vocab, added, names = dict(vocab), {}, {}
    for token in tokens:
        i, token = _at(token, "id"), flagged(token)
        name = token["content"]
        if type(i) is not int or vocab.setdefault(name, i) != i or names.setdefault(i, name) != name:
            raise UserError(f"added token {short(name)} has the id {short(i)}: it needs one id of its own")
        added[name] = {"id": i, **token}
    return vocab, added


def flagged(value: object, **flags: bool) -> dict:
    """A token with all its flags. value: its text, or an object with its content and some of the flags."""
    token = value if isinstance(value, dict) else {"content": value}
    values = {flag: token.get(flag, usual) for flag, usual in _FLAGS.items()} | flags
    name = token.get("content")
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
                if text["Sequence"]["id"] != "A":
                    raise ValueError
            elif step is not None and _at(step, "type") != "ByteLevel":
                raise ValueError
    except (TypeError, ValueError, KeyError):
        raise UserError(f"the post_processor {short(rule)} may only put tokens before a text") from None
    return begin


def merge_list(spec: dict, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges, which a file has as ["a", "b"] or as "a b"."""
    merges, pairs = _at(spec, "model.merges"), []
    if not isinstance(merges, list):
        raise UserError(f"model.merges is {short(merges)}: the file is damaged, get it again")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        is_pair = isinstance(pair, list) and len(pair) == 2 and all(isinstance(token, str) for token in pair)
        if not is_pair or not {*pair, "".join(pair)} <= vocab.keys():
            raise UserError(f"merge {short(merge)} is no pair of tokens of model.vocab: get the files again")
        pairs.append(tuple(pair))
    return pairs


def _at(spec: object, name: str) -> object:
    """The value of a name with dots, or None: _at({"a": {"b": 1}}, "a.b") is 1."""
    for key in name.split("."):
        spec = spec.get(key) if isinstance(spec, dict) else None
    return spec


def utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"U+{ord(text[error.start]):04X} is half of a surrogate pair, no character: "
                        "read the text with the encoding that it was written in") from None
