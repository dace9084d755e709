"""Inverse of each site's input Gram matrix over calibration text: the second-order statistic of SparseGPT.

A layer that is to reproduce its outputs X W' has the Hessian X' X, the same for every row of W. Removing the entry w_ij
and letting the rest of its row make up for it costs w_ij^2 / [(X' X)^-1]_jj (Optimal Brain Surgeon; arXiv 2301.00774).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparseforge_core.errors import CurvatureUnavailable, NotFinite, RecipeError
from sparseforge_core.models.sites import Site
from sparseforge_core.observe.blocks import Block, stream_blocks


@torch.no_grad()
def inverse_gram_diagonals(
    model: nn.Module, sites: list[Site], batches: list[Tensor], damping: float = 0.01
) -> dict[str, Tensor]:
    """[H^-1]_jj of each site with H = mean x x' + `damping` mean(diag) I, `[..., 1, in]`, float32.

    `batches` are token ids `[n, length]`, carried through the model once, block by block; the matrices of one block are
    held at a time, each `[..., in, in]` in float32. Raises CurvatureUnavailable naming a site (and expert) that no
    token reached, or whose matrix is not finite or not positive definite.
    """
    if damping <= 0:
        raise RecipeError(f"damping={damping}: must be above 0, or a constant input leaves no inverse")
    found: dict[str, Tensor] = {}
    for block in stream_blocks(model, sites, batches):
        found |= block_inverse_diagonals(block, damping)
    return found


@torch.no_grad()
def block_inverse_diagonals(block: Block, damping: float = 0.01) -> dict[str, Tensor]:
    """The same of one block's sites."""
    found = input_grams(block).items()
    return {name: _inverse_diagonal(gram, tokens, damping, name) for name, (gram, tokens) in found}


@torch.no_grad()
def input_grams(block: Block) -> dict[str, tuple[Tensor, Tensor]]:
    """Sum of x x' over tokens, `[..., in, in]`, and the number of tokens, `[...]`, of each site; float32."""
    grams: dict[str, tuple[Tensor, Tensor]] = {}
    for site in block.sites:
        *lead, _, inputs = site.matrix(site.weight).shape
        sums = torch.zeros(*lead, inputs, inputs, device=block.device)
        grams[site.name] = sums, torch.zeros(lead, device=block.device)

    def see(site: Site, expert: int | None, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        gram, tokens = grams[site.name]
        (gram if expert is None else gram[expert]).addmm_(rows.T, rows)
        (tokens if expert is None else tokens[expert]).add_(rows.shape[0])

    block.observe(see)
    return grams


def _inverse_diagonal(gram: Tensor, tokens: Tensor, damping: float, name: str) -> Tensor:
    """diag of the damped inverse, `[..., 1, in]`; in float64, where damping of 1 % is always enough."""
    mean = gram.double() / tokens.double().clamp_min(1.0)[..., None, None]
    scale = mean.diagonal(dim1=-2, dim2=-1).mean(-1)
    if not bool(torch.isfinite(scale).all()):
        raise NotFinite(f"site {name}: calibration inputs are not finite")
    if not bool((scale > 0).all()):
        where = f", experts {torch.nonzero(scale == 0).flatten().tolist()}" if scale.ndim else ""
        raise CurvatureUnavailable(f"site {name}{where}: no calibration token reached it; use more calibration text")
    mean.diagonal(dim1=-2, dim2=-1).add_(damping * scale.unsqueeze(-1))
    factor, failed = torch.linalg.cholesky_ex(mean)
    if bool((failed != 0).any()):
        raise CurvatureUnavailable(f"site {name}: its damped input Gram matrix is not positive definite; raise damping")
    return torch.cholesky_inverse(factor).diagonal(dim1=-2, dim2=-1).unsqueeze(-2).float()
