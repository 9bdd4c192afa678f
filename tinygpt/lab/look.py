"""One training step as a page: each operation, its lines of code, and the arrays that these lines computed.

    twin.ops = trace.ops        a backend that records each call: operation, arrays, calling lines

`model.py` and `ops.py` do not change for this. `observe` makes one step of a model on one text. It returns
the page's content as plain data. `html` puts the data and `look.js` into `look.html`; the script draws the
data. The page needs no network.

The page has at most 64 x 64 elements of an array, and all elements of some rows. No element is an average.
The lines are those of `ops.py`, whichever backend computes.

Not here: several texts at a time, dropout, an optimizer with earlier steps.
"""

import base64
import copy
import inspect
import json
import math
import sys
import textwrap
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import CodeType, FrameType, SimpleNamespace
from typing import NamedTuple

import numpy as np

from ..core import ops
from ..core.model import GPT, Array
from ..core.optim import AdamW
from ..core.train import TrainConfig
from ..errors import UserError
from ..stages import variants
from ..stages.adapter import Adapted

MOST_TOKENS, MOST_SHOWN, MOST_IN_ROW = 64, 64, 4096
CHECKED, DISTANCE, SEED = 20, 1e-5, [0, 25]  # weights that are moved; how far; the seed
OPERATIONS = [name for name in vars(ops) if name.endswith(("_forward", "_backward"))]
OPERATIONS += ["weighted_sum", "squares", "adamw"]
PHASES = {"cross_entropy_forward": "loss", "cross_entropy_backward": "backward", "weighted_sum": "loss",
          "squares": "update"}  # fmt: skip
TABLES = {"wte.weight": "word", "wpe.weight": "position"}  # the meaning of their rows


class Call(NamedTuple):
    """One operation."""

    op: str
    arguments: dict  # by name
    result: object
    out: object  # the result, or its first part
    layer: int | None  # of the block that called
    phase: str  # forward, loss, backward or update


