"""Layers of every convention: the checker accepts a right one, and catches a factor of 1.01 in a gradient."""

import dataclasses
import re
from collections import deque, namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import tinygpt
from tinygpt.check import layers
from tinygpt.check.gradcheck import gradcheck
from tinygpt.errors import UserError

X = np.random.default_rng(5).standard_normal((4, 3))


def weights():
    return np.random.default_rng(6).standard_normal((3, 2)), np.zeros(2)


class Lists:
    """The textbook "Deep Learning from Scratch", volume 2: params and grads are lists."""

    PARAMETERS, GRADIENTS = "params", "grads"

    def __init__(self, factor):
        self.factor = factor
        vars(self)[self.PARAMETERS] = [*weights()]
        vars(self)[self.GRADIENTS] = [np.zeros_like(p) for p in weights()]

    def forward(self, x):
        self.x = x
        W, b = vars(self)[self.PARAMETERS]
        return x @ W + b

    def backward(self, dout):
        dW, db = vars(self)[self.GRADIENTS]
        dW[...] = self.factor * self.x.T @ dout
        db[...] = dout.sum(0)
        return dout @ vars(self)[self.PARAMETERS][0].T


class MixedNames(Lists):
    GRADIENTS = "gradients"


class Attributes:
    """Volume 1 of that textbook, and CS231n: W, b, dW, db."""

    def __init__(self, factor):
        self.factor, (self.W, self.b), self.dW, self.db = factor, weights(), None, None

    def forward(self, x):
        self.x = x
        return x @ self.W + self.b

    def backward(self, dout):
        self.dW, self.db = self.factor * self.x.T @ dout, dout.sum(0)
        return dout @ self.W.T


class Stored:
    """The book "Neural Networks from Scratch": nothing is returned."""

    def __init__(self, factor):
        self.factor, (self.weights, self.biases) = factor, weights()

    def forward(self, inputs):
        self.inputs = inputs
        self.output = inputs @ self.weights + self.biases

    def backward(self, dvalues):
        self.dweights, self.dbiases = self.factor * self.inputs.T @ dvalues, dvalues.sum(0)
        self.dinputs = dvalues @ self.weights.T


class Methods(Attributes):
    def params(self):
        return {"W": self.W, "b": self.b}

    def grads(self):
        return {"W": self.dW, "b": self.db}


class LongNames(Lists):
    """parameters and gradients, as methods that return lists."""

    def parameters(self):
        return self.params

    def gradients(self):
        return self.grads


class Dictionaries:
    """A nest, a parameter that is None, and gradients called dW, which add up from call to call."""

    def __init__(self, factor):
        W, b = weights()
        self.factor, self.params = factor, {"fc": {"W": W, "b": b}, "none": None}
        self.grads = {"fc": {"dW": np.zeros_like(W), "db": np.zeros_like(b)}}

    def forward(self, x):
        self.x = x
        return x @ self.params["fc"]["W"] + self.params["fc"]["b"]

    def backward(self, dout):
        self.grads["fc"]["dW"] += self.factor * self.x.T @ dout
        self.grads["fc"]["db"] += dout.sum(0)
        return dout @ self.params["fc"]["W"].T


class Prefixed:
    """grad_w beside w; and a callable object without forward."""

    def __init__(self, factor):
        self.factor, (self.w, self.b) = factor, weights()

    def __call__(self, x):
        self.x = x
        return x @ self.w + self.b

    def backward(self, dout):
        self.grad_w, self.b_grad = self.factor * self.x.T @ dout, dout.sum(0)
        return dout @ self.w.T


class Objects:
    """Parameters are objects with data and grad, as in PyTorch."""

    def __init__(self, factor):
        self.factor = factor
        self.weight, self.bias = (SimpleNamespace(data=p, grad=np.zeros_like(p)) for p in weights())

    def forward(self, x):
        self.x = x
        return x @ self.weight.data + self.bias.data

    def backward(self, dout):
        self.weight.grad += self.factor * self.x.T @ dout
        self.bias.grad += dout.sum(0)
        return dout @ self.weight.data.T


