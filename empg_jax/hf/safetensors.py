"""The safetensors format, read by byte ranges and written tensor by tensor.

A file consists of an 8-byte little-endian header length, a JSON header ``{name: {dtype, shape,
data_offsets}}``, and the raw bytes. Files are memory-mapped for reading, so that a slice reads only its own
pages. They are written one tensor at a time, so that host memory never holds a whole model.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 8


class SafetensorsFile:
    """A safetensors file whose tensors are read on demand.

    Raises:
      ValueError: the file is cut short, or its header is inconsistent.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        size = path.stat().st_size
        if size < 8:
            raise ValueError(f"{path} is not a safetensors file: only {size} bytes")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError(
                    f"{path} is cut short or not safetensors: header of {length} bytes in {size}"
                )
            try:
                header = json.loads(file.read(length))
            except ValueError as error:
                raise ValueError(f"{path}: the header is not JSON: {error}") from error
        if not isinstance(header, dict):
            raise ValueError(f"{path}: the header is {type(header).__name__}; expected an object")
        header.pop("__metadata__", None)
        self._entries: dict[str, Any] = header
        self._start = 8 + length
        self._check(size)
        self._bytes = np.memmap(path, np.uint8, mode="r")

    def names(self) -> list[str]:
        """Return the names of the tensors."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._entries[name]["shape"])

    def array(self, name: str) -> np.ndarray:
        """Return a tensor as a view of the mapped file; its bytes are read when it is sliced or copied.

        Raises:
          ValueError: the type is not a plain float (quantized weights).
        """
        entry = self._entries[name]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(
                f"{self.path}: tensor {name} is {entry['dtype']}; only {', '.join(_DTYPES)} can be loaded "
                "(quantized checkpoints are not supported)"
            )
        begin, end = (self._start + offset for offset in entry["data_offsets"])
        return self._bytes[begin:end].view(dtype).reshape(self.shape(name))

    def _check(self, size: int) -> None:
        for name, entry in self._entries.items():
            try:
                begin, end = entry["data_offsets"]
                dtype = _DTYPES.get(entry["dtype"])
                expected = None if dtype is None else math.prod(entry["shape"]) * dtype.itemsize
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{self.path}: the header entry of {name} is malformed: {entry}") from error
            if begin < 0 or end < begin or (expected is not None and end - begin != expected):
                raise ValueError(f"{self.path}: {name} has {end - begin} bytes, its shape needs {expected}")
            if self._start + end > size:
                raise ValueError(
                    f"{self.path} is cut short: {name} ends at byte {self._start + end}, the file has {size}"
                )


def write_safetensors(
    path: pathlib.Path,
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    read: Callable[[str], np.ndarray],
) -> None:
    """Write one file; each tensor is fetched only right before it is written.

    Args:
      path: the file.
      shapes: shape and type of every tensor, in the order of writing.
      read: function from a name to the tensor of that shape and type.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires this entry
    offset = 0
    for name, (shape, dtype) in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in shapes:
            np.ascontiguousarray(read(name)).tofile(file)
