"""Token files and the stream of batches over them.

A corpus is tokenised once into a flat file of ids that is memory-mapped from then on. We keep these hundred lines
ourselves: of the libraries that pack tokens, litdata and mosaicml-streaming pull other versions of torch, numpy and
transformers into the environment, and datatrove writes the same flat file with a heavier pipeline around it;
`datasets` and `tokenizers` do the reading and the encoding here.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparseforge_core import files, specs
from sparseforge_core.data.corpora import Corpus, Split
from sparseforge_core.errors import DataError

BATCH_DOCUMENTS = 512


@dataclass(frozen=True)
class TokenFile:
    """A tokenised split: ids in document order, each document ended by the end-of-text id."""

    folder: Path
    tokens: int
    vocabulary: int
    eos: int
    dtype: str
    sha256: str

    @functools.cached_property
    def ids(self) -> npt.NDArray[Any]:
        """All token ids, memory-mapped, `[tokens]`."""
        return np.memmap(self.folder / "tokens.bin", dtype=self.dtype, mode="r")


def tokenize_once(corpus: Corpus, split: Split, tokenizer: Any, home: Path) -> TokenFile:
    """The token file of a split under HOME/tokens/<key>/, made if it is not there.

    The key covers the corpus, the versions behind it, the split and the whole tokenizer. Concurrent makers build
    apart and the first to finish wins. Raises DataError for a tokenizer without an end-of-text token, an empty
    corpus, or a file that was truncated.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token; documents could not be told apart")
    serialized = tokenizer.backend_tokenizer.to_str()
    identity = {
        "corpus": specs.encode(corpus),
        "identity": corpus.identity(),
        "split": split,
        "tokenizer": hashlib.sha256(serialized.encode()).hexdigest(),
        "eos": tokenizer.eos_token_id,
        "format": 1,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = home / "tokens" / key
    if not (folder / "meta.json").is_file():
        _build(folder, corpus, split, tokenizer, identity)
    return open_tokens(folder)


def open_tokens(folder: Path) -> TokenFile:
    """A token file that exists. Raises DataError if it is truncated or its description unreadable."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        size = (folder / "tokens.bin").stat().st_size
        found = TokenFile(folder, meta["tokens"], meta["vocabulary"], meta["eos"], meta["dtype"], meta["sha256"])
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
            f"the tokenizer has {tokens.vocabulary} entries, the model's embedding {vocabulary}; they do not belong together"
        )


def _build(folder: Path, corpus: Corpus, split: Split, tokenizer: Any, identity: dict[str, Any]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        vocabulary = len(tokenizer)
        dtype = "uint16" if vocabulary < 2**16 else "uint32"
        count = 0
        with (temporary / "tokens.bin").open("wb") as file:
            documents = corpus.documents(split)
            while batch := list(itertools.islice(documents, BATCH_DOCUMENTS)):
                for encoding in tokenizer.backend_tokenizer.encode_batch(batch, add_special_tokens=False):
                    ids = np.asarray([*encoding.ids, tokenizer.eos_token_id], dtype=dtype)
                    file.write(ids.tobytes())
                    count += len(ids)
            file.flush()
            os.fsync(file.fileno())
        digest = files.sha256(temporary / "tokens.bin")
        meta = {"tokens": count, "vocabulary": vocabulary, "eos": tokenizer.eos_token_id, "dtype": dtype, "sha256": digest}
        files.write_json(temporary / "meta.json", {**meta, "identity": identity})
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "meta.json").is_file():  # somebody else's is not complete: then it is no race
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class TokenStream:
    """Batches over a token file: windows of `length` tokens, shuffled by epoch, none repeated within an epoch."""

    def __init__(self, tokens: TokenFile, *, seed: int, sequences: int, length: int) -> None:
        self.windows = tokens.tokens // length
        if self.windows == 0:
            raise DataError(f"the corpus has {tokens.tokens} tokens, fewer than one window of {length}")
        self.ids = tokens.ids
        self.seed, self.sequences, self.length = seed, sequences, length
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    def batch(self, step: int, rank: int = 0, world: int = 1) -> torch.Tensor:
        """Token ids of `step` (from 1), `[sequences / world, length]`: the rank's slice of the same global batch."""
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

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._order = (epoch, generator.permutation(self.windows))
        return self._order[1]
