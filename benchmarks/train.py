"""Annealing over plain distillation, the fused mask update, and what else training costs, on one GPU and on two.

python benchmarks/train.py [--parts mask_update 135m ...] [--seconds 160] [--out DIR] [--json]
sparseforge bench train [the same]

Needs torch and transformers alone. Ratios are of steps of the product's own loop in one process: same model, batch and
teacher, curvature on every step and a mask update on every tenth. Each part is left out, and named, when the time that
is left would not do for it. With --out, or where $OUT names a folder, the rows are written to train.json in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import several_gpus
from benchmarks.published_step import PublishedStep
from benchmarks.steps import SHAPES, Shape, config_of, release, synchronize, timed
from benchmarks.talking import talking
from sparseforge_core.methods import SparseForge
from sparseforge_core.methods.annealing import SparseForgeTrack
from sparseforge_core.methods.base import Surroundings
from sparseforge_core.models.heads import split
from sparseforge_core.models.hub import from_config
from sparseforge_core.models.sites import Site
from sparseforge_core.objective import Distill, batch_losses
from sparseforge_core.objective import fused as fused_head
from sparseforge_core.observe.curvature import Batch
from sparseforge_core.presets import preset_named
from sparseforge_core.sparsity.patterns import nm
from sparseforge_core.train.eight_bit import EightBitAdamW

PEAK_FLOPS = 989e12
"""Of an H100 SXM in bfloat16, without sparsity."""

BARS: dict[str, tuple[float, str]] = {
    "mask_update_over_copy": (1.3, "times one read and write of its tensors"),
    "mask_update_over_copy.host_ahead": (1.3, "times one read and write of its tensors"),
    "smollm2_tokens_per_second": (260_000, "tokens/s"),
    "annealing_over_dense_distillation.135m": (1.05, "ratio of step times"),
    "mfu_7b_layer": (0.45, "share of 989 TFLOP/s"),
    "annealing_over_dense_distillation.7b_layer": (1.05, "ratio of step times"),
    "annealing_over_dense_distillation.1_1b": (1.05, "ratio of step times"),
    "over_published_step": (2.0, "times faster"),
    "extra_bytes_per_masked_weight": (4, "bytes beyond dense AdamW"),
    "two_gpu_speedup": (1.9, "times the tokens/s of one, same batch a GPU"),
    "two_gpu_mask_agreement.replicate": (0.999, "share of entries"),
    "two_gpu_mask_agreement.shard.longer": (0.999, "share of entries"),
    "two_gpu_resume_bit_exact.shard": (1.0, "1: all weights and losses"),
}
"""Measure -> bar and unit."""

DEFAULT = SparseForge(update_every=10)
LEAN = dataclasses.replace(preset_named("lean").method, update_every=10)
"""The method's defaults, and the preset that we recommend: the same in few bytes. Figures are of the latter."""

AT_ONCE = 4
"""Mask updates that are timed together: in training ten steps lie between two, so the host is ahead of the device."""


BUSY = 20_000_000
"""Cycles, about 10 ms, for which a device is kept busy before what the host is to be ahead of."""


@dataclass(frozen=True)
class Figure:
    """One number, and what else is worth printing beside it."""

    measure: str
    value: float
    note: str = ""
    hardware: str | None = None
    """Where it is not the one device that the other parts have."""


Part = Callable[[argparse.Namespace, torch.device], Iterator[Figure]]


def checks(options: argparse.Namespace, device: torch.device) -> Iterator[Figure]:
    """The fused losses against the chunks that `objective/batch.py` makes of them: what their gradients differ by."""
    shape = Shape(1, 256, 512, 4, 4, 32_000, False, 2, 128)
    with torch.device(device):
        model, teacher = (from_config(config_of(shape)).eval() for _ in range(2))
    parts, taught = split(model), split(teacher.requires_grad_(False))
    tokens = torch.randint(0, shape.vocabulary, (shape.sequences, shape.length), device=device)
    for temperature in (1.0, 2.0):
        found = []
        for fused_too in (False, True):
            model.zero_grad()
            way = dataclasses.replace(parts, fused=fused_too)
            objective = Distill(temperature=temperature)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                losses = batch_losses(way, taught, objective, tokens)
            losses.total.backward()
            gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            found.append((float(losses.total.detach()), gradients))
            if fused_too:
                why = fused_head.refusal(way, taught, objective)
        (plain, expected), (got, gradients) = found
        note = f"loss {got:.6f} and {plain:.6f}; fused: {why or 'yes'}"
        yield Figure(
            f"fused_losses_gradient_apart.{temperature}", float((gradients - expected).norm() / expected.norm()), note
        )


