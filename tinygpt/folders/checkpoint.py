"""Models on disk: the Hugging Face folder of a GPT-2, and the file that a resume needs.

A folder has config.json, model.safetensors and the tokenizer's files, as `transformers` writes and reads
them. A post-norm model has GPT-1's architecture, so its model_type is "openai-gpt". `load` reads the forms of
the Hugging Face hub: names with or without "transformer.", a tied head that is repeated or alone, several
files, half precision. It ignores buffers of attention masks. A setting that changes the computation and is
not supported is refused by name.

trainer.safetensors is the state of a run: weights, both moments, step, settings and tokenizer. It is one file
because a kill between two files would leave weights and moments of different steps. From this file the other
files can be written again.

Files are data, never code: no pickle. A config that does not fit the tensors is refused before memory is
allocated. Tensors are read into the model's own buffer, so loading needs no memory beside the weights.

Not here: pytorch_model.bin, adapters (`adapters`), the format of a file of tensors (`tensorfile`).
"""

import dataclasses
import json
import math
import os
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from reprlib import repr as short
from typing import TypeVar, get_args, get_type_hints

from ..core.config import GPTConfig
from ..core.model import GPT
from ..core.optim import AdamW
from ..errors import UserError
from ..files import tensorfile
from ..files.atomic import finish, remove, replacing, together
from ..files.jsonfile import parse, read_object
from ..files.tensorfile import Tensor
from ..stages.stage import Settings, names_data
from ..stages.variants import build
from ..text import tokenizer as tokenizers
from ..text.tokenizer import Tokenizer

T = TypeVar("T")

CONFIG, WEIGHTS, TRAINER = "config.json", "model.safetensors", "trainer.safetensors"
FILES = (CONFIG, WEIGHTS, TRAINER, *tokenizers.FILES)
GENERATION = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
INDEX = "model.safetensors.index.json"  # the file of each tensor, if there are several files

# --- config.json --------------------------------------------------------------------------------------------

# The names of GPTConfig's fields in config.json. dropout is written under two names and read from one.
_FIELDS = {
    "vocab_size": "vocab_size", "block_size": "n_positions", "n_layer": "n_layer", "n_head": "n_head",
    "n_embd": "n_embd", "dropout": "resid_pdrop", "layer_norm_epsilon": "layer_norm_epsilon",
}  # fmt: skip
# Their other names in transformers' attribute_map.
_ALIASES = {"max_position_embeddings": "n_positions", "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head", "hidden_size": "n_embd"}  # fmt: skip
# Other settings, with the values that are supported. The first value is also the default.
_COMMON = {"tie_word_embeddings": (True,), "quantization_config": (None,), "pruned_heads": (None, {})}
_GELU = "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python_tanh"  # one function
_SUPPORTED = {
    "gpt2": {"activation_function": _GELU, "scale_attn_weights": (True,),
             "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,), **_COMMON},
    "openai-gpt": {"afn": ("gelu",), **_COMMON},  # the name of gelu_new in that class
}  # fmt: skip
_GPT1_NAMES = {"wte.weight": "tokens_embed.weight", "wpe.weight": "positions_embed.weight"}
_ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "openai-gpt": "OpenAIGPTLMHeadModel"}
_JUDGE = "GPT2ForSequenceClassification"  # a model with a score head


