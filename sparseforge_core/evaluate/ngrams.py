"""Finding texts inside other texts by shared runs of words, exactly, in one pass over any amount of text.

The n-grams of the texts looked for are hashed once; the text searched streams by and is held a few megabytes at a time.
A hash that matches is confirmed word by word, so nothing is found that is not there.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

log = logging.getLogger(__name__)

WORD = re.compile(r"[^\W_]+")
"""A word: letters and digits of any script; everything else separates words."""

BATCH_WORDS = 500_000
"""Words of the searched text hashed at a time."""

REPORT_SECONDS = 60.0
"""Between two lines of progress in the log."""

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
                *_, (_, grams) = _grams(_hashes(words), length)
                places.setdefault(length, []).append((grams, len(self._texts)))
                self._texts.append((item, words))
        self._tables = {length: _Table(found) for length, found in places.items()}

    def find(self, documents: Iterable[str]) -> Counted:
        """The items of which some gram occurs in the documents."""
        counted = Counted()
        reported = time.monotonic()
        for words in _batches(documents, counted):
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                log.info("read %.1f million words, %d items occur so far", counted.words / 1e6, len(counted.found))
            for length, grams in _grams(_hashes(words), max(self._tables, default=0)):
                if length in self._tables:
                    self._match(words, grams, length, self._tables[length], counted)
        return counted

    def _match(self, words: list[str], grams: Hashes, length: int, table: _Table, counted: Counted) -> None:
        for place, owners in table.hits(grams):
            gram = words[place : place + length]
            for text, start in owners:
                item, own = self._texts[text]
                if item not in counted.found and own[start : start + length] == gram:
                    counted.found[item] = " ".join(gram)


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


def _grams(hashes: Hashes, longest: int) -> Iterator[tuple[int, Hashes]]:
    """(length, hash of every run of so many words) for each length up to `longest` that fits.

    A run's hash is the sum of hash x MULTIPLIER**position, modulo 2**64.
    """
    grams = hashes
    for length in range(1, min(longest, len(hashes)) + 1):
        if length > 1:
            grams = grams[:-1] + hashes[length - 1 :] * np.uint64(pow(MULTIPLIER, length - 1, 2**64))
        yield length, grams


class _Table:
    """Sorted hashes, and where each comes from. A bit map in front answers most of the many that are not there."""

    def __init__(self, found: list[tuple[Hashes, int]]) -> None:
        """`found` are the gram hashes of each text, in the order of its words, with the text's number."""
        grams = np.concatenate([hashes for hashes, _ in found])
        order = np.argsort(grams, kind="stable")
        self.grams = grams[order]
        self.text = np.concatenate([np.full(len(hashes), text) for hashes, text in found])[order]
        self.start = np.concatenate([np.arange(len(hashes)) for hashes, _ in found])[order]
        bits = min(25, max(10, 4 + len(grams).bit_length()))
        self.shift = np.uint64(64 - bits)
        self.present = np.zeros(2**bits, dtype=np.bool_)
        self.present[grams >> self.shift] = True

    def hits(self, grams: Hashes) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """(place in `grams`, (text, word) of every gram of the same hash)."""
        places = np.flatnonzero(self.present[grams >> self.shift])
        asked = grams[places]
        first = np.searchsorted(self.grams, asked, side="left")
        last = np.searchsorted(self.grams, asked, side="right")
        for index in np.flatnonzero(last > first).tolist():
            own = slice(int(first[index]), int(last[index]))
            yield int(places[index]), list(zip(self.text[own].tolist(), self.start[own].tolist(), strict=True))