def mask_update(options: argparse.Namespace, device: torch.device) -> Iterator[Figure]:
    """The mask update of a 7B-shaped layer over reading and writing its tensors once."""
    bandwidth = copy_bandwidth(device, options.copy)
    last: dict[str, Any] = {"statistics_rows": 1, "statistics_of": "last-update"}
    for name, method in (
        ("", LEAN),
        (".last_update", dataclasses.replace(LEAN, **last)),
        (".all_rows", dataclasses.replace(LEAN, statistics_rows=1)),
        (".sampled", dataclasses.replace(DEFAULT, statistics_rows=16)),
        (".default", DEFAULT),
    ):
        track = track_of(options.sites, method, device)
        seconds = [_seconds(lambda track=track, turn=turn: several(track, turn), device) / AT_ONCE for turn in range(7)]
        once = sum(touched(site, track) for site in track.sites) / bandwidth
        update = statistics.median(seconds[3:])
        note = f"{1e3 * update:.3f} ms, once {1e3 * once:.3f} ms at {bandwidth / 1e12:.2f} TB/s"
        yield Figure(f"mask_update_over_copy{name}", update / once, note)
        if device.type == "cuda":
            update = statistics.median([behind_the_host(track, turn, device) for turn in range(7)][3:])
            note = f"{1e3 * update:.3f} ms where the host is ahead of the device, as it is in training"
            yield Figure(f"mask_update_over_copy{name}.host_ahead", update / once, note)
            yield Figure(f"mask_update_agrees{name}", agreement(track), "share of hard masks as gate.py has them")
        track.sites.clear()
        release(device)


def several(track: SparseForgeTrack, turn: int) -> None:
    """AT_ONCE updates in the middle of heating, none of which waits for what the one before reports."""
    for i in range(AT_ONCE):
        track.reported = None
        track._update_masks(5000 + 10 * (AT_ONCE * turn + i))


def behind_the_host(track: SparseForgeTrack, turn: int, device: torch.device) -> float:
    """Seconds of an update on a device that was busy while the host prepared AT_ONCE of them."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(BUSY)
    begun.record()
    several(track, turn)
    ended.record()
    synchronize(device)
    return 1e-3 * begun.elapsed_time(ended) / AT_ONCE


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes read and written a second by a copy of `size` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * size / statistics.median([_seconds(lambda: target.copy_(source), device) for _ in range(6)][1:])


def track_of(shapes: list[tuple[int, int]], method: SparseForge, device: torch.device) -> SparseForgeTrack:
    """A running track on random matrices, with one gradient observed."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(inputs, out, bias=False, device=device) for out, inputs in shapes)
    sites = [Site(f"{i}.weight", layer, "weight", False, "mlp", chosen=nm(2, 4)) for i, layer in enumerate(layers)]
    around = Surroundings(model=layers, sites=sites, slorb=None, steps=10_000, calibration=lambda n, length: [])
    track = method.start(around)
    for site in sites:
        site.weight.grad = torch.randn_like(site.weight)
    unused: dict[str, Any] = {"tokens": torch.zeros(1, 1), "loss": None, "predictions": None}
    track.observe(Batch(step=1, model=layers, optimizer=torch.optim.SGD(layers.parameters()), **unused))
    for site in sites:
        site.weight.grad = None
    return track


def touched(site: Site, track: SparseForgeTrack) -> int:
    """Bytes that an update of a site must read and write: weight, curvature, the mask's state twice, the view."""
    assert track.curvature is not None
    statistic, _ = track.curvature.kept(site)
    state = {tensor.data_ptr(): tensor.nbytes for tensor in site.mask.stored()[:2]}
    view = site.mask.stored()[2]
    written = 0 if view.data_ptr() in state else view.nbytes
    return site.weight.nbytes + statistic.nbytes + 2 * sum(state.values()) + written


def agreement(track: SparseForgeTrack) -> float:
    """Share of the hard mask's entries that the fused update and `gate.py` decide alike, from one state."""
    site, step = track.sites[0], 6000
    before, known = [tensor.clone() for tensor in site.mask.stored()], track.known
    track._update_masks(step)
    track.known = known
    fused_hard, fused_mask = site.mask.hard.clone(), site.mask.mask.clone()
    for tensor, value in zip(site.mask.stored(), before, strict=True):
        tensor.copy_(value)
    with torch.no_grad():
        track._update_site(site, track._way(step))
    apart = float(((site.mask.mask - fused_mask).abs() > 1e-4).double().mean())
    if apart > 1e-5:  # scores that are as good as tied may change places
        raise AssertionError(f"of the fused masks {apart:.1e} of the entries are not those of gate.py")
    return float((site.mask.hard == fused_hard).double().mean())


