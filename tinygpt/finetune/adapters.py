"""Adapters: a few extra weights beside a base that stays as it is. LoRA, p-tuning, prompt and prefix tuning.

What they compute is in `model`; here they are created, merged, saved and loaded. An adapter's folder is
PEFT's: adapter_config.json and adapter_model.safetensors. To these are added the SHA-256 of the base's
weights, in the metadata, so that a wrong base is refused, and encoder.safetensors, the MLP that a prompt was
learned through; its result, the prompt, is what PEFT keeps and reads. The tokenizer lies beside them, as
tuning may have given it a form for instructions.

Not here: DoRA, rank-stabilised scales, biases and other tensors trained beside the low-rank pairs, prompts
made by an LSTM; these are refused by name when a folder has them.

References: Hu et al. 2021 (LoRA), Liu et al. 2021 (p-tuning), Lester et al. 2021 (prompt tuning), Li and
Liang 2021 (prefix tuning), Lialin et al. 2023 (ReLoRA); https://huggingface.co/docs/peft for the folder.
"""

import hashlib
import json
import math
import re
from pathlib import Path
from reprlib import repr as short

import numpy as np

from .. import checkpoint, tensorfile
from .. import tokenizer as tokenizers
from ..atomic import finish, remove, replacing, together
from ..checkpoint import ADAPTER_CONFIG, Tokenizer
from ..config import AdapterConfig
from ..errors import UserError
from ..generate import KVCache
from ..jsonfile import read_object
from ..model import GPT, Array
from ..optim import AdamW
from ..tensorfile import Tensor
from ..variants import view
from . import lora
from .adapter import Adapted, Adapter
from .lora import LoRA
from .prompts import Prefix, Prompt

WEIGHTS, ENCODER = "adapter_model.safetensors", "encoder.safetensors"
FILES = (ADAPTER_CONFIG, WEIGHTS, ENCODER)
TYPES = {"lora": "LORA", "ptuning": "P_TUNING", "prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}
LEARNING_RATES = {"lora": 1e-3, "ptuning": 1e-3, "prompt": 1e-2, "prefix": 1e-2}  # peaks, a start

# --- a new one ----------------------------------------------------------------------------------------------


VARIANTS = {"lora": LoRA, "ptuning": Prompt, "prompt": Prompt, "prefix": Prefix}


def beside(model: GPT, config: AdapterConfig) -> Adapted:
    """The model with a new adapter, whose weights are zero, as a view: the model itself stays as it is.

    Raises UserError for a config that does not fit.
    """
    if isinstance(model, Adapted):
        raise UserError("the model has an adapter already: give its base")
    adapter = Adapter(config, model.config, model.flat.dtype)
    other = view(VARIANTS[config.kind], model)
    other.base, other.adapter, other.prefix = model, adapter, config.prompt_length
    other.params = model.params | {name: p for name, p in adapter.params.items() if name in model.params}
    return other


def create(model: GPT, config: AdapterConfig, rng: np.random.Generator) -> Adapted:
    """The model with a new adapter that can be trained. Raises UserError for a config that does not fit.

    LoRA's A is uniform in +-1 / sqrt(inputs) (PEFT's Kaiming initialisation), its B zero: the model computes
    what it did. A prompt begins as tokens drawn from the vocabulary: their embeddings, or for a prefix their
    keys and values. Random ones, and what goes into an MLP, are normal, with the token table's deviation and
    with 1; the MLP's layers are uniform in +-1 / sqrt(inputs), as PyTorch's.
    """
    other = beside(model, config)
    adapter = other.adapter
    for name, p in adapter.params.items():
        if name.endswith(".lora_A") or name.startswith(tuple(adapter.layers)):
            shape = adapter.params[name.replace("bias", "weight")].shape
            inputs = shape[1] if name.endswith(".lora_A") else shape[0]
            p[:] = rng.uniform(-1, 1, p.shape) / math.sqrt(inputs)
        elif name in model.params:
            p[:] = model.params[name]
        elif name == "embedding.weight" and (adapter.layers or config.init == "random"):
            p[:] = rng.standard_normal(p.shape) * (1 if adapter.layers else model.params["wte.weight"].std())
        elif name == "embedding.weight":
            _put_words(p, model, config, rng.integers(model.config.vocab_size, size=(1, len(p))))
    return other


def _put_words(p: Array, model: GPT, config: AdapterConfig, ids: Array) -> None:
    """Fills p with the token table's rows at ids (1, P), or for a prefix with all layers' keys and values."""
    if config.kind != "prefix":
        p[:] = model.params["wte.weight"][ids[0]]
        return
    past = KVCache(model, 1, len(p))
    model.forward(ids.astype(np.int32), past=past, keep=False)
    for layer, sides in enumerate(zip(past.keys, past.values, strict=True)):
        for side, values in enumerate(sides):
            at = (2 * layer + side) * model.config.n_embd
            p[:, at : at + model.config.n_embd] = values[0]


# --- merging ------------------------------------------------------------------------------------------------


def merge(model: Adapted) -> GPT:
    """A new model, w + s A B in place of w. Raises UserError for a prompt, which is no part of any weight."""
    if model.adapter.config.kind != "lora":
        kind = model.adapter.config.kind
        raise UserError(f"an adapter of kind {kind} cannot be merged: only lora is of weights")
    return lora.merge(model)


def restart(optimizer: AdamW, rng: np.random.Generator) -> None:
    """ReLoRA's step from one low-rank update to the next: a merged base, new A and B without a past."""
    model, end = optimizer.model, 0
    fresh = create(merge(model), model.adapter.config, rng)
    model.adapter.flat[:] = fresh.adapter.flat
    model.base, model.flat, own = fresh.base, fresh.flat, model.adapter.params
    model.params = fresh.params | {name: p for name, p in own.items() if name in fresh.params}
    for name, grad in optimizer.grads.items():
        begin, end = end, end + grad.size
        if ".lora_" in name:
            optimizer.m[begin:end] = optimizer.v[begin:end] = 0


# --- the folder ---------------------------------------------------------------------------------------------


def fingerprint(model: GPT) -> str:
    """The SHA-256 of a model's own weights, without its adapter."""
    return hashlib.sha256(model.flat).hexdigest()


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
        with replacing(folder / WEIGHTS) as beside:
            metadata = {"format": "pt", "base_sha256": base_hash or fingerprint(model)}
            tensorfile.write(beside, tensors, metadata)
        if adapter.layers:
            with replacing(folder / ENCODER) as beside:
                encoder = {name: _torch(name, p) for name, p in adapter.params.items()}
                tensorfile.write(beside, encoder, {"format": "pt"})
        else:
            remove(folder / ENCODER)
        tokenizer.save(folder, model_max_length=model.context)
        with replacing(folder / ADAPTER_CONFIG) as beside:
            text = json.dumps(_config_json(config, model, base), indent=2) + "\n"
            beside.write_text(text, encoding="utf-8")


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


# What else a LoRA's config may say, with the values that change nothing here; others are refused by name.
_SUPPORTED = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),  # others change the base
    **dict.fromkeys(("use_dora", "use_rslora", "use_qalora", "lora_bias"), (False,)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), ({}, None)),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices", "target_parameters"), (None, [])),
    **dict.fromkeys(("layer_replication", "alora_invocation_tokens", "use_bdlora"), (None,)),
    "encoder_reparameterization_type": ("MLP",),
}


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
    for name, allowed in _SUPPORTED.items():
        if name in raw and raw[name] not in allowed:
            raise UserError(f"{where}: {name} is {short(raw[name])}; only {allowed[0]} is supported")
    found, metadata = tensorfile.tensors(folder / WEIGHTS)
    if "base_sha256" in metadata:
        check_base(model, metadata["base_sha256"], folder, base)
    return (_load_lora if kind == "lora" else _load_prompt)(folder, model, kind, raw, found)


