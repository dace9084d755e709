"""How long a prompt will take here: what the benchmarks measured of prompts, by the operations of this one.

A prompt is limited by the tensor cores, so the seconds for an operation are taken from the measured lengths on either
side and multiplied by the operations of this model and length. Beyond what was measured nothing is predicted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sparseforge_core.runtime.decode.parts import Sizes
from sparseforge_core.runtime.prediction import KNOWN, MEASURED, product_shapes

MEASURES = {"throughput": ("prefill_ms", "prefill_over_dense"), "decode": ("prompt_ms", None)}
"""Mode of the 2:4 side -> its measure by side and length; and the ratio without which two times are no pair."""


def operations(sizes: Sizes, length: int) -> float:
    """Multiplications and additions of a prompt: its products, and attention to what stands before each token."""
    weights = sum(out * inputs for out, inputs in product_shapes(sizes).values())
    return 2.0 * sizes.layers * length * (weights + length * sizes.heads * sizes.head)


@dataclass(frozen=True, kw_only=True)
class PromptForecast:
    """What to expect of a prompt whose size came before, with 2:4 weights held in one mode."""

    length: int
    mode: str
    dense_seconds: float
    sparse_seconds: float

    @property
    def gain(self) -> float:
        """2:4 over dense."""
        return self.dense_seconds / self.sparse_seconds


def measured_lengths(results: Mapping[str, float], mode: str) -> list[int]:
    """Tokens of the prompts that were measured on both sides."""
    name, ratio = MEASURES[mode]
    found = [int(key.rpartition(".")[2]) for key in results if key.startswith(f"{name}.sparse.")]
    there = [n for n in found if f"{name}.dense.{n}" in results and (ratio is None or f"{ratio}.{n}" in results)]
    return sorted(there)


def forecast_prompt(sizes: Sizes, results: Mapping[str, float], length: int, mode: str) -> PromptForecast | None:
    """Both sides of a prompt; None where `length` lies outside of what was measured in this mode."""
    lengths = measured_lengths(results, mode)
    if not lengths or not lengths[0] <= length <= lengths[-1]:
        return None
    dense, sparse = (
        _rate(results, lengths, f"{MEASURES[mode][0]}.{side}", length) * operations(sizes, length)
        for side in ("dense", "sparse")
    )
    return PromptForecast(length=length, mode=mode, dense_seconds=dense, sparse_seconds=sparse)


def _rate(results: Mapping[str, float], lengths: list[int], name: str, length: int) -> float:
    """Seconds of one operation at `length` tokens, between the measured ones by the logarithm of both."""
    rates = {n: results[f"{name}.{n}"] / 1e3 / operations(KNOWN[MEASURED], n) for n in lengths}
    above = next(n for n in lengths if n >= length)
    below = max(n for n in lengths if n <= length)
    share = 0.0 if above == below else math.log(length / below) / math.log(above / below)
    return float(rates[below] ** (1.0 - share) * rates[above] ** share)
