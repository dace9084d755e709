"""AdamW over float32 master weights, with the parameter groups that sparsity needs."""

from __future__ import annotations

import torch
from torch import nn

from sparseforge_core.errors import Diverged
from sparseforge_core.models.sites import Site
from sparseforge_core.recipe import TrainPlan


def build_optimizer(model: nn.Module, sites: list[Site], plan: TrainPlan) -> torch.optim.AdamW:
    """AdamW: by default decay acts on matrices that carry no mask and are no embeddings, and on nothing else.

    A decayed masked weight would be pulled to zero by the optimizer while the mask decides the same question.
    """
    spared: set[int] = set()
    if plan.decayed == "unmasked":
        spared = {id(site.weight) for site in sites}
        spared |= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            plain_matrix = parameter.ndim >= 2 and id(parameter) not in spared
            (decayed if plain_matrix else free).append(parameter)
    groups = [{"params": free, "weight_decay": 0.0}]
    if decayed:
        groups.append({"params": decayed, "weight_decay": plan.weight_decay})
    return torch.optim.AdamW(groups, lr=0.0, betas=plan.betas, eps=plan.eps, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip(model: nn.Module, limit: float, step: int) -> float:
    """Scale gradients down to the global norm `limit`; returns the norm before. Raises Diverged if not finite."""
    norm = float(torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], limit))
    if not torch.isfinite(torch.tensor(norm)):
        raise Diverged(
            f"step {step}: the gradient norm is {norm}; nothing of this step was kept. Lower the learning rate"
        )
    return norm
