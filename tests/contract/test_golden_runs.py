"""Thirty annealing steps of every family end where they ended before: to the bit where the machine is the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.golden.runs import FILE, STEPS, golden_run, machine
from tests.tiny import EVERY_ARCHITECTURE

REWRITE = "If that is meant, bump the revision of the part and rewrite the file: python -m tests.golden.runs"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
def test_a_golden_run_ends_where_it_ended_before(architecture: str, tmp_path: Path) -> None:
    golden = json.loads(FILE.read_text())
    assert torch.get_num_threads() == 1
    found, before = golden_run(architecture, tmp_path), golden["runs"][architecture]
    if golden["machine"] == machine():
        assert found == before, f"{architecture}: {STEPS} steps no longer give the same bits. {REWRITE}"
    else:  # another processor or torch: sums are rounded in another order, and a rare entry may change sides
        assert found["losses"] == pytest.approx(before["losses"], rel=5e-3), f"{architecture}. {REWRITE}"


def test_every_family_has_a_golden_run() -> None:
    assert set(json.loads(FILE.read_text())["runs"]) == set(EVERY_ARCHITECTURE)
