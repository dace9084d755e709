"""Corpora: splits that share nothing, every file format, and a sentence for everything that cannot be read."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from sparseforge_core import specs
from sparseforge_core.data.corpora import C4, DOLMINO, HELDOUT_SHARE, Corpus, HubText, Synthetic, TextFiles
from sparseforge_core.errors import DataError, RecipeError

DOCUMENTS = [
    "One fox sees a stone.\nIt is old.\n",
    "Ein Fluß, ganz still.\n",
    "A third document\n\nwith a blank line.\n",
]


def as_text(documents: list[str]) -> bytes:
    return "".join(f"{document}<|endoftext|>\n" for document in documents).encode()


def as_lines(documents: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": d}) + "\n" for i, d in enumerate(documents)).encode()


def zstd(data: bytes) -> bytes:
    return bytes(pyarrow.compress(data, codec="zstd", asbytes=True))


WRITERS: dict[str, Callable[[list[str]], bytes]] = {
    "a.txt": as_text,
    "a.raw": as_text,
    "a.txt.xz": lambda documents: lzma.compress(as_text(documents)),
    "a.txt.gz": lambda documents: gzip.compress(as_text(documents)),
    "a.jsonl": as_lines,
    "a.json.gz": lambda documents: gzip.compress(as_lines(documents)),
    "a.jsonl.xz": lambda documents: lzma.compress(as_lines(documents)),
    "a.json.zst": lambda documents: zstd(as_lines(documents)),
}


def read(corpus: Corpus, home: Path) -> list[str]:
    return list(corpus.all_documents(home))


def test_splits_divide_the_corpus_and_never_change(home: Path) -> None:
    corpus = Synthetic(documents_count=1500, seed=3)
    everything = read(corpus, home)
    train, heldout = list(corpus.documents("train", home)), list(corpus.documents("heldout", home))
    assert sorted(train + heldout) == sorted(everything)
    assert not set(train) & set(heldout)
    assert len(everything) / HELDOUT_SHARE / 2 < len(heldout) < len(everything) / HELDOUT_SHARE * 2
    assert train == list(corpus.documents("train", home))


def test_copies_of_a_document_stay_in_one_split(home: Path, tmp_path: Path) -> None:
    texts = [f"Document number {i}.\n" for i in range(300)]
    file = tmp_path / "twice.txt"
    file.write_bytes(as_text(texts + [f"\n {text} " for text in texts]))
    corpus = TextFiles.of(file)
    splits = [{text.strip() for text in corpus.documents(split, home)} for split in ("train", "heldout")]  # type: ignore[arg-type]
    assert len(splits[1]) > 0
    assert not splits[0] & splits[1]


def test_different_seeds_make_different_synthetic_text(home: Path) -> None:
    assert read(Synthetic(documents_count=3, seed=0), home) != read(Synthetic(documents_count=3, seed=1), home)


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents(name: str, home: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(WRITERS[name](DOCUMENTS))
    assert read(TextFiles.of(tmp_path / name), home) == DOCUMENTS


def test_parquet_gives_the_same_documents(home: Path, tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS, "id": [0, 1, 2]}), tmp_path / "a.parquet")
    assert read(TextFiles.of(tmp_path / "a.parquet"), home) == DOCUMENTS


def test_files_follow_each_other_and_an_unended_last_document_counts(home: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\n<|endoftext|>\n\n<|endoftext|>\nsecond, not ended")
    (tmp_path / "b.jsonl").write_text('\n{"body": "third"}\n')
    text = TextFiles.of(tmp_path / "a.txt", tmp_path / "b.jsonl", field="body")
    assert read(text, home) == ["first\n", "second, not ended", "third"]


def test_without_a_separator_a_file_is_one_document(home: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(as_text(DOCUMENTS))
    assert read(TextFiles.of(tmp_path / "a.txt", separator=None), home) == [as_text(DOCUMENTS).decode()]


def test_a_corpus_survives_its_recipe(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(as_text(DOCUMENTS))
    for corpus in (TextFiles.of(tmp_path / "a.txt", separator=None), C4, DOLMINO, Synthetic(seed=4)):
        assert specs.decode(json.loads(json.dumps(specs.encode(corpus))), Corpus) == corpus  # type: ignore[type-abstract]


def test_a_changed_file_is_refused(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(as_text(DOCUMENTS))
    corpus = TextFiles.of(file)
    file.write_bytes(as_text(DOCUMENTS[:1]))
    with pytest.raises(DataError, match=r"a\.txt is not the one in the recipe"):
        read(corpus, home)
    file.unlink()
    with pytest.raises(DataError, match=r"a\.txt cannot be read: No such file"):
        read(corpus, home)


UNREADABLE = {
    "empty.txt": (b"", "holds no text"),
    "blank.jsonl": (b"\n\n", "holds no text"),
    "spaces.txt": (b" \n<|endoftext|>\n\n", "holds no text"),
    "latin.txt": ("Flu\xdf".encode("latin-1"), "cannot be read"),
    "cut.txt.xz": (lzma.compress(as_text(DOCUMENTS))[:-20], "cannot be read"),
    "cut.jsonl.gz": (gzip.compress(as_lines(DOCUMENTS))[:-20], "cannot be read"),
    "noise.json.zst": (b"no archive", "cannot be read"),
    "noise.parquet": (b"no table", "cannot be read"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "cannot be read"),
    "other.jsonl": (b'{"txt": "a"}\n', r"line 1: unknown field 'text'. Did you mean 'txt'"),
    "list.jsonl": (b'["a"]\n', "line 1: unknown field 'text'"),
    "null.jsonl": (b'{"text": null}\n', "field 'text' holds a NoneType, not text"),
    "a.docx": (b"a", "its ending is not known"),
    "a.parquet.gz": (b"a", "its ending is not known"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_file_is_named(name: str, home: Path, tmp_path: Path) -> None:
    content, sentence = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    corpus = TextFiles.of(tmp_path / name)
    with pytest.raises(DataError, match=sentence) as error:
        read(corpus, home)
    assert str(tmp_path / name) in str(error.value)


def test_a_parquet_without_the_field_names_what_it_has(home: Path, tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"content": DOCUMENTS}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: unknown field 'text'.*Known: content"):
        read(TextFiles.of(tmp_path / "a.parquet"), home)


def test_missing_files_and_missing_hashes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt cannot be read: No such file"):
        TextFiles.of(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match="Is a directory"):
        TextFiles.of(tmp_path)
    with pytest.raises(RecipeError, match=r"TextFiles\.of\(paths\) computes them"):
        TextFiles(paths=("a.txt",), sha256=())
    with pytest.raises(RecipeError, match="at least one"):
        TextFiles(paths=(), sha256=())


def test_an_empty_split_and_an_unknown_one_are_refused(home: Path) -> None:
    with pytest.raises(DataError, match="the heldout split of the synthetic corpus is empty: none of its 2 documents"):
        list(Synthetic(documents_count=2).documents("heldout", home))
    with pytest.raises(DataError, match=r"unknown split 'heldput'\. Did you mean 'heldout'"):
        list(Synthetic().documents("heldput", home))  # type: ignore[arg-type]


def test_hub_text_streams_a_data_set_in_its_order(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the reader takes a folder here for a data set of the hub
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(as_lines(DOCUMENTS))
    corpus = HubText(id="set", revision="main")
    assert read(corpus, home) == DOCUMENTS
    assert read(HubText(id=corpus.id, revision="main", documents_limit=2), home) == DOCUMENTS[:2]
    with pytest.raises(DataError, match=r"unknown field 'txet'. Did you mean 'text'"):
        read(HubText(id=corpus.id, revision="main", field="txet"), home)


def test_the_hub_out_of_reach_names_the_local_alternatives(home: Path) -> None:
    with pytest.raises(DataError, match=r"allenai/c4 cannot be read from the hub.*TextFiles\.of.*PythonDocs") as error:
        next(C4.all_documents(home))
    assert "\n" not in str(error.value)


def test_the_papers_corpora_are_pinned_and_bounded() -> None:
    for corpus in (C4, DOLMINO):
        assert len(corpus.revision) == 40
        assert int(corpus.revision, 16)
        assert corpus.documents_limit


def test_importing_corpora_is_cheap() -> None:
    heavy = ("torch", "numpy", "datasets", "pandas", "pyarrow", "tokenizers", "transformers")
    code = f"import sys, sparseforge_core.data.corpora; print([name for name in {heavy} if name in sys.modules])"
    root = next(itertools.islice(Path(__file__).parents, 3, None))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
