"""The targets of `tinygpt gradcheck`: the reader's own code, by name, or everything in this project.

`gradcheck.py` does the checking, `shell` the printing.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np

from ..core import kernels
from ..core.config import GPTConfig
from ..errors import UserError
from ..stages import variants
from ..stages.adapter import AdapterConfig
from ..stages.variants import build
from . import layers
from .contract import AdviceError, Inputs, MakeInputs, parameters
from .gradcheck import Result, gradcheck

Pair = tuple[Callable, Callable, Inputs | MakeInputs]  # forward, backward, inputs

# --- the reader's own code ---------------------------------------------------------------------------------


def find(target: str, shapes: dict[str, tuple[int, ...]]) -> tuple:
    """The arguments of `gradcheck` for the target `module:name` or `path/to/file.py:name`.

    The target is a pair, `name_forward` and `name_backward`, or a layer (`layers.py`). `name` is then an
    object, a class whose constructor needs no arguments, or a call such as "Linear(4, 3)". The inputs are
    standard normal arrays of `shapes`, or else the result of `name_inputs(rng)`. Raises UserError if one of
    these is missing.
    """
    parts = re.fullmatch(r"(.+?\.py|[\w.]+):(\w+)(\(.*\))?", target)
    if parts is None:
        raise UserError(f"{target}: write module:name, as in mymodule:layernorm or folder/file.py:layernorm")
    where, name, call = parts[1], parts[2].removesuffix("_forward"), parts[3] or ""
    module = _load(where)
    forward, backward, layer = (getattr(module, name + end, None) for end in ("_forward", "_backward", ""))
    if layer is not None and forward is None:
        try:
            layer = eval(name + (call or "()" * isinstance(layer, type)), vars(module))
        except TypeError as error:
            example = f'write them, as in "{where}:{name}(4, 3)", or name an object'
            raise UserError(f"{target} needs other arguments ({error}): {example}") from error
        forward = layers.pair_of(layer, None).forward
    elif forward is None or backward is None:
        lacks = f"{name}_{'forward' if forward is None else 'backward'}"
        close = difflib.get_close_matches(lacks, set(dir(module)) - {lacks}, 1)
        raise UserError(f"{where} has no {lacks}" + (f"; is it {close[0]}?" if close else ""))
    if shapes:

        def inputs(rng: np.random.Generator) -> dict:
            return {n: rng.standard_normal(shape) for n, shape in shapes.items()}

    elif (inputs := getattr(module, f"{name}_inputs", None)) is None:
        names = parameters(forward, required=True)
        example = ", ".join(f'"{n}": rng.standard_normal((4, 8))' for n in names)
        raise AdviceError(f"""{where} has no {name}_inputs: add, with shapes that fit,

    def {name}_inputs(rng):
        return {{{example}}}

