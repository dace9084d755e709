"""What benchmarks/decode.py times of one model: its products, length pairs, batches, prompts."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterable, Mapping, Sequence

import torch

from benchmarks.decode_models import Swappable, use_fastest
from benchmarks.decode_report import Machine, Report
from sparseforge_core.runtime.decode.loop import Decoder
from sparseforge_core.runtime.decode.parts import Parts
from sparseforge_core.runtime.decode.products import Product

WARM, TURNS = 2, 7
"""Prompts that only warm up (the second of a size is captured), and that are timed at least, on each side."""

HOST_TURNS = 101
"""Of prompts that the host launches, on each side: single ones differ by a fifth, the bar is a hundredth."""

CONTEXT = 256
"""Tokens in the cache when batches are compared."""


def resident_bytes(parts: Parts) -> int:
    """All tensors of a model, each once."""
    found = {id(t): t for b in parts.blocks for t in (b.norm, b.mlp_norm, *(b.head_norms or ()))}
    found |= {id(t): t for t in (parts.embedding, parts.norm)}
    return sum(t.nbytes for t in found.values()) + sum(product.held_bytes for product in parts.products)


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
    """Run each length pair in full at batch 1: a prompt whose size came before, then one step for each token."""
    prefix = {"sparse": "", "dense": "dense_"}[side]
    prompts: dict[int, list[float]] = {}
    for prompt, output in pairs:
        decoder = Decoder(parts, capacity=prompt + output, steps=machine.steps)
        tokens = torch.randint(0, parts.sizes.vocabulary, (1, prompt), device=machine.device)
        whole, steps = [], []
        for _ in range(WARM):
            decoder.prefill(tokens)
        for turn in range(1 + (repeats if output <= 128 else 1)):
            first = machine.seconds(functools.partial(decoder.prefill, tokens))
            count = output if turn else 2  # the first turn warms up and captures
            then = machine.seconds(functools.partial(_steps, decoder, count))
            if turn:
                prompts.setdefault(prompt, []).append(1e3 * first)
                steps.append(output / then)
                whole.append(output / (first + then))
        if not bool(decoder.finite):
            raise ArithmeticError(f"{side}, {prompt} x {output}: a logit was not finite")
        name = f"{prompt}_{output}"
        report.add(f"{prefix}decode_tokens_per_second.{name}", statistics.median(steps), "tokens/s", steps)
        report.add(f"{prefix}whole_tokens_per_second.{name}", statistics.median(whole), "tokens/s", whole)
        del decoder
        machine.free()
    for prompt, took in prompts.items():
        if report.value(f"prompt_over_dense.{prompt}") is None:  # those that took turns with the other side are better
            report.add(f"prompt_ms.{side}.{prompt}", statistics.median(took), "ms", took)


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
    report: Report, machine: Machine, held: Mapping[str, Parts], lengths: Sequence[int], repeats: int
) -> None:
    """Milliseconds of a prompt on each side, and their ratio: the sides take turns, so that all see one machine.

    Sides are "dense", "sparse" (mode `throughput`: `prefill_*`) and "packed" (mode `decode`: `prompt_*`). Without
    `eager` a prompt is of a size that came before, on a GPU the replay of a graph; with it one that the
    host launches kernel by kernel, as the first of a size is. `*_host_ms` is how long the host takes for that: where
    it nears the whole, the host is what was measured. `*_spread` is how far the ratios of single turns lie apart.
    """
    for length in lengths:
        tokens = torch.randint(0, next(iter(held.values())).sizes.vocabulary, (1, length), device=machine.device)
        for name, graph in (("", None), ("_eager", False)):
            decoders = {
                side: Decoder(parts, capacity=length, steps=machine.steps, graph=graph) for side, parts in held.items()
            }
            run_turns(report, machine, decoders, tokens, name, max(repeats, TURNS if graph is None else HOST_TURNS))
            if graph is None and machine.cuda:
                for side, decoder in decoders.items():
                    report.add(f"prompt_graph_bytes.{side}.{length}", decoder.prompts.held_bytes, "bytes")
            del decoders
            machine.free()


def run_turns(
    report: Report, machine: Machine, decoders: Mapping[str, Decoder], tokens: torch.Tensor, name: str, turns: int
) -> None:
    """A prompt's turns on each side, after WARM that are not counted; `name` follows what the figures are called."""
    length = tokens.shape[1]
    took: dict[str, list[float]] = {side: [] for side in decoders}
    host: dict[str, list[float]] = {side: [] for side in decoders}
    with machine.undisturbed():
        for turn in range(WARM + turns):
            for side, decoder in decoders.items():
                launched, whole = machine.launched(functools.partial(decoder.prefill, tokens))
                if turn >= WARM:
                    host[side].append(1e3 * launched)
                    took[side].append(1e3 * whole)
    kinds = {"sparse": f"prefill{name}", "packed": f"prompt{name}"}
    for side in decoders:
        for kind in [kinds[side]] if side in kinds else [kinds[other] for other in decoders if other in kinds]:
            label = "dense" if side == "dense" else "sparse"
            report.add(f"{kind}_ms.{label}.{length}", statistics.median(took[side]), "ms", took[side])
            report.add(f"{kind}_host_ms.{label}.{length}", statistics.median(host[side]), "ms", host[side])
        if side in kinds and "dense" in decoders:
            ratios = [dense / sparse for dense, sparse in zip(took["dense"], took[side], strict=True)]
            report.add(f"{kinds[side]}_over_dense.{length}", statistics.median(ratios), "times", ratios)
            apart = (max(ratios) - min(ratios)) / statistics.median(ratios)
            report.add(f"{kinds[side]}_spread.{length}", apart, "of the ratio, largest less smallest turn")


def tune(
    machine: Machine, shapes: Iterable[tuple[int, int]], dtype: torch.dtype, rows: Sequence[int], *, copies: bool
) -> None:
    """Let the kernels measure their choices for these numbers of rows, where that was not done before."""
    if machine.cuda and rows:
        from sparseforge_core.runtime.kernels.tuning import tune as measure_choices

        measure_choices(sorted(set(shapes)), dtype, rows, copies=copies)
