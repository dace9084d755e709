"""The CSV of all measurements: every number of the store's grid once, the same bytes twice."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.measurements import main, measurements_csv
from sparseforge_core.store.results import Results

DEMO = Path(__file__).resolve().parents[2] / "results" / "demo" / "store.db"


@pytest.fixture
def demo():
    results = Results(f"sqlite:///{DEMO}")
    yield results
    results.close()


def test_every_number_of_the_demo_is_there_once(demo: Results) -> None:
    rows = list(csv.DictReader(io.StringIO(measurements_csv(demo, "demo"))))
    places = [(row["cell_key"], row["suite"], row["metric"]) for row in rows]
    suites = demo.suites()
    wanted = {
        (cell, suites.get(stage, stage), metric): value for (cell, stage, metric), (value, _) in demo.values().items()
    }
    assert len(places) == len(set(places))
    assert set(places) == set(wanted)
    for row, place in zip(rows, places, strict=True):
        if wanted[place] is not None:
            assert float(row["value"]) == wanted[place]


def test_the_command_writes_the_same_bytes_twice_and_refuses_by_name(demo: Results, tmp_path: Path) -> None:
    out = tmp_path / "m.csv"
    assert main(["--db", f"sqlite:///{DEMO}", "--grid", "demo", "--out", str(out)]) == 0
    assert out.read_text() == measurements_csv(demo, "demo")
    assert main(["--db", f"sqlite:///{DEMO}", "--grid", "dmo", "--out", str(out)]) == 2
    script = Path(__file__).resolve().parents[2] / "analysis" / "measurements.py"
    ran = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert "--grid" in ran.stdout
