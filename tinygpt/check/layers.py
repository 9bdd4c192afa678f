"""Makes a pair, a forward and a backward, of a layer that a reader wrote. The parameters are inputs too.

    what               conventions
    forward            layer.forward(x), or layer(x); it returns out, or stores layer.output
    backward           layer.backward(dout); it returns dx, or stores layer.dinputs
    with a cache       layer.forward(x) returns (out, cache); layer.backward(dout, cache) returns dx
    parameters         arrays, lists, dicts in params or parameters (or methods); W, b, gamma; p.data, p.value
    their gradients    same order or same keys: grads or gradients (or methods); dW, grad_W, W_grad; p.grad
    layers in layers   in attributes, classes, lists, dicts, deques, sets, methods; all parameters are checked

An array beside such a gradient is a parameter if every forward leaves its content as it is. Arrays that share
memory are one parameter: its gradient is the total. A layer may add up its gradients from call to call: the
checker sets each gradient to 0 before it calls a backward. Parameters must be float64.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from types import MemberDescriptorType, MethodType, ModuleType
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .contract import AdviceError, Array, Pair, as_tuple, is_float, leaves, like, numbers, parameters, vector

__tracebackhide__ = True  # for pytest, as in gradcheck.py
ITEMS = list | tuple | set | frozenset | deque
NUMBER = np.ndarray | np.number | float | int
METHODS = ("params", "parameters")  # these and their gradients may be methods without arguments
GRADIENTS = [  # the name of a parameter, the name of its gradient
    ("params", "grads"),
    ("parameters", "gradients"),
    ("params", "gradients"),
    ("parameters", "grads"),
    ("data", "grad"),
    ("value", "grad"),
    ("{}", "d{}"),
    ("{}", "grad_{}"),
    ("{}", "{}_grad"),
]


def pair_of(forward: object, backward: Callable | None) -> Pair:
    """The pair of a layer, or of two methods of one layer, with its parameters; or of two functions."""
    layer = forward
    if backward is not None:  # a method may be wrapped: lambda x: layer.forward(x, True)
        layer = getattr(forward, "__self__", getattr(backward, "__self__", None))
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

    Each backward follows a forward at the same point. `restore` gives the arrays their content back.
    """

    def __init__(self, layer: object, forward: Callable, backward: Callable, with_cache: bool) -> None:
        super().__init__(forward, backward)
        self.layer, self.with_cache = layer, with_cache
        self.params: dict[str, Place] | None = None
        self.due: set[str] = set()  # the gradients of parameters, and of arrays that share their memory

    def point(self, inputs) -> dict[str, Array]:
        values = super().point(inputs)
        if self.params is None:
            self.find(values)
        self.restore()
        return values | {name: p.value.copy() for name, p in self.params.items()}

    def find(self, values: dict) -> None:
        """Finds the parameters, after a first backward: then all arrays and gradients exist.

        A parameter keeps a small change of its content in a forward. A buffer or an output does not. A number
        that is the same for 2 dout is no gradient of an array, such as self.dt beside self.t.
        """
        self.params, rng, copies = {}, np.random.default_rng(0), {n: x.copy() for n, x in values.items()}
        out, cache = self(values)
        dout = like(out, np.ones(vector(out).size))
        self.run_backward(dout, cache)
        places = list(walk(self.layer))
        named = [p.value for p in places if p.name and is_float(p.value) and p.value.flags.writeable]
        self.contents = [(array, array.copy()) for array in named]
        for array, content in self.contents:
            change = 1024 * np.finfo(array.dtype).eps * rng.random(array.shape)
            array[...] = content * (1 + change) if content.any() else change
        before = [np.array(p.value) for p in places]
        _, cache = self(copies)
        between = {p.path: np.array(p.value) for p in walk(self.layer)}
        self.run_backward(like(out, 2 * vector(dout)), cache)
        after = {p.path: p for p in walk(self.layer)}
        places = [p._replace(name=None) if p.is_constant(after.get(p.path)) else p for p in places]
        fates: dict[str, list[Place]] = {}
        for p, content in zip(places, before, strict=True):
            kept = np.array_equal(content, between.get(p.path, ()), equal_nan=True)
            same = p.path in after and overlap(after[p.path].value, p.value)
            fates.setdefault(p.fate(same, kept), []).append(p)
        self.share(fates.pop("parameter", []))
        others = [array for p in places if p.name for array in (p.value, p.gradient)]
        for fate, those in fates.items():
            paths = [p.path for p in those if p.name or not any(overlap(p.value, a) for a in others)]
            self.notes += [f"{fate.format(', '.join(paths))}: not checked"] * bool(fate and paths)

    def share(self, places: list[Place]) -> None:
        """Of arrays that share memory the smallest, or else the first, is the parameter."""
        parts: dict[str, Place] = {}
        for p in sorted(places, key=lambda p: p.value.size):
            same = [q for q in parts.values() if overlap(p.value, q.value)]
            if not same:
                parts[p.name] = p
            elif p.views() != same[0].views():
                names = same[0].name + ", ..." * (len(same) > 1)
                self.notes.append(f"{p.path} shares its memory: checked only as {names}, against the total")
        self.params = {p.name: p for p in places if parts.get(p.name) is p}
        self.state, self.due = {p.path: p.value for p in self.params.values()}, {p.name for p in places}

    def label(self, name: str) -> str:
        if name not in self.params:
            return super().label(name)
        return f"self.{name}" if name in map(super().label, self.names) else name

    def __call__(self, values: dict) -> tuple:
        for name, p in self.params.items():
            p.value[...] = values[name]  # in place: the layer may have another name for the array
        return super().__call__({n: x for n, x in values.items() if n not in self.params})

    def judgeable(self, result) -> tuple:
        if not self.with_cache:
            result = (getattr(self.layer, "output", None) if result is None else result), None
        return super().judgeable(result)

    def answer(self, dout, cache, values: dict) -> dict[str, Array | None]:
        _, cache = self(values)
        for p in walk(self.layer):
            if p.name in self.due:
                p.clear()
        dx, inputs = self.run_backward(dout, cache), {n: x for n, x in values.items() if n not in self.params}
        grads = {p.name: p.gradient for p in walk(self.layer)}
        params = {n: None if grads.get(n) is None else numbers(n, grads[n]) for n in self.params}
        if dx is not None and not inputs:
            raise UserError("backward returns a gradient, and no input is a float array: pass floats, as in "
                            "x.astype(float), or return None")  # fmt: skip
        return (self.by_path(dx, inputs) if inputs else {}) | params

    def run_backward(self, dout, cache):
        """Calls backward with a copy of dout, which the layer may keep. dout gets the copy's content."""
        copy = like(dout, vector(dout))
        dx = self.backward(copy, cache) if self.with_cache else self.backward(copy)
        for mine, other in zip(as_tuple(dout), as_tuple(copy), strict=True):
            if isinstance(mine, np.ndarray):
                mine[...] = other
        return getattr(self.layer, "dinputs", None) if dx is None else dx


