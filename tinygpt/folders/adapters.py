"""An adapter's folder, which is PEFT's: adapter_config.json and adapter_model.safetensors.

Three things are added. The metadata of the tensors have the SHA-256 of the base's weights, so that a wrong
base is refused. encoder.safetensors has the MLP that a prompt was learned through; the result of the MLP, the
prompt, is all that PEFT keeps and reads. The tokenizer lies beside them, as tuning may have given it a form
for instructions.

A LoRA's tensors say which maps have a branch. The config says so too, in PEFT's words, and must agree.

Not here: what adapters compute (`stages.lora`, `stages.prompts`). DoRA, ranks that differ, biases and other
tensors trained beside the low-rank pairs, and prompts made by an LSTM are refused by name.

Reference: https://huggingface.co/docs/peft
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from reprlib import repr as short

import numpy as np

from ..core.config import PROJECTIONS, GPTConfig
from ..core.model import GPT, Array
from ..errors import UserError
from ..files import tensorfile
from ..files.atomic import finish, remove, replacing, together
from ..files.jsonfile import read_object
from ..files.tensorfile import Tensor
from ..stages.adapter import Adapted, AdapterConfig, fingerprint
from ..stages.variants import beside
from ..text import tokenizer as tokenizers
from . import checkpoint
from .checkpoint import ADAPTER_CONFIG, Tokenizer

WEIGHTS, ENCODER = "adapter_model.safetensors", "encoder.safetensors"
FILES = (ADAPTER_CONFIG, WEIGHTS, ENCODER)
TYPES = {"lora": "LORA", "ptuning": "P_TUNING", "prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}

# --- the folder ---------------------------------------------------------------------------------------------


def check_base(model: GPT, expected: str, folder: Path, base: str | Path) -> None:
    """Raises UserError unless these are the weights that the adapter in `folder` was trained beside."""
    if fingerprint(model) != expected:
        raise UserError(f"{folder}: was not trained beside the model in {base}: give its own base")


def save(folder: Path, model: GPT, tokenizer: Tokenizer, base: str, base_hash: str = "") -> None:
    """Writes `model.adapter` in PEFT's form. base: the folder of the model; base_hash: its `fingerprint`."""
    adapter, config = model.adapter, model.adapter.config
    if config.full:
        raise UserError("an adapter with copies of whole tensors is saved merged, as a model")
    if config.kind == "lora":
        params = {n: _torch(n, p) for n, p in adapter.params.items()}
        tensors = {f"base_model.model.transformer.{name}.weight": p for name, p in params.items()}
    else:
        tensors = {"prompt_embeddings": model.prompt()[0]}
    with together(folder):
        with replacing(folder / WEIGHTS) as path:
            metadata = {"format": "pt", "base_sha256": base_hash or fingerprint(model)}
            tensorfile.write(path, tensors, metadata)
        if adapter.layers:
            with replacing(folder / ENCODER) as path:
                encoder = {name: _torch(name, p) for name, p in adapter.params.items()}
                tensorfile.write(path, encoder, {"format": "pt"})
        else:
            remove(folder / ENCODER)
        tokenizer.save(folder, model_max_length=model.context)
        with replacing(folder / ADAPTER_CONFIG) as path:
            text = json.dumps(_config_json(config, model, base), indent=2) + "\n"
            path.write_text(text, encoding="utf-8")


def _torch(name: str, p: Array) -> Array:
    """As PyTorch has it, or back: weights of linear layers (out, in), A and embeddings as they are."""
    return p if _lies_alike(name) else p.T


def _lies_alike(name: str) -> bool:
    return name.endswith(("lora_A", "embedding.weight"))


