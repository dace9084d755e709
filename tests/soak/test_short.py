"""A little of the soak in every run of the tests: `make soak` does the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_nothing_is_lost_in_a_short_soak() -> None:
    command = [sys.executable, "-m", "tests.soak", "--short", "--only", "kills", "corruptions", "configs", "faults"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert (counts["lost results"], counts["double commits"], counts["tracebacks"]) == (0, 0, 0)
    for what in ("kills", "corruptions", "mutated configs", "other faults", "worlds compared"):
        assert counts[what], f"no {what}"
