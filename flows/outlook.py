"""`sparseforge doctor --model`: what 2:4 will bring for a model on this machine, and where it will bring nothing."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from flows.provenance import ROOT
from sparseforge_core.errors import ExportError, unknown

RESULTS = ROOT / "benchmarks" / "results" / "decode.json"
"""What was measured, as committed with the code."""

CONTEXT = 192
"""Tokens before those decoded, where none are asked for: the middle of 128 behind 128."""

PROMPT = 2048
"""Tokens of a prompt, where none are asked for."""

WORTH = 1.05
"""Gains below this are called none."""


def outlook(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The prediction, and the same as lines. Raises ExportError for a model, batch or context that cannot be."""
    from sparseforge_core.runtime import prediction

    sizes, about = model_named(options.model)
    context = min(CONTEXT, sizes.positions // 2) if options.context is None else options.context
    prediction.check_request(sizes, options.batch, context)
    length = prompt_length(options.prompt, sizes)
    gpu = this_gpu(options.dtype, prediction.product_shapes(sizes), options.batch)
    measured, source = committed(gpu["name"])
    bandwidth = gpu["copy_bandwidth"] or 1e12 * measured["copy_bandwidth"]
    expected = prediction.forecast(
        sizes,
        measured,
        measured_at=prediction.CONTEXT,
        bandwidth=bandwidth,
        batch=options.batch,
        context=context,
        tied=about["tied"],
    )
    prompts = prompts_of(sizes, measured, length)
    body = {
        "model": options.model,
        **dataclasses.asdict(expected),
        "gain": expected.gain,
        "prompt": prompts,
        "throughput_bytes": expected.sparse_bytes + gpu.pop("extra_bytes") * sizes.layers,
        "gpu": gpu,
        "measured_on": source,
        "advice": [*advice(expected, gpu, about), *slow_prompts(prompts["expected"])],
    }
    return body, lines(body)


def model_named(text: str) -> tuple[Any, dict[str, Any]]:
    """Sizes of a known model, or of a folder with a configuration; and what its layers are called.

    Raises ExportError for a name that is unknown, or UnsupportedModel for shapes that are not LLaMA's.
    """
    from sparseforge_core.runtime import prediction

    folder = Path(text)
    if text in prediction.KNOWN:
        return prediction.KNOWN[text], {"tied": text == "smollm2-135m", "why": None}
    if not (folder / "config.json").is_file():
        raise ExportError(unknown("model", text, prediction.KNOWN) + " Or give a folder with a config.json.")
    return prediction.sizes_in(folder)


def committed(gpu: str | None) -> tuple[dict[str, float], str]:
    """Measurements by name, and the hardware that they are of: this GPU's where there are such, else RESULTS.

    Batches that a GPU's own file lacks grow as they do in RESULTS, and the second value says so.
    """
    from sparseforge_core.runtime import prediction

    if not RESULTS.is_file():
        raise ExportError(f"{RESULTS} is missing, from which speed is predicted; run benchmarks/decode.py on a GPU")
    whole, hardware = figures(RESULTS)
    for path in sorted(RESULTS.parent.glob("decode-*.json")):
        own, name = figures(path)
        if gpu is not None and name.startswith(f"{gpu},"):
            measured, added = prediction.completed(own, whole)
            text = ", ".join(map(str, added))
            return measured, f"{name}; batches of {text} by how steps grow on {hardware}" if added else name
    return whole, hardware


def figures(path: Path) -> tuple[dict[str, float], str]:
    """What a file of results measured, by name, and on which hardware."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    hardware = next((row["hardware"] for row in rows if row["measure"] == "copy_bandwidth"), "no GPU")
    return {row["measure"]: float(row["value"]) for row in rows}, hardware


def this_gpu(dtype: str, shapes: dict[str, tuple[int, int]], batch: int) -> dict[str, Any]:
    """The GPU here, its copy bandwidth measured now, and for each product why the kernels would not run it.

    Products of one row and of `batch` rows are measured where this machine has not done so, so that what is loaded
    next takes the fastest kernels.
    """
    import torch

    from sparseforge_core.runtime.kernels import supported
    from sparseforge_core.runtime.kernels.choices import large_sizes
    from sparseforge_core.runtime.kernels.measure import copy_bandwidth
    from sparseforge_core.runtime.kernels.tuning import tune
    from sparseforge_core.runtime.loading import extra_bytes

    kind = getattr(torch, dtype)
    there = torch.cuda.is_available()
    refused = {name: supported("cuda", kind, shape) for name, shape in shapes.items()}
    taken = [shape for name, shape in shapes.items() if refused[name] is None]
    number = torch.cuda.current_device() if taken else None  # without, as on the GPU that was measured
    new = {} if number is None else tune(taken, kind, (1, batch), device=number)
    device = None if number is None else torch.device("cuda", number)
    return {
        "products_measured_now": len(new),
        "forms_measured": all(large_sizes(*shape, kind, number) for shape in shapes.values()),
        "extra_bytes": sum(extra_bytes(shape, kind, device, "throughput") for shape in shapes.values()),
        "name": torch.cuda.get_device_name() if there else None,
        "free_bytes": torch.cuda.mem_get_info()[0] if there else 0,
        "copy_bandwidth": copy_bandwidth() if there else None,
        "refused": {name: why for name, why in refused.items() if why is not None},
    }


def advice(expected: Any, gpu: dict[str, Any], about: dict[str, Any]) -> list[str]:
    """What to know before going on; each is a reason why 2:4 would not help, or not here."""
    found = []
    if gpu["name"] is None:
        found.append(
            "this machine has no GPU: here 2:4 saves memory and not time, and the figures are those of the GPU that "
            "was measured"
        )
    elif gpu["refused"]:
        name, why = next(iter(gpu["refused"].items()))
        found.append(f"the kernels do not run {name} here: {why}")
    if about["why"]:
        found.append(f"{about['why']}; it generates with the ordinary cache, which is slower than these figures")
    if expected.gain < WORTH:
        found.append(f"2:4 will not help at batch {expected.batch}: {expected.gain:.2f} times is predicted")
    needed = expected.sparse_bytes + expected.cache_bytes
    if gpu["name"] is not None and needed > gpu["free_bytes"]:
        free = gpu["free_bytes"] / 2**30
        found.append(f"it will not fit: {needed / 2**30:.1f} GiB are needed and {free:.1f} GiB are free")
    return found


def prompt_length(asked: int | None, sizes: Any) -> int:
    """Tokens of the prompt that is predicted: PROMPT where none was asked for, or all that the model takes.

    Raises ExportError for a length that cannot be.
    """
    if asked is not None and not 1 <= asked <= sizes.positions:
        raise ExportError(f"a prompt of {asked} tokens: at least 1, and within the model's {sizes.positions}")
    return min(PROMPT, sizes.positions) if asked is None else asked


def prompts_of(sizes: Any, measured: dict[str, float], length: int) -> dict[str, Any]:
    """What to expect of a prompt in each mode, and the lengths that were measured."""
    from sparseforge_core.runtime.prompt_prediction import MEASURES, forecast_prompt, measured_lengths

    found = [forecast_prompt(sizes, measured, length, mode) for mode in MEASURES]
    return {
        "length": length,
        "expected": [{**dataclasses.asdict(each), "gain": each.gain} for each in found if each is not None],
        "measured": {mode: measured_lengths(measured, mode) for mode in MEASURES},
    }


def slow_prompts(expected: list[dict[str, Any]]) -> list[str]:
    """A note for each mode in which a prompt is expected to take longer than with dense weights."""
    return [
        f"a prompt of {found['length']:,} tokens takes {1.0 / found['gain']:.2f} times as long as with dense weights "
        f"in mode {found['mode']}" + ("; mode throughput holds what prompts need" if found["mode"] == "decode" else "")
        for found in expected
        if found["gain"] < 1.0 / WORTH
    ]


def prompt_lines(prompt: dict[str, Any]) -> list[str]:
    """What to expect of a prompt in each mode that was measured at such lengths, or which lengths those are."""
    if not prompt["expected"]:
        known = {mode: lengths for mode, lengths in prompt["measured"].items() if lengths}
        spans = [f"{lengths[0]:,} to {lengths[-1]:,} tokens in mode {mode}" for mode, lengths in known.items()]
        return [f"prompt    {prompt['length']:,} tokens: not predicted; measured: {', '.join(spans) or 'none'}"]
    return [
        f"prompt    {found['length']:,} tokens in mode {found['mode']}: {1e3 * found['sparse_seconds']:,.1f} ms with "
        f"2:4, {1e3 * found['dense_seconds']:,.1f} dense: {found['gain']:.2f} times"
        for found in prompt["expected"]
    ]


def lines(body: dict[str, Any]) -> list[str]:
    """For people."""
    gpu, gib = body["gpu"], 2**30
    bandwidth = gpu["copy_bandwidth"]
    here = f"{gpu['name']}, {bandwidth / 1e12:.2f} TB/s copied" if bandwidth else "no GPU"
    refused = f"; products that the 2:4 kernels refuse: {', '.join(gpu['refused']) or 'none'}" if bandwidth else ""
    large = f"{'' if gpu['forms_measured'] else 'at most '}{body['throughput_bytes'] / gib:.2f}"
    refused += f"; {gpu['products_measured_now']} products measured now" if gpu["products_measured_now"] else ""
    return [
        f"model     {body['model']}, batch {body['batch']}, behind {body['context']:,} tokens",
        f"machine   {here}{refused}",
        f"speed     {body['sparse_tokens_per_second']:,.0f} tokens/s with 2:4, {body['dense_tokens_per_second']:,.0f} "
        f"dense: {body['gain']:.2f} times (predicted from {body['measured_on']})",
        *prompt_lines(body["prompt"]),
        f"memory    {body['sparse_bytes'] / gib:.2f} GiB with 2:4, {body['dense_bytes'] / gib:.2f} dense, and "
        f"{body['cache_bytes'] / gib:.2f} of cache; {large} with 2:4 in mode throughput",
        *(f"note      {text}" for text in body["advice"]),
    ]
