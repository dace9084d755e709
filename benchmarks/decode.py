"""Decoding with 2:4 weights against strong dense ones, in the same loop: Table 7.

python benchmarks/decode.py [--model llama-2-7b|tiny|DIR] [--batches 1 4 16 64] [--prefill 2048 8192] [--out FILE]

Shapes are filled with random weights, the sparse ones in exact 2:4; a packed export takes its own. One dense product is
the fastest of cuBLAS, torch.compile and a Triton kernel, chosen for each shape in place, in graphs over the weights of
all layers. Every length pair is run in full: a prompt fills the cache, then each step is one replay of a CUDA graph.
`decode_*` figures are of the steps alone, `whole_*` of prompt and steps. Without a GPU the same loop runs on the
reference path, which is for trying the script. Results are merged by measure into FILE.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.decode_models import (
    MODELS,
    Swappable,
    dense_side,
    random_parts,
    rotations,
    sparse_side,
    use_fastest,
)  # fmt: skip
from sparseforge_core.errors import ExportError, SparseForgeError
from sparseforge_core.runtime import prediction
from sparseforge_core.runtime.decode import plain
from sparseforge_core.runtime.decode.cache import Cache
from sparseforge_core.runtime.decode.loop import Decoder
from sparseforge_core.runtime.decode.parts import Block, Parts
from sparseforge_core.runtime.decode.products import Dense, Product
from sparseforge_core.runtime.kernels.choices import Choice, Table, record
from sparseforge_core.runtime.kernels.measure import copy_bandwidth
from sparseforge_core.runtime.manifest import WEIGHTS, read_manifest

PAIRS = ((128, 128), (128, 1024), (1024, 128), (1024, 1024))
"""Tokens of prompt and output in Table 7."""

CONTEXT = 256
"""Tokens in the cache when batches are compared."""

COMMITTED = Path(__file__).parent / "results" / "decode.json"
"""What was measured before, with the code."""

BARS = {
    "decode_over_strong_dense.128_128": 1.52,
    "decode_over_strong_dense.128_1024": 1.52,
    "decode_over_strong_dense.1024_128": 1.52,
    "decode_over_strong_dense.1024_1024": 1.52,
    "decode_tokens_per_second.128_128": 320.0,
    "prefill_over_dense.end_to_end": 1.20,
    "resident_memory_ratio": 0.585,
}
"""What issue 8 asks for; the last is a bound from above."""


@dataclass
class Report:
    """Rows of the results, in the order in which they were measured."""

    hardware: str
    command: str
    commit: str
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    earlier: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the file held of this machine and commit, for ratios of what several runs measured."""
    failed: list[str] = field(default_factory=list)

    def add(self, measure: str, value: float, unit: str, spread: Sequence[float] = ()) -> None:
        """One figure; `spread` are the repeats that it is the median of."""
        row = {
            "measure": measure,
            "value": float(f"{value:.6g}"),
            "unit": unit,
            "bar": BARS.get(measure),
            "hardware": self.hardware,
            "command": self.command,
            "commit": self.commit,
        }
        if len(spread) > 1:
            row |= {"n": len(spread), "stderr": float(f"{statistics.stdev(spread) / len(spread) ** 0.5:.3g}")}
        self.rows[measure] = row
        print(f"{measure:<52}{row['value']:>14,.5g} {unit}", flush=True)

    def value(self, measure: str) -> float | None:
        """A figure measured before."""
        row = self.rows.get(measure, self.earlier.get(measure))
        return None if row is None else float(row["value"])

    def recall(self, path: Path | None) -> None:
        """Remember what a file holds of this machine and commit."""
        if path is not None and path.is_file():
            found = [row for row in json.loads(path.read_text()) if row.get("hardware") == self.hardware]
            self.earlier = {row["measure"]: row for row in found if row["commit"] == self.commit}

    def ratio(self, measure: str, of: str, to: str) -> None:
        """`of` over `to`, where both were measured."""
        above, below = self.value(of), self.value(to)
        if above is not None and below:
            self.add(measure, above / below, "times")

    def part(self, name: str, work: Callable[[], None]) -> None:
        """Do a part; what goes wrong in it is printed and remembered, and the others go on."""
        began = time.perf_counter()
        try:
            work()
        except Exception:  # noqa: BLE001 - one part must not cost the others their results
            traceback.print_exc()
            self.failed.append(name)
        print(f"[{name}: {time.perf_counter() - began:.1f} s]", flush=True)

    def save(self, path: Path | None) -> None:
        """Merge into a file: rows of the same measure are replaced, others stay."""
        if path is None:
            return
        there = {row["measure"]: row for row in json.loads(path.read_text())} if path.is_file() else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(list((there | self.rows).values()), indent=1) + "\n")


