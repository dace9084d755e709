"""`sparseforge plan --memory MODEL`: bytes per GPU and seconds per step, predicted before anything is loaded.

Bytes are arithmetic (`sparseforge_core/memory.py`). Times come from rates that `benchmarks/ranks.py` measured on GPUs
(`benchmarks/results/placement.json`), scaled by operations; where that file is missing, from assumed rates, and the
plan says so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseforge_core.errors import RecipeError, unknown
from sparseforge_core.memory import (
    GIB,
    RESERVE,
    Shape,
    Spread,
    decoder,
    lines,
    need,
    peaks,
    refusal,
    start_lines,
    update_bytes,
)

MEASURED = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "placement.json"

SHAPES = {
    shape.name.lower(): shape
    for shape in (
        decoder("SmolLM2-135M", layers=30, hidden=576, intermediate=1536, vocabulary=49152, key_values=192, tied=True),
        decoder("LLaMA-2-7B", layers=32, hidden=4096, intermediate=11008, vocabulary=32000),
        decoder("LLaMA-2-13B", layers=40, hidden=5120, intermediate=13824, vocabulary=32000),
        decoder("Qwen3-1.7B", layers=28, hidden=2048, intermediate=6144, vocabulary=151936, key_values=1024, tied=True),
        decoder("Qwen3-8B", layers=36, hidden=4096, intermediate=12288, vocabulary=151936, key_values=1024),
        decoder("Qwen3-14B", layers=40, hidden=5120, intermediate=17408, vocabulary=151936, key_values=1024),
        decoder("GPT-2", layers=12, hidden=768, intermediate=3072, vocabulary=50257, tied=True, matrices=2),
        decoder("GPT-2-XL", layers=48, hidden=1600, intermediate=6400, vocabulary=50257, tied=True, matrices=2),
        decoder("OPT-2.7B", layers=32, hidden=2560, intermediate=10240, vocabulary=50272, tied=True, matrices=2),
    )
}
"""Decoders by name, in lower case. Position embeddings, and heads wider than the model, are left out: below 1 %."""

CALIBRATION = 128 * 2048
"""Tokens that one-shot methods carry through a model unless their recipe says otherwise."""

ASSUMED = {
    "train_flops_per_second": 400e12,
    "teacher_flops_per_second": 550e12,
    "gather_bytes_per_second": 150e9,
    "update_seconds_per_weight": 150e-12,
    "optimizer_seconds_per_weight": 12e-12,
}
"""Rates where nothing was measured: an H100's bfloat16 peak of 989 TFLOP/s at about 40 %, NVLink, memory at 3 TB/s."""


@dataclass(frozen=True)
class Rates:
    """What a GPU does in a second, and who says so."""

    values: dict[str, float]
    source: str


def rates(path: Path = MEASURED) -> Rates:
    """The measured rates, or the assumed ones where there is no such file."""
    if not path.is_file():
        return Rates(ASSUMED, "assumed rates, nothing measured (arithmetic only)")
    rows = json.loads(path.read_text())
    found = {row["measure"]: float(row["value"]) for row in rows if row["measure"] in ASSUMED}
    missing = sorted(ASSUMED.keys() - found.keys())
    said = f"rates measured on {rows[0]['hardware']}" + (f"; assumed: {', '.join(missing)}" if missing else "")
    return Rates({**ASSUMED, **found}, said)


def shape_of(name: str) -> Shape:
    """A model by its name. Raises RecipeError, suggesting the nearest."""
    if name.lower() not in SHAPES:
        raise RecipeError(unknown("model", name, [shape.name for shape in SHAPES.values()]))
    return SHAPES[name.lower()]


