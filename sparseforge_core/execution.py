"""How a cell is executed on this machine, and whether it fits: placement, never part of its identity."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparseforge_core import memory
from sparseforge_core.distributed import world
from sparseforge_core.errors import RecipeError
from sparseforge_core.methods.base import Method
from sparseforge_core.methods.sparseforge import SparseForge
from sparseforge_core.models.sites import Site, assign_patterns, find_sites
from sparseforge_core.observe.curvature import AdamSecondMoment
from sparseforge_core.opening import open_family, open_skeleton
from sparseforge_core.ranks import HEARTBEAT, own_device
from sparseforge_core.recipe import Recipe
from sparseforge_core.train.parallel import Sharding
from sparseforge_core.turns import Turns

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Execution:
    """How a cell is executed on this machine; never part of its identity."""

    micro_batch: int | None = None
    """Sequences per forward; None takes the whole batch."""
    compiled: bool | None = None
    """Whether the blocks go through torch.compile: half a minute for the first cell of a shape in a process, then
    faster steps. None: on a GPU, in runs of COMPILED_FROM steps or more, unless hidden states are matched or the blocks
    are sharded."""
    sharding: Sharding = "auto"
    """How ranks share the work: everything on each of them, or a part of each weight; by itself what fits."""
    recompute: bool = False
    """Whether activations of a block are computed again in backward instead of kept."""
    recorded: bool | None = None
    """Whether forward and backward of a step are recorded as a CUDA graph and started by one call. None: in runs of
    RECORDED_FROM steps or more, unless `unrecorded` says why not."""
    deterministic: bool = False
    """Whether GPUs use only algorithms that give the same bits each time, where there are any; slower."""
    companions: int | None = None
    """Processes that worked on other cells beside this one when it began, if known: the device was theirs too."""
    turns: Turns | None = None
    """Whose turn it is to train on the device; None: nobody waits."""
    heartbeat: float = HEARTBEAT
    """Seconds after which a rank that is silent, or behind the others, ends them all."""


def default_device() -> torch.device:
    """The GPU of this rank, the first one of a process alone, or the CPU where there is none."""
    return own_device()


def device_memory() -> int:
    """Bytes of memory of the first GPU, or of the host where there is none."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


RECORDED_FROM = 60
"""Steps from which on a run earns back the second or so that recording a step takes, once for each kind of step."""


def unrecorded(recipe: Recipe, execution: Execution, device: torch.device) -> str | None:
    """Why the steps of a cell that is executed so cannot be recorded, or None."""
    sequences = recipe.train.sequences
    for why, holds in (
        ("steps are recorded on a GPU, and this is none", device.type != "cuda"),
        ("the steps of several ranks are not recorded", world() > 1),
        ("recomputed activations are not recorded; leave out --recompute", execution.recompute),
        ("a step is recorded whole; leave out --micro-batch", (execution.micro_batch or sequences) < sequences),
    ):
        if holds:
            return why
    return None


def check_recording(recipe: Recipe, execution: Execution, device: torch.device) -> None:
    """Raise RecipeError if steps are to be recorded that cannot be."""
    why = unrecorded(recipe, execution, device)
    if execution.recorded and recipe.method.trains and why is not None:
        raise RecipeError(f"--record: {why}")


def records(recipe: Recipe, execution: Execution, device: torch.device) -> bool:
    """Whether the steps of a cell are recorded; where a long run's are not and nobody said so, the log says why."""
    if execution.recorded is not None:
        return execution.recorded
    if recipe.train.steps < RECORDED_FROM:
        return False
    why = unrecorded(recipe, execution, device)
    if why is not None and device.type == "cuda":
        log.info("steps are not recorded: %s", why)
    return why is None


def check_memory(recipe: Recipe, home: Path, execution: Execution, gpu_bytes: float) -> None:
    """Raise RecipeError, with the arithmetic and before any weight is loaded, if the cell cannot fit on its GPUs."""
    model: Any = open_skeleton(recipe.model, home)
    if model is None:
        return
    sites: list[Site] = []
    if recipe.pattern is not None:
        sites = assign_patterns(find_sites(model, open_family(recipe.model, model)), recipe.pattern)
    shapes = [tuple(site.matrix(site.weight).shape) for site in sites]
    shape = memory.shape_of(
        type(model).__name__, model.config, shapes, sum(parameter.numel() for parameter in model.parameters())
    )
    share = recipe.train.sequences // world()
    begun = recipe.method.begins_from()
    memory.check(
        shape,
        memory.Spread(
            gpus=world(),
            sharded=world() > 1 and execution.sharding != "replicate",
            micro_batch=min(execution.micro_batch or share, share),
            length=recipe.train.length,
            recompute=execution.recompute,
            teacher=recipe.objective.teacher_bytes,
            masks=recipe.method.sparsifies,
            mask_bytes=2 if getattr(recipe.method, "mask_storage", "float32") == "int16" else memory.MASK_BYTES,
            curvature_bytes=_curvature_bytes(recipe.method),
            moment_bytes=memory.ADAM_BYTES if recipe.train.moments == "float32" else memory.EIGHT_BIT_BYTES,
            mean_bytes=4 if recipe.train.averages else 0,
            starts=begun is not None,
            calibration=_calibration_tokens(begun),
        ),
        gpu_bytes,
    )


def _calibration_tokens(method: Method | None) -> int:
    """Tokens that a one-shot method carries through the model block by block, at most."""
    if method is None or not method.calibrates():
        return 0
    return int(getattr(method, "samples", 0) * getattr(method, "length", 0))


def _curvature_bytes(method: Method) -> int:
    """Bytes that a method keeps of each masked weight's curvature; none where Adam's second moment serves."""
    if not isinstance(method, SparseForge) or method.criterion.needs != "curvature":
        return 0
    if isinstance(method.curvature, AdamSecondMoment):
        return 0
    return 2 if getattr(method.curvature, "storage", "float32") == "bfloat16" else memory.CURVATURE_BYTES