class Place(NamedTuple):
    """A float array in a layer, or another array or number with a gradient beside it."""

    path: str
    name: str | None  # of the gradient; None: no gradient is beside the array
    value: Array | float
    gradient: object
    store: Callable | None  # puts another gradient in its place

    def views(self) -> list:
        """The memory, shape and strides of the array and of the gradient, or a gradient that is no array."""
        return [getattr(a, "__array_interface__", a) for a in (self.value, self.gradient)]

    def clear(self) -> None:
        """Sets the gradient to 0, in place where that is possible."""
        if isinstance(self.gradient, np.ndarray) and self.gradient.flags.writeable:
            self.gradient[...] = 0
        elif self.store and isinstance(self.gradient, NUMBER):
            self.store(np.zeros(np.shape(self.gradient))[()])

    def is_constant(self, later: Place | None) -> bool:
        """Whether the gradient is a number beside an array, and the same object `later`, for another dout."""
        g, is_array = self.gradient, np.ndim(self.value) > 0
        return is_array and type(g) in (int, float) and g != 0 and later is not None and later.gradient is g

    def fate(self, same: bool, kept: bool) -> str:
        """The note, "parameter" or "". same: no other array has this path now. kept: its content stays."""
        if self.name is None:
            return "no gradient is beside {}" * (same and kept)
        if not (same and kept):
            return "forward overwrites {}" * same + "another array replaces {}" * kept
        if not is_float(self.value):
            return "{} is no float64 array, such as np.array(0.25)"
        if self.value.dtype != np.float64 or not self.value.flags.writeable:
            kind = self.value.dtype if self.value.flags.writeable else "read-only"
            raise UserError(f"{self.path} is {kind}: parameters must be float64 arrays")
        return "parameter"


