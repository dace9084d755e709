"""Token files and the stream: tokenised once and whole, refused when damaged, batches a pure function of the step."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from sparseforge_core import files
from sparseforge_core.data import tokens as tokens_module
from sparseforge_core.data.corpora import Synthetic, TextFiles
from sparseforge_core.data.tokens import TokenFile, TokenStream, check_vocabulary, open_tokens, tokenize_once
from sparseforge_core.data.vocabulary import train_bpe
from sparseforge_core.errors import DataError
from sparseforge_core.evaluate.perplexity import wikitext2_test
from sparseforge_core.evaluate.suites import WIKITEXT_ENV

CORPUS = Synthetic(documents_count=120)
SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json of 300 tokens trained on the test corpus."""
    return train_bpe(CORPUS, 300, tmp_path_factory.mktemp("vocabulary"))


def fast(file: Path, **options: Any) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), **({"eos_token": "<|endoftext|>"} | options))


def file_of(folder: Path, count: int, vocabulary: int = 1000) -> TokenFile:
    """A token file whose ids are 0, 1, 2 …: a window says by itself where it comes from."""
    folder.mkdir(parents=True, exist_ok=True)
    np.arange(count, dtype="uint32").tofile(folder / "tokens.bin")
    digest = files.sha256(folder / "tokens.bin")
    meta = {"tokens": count, "vocabulary": vocabulary, "eos": 0, "dtype": "uint32", "sha256": digest}
    files.write_json(folder / "meta.json", meta)
    return open_tokens(folder)


def test_documents_come_back_each_ended_once(vocabulary: Path, home: Path) -> None:
    tokenizer = fast(vocabulary)
    made = tokenize_once(CORPUS, "train", tokenizer, home)
    assert (made.dtype, made.vocabulary, made.eos) == ("uint16", 300, tokenizer.eos_token_id)
    assert made.tokens == len(made.ids)
    assert made.sha256 == files.sha256(made.folder / "tokens.bin")
    text = tokenizer.decode(made.ids.tolist())
    assert text.split("<|endoftext|>") == [*CORPUS.documents("train", home), ""]


def test_a_corpus_is_tokenised_once(vocabulary: Path, home: Path) -> None:
    first = tokenize_once(CORPUS, "train", fast(vocabulary), home)
    written = (first.folder / "tokens.bin").stat().st_mtime_ns
    again = tokenize_once(CORPUS, "train", fast(vocabulary), home)
    assert again.folder == first.folder
    assert (again.folder / "tokens.bin").stat().st_mtime_ns == written


def test_split_corpus_and_tokenizer_make_the_place(vocabulary: Path, home: Path) -> None:
    other = train_bpe(CORPUS, 301, home)
    made = [
        tokenize_once(CORPUS, "train", fast(vocabulary), home),
        tokenize_once(CORPUS, "heldout", fast(vocabulary), home),
        tokenize_once(Synthetic(documents_count=120, seed=1), "train", fast(vocabulary), home),
        tokenize_once(CORPUS, "train", fast(other), home),
    ]
    assert len({file.folder for file in made}) == len(made)


def test_what_was_last_asked_of_a_tokenizer_does_not_matter(vocabulary: Path, home: Path) -> None:
    clean, used = fast(vocabulary), fast(vocabulary, pad_token="<|endoftext|>")
    used(["a long text that is cut", "b"], truncation=True, max_length=3, padding="max_length")
    assert used.backend_tokenizer.truncation is not None
    made = tokenize_once(CORPUS, "train", used, home / "used")
    assert made.sha256 == tokenize_once(CORPUS, "train", clean, home / "clean").sha256
    assert made.folder.name == tokenize_once(CORPUS, "train", clean, home / "clean").folder.name
    assert used.backend_tokenizer.truncation is not None, "the caller's tokenizer is left as it was"


