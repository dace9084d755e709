"""How long Wanda and SparseGPT take on a 7B-shaped model, projected from one block, and the memory they need.

    python benchmarks/one_shot_layers.py                                  # on CUDA: hidden 4096, ffn 11008, bf16
    python benchmarks/one_shot_layers.py --device cpu --hidden 256 --samples 8 --length 256 --dtype float32

Random LLaMA blocks stay on the CPU and pass over the device one at a time, as a model that fits in no GPU would: the
method's own stream, its own statistics, its own solver. Three blocks are timed and the middle one is projected to
`--layers`: the first also pays for the device's warm-up, and after the last no inputs of a next one are computed. The
embedding, which runs where the model is, is not timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # measures the checkout that it lies in

BARS = {"wanda": (2.0, 24.0), "sparsegpt": (8.0, 24.0)}
"""Method: minutes for the whole model and GB of device memory that are to be kept on one H100."""


def model_of(options: argparse.Namespace) -> Any:
    """A random LLaMA of `--blocks` blocks on the CPU."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.ffn,
        num_hidden_layers=options.blocks,
        num_attention_heads=max(1, options.hidden // 128),
        vocab_size=1024,
        max_position_embeddings=options.length,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each block, the projection, and the peak memory of the device."""
    from sparseforge_core.methods import SparseGPT, Wanda
    from sparseforge_core.methods.base import Surroundings
    from sparseforge_core.models.families import family_of
    from sparseforge_core.models.sites import assign_patterns, find_sites
    from sparseforge_core.sparsity.patterns import nm

    device = torch.device(options.device)
    model = model_of(options)
    sites = assign_patterns(find_sites(model, family_of("llama")), nm(2, 4))
    ids = torch.randint(0, 1024, (options.samples, options.length), generator=torch.Generator().manual_seed(0))
    method = {"wanda": Wanda, "sparsegpt": SparseGPT}[name](samples=options.samples, length=options.length)
    seconds = _stopwatch(model, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    around = Surroundings(
        model=model,
        sites=sites,
        slorb=None,
        steps=0,
        calibration=lambda *_: list(ids.split(options.batch)),
        device=device,
        passing=True,
    )
    method.start(around).finish()
    end = _now(device)
    kept = sum(float((site.weight != 0).float().mean()) for site in sites) / len(sites)
    starts = [*seconds, end]
    blocks = [after - before for before, after in itertools.pairwise(starts)]
    middle = blocks[1:-1]
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return {
        "method": name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "block_seconds": [round(value, 3) for value in blocks],
        "projected_minutes": round(sum(middle) / len(middle) * options.layers / 60, 3),
        "peak_gb": None if peak is None else round(peak, 2),
        "density": kept,
        "bars": dict(zip(("minutes", "gb"), BARS[name], strict=True)),
    }


def _stopwatch(model: Any, device: torch.device) -> list[float]:
    """The times at which each block arrives on the device; the list fills as the method runs.

    A block's first forward there is where the method begins to observe it. Warm-up and capture come before the first.
    """
    times: list[float] = []
    seen: set[int] = set()

    def arrived(index: int) -> Any:
        def hook(module: torch.nn.Module, *_: Any) -> None:
            here = next(module.parameters()).device.type == device.type
            ready = index == 0 or 0 in seen
            if here and ready and index not in seen and _streaming(model, index):
                seen.add(index)
                times.append(_now(device))

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(arrived(index))
    return times


def _streaming(model: Any, index: int) -> bool:
    """Whether the call captures nothing: while calls are captured, blocks have a stand-in for their forward."""
    others = [layer for at, layer in enumerate(model.model.layers) if at != index]
    return not any("forward" in vars(layer) for layer in (*others, model.model.layers[index]))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> int:
    """Time both methods and print; exit code 1 if a bar is missed on CUDA."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, help="default: 11008/4096 of --hidden")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    parser.add_argument("--length", type=int, default=2048, help="tokens per sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences per forward")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--layers", type=int, default=32, help="blocks of the model that is projected to")
    parser.add_argument("--blocks", type=int, default=3, help="blocks that are timed")
    parser.add_argument("--methods", nargs="+", choices=tuple(BARS), default=list(BARS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.ffn is None:
        options.ffn = round(options.hidden * 11008 / 4096 / 64) * 64
    if options.blocks < 3:
        parser.error("--blocks: needs at least 3, of which the first and the last do not count")
    rows = [measure(name, options) for name in options.methods]
    if options.json:
        print(json.dumps({"options": vars(options), "rows": rows}))
    else:
        for row in rows:
            memory = "" if row["peak_gb"] is None else f", peak {row['peak_gb']} GB (bar {row['bars']['gb']:g})"
            print(
                f"{row['method']:<10} {row['device']}: blocks {row['block_seconds']} s; {options.layers} blocks take "
                f"{row['projected_minutes']} min (bar {row['bars']['minutes']:g}){memory}; density {row['density']:.3f}"
            )
    missed = [
        row
        for row in rows
        if row["peak_gb"] is not None
        and (row["projected_minutes"] > row["bars"]["minutes"] or row["peak_gb"] > row["bars"]["gb"])
    ]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
