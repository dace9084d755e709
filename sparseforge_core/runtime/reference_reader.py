"""A packed export read with NumPy and nothing else: the format's second implementation, kept short to be read.

`read_weights(folder)` yields the name, the safetensors type and the dense array of each tensor, one at a time.
NumPy has no bfloat16: its values come as uint16 bits, and `as_float32` turns every type into numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparseforge_core.errors import ExportError

FORMAT, VERSION = "sparseforge-packed", 1

DTYPES = {
    "F64": "<f8", "I64": "<i8", "F32": "<f4", "I32": "<i4", "BF16": "<u2", "F16": "<f2", "I16": "<i2",
    "U8": "u1", "I8": "i1", "BOOL": "?",
}  # fmt: skip
"""Safetensors type -> NumPy's; BF16 as its bits."""


def read_weights(folder: Path) -> Iterator[tuple[str, str, np.ndarray[Any, Any]]]:
    """(name, type, dense array in its stored shape) of every tensor. Raises ExportError on anything damaged."""
    manifest = read_manifest(folder)
    with (folder / "packed.safetensors").open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name, entry in manifest["tensors"].items():

            def stored(suffix: str, sha256: str, name: str = name) -> np.ndarray[Any, Any]:
                place = header[name + suffix]
                begin, end = place["data_offsets"]
                file.seek(8 + length + begin)
                data = file.read(end - begin)
                if hashlib.sha256(data).hexdigest() != sha256:
                    raise ExportError(f"{name + suffix} is truncated or altered; export the model anew")
                return np.frombuffer(data, DTYPES[place["dtype"]]).reshape(place["shape"])

            if entry["layout"] == "dense":
                weight = stored("", entry["sha256"])
            else:
                values = stored(".values", entry["values_sha256"])
                weight = unpack(values, stored(".indices", entry["indices_sha256"]), entry, name)
            if hashlib.sha256(weight.tobytes()).hexdigest() != entry["sha256"]:
                raise ExportError(f"{name} does not unpack to the weight that was exported; export the model anew")
            yield name, entry["dtype"], weight


def read_manifest(folder: Path) -> Any:
    """The manifest, after checking its hash, format and version."""
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    data = (folder / "manifest.json").read_bytes()
    if hashlib.sha256(data).hexdigest() != sums.get("manifest.json"):
        raise ExportError(f"{folder / 'manifest.json'} is truncated or altered; export the model anew")
    manifest = json.loads(data)
    if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
        raise ExportError(f"{folder}: {manifest['format']} version {manifest['version']} is not read here")
    return manifest


def unpack(
    values: np.ndarray[Any, Any], indices: np.ndarray[Any, Any], entry: dict[str, Any], name: str = "weight"
) -> np.ndarray[Any, Any]:
    """Values `[..., out, in/M N]` and index bytes -> the weight in its stored shape, pruned places +0."""
    keep, group, bits = entry["keep"], entry["group"], entry["index_bits"]
    *lead, kept = values.shape
    stream = np.unpackbits(indices, axis=-1, bitorder="little")
    if stream[..., kept * bits :].any():
        raise ExportError(f"{name}: unused index bits are set; export the model anew")
    powers = 1 << np.arange(bits)
    places = (stream[..., : kept * bits].reshape(*lead, kept, bits) * powers).sum(-1)
    places = places.reshape(*lead, kept // keep, keep)
    if (places >= group).any() or (places[..., 1:] <= places[..., :-1]).any():
        raise ExportError(f"{name}: a group's places are not {keep} ascending ones below {group}; export anew")
    dense = np.zeros((*lead, kept // keep, group), values.dtype)
    np.put_along_axis(dense, places, values.reshape(places.shape), axis=-1)
    matrix = dense.reshape(*lead, -1)
    return np.ascontiguousarray(matrix.swapaxes(-1, -2)) if entry["transposed"] else matrix


def as_float32(array: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """The numbers of an array that `read_weights` gave with this type; exact for F32, F16 and BF16."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)
