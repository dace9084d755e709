"""Calibration text for one-shot methods: a seeded sample of windows of a corpus's training split."""

from __future__ import annotations

import torch

from sparseforge_core.data.tokens import TokenFile, TokenStream
from sparseforge_core.errors import DataError

CALIBRATION_SEED = 10_000
"""Added to the cell's seed, so that calibration and training do not read the same windows first."""


def calibration_batches(tokens: TokenFile, *, samples: int, length: int, seed: int, batch: int) -> list[torch.Tensor]:
    """`samples` different windows of the file as int64 `[<= batch, length]` tensors.

    Raises DataError if the file holds fewer windows: a repeated sample tells a criterion nothing new.
    """
    stream = TokenStream(tokens, seed=CALIBRATION_SEED + seed, sequences=samples, length=length)
    if stream.windows < samples:
        raise DataError(
            f"calibration asks for {samples} samples of {length} tokens, the corpus has {stream.windows}; ask for "
            "fewer or shorter samples, or give it more text"
        )
    return list(stream.batch(1).split(batch))
