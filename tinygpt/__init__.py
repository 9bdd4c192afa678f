"""tinygpt: a GPT's whole life in NumPy, with every gradient written by hand and a small C core."""

from .gradcheck import assert_gradients, gradcheck

__version__ = "0.1.0"
__all__ = ["GPT", "GPTConfig", "assert_gradients", "gradcheck"]


def __getattr__(name: str):
    """`tinygpt.GPT` and `tinygpt.GPTConfig`, imported at first use: they load the C core."""
    if name in ("GPT", "GPTConfig"):
        from . import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
