"""The prediction: a law put in is a law got out, what was measured is repeated, and other models follow their bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseforge_core.errors import ExportError
from sparseforge_core.runtime.prediction import (
    BATCHES,
    CONTEXT,
    KNOWN,
    cache_seconds,
    forecast,
    head_shape,
    interpolated,
    law,
    line,
    product_shapes,
    resident_bytes,
    sizes_in,
    weight_bytes,
)
from sparseforge_core.runtime.prompt_prediction import forecast_prompt, measured_lengths, operations
from tests.tiny import tiny_model

SEVEN = KNOWN["llama-2-7b"]
BANDWIDTH = 3e12


def measured(floor: float, efficiency: float, beside: float, growth: float) -> dict[str, float]:
    """Results of a machine that follows the law exactly; a step of n rows takes n ** growth times one."""
    found = {"copy_bandwidth": BANDWIDTH / 1e12}
    for side in ("dense", "sparse"):
        layer = 0.0
        for name, shape in product_shapes(SEVEN).items():
            took = floor + weight_bytes(shape, side) / (efficiency * BANDWIDTH)  # type: ignore[arg-type]
            found[f"product_us.{side}.{name}"] = 1e6 * took
            layer += took
        head = weight_bytes(head_shape(SEVEN), "dense") / (efficiency * BANDWIDTH)
        found[f"product_us.{side}.head"] = 1e6 * head
        for rows in BATCHES:
            inner = (SEVEN.layers * (layer + beside) + head) * rows**growth
            found[f"step_ms.{side}.batch_{rows}"] = 1e3 * (inner + cache_seconds(SEVEN, rows, CONTEXT, BANDWIDTH))
    return found


@given(
    floor=st.floats(0, 1e-5),
    efficiency=st.floats(0.3, 1.0),
    beside=st.floats(-2e-6, 2e-5),
    growth=st.floats(0.01, 0.5),
)
def test_a_law_put_in_is_got_out(floor: float, efficiency: float, beside: float, growth: float) -> None:
    results = measured(floor, efficiency, beside, growth)
    for side in ("dense", "sparse"):
        found = law(results, side, CONTEXT)  # type: ignore[arg-type]
        assert found.floor == pytest.approx(floor, abs=1e-10)
        assert found.efficiency == pytest.approx(efficiency, rel=1e-5)
        assert found.beside == pytest.approx(beside, abs=1e-9)
        for rows in BATCHES:
            took = found.seconds(SEVEN, side, BANDWIDTH, batch=rows, context=CONTEXT)  # type: ignore[arg-type]
            assert took == pytest.approx(results[f"step_ms.{side}.batch_{rows}"] / 1e3, rel=1e-6)


def test_without_overheads_the_gain_is_that_of_the_bytes() -> None:
    results = measured(0.0, 1.0, 0.0, 0.0)
    found = forecast(SEVEN, results, measured_at=CONTEXT, bandwidth=BANDWIDTH, context=0)
    assert found.gain == pytest.approx(1.7508, abs=1e-3), "1.75 at an empty cache: gpu bounds of LLaMA-2-7B"
    assert found.dense_tokens_per_second == pytest.approx(227, abs=1)
    assert found.sparse_tokens_per_second == pytest.approx(397, abs=2)
    assert found.sparse_bytes / found.dense_bytes == pytest.approx(0.5795, abs=1e-4)
    longer = forecast(SEVEN, results, measured_at=CONTEXT, bandwidth=BANDWIDTH, context=2048)
    assert longer.gain == pytest.approx(1.66, abs=0.01)
    half = forecast(SEVEN, results, measured_at=CONTEXT, bandwidth=BANDWIDTH / 2, context=0)
    assert half.sparse_tokens_per_second == pytest.approx(found.sparse_tokens_per_second / 2, rel=1e-6)


def test_small_models_gain_less_where_products_have_a_floor() -> None:
    results = measured(5e-6, 0.9, 5e-6, 0.1)
    gains = {
        name: forecast(sizes, results, measured_at=CONTEXT, bandwidth=BANDWIDTH, tied=False).gain
        for name, sizes in KNOWN.items()
    }
    assert gains["smollm2-135m"] < 1.1 < gains["llama-2-7b"] < gains["llama-2-13b"]


def test_batches_between_the_measured_ones() -> None:
    growth = {1: 1.0, 4: 2.0, 64: 8.0}
    assert interpolated(growth, 2) == pytest.approx(2**0.5)
    assert interpolated(growth, 16) == pytest.approx(4.0)
    assert interpolated(growth, 128) == pytest.approx(16.0)


@given(st.floats(0, 1e-5), st.floats(1e-13, 1e-11))
def test_a_line_through_points_on_it(start: float, slope: float) -> None:
    found = line([(x, start + slope * x) for x in (1e7, 3e7, 9e7, 2e8)])
    assert found == pytest.approx((start, slope), rel=1e-6, abs=1e-12)


def test_a_line_never_begins_below_zero() -> None:
    assert line([(1e7, 1e-6), (2e7, 3e-6)])[0] == 0.0


def test_what_was_not_measured_is_named() -> None:
    results = measured(0.0, 1.0, 0.0, 0.0)
    del results["step_ms.sparse.batch_1"]
    with pytest.raises(ExportError, match=r"no step_ms\.sparse\.batch_1; run benchmarks/decode\.py"):
        forecast(SEVEN, results, measured_at=CONTEXT, bandwidth=BANDWIDTH)
    for wrong in ({"batch": 0}, {"context": 5000}, {"context": -1}):
        with pytest.raises(ExportError, match="at least 1, and within the model's 4096"):
            forecast(SEVEN, measured(0, 1, 0, 0), measured_at=CONTEXT, bandwidth=BANDWIDTH, **wrong)


def test_bytes_are_those_of_the_parameters(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    sizes, about = sizes_in(tmp_path)
    assert about == {"tied": True, "why": None}
    assert resident_bytes(sizes, "dense", tied=True) == 2 * sum(p.numel() for p in model.parameters())


def prompts(rate: float, growth: float) -> dict[str, float]:
    """Prompts of which each operation takes `rate` seconds at 1,024 tokens, and `growth` as long at 4,096."""
    found = {}
    for side, slower in (("dense", 1.0), ("sparse", 0.75)):
        for length, times in ((1024, 1.0), (4096, growth)):
            found[f"prefill_ms.{side}.{length}"] = 1e3 * slower * times * rate * operations(SEVEN, length)
            found[f"prefill_over_dense.{length}"] = 1 / 0.75
    return found


@given(rate=st.floats(1e-16, 1e-12), growth=st.floats(0.5, 2.0))
def test_prompts_take_what_was_measured_by_their_operations(rate: float, growth: float) -> None:
    results, other = prompts(rate, growth), KNOWN["mistral-7b"]
    for length, times in ((1024, 1.0), (4096, growth), (2048, growth**0.5)):
        found = forecast_prompt(SEVEN, results, length, "throughput")
        assert found is not None
        assert found.dense_seconds == pytest.approx(rate * times * operations(SEVEN, length))
        assert found.gain == pytest.approx(1 / 0.75)
        else_ = forecast_prompt(other, results, length, "throughput")
        assert else_ is not None
        assert else_.sparse_seconds == pytest.approx(0.75 * rate * times * operations(other, length))
    for beyond in (1023, 4097):
        assert forecast_prompt(SEVEN, results, beyond, "throughput") is None
    assert forecast_prompt(SEVEN, results, 1024, "decode") is None, "that mode was not measured"


def test_operations_of_a_prompt() -> None:
    """Each weight of the layers counts twice a token; attention adds 2 * 32 * 4096 for each token before."""
    weights = 32 * (12288 * 4096 + 4096 * 4096 + 22016 * 4096 + 4096 * 11008)
    assert operations(SEVEN, 1) == 2 * weights + 2 * 32 * 4096
    assert operations(SEVEN, 2048) == 2048 * (2 * weights + 2 * 32 * 4096 * 2048)


@given(share=st.floats(0.2, 1.0))
def test_the_cache_is_read_as_steps_grow(share: float) -> None:
    """Pairs of a machine whose steps grow with the text at a share of copy bandwidth, and the law of it."""
    results = measured(1e-6, 0.9, 4e-6, 0.1)
    assert law(results, "dense", CONTEXT).cache == 1.0, "no pair, no growth"
    first = 1e-3 * results["step_ms.dense.batch_1"]
    for prompt, output in ((128, 128), (128, 1024), (1024, 128), (1024, 1024)):
        more = cache_seconds(SEVEN, 1, prompt + output // 2 - CONTEXT, share * BANDWIDTH)
        results[f"dense_decode_tokens_per_second.{prompt}_{output}"] = 1.0 / (first + more)
        results[f"decode_tokens_per_second.{prompt}_{output}"] = 300.0
    found = law(results, "dense", CONTEXT)
    assert found.cache == pytest.approx(share)
    assert found.seconds(SEVEN, "dense", BANDWIDTH, context=CONTEXT) == pytest.approx(first)
    longer = found.seconds(SEVEN, "dense", BANDWIDTH, context=1536)
    assert longer == pytest.approx(1.0 / results["dense_decode_tokens_per_second.1024_1024"])
    assert law(results, "sparse", CONTEXT).cache == 1.0, "steps that do not grow say nothing of the cache"


def test_times_that_are_no_pair_are_left_out() -> None:
    results = prompts(1e-15, 1.0)
    del results["prefill_over_dense.1024"]
    assert measured_lengths(results, "throughput") == [4096]
    del results["prefill_ms.dense.4096"]
    assert measured_lengths(results, "throughput") == []
