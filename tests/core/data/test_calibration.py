"""Calibration: as many different windows as were asked for, or a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparseforge_core.data.calibration import calibration_batches
from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.data.tokens import TokenFile, TokenStream, tokenize_once
from sparseforge_core.data.vocabulary import train_bpe
from sparseforge_core.errors import DataError
from tests.core.data.test_tokens import fast

CORPUS = Synthetic(documents_count=60)


@pytest.fixture
def tokens(home: Path) -> TokenFile:
    """The training split of a small corpus."""
    return tokenize_once(CORPUS, "train", fast(train_bpe(CORPUS, 300, home)), home)


def test_samples_are_different_windows_in_batches(tokens: TokenFile) -> None:
    batches = calibration_batches(tokens, samples=11, length=16, seed=0, batch=4)
    assert [tuple(batch.shape) for batch in batches] == [(4, 16), (4, 16), (3, 16)]
    everything = TokenStream(tokens, seed=0, sequences=tokens.tokens // 16, length=16).batch(1).tolist()
    drawn = [tuple(row) for row in torch.cat(batches).tolist()]
    assert len(set(drawn)) == 11
    assert all(list(row) in everything for row in drawn)


def test_the_sample_is_a_function_of_the_seed_and_not_of_the_batch(tokens: TokenFile) -> None:
    first = torch.cat(calibration_batches(tokens, samples=12, length=16, seed=0, batch=4))
    assert torch.equal(first, torch.cat(calibration_batches(tokens, samples=12, length=16, seed=0, batch=5)))
    assert not torch.equal(first, torch.cat(calibration_batches(tokens, samples=12, length=16, seed=1, batch=4)))


def test_calibration_does_not_begin_where_training_does(tokens: TokenFile) -> None:
    sample = torch.cat(calibration_batches(tokens, samples=12, length=16, seed=0, batch=12))
    assert not torch.equal(sample, TokenStream(tokens, seed=0, sequences=12, length=16).batch(1))


def test_more_samples_than_windows_are_refused(tokens: TokenFile) -> None:
    windows = tokens.tokens // 16
    assert len(calibration_batches(tokens, samples=windows, length=16, seed=0, batch=windows)) == 1
    with pytest.raises(DataError, match=f"asks for {windows + 1} samples of 16 tokens, the corpus has {windows}"):
        calibration_batches(tokens, samples=windows + 1, length=16, seed=0, batch=4)
