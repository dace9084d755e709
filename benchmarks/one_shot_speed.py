"""How long SparseGPT takes on a GPU with the fused column sweep and with the plain one, and how far their masks agree.

    python benchmarks/one_shot_speed.py --layers 30 --samples 128 --length 1024 --json

The model has the shape of SmolLM2-135M and random weights, the text is random tokens: times are real, masks mean
nothing. The plain sweep is what `second_order.sweep` does on any device, weight after weight. Both prune the same model
in one process, the fused one first on two blocks so that nothing is compiled while it is timed.

Agreement is that of both sweeps on the same weights and inputs, site by site, in a third run. Masks of two whole runs
say nothing of a sweep: one flipped entry changes the next block's inputs, and from block to block ever more scores
change places (the plain sweep of a smaller model agrees with itself, its embedding altered by 1e-7, to 93 % eight
blocks on).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # measures the checkout that it lies in

from sparseforge_core.execution import default_device
from sparseforge_core.methods import SparseGPT
from sparseforge_core.methods.base import Surroundings
from sparseforge_core.methods.layerwise import LayerwiseTrack
from sparseforge_core.methods.sparsegpt import SparseGPTTrack
from sparseforge_core.models.families.llama import LLAMA
from sparseforge_core.models.sites import Site, assign_patterns, find_sites
from sparseforge_core.sparsity.patterns import nm
from sparseforge_core.sparsity.second_order import Factor

Track = TypeVar("Track", bound=SparseGPTTrack)


class OneByOne(SparseGPTTrack):
    """The plain sweep of each weight alone."""

    solve_together = LayerwiseTrack.solve_together


class Compared(SparseGPTTrack):
    """Both sweeps of the same weights and inputs; goes on with the fused one's."""

    same, entries, least = 0, 0, 1.0

    def solve_together(self, weights: list[Tensor], prepared: Factor, sites: list[Site]) -> list[tuple[Tensor, Tensor]]:
        fused = super().solve_together(weights, prepared, sites)
        plain = LayerwiseTrack.solve_together(self, weights, prepared, sites)
        for (_, keep), (_, kept) in zip(fused, plain, strict=True):
            same = int((keep == kept).sum())
            self.same, self.entries = self.same + same, self.entries + keep.numel()
            self.least = min(self.least, same / keep.numel())
        return fused


def smollm_like(layers: int) -> Any:
    """A LLaMA with the shape of SmolLM2-135M and random weights, on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prune(kind: type[Track], layers: int, samples: int, length: int) -> tuple[float, Track]:
    """Seconds of one pruning to 2:4, and the track that did it."""
    model = smollm_like(layers)
    tokens = torch.randint(49_152, (samples, length), generator=torch.Generator().manual_seed(1))
    around = Surroundings(
        model=model,
        sites=assign_patterns(find_sites(model, LLAMA), nm(2, 4)),
        slorb=None,
        steps=0,
        calibration=lambda *_: list(tokens.split(8)),
        device=default_device(),
        passing=True,
    )
    started = time.perf_counter()
    track = kind(SparseGPT(samples=samples, length=length), around)
    track.finish()
    seconds = time.perf_counter() - started  # the weights are back on the CPU: nothing is left to wait for
    return seconds, track


def main() -> None:
    """Time both and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--fused-only", action="store_true", help="leave out the plain sweep, which takes a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    prune(SparseGPTTrack, 2, 8, 64)
    seconds, _ = prune(SparseGPTTrack, args.layers, args.samples, args.length)
    found: dict[str, Any] = {"device": str(default_device()), "layers": args.layers, "fused_seconds": seconds}
    if not args.fused_only:
        plain_seconds, _ = prune(OneByOne, args.layers, args.samples, args.length)
        _, both = prune(Compared, args.layers, args.samples, args.length)
        found |= {"plain_seconds": plain_seconds, "times": plain_seconds / seconds}
        found |= {"agree": both.same / both.entries, "agree_least": both.least}
    print(json.dumps(found) if args.json else "\n".join(f"{name}: {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
