"""How fast a model will decode here, from bytes, this GPU's copy bandwidth and what the benchmarks measured of it.

A product takes floor + bytes / (efficiency x bandwidth): both numbers are fitted, for dense and for 2:4 weights, to the
products that `benchmarks/decode.py` timed at one row. The cache is read at the share of copy bandwidth at which steps
grew with the text. What a whole step took beyond both is divided among the layers. More rows scale the products as the
measured steps do. So the prediction of the model that was measured is a repetition, and that of another an
extrapolation by its shapes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sparseforge_core.errors import ExportError, UnsupportedModel
from sparseforge_core.models.folders import shell
from sparseforge_core.runtime.decode.parts import Sizes, refusal

Side = Literal["dense", "sparse"]

KNOWN = {
    "llama-2-7b": Sizes(32, 4096, 32, 32, 128, 11008, 32000, 4096, 1e-5),
    "llama-2-13b": Sizes(40, 5120, 40, 40, 128, 13824, 32000, 4096, 1e-5),
    "llama-3-8b": Sizes(32, 4096, 32, 8, 128, 14336, 128256, 8192, 1e-5),
    "mistral-7b": Sizes(32, 4096, 32, 8, 128, 14336, 32768, 32768, 1e-5),
    "qwen3-8b": Sizes(36, 4096, 32, 8, 128, 12288, 151936, 40960, 1e-6),
    "smollm2-135m": Sizes(30, 576, 9, 3, 64, 1536, 49152, 8192, 1e-5),
}
"""Models by name; any other by the folder of its configuration."""

MEASURED, BATCHES, CONTEXT = "llama-2-7b", (1, 2, 4, 8, 16, 32, 64), 256
"""The model behind the results, the rows of its steps, and how many tokens lay before them."""

KEPT = 0.5 + 1 / 16
"""Bytes of a 2:4 weight of two-byte values over a dense one: half of them, and two bits for each kept."""

ITEM = 2
"""Bytes of a value."""


def product_shapes(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """`[out, in]` of the products of a layer, as they are joined for a step."""
    return {
        "qkv": (sizes.qkv, sizes.width),
        "o": (sizes.width, sizes.heads * sizes.head),
        "gate_up": (2 * sizes.wide, sizes.width),
        "down": (sizes.width, sizes.wide),
    }


def head_shape(sizes: Sizes) -> tuple[int, int]:
    """`[out, in]` of the product that makes logits: dense in every recipe."""
    return sizes.vocabulary, sizes.width


def weight_bytes(shape: tuple[int, int], side: Side) -> float:
    """Of one product."""
    return shape[0] * shape[1] * ITEM * (KEPT if side == "sparse" else 1.0)


def resident_bytes(sizes: Sizes, side: Side, *, tied: bool = False) -> float:
    """All weights of a model: its layers, and embedding and head, which stay dense."""
    layer = sum(weight_bytes(shape, side) for shape in product_shapes(sizes).values())
    norms = ITEM * sizes.width * (2 * sizes.layers + 1)
    return sizes.layers * layer + norms + (1 if tied else 2) * sizes.vocabulary * sizes.width * ITEM


def sizes_in(folder: Path) -> tuple[Sizes, dict[str, Any]]:
    """Sizes of the model of a folder's configuration, whether its embedding is its head, and why our loop refuses it.

    Raises UnsupportedModel if the configuration is none, or names no LLaMA-like sizes.
    """
    model: Any = shell(folder, torch.bfloat16)
    try:
        sizes = Sizes.of(model.config)
    except AttributeError as error:
        raise UnsupportedModel(f"{folder}: speed is predicted for LLaMA-like models; {error}") from error
    return sizes, {"tied": bool(model.config.tie_word_embeddings), "why": refusal(model)}


@dataclass(frozen=True)
class Law:
    """What was measured of one side, on one kind of GPU."""

    floor: float
    """Seconds of a product of no size."""
    efficiency: float
    """Share of copy bandwidth that a large product reaches."""
    head: float
    """Share of copy bandwidth that the head reaches, which is dense."""
    beside: float
    """Seconds of a layer beyond its products and its cache; below zero where they overlap."""
    growth: Mapping[int, float]
    """Seconds of a step of so many rows over one row, the cache's part left out."""
    cache: float = 1.0
    """Share of copy bandwidth at which the cache is read."""

    def seconds(self, sizes: Sizes, side: Side, bandwidth: float, *, batch: int = 1, context: int = 0) -> float:
        """Of one decode step behind `context` tokens."""
        layer = sum(self._product(weight_bytes(shape, side), bandwidth) for shape in product_shapes(sizes).values())
        head = weight_bytes(head_shape(sizes), "dense") / (self.head * bandwidth)
        step = (sizes.layers * (layer + self.beside) + head) * interpolated(self.growth, batch)
        return step + cache_seconds(sizes, batch, context, self.cache * bandwidth)

    def _product(self, nbytes: float, bandwidth: float) -> float:
        return self.floor + nbytes / (self.efficiency * bandwidth)


