"""What an export says of itself: `manifest.json`, and `SHA256SUMS` over every file, which `sha256sum -c` checks too."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseforge_core import files
from sparseforge_core.errors import ExportError
from sparseforge_core.runtime.container import DTYPES, Stored
from sparseforge_core.runtime.packed import LARGEST_GROUP, VALUE_DTYPES, Layout

PACKED, HF = "sparseforge-packed", "sparseforge-hf"
"""The formats: packed, and a Hugging Face folder of dense weights with exact zeros."""

VERSION = 1
MANIFEST, SUMS, WEIGHTS = "manifest.json", "SHA256SUMS", "packed.safetensors"
VALUES, INDICES = ".values", ".indices"
"""After a weight's name: its two tensors in WEIGHTS."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the model: its type and stored shape, and how it is packed, if it is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    """Of its dense bytes."""
    layout: Layout | None = None
    values_sha256: str = ""
    indices_sha256: str = ""

    def stored(self) -> list[Stored]:
        """What holds it in WEIGHTS."""
        if self.layout is None:
            return [Stored(self.name, self.dtype, self.shape)]
        values, indices = self.layout.packed_shapes(self.shape)
        return [Stored(self.name + VALUES, self.dtype, values), Stored(self.name + INDICES, "U8", indices)]

    def to_json(self) -> dict[str, Any]:
        """Its object in the manifest."""
        body: dict[str, Any] = {"dtype": self.dtype, "shape": list(self.shape), "sha256": self.sha256}
        if self.layout is None:
            return {**body, "layout": "dense"}
        return {
            **body,
            "layout": "nm",
            "keep": self.layout.keep,
            "group": self.layout.group,
            "index_bits": self.layout.index_bits,
            "transposed": self.layout.transposed,
            "values_sha256": self.values_sha256,
            "indices_sha256": self.indices_sha256,
        }


@dataclass(frozen=True)
class Manifest:
    """The whole of `manifest.json`."""

    format: str
    tensors: Mapping[str, Entry]
    """The model's tensors in a packed export, the masked weights alone (layout and dense hash) in an HF one."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Provenance: cell, pattern, coverage, recipe, measurements, commit. It changes no weight."""

    def write(self, folder: Path) -> None:
        """Write it in a folder; the same contents give the same bytes."""
        body = {
            "format": self.format,
            "version": VERSION,
            "tensors": {name: entry.to_json() for name, entry in self.tensors.items()},
            "about": dict(self.about),
        }
        text = json.dumps(body, indent=1, allow_nan=False, ensure_ascii=False)
        files.write_text(folder / MANIFEST, text + "\n")


def write_sums(folder: Path) -> None:
    """Write SUMS: the hash of every other file, in `sha256sum`'s form. The last step of an export."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file() and file.name != SUMS)
    files.write_text(folder / SUMS, "".join(f"{files.sha256(folder / name)}  {name}\n" for name in names))


def read_manifest(folder: Path, *, skip: Iterable[str] = ()) -> Manifest:
    """The manifest of an export after checking every file's hash but those of `skip`.

    Raises ExportError naming what is missing, truncated or altered, or the format or version that is unknown.
    """
    check_sums(folder, skip=skip)
    try:
        body = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        form, version = str(body["format"]), body["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{folder / MANIFEST} cannot be read: {error}; export the model anew") from error
    if form not in (PACKED, HF) or version != VERSION:
        raise ExportError(
            f"{folder} is of format {form!r} version {version!r}; this code reads {PACKED} and {HF} of version "
            f"{VERSION}. Use the release that wrote it"
        )
    try:
        tensors = {name: _entry(name, said) for name, said in body["tensors"].items()}
        return Manifest(form, tensors, dict(body["about"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ExportError(f"{folder / MANIFEST}: a field is missing or wrong: {error}; export anew") from error


def check_sums(folder: Path, *, skip: Iterable[str] = ()) -> None:
    """Raise ExportError unless the folder holds exactly the files of SUMS, each with its hash."""
    path = folder / SUMS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        said = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{folder} is no complete export, it has no readable {SUMS}: {error}; "
            "`sparseforge export CELL --format packed` writes one"
        ) from error
    if MANIFEST not in said:
        raise ExportError(f"{path} is truncated; export the model anew")
    for name, digest in said.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise ExportError(f"{file} is missing; export the model anew")
        if name not in skip and files.sha256(file) != digest:
            raise ExportError(f"{file} is truncated or altered; export the model anew")
    unknown = sorted(file.name for file in folder.iterdir() if file.name not in said and file.name != SUMS)
    unknown = [name for name in unknown if not name.startswith(".")]  # what version control leaves is never read
    if unknown:
        raise ExportError(f"{folder}: {', '.join(unknown[:3])} is not of this export; move it elsewhere")


def _entry(name: str, said: dict[str, Any]) -> Entry:
    shape = tuple(int(n) for n in said["shape"])
    dtype, sha256 = str(said["dtype"]), str(said["sha256"])
    if dtype not in DTYPES:
        raise ValueError(f"{name}: unknown type {dtype!r}")
    if said["layout"] == "dense":
        return Entry(name, dtype, shape, sha256)
    if said["layout"] != "nm":
        raise ValueError(f"{name}: unknown layout {said['layout']!r}")
    layout = Layout(int(said["keep"]), int(said["group"]), bool(said["transposed"]))
    fits = 0 < layout.keep < layout.group <= LARGEST_GROUP and said["index_bits"] == layout.index_bits
    if not fits or len(shape) < 2 or dtype not in VALUE_DTYPES or layout.matrix_shape(shape)[-1] % layout.group:
        raise ValueError(f"{name}: {dtype} {list(shape)} cannot be packed {layout.name}")
    return Entry(name, dtype, shape, sha256, layout, str(said["values_sha256"]), str(said["indices_sha256"]))