or say {" ".join(f"--shape {n}=4,8" for n in names)}""")
    return (forward, backward, inputs) if backward else (layer, inputs)


def _load(where: str) -> ModuleType:
    """Imports a module by name, as `python` would in this folder, or a file by its path."""
    path = os.path.abspath(where) if where.endswith(".py") else None
    if path and not os.path.isfile(path):
        raise UserError(f"{where}: there is no such file")
    sys.path.insert(0, os.path.dirname(path) if path else os.getcwd())
    try:
        if not path:
            return importlib.import_module(where)
        spec = importlib.util.spec_from_file_location(os.path.basename(path).removesuffix(".py"), path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as error:
        raise UserError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error


# --- this project's own ------------------------------------------------------------------------------------


def check_project(rtol: float = 1e-7, atol: float = 0.0, seed: int = 0) -> Iterator[tuple[str, str, Result]]:
    """Name, backend and worst gradient: of every operation and of the whole model, in each backend."""
    for backend in kernels.available():
        for name, pair in project_pairs(kernels.backend(backend), np.random.default_rng(seed)):
            results = gradcheck(*pair, rtol, atol, seed=seed, small=4 if "model" in name else 256)
            worst = max(results, key=Result.badness)
            yield name, backend, dataclasses.replace(worst, notes=worst.notes * (not worst.ok))


def project_pairs(ops: ModuleType, rng: np.random.Generator) -> Iterator[tuple[str, Pair]]:
    """The name of each operation and model of a backend, with its forward, backward and inputs.

    The models use optional arguments of operations, such as dw=False. tests/check/rows.py has more pairs, for
    single optional arguments.
    """
    normal = rng.standard_normal
    x, ids = normal((2, 5, 6)), np.array([[0, 2, 2, 6], [1, 2, 0, 4]])
    start = np.array([[0, 0, 0, 3, 3], [1, 1, 2, 2, 4]])  # two documents; padding, then documents

    def qkv(T: int, S: int, **more) -> Inputs:
        return {"q": normal((2, T, 6)), "k": normal((2, S, 6)), "v": normal((2, S, 6)), "n_head": 2, **more}

    rows = {  # the operation, and a remark
        "embedding": {"ids": ids, "w": normal((7, 6))},
        "linear": {"x": x, "w": normal((6, 3)), "b": normal(3)},
        "layernorm": {"x": x, "g": normal(6), "b": normal(6)},
        "gelu": {"x": 3 * x},
        "relu": {"x": x},
        "tanh": {"x": x},
        "attention": qkv(5, 5),
        "attention, T = 1": qkv(1, 1),
        "attention, packed": qkv(5, 5, start=start),
        "attention, S > T": qkv(3, 7),
        "attention, prefix": qkv(5, 7, start=start, prefix=2),
        "attention, within a prefix": qkv(5, 5, start=start[:, 2:], prefix=2),
        "residual": {"x": x, "branch": normal(x.shape)},
        "dropout": {"x": x, "rate": 0.4, "seed": 7},
        "cross_entropy": {"logits": normal((2, 4, 7)), "targets": ids},
    }
    for name, inputs in rows.items():
        operation = name.split(",")[0]
        yield name, (getattr(ops, f"{operation}_forward"), getattr(ops, f"{operation}_backward"), inputs)
    yield "whole model", model_pair(ops, rng)
    yield "whole model, post-norm", model_pair(ops, rng, post_norm=True)
    yield "reward model", model_pair(ops, rng, num_labels=1)
    for name, config in ADAPTERS.items():
        yield f"model, {name}", model_pair(ops, rng, "post-norm" in name, config)


ADAPTERS = {
    "LoRA": AdapterConfig("lora", rank=2, alpha=3.0),
    "LoRA, dropout": AdapterConfig("lora", rank=2, alpha=2.0, dropout=0.3),
    "LoRA, one layer": AdapterConfig("lora", rank=1, alpha=1.0, targets=("h.1.attn.c_attn", "h.1.mlp.c_fc")),
    "LoRA, post-norm": AdapterConfig("lora", rank=2, alpha=3.0),
    "LoRA, full": AdapterConfig("lora", rank=3, alpha=3.0, targets=("attn.c_attn",), full=True),
    "prompt tuning": AdapterConfig("prompt", num_virtual_tokens=2),
    "p-tuning": AdapterConfig("ptuning", num_virtual_tokens=2, hidden=5),
    "p-tuning, post-norm": AdapterConfig("ptuning", num_virtual_tokens=2, hidden=5),
    "prefix tuning": AdapterConfig("prefix", num_virtual_tokens=2),
    "prefix tuning, MLP": AdapterConfig("prefix", num_virtual_tokens=1, hidden=5),
    "prefix, post-norm": AdapterConfig("prefix", num_virtual_tokens=2),
}


def model_pair(
    ops: ModuleType, rng: np.random.Generator, post_norm: bool = False, adapter: AdapterConfig | None = None,
    num_labels: int = 0,
) -> Pair:  # fmt: skip
    """A small GPT as one function of all its parameters, or of its adapter's parameters.

    It has packed documents, dropout and a head. The result is the cross-entropy of each token, or the scores
    if num_labels is not 0. The weights have the size 0.3. At 0.02, the size of an initialisation, rounding
    would hide many gradients.
    """
    config = GPTConfig(11, block_size=8, n_layer=2, n_head=2, n_embd=8, dropout=0.2, post_norm=post_norm,
                       num_labels=num_labels)  # fmt: skip
    model = build(config, dtype=np.float64, ops=ops)
    start = np.array([[0, 0, 0, 3, 3, 3], [0, 1, 1, 1, 1, 5]])
    ids, targets = rng.integers(config.vocab_size, size=(2, 2, 6))
    if adapter:
        model = variants.beside(model, adapter)
    for params in (model.params, model.trained.params):
        weights = {n: 0.3 * rng.standard_normal(p.shape) for n, p in params.items()}
        for name, w in weights.items():
            w += ".ln_" in f".{name}" and name.endswith("weight")  # gains around 1
            params[name][:] = w

    def forward(**weights):
        for name, w in weights.items():
            model.trained.params[name][:] = w
        dropout, positions = np.random.default_rng(1), np.arange(6) - start
        logits, cache = model.forward(ids, positions=positions, start=start, rng=dropout)
        if num_labels:
            return logits.copy(), (cache, None)
        nll, c_nll = ops.cross_entropy_forward(logits, targets)
        return nll, (cache, c_nll)

    def backward(dnll, caches):
        cache, c_nll = caches
        _, grads = model.trained.gradients()
        model.backward(dnll if num_labels else ops.cross_entropy_backward(dnll, c_nll), cache, grads)
        return grads

    return forward, backward, weights
