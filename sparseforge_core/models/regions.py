"""A model whose repeated blocks are compiled, one by one: blocks of a shape share what was compiled for the first.

Compiling a whole model takes minutes and is done again for every depth; a block takes seconds, whatever the depth, and
the next model of the same shapes in this process takes none. Parameters are shared with the model that is given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparseforge_core.models.heads import replaced

KEPT = 64
"""Compiled forms of one function that are kept: one for each shape, precision and phase that a process sees.

All blocks of a library may pass through one function of it, so torch's default of 8 is too few for one process that
trains cell after cell. Beyond it a block is not run uncompiled in silence: it is an error.
"""


def compiled_blocks(model: Any, *, backend: str = "inductor", fullgraph: bool = False) -> Any:
    """`model` with its blocks compiled, the model as a whole where it has no list of equal blocks."""
    configuration = torch._dynamo.config
    configuration.recompile_limit = max(configuration.recompile_limit, KEPT)
    configuration.accumulated_recompile_limit = max(configuration.accumulated_recompile_limit, 4 * KEPT)
    configuration.fail_on_recompile_limit_hit = True
    path = blocks_path(model)
    if path is None:
        return torch.compile(model, backend=backend, fullgraph=fullgraph, dynamic=False)
    made: list[Any] = [
        torch.compile(block, backend=backend, fullgraph=fullgraph, dynamic=False) for block in model.get_submodule(path)
    ]
    return replaced(model, path, nn.ModuleList(made))


def has_compiled_blocks(model: Any) -> bool:
    """Whether `compiled_blocks` made it: the library then cannot tell what its blocks put out (hidden states)."""
    return any(hasattr(part, "_orig_mod") for part in model.modules())


def blocks_path(model: nn.Module) -> str | None:
    """Where the longest list of blocks lies: at least two modules, those of the first one's class in the majority."""
    lists = {
        path: part
        for path, part in model.named_modules()
        if isinstance(part, nn.ModuleList) and sum(type(block) is type(part[0]) for block in part) >= 2
    }
    weights = {path: sum(p.numel() for p in part.parameters()) for path, part in lists.items()}
    return max(weights, key=lambda path: weights[path]) if weights else None
