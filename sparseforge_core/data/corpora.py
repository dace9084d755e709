"""Corpora: where text comes from. A spec of a few words; nothing is read before `documents` is called.

One interface serves Hub data sets, local files and the text that is packaged with Python itself, so that the same
recipe machinery runs with and without a network. Each corpus has a training and a held-out split that share no
document: a document belongs to the held-out split if the hash of its text says so. The only door to `datasets`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from sparseforge_core import files, specs
from sparseforge_core.data import textfiles
from sparseforge_core.data.cache import content_key, made_once
from sparseforge_core.errors import DataError, RecipeError, unknown
from sparseforge_core.specs import spec

Split = Literal["train", "heldout", "all"]
"""What is trained on, what never is, or both: text that only measures has no use for the two."""

DATA_ENV = "SPARSEFORGE_DATA"
"""The environment variable that names the folder of relative corpus paths."""

HELDOUT_SHARE = 40
"""One document in this many is held out."""


class Corpus(ABC):
    """Text for retraining, calibration and held-out perplexity."""

    kind: str
    """Set by `@spec`."""

    @abstractmethod
    def all_documents(self, home: Path) -> Iterator[str]:
        """Every document, in a fixed order; `home` is the workspace, where a corpus may keep what is slow to make.

        Raises DataError if the text cannot be had.
        """

    def identity(self) -> dict[str, Any]:
        """What determines the text besides the spec itself, for instance package versions."""
        return {}

    def documents(self, split: Split, home: Path) -> Iterator[str]:
        """The documents of one split, blank ones left out. Raises DataError for an unknown or an empty split."""
        if split not in ("train", "heldout", "all"):
            raise DataError(unknown("split", split, ("train", "heldout", "all")))
        total = found = 0
        for document in self.all_documents(home):
            total += bool(document.strip())
            if document.strip() and (split == "all" or held_out(document) == (split == "heldout")):
                found += 1
                yield document
        if not found:
            raise DataError(
                f"the {split} split of the {self.kind} corpus is empty: none of its {total} documents is in it (one in "
                f"{HELDOUT_SHARE} is held out); give it more or shorter documents"
            )


def held_out(document: str) -> bool:
    """Whether a document belongs to the held-out split: decided by its text alone, so copies never straddle."""
    digest = hashlib.sha256(document.strip().encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELDOUT_SHARE == 0


def check_hub_id(name: str) -> None:
    """Raise RecipeError for an id that a hub client would take for a folder of this machine."""
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name, re.ASCII):
        raise RecipeError(f"id: {name!r} is no name on the hub: give NAME or OWNER/NAME; Local(...) names a folder")


@spec("hub-text")
class HubText(Corpus):
    """A data set of the Hugging Face hub, streamed in its own order."""

    id: str
    revision: str
    """A commit hash; a branch such as 'main' is accepted and recorded as what it is: unpinned."""
    config: str | None = None
    split: str = "train"
    field: str = "text"
    documents_limit: int | None = None
    """Use only the first so many documents; None takes all, however many terabytes that is."""

    def __post_init__(self) -> None:
        check_hub_id(self.id)

    def all_documents(self, home: Path) -> Iterator[str]:
        import datasets

        try:
            rows = datasets.load_dataset(self.id, self.config, split=self.split, revision=self.revision, streaming=True)
            if self.documents_limit is not None:
                rows = rows.take(self.documents_limit)
            for row in rows:
                yield textfiles.text_of(row, self.field, f"data set {self.id}")
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise DataError(
                f"data set {self.id} cannot be read from the hub: {reason}. Without a network, name a local copy with "
                "TextFiles.of(paths), or use the packaged text PythonDocs()"
            ) from error


@spec("text-files")
class TextFiles(Corpus):
    """Local files: text (documents ended by a separator line), JSON lines and Parquet (one document per row)."""

    paths: tuple[str, ...]
    """Relative ones lie under $SPARSEFORGE_DATA (default: the current folder), so a recipe need name no machine."""
    sha256: tuple[str, ...]
    """Hash of each file, so that a changed file is refused; `TextFiles.of` computes them."""
    field: str = "text"
    """Where a row keeps its text, for JSON lines and Parquet."""
    separator: str | None = textfiles.END_OF_TEXT
    """A line that ends a document in text files; None takes each file as one document."""

    def __post_init__(self) -> None:
        if not self.paths or len(self.paths) != len(self.sha256):
            raise RecipeError(
                f"paths, sha256: needs one hash for each of {len(self.paths)} files (at least one), found "
                f"{len(self.sha256)}; TextFiles.of(paths) computes them"
            )
        for path in self.paths:
            if not os.path.isabs(path) and os.path.normpath(path).split(os.sep)[0] == os.pardir:
                raise RecipeError(f"paths: {path!r} leads out of the folder of corpora, ${DATA_ENV}")

    @classmethod
    def of(cls, *paths: str | Path, field: str = "text", separator: str | None = textfiles.END_OF_TEXT) -> TextFiles:
        """The corpus of these files as they are now. Raises DataError for a file that cannot be read."""
        hashes = tuple(_hash_of(located(path)) for path in paths)
        return cls(paths=tuple(str(path) for path in paths), sha256=hashes, field=field, separator=separator)

    def all_documents(self, home: Path) -> Iterator[str]:
        for file in self.checked():
            yield from textfiles.read_documents(file, field=self.field, separator=self.separator)

    def checked(self) -> Iterator[Path]:
        """Where each file is, once it is the one in the recipe. Raises DataError for another one."""
        for name, digest in zip(self.paths, self.sha256, strict=True):
            if _hash_of(located(name)) != digest:
                raise DataError(
                    f"corpus file {name} is not the one in the recipe: its hash differs. Restore it, or plan the "
                    "recipe anew with TextFiles.of"
                )
            yield located(name)


def located(path: str | Path) -> Path:
    """Where a file of a recipe is. Raises DataError for one outside of $SPARSEFORGE_DATA, where that is set."""
    folder = os.environ.get(DATA_ENV)
    found = Path(folder or "") / path
    if folder and not found.resolve().is_relative_to(Path(folder).resolve()):
        raise DataError(f"paths: {str(path)!r} leads out of ${DATA_ENV}={folder}; put it there, or unset {DATA_ENV}")
    return found


def _hash_of(path: Path) -> str:
    try:
        return files.sha256(path)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"corpus file {path} cannot be read: {reason}; relative paths start at ${DATA_ENV}") from error


@spec("python-docs")
class PythonDocs(Corpus):
    """English that every installation has: Python's own reference and the prose of installed packages' docstrings.

    About 5 MB. Extracted once per set of package versions and kept under HOME/corpora/.
    """

    def all_documents(self, home: Path) -> Iterator[str]:
        key = content_key({"corpus": specs.encode(self), "identity": self.identity()})
        folder = made_once(home / "corpora" / key, self._extract)
        try:
            meta = json.loads((folder / "meta.json").read_text())
            if files.sha256(folder / "text.txt") != meta["sha256"]:
                raise ValueError("its hash differs")
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"corpus folder {folder} is damaged ({error}); delete it to make it anew") from error
        yield from textfiles.read_documents(folder / "text.txt", field="", separator=textfiles.END_OF_TEXT)

    def identity(self) -> dict[str, Any]:
        from sparseforge_core.data.pythondocs import versions

        return {"versions": versions()}

    def _extract(self, folder: Path) -> None:
        from sparseforge_core.data.pythondocs import prose

        count = 0
        with (folder / "text.txt").open("w", encoding="utf-8") as file:
            for document in prose():
                file.write(f"{document}{textfiles.END_OF_TEXT}\n")
                count += 1
        meta = {**self.identity(), "documents": count, "sha256": files.sha256(folder / "text.txt")}
        files.write_json(folder / "meta.json", meta)


@spec("synthetic")
class Synthetic(Corpus):
    """Sentences of a small random grammar: for tests, learnable and free of any download."""

    documents_count: int = 200
    """About 70 words each."""
    seed: int = 0
    """Of the sentences, not of the cell."""

    def all_documents(self, home: Path) -> Iterator[str]:
        draw = random.Random(self.seed)
        nouns, verbs = ("fox", "dog", "river", "stone", "child", "garden"), ("sees", "finds", "follows", "leaves")
        adjectives = ("old", "quick", "quiet", "green", "small")
        for _ in range(self.documents_count):
            sentences = (
                f"The {draw.choice(adjectives)} {draw.choice(nouns)} {draw.choice(verbs)} the {draw.choice(nouns)}."
                for _ in range(draw.randint(5, 15))
            )
            yield " ".join(sentences)


C4 = HubText(
    id="allenai/c4", revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2", config="en", documents_limit=12_000_000
)
"""C4 English, the first 34 of its 1,024 shards: about 5.5 billion tokens, more than any budget of the paper."""

DOLMINO = HubText(
    id="allenai/dolmino-mix-1124", revision="a319f19eef1e257417b11ea8c30da266ae175557", documents_limit=12_000_000
)
"""Dolmino-mix-1124, the paper's corpus for LLaMA-2-7B, in the hub's order, which begins with its web pages."""
