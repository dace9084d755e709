"""Calibration text for one-shot methods: a seeded sample of windows of a corpus's training split."""

from __future__ import annotations

import torch

from sparseforge_core.data.tokens import TokenFile, TokenStream

CALIBRATION_SEED = 10_000
"""Added to the cell's seed, so that calibration and training do not read the same windows first."""


def calibration_batches(tokens: TokenFile, *, samples: int, length: int, seed: int, batch: int) -> list[torch.Tensor]:
    """`samples` sequences of `length` token ids in batches of at most `batch`, without repetition within an epoch."""
    stream = TokenStream(tokens, seed=CALIBRATION_SEED + seed, sequences=samples, length=length)
    return list(stream.batch(1).split(batch))
