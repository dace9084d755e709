"""Reading documents from local files: plain text cut at separator lines, JSON lines, Parquet; compressed or not."""

from __future__ import annotations

import gzip
import io
import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from sparseforge_core.errors import DataError, unknown

END_OF_TEXT = "<|endoftext|>"
"""The line that ends a document in our text files, and our vocabularies' special token."""

TEXT, LINES = (".txt", ".raw"), (".jsonl", ".json")
COMPRESSIONS = (".xz", ".gz", ".zst")


def read_documents(path: Path, *, field: str, separator: str | None) -> Iterator[str]:
    """The documents of one file, in order. Raises DataError naming the file if it cannot be read or holds no text.

    Text (.txt, .raw) is cut at lines equal to `separator`, or is one document if that is None; JSON lines (.jsonl,
    .json) and .parquet give `field` of each row. Text and JSON lines may be compressed (.xz, .gz, .zst).
    """
    found = False
    try:
        for document in _documents(path, field, separator):
            if document.strip():
                found = True
                yield document
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise DataError(f"corpus file {path} cannot be read: {str(error) or type(error).__name__}") from error
    if not found:
        raise DataError(f"corpus file {path} holds no text")


def text_of(row: Any, field: str, where: str) -> str:
    """The text in a row's `field`. Raises DataError if the row has no such field or something else in it."""
    if not isinstance(row, dict) or field not in row:
        raise DataError(f"{where}: " + unknown("field", field, row if isinstance(row, dict) else ()))
    if not isinstance(row[field], str):
        raise DataError(f"{where}: field {field!r} holds a {type(row[field]).__name__}, not text")
    return str(row[field])


def _documents(path: Path, field: str, separator: str | None) -> Iterator[str]:
    where = f"corpus file {path}"
    kind = path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix
    if kind == ".parquet" and path.suffix == kind:
        import pyarrow.parquet

        table = pyarrow.parquet.ParquetFile(path)
        if field not in table.schema_arrow.names:
            raise DataError(f"{where}: " + unknown("field", field, table.schema_arrow.names))
        for batch in table.iter_batches(columns=[field]):
            for row in batch.to_pylist():
                yield text_of(row, field, where)
        return
    if kind not in (*TEXT, *LINES):
        raise DataError(
            f"{where}: its ending is not known. Known: {', '.join((*TEXT, *LINES))}, each also with "
            f"{', '.join(COMPRESSIONS)}, and .parquet"
        )
    with _open(path) as lines:
        if kind in TEXT:
            yield from _cut(lines, separator)
        else:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield text_of(json.loads(line), field, f"{where}, line {number}")


def _open(path: Path) -> TextIO:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".zst":
        import pyarrow

        return io.TextIOWrapper(pyarrow.input_stream(str(path), compression="zstd"), encoding="utf-8")
    return path.open(encoding="utf-8")


def _cut(lines: Iterable[str], separator: str | None) -> Iterator[str]:
    document: list[str] = []
    for line in lines:
        if separator is not None and line.strip() == separator:
            yield "".join(document)
            document = []
        else:
            document.append(line)
    yield "".join(document)
