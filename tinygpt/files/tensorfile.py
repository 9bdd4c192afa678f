"""The safetensors format: 8 bytes of length, a JSON header of that length, the tensors.

A file may be damaged or forged. So the header, the sizes and the offsets must fit each other and the file, as
the safetensors library demands. Tensors are read part by part into the caller's memory, and become float32.

Not here: the names of tensors (`checkpoint`), types other than F32, F16 and BF16, big-endian machines.

Reference: https://github.com/huggingface/safetensors, "Format".
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .jsonfile import MOST_BYTES, parse

Array = np.ndarray

TYPES = {  # the type in the file, and the function from such values to numbers
    "F32": ("<f4", lambda values: values),
    "F16": ("<f2", lambda values: values),
    "F64": ("<f8", lambda values: values.astype(np.float32)),
    "BF16": ("<u2", lambda values: (values.astype(np.uint32) << 16).view(np.float32)),  # the upper half
}
SIZES = {  # bytes per number, for all types of the format
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2), **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}  # fmt: skip
PART = 1 << 20  # numbers read at a time


class Tensor(NamedTuple):
    """The place of a tensor in a file, its type and its shape."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self, out: Array) -> None:
        """Fills `out`, contiguous and of this shape. Raises UserError for a type that is not supported."""
        for part, values in self._parts(out):
            part[:] = values

    def part(self, span: slice) -> "Tensor":
        """A flat tensor's numbers from span.start to span.stop."""
        offset = self.offset + span.start * SIZES[self.dtype]
        return self._replace(shape=(span.stop - span.start,), offset=offset)

    def equals(self, other: Array) -> bool:
        """Whether `other`, contiguous, has this shape and these values."""
        return self.shape == other.shape and all(np.array_equal(*parts) for parts in self._parts(other))

    def _parts(self, array: Array) -> Iterator[tuple[Array, Array]]:
        """Yields the parts of the flat array in order, each with its values in the file."""
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
    """The tensors of a file by name, not read yet, and its metadata. Raises UserError for a damaged file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MOST_BYTES:
                raise ValueError(f"a header of {length:,} bytes")
            header = parse(file.read(length).decode())
        if not isinstance(header, dict):
            raise ValueError("the header is not a JSON object")
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if not (isinstance(metadata, dict) and all(type(text) is str for text in metadata.values())):
            raise ValueError("the metadata are not texts")
        _check(header, path.stat().st_size - 8 - length)
    except ValueError as error:
        raise UserError(f"{path}: is not a safetensors file, or damaged ({str(error)[:80]})") from None
    offsets = {name: 8 + length + t["data_offsets"][0] for name, t in header.items()}
    return {n: Tensor(path, t["dtype"], tuple(t["shape"]), offsets[n]) for n, t in header.items()}, metadata


def _check(header: dict, size: int) -> None:
    """Raises ValueError unless the tensors fill `size` bytes in a row, without gaps and overlaps."""
    places = []
    for name, tensor in header.items():
        if not (isinstance(tensor, dict) and {"dtype", "shape", "data_offsets"} <= tensor.keys()):
            raise ValueError(f"{name} is not described")
        dtype, shape, offsets = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
        lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
        if not lists or any(type(n) is not int or not 0 <= n < 1 << 64 for n in (*shape, *offsets)):
            raise ValueError(f"{name} has a shape or offsets that are not sizes")
        if not isinstance(dtype, str) or dtype not in SIZES:
            raise ValueError(f"{name} has an unknown type")
        if offsets[1] - offsets[0] != math.prod(shape) * SIZES[dtype]:
            raise ValueError(f"{name} has a shape that does not fit its bytes")
        places.append(tuple(offsets))
    end = 0
    for begin, after in sorted(places):
        if begin != end:
            raise ValueError("tensors overlap, or there are gaps")
        end = after
    if end != size:
        raise ValueError(f"{size} bytes of tensors instead of {end}")


def check_shapes(tensors: dict[str, Tensor], shapes: dict[str, tuple], where: Path, config: str) -> None:
    """Raises UserError unless the tensors have exactly these names and shapes.

    where: the file or folder of the tensors. config: the name of the file from which the shapes follow.
    """
    for name in [*shapes, *tensors]:
        if name not in tensors:
            raise UserError(f"{where}: has no tensor for {name}, which {config} calls for")
        if name not in shapes:
            raise UserError(f"{where}: the tensor {short(name)} belongs nowhere in the model of {config}")
        if tensors[name].shape != shapes[name]:
            both = f"{tensors[name].shape}, by {config} {shapes[name]}"
            raise UserError(f"{where}: {name} has shape {both}: it is for another model")


def write(path: Path, tensors: dict[str, Array | tuple], metadata: dict[str, str]) -> None:
    """Writes tensors as float32. `atomic.replacing` gives a path that readers do not see half written.

    A tensor is an array, or (shape, function): `write` calls the function for the array when it is needed.

    The safetensors library is not used here: a kill leaves its temporary files behind.
    """
    header, end = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        shape = tensor[0] if isinstance(tensor, tuple) else tensor.shape
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            array = tensor[1]() if isinstance(tensor, tuple) else tensor
            file.write(np.ascontiguousarray(array, "<f4"))
