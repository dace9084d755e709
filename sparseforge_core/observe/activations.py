"""Input norms of every site over calibration text, observed by hooks on the whole model.

For a matrix the input is what its module receives. Fused experts see only the tokens routed to them; the input
of their second matrix is recomputed from the first, as the module itself gates it (`models/layouts.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparseforge_core.errors import CurvatureUnavailable, NotFinite, UnsupportedModel
from sparseforge_core.models.layouts import expert_inputs
from sparseforge_core.models.sites import Site

See = Callable[[Site, int | None, Tensor], None]
"""Told (site, expert or None, input `[..., in]`) of every matrix that runs."""


@torch.no_grad()
def input_norms(model: nn.Module, sites: list[Site], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """l2 norm of each input of each site over `batches` of token ids, `[..., 1, in]`, float32.

    Raises CurvatureUnavailable naming a site whose module (or, of fused experts, one expert) saw no token, whose
    inputs were not finite, or whose experts route in a way that is not known.
    """
    device = next(model.parameters()).device
    norms = NormSums(sites, device)
    with watching(sites, norms.see):
        for batch in batches:
            model(input_ids=batch.to(device), use_cache=False)
    return norms.norms()


class NormSums:
    """Running sums of squared inputs, `[..., 1, in]` a site."""

    def __init__(self, sites: list[Site], device: torch.device) -> None:
        self.sites = sites
        self.sums = {site.name: torch.zeros(_norm_shape(site), device=device) for site in sites}

    def see(self, site: Site, expert: int | None, x: Tensor) -> None:
        """Take in the inputs of one call."""
        total = self.sums[site.name]
        (total if expert is None else total[expert]).add_(_squares(x))

    def norms(self) -> dict[str, Tensor]:
        """The norms so far; raises CurvatureUnavailable as `input_norms` does."""
        _check(self.sites, self.sums)
        return {name: total.sqrt() for name, total in self.sums.items()}


@contextlib.contextmanager
def watching(sites: list[Site], see: See) -> Iterator[None]:
    """Tell `see` of the inputs of these sites while the model runs."""
    hooks = [
        module.register_forward_pre_hook(_watcher(found, see), with_kwargs=True)
        for module, found in _by_module(sites).items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def site_inputs(
    sites: list[Site], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[Site, int | None, Tensor]]:
    """What the sites of one module receive in one forward: (site, expert or None, `[..., in]`).

    Of a plain matrix it is the very tensor that the module received, so that sites with one input can be told.

    `args` and `kwargs` are those of a forward pre-hook on the module. Raises CurvatureUnavailable naming a site of
    fused experts whose routing is not known.
    """
    if sites[0].weight.ndim == 2:
        yield sites[0], None, args[0] if args else next(iter(kwargs.values()))
        return
    try:
        for expert, first, second in expert_inputs(sites[0].module, args, kwargs):
            for site in sites:
                yield site, expert, second if site.parameter == "down_proj" else first
    except UnsupportedModel as error:
        raise CurvatureUnavailable(f"site {sites[0].name}: {error}") from error


def _squares(x: Tensor) -> Tensor:
    """Sum of squares over all tokens, `[1, in]`."""
    return x.reshape(-1, x.shape[-1]).float().square().sum(0, keepdim=True)


def _norm_shape(site: Site) -> tuple[int, ...]:
    *lead, _, inputs = site.matrix(site.weight).shape
    return (*lead, 1, inputs)


def _by_module(sites: list[Site]) -> dict[nn.Module, list[Site]]:
    grouped: dict[nn.Module, list[Site]] = {}
    for site in sites:
        grouped.setdefault(site.module, []).append(site)
    return grouped


def _watcher(sites: list[Site], see: See) -> Any:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for site, expert, x in site_inputs(sites, args, kwargs):
            see(site, expert, x)

    return hook


def _check(sites: list[Site], sums: dict[str, Tensor]) -> None:
    for site in sites:
        total = sums[site.name]
        if not bool(torch.isfinite(total).all()):
            raise NotFinite(f"site {site.name}: calibration inputs are not finite")
        seen = (total != 0).flatten(-2).any(-1)
        if not bool(seen.any()):
            raise CurvatureUnavailable(f"site {site.name}: its module saw no calibration input")
        if not bool(seen.all()):
            blind = (~seen).nonzero().flatten().tolist()
            raise CurvatureUnavailable(
                f"site {site.name}: experts {blind[:5]} ({len(blind)} in all) saw no calibration token, so nothing "
                "tells their weights apart. Use more or longer calibration sequences."
            )
