"""The benchmark scripts run and say what they promise; how fast anything is, no test asserts."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from benchmarks import curvature, packed
from sparseforge_core.observe.curvature import ESTIMATORS

SMALL = ["--width", "16", "--layers", "1", "--sequences", "2", "--length", "8", "--repeats", "1", "--device", "cpu"]


def test_curvature_reports_the_cost_of_every_estimator(capsys: pytest.CaptureFixture[str]) -> None:
    assert curvature.main([*SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["estimator"] for row in found["rows"]] == list(ESTIMATORS)
    assert found["masked_parameters"] == 4 * 16 * 16 + 3 * 16 * 48
    for row in found["rows"]:
        assert row["run_over_plain"] == pytest.approx(1.0 + row["look_over_step"] / row["every"])
    assert curvature.main([*SMALL, "--only", "fisher"]) == 0
    assert "fisher" in capsys.readouterr().out


@pytest.mark.slow
def test_packed_reports_bytes_that_agree_with_the_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    assert packed.main(["--layers", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sites"] == 7
    assert found["same_logits"] is True
    kept, width, wide = 9 / 16, 576, 1536  # 2:4 of 2-byte values: half of them, and 2 bits each
    dense = found["dense_bytes"] - found["resident_bytes"]
    assert dense == (1 - kept) * 2 * (2 * width * width + 2 * width * 192 + 3 * width * wide)
    assert found["arithmetic"]["llama-2-7b"]["ratio"] == pytest.approx(0.5795, abs=5e-5)


def test_kernels_need_a_gpu_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="no Triton: the dense baseline cannot be imported")
    kernels = importlib.import_module("benchmarks.kernels")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        kernels.main([])
    assert {measure for measure in kernels.BARS if measure.startswith("gemv_over")} == {
        *(f"gemv_over_best_dense.{name}" for name in (*kernels.SHAPES, "geomean"))
    }
