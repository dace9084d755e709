"""A model whose repeated blocks are compiled, one by one: blocks of a shape share what was compiled for the first.

Compiling a whole model takes minutes and is done again for every depth; a block takes seconds, whatever the depth, and
the next model of the same shapes in this process takes none. Parameters are shared with the model that is given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sparseforge_core.errors import NotCompilable
from sparseforge_core.models.heads import replaced

KEPT = 64
"""Compiled forms of one function that are kept: one for each shape, precision and phase that a process sees.

All blocks of a library may pass through one function of it, so torch's default of 8 is too few for one process that
trains cell after cell. Beyond it a block is not run uncompiled in silence: it is an error.
"""

_made_before = 0
"""Graphs that this process had compiled when it last forgot them."""


def compiled_blocks(model: Any, *, backend: str = "inductor", fullgraph: bool = False) -> Any:
    """`model` with its blocks compiled, the model as a whole where it has no list of equal blocks."""
    _begin()
    path = blocks_path(model)
    how: dict[str, Any] = {"backend": backend, "fullgraph": fullgraph, "dynamic": False}
    if path is None:
        return torch.compile(model, **how)
    made: list[Any] = [torch.compile(block, **how) for block in model.get_submodule(path)]
    return replaced(model, path, nn.ModuleList(made))


def compile_blocks(model: nn.Module, *, backend: str = "inductor") -> None:
    """Compile the forwards of the blocks of `model` itself; hooks on the blocks stay outside, and run as they are.

    Raises NotCompilable if the model has no list of equal blocks.
    """
    _begin()
    path = blocks_path(model)
    if path is None:
        raise NotCompilable(f"compile: {type(model).__name__} has no list of equal blocks; run without --compile")
    blocks: Any = model.get_submodule(path)
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend, dynamic=False)


def _begin() -> None:
    """Before anything is compiled: room for its forms, and an error where they are too many."""
    _make_room()
    configuration = torch._dynamo.config
    configuration.recompile_limit = max(configuration.recompile_limit, KEPT)
    configuration.accumulated_recompile_limit = max(configuration.accumulated_recompile_limit, 4 * KEPT)
    configuration.fail_on_recompile_limit_hit = True


def _make_room() -> None:
    """Forget what was compiled for cells of before, if there is so much of it that this one might reach the limit."""
    global _made_before
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if made - _made_before >= KEPT // 2:
        torch._dynamo.reset()
        _made_before = made


@contextlib.contextmanager
def compiled_within_limits() -> Iterator[None]:
    """Inside, the error of too many compiled forms of a function is NotCompilable; the next cell starts anew."""
    try:
        yield
    except Exception as error:
        # By its name: to import its class is to load the compiler, which runs that compile nothing do without.
        if type(error).__name__ != "FailOnRecompileLimitHit":
            raise
        torch._dynamo.reset()
        raise NotCompilable(
            f"compile: {KEPT} forms of one function were compiled and another one was asked for; it must depend on a "
            f"number of the host's that changes from step to step. Run the cell with --no-compile ({error})"
        ) from error


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