class WithCache:
    """A layer that returns its cache, as functions of this project do."""

    def __init__(self, factor):
        self.factor, (self.W, self.b) = factor, weights()

    def forward(self, x):
        return x @ self.W + self.b, x

    def backward(self, dout, x):
        self.dW, self.db = self.factor * x.T @ dout, dout.sum(0)
        return dout @ self.W.T


class Relu:
    """Without parameters."""

    def __init__(self, factor):
        self.factor = factor

    def forward(self, x):
        self.mask = x > 0
        return x * self.mask

    def backward(self, dout):
        return self.factor * dout * self.mask


class Network:
    """Layers in a list and in a dict. One layer is reachable in two ways."""

    def __init__(self, factor):
        last = Stored(factor)
        last.weights, last.biases = last.weights.T.copy(), np.zeros(3)
        self.layers, self.named = [Attributes(1), Relu(1)], {"last": last}
        self.again = self.layers[0]

    def forward(self, x):
        for layer in self.layers:
            x = layer.forward(x)
        self.named["last"].forward(x)
        return self.named["last"].output

    def backward(self, dout):
        self.named["last"].backward(dout)
        dout = self.named["last"].dinputs
        for layer in reversed(self.layers):
            dout = layer.backward(dout)
        return dout


class Buffers(Attributes):
    """Arrays that every call fills again. They are no parameters, though dx is beside x."""

    def __init__(self, factor):
        super().__init__(factor)
        self.x, self.dx = np.empty((4, 3)), np.empty((4, 3))

    def forward(self, x):
        np.copyto(self.x, x)
        return self.x @ self.W + self.b

    def backward(self, dout):
        self.dx[...] = super().backward(dout)
        return self.dx


class Flat(Attributes):
    """All parameters are views of one array, and so are their gradients, as in llm.c."""

    def __init__(self, factor):
        self.factor, self.dflat = factor, np.zeros(8)
        self.flat = np.concatenate([p.ravel() for p in weights()])
        self.W, self.b = self.parts(self.flat)
        self.dW, self.db = self.parts(self.dflat)

    def parts(self, flat):
        return flat[:6].reshape(3, 2), flat[6:]

    def backward(self, dout):
        self.dW[...], self.db[...] = self.factor * self.x.T @ dout, dout.sum(0)
        return dout @ self.W.T


class NewViews(Flat):
    """Methods that make new views at every call."""

    parameters = lambda self: self.parts(self.flat)  # noqa: E731
    gradients = lambda self: self.parts(self.dflat)  # noqa: E731


class Late(Attributes):
    """A method that gives the gradients only after a backward, and gives copies."""

    def __init__(self, factor):
        self.factor, (self.W, self.b) = factor, weights()

    parameters = lambda self: [self.W, self.b]  # noqa: E731
    gradients = lambda self: [self.dW.copy(), self.db.copy()]  # noqa: E731


class InLists(Attributes):
    def backward(self, dout):
        dx = super().backward(dout)
        self.dW, self.db = self.dW.tolist(), self.db.tolist()
        return dx


class Constant(Attributes):
    """A gradient to which nobody can write."""

    def forward(self, x):
        return super().forward(x) + self.W.sum()

    def backward(self, dout):
        dx = super().backward(dout)
        self.dW = np.broadcast_to(self.factor * (dout.sum() + self.x.T @ dout), (3, 2))
        self.dW.flags.writeable = False
        return dx


class Number:
    """A gradient that is a number and adds up from call to call."""

    __slots__ = ("factor", "scale", "dscale", "x")

    def __init__(self, factor):
        self.factor, self.scale, self.dscale = factor, np.array(1.5), 0.0

    def forward(self, x):
        self.x = x
        return x * self.scale

    def backward(self, dout):
        self.dscale += self.factor * float((dout * self.x).sum())
        return dout * self.scale


class Slots:
    __slots__ = ("b", "db", "factor")

    def __init__(self, factor):
        self.factor, self.b, self.db = factor, np.ones(3), None

    def forward(self, x):
        return x + self.b

    def backward(self, dout):
        self.db = self.factor * dout.sum(0)
        return dout


class Shared(Slots):
    """b belongs to the class."""

    b = np.ones(3)

    def __init__(self, factor):
        self.factor = factor


