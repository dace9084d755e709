"""The only door to torch.distributed: how many processes there are, and means over them.

Without a process group every function is what one process alone needs: a world of 1, and means that return their
argument. With one, all its ranks hold equal shares of each batch, so that a mean over ranks is the mean over the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def world() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if _running() else 1


def rank() -> int:
    """This process's place among them, from 0."""
    return dist.get_rank() if _running() else 0


def is_sharded(x: Tensor) -> TypeGuard[DTensor]:
    """Whether `x` is a DTensor, of which this process may hold only a part (FSDP2's parameters are)."""
    if not _running():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


@torch.no_grad()
def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of the ranks' tensors, equal on all of them. Collective: every rank must call it with the same shape.

    A DTensor is one tensor over all ranks already: only sums still pending are carried out.
    """
    if is_sharded(x):
        from torch.distributed.tensor import Partial, Replicate

        if any(isinstance(placement, Partial) for placement in x.placements):
            placements = [Replicate() if isinstance(p, Partial) else p for p in x.placements]
            return x.redistribute(placements=placements)
        return x
    if world() == 1:
        return x
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)  # a sum: gloo knows no mean
    return total.div_(world())


@torch.no_grad()
def laid_out_like(x: Tensor, weight: Tensor) -> Tensor:
    """Each rank's full tensor `x` as the statistics of `weight` are kept.

    For a plain weight, `x` itself: local, to be averaged later by `mean_over_ranks`. For a sharded one, the mean over
    ranks in the weight's own shards (a reduce-scatter), since no rank could keep a full tensor a site. Collective then.
    """
    if not is_sharded(weight):
        return x
    from torch.distributed.tensor import DTensor, Partial

    mesh = weight.device_mesh
    pending = DTensor.from_local(x / mesh.size(), mesh, [Partial()] * mesh.ndim, run_check=False)
    return pending.redistribute(placements=weight.placements)


def total(x: Tensor) -> float:
    """Sum of all entries of one tensor, of all shards if it is sharded (collective then)."""
    summed = x.sum()
    return float(summed.full_tensor() if is_sharded(summed) else summed)


def finite_everywhere(tensors: list[Tensor]) -> list[bool]:
    """For each tensor, whether all its entries are finite on every rank. One synchronisation, collective."""
    if not tensors:
        return []
    local = [x.to_local() if is_sharded(x) else x for x in tensors]
    flags = torch.stack([torch.isfinite(x).all() for x in local]).int()
    if world() > 1:
        dist.all_reduce(flags, op=dist.ReduceOp.MIN)
    return [bool(flag) for flag in flags.tolist()]


def on_any_rank(flags: list[bool], device: torch.device) -> list[bool]:
    """For each flag, whether it is set on some rank. Collective."""
    if world() == 1 or not flags:
        return flags
    found = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()
