"""Makes a pair, a forward and a backward, of a layer that a reader wrote. The parameters are inputs too.

    what               conventions
    forward            layer.forward(x), or layer(x); it returns out, or stores layer.output
    backward           layer.backward(dout); it returns dx, or stores layer.dinputs
    with a cache       layer.forward(x) returns (out, cache); layer.backward(dout, cache) returns dx
    parameters         arrays, lists, dicts in params or parameters (or methods); W, b, gamma; p.data, p.value
    their gradients    same order or same keys: grads or gradients (or methods); dW, grad_W, W_grad; p.grad
    layers in layers   in attributes, lists and dicts; the parameters of these layers are checked too

An array is a parameter if the layer has its gradient under such a name. An array that a forward or a backward
replaces is no parameter. A layer may add up its gradients from call to call: the checker sets each gradient
to 0 before it calls a backward. Parameters must be float64.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np

from ..errors import UserError
from .contract import AdviceError, Array, Pair, as_tuple, is_float, leaves, like, parameters, vector

__tracebackhide__ = True  # for pytest, as in gradcheck.py
METHODS = ("params", "parameters")  # these and their gradients may be methods without arguments
GRADIENTS = [  # the name of a parameter, the name of its gradient
    *((parameter, gradient) for parameter in METHODS for gradient in ("grads", "gradients")),
    ("data", "grad"),
    ("value", "grad"),
    ("{}", "d{}"),
    ("{}", "grad_{}"),
    ("{}", "{}_grad"),
]


def pair_of(forward: object, backward: Callable | None) -> Pair:
    """The pair of a layer, or of two methods of one layer, with its parameters; or of two functions."""
    layer = forward if backward is None else getattr(forward, "__self__", None)
    if backward is None:
        forward, backward = getattr(layer, "forward", layer), getattr(layer, "backward", None)
        problem = "" if callable(forward) else "has no forward"
        problem = problem if callable(backward) else "has no backward"
        if problem := "is a class: make an object of it" if isinstance(layer, type) else problem:
            name = getattr(layer, "__name__", f"a {type(layer).__name__}")
            table = __doc__.split("\n\n")[1]
            raise AdviceError(f"{name} {problem}. A layer is one of these:\n\n{table}")
    names = parameters(backward, required=layer is not None)
    if (layer is None or isinstance(layer, ModuleType)) and len(names) != 1:
        return Pair(forward, backward)
    return Layer(layer, forward, backward, with_cache=len(names) > 1)


class Layer(Pair):
    """A layer with state: its parameters are inputs too, under the names of their gradients, "grads['w']".

    Each backward follows a forward at the same point. `restore` gives the parameters their values back.
    """

    def __init__(self, layer: object, forward: Callable, backward: Callable, with_cache: bool) -> None:
        super().__init__(forward, backward)
        self.layer, self.with_cache = layer, with_cache
        self.params: dict[str, tuple[Array, Array]] | None = None  # the array, and a copy of its values

    def point(self, inputs) -> dict[str, Array]:
        values = super().point(inputs)
        if self.params is None:
            self.params = self.find(values)
        return values | {name: value.copy() for name, (_, value) in self.params.items()}

    def find(self, values: dict) -> dict[str, tuple[Array, Array]]:
        """The parameters: arrays with a gradient, which a forward and a backward do not replace."""
        before, self.params = [p for _, _, p, _ in walk(self.layer)], {}
        out, cache = self(values)
        between = {path: p for path, name, p, _ in walk(self.layer) if name and any(p is b for b in before)}
        self.run_backward(like(out, np.ones(vector(out).size)), cache)
        params, bare = {}, []
        for path, name, p, _ in walk(self.layer):
            if not any(p is other for other in before) or any(p is other for other, _ in params.values()):
                continue
            if name is None:
                bare.append((path, p))
            elif p.dtype != np.float64:
                raise UserError(f"{path} is {p.dtype}: parameters must be float64 arrays")
            else:
                params[name] = p, p.copy()
        after, gradients = {path: p for path, _, p, _ in walk(self.layer)}, [g for *_, g in walk(self.layer)]
        if bare := [path for path, p in bare if not any(p is g for g in gradients)]:
            self.notes = [f"no gradient is beside {', '.join(bare)}: not checked"]
        if replaced := [path for path, p in between.items() if after.get(path) is not p]:
            self.notes += [f"backward replaces {', '.join(replaced)}: not checked"]
        return params

    def restore(self) -> None:
        for p, value in (self.params or {}).values():
            p[...] = value

    def label(self, name: str) -> str:
        return name if name in self.params else super().label(name)

    def __call__(self, values: dict) -> tuple:
        for name, (p, _) in self.params.items():
            p[...] = values[name]  # in place: the layer may have another name for the array
        return super().__call__({n: x for n, x in values.items() if n not in self.params})

    def judgeable(self, result) -> tuple:
        if not self.with_cache:
            result = (getattr(self.layer, "output", None) if result is None else result), None
        return super().judgeable(result)

    def answer(self, dout, cache, values: dict) -> dict[str, Array | None]:
        _, cache = self(values)
        for _, name, _, g in walk(self.layer):
            if name in self.params and isinstance(g, np.ndarray):
                g[...] = 0
        dx, inputs = self.run_backward(dout, cache), {n: x for n, x in values.items() if n not in self.params}
        grads = {name: gradient for _, name, _, gradient in walk(self.layer)}
        params = {n: None if grads.get(n) is None else np.array(grads[n]) for n in self.params}
        return (self.by_path(dx, inputs) if inputs else {}) | params

    def run_backward(self, dout, cache):
        """Calls backward with a copy of dout, which the layer may keep. dout gets the copy's content."""
        copy = like(dout, vector(dout))
        dx = self.backward(copy, cache) if self.with_cache else self.backward(copy)
        for mine, other in zip(as_tuple(dout), as_tuple(copy), strict=True):
            if isinstance(mine, np.ndarray):
                mine[...] = other
        return getattr(self.layer, "dinputs", None) if dx is None else dx


def walk(owner: object, path: str = "", seen: set | None = None) -> Iterator[tuple]:
    """(path, name of the gradient, array, gradient) of every float array in a layer and in its layers.

    The name is None if no gradient is beside the array.
    """
    seen = set() if seen is None else seen
    if id(owner) in seen or not hasattr(owner, "__dict__") or isinstance(owner, type | ModuleType):
        return
    seen.add(id(owner))
    before = f"{path}." if path else ""
    for name in dict.fromkeys([m for m in METHODS if hasattr(owner, m)] + list(vars(owner))):
        names = [gradient.format(name) for parameter, gradient in GRADIENTS if parameter in (name, "{}")]
        beside = next((gradient for gradient in names if hasattr(owner, gradient)), None)
        here, value = _content(owner, name)
        there, grads = _content(owner, beside) if beside else ("", ())
        grads = dict(leaves(grads, "."))
        for at, leaf in leaves(value, "."):
            if is_float(leaf):
                g = grads.get(at, grads.get(re.sub(r"\['(\w+)'\]$", r"['d\1']", at)))
                yield before + here + at[1:], before + there + at[1:] if beside else None, leaf, g
            elif not isinstance(leaf, np.ndarray):
                yield from walk(leaf, before + here + at[1:], seen)


def _content(owner: object, name: str) -> tuple[str, object]:
    """An attribute's name and value; for a method in the table, its result."""
    value = getattr(owner, name)
    if name in sum(GRADIENTS[:4], ()) and callable(value):
        value = value()
        return f"{name}()", value if isinstance(value, dict | list | tuple) else list(value)
    return name, value
