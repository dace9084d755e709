"""AdamW, or the method's own rule, over float32 master weights, with the parameter groups that sparsity needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods.base import MaskTrack
from sparseforge_core.models.sites import Site
from sparseforge_core.recipe import TrainPlan
from sparseforge_core.train.eight_bit import EightBitAdamW
from sparseforge_core.train.muon import MuonAdam


def build_optimizer(model: nn.Module, sites: list[Site], plan: TrainPlan, track: MaskTrack) -> torch.optim.Optimizer:
    """The track's update rule; without one of its own AdamW, or Muon for the masked weights where the plan says so.

    Raises RecipeError where plan and method both want to say how masked weights are updated.

    By default decay acts on matrices that carry no mask and are no embeddings, and on nothing else: a decayed masked
    weight would be pulled to zero by the optimizer while the mask decides the same question.
    """
    masked = {id(site.weight) for site in sites}
    spared: set[int] = set()
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    if plan.decayed == "unmasked":
        spared = masked | embeddings
    matrices = _matrices(sites, track) if plan.rule == "muon" else []
    elsewhere = {id(weight) for weight in matrices}
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in elsewhere:
            plain_matrix = parameter.ndim >= 2 and id(parameter) not in spared
            rate = 1.0 if id(parameter) in masked else plan.unmasked_rate
            found.setdefault((plan.weight_decay if plain_matrix else 0.0, rate), []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": decay, "rate_scale": rate}
        for (decay, rate), parameters in sorted(found.items())
    ]
    if plan.moments == "8-bit":
        _refuse_own_rule(track, "train.moments='8-bit'", "'float32'")
        return EightBitAdamW(groups, betas=plan.betas, eps=plan.eps, spared=embeddings)
    if not matrices:
        return track.optimizer(groups, betas=plan.betas, eps=plan.eps)
    decay = plan.weight_decay if plan.decayed == "all" else 0.0
    return MuonAdam(groups, matrices, betas=plan.betas, eps=plan.eps, weight_decay=decay)


def _matrices(sites: list[Site], track: MaskTrack) -> list[nn.Parameter]:
    """The masked weights, for a rule of the plan's choice."""
    _refuse_own_rule(track, "train.rule='muon'", "'adamw'")
    found = [site.weight for site in sites if site.weight.requires_grad]
    if not found:
        raise RecipeError("train.rule='muon': no masked weight trains here; leave the rule at 'adamw'")
    return found


def _refuse_own_rule(track: MaskTrack, asked: str, usual: str) -> None:
    if type(track).optimizer is not MaskTrack.optimizer:
        raise RecipeError(f"{asked}: {type(track).__name__} brings an update rule of its own; leave it at {usual}")


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group, times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_scale", 1.0)


def clip(trained: list[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients down to the global norm `limit`; returns the norm before, which nobody has looked at yet."""
    return torch.nn.utils.clip_grad_norm_([p for p in trained if p.grad is not None], limit)
