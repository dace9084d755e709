"""Triton kernels against plain torch: files of cases, run in Triton's interpreter in a process of their own.

The interpreter is chosen when Triton is imported, so a test that has imported it already cannot compare anything.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
AGREED = "all agree"


def run_cases(cases: Mapping[str, Callable[[], None]]) -> None:
    """What a file of cases does as a program: those that its arguments name, or all of them."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in sys.argv[1:] or cases:
        cases[name]()
    print(AGREED)


def assert_agreement(script: Path, device: str = "cpu") -> None:
    """Run all cases of a file: interpreted on the CPU, or as they are on a GPU."""
    how = {"TRITON_INTERPRET": "1"} if device == "cpu" else {"DEVICE": device}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env={**os.environ, **how, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == AGREED
