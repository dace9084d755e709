"""Safetensors one tensor at a time: written at places that follow from shapes alone, read without mapping the file.

Tensors lie in order of falling element size, otherwise as they come, so that each is aligned to its own elements.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseforge_core.errors import ExportError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
}
"""Safetensors name -> torch type, of everything that may be stored."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}

LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: what it is called, its safetensors type, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def dtype_name(dtype: torch.dtype, where: str) -> str:
    """The safetensors name of a type. Raises ExportError if it is not stored."""
    if dtype not in NAMES:
        raise ExportError(f"{where}: values of {dtype} are not stored; known are {', '.join(DTYPES)}")
    return NAMES[dtype]


class Writer:
    """Writes one file; every planned tensor once, in any order, none held."""

    def __init__(self, path: Path, tensors: Iterable[Stored], metadata: dict[str, str]) -> None:
        planned = sorted(tensors, key=lambda t: -DTYPES[t.dtype].itemsize)  # stable
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for tensor in planned:
            if tensor.name in header:
                raise ExportError(f"{path.name}: two tensors would be called {tensor.name!r}; rename one")
            header[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [end, end + tensor.nbytes],
            }
            end += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._places = {tensor.name: (tensor, header[tensor.name]["data_offsets"][0]) for tensor in planned}
        self._base = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._base + end)

    def write(self, name: str, tensor: Tensor) -> str:
        """Write a tensor; returns the SHA-256 of its bytes."""
        planned, place = self._places.pop(name)
        if tuple(tensor.shape) != planned.shape or NAMES.get(tensor.dtype) != planned.dtype:
            raise ExportError(f"{name}: planned {planned.dtype} {planned.shape}, given {tensor.dtype} {tensor.shape}")
        data = raw_bytes(tensor)
        self._file.seek(self._base + place)
        self._file.write(data)
        return hashlib.sha256(data).hexdigest()

    def close(self) -> None:
        """End the file. Raises ExportError if a planned tensor was not written."""
        self._file.close()
        if self._places:
            raise ExportError(f"{next(iter(self._places))}: planned but not written")


class Reader:
    """Reads one file tensor by tensor, after checking that its header accounts for every byte."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
            length = int.from_bytes(self._file.read(8), "little")
            if length > LONGEST_HEADER:
                raise ExportError(f"{path} does not begin like a safetensors file; export it anew")
            header = json.loads(self._file.read(length))
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self.tensors = {n: Stored(n, e["dtype"], tuple(map(int, e["shape"]))) for n, e in header.items()}
            self._spans = {n: (int(e["data_offsets"][0]), int(e["data_offsets"][1])) for n, e in header.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ExportError(f"{path} is missing, truncated or no safetensors file: {error}") from error
        self._base = 8 + length
        self._check(path.stat().st_size)

    def read(self, name: str, sha256: str) -> Tensor:
        """A tensor of its own memory. Raises ExportError unless its bytes have this SHA-256."""
        stored, (begin, end) = self.tensors[name], self._spans[name]
        data = bytearray(end - begin)
        self._file.seek(self._base + begin)
        if self._file.readinto(data) != len(data) or hashlib.sha256(data).hexdigest() != sha256:
            raise ExportError(f"{self.path}: tensor {name} is truncated or altered; export it anew")
        if not data:
            return torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        return torch.frombuffer(data, dtype=DTYPES[stored.dtype]).reshape(stored.shape)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _check(self, size: int) -> None:
        end = 0
        for name, (begin, stop) in sorted(self._spans.items(), key=lambda item: item[1]):
            stored = self.tensors[name]
            if stored.dtype not in DTYPES:
                raise ExportError(f"{self.path}: {name} has the type {stored.dtype}, which this code does not read")
            if begin != end or stop - begin != stored.nbytes:
                raise ExportError(f"{self.path}: the header's place of {name} does not fit its shape; export it anew")
            end = stop
        if size != self._base + end:
            raise ExportError(f"{self.path}: {size:,} bytes instead of {self._base + end:,}; the file is truncated")


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row order, little-endian as every machine that runs torch."""
    flat: Any = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()
