"""What benchmarks of trainings of SmolLM2-135M's shape share: their options, and the file that their rows go to."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.steps import SHAPES, Shape
from benchmarks.train import commit, hardware, small_shapes


def add_options(parser: argparse.ArgumentParser, file: str) -> None:
    """How wide steps are, where they run, and the folder of `file`."""
    parser.add_argument("--sequences", type=int, default=16, help="of 1024 tokens, in a step")
    parser.add_argument("--device", help="cpu or cuda; the GPU if there is one")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape: whether it runs, not how fast")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help=f"folder for {file}")


def device_of(options: argparse.Namespace) -> torch.device:
    """Where it runs."""
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def shape_of(options: argparse.Namespace) -> Shape:
    """What is trained."""
    return small_shapes()["135m"] if options.tiny else dataclasses.replace(SHAPES["135m"], sequences=options.sequences)


def say(rows: list[dict[str, Any]], row: dict[str, Any], options: argparse.Namespace, file: str) -> None:
    """Add a row to those before it, print it, and write all of them if there is a folder for them."""
    rows.append(rounded(row))
    print(json.dumps(rows[-1]), flush=True)
    if options.out:
        made = {"hardware": hardware(device_of(options)), "commit": commit(), "rows": rows}
        Path(options.out).mkdir(parents=True, exist_ok=True)
        (Path(options.out) / file).write_text(json.dumps(made, indent=1) + "\n")


def rounded(value: Any) -> Any:
    """Numbers with as many digits as are worth reading."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {str(key): rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value
