"""What observing curvature costs: a training step with each estimator over the step without.

python benchmarks/curvature.py [--width 128] [--layers 2] [--sequences 8] [--length 128] [--json]

One run takes turns between plain steps and observations, so that both see the same machine; figures are medians. The
`look` column is one observation over one plain step; `run` is what a run pays at the estimator's default `every`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from sparseforge_core.models.families import family_of
from sparseforge_core.models.sites import find_sites
from sparseforge_core.objective import next_token_loss, predictions
from sparseforge_core.observe.curvature import ESTIMATORS, Batch


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """Wall time of `work`, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def masked_model(options: argparse.Namespace, device: torch.device) -> Any:
    """A random LLaMA whose block matrices all carry masks."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=options.length,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().to(device)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a plain step, and of one observation by each estimator, from one run."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = masked_model(options, device)
    sites = find_sites(model, family_of(model.config.model_type))
    for site in sites:
        site.attach(None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    specs = {kind: cls() for kind, cls in ESTIMATORS.items() if not options.only or kind in options.only}
    estimates = {kind: spec.start(sites) for kind, spec in specs.items()}
    plain: list[float] = []
    looks: dict[str, list[float]] = {kind: [] for kind in specs}
    for turn in range(options.repeats + 1):
        batch = batch_of(model, optimizer, options, device, turn)
        forward_backward = seconds(lambda batch=batch: batch.loss(batch.tokens, 0).backward(), device)
        for kind, estimate in estimates.items():
            looks[kind].append(seconds(lambda estimate=estimate, batch=batch: estimate.observe(batch), device))
        plain.append(forward_backward + seconds(lambda: (optimizer.step(), optimizer.zero_grad()), device))
    step = statistics.median(plain[1:])  # the first turn warms up
    rows = []
    for kind, spec in specs.items():
        look, every = statistics.median(looks[kind][1:]), getattr(spec, "every", 1)
        ratio = look / step
        rows.append({"estimator": kind, "every": every, "look_over_step": ratio, "run_over_plain": 1.0 + ratio / every})
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    masked = sum(site.weight.numel() for site in sites)
    return {"device": name, "torch": torch.__version__, "step_seconds": step, "masked_parameters": masked, "rows": rows}


def batch_of(model: Any, optimizer: Any, options: argparse.Namespace, device: torch.device, turn: int) -> Batch:
    """A batch of random tokens at a step at which every estimator is due."""
    tokens = torch.randint(0, options.vocabulary, (options.sequences, options.length), device=device)
    return Batch(
        step=100 * (turn + 1),
        model=model,
        tokens=tokens,
        loss=lambda piece, place: next_token_loss(model(input_ids=piece, use_cache=False).logits, piece),
        predictions=lambda piece: predictions(model, piece),
        optimizer=optimizer,
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--width", type=int, default=128, help="width of the hidden states")
    parser.add_argument("--layers", type=int, default=2, help="transformer blocks")
    parser.add_argument("--vocabulary", type=int, default=512, help="entries of the vocabulary")
    parser.add_argument("--sequences", type=int, default=8, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--repeats", type=int, default=5, help="turns that are measured, after one that is not")
    parser.add_argument("--device", help="cpu or cuda; the GPU if there is one")
    parser.add_argument("--only", nargs="*", choices=sorted(ESTIMATORS), help="some estimators only")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    found = measure(options)
    if options.json:
        print(json.dumps(found))
        return 0
    print(f"{found['device']}, torch {found['torch']}; {found['masked_parameters']:,} masked parameters")
    print(f"a step without curvature: {1e3 * found['step_seconds']:.1f} ms")
    print(f"{'estimator':<24}{'every':>6}{'look':>8}{'run':>8}")
    for row in found["rows"]:
        ratios = f"{row['look_over_step']:>8.2f}{row['run_over_plain']:>8.2f}"
        print(f"{row['estimator']:<24}{row['every']:>6}{ratios}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