def cache_seconds(sizes: Sizes, batch: int, context: int, bandwidth: float) -> float:
    """Reading the keys and values of `context` tokens a row once."""
    return sizes.cache_bytes(batch, context, ITEM) / bandwidth


def law(results: Mapping[str, float], side: Side, context: int) -> Law:
    """Fit the measurements of one side; `context` is how many tokens lay before the steps that were timed.

    Raises ExportError naming the first measurement that is missing.
    """
    sizes, bandwidth = KNOWN[MEASURED], 1e12 * _value(results, "copy_bandwidth")
    shapes = product_shapes(sizes)
    points = [(weight_bytes(shapes[n], side), _value(results, f"product_us.{side}.{n}") / 1e6) for n in shapes]
    floor, slope = line(points)
    head = _value(results, f"product_us.{side}.head") / 1e6
    names = {rows: f"step_ms.{side}.batch_{rows}" for rows in BATCHES}
    steps = {rows: _value(results, n) / 1e3 for rows, n in names.items() if rows == 1 or n in results}
    cache = cache_share(results, side, bandwidth)
    inner = {rows: took - cache_seconds(sizes, rows, context, cache * bandwidth) for rows, took in steps.items()}
    beside = (inner[1] - head - sizes.layers * sum(took for _, took in points)) / sizes.layers
    growth = {rows: took / inner[1] for rows, took in inner.items()}
    share = weight_bytes(head_shape(sizes), "dense") / (head * bandwidth)
    return Law(floor, 1.0 / (slope * bandwidth), share, beside, growth, cache)


def cache_share(results: Mapping[str, float], side: Side, bandwidth: float) -> float:
    """Of copy bandwidth, what the growth of steps with the text in front of them says; 1 where one length was measured.

    A pair's rate is that of a step behind its prompt and half of its output.
    """
    prefix = {"dense": "dense_", "sparse": ""}[side] + "decode_tokens_per_second."
    points = []
    for name, rate in results.items():
        prompt, _, output = name.removeprefix(prefix).partition("_")
        if name.startswith(prefix) and prompt.isdigit() and output.isdigit():
            points.append((int(prompt) + int(output) / 2, 1.0 / rate))
    if len({context for context, _ in points}) < 2:
        return 1.0
    growth = statistics.linear_regression(*zip(*points, strict=True)).slope
    fastest = cache_seconds(KNOWN[MEASURED], 1, 1, bandwidth)
    return min(1.0, fastest / growth) if growth > 0.0 else 1.0


