"""Token files and the stream of batches over them.

A corpus is tokenised once into a flat file of ids that is memory-mapped from then on. Libraries do the hard parts:
`datasets` streams Hub data, `tokenizers` encodes, numpy maps the file. The packing between them we keep ourselves,
because litdata and mosaicml-streaming replace the versions of torch, numpy or transformers that everything else is
tested with, and neither makes a batch a pure function of (file, seed, step) for any number of ranks, which exact
resuming needs. datatrove installs cleanly and writes the same flat file; for corpora beyond one machine, use it to
write one and describe it by a meta.json as below.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparseforge_core import files, specs
from sparseforge_core.data.cache import content_key, made_once
from sparseforge_core.data.corpora import Corpus, Split
from sparseforge_core.errors import DataError

log = logging.getLogger(__name__)

BATCH_CHARACTERS = 2_000_000
"""Text encoded at a time: enough for every core, and bounded however long the documents are."""

REPORT_SECONDS = 30.0
"""Between two lines of progress in the log."""


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """A tokenised split: ids in document order, each document ended by the end-of-text id."""

    folder: Path
    """Holds tokens.bin and meta.json."""
    tokens: int
    """Number of ids, the end-of-text ids included."""
    vocabulary: int
    """Entries of the tokenizer: every id is below it."""
    eos: int
    """The end-of-text id."""
    dtype: str
    """uint16 where the vocabulary allows, else uint32."""
    sha256: str
    """Of tokens.bin, taken when it was made."""

    @functools.cached_property
    def ids(self) -> npt.NDArray[Any]:
        """All token ids, memory-mapped, `[tokens]`."""
        return np.memmap(self.folder / "tokens.bin", dtype=self.dtype, mode="r")


def tokenize_once(corpus: Corpus, split: Split, tokenizer: Any, home: Path) -> TokenFile:
    """The token file of a split under HOME/tokens/<key>/, made if it is not there.

    `tokenizer` is a fast tokenizer of transformers. The key covers the corpus, the versions behind it, the split and
    the whole tokenizer. Of concurrent makers one builds and the others wait. Raises DataError for a tokenizer that is
    not fast or has no end-of-text token, for an empty corpus, and for a file that was truncated.
    """
    encoder = _encoder(tokenizer)
    identity = {
        "corpus": specs.encode(corpus),
        "identity": corpus.identity(),
        "split": split,
        "tokenizer": hashlib.sha256(encoder.to_str().encode()).hexdigest(),
        "eos": tokenizer.eos_token_id,
        "format": 2,
    }

    def make(folder: Path) -> None:
        meta = _write(folder / "tokens.bin", corpus.documents(split, home), encoder, int(tokenizer.eos_token_id))
        files.write_json(folder / "meta.json", {**meta, "identity": identity})

    return open_tokens(made_once(home / "tokens" / content_key(identity), make))


def open_tokens(folder: Path) -> TokenFile:
    """A token file that exists. Raises DataError if it is truncated or its description unreadable."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        size = (folder / "tokens.bin").stat().st_size
        names = ("tokens", "vocabulary", "eos", "dtype", "sha256")
        found = TokenFile(folder=folder, **{name: meta[name] for name in names})
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"token file {folder} is unreadable ({error}); delete that folder to make it anew") from error
    wanted = found.tokens * np.dtype(found.dtype).itemsize
    if size != wanted:
        raise DataError(f"token file {folder} has {size} bytes instead of {wanted}; delete that folder to make it anew")
    return found


def check_vocabulary(tokens: TokenFile, vocabulary: int) -> None:
    """Raise DataError unless every id fits a model of that many vocabulary entries."""
    if tokens.vocabulary > vocabulary:
        raise DataError(
            f"the tokenizer has {tokens.vocabulary} entries, the model's embedding {vocabulary}; they do not belong "
            "together: use the tokenizer that came with the model"
        )


def _encoder(tokenizer: Any) -> Any:
    """A copy of the tokenizer's backend that neither truncates nor pads, whatever its user last asked of it.

    Text that spells a special token stays text, so that a document cannot end itself.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            f"the tokenizer is a {type(tokenizer).__name__} without a fast backend; convert it to a tokenizer.json"
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-text token, so documents could not be told apart; set its eos_token"
        )
    encoder = type(backend).from_str(backend.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    return encoder


def _write(path: Path, documents: Iterable[str], encoder: Any, eos: int) -> dict[str, Any]:
    """Encode the documents into a flat file and return what describes it."""
    vocabulary = max(*encoder.get_vocab(with_added_tokens=True).values(), eos) + 1
    dtype = "uint16" if vocabulary < 2**16 else "uint32"
    count, began, reported = 0, time.monotonic(), time.monotonic()
    with path.open("wb") as file:
        for batch in _batches(documents):
            for encoding in encoder.encode_batch_fast(batch, add_special_tokens=False):
                ids = np.asarray([*encoding.ids, eos], dtype=dtype)
                file.write(ids.tobytes())
                count += len(ids)
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                log.info("tokenised %.1f million tokens in %.0f s", count / 1e6, reported - began)
    log.info("tokenised %d tokens in %.1f s", count, time.monotonic() - began)
    return {"tokens": count, "vocabulary": vocabulary, "eos": eos, "dtype": dtype, "sha256": files.sha256(path)}


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class TokenStream:
    """Batches over a token file: windows of `length` tokens that do not overlap, in an order drawn anew each epoch.

    A batch is a pure function of (file, seed, step): nothing counts calls, so a resumed run reads what an
    uninterrupted one would have read. Within an epoch no window is repeated and none left out, save the tokens after
    the last whole window. The order costs four bytes a window; everything else stays on disk.
    """

    def __init__(self, tokens: TokenFile, *, seed: int, sequences: int, length: int) -> None:
        """Raises DataError if the file holds less than one window."""
        self.windows = tokens.tokens // length
        if self.windows == 0:
            raise DataError(f"the corpus has {tokens.tokens} tokens, fewer than one window of {length}")
        self.ids = tokens.ids
        self.seed, self.sequences, self.length = seed, sequences, length
        self._order: tuple[int, npt.NDArray[np.uint32]] | None = None

    def batch(self, step: int, rank: int = 0, world: int = 1) -> torch.Tensor:
        """Token ids of `step` (from 1), int64 `[sequences / world, length]`: the rank's rows of the global batch.

        Raises DataError if the sequences do not divide over the ranks or the step is not one.
        """
        if step < 1 or not 0 <= rank < world:
            raise DataError(f"no batch for step {step} on rank {rank} of {world}: steps count from 1, ranks from 0")
        if self.sequences % world:
            raise DataError(f"{self.sequences} sequences do not divide over {world} ranks")
        share = self.sequences // world
        first = (step - 1) * self.sequences + rank * share
        rows = [self._window(first + i) for i in range(share)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _window(self, position: int) -> npt.NDArray[Any]:
        epoch, index = divmod(position, self.windows)
        start = int(self._permutation(epoch)[index]) * self.length
        return self.ids[start : start + self.length]

    def _permutation(self, epoch: int) -> npt.NDArray[np.uint32]:
        """The order of one epoch, `[windows]`; only the latest is kept."""
        if self._order is None or self._order[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._order = (epoch, generator.permutation(np.arange(self.windows, dtype=np.uint32)))
        return self._order[1]