class Containers:
    """Layers in a deque, in a set and in an array of objects."""

    def __init__(self, factor):
        self.first, self.second = deque([Slots(factor)]), {Slots(1)}
        self.third = np.array([Slots(1)], object)

    def forward(self, x):
        for layer in (*self.first, *self.second, *self.third):
            x = layer.forward(x)
        return x

    def backward(self, dout):
        for layer in (*self.first, *self.second, *self.third):
            layer.backward(dout)
        return dout


NAMES = {
    Lists: ["grads[0]", "grads[1]"],
    Attributes: ["dW", "db"],
    Stored: ["dweights", "dbiases"],
    Methods: ["grads()['W']", "grads()['b']"],
    LongNames: ["grads[0]", "grads[1]"],
    MixedNames: ["gradients[0]", "gradients[1]"],
    Dictionaries: ["grads['fc']['W']", "grads['fc']['b']"],
    Prefixed: ["grad_w", "b_grad"],
    Objects: ["weight.grad", "bias.grad"],
    WithCache: ["dW", "db"],
    Relu: [],
    Network: ["named['last'].dweights", "layers[0].dW", "layers[0].db", "named['last'].dbiases"],
    Buffers: ["dW", "db"],
    Flat: ["dW", "db"],
    NewViews: ["gradients()[0]", "gradients()[1]"],
    Late: ["gradients()[0]", "gradients()[1]"],
    InLists: ["dW", "db"],
    Constant: ["dW", "db"],
    Number: ["dscale"],
    Slots: ["db"],
    Shared: ["db"],
    Containers: ["first[0].db", "second[0].db", "third[0].db"],
}
NOTES = {
    Buffers: ("forward overwrites x: not checked",),
    Flat: ("flat shares its memory: checked only as db, ..., against the total",),
    NewViews: ("flat shares its memory: checked only as gradients()[1], ..., against the total",),
    Late: tuple(f"{name} shares its memory: checked only as gradients()[{i}], against the total"
                for i, name in ((1, "b"), (0, "W"))),
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMES)
def test_each_convention(kind):
    """Guards: an AttributeError at a line of tinygpt, and a parameter that nobody checked."""
    layer = kind(1)
    results = gradcheck(layer, X)
    dx = "dinputs" if kind is Stored else "dx"
    assert results[0].name == dx and {r.name for r in results[1:]} == set(NAMES[kind])
    assert all(r.ok for r in results) and results[0].notes == NOTES.get(kind, ()), results
    tinygpt.assert_gradients(layer, lambda rng: {dx[1:]: rng.standard_normal((4, 3))})
    wrong = {r.name: r for r in gradcheck(kind(1.01), X) if not r.ok}
    assert list(wrong) == [NAMES[kind][0] if NAMES[kind] else "dx"]
    assert next(iter(wrong.values())).diagnosis == "it is 1.01 times the right one"


@pytest.mark.parametrize("kind", [kind for kind in NAMES if hasattr(kind, "forward")])
def test_two_methods_are_a_layer(kind):
    """Guards: the pair form, which the README promises, with bound methods."""
    layer = kind(1)
    tinygpt.assert_gradients(layer.forward, layer.backward, X)
    layer = kind(1.01)
    with pytest.raises(AssertionError, match=r"(?s)relative error.*\nlikely it is 1.01 times the right one"):
        tinygpt.assert_gradients(layer.forward, layer.backward, X)


def test_a_layer_is_as_it_was_afterwards():
    """Guards: a check that changes the model."""
    for kind in Lists, Network:
        layer = kind(1)
        before = layer.forward(X)
        gradcheck(layer, X)
        np.testing.assert_array_equal(layer.forward(X), before)


def test_a_layer_that_has_run_before_is_the_same():
    """Guards: an input that the layer has stored, mistaken for a parameter."""
    layer = Stored(1)
    layer.forward(X)
    layer.backward(np.ones((4, 2)))
    assert [r.name for r in gradcheck(layer, X)] == ["dinputs", "dweights", "dbiases"]


def test_an_exception_of_a_layer_is_its_own():
    """Guards: an error of the checker's own cleanup, which hides the layer's error."""
    with pytest.raises(ValueError, match="mismatch"):
        gradcheck(Lists(1), np.ones((4, 7)))


