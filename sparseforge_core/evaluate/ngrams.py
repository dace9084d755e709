"""Finding texts inside other texts by shared runs of words, exactly, in one pass over any amount of text.

The n-grams of the texts looked for are hashed once; the text searched streams by and is held a few megabytes at a time.
A hash that matches is confirmed word by word, so nothing is found that is not there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

WORD = re.compile(r"[^\W_]+")
"""A word: letters and digits of any script; everything else separates words."""

BATCH_WORDS = 500_000
"""Words of the searched text hashed at a time."""

BETWEEN = "\n"
"""Stands between two documents; no word equals it, so no n-gram spans two documents."""

MULTIPLIER = 0x9E3779B97F4A7C15
"""Odd, so that no position of a gram is lost modulo 2**64."""

Hashes = npt.NDArray[np.uint64]


def words_of(text: str) -> list[str]:
    """The lower-case alphanumeric words of a text."""
    return WORD.findall(text.lower())


class Wanted:
    """The grams of the items that are looked for.

    An item is a list of texts (variants). A text of `n` words or more is looked for by each of its n-grams; one with
    fewer words, but at least `shortest`, as a whole; a shorter one not at all, because it occurs by chance.
    """

    def __init__(self, items: Sequence[Sequence[str]], *, n: int, shortest: int) -> None:
        self.n = n
        self.items = len(items)
        self.too_short: list[int] = []
        """Items without a single text that is long enough to look for."""
        self._texts: list[tuple[int, list[str]]] = []
        places: dict[int, list[tuple[Hashes, int]]] = {}
        for item, variants in enumerate(items):
            split = [words for words in map(words_of, variants) if len(words) >= shortest]
            if not split:
                self.too_short.append(item)
            for words in split:
                length = min(len(words), n)
                places.setdefault(length, []).append((_grams(_hashes(words), length), len(self._texts)))
                self._texts.append((item, words))
        self._tables = {length: _table(found) for length, found in sorted(places.items())}

    def find(self, documents: Iterable[str]) -> Counted:
        """The items of which some gram occurs in the documents."""
        counted = Counted()
        for words in _batches(documents, counted):
            hashes = _hashes(words)
            for length, table in self._tables.items():
                if len(words) >= length:
                    self._match(words, _grams(hashes, length), length, table, counted)
        return counted

    def _match(
        self,
        words: list[str],
        grams: Hashes,
        length: int,
        table: tuple[Hashes, npt.NDArray[np.int64]],
        counted: Counted,
    ) -> None:
        known, owners = table
        first = np.searchsorted(known, grams)
        hits = np.flatnonzero(known[np.minimum(first, len(known) - 1)] == grams)
        for place in hits.tolist():
            gram = words[place : place + length]
            index = int(first[place])
            while index < len(known) and known[index] == grams[place]:
                text, start = divmod(int(owners[index]), 2**32)
                item, own = self._texts[text]
                if item not in counted.found and own[start : start + length] == gram:
                    counted.found[item] = " ".join(gram)
                index += 1


class Counted:
    """What a search saw."""

    def __init__(self) -> None:
        self.documents = 0
        self.words = 0
        self.found: dict[int, str] = {}
        """The first gram that gave each item away, by item number."""


def _batches(documents: Iterable[str], counted: Counted) -> Iterator[list[str]]:
    batch: list[str] = []
    for document in documents:
        words = words_of(document)
        counted.documents += 1
        counted.words += len(words)
        batch += words
        batch.append(BETWEEN)
        if len(batch) >= BATCH_WORDS:
            yield batch
            batch = []
    if batch:
        yield batch


def _hashes(words: list[str]) -> Hashes:
    """64 bits a word. Python's own hash: cached in the word, the same throughout this process, and confirmed later."""
    return np.fromiter(map(hash, words), dtype=np.int64, count=len(words)).view(np.uint64)


def _grams(hashes: Hashes, length: int) -> Hashes:
    """Hash of every run of `length` words: sum of hash x MULTIPLIER**position, modulo 2**64."""
    count = len(hashes) - length + 1
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(length):
        total += hashes[offset : offset + count] * np.uint64(pow(MULTIPLIER, offset, 2**64))
    return total


def _table(found: list[tuple[Hashes, int]]) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """Sorted hashes, and for each the text and the word it begins at, as text x 2**32 + word."""
    grams = np.concatenate([hashes for hashes, _ in found])
    owners = np.concatenate([np.arange(len(hashes), dtype=np.int64) + text * 2**32 for hashes, text in found])
    order = np.argsort(grams, kind="stable")
    return grams[order], owners[order]
