"""tinygpt: a GPT's whole life in NumPy, with every gradient written by hand and a small C core."""

__version__ = "0.1.0"
