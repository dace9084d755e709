"""Trained vocabularies: the same everywhere, of exactly the size asked for, able to spell any text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.data.vocabulary import SMALLEST, train_bpe
from sparseforge_core.errors import DataError

CORPUS = Synthetic(documents_count=60)
ROOT = Path(__file__).resolve().parents[3]


def test_a_vocabulary_is_trained_once(home: Path) -> None:
    file = train_bpe(CORPUS, 300, home)
    written = file.stat().st_mtime_ns
    assert train_bpe(CORPUS, 300, home) == file
    assert file.stat().st_mtime_ns == written
    assert train_bpe(CORPUS, 301, home) != file
    assert train_bpe(Synthetic(documents_count=61), 300, home) != file


def test_size_is_exact_and_any_text_can_be_spelled(home: Path) -> None:
    tokenizer = Tokenizer.from_file(str(train_bpe(CORPUS, 300, home)))
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    for text in ("The old fox sees the river.", "Stra\u00dfe, \u6771\u4eac, \U0001f98a\n\t  x"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("The old fox sees the river.").ids) < 20


def test_threads_and_processes_do_not_matter(home: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sparseforge_core.data.corpora import Synthetic;"
        "from sparseforge_core.data.vocabulary import train_bpe;"
        "print(train_bpe(Synthetic(documents_count=60), 300, Path(sys.argv[1])).read_text())"
    )
    made = []
    for threads in ("1", "4"):
        settings = {**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        command = [sys.executable, "-c", code, str(home / threads)]
        made.append(subprocess.run(command, env=settings, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert made[0] == made[1] == train_bpe(CORPUS, 300, home).read_text() + "\n"


def test_sizes_that_cannot_be_are_refused(home: Path) -> None:
    with pytest.raises(DataError, match=f"needs at least {SMALLEST}"):
        train_bpe(CORPUS, SMALLEST - 1, home)
    with pytest.raises(DataError, match=r"yields a vocabulary of \d+ tokens, 5000 were asked for"):
        train_bpe(CORPUS, 5000, home)
    assert not list((home / "vocabularies").glob("*/tokenizer.json"))