def test_a_shape_that_is_wrong_in_a_large_or_an_empty_tensor():
    """Guards: a diagnosis that takes 10,000 forwards, or that raises an exception."""
    for x in np.ones((100, 30)), np.ones((0, 3)):
        forward, backward = lambda x, y: ((2 * x, y + 0), None), lambda douts, c: (douts[0].T, douts[1])
        (wrong, *_) = gradcheck(forward, backward, [x, np.ones(2)])
        assert "its shape is" in wrong.problem and not wrong.diagnosis


class InOrder:
    """Layers in a container."""

    def forward(self, x):
        for layer in self:
            x = layer.forward(x)
        return x

    def backward(self, dout):
        for layer in reversed(list(self)):
            dout = layer.backward(dout)
        return dout


class ListOfLayers(InOrder, list):
    pass


class DictOfLayers(InOrder, dict):
    def __iter__(self):
        return iter(self.values())


class BoundMethods(InOrder):
    def __init__(self, layers):
        self.steps = [(layer.forward, layer.backward) for layer in layers]

    def __iter__(self):
        return (SimpleNamespace(forward=forward, backward=backward) for forward, backward in self.steps)


def of_the_class(layers):
    layer = layers[0]

    class Net:
        only = layer
        forward = staticmethod(lambda x: layer.forward(x))
        backward = staticmethod(lambda dout: layer.backward(dout))

    return Net()


@pytest.mark.parametrize("net", [
    ListOfLayers, lambda layers: DictOfLayers(enumerate(layers)), BoundMethods, of_the_class,
    lambda layers: SimpleNamespace(forward=layers[0].forward, backward=layers[0].backward),
])  # fmt: skip
def test_layers_are_seen_wherever_a_net_has_them(net):
    """Guards: a wrong dW of a layer in a container that nobody looked into, and the verdict ok."""
    assert all(r.ok for r in gradcheck(net([Attributes(1)]), X))
    wrong = [r.name for r in gradcheck(net([Attributes(1.01)]), X) if not r.ok]
    assert len(wrong) == 1 and wrong[0].endswith("dW")


def test_a_method_in_a_function_has_its_layer():
    """Guards: parameters that are not checked, because forward takes one more argument."""
    layer = Attributes(1.01)
    results = gradcheck(lambda x: layer.forward(x), layer.backward, X)
    assert [r.name for r in results if not r.ok] == ["dW"]


def test_an_input_of_integers_has_no_gradient():
    """Guards: the verdict ok for a dx that nobody compared."""
    with pytest.raises(UserError, match="no input is a float array"):
        gradcheck(Attributes(1), np.ones((4, 3), int))


def test_a_constant_is_no_gradient():
    """Guards: `dt`, a step of time, that the checker sets to 0 because `t` is an array."""
    class Euler(Attributes):
        def __init__(self, factor):
            super().__init__(factor)
            self.t, self.dt = np.ones(2), 0.25

        def forward(self, x):
            return super().forward(x) * self.dt * self.t

        def backward(self, dout):
            return super().backward(dout * self.dt * self.t)

    layer = Euler(1)
    assert all(r.ok for r in gradcheck(layer, X)) and layer.dt == 0.25
    with pytest.warns(UserWarning, match="no gradient is beside t: not checked"):
        tinygpt.assert_gradients(layer, X)


@pytest.mark.parametrize("start", [None, 0, 0.5])
def test_a_number_is_a_wrong_gradient_of_an_array(start):
    """Guards: the verdict ok for a sum over all axes, because a number may be a constant."""
    class Total(Attributes):
        def __init__(self, factor):
            super().__init__(factor)
            self.db = start

        def backward(self, dout):
            dx = super().backward(dout)
            self.db = float(dout.sum())
            return dx

    assert "its shape is ()" in {r.name: r.problem for r in gradcheck(Total(1), X)}["db"]


