"""Opening an archive of results: only plain files of known names, nothing outside of one temporary folder."""

from __future__ import annotations

import contextlib
import lzma
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from sparseforge_core import bundles
from sparseforge_core.errors import BundleError

LARGEST = 4 * 2**30
"""Bytes that an archive may unfold to."""
NAMES = re.compile(
    rf"{re.escape(bundles.FILE)}|{bundles.HOME}/cells/[0-9a-f]{{12}}-s\d+/"
    r"(failures/[\w.-]+\.json|train/final/manifest\.json|(?!\.)[\w.-]+/(measurements|manifest)\.json"
    r"|(?!\.)[\w.-]+/(items|journal)\.jsonl)",
    re.ASCII,
)
"""What `python -m sparseforge_core.run pack` writes."""


class _Joined:
    """The parts of an archive, read one after the other."""

    def __init__(self, parts: list[Path]) -> None:
        self.parts = [path.open("rb") for path in parts]

    def read(self, count: int) -> bytes:
        while self.parts:
            if body := self.parts[0].read(count):
                return body
            self.parts.pop(0).close()
        return b""


@contextlib.contextmanager
def unpacked(archive: Path) -> Iterator[Path]:
    """The bundle in an archive, as a folder that is gone after the block.

    `archive` is NAME.tar.xz, or the first of its parts. Raises BundleError for what is no such archive, is cut off,
    lacks a part, or holds anything but plain files of a bundle.
    """
    with tempfile.TemporaryDirectory(prefix="sparseforge-") as place:
        folder = Path(place)
        try:
            with tarfile.open(fileobj=cast(BinaryIO, _Joined(parts_of(archive))), mode="r|xz") as opened:
                _extract(opened, folder, archive)
        except (tarfile.TarError, lzma.LZMAError, EOFError, OSError, ValueError) as error:
            raise BundleError(
                f"{archive} cannot be read as an archive of results ({error}); copy it again, with all its parts"
            ) from error
        yield folder


def parts_of(archive: Path) -> list[Path]:
    """The files that make an archive, in order. Raises BundleError if it is not there or a part is missing."""
    if archive.is_file() and not re.search(r"\.\d\d$", archive.name):
        return [archive]
    base = archive.with_name(re.sub(r"\.\d\d$", "", archive.name))
    parts = sorted(base.parent.glob(f"{base.name}.[0-9][0-9]"))
    if not parts:
        raise BundleError(
            f"{archive}: there is no such folder, archive or part of one; `python -m sparseforge_core.run "
            "pack DIR` makes one where the bundle ran"
        )
    for number, part in enumerate(parts):
        if part.name != f"{base.name}.{number:02d}":
            raise BundleError(f"{base.name}.{number:02d} is missing beside {part}; copy all parts")
    return parts


def _extract(opened: tarfile.TarFile, folder: Path, archive: Path) -> None:
    rest = LARGEST
    for member in opened:
        if not member.isreg() or not NAMES.fullmatch(member.name):
            raise BundleError(f"{archive} holds {member.name!r}, which is no file of a bundle's results")
        rest -= member.size
        if rest < 0:
            raise BundleError(f"{archive} would unfold to more than {LARGEST:,} bytes")
        source = opened.extractfile(member)
        assert source is not None  # a regular file
        target = folder / member.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            shutil.copyfileobj(source, file)
