"""The automatic family: a declaration derived from a loaded model, for architectures that nobody has declared.

Inside the repeated transformer blocks every matrix is classified by the module that holds it: `nn.Linear`, `Conv1D`
and fused experts are masked; routers, norms, biases and embeddings stay dense, each by a named rule. What cannot be
classified is an error that names it. The result is an ordinary Family, so sites, coverage and export know nothing of
where it came from; its name, 'automatic', is what listings and stored coverage say.

A recipe asks for it (`family="automatic"` in its model source). It is no fallback: a type that is declared later
would otherwise change what an old recipe masks, under the same key.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from sparseforge_core.errors import UnsupportedModel
from sparseforge_core.models.families.base import Family, Rule, rule
from sparseforge_core.models.layouts import is_transposed

AUTOMATIC = "automatic"
"""Its name."""

SHOWN = 5
"""Unclassified weights that an error names."""


def automatic_family(model: Any) -> Family:
    """Classify every matrix of `model`, before any mask is attached.

    Raises UnsupportedModel if there are no repeated blocks, nothing to mask, or a matrix in the blocks that belongs
    to no known kind of module.
    """
    blocks = _blocks(model)
    include: dict[str, Rule] = {}
    exclude: dict[str, Rule] = {}
    puzzling = []
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue
        inside = name.startswith(blocks)
        kind = _kind_inside(model, name, weight, blocks) if inside else _kind_outside(model, name, weight)
        if kind is None:
            puzzling.append(f"{name} {tuple(weight.shape)}")
            continue
        masked, what = kind
        module = model.get_submodule(name.rpartition(".")[0])
        spelt = generalised(name)
        made = rule(what, spelt, transposed=masked and bool(is_transposed(module, weight)))
        (include if masked else exclude)[spelt] = made
    model_type = model.config.model_type
    if puzzling:
        more = f" and {len(puzzling) - SHOWN} more" if len(puzzling) > SHOWN else ""
        raise UnsupportedModel(
            f"automatic family of {model_type}: {', '.join(puzzling[:SHOWN])}{more} belong to no Linear, Conv1D or "
            "fused experts that say how they are stored. Declare a family; a weight is never left dense silently."
        )
    if not include:
        raise UnsupportedModel(f"automatic family of {model_type}: its blocks {', '.join(blocks)} hold no matrix")
    return Family(
        name=AUTOMATIC, model_types=(model_type,), include=tuple(include.values()), exclude=tuple(exclude.values())
    )


def _blocks(model: nn.Module) -> tuple[str, ...]:
    """Name prefixes of the outermost module lists that hold matrices: `('model.layers.',)`."""
    found: list[str] = []
    for name, module in model.named_modules():
        nested = any(name.startswith(outer) for outer in found)
        if isinstance(module, nn.ModuleList) and not nested and any(p.ndim >= 2 for p in module.parameters()):
            found.append(f"{name}.")
    if not found:
        raise UnsupportedModel(
            f"automatic family of {type(model).__name__}: it has no repeated blocks (an nn.ModuleList with matrices)"
        )
    return tuple(found)


def _kind_outside(model: Any, name: str, weight: Tensor) -> tuple[bool, str]:
    """What a matrix outside the blocks is; none of them is masked."""
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, nn.Embedding):
        return False, "embedding"
    head = model.get_output_embeddings()
    return False, "head" if head is module and head is not None else "outside-blocks"


def _kind_inside(model: nn.Module, name: str, weight: Tensor, blocks: tuple[str, ...]) -> tuple[bool, str] | None:
    """(masked, rule) of a matrix inside the blocks, or None if it cannot be classified."""
    path, _, parameter = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, nn.Embedding):
        return False, "embedding"
    if sum(size > 1 for size in weight.shape) < 2 and not isinstance(module, nn.Linear):
        return False, "vector"
    if type(module).__name__.endswith("Norm"):
        return False, "norm"
    if _is_router(model, path, weight, blocks):
        return False, "router"
    if is_transposed(module, weight) is not None:
        return True, _group(path)
    base = parameter.removesuffix("_bias")
    if base != parameter and getattr(getattr(module, base, None), "ndim", 0) == weight.ndim + 1:
        return False, "expert-bias"
    return None


def _is_router(model: nn.Module, path: str, weight: Tensor, blocks: tuple[str, ...]) -> bool:
    """Whether a matrix beside experts has a row for each of them, or a single row that weighs a shared one.

    The experts are the nearest `experts` of a module above: a list of modules, or one with stacked parameters.
    """
    if weight.ndim != 2 or re.search(r"\.experts\.\d+(\.|$)", path):
        return False
    owner = path
    while owner.startswith(blocks):
        owner = owner.rpartition(".")[0]
        experts = getattr(model.get_submodule(owner), "experts", None)
        if isinstance(experts, nn.Module):
            stacked = [p.shape[0] for p in experts.parameters() if p.ndim == 3]
            count = len(experts) if isinstance(experts, nn.ModuleList) else (stacked or [0])[0]
            return weight.shape[0] in (1, count)
    return False


def _group(path: str) -> str:
    """The name of the rule that masks a matrix: what its place in the block says."""
    if re.search(r"\.experts(\.|$)", path):
        return "experts"
    if "shared" in path:
        return "shared-experts"
    if re.search(r"att", path):
        return "attention"
    return "mlp" if re.search(r"mlp|ffn|feed_forward|\.fc", path) else "linear"


def generalised(name: str) -> str:
    """A parameter's name with # for each number between its dots: `model.layers.#.mlp.up_proj.weight`."""
    return ".".join("#" if part.isdigit() else part for part in name.split("."))