def test_what_has_no_gradient_is_said():
    """Guards: no word about a parameter whose gradient the layer forgot."""
    class Forgets(Attributes):
        def __init__(self):
            super().__init__(1)
            self.scale = np.ones(2)

        def forward(self, x):
            return super().forward(x) * self.scale

    assert gradcheck(Forgets(), X)[0].notes == ("no gradient is beside scale: not checked",)

    class Updates(Attributes):
        def backward(self, dout):
            dx = super().backward(dout)
            self.W = self.W - 0.1 * self.dW
            return dx

    assert "another array replaces W: not checked" in gradcheck(Updates(1), X)[0].notes

    class OfOthers(Attributes):
        """`parameters` is for an optimizer, `grads` for a plot: dW and db are beside W and b."""

        def parameters(self):
            return [self.W, self.b]

        def backward(self, dout):
            dx = super().backward(dout)
            self.grads = {"W": self.dW}
            return dx

    assert [(r.name, r.verdict) for r in gradcheck(OfOthers(1), X)] == [(n, "ok") for n in ("dx", "dW", "db")]

    class Both(Lists):
        PARAMETERS, GRADIENTS, grads = "parameters", "gradients", None

    assert all(r.ok for r in gradcheck(Both(1), X))

    class Half(Methods):
        def grads(self):
            return {"b": self.db}

    verdicts = {r.name: r.verdict for r in gradcheck(Half(1), X)}
    assert verdicts == {"dx": "ok", "grads()['W']": "missing", "grads()['b']": "ok"}


def changed_layer(forward=Attributes.forward, backward=Attributes.backward, **attributes):
    """Attributes with another forward or backward and with more attributes."""
    layer = type("Changed", (Attributes,), {"forward": forward, "backward": backward})(1)
    vars(layer).update(attributes)
    return layer


def after_backward(change):
    """The right backward, and then a change."""

    def backward(layer, dout):
        dx = Attributes.backward(layer, dout)
        change(layer)
        return dx

    return backward


def before_forward(change):
    def forward(layer, x):
        change(layer)
        return Attributes.forward(layer, x)

    return forward


def setting(name, value):
    return lambda layer: setattr(layer, name, value(layer))


@pytest.mark.parametrize("layer, notes", [
    (changed_layer(before_forward(setting("W", lambda layer: layer.W.clip(-9, 9))),
                   after_backward(setting("dW", lambda layer: 7 * layer.dW))),
     ["another array replaces W: not checked"]),
    (changed_layer(backward=after_backward(setting("dalpha", lambda layer: 7.0)), alpha=0.25),
     ["alpha is no float64 array, such as np.array(0.25): not checked"]),
    (changed_layer(backward=after_backward(setting("db", lambda layer: 7 * layer.db)), b=np.arange(2)),
     ["b is no float64 array, such as np.array(0.25): not checked"]),
    (changed_layer(before_forward(lambda layer: np.copyto(layer.b, layer.W[0]))),
     ["forward overwrites b: not checked"]),
])  # fmt: skip
def test_a_gradient_that_is_not_checked_is_said(layer, notes):
    """Guards: a wrong gradient beside which nothing is said."""
    dx, *rest = gradcheck(layer, X)
    assert list(dx.notes) == notes and not {"dalpha"} & {r.name for r in rest}


@pytest.mark.parametrize("change, name", [
    (lambda layer: np.copyto(layer.b, layer.db), "b"),
    (lambda layer: np.subtract(layer.W, 0.1 * layer.dW, out=layer.W), "W"),
])  # fmt: skip
def test_a_backward_that_writes_to_its_parameter_is_caught(change, name):
    """Guards: a step of gradient descent inside backward, and a gradient that is stored in the parameter."""
    (wrong,) = gradcheck(changed_layer(backward=after_backward(change)), X)
    assert str(wrong) == f"{name}: backward writes to it"


@pytest.mark.parametrize("value, says", [
    (lambda layer: layer.db + 5j, "complex128 for db"), (lambda layer: layer.db.astype(str), "<U32 for db"),
    (lambda layer: [1, [2, 3]], "object for db"), (lambda layer: {"rows": layer.db}, "object for db"),
    (lambda layer: layer.db > 0, "bool for db"),
])  # fmt: skip
def test_a_gradient_that_is_no_number_is_refused(value, says):
    """Guards: a TypeError of the checker, and ok for a complex gradient."""
    with pytest.raises(UserError, match=f"^backward returns {says}; it must return numbers$"):
        gradcheck(changed_layer(backward=after_backward(setting("db", value))), X)


