"""The teacher's own steps (`objective/correction.py`): its optimizer, and its state.

On several ranks the teacher is spread as the student is: replicas average its gradients with the student's, FSDP2
scatters them where it is sharded. Either way all ranks take the step of the whole batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparseforge_core.objective.correction import TeacherCorrection
from sparseforge_core.recipe import TrainPlan

Clip = Callable[[list[nn.Parameter], float], Tensor]
"""`Ranks.clip`: by the norm of the whole gradient, wherever its parts are."""

PREFIX = "teacher/"
WEIGHTS, MOMENTS = f"{PREFIX}weights/", f"{PREFIX}moments/"


def fixed(model: Any, plan: TrainPlan) -> Any:
    """A model that takes no steps, in the precision that it runs in: autocast would cast it again in every forward."""
    if plan.compute_dtype == "bfloat16":
        model = model.to(torch.bfloat16)
    return model.requires_grad_(False)


def anchor_of(teacher: Any | None, spec: TeacherCorrection | None, plan: TrainPlan) -> Any | None:
    """A copy of a teacher that takes steps, as it came, where its correction holds it to that."""
    return fixed(copy.deepcopy(teacher), plan) if spec is not None and spec.anchor else None


class Correction:
    """AdamW on all weights of a teacher in float32, at a share of the plan's learning rate."""

    prefix = PREFIX

    def __init__(self, teacher: nn.Module, spec: TeacherCorrection, plan: TrainPlan) -> None:
        self.plan, self.scale = plan, spec.rate_scale
        self.weights = dict(teacher.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), lr=0.0, betas=plan.betas, eps=plan.eps, weight_decay=0.0, fused=True
        )
        for weight in self.weights.values():  # as AdamW's first step would: ranks that resume must know what there is
            self.optimizer.state[weight] = {
                "step": torch.zeros((), dtype=torch.float32, device=weight.device),
                "exp_avg": torch.zeros_like(weight, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(weight, memory_format=torch.preserve_format),
            }

    def step(self, progress: float, clip: Clip) -> None:
        """One step down the gradients that the batch left, at the rate of a share of the plan."""
        clip(list(self.weights.values()), self.plan.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.scale * self.plan.lr.at(progress)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Weights and moments, by name."""
        found = {f"{WEIGHTS}{name}": weight.detach() for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            for key, value in self.optimizer.state.get(weight, {}).items():
                found[f"{MOMENTS}{key}/{name}"] = value
        return found

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up `state()`."""
        self.optimizer.state.clear()
        for name, weight in self.weights.items():
            weight.copy_(state[f"{WEIGHTS}{name}"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = state.get(f"{MOMENTS}{key}/{name}")
                if value is not None:
                    # Adam's fused kernels want the count where the weight is, whatever it was saved on.
                    self.optimizer.state[weight][key] = value.to(weight.device)