def test_a_document_cannot_end_itself(vocabulary: Path, home: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one <|endoftext|> two"}\n')
    tokenizer = fast(vocabulary)
    made = tokenize_once(TextFiles.of(tmp_path / "a.jsonl"), "train", tokenizer, home)
    assert made.ids.tolist().count(made.eos) == 1


def test_how_documents_are_gathered_does_not_matter(
    vocabulary: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tokenize_once(CORPUS, "train", fast(vocabulary), home / "whole")
    monkeypatch.setattr(tokens_module, "BATCH_CHARACTERS", 1)
    assert tokenize_once(CORPUS, "train", fast(vocabulary), home / "single").sha256 == whole.sha256


@pytest.mark.parametrize(("size", "dtype"), [(2**16 - 1, "uint16"), (2**16 + 1, "uint32")])
def test_ids_are_as_wide_as_the_vocabulary_needs(size: int, dtype: str, home: Path, tmp_path: Path) -> None:
    words = {f"w{i}": i for i in range(size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "a.txt").write_text(f"w1 w{size - 1}")
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2")
    made = tokenize_once(TextFiles.of(tmp_path / "a.txt"), "train", wrapped, home)
    assert (made.dtype, made.ids.tolist(), made.vocabulary) == (dtype, [1, size - 1, 2], size)


def test_a_tokenizer_that_cannot_serve_is_refused(vocabulary: Path, home: Path) -> None:
    with pytest.raises(DataError, match="no end-of-text token"):
        tokenize_once(CORPUS, "train", fast(vocabulary, eos_token=None), home)
    with pytest.raises(DataError, match="ByT5Tokenizer without a fast backend"):
        tokenize_once(CORPUS, "train", transformers.ByT5Tokenizer(), home)


def test_a_damaged_token_file_is_refused(vocabulary: Path, home: Path) -> None:
    made = tokenize_once(CORPUS, "train", fast(vocabulary), home)
    data = made.folder / "tokens.bin"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"has {made.tokens * 2 - 1} bytes instead of {made.tokens * 2}; delete that"):
        tokenize_once(CORPUS, "train", fast(vocabulary), home)
    for content in ("{", '{"tokens": 3}', None):
        (made.folder / "meta.json").unlink() if content is None else (made.folder / "meta.json").write_text(content)
        with pytest.raises(DataError, match=r"is unreadable .*delete that folder"):
            tokenize_once(CORPUS, "train", fast(vocabulary), home)


def test_an_empty_corpus_leaves_nothing(vocabulary: Path, home: Path) -> None:
    with pytest.raises(DataError, match="is empty"):
        tokenize_once(Synthetic(documents_count=1), "heldout", fast(vocabulary), home)
    assert not [path for path in (home / "tokens").iterdir() if path.suffix != ".lock"]


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    made = file_of(tmp_path, 10, vocabulary=300)
    check_vocabulary(made, 300)
    with pytest.raises(DataError, match="300 entries, the model's embedding 299"):
        check_vocabulary(made, 299)


def _tokenise(vocabulary: Path, home: Path, answers: Any) -> None:
    made = tokenize_once(CORPUS, "train", fast(vocabulary), home)
    answers.put((str(made.folder), made.sha256, int(made.ids.sum())))


def test_processes_that_tokenise_together_get_the_same_file(vocabulary: Path, home: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=_tokenise, args=(vocabulary, home, answers)) for _ in range(3)]
    for process in processes:
        process.start()
    found = {answers.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(20)
    assert len(found) == 1
    assert len([path for path in (home / "tokens").iterdir() if path.suffix != ".lock"]) == 1


@st.composite
def streams(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """(tokens, length, sequences, seed) with at least one window."""
    length = draw(st.integers(1, 9))
    return draw(st.integers(length, 400)), length, 4 * draw(st.integers(1, 4)), draw(st.integers(0, 2**31))


@settings(deadline=None, max_examples=60)
@given(shape=streams(), step=st.integers(1, 60))
def test_a_batch_is_a_function_of_file_seed_and_step(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int, int, int], step: int
) -> None:
    count, length, sequences, seed = shape
    made = file_of(tmp_path_factory.getbasetemp() / f"pure-{count}", count)

    def stream() -> TokenStream:
        return TokenStream(made, seed=seed, sequences=sequences, length=length)

    visited = stream()
    for earlier in range(1, step):
        visited.batch(earlier)
    batch = visited.batch(step)
    assert batch.shape == (sequences, length)
    assert batch.dtype == torch.int64
    assert torch.equal(batch, stream().batch(step)), "steps before it do not matter"
    for world in (1, 2, 4):
        ranks = [stream().batch(step, rank, world) for rank in range(world)]
        assert torch.equal(torch.cat(ranks), batch), "ranks share one global batch"
    starts = batch[:, 0]
    assert bool((starts % length == 0).all())
    assert torch.equal(batch, starts[:, None] + torch.arange(length)), "a window is a run of the file"


@settings(deadline=None, max_examples=60)
@given(shape=streams(), epochs=st.integers(1, 3))
def test_an_epoch_covers_every_window_once(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int, int, int], epochs: int
) -> None:
    count, length, sequences, seed = shape
    made = file_of(tmp_path_factory.getbasetemp() / f"epoch-{count}", count)
    stream = TokenStream(made, seed=seed, sequences=sequences, length=length)
    windows = count // length
    assert stream.windows == windows
    steps = -(-windows * epochs // sequences)
    drawn = torch.cat([stream.batch(step)[:, 0] for step in range(1, steps + 1)]) // length
    for epoch in range(epochs):
        order = drawn[epoch * windows : (epoch + 1) * windows]
        assert sorted(order.tolist()) == list(range(windows))


def test_seeds_and_epochs_have_orders_of_their_own(tmp_path: Path) -> None:
    made = file_of(tmp_path, 800)
    first = TokenStream(made, seed=0, sequences=100, length=8)
    assert not torch.equal(first.batch(1), TokenStream(made, seed=1, sequences=100, length=8).batch(1))
    assert not torch.equal(first.batch(1), first.batch(2))


def test_batches_that_cannot_be_are_refused(tmp_path: Path) -> None:
    made = file_of(tmp_path, 20)
    with pytest.raises(DataError, match="20 tokens, fewer than one window of 21"):
        TokenStream(made, seed=0, sequences=1, length=21)
    stream = TokenStream(made, seed=0, sequences=3, length=5)
    with pytest.raises(DataError, match="3 sequences do not divide over 2 ranks"):
        stream.batch(1, 0, 2)
    for step, rank, world in ((0, 0, 1), (1, 3, 3), (1, -1, 3)):
        with pytest.raises(DataError, match="steps count from 1, ranks from 0"):
            stream.batch(step, rank, world)


@pytest.mark.skipif(not (SHARED / "wikitext2").is_dir(), reason="needs ../shared/data/wikitext2 beside the checkout")
def test_wikitext2_has_as_many_gpt2_tokens_as_the_literature_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WIKITEXT_ENV, str(SHARED / "wikitext2"))
    tokenizer = fast(SHARED / "tokenizers" / "gpt2" / "tokenizer.json")
    assert len(tokenizer.backend_tokenizer.encode(wikitext2_test(), add_special_tokens=False).ids) == 287_644


@pytest.mark.skipif(not (SHARED / "c4").is_dir(), reason="needs ../shared/data/c4 beside the checkout")
def test_real_c4_documents_survive_tokenising(home: Path) -> None:
    corpus = TextFiles.of(SHARED / "c4" / "sample-1000.jsonl")
    tokenizer = fast(SHARED / "tokenizers" / "gpt2" / "tokenizer.json")
    made = tokenize_once(corpus, "heldout", tokenizer, home)
    documents = list(corpus.documents("heldout", home))
    assert 10 < len(documents) < 50
    assert tokenizer.decode(made.ids.tolist()).split("<|endoftext|>") == [*documents, ""]