class Trace:
    """A backend, `ops`, that computes with the model's own backend and records each call.

    calls: the operations, in order. steps: the same for the page. A step names arrays and sources by number.
    """

    def __init__(self, model: GPT, ids: Array, token: int) -> None:
        """ids (T + 1,): the text. token: a place in the text, from 0. The page has its rows complete."""
        self.model, self.ids, self.token, self.T = model, ids, token, len(ids) - 1
        self.calls, self.steps, self.arrays, self.sources = [], [], [], []
        self._forwards, self._phase = {}, "forward"
        self.params = model.params | model.trained.params
        self.words = {*ids.tolist(), *self._places(model.config.vocab_size, "word")}
        recorders = {name: partial(self._call, name) for name in OPERATIONS}
        self.ops = SimpleNamespace(**vars(model.ops) | recorders)

    def _call(self, op: str, *args, **named) -> object:
        textbook = getattr(ops, op)
        arguments = inspect.signature(textbook).bind(*args, **named).arguments
        frames, layer = self._frames(sys._getframe(1))
        result = getattr(self.model.ops, op)(*args, **named)
        out = result[0] if isinstance(result, tuple) else result
        self._phase = PHASES.get(op, self._phase)
        call = Call(op, arguments, result, out, layer, self._phase)
        if op.endswith("_forward"):
            self._forwards[id(result[1])] = call  # so the backward finds its forward
        self.calls.append(call)
        step = {"op": op, "layer": layer, "phase": call.phase, "frames": frames, "arrays": self._rows(call),
                "source": self._source(textbook.__code__), "norms": None}  # fmt: skip
        numbers = {**arguments, "result": result}.items()
        step["numbers"] = {name: value for name, value in numbers if type(value) in (int, float)}
        if call.phase == "backward" and np.ndim(out) == 3:  # the norm of each token's gradient
            step["norms"] = np.linalg.norm(out[0, -self.T :], axis=-1).tolist()
        if op == "adamw":
            step["weights"] = [n for n, p in self.model.trained.params.items() if _within(p, arguments["w"])]
        self.steps.append(step)
        return result

    def _rows(self, call: Call) -> list[dict]:
        """The arrays that an operation read and computed. A backward has the forward's arrays, each with its
        gradient. An update has no arrays here: see `_update`."""
        if call.phase == "update":
            return []
        if "cache" not in call.arguments:
            name = "nll" if call.op == "cross_entropy_forward" else "out"
            arrays = [(*item, None) for item in call.arguments.items()] + [(name, call.out, None)]
            return [self._row(*each, call) for each in arrays if isinstance(each[1], np.ndarray)]
        forward, dout = self._forwards[id(call.arguments["cache"])], next(iter(call.arguments.values()))
        inputs = {n: a for n, a in forward.arguments.items() if getattr(a, "dtype", None) == dout.dtype}
        results = call.result if isinstance(call.result, tuple) else (call.result,)
        if call.arguments.get("packed"):
            results = np.split(call.result, 3, -1)
        gradients = {**dict(zip(inputs, results, strict=False)), "add": dout}  # of a sum: unchanged
        arrays = [("out", forward.out, dout)] + [(n, a, gradients[n]) for n, a in inputs.items()]
        if isinstance(add := call.arguments.get("add"), np.ndarray):
            arrays.append(("add", None, add))
        return [self._row(*each, forward) for each in arrays]

    def _row(self, name: str, a: Array | None, gradient: Array | bool | None, call: Call) -> dict:
        param = next((n for n, p in self.params.items() if a is not None and _within(a, p)), None)
        is_head = call.op == "linear_forward" and _within(call.arguments["w"], self.params[self.model.table])
        kinds = "token", "channel"
        if param and a.size == self.params[param].size:
            p, kinds = self.params[param], kinds_of(param, a)
            kinds = kinds if (a.shape, a.strides) == (p.shape, p.strides) else kinds[::-1]
        elif a is not None and a.ndim < 3:
            kinds = ("", "token") if a.shape == (1, self.T) else ("row", "column")
        elif name == "logits" or (name == "out" and is_head):
            kinds = "token", "word"
        frozen = bool(param) and param not in self.model.trained.params
        pictures = {"a": self.picture(a, kinds), "g": self.picture(gradient, kinds)}
        return {"name": name, "param": param, "frozen": frozen, **pictures}

    def picture(self, a: object, kinds: tuple[str, str], whole: Iterable[int] | None = None) -> int | None:
        """The number of an array on the page, or None for any other object.

        The page has the shape, the smallest and largest element, and at most 64 x 64 elements. Tokens of the
        text come before other tokens of the vocabulary.

        kinds: the meaning of rows and columns.
        whole: rows with all elements, up to 4,096. By default the chosen token's row and the last row.
        """
        if not isinstance(a, np.ndarray):
            return None
        flat = a.reshape(-1, a.shape[-1]) if a.ndim else a.reshape(1, 1)
        rows, columns = (self._places(n, kind) for n, kind in zip(flat.shape, kinds, strict=True))
        whole = self._chosen(kinds[0], len(flat)) if whole is None else whole
        whole = {r: _packed(flat[r]) for r in whole if flat.shape[1] <= MOST_IN_ROW}
        entry = {"shape": a.shape, "size": flat.shape, "kinds": kinds, "min": float(a.min()),
                 "max": float(a.max()), "rows": rows, "columns": columns, "whole": whole,
                 "data": _packed(flat[np.ix_(rows, columns)])}  # fmt: skip
        return _number(self.arrays, entry)

    def _places(self, n: int, kind: str) -> list[int]:
        """At most 64 of n rows or columns for the page: those of the text, then others."""
        text = {"word": self.ids.tolist(), "position": range(self.model.prefix, self.model.prefix + self.T)}
        first = {*text.get(kind, ())}
        rest = [i for i in range(0, n, -(-n // MOST_SHOWN)) if i not in first]
        return sorted([*first, *rest[: MOST_SHOWN - len(first)]])

    def _chosen(self, kind: str, n: int) -> Iterable[int]:
        """The row of the chosen token among n rows. Where the rows are the text, also the last row."""
        places = {"word": [int(self.ids[self.token])], "position": [self.model.prefix + self.token]}
        return places.get(kind, {n - self.T + self.token, n - 1} if kind == "token" else ())

    def _frames(self, frame: FrameType) -> tuple[list, int | None]:
        """The calling lines, innermost first, each (source, line), and the layer of the block among them."""
        lines, layer = [], None
        while frame.f_globals["__name__"] != __name__:
            lines.append((self._source(frame.f_code), frame.f_lineno))
            if frame.f_code.co_name in ("block", "block_backward"):
                layer = frame.f_back.f_locals.get("layer", layer)
            frame = frame.f_back
        return lines, layer

    def _source(self, code: CodeType) -> int:
        (lines, first), file = inspect.getsourcelines(code), Path(code.co_filename)
        source = {"file": f"{file.parent.name}/{file.name}", "name": code.co_name, "first": first}
        return _number(self.sources, source | {"text": textwrap.dedent("".join(lines)).rstrip()})


def _within(a: Array, whole: Array) -> bool:
    """Whether an array is a part, or a view, of another."""
    start, first = (x.__array_interface__["data"][0] for x in (a, whole))
    return first <= start < first + whole.nbytes


def _packed(a: Array) -> str:
    return base64.b64encode(np.ascontiguousarray(a, "<f4").tobytes()).decode()


def _number(items: list[dict], item: dict) -> int:
    """The number of an item in a list. A new item is added."""
    if item not in items:
        items.append(item)
    return items.index(item)


def kinds_of(param: str, p: Array) -> tuple[str, str]:
    """The meaning of the rows and of the columns of a weight."""
    if p.ndim == 1:
        return "", "channel"
    return (TABLES[param], "channel") if param in TABLES else ("row", "column")


# --- one step -----------------------------------------------------------------------------------------------


def observe(
    model: GPT, ids: Array, learned: Array, label: Callable[[int], str], token: int, lr: float = 1e-3
) -> dict:
    """One training step of the model on a text: the page's content. The step changes the trained weights.

    ids (T + 1,): the text.
    learned (T + 1,), bool: the tokens that count in the loss. The first token has no prediction.
    label: an id -> the token for a reader.
    token: a place in the text, from 1. The page has its rows complete.
    lr: the learning rate of AdamW's step.

    Raises UserError for a text of fewer than 2 or more than 64 tokens, and for a token outside of the text.
    """
    T, c = len(ids) - 1, model.config
    if not 1 <= T < MOST_TOKENS:
        raise UserError(f"a page shows 2 to {MOST_TOKENS} tokens, and the text has {T + 1}")
    if token > T:
        raise UserError(f"token is {token}: of this text's {T + 1} tokens the model reads the first {T}")
    weights = (learned[1:] / max(1, learned[1:].sum())).astype(model.flat.dtype)[None]  # (1, T)
    batch = ids[None, :-1].astype(np.int32), ids[None, 1:].astype(np.int32), weights
    trace, wide, twin = Trace(model, ids, token - 1), in_float64(model), copy.copy(model)
    twin.ops = trace.ops
    optimizer = TrainConfig(learning_rate=lr, min_lr=lr).optimizer(twin)
    loss = float(twin.loss(*batch, optimizer.grads))
    lens = [_likeliest(model, x[:, -T:], batch[1]) for x in _stream(trace, c.n_layer)]
    trace.words.update(i for layer in lens for likeliest, _ in layer for i, _ in likeliest)
    attends = [call.arguments for call in trace.calls if call.op == "attention_forward"]
    maps = [ops.attention_forward(**each)[1][3] for each in attends]  # by NumPy: C has no (1, H, T, S)
    nll = next(call.out for call in trace.calls if call.op == "cross_entropy_forward")
    about = f"{c.n_layer} layers, {c.n_head} heads, {c.n_embd} channels, a vocabulary of {c.vocab_size:,}"
    if model.trained is not model:
        about += f"; an adapter is trained, kind {model.trained.config.kind}"
    check = differences(wide, optimizer.grads, *batch[:2], weights.astype(np.float64))
    update = _update(trace, optimizer, lr)
    if not math.isfinite(after := float(model.loss(*batch))):
        raise UserError(f"the loss after the update is {after}: choose a smaller learning rate than {lr:g}")
    return {
        "about": about, "ids": ids.tolist(), "weights": weights[0].tolist(), "nll": nll[0].tolist(),
        "lr": lr, "loss": loss,
        "check": check, "update": update, "after": after,
        "token": token - 1, "prefix": model.prefix, "layers": c.n_layer, "lens": lens, "steps": trace.steps,
        "arrays": trace.arrays, "sources": trace.sources, "words": {i: label(i) for i in sorted(trace.words)},
        "attention": [{"shape": p.shape[1:], "data": _packed(p)} for p in maps],
    }  # fmt: skip


def _update(trace: Trace, optimizer: AdamW, lr: float) -> dict:
    """AdamW's step. For each trained array, one row: before, gradient, moments, after, change."""
    params, rows, end = optimizer.trained.params, {}, 0
    before = {name: params[name].copy() for name in optimizer.grads}
    optimizer.step(lr)
    for name, g in optimizer.grads.items():
        begin, end = end, end + g.size
        moments = (a[begin:end].reshape(g.shape) for a in (optimizer.m, optimizer.v))
        arrays = [before[name], g, *moments, params[name], params[name] - before[name]]
        kind, columns = kinds_of(name, g)
        row = min(trace._chosen(kind, len(g)), default=0)
        whole = [0] if not rows else []
        pictures = [trace.picture(np.atleast_2d(a)[[row]], ("", columns), whole) for a in arrays]
        rows[name] = {"row": row if g.ndim > 1 else None, "arrays": pictures}
    return rows


def _stream(trace: Trace, layers: int) -> Iterable[Array]:
    """The residual stream (1, T, C): the input of each block, and the output of the last block."""
    for layer in range(layers):
        calls = [call for call in trace.calls if call.layer == layer and call.phase == "forward"]
        yield calls[0].arguments["x"]
    yield calls[-1].out


def _likeliest(model: GPT, x: Array, targets: Array) -> list:
    """The logit lens: the head reads the stream x (1, T, C). For each token, the five likeliest next tokens
    as (id, probability), and the probability of the expected token."""
    probs = ops.probabilities(model.head(x)[0])[0]  # (T, V)
    best = np.argsort(-probs, axis=-1, kind="stable")[:, :5]
    pairs = zip(best.tolist(), probs, targets[0].tolist(), strict=True)
    return [([(i, float(p[i])) for i in ids], float(p[target])) for ids, p, target in pairs]


def in_float64(model: GPT) -> GPT:
    """The same model in float64, in memory of its own."""
    if isinstance(model, Adapted):
        wide = variants.beside(in_float64(model.base), model.adapter.config)
    else:
        wide = variants.build(model.config, dtype=np.float64, ops=model.ops)
    wide.trained.flat[:] = model.trained.flat
    return wide


def differences(model: GPT, grads: dict[str, Array], *batch: Array) -> list[dict]:
    """For 20 weights, (loss(w + h) - loss(w - h)) / 2h beside the gradient.

    Each tensor has about as many of the 20 weights as another. They are drawn from its large gradients.

    model: in float64.
    batch: the arguments of its loss.
    """
    rng, names, rows = np.random.default_rng(SEED), list(grads), []
    for n in range(CHECKED):
        name = names[n * len(names) // CHECKED]
        size = abs(grads[name])
        candidates = np.argwhere(size >= size.max() / 1000)  # small ones are below float32's rounding
        at = tuple(rng.choice(candidates).tolist())
        p, losses = model.trained.params[name], []
        for h in (DISTANCE, -2 * DISTANCE):
            p[at] += h
            losses.append(float(model.loss(*batch)))
        p[at] += DISTANCE
        slope = (losses[0] - losses[1]) / (2 * DISTANCE)
        rows.append({"name": name, "at": at, "backward": float(grads[name][at]), "slope": slope})
    return rows


def html(data: dict) -> str:
    """The page, as one file that needs no other file."""
    page, script = (Path(__file__).with_suffix(s).read_text(encoding="utf-8") for s in (".html", ".js"))
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c")
    return page.replace("/* look.js */", script).replace("/* look.json */", text)
