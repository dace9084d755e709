"""How far Wanda and SparseGPT agree with a literal, slow reference on SmolLM2-135M.

    python benchmarks/one_shot_agreement.py --layers 3 --samples 16 --length 256 --json

The reference is written straight from the papers' equations: float64 throughout, forwards of the whole model with plain
hooks instead of streamed blocks, one column at a time without blocks of columns, statistics per sequence as running
means. It shares no code with the methods it checks. The share of mask entries that agree must be at least 99.9 %.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # measures the checkout that it lies in

DEPENDENCY_ORDER = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""The linears of a LLaMA block in the order in which their inputs depend on each other."""


def literal_wanda(model: Any, batches: list[Tensor], layers: int | None = None) -> dict[str, Tensor]:
    """2:4 masks of a LLaMA by |W_ij| sqrt(n_j), n_j the running mean over sequences of sum_t x_tj^2; prunes `model`."""
    model.double()
    masks: dict[str, Tensor] = {}
    for block in model.model.layers[:layers]:
        linears = _linears(model, block)
        seen = _inputs(model, batches, linears)
        for name, linear in linears.items():
            mean = torch.zeros(linear.in_features, dtype=torch.float64)
            for k, x in enumerate(seen[name]):
                mean = mean * k / (k + 1) + x.square().sum(0) / (k + 1)
            masks[f"{name}.weight"] = _two_of_four(linear.weight.detach().abs() * mean.sqrt())
        for name, linear in linears.items():
            linear.weight.data *= masks[f"{name}.weight"]
    return masks


def literal_sparsegpt(
    model: Any,
    batches: list[Tensor],
    layers: int | None = None,
    *,
    damping: float = 0.01,
    true_sequential: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """2:4 masks and updated weights of a LLaMA, column by column; prunes `model`."""
    model.double()
    masks: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for block in model.model.layers[:layers]:
        linears = _linears(model, block)
        order = DEPENDENCY_ORDER if true_sequential else (tuple(name.split(".")[-1] for name in linears),)
        for group in order:
            now = {name: linear for name, linear in linears.items() if name.split(".")[-1] in group}
            seen = _inputs(model, batches, now)
            for name, linear in now.items():
                hessian = torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64)
                for k, x in enumerate(seen[name]):
                    hessian = hessian * k / (k + 1) + 2.0 * x.T @ x / (k + 1)
                w, mask = _column_by_column(linear.weight.detach().clone(), hessian, damping)
                masks[f"{name}.weight"], weights[f"{name}.weight"] = mask, w
            for name, linear in now.items():
                linear.weight.data.copy_(weights[f"{name}.weight"])
    return masks, weights


def _column_by_column(w: Tensor, hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Steps 1-4 of SparseGPT on one matrix without any blocking."""
    dead = hessian.diagonal() == 0
    hessian = hessian.clone()
    hessian.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    mask = torch.ones_like(w, dtype=torch.bool)
    for j in range(w.shape[1]):
        if j % 4 == 0:
            mask[:, j : j + 4] = _two_of_four((w[:, j : j + 4] / upper.diagonal()[j : j + 4]).square())
        q = torch.where(mask[:, j], w[:, j], 0.0)
        error = (w[:, j] - q) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
        w[:, j] = q
    return w, mask


def _two_of_four(scores: Tensor) -> Tensor:
    """Keep mask of the two largest of each four, by sorting."""
    grouped = scores.reshape(scores.shape[0], -1, 4)
    order = grouped.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, order[..., :2], True).reshape(scores.shape)


def _linears(model: Any, block: nn.Module) -> dict[str, nn.Linear]:
    inside = {id(module) for module in block.modules()}
    return {n: m for n, m in model.named_modules() if id(m) in inside and isinstance(m, nn.Linear)}


@torch.no_grad()
def _inputs(model: Any, batches: list[Tensor], linears: dict[str, nn.Linear]) -> dict[str, list[Tensor]]:
    """What each linear receives in a forward of the whole model, `[tokens, in]` for each sequence."""
    seen: dict[str, list[Tensor]] = {name: [] for name in linears}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args: seen[name].extend(args[0].detach().double().unbind(0))

    hooks = [linear.register_forward_pre_hook(keep(name)) for name, linear in linears.items()]
    for batch in batches:
        model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def measure(layers: int, samples: int, length: int) -> list[dict[str, Any]]:
    """One row a method: share of mask entries that agree, of how many, and seconds of both."""
    from sparseforge_core.data.calibration import calibration_batches
    from sparseforge_core.data.corpora import PythonDocs
    from sparseforge_core.data.tokens import tokenize_once
    from sparseforge_core.methods import SparseGPT, Wanda
    from sparseforge_core.methods.base import Surroundings
    from sparseforge_core.models import hub
    from sparseforge_core.models.families import family_of
    from sparseforge_core.models.sites import assign_patterns, find_sites
    from sparseforge_core.models.sources import Packaged
    from sparseforge_core.sparsity.patterns import nm

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        dense: Any = hub.load_model(Packaged(name="smollm2-135m"), home)
        tokens = tokenize_once(PythonDocs(), "train", hub.load_tokenizer(Packaged(name="smollm2-135m"), home), home)
        batches = calibration_batches(tokens, samples=samples, length=length, seed=0, batch=8)
    dense.model.layers = dense.model.layers[:layers]
    rows = []
    for name, method in (("wanda", Wanda(samples=samples)), ("sparsegpt", SparseGPT(samples=samples))):
        model, reference = copy.deepcopy(dense), copy.deepcopy(dense)
        sites = assign_patterns(find_sites(model, family_of("llama")), nm(2, 4))
        began = time.perf_counter()
        around = Surroundings(model=model, sites=sites, slorb=None, steps=0, calibration=lambda *_, text=batches: text)
        track = method.start(around)
        ours = time.perf_counter() - began
        began = time.perf_counter()
        masks = literal_wanda(reference, batches) if name == "wanda" else literal_sparsegpt(reference, batches)[0]
        theirs = time.perf_counter() - began
        equal = {site.name: int((site.mask.hard == masks[site.name]).sum()) for site in track.sites}
        total = {site.name: site.mask.hard.numel() for site in track.sites}
        worst = min(equal, key=lambda site: equal[site] / total[site])
        rows.append(
            {
                "method": name,
                "agreement": sum(equal.values()) / sum(total.values()),
                "entries": sum(total.values()),
                "worst_site": worst,
                "worst_agreement": equal[worst] / total[worst],
                "seconds": round(ours, 2),
                "reference_seconds": round(theirs, 2),
            }
        )
    return rows


def main() -> int:
    """Measure and print; exit code 1 if a method agrees on less than 99.9 % of its mask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3, help="first blocks of the model that are pruned")
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options.layers, options.samples, options.length)
    if options.json:
        print(
            json.dumps({"layers": options.layers, "samples": options.samples, "length": options.length, "rows": rows})
        )
    else:
        for row in rows:
            print(
                f"{row['method']:<10} agrees on {row['agreement']:.4%} of {row['entries']:,} entries; worst site "
                f"{row['worst_site']} {row['worst_agreement']:.4%}; {row['seconds']} s, reference "
                f"{row['reference_seconds']} s"
            )
    return 0 if all(row["agreement"] >= 0.999 for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
