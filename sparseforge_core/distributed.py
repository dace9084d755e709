"""The ranks that train together: how many there are, means over them, and tensors of which each holds a part.

Without a process group every function is what one process alone needs: a world of 1, and means that return their
argument. With one, all its ranks hold equal shares of each batch, so that a mean over ranks is the mean over the batch.
How processes find each other, and how they part, is in `ranks.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
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


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether one of them `is_sharded`."""
    return _running() and any(is_sharded(x) for x in tensors)


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of the ranks' tensors, equal on all of them. Collective: every rank must call it with the same shape.

    A DTensor is one tensor over all ranks already: only sums still pending are carried out.
    """
    return _mean_over_ranks(x) if _running() else x


@torch.no_grad()
def _mean_over_ranks(x: Tensor) -> Tensor:
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


@torch.no_grad()
def whole(x: Tensor) -> Tensor:
    """All of a tensor on every rank: what a sharded one is made of, put together (collective then), else `x` itself.

    Bytes are gathered, whatever they mean: neither gloo nor NCCL knows 16-bit integers.
    """
    if not is_sharded(x):
        return x
    mine = part(x)
    padded = mine.new_zeros((-(-x.shape[0] // world()), *x.shape[1:]))
    padded[: mine.shape[0]].copy_(mine)
    found = mine.new_empty((padded.shape[0] * world(), *x.shape[1:]))
    dist.all_gather_into_tensor(found.view(-1).view(torch.uint8), padded.view(-1).view(torch.uint8))
    return found[: x.shape[0]]


def part(x: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the same memory: its shard, or all of it."""
    return x.to_local() if is_sharded(x) else x


def _rows(x: Tensor, place: int) -> tuple[int, int]:
    """FSDP2 cuts as torch.chunk does: equal pieces of the first dimension, the last ones smaller or empty."""
    size = -(-x.shape[0] // world())
    begin = min(place * size, x.shape[0])
    return begin, min(begin + size, x.shape[0])


@torch.no_grad()
def cut(x: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has whole, as its shards on the ranks where `like` is sharded; `x` itself otherwise."""
    if not is_sharded(like):
        return x
    begin, end = _rows(x, rank())
    return of_parts(x[begin:end].clone(), like, tuple(x.shape))


@torch.no_grad()
def of_parts(mine: Tensor, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor of `shape` whose rows on this rank are `mine`, sharded over the same ranks as `like`."""
    from torch.distributed.tensor import DTensor, Shard

    assert is_sharded(like)
    stride = torch.empty(shape, device="meta").stride()
    size = torch.Size(shape)
    return DTensor.from_local(mine, like.device_mesh, [Shard(0)], run_check=False, shape=size, stride=stride)


def stands_for(made: Tensor, sharded: Tensor) -> None:
    """Note that `made` is in the place of `sharded` for a moment."""
    made.in_place_of = sharded  # type: ignore[attr-defined]


def itself(weight: Tensor) -> Tensor:
    """The parameter that optimizers know a weight by: the sharded one, while another is in its place."""
    known: Tensor = getattr(weight, "in_place_of", weight)
    return known


@torch.no_grad()
def put_back(x: Tensor, sharded: Tensor) -> None:
    """Write this rank's rows of the whole tensor `x` into its shard."""
    begin, end = _rows(sharded, rank())
    part(sharded).copy_(x[begin:end])


@torch.no_grad()
def sums_over_ranks(numbers: list[float]) -> list[float]:
    """Each number summed over the ranks, on the CPU. Collective."""
    if world() == 1:
        return numbers
    summed = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(summed, group=control())
    return [float(number) for number in summed]


def of_all_ranks(data: bytes) -> list[bytes]:
    """As many bytes of every rank, in their order; all give equally many. Collective."""
    if world() == 1:
        return [data]
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
    found = [torch.zeros_like(mine) for _ in range(world())]
    dist.all_gather(found, mine, group=control())
    return [one.numpy().tobytes() for one in found]


def said_by_all(text: str, size: int = 256) -> list[str]:
    """A short text (cut to `size` bytes) of every rank, in their order. Collective."""
    data = text.encode()[:size]
    return [one.rstrip(b"\0").decode(errors="replace") for one in of_all_ranks(data.ljust(size, b"\0"))]


class Vote:
    """Whether some rank wants to stop, asked anew each step and answered a step later, so that no rank waits for it."""

    def __init__(self) -> None:
        self._open: tuple[dist.Work, Tensor] | None = None

    def cast(self, wanted: bool) -> bool:
        """Give this step's vote; returns whether any rank voted for it the step before, the same on all ranks."""
        if world() == 1:
            return wanted
        answer = self.close()
        ballot = torch.tensor(int(wanted))
        work = dist.all_reduce(ballot, op=dist.ReduceOp.MAX, group=control(), async_op=True)
        assert work is not None
        self._open = (work, ballot)
        return answer

    def close(self) -> bool:
        """The answer to the last vote, if one is open."""
        if self._open is None:
            return False
        work, ballot = self._open
        work.wait()
        self._open = None
        return bool(ballot)


@torch.no_grad()
def clip_over_ranks(gradients: list[Tensor], limit: float) -> Tensor:
    """Scale gradients, sharded or not, down to the global norm `limit`; returns the norm before, equal on all ranks."""
    sharded = [part(g) for g in gradients if is_sharded(g)]
    alike = [g for g in gradients if not is_sharded(g)]
    norms = [_norm(sharded), _norm(alike)]
    squares = torch.stack([norm.square() for norm in norms if norm is not None])
    if norms[0] is not None:
        dist.all_reduce(squares[0])
    norm = squares.sum().sqrt()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([*sharded, *alike], scale)
    return norm


def _norm(tensors: list[Tensor]) -> Tensor | None:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors))) if tensors else None


def control() -> dist.ProcessGroup | None:
    """The group that carries words rather than tensors, on the CPU; None, the default group, where that does too."""
    return _CONTROL[0] if _CONTROL else None


def set_control(group: dist.ProcessGroup | None) -> None:
    """Keep `group` for `control`."""
    _CONTROL[:] = [] if group is None else [group]


_CONTROL: list[dist.ProcessGroup] = []


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
