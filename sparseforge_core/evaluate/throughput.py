"""Decoding speed and weight bytes of a model as it runs here, labelled with the engine and the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from sparseforge_core.errors import DataError
from sparseforge_core.evaluate.result import SuiteResult, measurement
from sparseforge_core.evaluate.suites import ThroughputSuite

BYTES = 2
"""Bytes of a stored weight (bfloat16)."""


def throughput(
    model: Any, suite: ThroughputSuite, *, device: torch.device, sparse: Sequence[tuple[int, float]]
) -> SuiteResult:
    """Tokens per second of greedy decoding with a key-value cache, median of repeats, after one warm-up.

    `sparse` is (parameters, density) of each masked weight; with any, the bytes of the packed layout are counted too.

    Raises DataError for lengths that exceed the model's positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or model.config.n_positions
    rows = []
    engine = {"engine": "transformers, dense kernels", "batch": suite.batch, "repeats": suite.repeats}
    for prompt, output in suite.prompt_output:
        if prompt + output > positions:
            raise DataError(f"suite {suite.name}: {prompt}+{output} tokens, and the model accepts at most {positions}")
        rates = _rates(model, suite, prompt, output, device)
        spread = statistics.stdev(rates) / len(rates) ** 0.5 if len(rates) > 1 else None
        metric = f"decode_tokens_per_second/{prompt}x{output}"
        rows.append(measurement(metric, statistics.median(rates), spread, len(rates), engine))
    total = sum(parameter.numel() for parameter in model.parameters())
    rows.append(measurement("weight_bytes_dense", float(total * BYTES), None, 1, {"dtype": "bfloat16"}))
    if sparse:
        packed = total * BYTES + sum(count * (density * (BYTES + 0.25) - BYTES) for count, density in sparse)
        detail = {"dtype": "bfloat16", "layout": "kept values and 2-bit indices; by count"}
        rows.append(measurement("weight_bytes_packed", packed, None, 1, detail))
    return SuiteResult(tuple(rows), (), engine)


@torch.no_grad()
def _rates(model: Any, suite: ThroughputSuite, prompt: int, output: int, device: torch.device) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (suite.batch, prompt), generator=generator).to(device)
    rates = []
    for attempt in range(suite.repeats + 1):
        state = model(input_ids=tokens, use_cache=True)
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(output):
            following = state.logits[:, -1:].argmax(-1)
            state = model(input_ids=following, past_key_values=state.past_key_values, use_cache=True)
        _synchronize(device)
        if attempt:  # the first is a warm-up
            rates.append(suite.batch * output / (time.perf_counter() - began))
    return rates


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
