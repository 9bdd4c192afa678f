"""The folder of an adapter, in PEFT's format: adapter_config.json and adapter_model.safetensors.

tinygpt adds three things. The metadata of the tensors have the SHA-256 of the base's weights, so that another
base is refused. The file encoder.safetensors has the MLP of a learned prompt, of which PEFT keeps and reads
only the result, the prompt. The folder also has the tokenizer, because tuning may add a chat template.

The tensors of a LoRA show which linear maps have a branch. The config must list the same maps.

Not here: the arithmetic of adapters (`stages.lora`, `stages.prompts`). Refused by name: DoRA, different
ranks, biases and other tensors trained beside the low-rank pairs, and prompts of an LSTM.

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
from ..text.tokenizer import Tokenizer
from . import checkpoint
from .checkpoint import ADAPTER_CONFIG

WEIGHTS, ENCODER = "adapter_model.safetensors", "encoder.safetensors"
FILES = (ADAPTER_CONFIG, WEIGHTS, ENCODER)
TYPES = {"lora": "LORA", "ptuning": "P_TUNING", "prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}

# --- the folder ---------------------------------------------------------------------------------------------


def save(folder: Path, model: GPT, tokenizer: Tokenizer, base: str, base_hash: str = "") -> None:
    """Writes `model.adapter` in PEFT's format. base: the folder of the base; base_hash: its `fingerprint`."""
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
    """From this layout to PyTorch's, or back."""
    return p.T if _is_transposed(name) else p


def _is_transposed(name: str) -> bool:
    """Weights of linear layers are (out, in) in PyTorch. LoRA's A and embeddings are the same here."""
    return not name.endswith(("lora_A", "embedding.weight"))


def _config_json(config: AdapterConfig, model: GPT, base: str) -> dict:
    raw = {"peft_type": TYPES[config.kind], "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
           "inference_mode": True}  # fmt: skip
    if config.kind == "lora":
        alpha = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
        raw |= {"r": config.rank, "lora_alpha": alpha, "lora_dropout": config.dropout, "bias": "none"}
        return raw | {"target_modules": list(config.targets), "fan_in_fan_out": True}
    sizes = model.config
    raw |= {"num_virtual_tokens": config.num_virtual_tokens, "token_dim": sizes.n_embd}
    raw |= {"num_layers": sizes.n_layer, "num_attention_heads": sizes.n_head, "num_transformer_submodules": 1}
    if config.kind == "prompt":
        return raw | {"prompt_tuning_init": "RANDOM"}
    projection = {"prefix_projection": bool(config.hidden)} if config.kind == "prefix" else {}
    return raw | projection | {"encoder_hidden_size": config.hidden or sizes.n_embd}


# Settings: _SUPPORTED with these values only, _FREE with any value. In a LoRA the others must be _OFF.
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
    "corda_config", "eva_config", "loftq_config", "lora_ga_config",  # details of init_lora_weights
}  # fmt: skip
_OFF = (None, False, [], {})


def load(folder: Path | str, model: GPT, base: str | Path = "this model") -> Adapted:
    """A view of a model with the adapter in a folder, tinygpt's or PEFT's.

    base: the folder of the model, for messages. Raises UserError if the adapter is for another model. The
    hash of the base shows this, if the folder has it, else names and shapes. Also raises UserError for a
    tensor too many or too few.
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
    if "base_sha256" in metadata and metadata["base_sha256"] != fingerprint(model):
        raise UserError(f"{folder}: was not trained beside the model in {base}: give its own base")
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
    """The linear maps that the config of a LoRA lists. None: it selects them by a pattern or by layers."""
    targets, excluded = raw.get("target_modules"), raw.get("exclude_modules") or []
    targets = list(PROJECTIONS) if targets == "all-linear" else targets
    lists = isinstance(targets, list) and isinstance(excluded, list)
    if not lists or raw.get("layers_to_transform") is not None:
        return None
    if not all(isinstance(name, str) for name in targets + excluded):
        return None

    def matches(names: list[str]) -> set[str]:  # PEFT's rule
        return {m for m in maps if any(f".transformer.{m}".endswith(f".{name}") for name in names)}

    maps = [f"h.{layer}.{name}" for layer in range(base.n_layer) for name in PROJECTIONS]
    return matches(targets) - matches(excluded)



def _load_prompt(folder: Path, model: GPT, kind: str, raw: dict, weights: dict[str, Tensor]) -> Adapted:
    names = {"num_virtual_tokens": "num_virtual_tokens"}
    config = _config(raw, folder / ADAPTER_CONFIG, names, kind=kind)
    shapes = {"prompt_embeddings": config.shapes(model.config)["embedding.weight"]}
    tensorfile.check_shapes(weights, shapes, folder / WEIGHTS, ADAPTER_CONFIG)
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
    """The model with an adapter of these tensors.

    Shapes are checked before memory is allocated: a config may demand any amount.
    """
    shapes = {n: s[::-1] if _is_transposed(n) else s for n, s in config.shapes(model.config).items()}
    tensorfile.check_shapes(tensors, shapes, where, ADAPTER_CONFIG)
    other = beside(model, config)
    for name, p in other.adapter.params.items():
        stored = np.empty(shapes[name], np.float32)
        tensors[name].read(stored)
        p[:] = _torch(name, stored)
    return other


def load_model(folder: Path | str, adapter_folder: Path | str | None = None) -> tuple[GPT, Tokenizer]:
    """`checkpoint.load`, with the adapter of a folder. If that folder has a tokenizer, it is the result's."""
    model, tokenizer = checkpoint.load(folder)
    if adapter_folder is not None:
        model = load(adapter_folder, model, folder)
        if (Path(adapter_folder) / "tokenizer.json").is_file():
            stops, tokenizer = tokenizer.stops, tokenizers.load(adapter_folder)
            checkpoint.check_vocabulary(tokenizer, model.config, Path(adapter_folder))
            tokenizer.stops |= stops
    return model, tokenizer