def test_two_gradients_of_one_name_are_two_results():
    """Guards: the gradient of the input x, hidden by that of a parameter x."""
    class Same:
        def __init__(self):
            self.x = np.ones(3)

        def forward(self, x):
            return x + self.x

        def backward(self, dout):
            self.dx = dout.sum(0)
            return 7 * dout

    assert [(r.name, r.verdict) for r in gradcheck(Same(), X)] == [("dx", "wrong"), ("self.dx", "ok")]


@pytest.mark.parametrize("view", [lambda W: W, lambda W: W.T], ids=["itself", "transposed"])
def test_parameters_that_share_memory_are_one(view):
    """Guards: the total gradient of a tied weight called wrong, and no word about a second gradient."""
    class Tied:
        def __init__(self, share):
            self.W, self.share, self.V = np.random.default_rng(0).standard_normal((3, 3)), share, None
            self.V = view(self.W)

        def forward(self, x):
            self.x, self.h = x, np.tanh(x @ self.W)
            return self.h @ self.V

        def backward(self, dout):
            dh = (dout @ self.V.T) * (1 - self.h**2)
            self.dW = self.x.T @ dh + view(self.h.T @ dout)
            self.dV = view(self.dW) if self.share else 7 * self.dW
            return dh @ self.W.T

    note = ("V shares its memory: checked only as dW, against the total",)
    for share in True, False:
        dx, dW = gradcheck(Tied(share), X)
        silent = share and Tied(share).V.strides == Tied(share).W.strides
        assert dx.ok and dW.ok and dx.notes == (() if silent else note)


def test_methods_without_gradients_are_missing():
    class Empty(Methods):
        grads = lambda self: None  # noqa: E731

    assert [r.verdict for r in gradcheck(Empty(1), X)] == ["ok", "missing", "missing"]


def test_a_layer_of_ids_has_no_gradient_of_its_input():
    class Embedding:
        def __init__(self):
            self.W = np.random.default_rng(0).standard_normal((5, 3))

        def forward(self, ids):
            self.ids = ids
            return self.W[ids]

        def backward(self, dout):
            self.dW = np.zeros_like(self.W)
            np.add.at(self.dW, self.ids, dout)

    assert [(r.name, r.verdict) for r in gradcheck(Embedding(), np.array([1, 3, 3]))] == [("dW", "ok")]


def test_a_layer_that_writes_to_dout_is_caught():
    """Guards: a relu that spoils the gradient of a residual stream beside it."""
    class InPlace(Relu):
        def backward(self, dout):
            dout[~self.mask] = 0
            return dout

    assert [str(r) for r in gradcheck(InPlace(1), X)] == ["dout: backward writes to it"]


def test_an_array_that_is_a_gradient_and_dout_is_no_mistake():
    """Guards: dout set to 0, because the bias stores dout as its gradient."""
    class Bias:
        def __init__(self):
            self.b = np.ones(3)

        def forward(self, x):
            return x + self.b

        def backward(self, dout):
            self.db = dout
            return dout

    assert all(r.ok for r in gradcheck(Bias(), np.ones(3)))


def test_parameters_of_float32_are_refused():
    single, fixed = changed_layer(W=weights()[0].astype(np.float32)), changed_layer(W=weights()[0])
    fixed.W.flags.writeable = False
    for layer, says in (single, "float32"), (fixed, "read-only"):
        with pytest.raises(UserError, match=f"^W is {says}: parameters must be float64 arrays"):
            gradcheck(layer, X)


@pytest.mark.parametrize("thing, says", [
    (SimpleNamespace(), "a SimpleNamespace has no backward"), (Attributes, "Attributes is a class: make an"),
    (SimpleNamespace(backward=len), "a SimpleNamespace has no forward"), (np.sin, "sin has no backward"),
])  # fmt: skip
def test_the_conventions_are_printed(thing, says):
    """Guards: an AttributeError for an object that is no layer."""
    with pytest.raises(UserError, match=f"^{says}") as error:
        gradcheck(thing, X)
    table = layers.__doc__.split("\n\n")[1]
    assert table in str(error.value) and all(a in table or g in table for a, g in layers.GRADIENTS[:2])


# --- inputs ------------------------------------------------------------------------------------------------