def step_seconds(shape: Shape, spread: Spread, rate: Rates, *, update_every: int = 10) -> dict[str, float]:
    """Seconds of one step of one micro-batch on each GPU, by part; the mask update's share of it too."""
    tokens = spread.micro_batch * spread.length
    attention = 4.0 * shape.layers * shape.hidden * spread.length / 2  # causal, a forward, per token
    forward = 2.0 * shape.masked + attention
    head = 2.0 * shape.vocabulary * shape.hidden
    passes = 4.0 if spread.recompute else 3.0
    student = tokens * (passes * forward + 4.0 * head) / rate.values["train_flops_per_second"]
    teacher = tokens * (forward + 2.0 * head) / rate.values["teacher_flops_per_second"] if spread.teacher else 0.0
    moved = 0.0
    if spread.gpus > 1:
        gathered = (8.0 if spread.masks else 4.0) * shape.masked + 4.0 * shape.outside
        # Twice gathered, gradients scattered once, the teacher gathered once; or all gradients there and back.
        moved = 2.0 * gathered + 4.0 * shape.parameters + (2.0 * shape.masked if spread.teacher else 0.0)
        moved = moved if spread.sharded else 8.0 * shape.parameters
        moved *= (spread.gpus - 1) / spread.gpus
    exchange = moved / rate.values["gather_bytes_per_second"]
    optimizer = shape.parameters / spread.parts * rate.values["optimizer_seconds_per_weight"]
    update = shape.masked * rate.values["update_seconds_per_weight"] / update_every if spread.masks else 0.0
    step = max(student + teacher, exchange) + optimizer + update  # exchange hides behind compute
    return {
        "student": student,
        "teacher": teacher,
        "exchange": exchange,
        "optimizer": optimizer,
        "update": update,
        "step": step,
    }


def plan(name: str, *, spreads: list[Spread], gpu_gib: float) -> list[dict[str, Any]]:
    """For each placement: bytes by part, whether they fit, seconds per step and tokens per second."""
    shape, rate = shape_of(name), rates()
    found = []
    for spread in spreads:
        seconds = step_seconds(shape, spread, rate)
        found.append(
            {
                "model": shape.name,
                "gpus": spread.gpus,
                "micro_batch": spread.micro_batch,
                "length": spread.length,
                "recompute": spread.recompute,
                "lines": [{"what": x.what, "gib": x.count / GIB, "how": x.how} for x in lines(shape, spread)],
                "start_lines": [
                    {"what": x.what, "gib": x.count / GIB, "how": x.how} for x in start_lines(shape, spread)
                ],
                "peaks_gib": {part: count / GIB for part, count in peaks(shape, spread).items()},
                "need_gib": need(shape, spread) / GIB,
                "update_gib": update_bytes(shape, spread) / GIB,
                "usable_gib": gpu_gib * (1.0 - RESERVE),
                "refusal": refusal(shape, spread, gpu_gib * GIB),
                "seconds": seconds,
                "tokens_per_second": spread.gpus * spread.micro_batch * spread.length / seconds["step"],
                "rates": rate.source,
            }
        )
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The plan as text: the parts of the first placement that fits (or of the last), then one line a placement."""
    shown = next((row for row in rows if row["refusal"] is None), rows[-1])
    out = [f"{shown['model']} on {shown['gpus']} GPU(s), GiB on each:"]
    out += [f"  {line['what']:<24}{line['gib']:>8.2f}   {line['how']}" for line in shown["lines"]]
    if shown["start_lines"]:
        out.append(f"  {'all of it':<24}{shown['peaks_gib']['a step']:>8.2f}")
        out.append("Before the first step, while a one-shot method finds where it begins:")
        out += [f"  {line['what']:<28}{line['gib']:>8.2f}   {line['how']}" for line in shown["start_lines"]]
    out.append(f"  {'at most':<24}{shown['need_gib']:>8.2f}   usable {shown['usable_gib']:.1f}")
    out.append("")
    out.append("GPUs batch recompute     GiB  fits  s/step  tokens/s")
    for row in rows:
        out.append(
            f"{row['gpus']:>4} {row['micro_batch']:>5} {'yes' if row['recompute'] else 'no':>9} "
            f"{row['need_gib']:>7.1f} {'no' if row['refusal'] else 'yes':>5} {row['seconds']['step']:>7.2f} "
            f"{row['tokens_per_second']:>9,.0f}"
        )
    out.append(f"Times: {rows[0]['rates']}; bytes by arithmetic.")
    return "\n".join(out)
