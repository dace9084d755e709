"""The effective weights of a forward pass, and gradients in them.

Every mask is evaluated once a pass, and what it returned is what gradients are taken in. That is exact for soft masks,
side branches and experts, leaves `.grad` alone, and holds under sharding too: in FSDP2 the parameters themselves are in
no graph (differentiating in them silently returns nothing), the effective weights are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from sparseforge_core.models.sites import Site


@contextlib.contextmanager
def effective_weights(
    sites: list[Site], shift: Callable[[Site, Tensor], Tensor] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Within: a forward pass fills the returned dictionary, by site name; gradients are to be taken within, too.

    `shift` returns what the forward shall multiply by instead of the effective weight that it is given.
    """
    seen: dict[str, Tensor] = {}

    def tap(site: Site) -> Callable[..., Tensor]:
        def hook(module: Any, args: Any, out: Tensor) -> Tensor:
            seen[site.name] = out if shift is None else shift(site, out)
            return seen[site.name]

        return hook

    handles = [site.mask.register_forward_hook(tap(site)) for site in sites]
    try:
        with parametrize.cached():  # fused experts ask for their weight once an expert: all must get the same tensor
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def gradients(
    loss: Tensor, weights: dict[str, Tensor], sites: list[Site], *, create_graph: bool = False
) -> dict[str, Tensor]:
    """d loss / d effective weight, by the sites that the loss depends on; this rank's own, full, as stored."""
    reached = [s.name for s in sites if s.name in weights and weights[s.name].requires_grad]
    found: tuple[Tensor | None, ...] = ()
    if reached and loss.requires_grad:
        inputs = [weights[name] for name in reached]
        found = torch.autograd.grad(loss, inputs, create_graph=create_graph, allow_unused=True)
    return {name: grad for name, grad in zip(reached, found, strict=False) if grad is not None}


def taken(found: dict[str, Tensor], site: Site) -> Tensor:
    """The gradient of a site taken out of `found`; zero where the loss did not depend on it."""
    if site.name in found:
        return found.pop(site.name)
    return torch.zeros(site.weight.shape, device=site.weight.device, dtype=site.weight.dtype)