def small(options: argparse.Namespace, device: torch.device) -> Iterator[Figure]:
    """SmolLM2-135M's shape: tokens a second, and annealing over dense distillation."""
    yield from _ratio("135m", options, device)


def layer(options: argparse.Namespace, device: torch.device) -> Iterator[Figure]:
    """Layers of LLaMA-2-7B's shape: utilisation, and annealing over dense distillation."""
    yield from _ratio("7b_layer", options, device)


def middle(options: argparse.Namespace, device: torch.device) -> Iterator[Figure]:
    """TinyLlama's shape: annealing over dense distillation."""
    yield from _ratio("1_1b", options, device)


def _ratio(name: str, options: argparse.Namespace, device: torch.device) -> Iterator[Figure]:
    shape = options.shapes[name]
    annealed = timed(shape, LEAN, device, recorded=options.record, windows=2)
    note = f"{1e3 * annealed.step:.1f} ms, warm-up {annealed.warm_up:.0f} s, {annealed.peak_bytes / 2**30:.1f} GiB"
    if name == "135m":
        options.step_135m = annealed.step
        yield Figure("smollm2_tokens_per_second", shape.tokens / annealed.step, note)
    share = shape.flops / annealed.step / PEAK_FLOPS
    yield Figure("mfu_7b_layer" if name == "7b_layer" else f"mfu.{name}", share, note)
    dense = timed(shape, None, device, recorded=options.record, windows=2)
    note = f"dense {1e3 * dense.step:.1f} ms, warm-up {dense.warm_up:.0f} s, {dense.peak_bytes / 2**30:.1f} GiB"
    yield Figure(f"annealing_over_dense_distillation.{name}", annealed.step / dense.step, note)


def cudnn(options: argparse.Namespace, device: torch.device) -> Iterator[Figure]:
    """SmolLM2-135M's shape with cuDNN's attention before all others."""
    shape = options.shapes["135m"]
    kinds = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    torch.compiler.reset()  # the kind of attention is chosen when a block is compiled
    with sdpa_kernel(kinds, set_priority=True):
        annealed = timed(shape, LEAN, device, recorded=options.record, windows=1)
    torch.compiler.reset()
    note = f"{1e3 * annealed.step:.1f} ms, warm-up {annealed.warm_up:.0f} s"
    yield Figure("smollm2_tokens_per_second.cudnn", shape.tokens / annealed.step, note)


def published(options: argparse.Namespace, device: torch.device) -> Iterator[Figure]:
    """Our step against the published code's, at SmolLM2-135M's shape."""
    shape = options.shapes["135m"]
    ours = options.step_135m or timed(shape, LEAN, device, recorded=options.record, windows=1).step
    step = PublishedStep(shape, device, micro_batch=options.published_micro_batch)
    seconds = [_seconds(lambda turn=turn: step(turn + 1), device) for turn in range(3)]
    theirs = statistics.median(seconds[1:])
    yield Figure("over_published_step", theirs / ours, f"theirs {1e3 * theirs:.0f} ms, ours {1e3 * ours:.1f} ms")


def extra_bytes(options: argparse.Namespace, device: torch.device) -> Iterator[Figure]:
    """Bytes that annealing keeps for each masked weight, counted in the tensors of a track."""
    for name, method in ((".default", DEFAULT), ("", LEAN)):
        track = track_of([(64, 64)], method, torch.device("cpu"))
        yield Figure(f"extra_bytes_per_masked_weight{name}", kept_bytes(track) / (64 * 64))


def kept_bytes(track: SparseForgeTrack) -> int:
    """Bytes of masks, views and curvature, without scalars."""
    assert track.curvature is not None
    tensors = [p for site in track.sites for p in site.mask.parameters() if p.numel() > 1]
    tensors += [tensor for tensor in track.curvature.state().values() if tensor.numel() > 1]
    return sum(tensor.nbytes for tensor in tensors)


def moments(options: argparse.Namespace, device: torch.device) -> Iterator[Figure]:
    """AdamW's step on the matrices of a 7B-shaped layer, with moments in 8 bits over fused in float32."""
    seconds: dict[str, float] = {}
    for name in ("float32", "8-bit"):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(out, inputs, device=device)) for out, inputs in options.sites]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        settings: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8}
        groups = [{"params": weights, "weight_decay": 0.0, "lr": 1e-4}]
        optimizer: torch.optim.Optimizer
        if name == "8-bit":
            optimizer = EightBitAdamW(groups, **settings)
        else:
            optimizer = torch.optim.AdamW(groups, fused=True, **settings)
        took = [_seconds(lambda optimizer=optimizer: optimizer.step(), device) for _ in range(8)]
        seconds[name] = statistics.median(took[3:])
        del weights, optimizer, groups
        release(device)
    note = f"{1e3 * seconds['8-bit']:.2f} ms, float32 {1e3 * seconds['float32']:.2f} ms"
    yield Figure("eight_bit_optimizer_over_float32", seconds["8-bit"] / seconds["float32"], note)