def nested_forward(x, scale):
    return scale * x["a"] * x["more"][0].sum(), (x, scale)


def nested_backward(dout, cache):
    x, scale = cache
    total = scale * (dout * x["a"]).sum()
    return {"a": scale * dout * x["more"][0].sum(), "more": [np.full(2, total), None]}


def nest():
    rng = np.random.default_rng(0)
    return {"a": rng.standard_normal(3), "more": [rng.standard_normal(2), np.arange(4)]}


def test_inputs_may_be_nests():
    """Guards: a message about a dict of weights that named something else."""
    inputs = {"x": nest(), "scale": 0.5}
    results = gradcheck(nested_forward, nested_backward, inputs)
    assert [(r.name, r.ok) for r in results] == [("dx['a']", True), ("dx['more'][0]", True)]

    def factor(dout, cache):
        dx = nested_backward(dout, cache)
        return dx | {"a": 1.01 * dx["a"]}

    wrong, right = gradcheck(nested_forward, factor, inputs)
    assert (wrong.name, wrong.verdict, right.ok) == ("dx['a']", "wrong", True)
    half, _ = gradcheck(nested_forward, lambda d, c: nested_backward(d, c) | {"a": None}, inputs)
    assert half.verdict == "missing"
    with pytest.raises(UserError, match=r"no gradient for x\['a'\]; .*, and a nest of numbers for a nest"):
        gradcheck(nested_forward, lambda d, c: np.ones(3), inputs)
    two = [nest()["a"], [np.ones(3), np.ones(3)]]
    forward = lambda x, ys: (x * ys[0] + ys[1], (x, ys))  # noqa: E731
    tinygpt.assert_gradients(forward, lambda d, c: (d * c[1][0], [d * c[0], d.copy()]), two)
    alone = lambda ys: (ys[0] * ys[1], ys)  # noqa: E731
    tinygpt.assert_gradients(alone, lambda d, ys: [d * ys[1], d * ys[0]], {"ys": two[1]})


def test_what_is_no_plain_nest_is_passed_on():
    """Guards: a named tuple that arrives as a tuple; a configuration that arrives as a dict."""
    Point = namedtuple("Point", "x y")

    @dataclasses.dataclass
    class Config:
        scale: np.ndarray

    def forward(point, config, words):
        assert type(words) is deque
        return point.x * point.y * config.scale, (point, config)

    def backward(dout, cache):
        point, config = cache
        return [[dout * point.y * config.scale, dout * point.x * config.scale]]

    inputs = {"point": Point(X, X + 1), "config": Config(np.array(3.0)), "words": deque(["a"])}
    results = gradcheck(forward, backward, inputs)
    assert [(r.name, r.ok) for r in results] == [("dpoint[0]", True), ("dpoint[1]", True)]


@pytest.mark.parametrize("inputs", [{"x": 0.5}, (0.5,), {"x": [1.5, np.arange(2)]}])
def test_a_number_is_named(inputs):
    """Guards: "no input is a float array" beside a number that looks like one."""
    with pytest.raises(UserError, match=r"x(\[0\])? is a Python number: pass np.array\((0|1).5\)"):
        gradcheck(lambda x: (x, None), lambda dout, cache: dout, inputs)


def test_a_gradient_for_a_number_is_named():
    forward = lambda x, s: (x * s, (x, s))  # noqa: E731
    backward = lambda d, c: (d * c[1], (d * c[0]).sum())  # noqa: E731
    with pytest.raises(UserError, match=r"2 gradients; .*; s is a Python number: pass np.array\(2.0\)"):
        gradcheck(forward, backward, {"x": X, "s": 2.0})
    tinygpt.assert_gradients(forward, backward, {"x": X, "s": np.array(2.0)})
    tinygpt.assert_gradients(forward, lambda d, c: d * c[1], {"x": X, "s": 2.0})


# --- the diagnosis -----------------------------------------------------------------------------------------


def product(x, w):
    return x @ w, (x, w)


def dproduct(dout, cache):
    x, w = cache
    return dout @ w.T, x.T @ dout


def changed(change):
    def backward(dout, cache):
        dx, dw = dproduct(dout, cache)
        return dx, change(dw, dx)

    return backward