def _config_json(config: AdapterConfig, model: GPT, base: str) -> dict:
    raw = {"peft_type": TYPES[config.kind], "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    raw["inference_mode"] = True
    if config.kind == "lora":
        alpha = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
        raw |= {"r": config.rank, "lora_alpha": alpha, "lora_dropout": config.dropout, "bias": "none"}
        return raw | {"target_modules": list(config.targets), "fan_in_fan_out": True}
    raw |= {"num_virtual_tokens": config.num_virtual_tokens, "token_dim": model.config.n_embd}
    raw |= {"num_layers": model.config.n_layer, "num_attention_heads": model.config.n_head}
    raw["num_transformer_submodules"] = 1
    if config.kind == "prefix":
        raw["prefix_projection"] = bool(config.hidden)
    if config.kind == "prompt":
        return raw | {"prompt_tuning_init": "RANDOM"}
    return raw | {"encoder_hidden_size": config.hidden or model.config.n_embd}


# What a config may say: values that change nothing here; any value; of a LoRA nothing else but _OFF.
_SUPPORTED = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change the base
    "encoder_reparameterization_type": ("MLP",),
    "modules_to_save": (None, []),
}
_FREE = {
    "peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping",
    "inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "megatron_config", "megatron_core", "qalora_group_size",
    "corda_config", "eva_config", "loftq_config", "lora_ga_config",  # of init_lora_weights
}  # fmt: skip
_OFF = (None, False, [], {})


