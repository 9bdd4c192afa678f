"""tinygpt: a GPT's whole life in NumPy, with every gradient written by hand and a small C core."""

import importlib

__version__ = "0.2.0"
_MODULES = {
    "GPT": "core.model",
    "GPTConfig": "core.model",
    "assert_gradients": "check.gradcheck",
    "gradcheck": "check.gradcheck",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    """`tinygpt.GPT` and the others, imported at first use: they load NumPy and the C core."""
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
