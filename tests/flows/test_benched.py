"""From a real run of the decode benchmark, on a tiny model, through the store to Table 7."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import decode
from flows.benched import GRID
from tests.core.runtime.exports import packed_export, pruned_model
from tests.flows.test_cli import run

TINY = ["--model", "tiny", "--dtype", "float32", "--device", "cpu", "--repeats", "2", "--block", "16"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python benchmarks/decode.py` writes."""
    path = tmp_path_factory.mktemp("benched") / "decode.json"
    arguments = ["--pairs", "16x8", "8x16", "--batches", "1", "2", "--prefill", "32", "--commit", "abc1234"]
    assert decode.main([*TINY, *arguments, "--out", str(path)]) == 0
    return path


def value(results: Path, measure: str) -> Any:
    return next(row["value"] for row in json.loads(results.read_text()) if row["measure"] == measure)


def test_the_benchmark_measures_both_sides(results: Path) -> None:
    rows = {row["measure"]: row for row in json.loads(results.read_text())}
    for measure in (
        "decode_over_strong_dense.16_8", "whole_over_strong_dense.8_16", "step_over_cublas.batch_2",
        "step_over_strong_dense.slorb", "product_us.sparse.gate_up", "prefill_over_dense.32",
        "prefill_eager_over_dense.32", "prompt_over_dense.32", "prompt_eager_over_dense.32", "prompt_ms.dense.32",
    ):  # fmt: skip
        assert rows[measure]["value"] > 0, measure
        assert rows[measure]["commit"] == "abc1234"
        assert "--out" not in rows[measure]["command"]
    assert not [name for name in rows if "end_to_end" in name], "no prompt is as long as those that bar is for"
    assert value(results, "decode_logits_error.batch_1") < 1e-6
    layer = 64 * 64 * 4 + 3 * 64 * 128
    beside = 2 * 256 * 64 + 64 * 5
    assert value(results, "resident_bytes.dense") == 4 * (2 * layer + beside)
    assert value(results, "resident_bytes.sparse") == 4 * (layer + beside) + 2 * layer // 8
    assert value(results, "resident_memory_ratio") == pytest.approx(
        value(results, "resident_bytes.sparse") / value(results, "resident_bytes.dense"), rel=1e-5
    )


def test_results_of_another_run_are_merged_by_measure(results: Path, tmp_path: Path) -> None:
    path = tmp_path / "merged.json"
    path.write_text(json.dumps([{"measure": "of another benchmark", "value": 1}, {"measure": "copy_bandwidth"}]))
    assert decode.main([*TINY, "--pairs", "--batches", "--prefill", "--out", str(path)]) == 0
    rows = {row["measure"]: row for row in json.loads(path.read_text())}
    assert rows["of another benchmark"]["value"] == 1
    assert rows["copy_bandwidth"]["value"] > 0


def test_a_packed_export_is_measured_with_its_own_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = packed_export(pruned_model("llama"), tmp_path)
    arguments = ["--dtype", "float32", "--device", "cpu", "--pairs", "8x4", "--batches", "1", "--prefill", "16"]
    assert decode.main(["--model", str(folder), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "decode_over_strong_dense.8_4" in shown
    assert "prefill_over_dense.16" in shown
    assert decode.main(["--model", str(tmp_path / "gone"), *arguments]) == 2
    assert "is no complete export" in capsys.readouterr().err


def test_results_go_into_table_7_once(results: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ingest", results) == 0
    assert "4 stages recorded" in capsys.readouterr().out
    assert run("ingest", results) == 0
    assert "0 stages recorded" in capsys.readouterr().out
    assert run("tables", "--grid", GRID, "--only", "table-7", "--strict") == 0
    shown = capsys.readouterr().out
    assert "LLaMA-tiny, random weights" in shown
    assert "Published (not measured here)" in shown
    table = csv.DictReader((home / GRID / "tables" / "table-7.csv").read_text().splitlines())
    rate, dense = (value(results, f"{side}decode_tokens_per_second.16_8") for side in ("", "dense_"))
    line = next(row for row in table if row["row"] == "LLaMA-tiny/16x8")
    assert float(line["Ratio"]) == pytest.approx(rate / dense, rel=1e-5)
    assert float(line["2:4"]) == rate
    assert run("verify") == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda rows: rows[0].pop("commit"), "copy_bandwidth lacks commit"),
        (lambda rows: rows.clear(), "has no resident_memory_ratio"),
        (lambda rows: [r.update(commit="other") for r in rows if r["measure"].startswith("dense_")], "mixes rates"),
        (
            lambda rows: rows.__setitem__(slice(None), [r for r in rows if "tokens_per_second" not in r["measure"]]),
            "no length pair that was measured dense and 2:4",
        ),
    ],
)
def test_files_that_are_no_results_are_refused(
    results: Path, home: Path, change: Any, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads(results.read_text())
    change(rows)
    wrong = home / "wrong.json"
    wrong.write_text(json.dumps(rows))
    assert run("ingest", wrong) == 2
    assert sentence in capsys.readouterr().err
    wrong.write_text("{")
    assert run("ingest", wrong) == 2
    assert "is no results file" in capsys.readouterr().err