def line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Intercept (at least 0) and slope of the line through (bytes, seconds) with the least squared relative error."""
    weights = [1.0 / took**2 for _, took in points]
    total = sum(weights)
    x = sum(w * p[0] for w, p in zip(weights, points, strict=True)) / total
    y = sum(w * p[1] for w, p in zip(weights, points, strict=True)) / total
    above = sum(w * (p[0] - x) * (p[1] - y) for w, p in zip(weights, points, strict=True))
    slope = above / sum(w * (p[0] - x) ** 2 for w, p in zip(weights, points, strict=True))
    if y - slope * x >= 0.0:
        return y - slope * x, slope
    return 0.0, sum(w * p[0] * p[1] for w, p in zip(weights, points, strict=True)) / sum(
        w * p[0] ** 2 for w, p in zip(weights, points, strict=True)
    )


def interpolated(growth: Mapping[int, float], batch: int) -> float:
    """Between measured batches by the logarithm of both; beyond the last in proportion to the rows."""
    known = sorted(growth)
    if batch >= known[-1]:
        return growth[known[-1]] * batch / known[-1]
    above = next(rows for rows in known if rows >= batch)
    below = max(rows for rows in known if rows <= batch)
    if above == below:
        return growth[batch]
    share = math.log(batch / below) / math.log(above / below)
    return float(growth[below] ** (1.0 - share) * growth[above] ** share)


def _value(results: Mapping[str, float], name: str) -> float:
    if name not in results:
        raise ExportError(f"the committed results have no {name}; run benchmarks/decode.py on a GPU")
    return results[name]


def completed(results: Mapping[str, float], reference: Mapping[str, float]) -> tuple[dict[str, float], list[int]]:
    """Results with the steps of those BATCHES that only `reference` measured, and which batches those are.

    What a step of the results takes over one of the reference is interpolated between the batches that both measured,
    and is kept beyond the last. A step of more rows is not one of fewer in proportion: dense products of two rows take
    another way than of one, and few rows cost as little as one.
    """
    found, added = dict(results), set()
    for side in ("dense", "sparse"):
        names = {rows: f"step_ms.{side}.batch_{rows}" for rows in BATCHES}
        over = {rows: results[n] / reference[n] for rows, n in names.items() if n in results and n in reference}
        if 1 not in over:
            continue
        for rows in (rows for rows, n in names.items() if n in reference and n not in results):
            found[names[rows]] = reference[names[rows]] * interpolated(over, min(rows, max(over)))
            added.add(rows)
    return found, sorted(added)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What to expect of a model."""

    batch: int
    context: int
    dense_tokens_per_second: float
    sparse_tokens_per_second: float
    dense_bytes: float
    sparse_bytes: float
    cache_bytes: int

    @property
    def gain(self) -> float:
        """2:4 over dense."""
        return self.sparse_tokens_per_second / self.dense_tokens_per_second


def check_request(sizes: Sizes, batch: int, context: int) -> None:
    """Raise ExportError for a batch or context that cannot be."""
    if batch < 1 or not 0 <= context < sizes.positions:
        raise ExportError(f"batch {batch}, context {context}: at least 1, and within the model's {sizes.positions}")


def forecast(
    sizes: Sizes,
    results: Mapping[str, float],
    *,
    measured_at: int,
    bandwidth: float,
    batch: int = 1,
    context: int = 192,
    tied: bool = False,
) -> Forecast:
    """Both sides of a model; 192 tokens are the middle of 128 generated behind 128.

    Raises ExportError for a batch or context that cannot be.
    """
    check_request(sizes, batch, context)
    rates = {
        side: batch / law(results, side, measured_at).seconds(sizes, side, bandwidth, batch=batch, context=context)
        for side in ("dense", "sparse")
    }
    return Forecast(
        batch=batch,
        context=context,
        dense_tokens_per_second=rates["dense"],
        sparse_tokens_per_second=rates["sparse"],
        dense_bytes=resident_bytes(sizes, "dense", tied=tied),
        sparse_bytes=resident_bytes(sizes, "sparse", tied=tied),
        cache_bytes=sizes.cache_bytes(batch, context, ITEM),
    )
