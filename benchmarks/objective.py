"""Peak memory and processor time of one loss with its gradients: all logits at once, and in chunks of positions.

python benchmarks/objective.py [--vocabulary 131072] [--width 64] [--positions 512] [--json]

Each variant runs in a fresh process, whose peak resident memory the operating system reports, before the loss and
after it. The ratio is that of the growths.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

VARIANTS = ("whole", "chunks")


def measured(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Loss, processor seconds and growth of the peak resident bytes of one variant, in this process."""
    import torch
    import transformers

    from sparseforge_core.models.heads import split
    from sparseforge_core.objective import Distill, batch_losses

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=2 * options.width,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=options.positions + 1,
        tie_word_embeddings=True,
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    teacher = copy.deepcopy(model).requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # present in any training, so no part of the loss's cost
    tokens = torch.randint(0, options.vocabulary, (1, options.positions + 1))
    forward, taught = (split(model), split(teacher)) if variant == "chunks" else (model, teacher)
    before, began = peak_bytes(), time.process_time()  # unlike the clock, blind to what else runs
    total = batch_losses(forward, taught, Distill(temperature=2.0), tokens).total
    total.backward()  # type: ignore[no-untyped-call]
    seconds = time.process_time() - began
    return {"loss": float(total.detach()), "seconds": seconds, "extra_bytes": peak_bytes() - before}


def peak_bytes() -> int:
    """The most memory that this process has had resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def main(arguments: list[str] | None = None) -> int:
    """Measure every variant and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vocabulary", type=int, default=131_072, help="entries of the vocabulary")
    parser.add_argument("--width", type=int, default=64, help="width of the hidden states")
    parser.add_argument("--positions", type=int, default=512, help="predicted tokens")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--variant", choices=VARIANTS, help="measure one in this process (what the script runs)")
    options = parser.parse_args(arguments)
    if options.variant:
        print(json.dumps(measured(options.variant, options)))
        return 0
    found = {}
    for variant in VARIANTS:
        sizes = [f"--{name}={getattr(options, name)}" for name in ("vocabulary", "width", "positions")]
        done = subprocess.run(
            [sys.executable, __file__, "--variant", variant, *sizes], check=True, capture_output=True, text=True
        )
        found[variant] = json.loads(done.stdout.splitlines()[-1])
    extra = {name: found[name]["extra_bytes"] for name in VARIANTS}
    body = {
        "vocabulary": options.vocabulary,
        "width": options.width,
        "positions": options.positions,
        "logits_bytes": 4 * options.vocabulary * options.positions,
        "extra_bytes": extra,
        "seconds": {name: found[name]["seconds"] for name in extra},
        "loss_difference": abs(found["whole"]["loss"] - found["chunks"]["loss"]),
        "memory_ratio": extra["whole"] / extra["chunks"],
    }
    if options.json:
        print(json.dumps(body))
        return 0
    for name, size in extra.items():
        print(f"{name:7} {size / 2**20:8.0f} MiB above the models, {body['seconds'][name]:.2f} processor seconds")
    print(f"the logits alone are {body['logits_bytes'] / 2**20:.0f} MiB; ratio {body['memory_ratio']:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
