"""Histograms as files: all as data, a few as pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparseforge_core.tracking.histograms import PICTURES, write_histograms


def _lines(names: int, steps: int) -> list[dict[str, Any]]:
    edges = [i / 4 for i in range(5)]
    return [
        {"step": 10 * step, "histogram": {"name": f"mask/site-{name}", "edges": edges, "counts": [step, 0, 0, 5]}}
        for step in range(1, steps + 1)
        for name in range(names)
    ]


@pytest.mark.parametrize(("names", "steps"), [(1, 3), (2, 5), (1, 40)])
def test_all_as_data_and_few_as_pictures(tmp_path: Path, names: int, steps: int) -> None:
    write_histograms(tmp_path, _lines(names, steps))
    assert len(list(tmp_path.rglob("*.json"))) == names * steps
    pictures = sorted(path.name for path in tmp_path.rglob("*.png"))
    assert names <= len(pictures) <= PICTURES
    assert pictures.count(f"step_{10 * steps:06d}.png") == names, "the last step is always drawn"


def test_data_are_edges_and_counts_and_a_picture_is_a_png(tmp_path: Path) -> None:
    write_histograms(tmp_path, _lines(1, 1))
    body = json.loads((tmp_path / "site-0" / "step_000010.json").read_text())
    assert body == {"edges": [0.0, 0.25, 0.5, 0.75, 1.0], "counts": [1, 0, 0, 5]}
    assert (tmp_path / "site-0" / "step_000010.png").read_bytes().startswith(b"\x89PNG")
