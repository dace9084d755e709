"""Writing a packed export's weights, and reading them back one tensor at a time, each checked before it is used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sparseforge_core.errors import ExportError
from sparseforge_core.runtime.container import Reader, Writer, digest, dtype_name
from sparseforge_core.runtime.manifest import INDICES, PACKED, VALUES, VERSION, WEIGHTS, Entry, Manifest
from sparseforge_core.runtime.packed import Layout, Packed, check_indices, pack, unpack


@dataclass(frozen=True)
class Item:
    """A tensor to be written: fetched when its turn comes, and let go of after."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    fetch: Callable[[], Tensor]
    layout: Layout | None = None

    @classmethod
    def of(cls, name: str, tensor: Tensor, layout: Layout | None = None) -> Item:
        """Of a tensor that is there already."""
        return cls(name, tuple(tensor.shape), dtype_name(tensor.dtype, name), lambda: tensor.detach(), layout)


def write_weights(folder: Path, items: Sequence[Item]) -> tuple[dict[str, Entry], dict[str, int]]:
    """Write WEIGHTS in `folder`; returns the manifest's entries, and the negative zeros dropped by site.

    Besides what a fetch returns, one packed weight is held at a time. Raises as `pack` does.
    """
    planned = [Entry(item.name, item.dtype, item.shape, "", item.layout) for item in items]
    metadata = {"format": PACKED, "version": str(VERSION)}
    writer = Writer(folder / WEIGHTS, (stored for entry in planned for stored in entry.stored()), metadata)
    entries, dropped = {}, {}
    for item in items:
        tensor = item.fetch()
        if item.layout is None:
            entries[item.name] = Entry(item.name, item.dtype, item.shape, writer.write(item.name, tensor))
            continue
        packed = pack(tensor, item.layout, item.name)
        if packed.signs_dropped:
            dropped[item.name] = packed.signs_dropped
            tensor = unpack(packed.values, packed.indices, item.layout, item.shape)
        entries[item.name] = Entry(
            item.name,
            item.dtype,
            item.shape,
            digest(tensor),
            item.layout,
            writer.write(item.name + VALUES, packed.values),
            writer.write(item.name + INDICES, packed.indices),
        )
    writer.close()
    return entries, dropped


class Archive:
    """The weights of a packed export."""

    def __init__(self, reader: Reader, entries: Mapping[str, Entry]) -> None:
        self._reader = reader
        self.entries = entries

    def dense(self, name: str) -> Tensor:
        """A tensor as it was trained, unpacked if need be."""
        entry = self.entries[name]
        if entry.layout is None:
            return self._reader.read(name, entry.sha256)
        packed = self.packed(name)
        return unpack(packed.values, packed.indices, entry.layout, entry.shape)

    def packed(self, name: str) -> Packed:
        """A packed weight, every group of it checked."""
        entry = self.entries[name]
        if entry.layout is None:
            raise ExportError(f"{name} is stored dense")
        values = self._reader.read(name + VALUES, entry.values_sha256)
        indices = self._reader.read(name + INDICES, entry.indices_sha256)
        check_indices(indices, entry.layout, entry.shape, name)
        return Packed(values, indices)


@contextlib.contextmanager
def open_archive(folder: Path, manifest: Manifest) -> Iterator[Archive]:
    """The weights of a packed export. Raises ExportError unless the file holds what the manifest says, and no more."""
    if manifest.format != PACKED:
        raise ExportError(f"{folder} is a {manifest.format} export, not {PACKED}; `sparseforge export` makes one of it")
    reader = Reader(folder / WEIGHTS)
    try:
        wanted = {stored.name: stored for entry in manifest.tensors.values() for stored in entry.stored()}
        if reader.tensors != wanted:
            wrong = sorted(set(reader.tensors.items()) ^ set(wanted.items()))
            raise ExportError(f"{reader.path} and the manifest disagree about {wrong[0][0]}; export the model anew")
        yield Archive(reader, manifest.tensors)
    finally:
        reader.close()
