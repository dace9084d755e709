"""Corpora: where text comes from. A spec of a few words; nothing is read before `documents` is called.

One interface serves Hub data sets, local files and the text that is packaged with Python itself, so that the same
recipe machinery runs with and without a network. Each corpus has a training and a held-out split that share no
document: a document belongs to the held-out split if the hash of its text says so.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from sparseforge_core.errors import DataError, RecipeError, unknown
from sparseforge_core.files import sha256
from sparseforge_core.specs import spec

Split = Literal["train", "heldout"]

HELDOUT_SHARE = 40
"""One document in this many is held out."""


class Corpus(ABC):
    """Text for retraining, calibration and held-out perplexity."""

    @abstractmethod
    def all_documents(self) -> Iterator[str]:
        """Every document, in a fixed order. Raises DataError if the text cannot be had."""

    def identity(self) -> dict[str, Any]:
        """What determines the text besides the spec itself, for instance package versions."""
        return {}

    def documents(self, split: Split) -> Iterator[str]:
        """The documents of one split. Raises DataError for an unknown split or an empty corpus."""
        if split not in ("train", "heldout"):
            raise DataError(unknown("split", split, ("train", "heldout")))
        found = False
        for document in self.all_documents():
            if held_out(document) == (split == "heldout"):
                found = True
                yield document
        if not found:
            raise DataError(f"the {split} split of {self} is empty; give it more text")


def held_out(document: str) -> bool:
    """Whether a document belongs to the held-out split: decided by its text alone, so copies never straddle."""
    digest = hashlib.sha256(document.strip().encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELDOUT_SHARE == 0


@spec("hub-text")
class HubText(Corpus):
    """A data set of the Hugging Face hub, streamed in its own order."""

    id: str
    revision: str
    config: str | None = None
    split: str = "train"
    field: str = "text"
    documents_limit: int | None = None
    """Use only the first so many documents; None takes all."""

    def all_documents(self) -> Iterator[str]:
        import datasets

        try:
            rows = datasets.load_dataset(
                self.id, self.config, split=self.split, revision=self.revision, streaming=True
            )
            if self.documents_limit is not None:
                rows = rows.take(self.documents_limit)
            for row in rows:
                if self.field not in row:
                    raise DataError(f"{self.id}: " + unknown("field", self.field, row))
                yield row[self.field]
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise DataError(
                f"data set {self.id} cannot be read from the hub: {reason}. Without a network, use TextFiles with a "
                "local copy, or the packaged text PythonDocs"
            ) from error


@spec("text-files")
class TextFiles(Corpus):
    """Local files: .txt and .txt.xz (documents ended by a separator line), .jsonl and .parquet (one per row)."""

    paths: tuple[str, ...]
    sha256: tuple[str, ...]
    """Hash of each file, so that the identity is of the contents; `TextFiles.of` computes them."""
    field: str = "text"
    separator: str = "<|endoftext|>"
    """A line that ends a document in text files."""

    def __post_init__(self) -> None:
        if not self.paths or len(self.paths) != len(self.sha256):
            raise RecipeError(f"paths, sha256: needs one hash for each of {len(self.paths)} files, found {len(self.sha256)}")

    @classmethod
    def of(cls, *paths: str | Path, field: str = "text", separator: str = "<|endoftext|>") -> TextFiles:
        """The corpus of these files as they are now. Raises DataError for a file that cannot be read."""
        for path in paths:
            if not Path(path).is_file():
                raise DataError(f"corpus file {path} does not exist")
        hashes = tuple(sha256(Path(path)) for path in paths)
        return cls(paths=tuple(str(path) for path in paths), sha256=hashes, field=field, separator=separator)

    def all_documents(self) -> Iterator[str]:
        for name, digest in zip(self.paths, self.sha256, strict=True):
            path = Path(name)
            try:
                if sha256(path) != digest:
                    raise DataError(f"corpus file {path} is not the one in the recipe: its hash differs")
                yield from self._read(path)
            except (OSError, UnicodeDecodeError, lzma.LZMAError, json.JSONDecodeError) as error:
                raise DataError(f"corpus file {path} cannot be read: {error}") from error

    def _read(self, path: Path) -> Iterator[str]:
        if path.name.endswith(".jsonl"):
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    if line.strip():
                        yield self._field(json.loads(line), path)
        elif path.name.endswith(".parquet"):
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                for row in batch.to_pylist():
                    yield self._field(row, path)
        elif path.name.endswith((".txt", ".txt.xz", ".raw")):
            opened = lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8")
            with opened as lines:
                yield from self._split(lines)
        else:
            raise DataError(f"corpus file {path}: known endings are .txt, .txt.xz, .raw, .jsonl and .parquet")

    def _field(self, row: Any, path: Path) -> str:
        if not isinstance(row, dict) or self.field not in row:
            known = row if isinstance(row, dict) else ()
            raise DataError(f"corpus file {path}: " + unknown("field", self.field, known))
        return str(row[self.field])

    def _split(self, lines: Any) -> Iterator[str]:
        document: list[str] = []
        for line in lines:
            if line.strip() == self.separator:
                if document:
                    yield "".join(document)
                document = []
            else:
                document.append(line)
        if any(line.strip() for line in document):
            yield "".join(document)


@spec("python-docs")
class PythonDocs(Corpus):
    """English that every installation has: Python's own reference and the prose of installed packages' docstrings."""

    def all_documents(self) -> Iterator[str]:
        from sparseforge_core.data.pythondocs import prose

        yield from prose()

    def identity(self) -> dict[str, Any]:
        from sparseforge_core.data.pythondocs import versions

        return {"versions": versions()}


@spec("synthetic")
class Synthetic(Corpus):
    """Sentences of a small random grammar: for tests, learnable and free of any download."""

    documents_count: int = 200
    seed: int = 0

    def all_documents(self) -> Iterator[str]:
        draw = random.Random(self.seed)
        nouns, verbs = ("fox", "dog", "river", "stone", "child", "garden"), ("sees", "finds", "follows", "leaves")
        adjectives = ("old", "quick", "quiet", "green", "small")
        for _ in range(self.documents_count):
            sentences = (
                f"The {draw.choice(adjectives)} {draw.choice(nouns)} {draw.choice(verbs)} the {draw.choice(nouns)}."
                for _ in range(draw.randint(5, 15))
            )
            yield " ".join(sentences)


C4 = HubText(id="allenai/c4", revision="main", config="en")
"""C4 English, in the hub's order."""

DOLMINO = HubText(id="allenai/dolmino-mix-1124", revision="main")
"""Dolmino-mix-1124, the paper's corpus for LLaMA-2-7B."""