def overlap(a: object, b: object) -> bool:
    """Whether a and b are the same, or arrays that share memory."""
    return a is b or isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and np.shares_memory(a, b)


def walk(owner: object, path: str = "", seen: set | None = None) -> Iterator[Place]:
    """Every float array in a layer and in its layers, and every array or number with a gradient beside it."""
    seen = set() if seen is None else seen
    owner = getattr(owner, "__self__", owner) if isinstance(owner, MethodType) else owner
    items = list(owner.values()) if isinstance(owner, dict) else owner if isinstance(owner, ITEMS) else ()
    attributes = _attributes(owner)
    if id(owner) in seen or isinstance(owner, type | ModuleType) or not (attributes or items):
        return
    seen.add(id(owner))
    for i, item in enumerate(items):
        yield from walk(item, f"{path}[{i}]", seen)
    before = f"{path}." if path else ""
    for name in attributes:
        names = [gradient.format(name) for parameter, gradient in GRADIENTS if parameter in (name, "{}")]
        beside = next((gradient for gradient in names if hasattr(owner, gradient)), None)
        here, value = _content(owner, name)
        there, nest = _content(owner, beside) if beside else ("", None)
        grads, parts = dict(leaves(nest, ".")) | {".": nest}, list(leaves(value, "."))
        keys = [at if at in grads else re.sub(r"\['(\w+)'\]$", r"['d\1']", at) for at, _ in parts]
        if nest is not None and not any(key in grads for key in keys):  # gradients of other parameters
            beside = None
        store = partial(setattr, owner, beside) if beside in attributes else None
        for (at, leaf), key in zip(parts, keys, strict=True):
            g = grads.get(key)
            number = isinstance(leaf, NUMBER) and np.asarray(leaf).dtype.kind in "iufc"
            if is_float(leaf) or (number and g is not None):
                full = before + there + at[1:] if beside else None
                yield Place(before + here + at[1:], full, leaf, g, store if at == "." else None)
            elif not isinstance(leaf, np.ndarray):
                yield from walk(leaf, before + here + at[1:], seen)


def _attributes(owner: object) -> list[str]:
    """The names of an object's attributes and slots, and of properties and class attributes beside them."""
    if not (hasattr(owner, "__dict__") or hasattr(owner, "__slots__")):  # such as a word of a vocabulary
        return []
    slots = [name for kind in type(owner).__mro__ if "__slots__" in vars(kind)
             for name, value in vars(kind).items() if isinstance(value, MemberDescriptorType)]  # fmt: skip
    own = [*getattr(owner, "__dict__", ()), *slots]
    patterns = [gradient.format("(.+)") for parameter, gradient in GRADIENTS if parameter == "{}"]
    beside = [match[1] for name in own for pattern in patterns if (match := re.fullmatch(pattern, name))]
    shared = [name for kind in type(owner).__mro__ for name, value in vars(kind).items()
              if not isinstance(value, type) and callable(getattr(value, "backward", None))]  # fmt: skip
    return [name for name in dict.fromkeys([*METHODS, *own, *beside, *shared]) if hasattr(owner, name)]


def _content(owner: object, name: str) -> tuple[str, object]:
    """An attribute's name and value; for a method in the table, its result. Other containers become lists."""
    value = getattr(owner, name)
    if name in sum(GRADIENTS[:4], ()) and callable(value):
        name, value = f"{name}()", value()
        value = value if isinstance(value, dict | list | tuple | None) else list(value)
    if isinstance(value, ITEMS) or (isinstance(value, np.ndarray) and value.dtype == object):
        value = list(value)
    return name, value
