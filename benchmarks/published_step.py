"""The inner step that the paper's published code runs, written anew from its description, as a baseline to time.

bfloat16 weights, masks and Adam moments, no compilation, eager attention; every masked linear multiplies weight and
mask in its forward, with the plain straight-through gradient. On every step Hutchinson's estimator takes a second
derivative of the last micro-batch's loss along one Rademacher vector, clamps it at 0 and averages it; the divergence is
computed in float32 in chunks of positions at temperature 2, with logits clamped to 100, beside the cross-entropy. Mask
updates, side branch and logging are left out, in its favour.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.steps import RandomTokens, Shape, config_of
from sparseforge_core.models.hub import from_config

CHUNK = 512
"""Positions of a chunk of the divergence; 2048 for small vocabularies, 128 for the largest."""

DECAY = 0.98
TEMPERATURE = 2.0


class _Product(torch.autograd.Function):
    """weight * mask, with the gradient of the weight alone; differentiable twice."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class MaskedLinear(nn.Module):
    """A linear layer under a soft mask."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.mask = nn.Parameter(torch.ones_like(linear.weight), requires_grad=False)
        self.curvature = nn.Parameter(torch.ones_like(linear.weight), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _Product.apply(self.weight, self.mask), self.bias)  # type: ignore[no-untyped-call]


class PublishedStep:
    """Model, teacher and optimizer; `__call__` takes one step."""

    def __init__(self, shape: Shape, device: torch.device, micro_batch: int) -> None:
        torch.manual_seed(0)
        config = config_of(shape)
        config._attn_implementation = "eager"
        with torch.device(device):
            model: Any = from_config(config).eval()
        self.model = model.to(torch.bfloat16) if device.type == "cuda" else model
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)
        self.masked = [_replace(layer) for layer in self.model.model.layers]
        self.masked = [linear for layer in self.masked for linear in layer]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        self.stream, self.device, self.micro_batch = RandomTokens(shape), device, micro_batch

    def __call__(self, step: int) -> None:
        """One step: all micro-batches, curvature on the last of them, clipping and update."""
        pieces = self.stream.batch(step).to(self.device).split(self.micro_batch)
        for i, piece in enumerate(pieces):
            loss = self._loss(piece) / len(pieces)
            if i == len(pieces) - 1:
                self._observe(loss)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _observe(self, loss: Tensor) -> None:
        weights = [linear.weight for linear in self.masked]
        first = torch.autograd.grad(loss, weights, create_graph=True)
        signs = [torch.randint_like(weight, 2) * 2 - 1 for weight in weights]
        along = sum((g * v).sum() for g, v in zip(first, signs, strict=True))
        second = torch.autograd.grad(along, weights, retain_graph=True)
        with torch.no_grad():
            for linear, hv, v in zip(self.masked, second, signs, strict=True):
                linear.curvature.mul_(DECAY).add_((hv * v).clamp_min_(0.0), alpha=1.0 - DECAY)

    def _loss(self, tokens: Tensor) -> Tensor:
        logits = self.model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
        with torch.no_grad():
            taught = self.teacher(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
        labels = tokens[:, 1:].flatten()
        task = F.cross_entropy(logits, labels)
        kl = torch.zeros((), device=tokens.device)
        for ours, theirs in zip(logits.split(CHUNK), taught.split(CHUNK), strict=True):
            student = F.log_softmax(ours.float().clamp(-100, 100) / TEMPERATURE, dim=-1)
            teacher = F.softmax(theirs.float().clamp(-100, 100) / TEMPERATURE, dim=-1)
            kl = kl + F.kl_div(student, teacher, reduction="sum")
        return task + TEMPERATURE**2 * kl / len(labels)


def _replace(layer: Any) -> list[MaskedLinear]:
    """Put masks on all linear layers of a block."""
    made = []
    for part in (layer.self_attn, layer.mlp):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.Linear):
                made.append(MaskedLinear(child))
                setattr(part, name, made[-1])
    return made