def spoiled(*index):
    def change(dw, dx):
        dw[index] += 1
        return dw

    return changed(change)


CALLS = []


def first_call_only(dout, cache):
    CALLS.append(1)
    dx, dw = dproduct(dout, cache)
    return dx, dw * len(CALLS)


@pytest.mark.parametrize("backward, says", [
    (changed(lambda dw, dx: -dw), "its sign is wrong"),
    (changed(lambda dw, dx: dw / 3), "it is 0.333333 times the right one"),
    (changed(lambda dw, dx: 0 * dw), "it is 0 everywhere"),
    (changed(lambda dw, dx: dw.T), "it is transposed"),
    (lambda dout, cache: dproduct(dout, cache)[::-1], "it is the gradient of x"),
    (changed(lambda dw, dx: dw[None]), "the numbers are right, not the shape"),
    (changed(lambda dw, dx: np.stack([0.3 * dw, 0.7 * dw])), "a sum over axis 0 is missing"),
    (spoiled(1, 2), "it is wrong at [1, 2] only"),
    (spoiled(1), "it is wrong at [1, :] only"),
    (spoiled(slice(None), 0), "it is wrong at [:, 0] only"),
    (lambda dout, cache: dproduct(np.ones_like(dout), cache), "dout is ignored"),
    (first_call_only, "it is right at the first call only"),
    (changed(lambda dw, dx: dw + 0.1), ""),
    (changed(lambda dw, dx: np.where(dw > 0, dw, 0)), ""),
])  # fmt: skip
def test_the_mistake_is_named(backward, says):
    """The inputs are square, so that every exchange has the right shape."""
    CALLS.clear()
    inputs = lambda rng: {"x": rng.standard_normal((4, 4)), "w": rng.standard_normal((4, 4))}  # noqa: E731
    results = {r.name: r for r in gradcheck(product, backward, inputs)}
    assert results["dw"].verdict == "wrong" and results["dw"].diagnosis == says


def test_a_layer_that_keeps_its_first_input_is_diagnosed():
    class Keeps(Attributes):
        def backward(self, dout):
            self.first = getattr(self, "first", self.x.copy())
            dx = super().backward(dout)
            self.dW = self.first.T @ dout
            return dx

    (wrong,) = [r for r in gradcheck(Keeps(1), lambda rng: rng.standard_normal((4, 3))) if not r.ok]
    assert wrong.name == "dW" and wrong.diagnosis.startswith("it passes at the first inputs and is the same")


def test_a_factor_at_one_point_is_no_diagnosis():
    """Guards: the diagnosis of a constant factor where the factor depends on x."""
    for inputs in np.array(2.0), np.array([2.0]):
        (result,) = gradcheck(lambda x: (np.sum(x**3), x), lambda dout, x: dout * x**4, inputs)
        assert result.verdict == "wrong" and not result.diagnosis


def test_uncertain_differences_are_no_evidence():
    """Guards: the diagnosis "the gradient of b", where the differences of b fit every gradient."""
    forward = lambda a, b: ((a * 1, b + 1e15), None)  # noqa: E731
    rolled = lambda dout, cache: (np.roll(dout[0], 1), dout[1])  # noqa: E731
    a, b = gradcheck(forward, rolled, [np.ones(3), np.ones(3)])
    assert (a.verdict, a.diagnosis, b.verdict) == ("wrong", "", "not judged")


def test_only_one_point_is_no_diagnosis():
    forward = lambda p: (np.log(p) if abs(p.sum() - 1) < 1e-4 else 1 / 0, p)  # noqa: E731
    (result,) = gradcheck(forward, lambda dout, p: 2 * dout / p, np.array([0.2, 0.3, 0.5]))
    assert result.verdict == "wrong" and not result.diagnosis


def test_a_page_has_the_conventions():
    """Guards: a table that the program no longer follows."""
    page = (Path(__file__).parents[2] / "demos" / "checker.md").read_text(encoding="utf-8")
    for line in layers.__doc__.split("\n\n")[1].splitlines()[1:]:
        what, convention = re.split(r"  +", line.strip(), maxsplit=1)
        row = re.search(rf"^\| {what} \| (.*) \|$", page, re.MULTILINE)
        assert row and row[1].replace("`", "") == convention, line