def _config(raw: dict, where: Path, names: dict[str, str], **more) -> AdapterConfig:
    values = {ours: raw[theirs] for theirs, ours in names.items() if theirs in raw}
    return checkpoint.from_json(AdapterConfig, values | more, str(where))


def _load_lora(folder: Path, model: GPT, kind: str, raw: dict, found: dict[str, Tensor]) -> Adapted:
    pattern = r"(?:base_model\.model\.)?(?:transformer\.)?(.+\.lora_[AB])(?:\.default)?\.weight"
    tensors = {}
    for name, tensor in found.items():
        match = re.fullmatch(pattern, name)
        if not match:
            raise UserError(f"{folder}: the tensor {short(name)} is no part of a LoRA")
        tensors[match[1]] = tensor
    if not tensors:
        raise UserError(f"{folder / WEIGHTS}: holds no tensor: the adapter would do nothing")
    targets = raw.get("target_modules")
    named = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    if not named or raw.get("layers_to_transform") is not None:  # a pattern, some layers
        targets = sorted({name[: -len(".lora_A")] for name in tensors})
    names = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
    config = _config(raw, folder / ADAPTER_CONFIG, names, kind=kind, targets=sorted(targets))
    return _read_into(config, model, tensors, folder / WEIGHTS)


def _load_prompt(folder: Path, model: GPT, kind: str, raw: dict, found: dict[str, Tensor]) -> Adapted:
    names = {"num_virtual_tokens": "num_virtual_tokens"}
    config = _config(raw, folder / ADAPTER_CONFIG, names, kind=kind)
    _check(found, {"prompt_embeddings": config.shapes(model.config)["embedding.weight"]}, folder / WEIGHTS)
    plain = beside(model, config)
    found["prompt_embeddings"].read(plain.adapter.params["embedding.weight"])
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


def _check(found: dict[str, Tensor], wanted: dict[str, tuple], where: Path) -> None:
    for name in [*wanted, *found]:
        if name not in found:
            raise UserError(f"{where}: has no tensor for {name}, which {ADAPTER_CONFIG} calls for")
        if name not in wanted:
            raise UserError(f"{where}: the tensor {short(name)} belongs nowhere in this model")
        if found[name].shape != wanted[name]:
            shapes = f"{found[name].shape}, not {wanted[name]}"
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
            tokenizer = tokenizers.load(adapter_folder)
            checkpoint.check_vocabulary(tokenizer, model.config, Path(adapter_folder))
    return model, tokenizer
