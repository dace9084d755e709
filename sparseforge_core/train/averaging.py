"""Gradients of replicas, averaged over ranks while backward still runs.

torch's DistributedDataParallel does this around one forward of one module; our student runs as body and head in chunks
(`objective/batch.py`), and its curvature estimators run it again. So the averaging hangs on the parameters alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparseforge_core.distributed import world

BUCKET_BYTES = 2**25
"""Gradients summed at a time: large enough to fill the links, small enough to leave while backward goes on."""


class Average:
    """The gradients of some parameters, which every rank has whole.

    They are collected in flat buckets in the order in which backward produces them, last layers first; a full
    bucket is summed at once. Buckets are summed in a fixed order, whatever a rank's own backward reached.
    """

    def __init__(
        self, parameters: list[nn.Parameter], guests: list[nn.Parameter] | None = None, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        """
        Args:
            parameters: those with gradients in every step.
            guests: those with gradients in steps that say so; backward comes to them first.
            bucket_bytes: size from which on a bucket is full.
        """
        self.own, self.guests = _buckets(parameters, bucket_bytes), _buckets(guests or [], bucket_bytes)
        self.buckets = self.own
        """Those of this step."""
        self.armed = False
        self.next = 0
        for bucket in [*self.guests, *self.own]:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._seen(bucket))

    def arm(self, *, guests: bool = False) -> None:
        """The next backward is the step's last: what it leaves is complete, with the guests' gradients or without."""
        self.armed, self.next = True, 0
        self.buckets = [*self.guests, *self.own] if guests else self.own
        for bucket in self.buckets:
            bucket.missing = {id(parameter) for parameter in bucket.parameters}

    def finish(self) -> None:
        """Wait until every gradient is the mean over ranks. One that no rank has stays None."""
        self._start(everything=True)
        self.armed = False
        for bucket in self.buckets:
            bucket.take()

    def _seen(self, bucket: _Bucket) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if self.armed:
                if id(parameter) not in bucket.missing:
                    raise RuntimeError("a gradient grew after it had been averaged; the ranks would drift apart")
                bucket.missing.remove(id(parameter))
                self._start()

        return hook

    def _start(self, *, everything: bool = False) -> None:
        while self.next < len(self.buckets) and (everything or not self.buckets[self.next].missing):
            self.buckets[self.next].sum()
            self.next += 1


def _buckets(parameters: list[nn.Parameter], full: int) -> list[_Bucket]:
    found: list[_Bucket] = []
    taken: list[nn.Parameter] = []
    for parameter in reversed(parameters):
        taken.append(parameter)
        if sum(p.numel() * p.element_size() for p in taken) >= full:
            found.append(_Bucket(taken))
            taken = []
    return [*found, _Bucket(taken)] if taken else found


class _Bucket:
    """Some parameters, their gradients as one flat tensor, and behind these whether each has one."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.missing: set[int] = set()
        """Parameters whose gradients are still to come in this backward."""
        self.sizes = [parameter.numel() for parameter in parameters]
        count = sum(self.sizes)
        self.flat = torch.zeros(count + len(parameters), device=parameters[0].device, dtype=parameters[0].dtype)
        self.views = list(self.flat[:count].split(self.sizes))
        self.present = self.flat[count:]
        self.work: dist.Work | None = None

    @torch.no_grad()
    def sum(self) -> None:
        here = [p.grad is not None for p in self.parameters]
        filled = [(view, p.grad) for view, p in zip(self.views, self.parameters, strict=True) if p.grad is not None]
        if not all(here):
            self.flat.zero_()
            self.present.copy_(torch.tensor(here, dtype=self.flat.dtype))
        else:
            self.present.fill_(1.0)
        if filled:
            torch._foreach_copy_([view for view, _ in filled], [gradient.reshape(-1) for _, gradient in filled])
        self.work = dist.all_reduce(self.flat, async_op=True)

    @torch.no_grad()
    def take(self) -> None:
        assert self.work is not None
        self.work.wait()
        self.flat[: -len(self.parameters)].div_(world())
        absent = [i for i, parameter in enumerate(self.parameters) if parameter.grad is None]
        if absent:  # another rank may have what this one's batch did not reach
            elsewhere = self.present.tolist()
            for i in absent:
                if elsewhere[i]:
                    self.parameters[i].grad = torch.empty_like(self.parameters[i])
        had = [
            (p.grad, view.view_as(p)) for view, p in zip(self.views, self.parameters, strict=True) if p.grad is not None
        ]
        if had:
            torch._foreach_copy_([gradient for gradient, _ in had], [mean for _, mean in had])