def _config_json(config: GPTConfig, tokenizer: Tokenizer) -> dict:
    kind = "openai-gpt" if config.post_norm else "gpt2"
    values = {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
    first = {name: allowed[0] for name, allowed in _SUPPORTED[kind].items() if allowed[0] is not None}
    pad, stops = tokenizer.role_id("pad_token"), sorted(tokenizer.stops | {tokenizer.eos_id} - {None})
    judge = {} if pad is None else {"pad_token_id": pad}
    if config.num_labels:  # transformers reads the score at the last token that is no padding: here eos
        judge = {"architectures": [_JUDGE], "pad_token_id": 0 if tokenizer.eos_id else 1}
        judge |= {"id2label": {str(n): f"score {n}" for n in range(config.num_labels)}}
    return {
        "model_type": kind, "architectures": [_ARCHITECTURES[kind]], **values,
        "n_ctx": config.block_size,  # as n_positions: llama.cpp's converter to GGUF reads this name
        **judge, "embd_pdrop": config.dropout, "attn_pdrop": 0.0, **first,
        "bos_token_id": tokenizer.role_id("bos_token"),  # null: without it transformers takes GPT-2's 50256
        "eos_token_id": stops if len(stops) > 1 else next(iter(stops), None),
    }  # fmt: skip


def read_config(folder: Path) -> GPTConfig:
    """The sizes in the config.json of a folder. Raises UserError for another kind of model."""
    path = folder / CONFIG
    if not folder.is_dir():
        name = folder.name
        get = f": hf download openai-community/{name} --local-dir {folder}" * name.startswith("gpt2")
        raise UserError(f"{folder}: no such folder{get}")
    finish(folder)
    if not path.is_file() and (folder / ADAPTER_CONFIG).is_file():
        base = str(read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path"))[:500]
        give = f"give the folder of its base, {base}, and --adapter-folder {folder}"
        raise UserError(f"{folder}: has an adapter: {give}")
    if not path.is_file():
        paths = sorted(folder.glob(f"*/{CONFIG}")) or sorted(folder.glob(f"*/*/{CONFIG}"))
        inside = f"; there are models in {', '.join(str(p.parent) for p in paths[:9])}" * bool(paths)
        raise UserError(f"{folder}: has no {CONFIG}: it is not a model's folder{inside}")
    raw = read_object(path)
    kind = raw.get("model_type")
    if kind not in list(_SUPPORTED):  # a list, as a forged kind may have no hash
        raise UserError(f"{path}: model_type is {short(kind)}; supported are {' and '.join(_SUPPORTED)}")
    for name, allowed in _SUPPORTED[kind].items():
        if name in raw and raw[name] not in allowed:
            raise UserError(f"{path}: {name} is {short(raw[name])}; only {allowed[0]} is supported")
    for alias, name in _ALIASES.items():
        if alias in raw and raw.setdefault(name, raw[alias]) != raw[alias]:
            raise UserError(f"{path}: {name} is {short(raw[name])} and {alias} is {short(raw[alias])}")
    values = {ours: raw[theirs] for ours, theirs in _FIELDS.items() if theirs in raw}
    if raw.get("architectures") == [_JUDGE]:
        labels = raw.get("id2label", {0: 0, 1: 1})  # the default of transformers: two labels
        values["num_labels"] = len(labels) if isinstance(labels, dict) else 0
        if kind != "gpt2" or values["num_labels"] != 1:
            raise UserError(f"{path}: {values['num_labels']} labels; only one, of a GPT-2, is supported")
    config = from_json(GPTConfig, values | {"post_norm": kind == "openai-gpt"}, str(path))
    if raw.get("n_inner") not in (None, 4 * config.n_embd):
        raise UserError(f"{path}: n_inner is {short(raw['n_inner'])}; only 4 n_embd is supported")
    return config


def from_json(cls: type[T], values: object, where: str) -> T:
    """Makes a dataclass from a JSON object. A field may be a dataclass too.

    where: the file, or the place in the file, that an error message names. Raises UserError for an unknown
    field, a missing value, and a value of another type; an int may stand for a float. An error of the
    dataclass itself gets `where` before its text.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: should be a JSON object, is {short(values)}")
    hints, fields = get_type_hints(cls), {}
    for name, value in values.items():
        hint = hints.get(name)
        if type(None) in get_args(hint):
            hint = type(None) if value is None else get_args(hint)[0]
        if dataclasses.is_dataclass(hint):
            fields[name] = from_json(hint, value, f"{where}: {name}")
        elif hint == tuple[str, ...] and isinstance(value, list) and all(map(_is_text, value)):
            fields[name] = tuple(value)
        elif type(value) is hint and (hint is not str or _is_text(value)):
            fields[name] = value
        elif hint is float and type(value) is int and abs(value) < 1 << 53:
            fields[name] = float(value)
        else:
            raise UserError(f"{where}: {short(name)} is {short(value)}, which it cannot be")
    try:
        return cls(**fields)
    except TypeError:  # a field without default is missing
        raise UserError(f"{where}: is incomplete") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _is_text(value: object) -> bool:
    """Whether a value is a text that can be a path: without NUL and without half a surrogate pair."""
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


# --- the folder ---------------------------------------------------------------------------------------------


def save(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Writes a model's folder, which `transformers` loads with from_pretrained.

    After a full disk or a kill the folder has the old model or the new model, complete.
    """
    config = _config_json(model.config, tokenizer)
    tensors = {_their_name(name, model.config): p for name, p in model.params.items()}
    tensors = {name if name == "score.weight" else f"transformer.{name}": p for name, p in tensors.items()}
    with together(folder):
        with replacing(folder / WEIGHTS) as beside:
            tensorfile.write(beside, tensors, {"format": "pt"})
        tokenizer.save(folder, model_max_length=model.config.block_size)
        with replacing(folder / CONFIG) as beside:
            beside.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in (GENERATION, INDEX):  # of an older model; config.json has the ids that end a text
            remove(folder / name)


def load(folder: Path | str, judge: bool = False) -> tuple[GPT, Tokenizer]:
    """The model, float32, and the tokenizer of a folder: tinygpt's, or a GPT-2 from the Hugging Face hub.

    judge: whether the model must be a reward model. Raises UserError for any other model.
    """
    folder = Path(folder)
    config = read_config(folder)
    if bool(config.num_labels) != judge:
        kinds = "a model that writes", "a reward model, which judges answers"
        raise UserError(f"{folder}: has {kinds[not judge]}; here {kinds[judge]} is needed")
    tensors = _tensors_of(folder)
    table = _their_name("wte.weight", config)
    head = tensors.pop("lm_head.weight", None)
    if head is not None:
        tensors.setdefault(table, head)  # torch's save_model keeps one tensor of a tied pair
    shapes = {_their_name(name, config): shape for name, shape in config.shapes().items()}
    tensorfile.check_shapes(tensors, shapes, folder, CONFIG)
    tokenizer = tokenizers.load(folder)
    check_vocabulary(tokenizer, config, folder)
    tokenizer.stops = _stops(folder, tokenizer)
    model = build(config)
    for name, p in model.params.items():
        tensors[_their_name(name, config)].read(p)
    if head is not None and not head.equals(model.params["wte.weight"]):
        raise UserError(f"{folder}: lm_head.weight is not the token table: only a tied head is supported")
    return model, tokenizer


# Settings of generation_config.json that are options of `tinygpt generate`, or do not change a choice.
_SAMPLING = {"do_sample", "temperature", "top_k", "top_p", "max_length", "max_new_tokens", "use_cache",
             "transformers_version", "_from_model_config"}  # fmt: skip


def _stops(folder: Path, tokenizer: Tokenizer) -> set[int]:
    """The ids that end a text: of generation_config.json, of config.json, or else the tokenizer's end token.

    Warns of settings in generation_config.json that tinygpt does not support.
    """
    path = folder / GENERATION
    raw = read_object(path) if path.is_file() else {}
    names = (name for name, value in raw.items() if value not in (None, False, 0, 1, []))
    if others := [name for name in names if name not in _SAMPLING and not name.endswith("_token_id")]:
        warnings.warn(f"{path}: {', '.join(others)[:99]} is not supported, and has no effect", stacklevel=3)
    for values in (raw, read_object(folder / CONFIG)):
        if ids := _ids(values.get("eos_token_id"), tokenizer):
            return ids
    return tokenizer.stops


def _ids(value: object, tokenizer: Tokenizer) -> set[int]:
    """The ids of the vocabulary in a JSON value, a number or a list."""
    values = value if isinstance(value, list) else [value]
    return {i for i in values if type(i) is int and 0 <= i < tokenizer.vocab_size}


def check_vocabulary(tokenizer: Tokenizer, config: GPTConfig, path: Path) -> None:
    """Raises UserError if the tokenizer has more tokens than the model has rows.

    A model may have more rows: those of GPT-2 are often padded to 50304.
    """
    if tokenizer.vocab_size > config.vocab_size:
        sizes = f"the tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size}"
        rows = [name for name, token in tokenizer.added.items() if token["id"] >= config.vocab_size]
        names = f" (there is no row for {short(', '.join(rows))})" * bool(rows)
        raise UserError(f"{path}: {sizes}{names}: they do not belong together")


def _their_name(name: str, config: GPTConfig) -> str:
    return _GPT1_NAMES.get(name, name) if config.post_norm else name


def _tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by names without "transformer.". Buffers of causal masks are left out."""
    files = [folder / WEIGHTS]
    if not files[0].exists():
        check_pickle(folder, WEIGHTS, "pytorch_model.bin")
        if not (folder / INDEX).exists():
            raise UserError(f"{folder}: has no {WEIGHTS}")
        names = read_object(folder / INDEX).get("weight_map")
        names = names.values() if isinstance(names, dict) else (None,)
        if not all(isinstance(name, str) and Path(name).name == name for name in names):  # no other folder
            raise UserError(f"{folder / INDEX}: has no weight_map from tensors to files in this folder")
        files = [folder / name for name in sorted(set(names))]
    tensors = {name: tensor for file in files for name, tensor in tensorfile.tensors(file)[0].items()}
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    if len(bare) < len(tensors):
        raise UserError(f"{folder}: has a tensor with and without the prefix 'transformer.': get it again")
    return {name: t for name, t in bare.items() if not re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name)}


def check_pickle(folder: Path, weights: str, pickle: str) -> None:
    """Raises UserError if a folder has its weights only as a pickle."""
    if (folder / pickle).exists() and not (folder / weights).exists():
        raise UserError(f"{folder}: has {pickle}, which can run code when it is opened, and no {weights}: "
                        "load it in PyTorch, and convert it with save_pretrained")  # fmt: skip



# --- trainer.safetensors ------------------------------------------------------------------------------------


def save_trainer(folder: Path, optimizer: AdamW, tokenizer: Tokenizer, settings: Settings) -> None:
    """Writes one file: everything that changes in training, the tokenizer, and `settings`, a dataclass.

    For a model with an adapter these are the weights of the adapter; if `settings.has_base`, the model's own
    weights too. Each path of the settings is also written relative to this folder, so that a project can be
    moved.

    The file has no random numbers: a step draws its numbers from the seed and the number of the step.
    """
    relative = {}
    with_paths(settings, lambda path: relative.setdefault(path, _relative(path, folder)))
    state = {"step": optimizer.steps, "settings": dataclasses.asdict(settings), "relative": relative}
    state |= {"tokenizer": tokenizer.spec, "tokenizer_config": tokenizer.config()}
    state["stops"] = sorted(tokenizer.stops)
    tensors = {"weights": optimizer.trained.flat}
    for name, moment in (("m", optimizer.m), ("v", optimizer.v)):
        tensors[name] = optimizer.flat.shape, partial(optimizer.whole, moment)
    tensors |= {"base": optimizer.model.flat} if settings.has_base else {}
    with replacing(folder / TRAINER) as beside:
        tensorfile.write(beside, tensors, {"tinygpt": json.dumps(state)})


def _relative(path: str, folder: Path) -> str:
    try:
        return os.path.relpath(os.path.realpath(path), folder.resolve())
    except ValueError:  # on another drive of Windows
        return path


def with_paths(settings: T, change: Callable[[str], str]) -> T:
    """The settings with `change` applied to each path, of data and of models. "world:1337" is no path."""

    def new(path: object) -> str:
        return p if not (p := str(path)) or p.startswith("world:") else change(p)

    fields = {}
    for name, value in vars(settings).items():
        if names_data(name):
            fields[name] = tuple(map(new, value))
        elif name in ("init_from", "reward_from", "adapter_folder"):
            fields[name] = new(value)
    return dataclasses.replace(settings, **fields)


def read_run(folder: Path, cls: type[T]) -> tuple[T, Tokenizer]:
    """The settings, of type `cls`, and the tokenizer of a run. `cls` is a subclass of `Settings`.

    Raises UserError if there is no run of this stage, and if the tensors or the tokenizer do not fit the
    model in the settings.
    """
    path = folder / TRAINER
    if not path.is_file():
        what = f"has no {TRAINER}, so there is nothing to resume" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {what}")
    tensors, state = _read_trainer(path)
    raw, relative = state["settings"], state.get("relative", {})
    if (stage := raw.get("stage", cls.stage)) != cls.stage:
        raise UserError(f"{folder}: this run is one of tinygpt {short(stage)}: resume it with that command")
    if isinstance(raw.get("adapter"), dict) and raw["adapter"].get("kind") == "":  # older: no adapter
        raw["adapter"] = None

    def present(path: str) -> str:
        """The path from this folder, if something is there."""
        beside = relative.get(path)
        beside = os.path.normpath(folder.resolve() / beside) if _is_text(beside) else path
        return beside if os.path.exists(beside) else path

    settings = with_paths(from_json(cls, state["settings"], str(path)), present)
    sizes = {"weights": settings.size} | ({"base": settings.model.size} if settings.has_base else {})
    for name, size in sizes.items():
        if (n := math.prod(tensors[name].shape) if name in tensors else 0) != size:
            raise UserError(f"{path}: {name}: its {n} numbers are not those of the model in its settings")
    older = dict.fromkeys(("bos_token", "eos_token"), state.get("eos")) | {"split_special_tokens": True}
    tokenizer = tokenizers.from_spec(state["tokenizer"], state.get("tokenizer_config", older), str(path))
    if isinstance(template := state.get("chat_template"), str):  # an older version
        tokenizer.chat_template = template
    tokenizer.stops |= _ids(state.get("stops"), tokenizer)
    check_vocabulary(tokenizer, settings.model, path)
    return settings, tokenizer


def load_trainer(folder: Path, optimizer: AdamW) -> None:
    """Puts a run's weights, moments and step into an optimizer and its model. Raises UserError."""
    tensors, state = _read_trainer(folder / TRAINER)
    for name in ("m", "v"):
        if tensors[name].shape == optimizer.flat.shape:  # another shape is refused below
            tensors[name] = tensors[name].part(optimizer.slice)
    outs = {"weights": optimizer.trained.flat, "m": optimizer.m, "v": optimizer.v}
    for name, out in (outs | ({"base": optimizer.model.flat} if "base" in tensors else {})).items():
        if tensors[name].shape != out.shape:
            raise UserError(f"{folder / TRAINER}: {name} has shape {tensors[name].shape}, not {out.shape}")
        tensors[name].read(out)
    optimizer.steps = state["step"]


def _read_trainer(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the state that `save_trainer` wrote. Settings and tokenizer are not checked."""
    tensors, metadata = tensorfile.tensors(path)
    try:
        state = parse(metadata["tinygpt"])
        step, settings, _ = (state[name] for name in ("step", "settings", "tokenizer"))
        dicts = isinstance(settings, dict) and isinstance(state.get("relative", {}), dict)
    except (ValueError, KeyError, TypeError):
        step = None
    if type(step) is not int or step < 0 or not dicts or tensors.keys() - {"base"} != {"weights", "m", "v"}:
        raise UserError(f"{path}: is not a run that tinygpt saved")
    return tensors, state
