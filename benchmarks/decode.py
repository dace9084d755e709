"""Decoding with 2:4 weights against strong dense ones, in the same loop: Table 7.

python benchmarks/decode.py [--model llama-2-7b|tiny|DIR] [--batches 1 4 16 64] [--prefill 2048 8192] [--out FILE]

Shapes are filled with random weights, the sparse ones in exact 2:4; a packed export takes its own. One dense product is
the fastest of cuBLAS, torch.compile and a Triton kernel, chosen for each shape in place, in graphs over the weights of
all layers. Prompts are run with dense weights and with sparse ones in either mode, in turn: `prompt_*` are those of
mode decode, `prefill_*` of mode throughput. Every length pair is run in full: a prompt fills the cache, then each step
is one replay of a CUDA graph. So is a prompt, on all sides, as its size came before; `*_eager_*` are prompts whose size
did not.
`decode_*` figures are of the steps alone, `whole_*` of prompt and steps. Without a GPU the same loop runs on the
reference path, which is for trying the script. Results are merged by measure into FILE.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.decode_checks import same_attention, same_numbers
from benchmarks.decode_models import MODELS, Sides
from benchmarks.decode_report import Machine, Report
from benchmarks.decode_runs import (
    by_name,
    choose_dense,
    each_product,
    resident_bytes,
    run_batches,
    run_pairs,
    run_prefill,
    show_kernels,
    tune,
)
from benchmarks.talking import talking
from flows.outlook import RESULTS, committed
from sparseforge_core.errors import SparseForgeError
from sparseforge_core.runtime import prediction, prompt_prediction
from sparseforge_core.runtime.kernels.choices import record
from sparseforge_core.runtime.kernels.table import read_file

PAIRS = ((128, 128), (128, 1024), (1024, 128), (1024, 1024))
"""Tokens of prompt and output in Table 7."""

LONG = 2048
"""Tokens from which a prompt counts for the bar of prompts."""


def ratios(report: Report, options: argparse.Namespace) -> None:
    """What one side is over the other."""
    for prompt, output in options.pairs:
        name = f"{prompt}_{output}"
        for kind, slug in (("decode", "decode_over_strong_dense"), ("whole", "whole_over_strong_dense")):
            rate = f"{kind}_tokens_per_second.{name}"
            report.ratio(f"{slug}.{name}", rate, f"dense_{rate}")
    for batch in options.batches:
        dense, sparse = f"step_ms.dense.batch_{batch}", f"step_ms.sparse.batch_{batch}"
        against = "strong_dense" if batch == 1 else "cublas"  # dense products are chosen for one row alone
        report.ratio(f"step_over_{against}.batch_{batch}", dense, sparse)
    report.ratio(
        "step_over_strong_dense.slorb", "step_ms.dense.batch_1", f"step_ms.sparse_slorb{options.block}.batch_1"
    )
    for kind in ("prefill", "prompt"):
        lengths = [length for length in options.prefill if length >= LONG]  # shorter ones have a bar of their own
        found = [report.value(f"{kind}_over_dense.{length}") for length in lengths]
        if found and None not in found:
            slowest = min(value for value in found if value is not None)
            report.add(f"{kind}_over_dense.end_to_end", slowest, f"times, at least, from {min(lengths):,} tokens on")
    report.ratio("resident_memory_ratio", "resident_bytes.sparse", "resident_bytes.dense")


def compare_prediction(report: Report, options: argparse.Namespace, machine: Machine) -> None:
    """What `doctor --model` predicts from the results committed before this run, over what this run measured."""
    if options.model != prediction.MEASURED or not RESULTS.is_file():
        return
    before, source = committed(torch.cuda.get_device_name(machine.device) if machine.cuda else None)
    sizes = prediction.KNOWN[options.model]
    print(f"doctor: from {source}")
    for prompt, output in options.pairs:
        expected = prediction.forecast(
            sizes,
            before,
            measured_at=prediction.CONTEXT,
            bandwidth=1e12 * (report.value("copy_bandwidth") or 0.0),
            context=prompt + output // 2,
        )
        name = f"{prompt}_{output}"
        compare(report, f"sparse.{name}", expected.sparse_tokens_per_second, f"decode_tokens_per_second.{name}")
        compare(report, f"dense.{name}", expected.dense_tokens_per_second, f"dense_decode_tokens_per_second.{name}")
    lengths = {"throughput": options.prefill, "decode": sorted({prompt for prompt, _ in options.pairs})}
    for mode, (measure, _) in prompt_prediction.MEASURES.items():
        for length in lengths[mode]:
            found = prompt_prediction.forecast_prompt(sizes, before, length, mode)
            if found is not None:
                took = (("sparse", found.sparse_seconds), ("dense", found.dense_seconds))
                for side, seconds in took:
                    compare(report, f"{measure}.{side}.{length}", 1e3 * seconds, f"{measure}.{side}.{length}")
    held = (report.value("resident_bytes.sparse") or 0.0) / 2**30
    expected_gib = prediction.resident_bytes(sizes, "sparse") / 2**30
    print(f"doctor: {expected_gib:.3f} GiB of weights predicted, {held:.3f} measured")


def compare(report: Report, name: str, expected: float, measure: str) -> None:
    """What was predicted over what was measured, if it was."""
    found = report.value(measure)
    if found:
        report.add(f"doctor_over_measured.{name}", expected / found, "times")


def measure(options: argparse.Namespace, report: Report, machine: Machine) -> None:
    """Everything, a part at a time; results are saved after each model."""
    sides = Sides(options.model, machine, getattr(torch, options.dtype))
    if options.choices is not None and machine.cuda:
        record(torch.cuda.current_device(), read_file(options.choices))
    bandwidth = machine.copy_bandwidth()
    report.add("copy_bandwidth", bandwidth / 1e12, "TB/s")
    report.part("same attention", lambda: same_attention(report, sides, machine))
    report.part("same numbers", lambda: same_numbers(report, sides, machine))
    if report.failed:
        return  # the speed of wrong numbers is no result
    if options.prefill:
        report.part("prompts", lambda: prompts(options, report, machine, sides))
        machine.free()
        report.save(options.out)
    for side, block in (
        ("dense", None), ("sparse", None), ("sparse", options.block),
    ):  # fmt: skip
        if not wanted(options, sides, side, block):
            continue
        report.part(
            f"{side}{'' if block is None else f', SLoRB of {block}'}",
            lambda side=side, block=block: one_model(options, report, machine, sides, side, block),  # type: ignore[misc]
        )
        machine.free()
        if side == "sparse" and block is None:
            ratios(report, options)  # what there is so far, should the rest not come
        report.save(options.out)
    ratios(report, options)
    report.part("prediction", lambda: compare_prediction(report, options, machine))
    report.save(options.out)


def wanted(options: argparse.Namespace, sides: Sides, side: str, block: int | None) -> bool:
    """Whether a model has anything to run; an export has the side branches that it has."""
    if side not in options.sides or not (options.pairs or options.batches or options.kernels):
        return False
    return block is None or (sides.folder is None and 1 in options.batches and block > 0)


def prompts(options: argparse.Namespace, report: Report, machine: Machine, sides: Sides) -> None:
    """Prompts with dense weights, and with sparse ones in modes `throughput` and `decode`; all are held at once."""
    tune(machine, sides.shapes(), sides.dtype, options.prefill, copies=True)  # what `--choices` lacks
    held = {side: sides.parts(side, mode="throughput") for side in options.sides}
    if "sparse" in held:
        report.add("resident_bytes.sparse_throughput", resident_bytes(held["sparse"]), "bytes")
        held["packed"] = sides.parts("sparse")
    run_prefill(report, machine, held, options.prefill, options.repeats)


def one_model(
    options: argparse.Namespace, report: Report, machine: Machine, sides: Sides, side: str, block: int | None
) -> None:
    """Make one model in mode `decode` and run what is asked of it."""
    before = torch.cuda.memory_allocated() if machine.cuda else 0
    parts = sides.parts(side, block=block)
    choose_dense(machine, parts, ["head"] if side == "sparse" else list(by_name(parts)), compile_too=options.compile)
    if block is not None:
        run_batches(report, machine, parts, side, [1], f"_slorb{block}")
        return
    report.add(f"resident_bytes.{side}", resident_bytes(parts), "bytes")
    if machine.cuda:
        machine.free()
        report.add(f"allocated_bytes.{side}", torch.cuda.memory_allocated() - before, "bytes")
    bandwidth = 1e12 * (report.value("copy_bandwidth") or 0.0)
    if side == "sparse" and options.tune:
        shapes = [(p.out, p.inputs) for p in parts.products if p.name != "head"]
        report.part("tuning", lambda: tune(machine, shapes, sides.dtype, options.tune, copies=False))
    if options.pairs:
        report.part(f"{side}: products", lambda: each_product(report, machine, parts, side, bandwidth))
    pairs = [(p, o) for p, o in options.pairs if p + o <= parts.sizes.positions]
    report.part(f"{side}: pairs", lambda: run_pairs(report, machine, parts, side, pairs, options.repeats))
    report.part(f"{side}: batches", lambda: run_batches(report, machine, parts, side, options.batches))
    if options.late and machine.cuda:
        machine.steps.EARLY = False  # type: ignore[attr-defined]
        report.part(f"{side}: late", lambda: run_batches(report, machine, parts, side, [1], "_late"))
        machine.steps.EARLY, usual = True, machine.steps.CROWDED  # type: ignore[attr-defined]
        for name, limit in (("_crowded", 0), ("_uncrowded", 2**30)):
            machine.steps.CROWDED = limit  # type: ignore[attr-defined]
            report.part(f"{side}: {name}", lambda name=name: run_batches(report, machine, parts, side, [1, 16], name))  # type: ignore[misc]
        machine.steps.CROWDED = usual  # type: ignore[attr-defined]
    if options.kernels and machine.cuda:
        report.part(f"{side}: kernels", lambda: show_kernels(machine, parts))
    took = report.value(f"step_ms.{side}.batch_1")
    if took:
        report.add(f"step_bytes_per_second.{side}", parts.step_bytes / took / 1e9, "TB/s")
        report.add(f"step_bandwidth_share.{side}", parts.step_bytes / took * 1e3 / bandwidth, "of copy bandwidth")


def pair(text: str) -> tuple[int, int]:
    """128x1024 as two numbers."""
    prompt, _, output = text.partition("x")
    return int(prompt), int(output)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and save; exit code 1 if a part failed, 2 for a model that is none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="llama-2-7b", help=f"{', '.join(MODELS)}, or the folder of a packed export")
    parser.add_argument("--pairs", nargs="*", type=pair, default=list(PAIRS), help="prompt x output, such as 128x1024")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 2, 4, 8, 16, 32, 64], help="rows of a step")
    parser.add_argument("--prefill", nargs="*", type=int, default=[2048, 4096, 8192], help="tokens of a prompt")
    parser.add_argument("--block", type=int, default=64, help="inputs that share a value of the SLoRB branch; 0: none")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--repeats", type=int, default=3, help="of what takes a second or less")
    parser.add_argument("--choices", type=Path, help="choices that the kernels measured on such a GPU, to spare tuning")
    parser.add_argument(
        "--tune", nargs="*", type=int, default=[], help="rows that the kernels measure choices for first"
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out of dense")
    parser.add_argument("--sides", nargs="*", default=["dense", "sparse"], choices=("dense", "sparse"), help="to run")
    parser.add_argument("--kernels", action="store_true", help="print what the kernels of one step take")
    parser.add_argument(
        "--late",
        action="store_true",
        help="also time steps whose small kernels do not begin early, and either kernel of attention",
    )
    parser.add_argument("--device", help="cpu or cuda; the GPU if there is one")
    parser.add_argument("--commit", default="", help="the commit of this tree, as results say it")
    parser.add_argument("--out", type=Path, help="file of results, merged by measure")
    parser.add_argument("--json", action="store_true", help="end with the rows as JSON on stdout, all else on stderr")
    parser.add_argument("--quiet", action="store_true", help="no lines, for the exit code or --json")
    options = parser.parse_args(arguments)
    machine = Machine(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python benchmarks/decode.py", *_without_places(given)])
    report = Report(machine.hardware, command, options.commit)
    report.recall(options.out)
    try:
        with talking(options):
            measure(options, report, machine)
    except SparseForgeError as error:
        print(f"decode: {error}", file=sys.stderr)
        return 2
    if report.failed:
        print(f"failed: {', '.join(report.failed)}", file=sys.stderr)
    if options.json:
        print(json.dumps(list(report.rows.values())))
    return 1 if report.failed else 0


def _without_places(arguments: list[str]) -> list[str]:
    """The command as anybody would repeat it: without where the file goes and what this tree is called."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument not in ("--out", "--commit"):
            kept.append(argument)
        skip = not skip and argument in ("--out", "--commit")
    return kept


if __name__ == "__main__":
    sys.exit(main())
