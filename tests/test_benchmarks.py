"""The benchmark scripts run and say what they promise; how fast anything is, no test asserts."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks import (
    curvature,
    grid,
    one_shape,
    packed,
    published_step,
    ranks,
    recorded_cells,
    several_gpus,
    shared_gpu,
    steps,
    train,
)
from flows import cli
from flows.grids.study import plan
from flows.memory import ASSUMED, rates
from sparseforge_core.observe.curvature import ESTIMATORS, AdamSecondMoment
from sparseforge_core.schedules import Constant

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


def test_train_counts_the_bytes_that_annealing_keeps(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["bench", "train", "--tiny", "--parts", "extra_bytes", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "train.json").read_text())
    found = {row["measure"]: row["value"] for row in rows}
    assert found == {"extra_bytes_per_masked_weight.default": 13.0, "extra_bytes_per_masked_weight": 4.0}
    assert set(rows[0]) == {"measure", "value", "unit", "bar", "hardware", "command", "commit"}
    assert train.main(["--tiny", "--seconds", "0", "--parts", "135m"]) == 0
    assert "not measured" in capsys.readouterr().out


def test_two_gpus_are_asked_for_by_name_where_there_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--device", "cpu", "--parts", "two_gpus", "--out", str(tmp_path)]
    assert train.main(given) == 0
    assert "two_gpus       not measured: it needs 2 GPUs, this machine has 0" in capsys.readouterr().out
    monkeypatch.setattr(several_gpus, "SECONDS", 0.0)  # what is started then finds nothing in time, and that is said
    assert train.main([*given, "--tiny"]) == 1


def test_the_documented_bytes_are_those_of_the_tensors() -> None:
    """The table of docs/training-speed.md, computed again."""
    adam = dataclasses.replace(train.LEAN, curvature=AdamSecondMoment())
    rows = {"the defaults": train.DEFAULT, "`lean`": train.LEAN, "`lean` with Adam's second moment": adam}
    text = (Path(__file__).resolve().parents[1] / "docs" / "training-speed.md").read_text()
    for label, method in rows.items():
        track = train.track_of([(64, 64)], method, torch.device("cpu"))
        said = next(line for line in text.splitlines() if line.startswith(f"| {label} |"))
        assert float(said.split("|")[-2]) == train.kept_bytes(track) / 64**2, label


def test_train_times_steps_of_the_product_and_of_the_published_code() -> None:
    device = torch.device("cpu")
    shape = train.small_shapes()["135m"]
    taken = steps.timed(shape, train.LEAN, device, compiled=False, windows=1, warm=1)
    assert 0 < taken.step < taken.warm_up
    step = published_step.PublishedStep(shape, device, micro_batch=1)
    before = step.masked[0].weight.detach().clone()
    step(1)
    assert step.masked[0].curvature.ne(0.98).any()
    assert not torch.equal(before, step.masked[0].weight)
    assert len(step.masked) == 7 * shape.layers
    assert shape.masked == sum(layer.weight.numel() for layer in step.masked)


def test_recorded_cells_train_to_the_end_and_compare(tmp_path: Path) -> None:
    given = ["--tiny", "--device", "cpu", "--steps", "20", "--cases", "annealing", "--out", str(tmp_path)]
    assert recorded_cells.main(given) == 0
    plain, again, between = json.loads((tmp_path / "recorded_cells.json").read_text())["rows"]
    assert (plain["how"], again["how"]) == ("plain", "plain again")
    assert plain["finite"]
    assert between["losses_apart"] == 0.0, "a CPU adds in one order"
    assert between["masks_alike"] == 1.0


@pytest.mark.slow
def test_processes_that_share_a_device_train_together_and_one_that_fails_ends_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--tiny", "--device", "cpu", "--steps", "12", "--cases", "frozen", "--processes", "2", "1"]
    assert shared_gpu.main([*given, "--out", str(tmp_path)]) == 0
    alone, both = json.loads((tmp_path / "shared_gpu.json").read_text())["rows"]
    assert (alone["processes"], both["processes"]) == (1, 2)
    assert both["over_one"] == pytest.approx(both["tokens_per_second"] / alone["tokens_per_second"], rel=1e-4)
    assert "processes: 2, service: not measured: it is CUDA's" in capsys.readouterr().err
    failing = "import os, sys\nif sys.orig_argv[-2:] == ['--number', '1']:\n    os.write(2, b'no')\n    os._exit(3)\n"
    (tmp_path / "sitecustomize.py").write_text(failing)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert shared_gpu.main([*given, "--out", str(tmp_path)]) == 1
    assert "frozen, processes: 2, turns: not measured: process 1 ended with 3: no\n" in capsys.readouterr().err
    (row,) = json.loads((tmp_path / "shared_gpu.json").read_text())["rows"]
    assert row["processes"] == 1, "what was measured before is kept"


def test_a_shared_gpu_trains_as_wide_steps_as_the_study() -> None:
    parser = argparse.ArgumentParser()
    one_shape.add_options(parser, shared_gpu.FILE)
    assert one_shape.shape_of(parser.parse_args([])).tokens == plan(1, Constant(value=0.0)).tokens


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('[ "$1" = -d ] && exit 0; read what; echo "$what" >> "$CUDA_MPS_LOG_DIRECTORY/asked"', None),
        ("exit 5", "does not start"),
        ('[ "$1" = -d ]', "does not answer 'quit', end it by hand"),
    ],
)
def test_the_multi_process_service_is_started_and_ended(
    script: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a program of its name that notes what it is asked: there is no GPU here."""
    control = tmp_path / shared_gpu.CONTROL
    control.write_text(f"#!/bin/sh\n{script}\n")
    control.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with contextlib.ExitStack() as expected:
        if said:
            expected.enter_context(pytest.raises((shared_gpu.NoService, RuntimeError), match=said))
        with shared_gpu.multi_process_service(tmp_path, "cuda:1") as given:
            assert Path(given["CUDA_MPS_PIPE_DIRECTORY"]).is_dir()
    if not said:
        assert (tmp_path / "log" / "asked").read_text() == "quit\n"


