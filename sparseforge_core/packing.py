"""Packing what a bundle made for a narrow way home: finished stages in one archive, the weights replaced by manifests.

NAME.tar.xz, or NAME.tar.xz.00 and so on where it is larger than a part may be; `sparseforge ingest` takes the first.

A cell that is trained and not measured to its end stays behind: its weights do, and another training of it, recorded
beside, would be of another model, of which the rest could never be measured.
"""

from __future__ import annotations

import io
import logging
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sparseforge_core import bundles, files, measured
from sparseforge_core.bundle_run import FAILURES, FINAL, TRAIN, not_measured
from sparseforge_core.checkpoint import MANIFEST
from sparseforge_core.errors import BundleError
from sparseforge_core.identity import cell_key

log = logging.getLogger(__name__)

SUFFIX = ".tar.xz"
MIB = 2**20
PRESET: Final = 1
"""Of xz: items and journals shrink to a quarter, five times as fast as to a tenth; time there is dearer than bytes."""


def pack(folder: Path, out: Path, *, part_bytes: int = 15 * MIB, partial: bool = False) -> list[Path]:
    """Write the finished stages of a bundle to `out` (NAME.tar.xz); returns the file, or its parts in order.

    Stages that are being written are left out, and all of a cell that is not measured to its end unless `partial`.
    Raises BundleError for a name that is none of an archive, for a bundle without a finished stage, and for a folder
    that is no bundle; CheckpointMismatch for a stage that was altered.
    """
    if not out.name.endswith(SUFFIX):
        raise BundleError(f"{out}: an archive of results is called NAME{SUFFIX}")
    if part_bytes < 1:
        raise BundleError(f"part_bytes={part_bytes}: must be at least 1")
    bundle = bundles.read_bundle(folder)
    cells = folder / bundles.HOME / "cells"
    found = []
    for entry in bundle.entries:
        own = cells / cell_key(entry.cell)
        waiting = [] if partial else not_measured(entry, own)
        if waiting:
            log.warning("cell %s stays behind: its model is not sent and not measured yet by %s", own.name, waiting)
        found += list(_failures(own)) if waiting else [*_stages(own), *_failures(own)]
    if not any(path.name == measured.FILE for path, _ in found):
        raise BundleError(f"{cells} holds no finished stage yet; run the bundle first")
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with tarfile.open(whole, "w:xz", preset=PRESET) as archive:
            _add(archive, folder / bundles.FILE, bundles.FILE)
            for path, name in found:
                _add(archive, path, f"{bundles.HOME}/cells/{name}")
        return _split(whole, out, part_bytes)
    finally:
        whole.unlink(missing_ok=True)


def _stages(folder: Path) -> Iterator[tuple[Path, str]]:
    """(file, its name in the archive below cells/) of a cell's finished stages."""
    for path in sorted(folder.glob(f"*/{measured.FILE}")):
        stage = path.parent
        measured.read(path)
        for name in (measured.FILE, measured.ITEMS, measured.JOURNAL):
            if (stage / name).is_file():
                yield stage / name, f"{folder.name}/{stage.name}/{name}"
        if stage.name == TRAIN:
            yield from _manifest(stage, folder.name)


def _failures(folder: Path) -> Iterator[tuple[Path, str]]:
    """(file, its name in the archive below cells/) of what failed in a cell."""
    for path in sorted((folder / FAILURES).glob("*.json")):
        yield path, f"{folder.name}/{FAILURES}/{path.name}"


def _manifest(stage: Path, key: str) -> Iterator[tuple[Path, str]]:
    """The manifest of a finished model: in its place where there are no weights to it, else beside it."""
    kept, whole = stage / MANIFEST, stage / FINAL / MANIFEST
    if whole.is_file():
        inner = f"{FINAL}/" if not files.read_json(whole)["files"] else ""
        yield whole, f"{key}/{TRAIN}/{inner}{MANIFEST}"
    elif kept.is_file():
        yield kept, f"{key}/{TRAIN}/{MANIFEST}"


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    """A file without what only its machine knows: the same results give the same archive."""
    body = path.read_bytes()
    about = tarfile.TarInfo(name)
    about.size, about.mode = len(body), 0o644
    archive.addfile(about, io.BytesIO(body))


def _split(whole: Path, out: Path, part_bytes: int) -> list[Path]:
    for old in (out, *out.parent.glob(f"{out.name}.[0-9][0-9]")):
        old.unlink(missing_ok=True)
    if whole.stat().st_size <= part_bytes:
        return [whole.replace(out)]
    parts: list[Path] = []
    with whole.open("rb") as source:
        while body := source.read(part_bytes):
            parts.append(out.with_name(f"{out.name}.{len(parts):02d}"))
            parts[-1].write_bytes(body)
    return parts