def load(folder: Path | str, model: GPT, base: str | Path = "this model") -> Adapted:
    """A model (in `base`, for messages) with the adapter in a folder, tinygpt's or PEFT's, as a view.

    Raises UserError where it is not for this model: by the hash of the base where the folder has it, else by
    names and shapes. A tensor that belongs nowhere, or one that is missing, is an error too.
    """
    folder = Path(folder)
    finish(folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{folder}: has no {ADAPTER_CONFIG}: it is not an adapter's folder")
    raw = read_object(folder / ADAPTER_CONFIG)
    kind = {theirs: ours for ours, theirs in TYPES.items()}.get(str(raw.get("peft_type")))
    where = folder / ADAPTER_CONFIG
    if kind is None:
        supported = ", ".join(TYPES.values())
        raise UserError(f"{where}: peft_type is {short(raw.get('peft_type'))}; supported are {supported}")
    for name, value in raw.items():
        allowed = _SUPPORTED.get(name, _OFF if kind == "lora" and name not in _FREE else (value,))
        if value not in allowed:
            raise UserError(f"{where}: {name[:99]} is {short(value)}; only {allowed[0]} is supported")
    checkpoint.check_pickle(folder, WEIGHTS, "adapter_model.bin")
    weights, metadata = tensorfile.tensors(folder / WEIGHTS)
    if "base_sha256" in metadata:
        check_base(model, metadata["base_sha256"], folder, base)
    return (_load_lora if kind == "lora" else _load_prompt)(folder, model, kind, raw, weights)


def _config(raw: dict, where: Path, names: dict[str, str], **more) -> AdapterConfig:
    values = {ours: raw[theirs] for theirs, ours in names.items() if theirs in raw}
    return checkpoint.from_json(AdapterConfig, values | more, str(where))


def _load_lora(folder: Path, model: GPT, kind: str, raw: dict, weights: dict[str, Tensor]) -> Adapted:
    pattern = r"(?:base_model\.model\.)?(?:transformer\.)?(.+\.lora_[AB])(?:\.default)?\.weight"
    tensors = {}
    for name, tensor in weights.items():
        match = re.fullmatch(pattern, name)
        if not match:
            raise UserError(f"{folder}: the tensor {short(name)} is no part of a LoRA")
        tensors[match[1]] = tensor
    if not tensors:
        raise UserError(f"{folder / WEIGHTS}: holds no tensor: the adapter would do nothing")
    targets = _targets(raw, model.config)
    if targets is None:
        targets = {name[: -len(".lora_A")] for name in tensors}
    names = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
    config = _config(raw, folder / ADAPTER_CONFIG, names, kind=kind, targets=sorted(targets))
    if raw.get("use_rslora"):
        config = dataclasses.replace(config, alpha=config.alpha * math.sqrt(config.rank))
    return _read_into(config, model, tensors, folder / WEIGHTS)


def _targets(raw: dict, base: GPTConfig) -> set[str] | None:
    """The maps that the config of a LoRA lists, or None where it selects them by a pattern or by layers."""
    targets, excluded = raw.get("target_modules"), raw.get("exclude_modules") or []
    targets = list(PROJECTIONS) if targets == "all-linear" else targets
    lists = isinstance(targets, list) and isinstance(excluded, list)
    if not lists or raw.get("layers_to_transform") is not None or not all(map(_is_text, targets + excluded)):
        return None

    def matches(names: list[str]) -> set[str]:  # PEFT's rule
        return {m for m in maps if any(f".transformer.{m}".endswith(f".{name}") for name in names)}

    maps = [f"h.{layer}.{name}" for layer in range(base.n_layer) for name in PROJECTIONS]
    return matches(targets) - matches(excluded)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _load_prompt(folder: Path, model: GPT, kind: str, raw: dict, weights: dict[str, Tensor]) -> Adapted:
    names = {"num_virtual_tokens": "num_virtual_tokens"}
    config = _config(raw, folder / ADAPTER_CONFIG, names, kind=kind)
    _check(weights, {"prompt_embeddings": config.shapes(model.config)["embedding.weight"]}, folder / WEIGHTS)
    plain = beside(model, config)
    weights["prompt_embeddings"].read(plain.adapter.params["embedding.weight"])
    if not (folder / ENCODER).is_file():
        return plain
    tensors, _ = tensorfile.tensors(folder / ENCODER)
    names |= {"encoder_hidden_size": "hidden"}
    config = _config(raw, folder / ADAPTER_CONFIG, names, kind=kind)
    other = _read_into(config, model, tensors, folder / ENCODER)
    prompt, baked = other.prompt()[0], plain.adapter.params["embedding.weight"]
    if not np.allclose(prompt, baked, rtol=1e-4, atol=1e-5):
        raise UserError(f"{folder}: {ENCODER} does not give the prompt in {WEIGHTS}: one of them is old")
    return other


def _read_into(config: AdapterConfig, model: GPT, tensors: dict[str, Tensor], where: Path) -> Adapted:
    """The model with an adapter of these tensors. Their shapes are compared first: a config may ask for any
    amount of memory."""
    shapes = config.shapes(model.config).items()
    _check(tensors, {n: shape if _lies_alike(n) else shape[::-1] for n, shape in shapes}, where)
    other = beside(model, config)
    for name, p in other.adapter.params.items():
        p[:] = _torch(name, _read(tensors[name]))
    return other


def _check(tensors: dict[str, Tensor], shape_of: dict[str, tuple], where: Path) -> None:
    for name in [*shape_of, *tensors]:
        if name not in tensors:
            raise UserError(f"{where}: has no tensor for {name}, which {ADAPTER_CONFIG} calls for")
        if name not in shape_of:
            raise UserError(f"{where}: the tensor {short(name)} belongs nowhere in this model")
        if tensors[name].shape != shape_of[name]:
            shapes = f"{tensors[name].shape}, not {shape_of[name]}"
            raise UserError(f"{where}: {name} has shape {shapes}: it is for another model")


def _read(tensor: Tensor) -> Array:
    out = np.empty(tensor.shape, np.float32)
    tensor.read(out)
    return out


def load_model(folder: Path | str, adapter_folder: Path | str | None = None) -> tuple[GPT, Tokenizer]:
    """`checkpoint.load`, and an adapter put on the model; the tokenizer is the adapter's where it has one."""
    model, tokenizer = checkpoint.load(folder)
    if adapter_folder is not None:
        model = load(adapter_folder, model, folder)
        if (Path(adapter_folder) / "tokenizer.json").is_file():
            stops, tokenizer = tokenizer.stops, tokenizers.load(adapter_folder)
            checkpoint.check_vocabulary(tokenizer, model.config, Path(adapter_folder))
            tokenizer.stops |= stops
    return model, tokenizer
