"""Bundles: cells that travel to a machine without a store, in a folder whose description is sealed.

bundle.json   the cells with their suites, and what identifies the texts they read
code/         this package, for `PYTHONPATH`
data/         the local files of their corpora, items of benchmark tasks, the WikiText-2 test set
home/         made there: what `sparseforge ingest` brings home
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseforge_core import files, specs
from sparseforge_core.data.corpora import DATA_ENV, Corpus
from sparseforge_core.errors import BundleError, SparseForgeError
from sparseforge_core.evaluate.benchmarks import TASKS_ENV
from sparseforge_core.evaluate.suites import WIKITEXT_ENV, Suite
from sparseforge_core.identity import loads
from sparseforge_core.recipe import Cell

KIND, FORMAT = "sparseforge-bundle", 3
"""Of the description; format 1 was not sealed, format 2 did not say whether its code had changes."""
READ = (2, FORMAT)

FILE, CODE, DATA, HOME = "bundle.json", "code", "data", "home"
"""What lies in the folder of a bundle."""
TASKS, WIKITEXT, WIKITEXT_FILE = f"{DATA}/tasks", f"{DATA}/wikitext2", "wiki.test.raw"
"""Folders of benchmark items and of the WikiText-2 test set, and the file in the latter."""

FIELDS = {"kind", "format", "code", "changes", "grids", "there", "cells", "corpora", files.SEAL}


@dataclass(frozen=True)
class Entry:
    """A cell of a bundle and what is to be measured of it."""

    cell: Cell
    suites: tuple[Suite, ...]
    level: int
    """0 for a cell that needs no other of the bundle; else one more than the highest that it needs."""


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and believed."""

    folder: Path
    code: str
    """The commit of the code that it carries; empty where it was written outside a checkout."""
    changes: str
    """Hash of how that code differed from the commit; empty if it did not, or of format 2."""
    grids: tuple[str, ...]
    """The grids that its cells are planned in."""
    entries: tuple[Entry, ...]
    """By level, so that each comes after those it needs."""
    corpora: tuple[tuple[Corpus, dict[str, Any]], ...]
    """Each text, with what identified it where the bundle was made."""


def write_description(
    folder: Path, entries: list[dict[str, Any]], corpora: list[dict[str, Any]], about: dict[str, Any]
) -> Path:
    """Seal and write bundle.json, last of all: a folder without it is no bundle."""
    body = {"kind": KIND, "format": FORMAT, **about, "cells": entries, "corpora": corpora}
    files.write_json(folder / FILE, files.seal(body))
    return folder / FILE


def read_bundle(folder: Path) -> Bundle:
    """The bundle in a folder. Raises BundleError for one that is foreign, altered or of another format version."""
    path = folder / FILE
    again = "write it anew with `sparseforge bundle`"
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read as a bundle ({error}); {again}, or copy it again") from error
    if not isinstance(body, dict) or body.get("kind") != KIND:
        raise BundleError(f"{path} is no bundle of SparseForge; {again}")
    if body.get("format") not in READ:
        reads = " and ".join(map(str, READ))
        raise BundleError(f"{path} has bundle format {body.get('format')!r}, this version reads {reads}; {again}")
    if set(body) != (FIELDS if body["format"] == FORMAT else FIELDS - {"changes"}) or not files.seal_fits(body):
        raise BundleError(f"{path} was altered: its content does not give its hash; {again}, or copy it again")
    try:
        entries = tuple(_entry(entry) for entry in body["cells"])
        read = ((specs.decode(c["corpus"], Corpus, "corpus"), c["identity"]) for c in body["corpora"])  # type: ignore[type-abstract]
        corpora = tuple(read)
    except SparseForgeError as error:
        raise BundleError(f"{path} was written by other code, which this version cannot read: {error}") from error
    return Bundle(
        folder=folder,
        code=str(body["code"]),
        changes=str(body.get("changes", "")),
        grids=tuple(body["grids"]),
        entries=entries,
        corpora=corpora,
    )


def _entry(body: dict[str, Any]) -> Entry:
    suites = tuple(specs.decode(data, Suite, "suite") for data in body["suites"])
    return Entry(loads(json.dumps(body["cell"])), suites, body["level"])


def prepare(bundle: Bundle) -> None:
    """Make this process read the bundle's data. Raises BundleError for a text that is another one on this machine."""
    for name, inner in ((DATA_ENV, DATA), (TASKS_ENV, TASKS), (WIKITEXT_ENV, WIKITEXT)):
        if (bundle.folder / inner).is_dir():
            os.environ.setdefault(name, str((bundle.folder / inner).resolve()))
    for corpus, there in bundle.corpora:
        here = json.loads(json.dumps(corpus.identity()))
        if here != there:
            raise BundleError(
                f"corpus {corpus.kind}: this machine has {here}, the bundle was made with {there}; the text would be "
                "another one. Install the same versions here, or take a corpus of local files"
            )