class Machine:
    """Where it runs: how time is taken, and which small operations are used."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.cuda = self.device.type == "cuda"
        self.steps: ModuleType = plain
        if self.cuda:
            from sparseforge_core.runtime.decode import fast

            self.steps = fast

    @property
    def hardware(self) -> str:
        """As it stands in results."""
        found = torch.cuda.get_device_name(self.device) if self.cuda else f"CPU, {torch.get_num_threads()} threads"
        return f"{found}, torch {torch.__version__}"

    def seconds(self, work: Callable[[], Any]) -> float:
        """Wall time of `work` and everything that it queues."""
        self.synchronize()
        began = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - began

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def graphed(self, work: Callable[[], Any], replays: int = 5) -> float:
        """Median seconds of `work` without the host: as a CUDA graph where there is one."""
        work()
        if not self.cuda:
            return statistics.median(self.seconds(work) for _ in range(replays))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        graph.replay()
        return statistics.median(self.seconds(graph.replay) for _ in range(replays))

    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written, of a large copy."""
        if self.cuda:
            return copy_bandwidth()
        source = torch.empty(2**21, dtype=torch.int32, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.graphed(lambda: target.copy_(source))

    def free(self) -> None:
        """Let go of what nothing holds any more."""
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()


def resident_bytes(parts: Parts) -> int:
    """All tensors of a model, each once."""
    found = {id(t): t for b in parts.blocks for t in (b.norm, b.mlp_norm, *(b.head_norms or ()))}
    found |= {id(t): t for t in (parts.embedding, parts.norm)}
    return sum(t.nbytes for t in found.values()) + sum(product.nbytes for product in parts.products)


@torch.no_grad()
def each_product(report: Report, machine: Machine, parts: Parts, side: str, bandwidth: float) -> None:
    """Seconds of each product at one row, over the weights of all layers, and the share of bandwidth it reaches."""
    for name, products in by_name(parts).items():
        x = torch.randn(1, products[0].inputs, device=machine.device, dtype=parts.embedding.dtype)
        took = machine.graphed(functools.partial(_all, products, x)) / len(products)
        report.add(f"product_us.{side}.{name}", 1e6 * took, "us")
        report.add(f"product_bandwidth_share.{side}.{name}", products[0].nbytes / took / bandwidth, "of copy bandwidth")


def _all(products: Sequence[Product], x: torch.Tensor) -> None:
    for product in products:
        product(x)


def _steps(decoder: Decoder, count: int) -> None:
    for _ in range(count):
        decoder.step()


def by_name(parts: Parts) -> dict[str, list[Product]]:
    """The products of all layers by what they are."""
    found: dict[str, list[Product]] = {}
    for product in parts.products:
        found.setdefault(product.name, []).append(product)
    return found


@torch.no_grad()
def choose_dense(machine: Machine, parts: Parts, names: Sequence[str], *, compile_too: bool) -> None:
    """Set every dense product of these names to the fastest way, and print what was tried."""
    for name in names:
        products = [p for p in by_name(parts).get(name, []) if isinstance(p, Swappable)]
        if not machine.cuda or not products:
            continue
        x = torch.randn(1, products[0].inputs, device=machine.device, dtype=parts.embedding.dtype)
        call = functools.partial(_all, products, x)
        found = use_fastest(products, functools.partial(machine.graphed, call), compile_too=compile_too)
        tried = ", ".join(
            f"{way} {1e6 * took / len(products):.1f}" for way, took in sorted(found.items(), key=lambda i: i[1])
        )
        print(f"  {name}: {tried} us", flush=True)


def run_pairs(
    report: Report, machine: Machine, parts: Parts, side: str, pairs: Sequence[tuple[int, int]], repeats: int
) -> None:
    """Run each length pair in full at batch 1: a prompt, then one step for each token of output."""
    prefix = {"sparse": "", "dense": "dense_"}[side]
    for prompt, output in pairs:
        decoder = Decoder(parts, capacity=prompt + output, steps=machine.steps)
        tokens = torch.randint(0, parts.sizes.vocabulary, (1, prompt), device=machine.device)
        whole, steps = [], []
        for turn in range(1 + (repeats if output <= 128 else 1)):
            first = machine.seconds(functools.partial(decoder.prefill, tokens))
            count = output if turn else 2  # the first turn warms up and captures
            then = machine.seconds(functools.partial(_steps, decoder, count))
            if turn:
                steps.append(output / then)
                whole.append(output / (first + then))
        if not bool(decoder.finite):
            raise ArithmeticError(f"{side}, {prompt} x {output}: a logit was not finite")
        name = f"{prompt}_{output}"
        report.add(f"{prefix}decode_tokens_per_second.{name}", statistics.median(steps), "tokens/s", steps)
        report.add(f"{prefix}whole_tokens_per_second.{name}", statistics.median(whole), "tokens/s", whole)
        del decoder
        machine.free()


def step_seconds(machine: Machine, decoder: Decoder, context: int) -> float:
    """Median of three runs of some steps behind `context` tokens."""
    took, count = [], 24 if machine.cuda else 2
    for _ in range(4):
        decoder.cache.position.fill_(context)
        took.append(machine.seconds(functools.partial(_steps, decoder, count)) / count)
    return statistics.median(took[1:])


def run_batches(
    report: Report, machine: Machine, parts: Parts, side: str, batches: Sequence[int], label: str = ""
) -> None:
    """Milliseconds of a step at each batch size, behind CONTEXT tokens."""
    context = min(CONTEXT, parts.sizes.positions // 2)
    for batch in batches:
        decoder = Decoder(parts, batch=batch, capacity=min(context + 64, parts.sizes.positions), steps=machine.steps)
        took = step_seconds(machine, decoder, context)
        report.add(f"step_ms.{side}{label}.batch_{batch}", 1e3 * took, "ms")
        del decoder
        machine.free()


def show_kernels(machine: Machine, parts: Parts) -> None:
    """Print what one step's kernels take, by name; those that begin early count their waiting too."""
    decoder = Decoder(parts, capacity=2 * CONTEXT, steps=machine.steps)
    step_seconds(machine, decoder, CONTEXT)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        decoder.step()
        machine.synchronize()
    events = sorted((e for e in profiler.events() if e.device_type.name == "CUDA"), key=lambda e: e.time_range.start)
    by_kernel: dict[str, list[float]] = {}
    for event in events:
        by_kernel.setdefault(event.name[:60], []).append(event.time_range.elapsed_us())
    span = events[-1].time_range.end - events[0].time_range.start if events else 0.0
    print(f"  {len(events)} kernels within {span:.0f} us")
    for name, took in sorted(by_kernel.items(), key=lambda item: -sum(item[1])):
        print(f"  {len(took):>5} x {statistics.mean(took):>8.2f} us  {name}")


def run_prefill(
    report: Report, machine: Machine, parts: Parts, side: str, lengths: Sequence[int], repeats: int
) -> None:
    """Milliseconds of a prompt."""
    for length in lengths:
        decoder = Decoder(parts, capacity=length, steps=machine.steps)
        tokens = torch.randint(0, parts.sizes.vocabulary, (1, length), device=machine.device)
        took = [machine.seconds(functools.partial(decoder.prefill, tokens)) for _ in range(repeats + 1)]
        report.add(f"prefill_ms.{side}.{length}", 1e3 * statistics.median(took[1:]), "ms", [1e3 * t for t in took[1:]])
        del decoder
        machine.free()


class Sides:
    """Makes the models that are compared, one at a time."""

    def __init__(self, model: str, machine: Machine, dtype: torch.dtype) -> None:
        self.machine, self.dtype = machine, dtype
        self.folder = None if model in MODELS else Path(model)
        self.sizes = None if self.folder else MODELS[model]
        if self.folder is not None:
            read_manifest(self.folder, skip=(WEIGHTS,))

    def parts(self, side: str, *, block: int | None = None, mode: str = "decode") -> Parts:
        """One side, on the device."""
        device, steps = self.machine.device, self.machine.steps
        if self.folder is not None:
            return self._real(side)
        assert self.sizes is not None
        if side == "dense":
            return random_parts(self.sizes, dense_side(device, self.dtype, steps), device, self.dtype)
        return random_parts(
            self.sizes, sparse_side(device, self.dtype, steps, block=block, mode=mode), device, self.dtype
        )

    def _real(self, side: str) -> Parts:
        """Of a packed export, its dense side unpacked once."""
        from sparseforge_core.runtime import load_sparse
        from sparseforge_core.runtime.decode.on_kernels import on_kernels
        from sparseforge_core.runtime.decode.parts import parts_of
        from sparseforge_core.runtime.decode.products import joined, reference

        assert self.folder is not None
        model = load_sparse(self.folder, dense=side == "dense", device=str(self.machine.device))
        if side == "dense":
            return parts_of(model, lambda modules, name: Swappable(*joined(modules), name, self.machine.steps))
        return parts_of(model, on_kernels(self.machine.steps) if self.machine.cuda else reference)


@torch.no_grad()
def same_numbers(report: Report, sides: Sides, machine: Machine) -> None:
    """The kernels' step against plain torch on the unpacked weights, in one model of two layers."""
    if sides.sizes is None:
        return
    sizes = replace(sides.sizes, layers=2, positions=min(1024, sides.sizes.positions))
    make = sparse_side(machine.device, sides.dtype, machine.steps, block=None, mode="decode")
    parts = random_parts(sizes, make, machine.device, sides.dtype)
    plainly = replace(parts, blocks=[unpacked(block) for block in parts.blocks], head=unpacked_product(parts.head))
    for name, batch, length in (("batch_1", 1, 100), ("long", 1, 2 * sizes.positions // 3), ("batch_4", 4, 100)):
        tokens = torch.randint(0, sizes.vocabulary, (batch, length), device=machine.device)
        capacity = sizes.positions if name == "long" else 256
        fast = Decoder(parts, batch=batch, capacity=capacity, steps=machine.steps)
        slow = Decoder(plainly, batch=batch, capacity=capacity, graph=False)
        worst = 0.0
        for step in range(12):
            for decoder in (fast, slow):
                if step == 0:
                    decoder.prefill(tokens)
                else:
                    decoder.step()
            error = (fast.logits.double() - slow.logits.double()).norm() / slow.logits.double().norm()
            worst = max(worst, float(error))
            following = slow.tokens.clone()
            for decoder in (fast, slow):
                decoder.put(following)
        report.add(f"decode_logits_error.{name}", worst, "of the norm of the logits")
        if not worst < 2e-2:
            raise ArithmeticError(f"{name}: the kernels' logits are off by {worst:.3g} of their norm")


@torch.no_grad()
def same_attention(report: Report, sides: Sides, machine: Machine) -> None:
    """Both kernels of attention against plain torch in float32, where queries look at few keys; and what they store."""
    if sides.sizes is None or not machine.cuda:
        return
    sizes, usual = replace(sides.sizes, layers=1, positions=2048), machine.steps.CROWDED
    cos, sin = rotations(sizes, machine.device)
    for batch, place, capacity in ((1, 200, 256), (1, 1000, 1024), (1, 64, 1024), (4, 100, 256), (16, 300, 320)):
        like = torch.empty(batch, sizes.kv_heads, capacity, sizes.head, device=machine.device, dtype=sides.dtype)
        qkv = 2.0 * torch.randn(batch, sizes.qkv, device=machine.device, dtype=sides.dtype)
        keys, values = torch.randn_like(like), torch.randn_like(like)
        found = []
        for limit in (None, 0, 2**30):
            position = torch.full((1,), place, dtype=torch.int32, device=machine.device)
            kind = torch.float32 if limit is None else sides.dtype
            cache = Cache(sizes, [keys.to(kind, copy=True)], [values.to(kind, copy=True)], cos, sin, position)
            if limit is not None:
                machine.steps.CROWDED = limit  # type: ignore[attr-defined]
            out = (plain if limit is None else machine.steps).attend(qkv.to(kind), cache, 0, None)
            seen = slice(0, place + 1)
            found.append((out, cache.keys[0][:, :, seen], cache.values[0][:, :, seen]))
        machine.steps.CROWDED = usual  # type: ignore[attr-defined]
        for name, other in (("crowded", found[1]), ("uncrowded", found[2])):
            errors = [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(other, found[0])]
            report.add(f"attention_error.{name}.{batch}x{place}", max(errors), "of the norm")
            if not max(errors) < 1.5e-2:
                raise ArithmeticError(f"{name} attention, {batch} x {place}: off by {errors}")


def unpacked(block: Block) -> Block:
    """A layer with plain dense products of the same weights."""
    named = {name: unpacked_product(getattr(block, name)) for name in ("qkv", "out", "gate_up", "down")}
    return replace(block, **named)


def unpacked_product(product: Product) -> Product:
    """One of them."""
    weight = product.weight if isinstance(product, Dense) else product.kernel.dense()  # type: ignore[attr-defined]
    return Dense(weight, None, product.name)


def ratios(report: Report, options: argparse.Namespace) -> None:
    """What one side is over the other."""
    for prompt, output in options.pairs:
        name = f"{prompt}_{output}"
        for kind, slug in (("decode", "decode_over_strong_dense"), ("whole", "whole_over_strong_dense")):
            rate = f"{kind}_tokens_per_second.{name}"
            report.ratio(f"{slug}.{name}", rate, f"dense_{rate}")
    for batch in options.batches:
        dense, sparse = f"step_ms.dense.batch_{batch}", f"step_ms.sparse.batch_{batch}"
        report.ratio(f"step_over_strong_dense.batch_{batch}", dense, sparse)
    report.ratio(
        "step_over_strong_dense.slorb", "step_ms.dense.batch_1", f"step_ms.sparse_slorb{options.block}.batch_1"
    )
    for length in options.prefill:
        report.ratio(f"prefill_over_dense.{length}", f"prefill_ms.dense.{length}", f"prefill_ms.sparse.{length}")
    found = [report.value(f"prefill_over_dense.{length}") for length in options.prefill]
    if found and None not in found:
        report.add("prefill_over_dense.end_to_end", statistics.geometric_mean(v for v in found if v), "times")
    report.ratio("resident_memory_ratio", "resident_bytes.sparse", "resident_bytes.dense")


def compare_prediction(report: Report, options: argparse.Namespace) -> None:
    """What `doctor --model` predicts from the results committed before this run, over what this run measured."""
    if options.model != prediction.MEASURED or not COMMITTED.is_file():
        return
    before = {row["measure"]: float(row["value"]) for row in json.loads(COMMITTED.read_text())}
    for prompt, output in options.pairs:
        expected = prediction.forecast(
            prediction.KNOWN[options.model],
            before,
            measured_at=prediction.CONTEXT,
            bandwidth=1e12 * (report.value("copy_bandwidth") or 0.0),
            context=prompt + output // 2,
        )
        name = f"decode_tokens_per_second.{prompt}_{output}"
        for label, measured, value in (
            ("sparse", name, expected.sparse_tokens_per_second),
            ("dense", f"dense_{name}", expected.dense_tokens_per_second),
        ):
            found = report.value(measured)
            print(f"doctor: {label} {prompt}x{output}: {value:,.1f} tokens/s predicted, {found} measured")
            if found:
                report.add(f"doctor_over_measured.{label}.{prompt}_{output}", value / found, "times")
    held, sizes = (report.value("resident_bytes.sparse") or 0.0) / 2**30, prediction.KNOWN[options.model]
    expected_gib = prediction.resident_bytes(sizes, "sparse") / 2**30
    print(f"doctor: {expected_gib:.3f} GiB of weights predicted, {held:.3f} measured")


def measure(options: argparse.Namespace, report: Report, machine: Machine) -> None:
    """Everything, a part at a time; results are saved after each model."""
    sides = Sides(options.model, machine, getattr(torch, options.dtype))
    if options.choices is not None and machine.cuda:
        record(torch.cuda.current_device(), read_choices(options.choices))
    bandwidth = machine.copy_bandwidth()
    report.add("copy_bandwidth", bandwidth / 1e12, "TB/s")
    report.part("same attention", lambda: same_attention(report, sides, machine))
    report.part("same numbers", lambda: same_numbers(report, sides, machine))
    if report.failed:
        return  # the speed of wrong numbers is no result
    for side, block, mode in (
        ("dense", None, "decode"), ("sparse", None, "decode"), ("sparse", options.block, "decode"),
        ("sparse", None, "throughput"),
    ):  # fmt: skip
        if not wanted(options, sides, side, block, mode):
            continue
        report.part(
            f"{side}, {mode}{'' if block is None else f', SLoRB of {block}'}",
            lambda side=side, block=block, mode=mode: one_model(options, report, machine, sides, side, block, mode),  # type: ignore[misc]
        )
        machine.free()
        if side == "sparse" and block is None and mode == "decode":
            ratios(report, options)  # what there is so far, should the rest not come
        report.save(options.out)
    ratios(report, options)
    report.part("prediction", lambda: compare_prediction(report, options))
    report.save(options.out)


def tune(machine: Machine, parts: Parts, dtype: torch.dtype, rows: Sequence[int], *, copies: bool) -> None:
    """Let the kernels measure their choices for these numbers of rows, where that was not done before."""
    if machine.cuda and rows:
        from sparseforge_core.runtime.kernels.tuning import tune as measure_choices

        shapes = {(p.out, p.inputs) for p in parts.products if p.name != "head"}
        measure_choices(sorted(shapes), dtype, rows, copies=copies)


def read_choices(path: Path) -> Table:
    """Choices of kernels from a file. Raises ExportError if it holds none."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))["choices"]
        return {line: tuple(Choice.from_json(choice) for choice in found) for line, found in body.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} holds no choices of kernels: {error}") from error


def wanted(options: argparse.Namespace, sides: Sides, side: str, block: int | None, mode: str) -> bool:
    """Whether a model has anything to run; an export has the side branches that it has, and one form."""
    if side not in options.sides:
        return False
    if mode == "throughput":
        return sides.folder is None and bool(options.prefill)
    if block is not None:
        return sides.folder is None and 1 in options.batches
    return True


def one_model(
    options: argparse.Namespace, report: Report, machine: Machine, sides: Sides, side: str, block: int | None, mode: str
) -> None:
    """Make one model and run what is asked of it."""
    before = torch.cuda.memory_allocated() if machine.cuda else 0
    parts = sides.parts(side, block=block, mode=mode)
    if mode == "throughput":
        if options.choices is None:
            tune(machine, parts, sides.dtype, options.prefill, copies=True)
        run_prefill(report, machine, parts, side, options.prefill, options.repeats)
        report.add("resident_bytes.sparse_throughput", resident_bytes(parts), "bytes")
        return
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
        report.part("tuning", lambda: tune(machine, parts, sides.dtype, options.tune, copies=False))
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
    if side == "dense" or sides.folder is not None:
        report.part(
            f"{side}: prefill", lambda: run_prefill(report, machine, parts, side, options.prefill, options.repeats)
        )


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
    parser.add_argument("--block", type=int, default=64, help="inputs that share a value of the SLoRB branch")
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
    options = parser.parse_args(arguments)
    machine = Machine(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python benchmarks/decode.py", *_without_places(given)])
    report = Report(machine.hardware, command, options.commit)
    report.recall(options.out)
    try:
        measure(options, report, machine)
    except SparseForgeError as error:
        print(f"decode: {error}", file=sys.stderr)
        return 2
    if report.failed:
        print(f"failed: {', '.join(report.failed)}", file=sys.stderr)
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