def two_gpus(options: argparse.Namespace, device: torch.device) -> Iterator[Figure]:
    """Two GPUs against one: speed, the same losses and masks, and a resume after a kill."""
    why = several_gpus.why_not(device, small=options.tiny)
    if why is not None:
        print(f"{'two_gpus':14} not measured: {why}", flush=True)
        return
    for row in several_gpus.rows(small=options.tiny):
        yield Figure(row["measure"], row["value"], row["unit"], row["hardware"])


PARTS: dict[str, tuple[Part, float]] = {
    "extra_bytes": (extra_bytes, 1),
    "checks": (checks, 5),
    "mask_update": (mask_update, 15),
    "moments": (moments, 3),
    "135m": (small, 45),
    "7b_layer": (layer, 30),
    "published": (published, 18),
    "1_1b": (middle, 36),
    "cudnn": (cudnn, 20),
    "two_gpus": (two_gpus, 2 * several_gpus.SECONDS),
}
"""Name -> what is measured, and the seconds that it takes on one H100."""


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def hardware(device: torch.device) -> str:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"
    return f"{name}, torch {torch.__version__}"


def commit() -> str:
    """The commit of this tree, where git says one."""
    try:
        asked = ["git", "rev-parse", "--short", "HEAD"]
        done = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown")
    return done.stdout.strip()


def small_shapes() -> dict[str, Shape]:
    """Shapes with which every part runs in seconds on a CPU."""
    return {name: Shape(2, 64, 128, 2, 1, 256, shape.tied, 2, 16) for name, shape in SHAPES.items()}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write; exit code 1 if a part failed."""
    parser = argparse.ArgumentParser(prog="sparseforge bench train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="some parts only")
    parser.add_argument("--seconds", type=float, default=3600, help="time for all of it; parts that would not fit wait")
    parser.add_argument("--device", help="cpu or cuda; the GPU if there is one")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: whether it runs, not how fast")
    parser.add_argument(
        "--record", action=argparse.BooleanOptionalAction, help="steps as CUDA graphs; on a GPU unless told otherwise"
    )
    parser.add_argument(
        "--published-micro-batch", type=int, default=4, help="sequences that its second derivative sees"
    )
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="folder for train.json; $OUT if set")
    parser.add_argument("--json", action="store_true", help="end with the rows as JSON on stdout, all else on stderr")
    parser.add_argument("--quiet", action="store_true", help="no lines, for the exit code or --json")
    options = parser.parse_args(arguments)
    with talking(options):
        rows, failed = _measured(options)
    if options.json:
        print(json.dumps(rows))
    return 1 if failed else 0


def _measured(options: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """(the rows, how many parts failed)."""
    began = time.perf_counter()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    layer_7b = [(4096, 4096)] * 4 + [(11_008, 4096)] * 2 + [(4096, 11_008)]
    options.shapes, options.copy, options.step_135m = SHAPES, 2**30, None
    options.sites = [(64, 64), (128, 64)] if options.tiny else layer_7b
    if options.tiny:
        options.shapes, options.copy = small_shapes(), 2**20
    rows: list[dict[str, Any]] = []
    failed = 0
    for name in options.parts:
        part, needed = PARTS[name]
        left = options.seconds - (time.perf_counter() - began)
        if left < needed:
            print(f"{name:14} not measured: it takes about {needed:.0f} s, and {left:.0f} s are left", flush=True)
            continue
        try:
            for figure in part(options, device):
                bar, unit = BARS.get(figure.measure, (None, ""))
                print(f"{figure.measure:46}{figure.value:>14,.3f}  bar {bar}  {figure.note}", flush=True)
                command = f"sparseforge bench train --parts {name}" + (
                    " --no-record" if options.record is False else ""
                )
                where = figure.hardware or hardware(device)
                rows.append({"measure": figure.measure, "value": figure.value, "unit": unit, "bar": bar,
                             "hardware": where, "command": command, "commit": commit()})  # fmt: skip
                write(options.out, rows)
        except (RuntimeError, AssertionError, TypeError, ValueError) as error:
            traceback.print_exc()
            print(f"{name:14} failed: {type(error).__name__}", flush=True)
            failed += 1
            release(device)
    print(f"{len(rows)} figures in {time.perf_counter() - began:.0f} s on {hardware(device)}", flush=True)
    return rows, failed


def write(folder: Path | str | None, rows: list[dict[str, Any]]) -> None:
    """The rows so far, for whoever stops this."""
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "train.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