def test_grid_plans_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert grid.main(["--cells", "40", "--run", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["planning"]) >= {"all of 40 cells", "expand", "record", "cost, disk and time"}
    assert "running" not in found


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
    kernels = importlib.import_module("benchmarks.sparse_products")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        kernels.main([])
    assert {measure for measure in kernels.BARS if measure.startswith("gemv_over")} == {
        *(f"gemv_over_best_dense.{name}" for name in (*kernels.SHAPES, "geomean"))
    }


def test_ranks_measures_the_rates_that_the_plan_reads(tmp_path: Path) -> None:
    found = ranks.costs(ranks.SMALL)
    assert found.keys() == ASSUMED.keys() - {"gather_bytes_per_second"}
    assert all(value > 0 for value in found.values())
    (tmp_path / "one.costs.json").write_text(json.dumps({"result": found}))
    (tmp_path / "two1.seven.json").write_text(json.dumps({"error": "it failed"}))
    options = argparse.Namespace(out=tmp_path / "out", small=True, quick=False, only=None, commit="abc")
    rows = {row["measure"]: row["value"] for row in ranks.write(tmp_path, options)}
    assert rows == found, "what failed is left out"
    assert rates(tmp_path / "out" / "placement.json").values == {**ASSUMED, **found}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: real launches are timed by hand")
def test_the_path_of_a_product_is_timed_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    host_path = importlib.import_module("benchmarks.host_path")
    before = torch.nn.functional.linear
    assert host_path.main(["--rows", "1", "64", "--calls", "2"]) == 0
    said = capsys.readouterr().out
    for way in ("gemv", "stream", "tiles", "wide", "expand", "dense", "cusparselt"):
        assert f" {way} " in said
    assert torch.nn.functional.linear is before, "what stood in for the driver is gone again"
