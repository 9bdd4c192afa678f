"""The safetensors format: 8 bytes of length, a JSON header of that length, the tensors.

Reading never trusts a file: the library checks that header, sizes and places fit each other and the file, and
tensors are read part by part into memory that the caller has. Half precision becomes whole on the way.

Not here: names, which are `checkpoint`'s; other types than F32, F16 and BF16; big-endian machines.

Reference: https://github.com/huggingface/safetensors, "Format".
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import UserError
from .jsonfile import MOST_BYTES, parse

Array = np.ndarray

TYPES = {  # as stored, and how that becomes numbers
    "F32": ("<f4", lambda values: values),
    "F16": ("<f2", lambda values: values),
    "BF16": ("<u2", lambda values: (values.astype(np.uint32) << 16).view(np.float32)),  # the upper half
}
PART = 1 << 20  # numbers read at a time


class Tensor(NamedTuple):
    """Where a tensor lies in a file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self, out: Array) -> None:
        """Fills `out`, contiguous and of this shape. Raises UserError for a type that is not supported."""
        for part, values in self._parts(out):
            part[:] = values

    def equals(self, other: Array) -> bool:
        """Whether `other`, contiguous, has this shape and these values."""
        return self.shape == other.shape and all(np.array_equal(*parts) for parts in self._parts(other))

    def _parts(self, array: Array) -> Iterator[tuple[Array, Array]]:
        """Yields part after part of the array, flat, and the file's values for it."""
        if self.dtype not in TYPES:
            raise UserError(f"{self.path}: holds {self.dtype}; supported are {', '.join(TYPES)}")
        stored, convert = TYPES[self.dtype]
        flat = array.reshape(-1)
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            for i in range(0, flat.size, PART):
                part = flat[i : i + PART]
                values = np.fromfile(file, stored, part.size)
                if values.size != part.size:
                    raise UserError(f"{self.path}: ends too early: get it again")
                yield part, convert(values)


def tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors by name, none of them read yet, and its metadata. Raises UserError for a bad file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MOST_BYTES:
                raise ValueError(f"a header of {length:,} bytes")
            header = parse(file.read(length).decode())
        with safe_open(path, "np"):
            pass
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path}: is no safetensors file, or damaged ({str(error)[:80]})") from None
    metadata = header.pop("__metadata__", None) or {}
    offsets = {name: 8 + length + t["data_offsets"][0] for name, t in header.items()}
    return {n: Tensor(path, t["dtype"], tuple(t["shape"]), offsets[n]) for n, t in header.items()}, metadata


def write(path: Path, tensors: dict[str, Array], metadata: dict[str, str]) -> None:
    """Writes tensors as float32. Where `path` must not be seen half written, it is one of `atomic.replacing`.

    Not by the library, which writes through temporary files of its own that a kill leaves behind.
    """
    header, end = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.size
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors lie at multiples of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor, "<f4"))
