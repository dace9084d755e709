"""MaskLLM: a distribution over the patterns of each group is learned, the weights stay as they are (arXiv 2409.17481).

Each group has a logit for each of the C(M, N) ways to keep N of M entries. Training samples a soft pattern,
y = softmax((kappa p + Gumbel) / tau), mask = y S, and gradients of the language loss reach p through it. A one-shot
mask may give the logits a head start, and a term -lambda sum ||W * mask||^2 keeps large weights in play. At the end
each group takes its likeliest pattern.
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods.base import MaskedTrack, Method, MethodCard, Surroundings
from sparseforge_core.methods.directed import regroup
from sparseforge_core.methods.one_shot import one_shot_solution
from sparseforge_core.methods.pattern_logits import Alike, PatternLogits, Sampling, alike
from sparseforge_core.methods.sparsegpt import SparseGPT
from sparseforge_core.recorded import Again, Capture
from sparseforge_core.schedules import Linear, Schedule
from sparseforge_core.sparsity.masking import Branch
from sparseforge_core.specs import spec


@spec("maskllm")
class MaskLLM(Method):
    """Learned masks; nothing but their logits trains. The published runs use eps 1e-5 and weight decay 0.1."""

    temperature: Schedule = Linear(first=4.0, last=0.05)
    """tau over progress: how soft a sampled pattern is."""
    confidence: Schedule = Linear(first=100.0, last=500.0)
    """kappa over progress: weight of the logits against the noise."""
    keep_alive: Schedule = Linear(first=1e-5, last=0.0)
    """lambda over progress, of the sparse-weight regularisation."""
    prior: Method | None = SparseGPT()
    """A one-shot method whose mask (not its weights) starts the logits; None starts from noise alone."""
    prior_strength: float = 3.0
    """Standard deviations of the logits that a pattern gains for each entry that it shares with the prior's mask."""
    spread: float = 0.01
    """Standard deviation of the initial logits."""
    rate_scale: float = 10.0
    """Factor on the learning rate for the logits."""

    branches: ClassVar[bool] = False
    trains_weights: ClassVar[bool] = False
    card: ClassVar[MethodCard] = MethodCard("Fang et al., arXiv 2409.17481", "retraining")

    def __post_init__(self) -> None:
        if self.prior is not None and (self.prior.trains or not self.prior.sparsifies):
            raise RecipeError(f"prior: {type(self.prior).__name__} is no one-shot method")
        if min(self.temperature.at(0.0), self.temperature.at(1.0)) <= 0:
            raise RecipeError("temperature: must stay above 0")
        if self.spread <= 0 or self.rate_scale <= 0:
            raise RecipeError(f"spread={self.spread}, rate_scale={self.rate_scale}: both must be above 0")

    def begins_from(self) -> Method | None:
        return self.prior

    def start(self, around: Surroundings) -> MaskLLMTrack:
        return MaskLLMTrack(self, around)


class MaskLLMTrack(MaskedTrack):
    """Logits under the loop's optimizer; every other parameter of the model rests."""

    def __init__(self, method: MaskLLM, around: Surroundings) -> None:
        prior = one_shot_solution(method.prior, around) if method.prior is not None else {}
        super().__init__(around)
        self.method = method
        self.sampling = Sampling(self.sites[0].weight.device)
        self.laws: list[PatternLogits] = []
        self.resting = [p for p in around.model.parameters() if p.requires_grad]
        for parameter in self.resting:
            parameter.requires_grad_(False)
        for index, site in enumerate(self.sites):
            law = PatternLogits(site, around.seed * 100_003 + index, method.spread, self.sampling)
            if site.name in prior:
                law.favour(prior[site.name].hard, method.prior_strength)
            site.mask.law = law
            self.laws.append(law)
        places = alike(self.laws)
        self.batches = [Alike([self.sites[i] for i in some], [self.laws[i] for i in some]) for some in places]
        order = torch.tensor(list(itertools.chain(*places))).argsort()
        self._order = order.to(self.sampling.temperature.device)
        """Where each site is among those of all batches, in turn."""
        self._strength = torch.zeros_like(self.sampling.temperature)
        self._flipped = torch.zeros(len(self.sites), dtype=torch.int64, device=self._order.device)
        self._pressing, self._settling = Again(self._press, None), Again(self._settle, None)
        self._prepare(0)

    def record(self, capture: Capture) -> None:
        self._pressing, self._settling = Again(self._press, capture), Again(self._settle, capture)

    def optimizer(
        self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        decay = max(group["weight_decay"] for group in groups)
        logits = [law.logits for law in self.laws]
        groups = regroup(groups, logits, weight_decay=decay, rate_scale=self.method.rate_scale)
        return super().optimizer(groups, betas=betas, eps=eps)

    def before_update(self, step: int) -> None:
        strength = self.method.keep_alive.at(step / self.steps)
        if strength <= 0:
            return
        self._strength.fill_(strength)
        moving: list[Tensor] = [site.weight for site in self.sites]
        for law in self.laws:
            if law.logits.grad is None:  # nothing of the batch reached this site
                law.logits.grad = torch.zeros_like(law.logits)
            moving += [law.logits, law.noise, law.logits.grad]
        self._pressing(moving)

    def _press(self) -> None:
        for batch in self.batches:
            batch.keep_alive(self._strength)

    def after_update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        self._prepare(step)

    def _prepare(self, step: int) -> None:
        """Masks as they are after `step`, and the constants of the step that follows."""
        self._begin_after(step)
        masks = [mask for site in self.sites for mask in (site.mask.hard, site.mask.mask)]
        self._settling([*masks, *(law.logits for law in self.laws)])
        self.count_flips(self._flipped)

    def _settle(self) -> None:
        self._flipped.copy_(torch.cat([batch.settle() for batch in self.batches])[self._order])

    def _begin_after(self, step: int) -> None:
        progress = step / self.steps
        at = {"temperature": self.method.temperature.at(progress), "confidence": self.method.confidence.at(progress)}
        self.sampling.begin(self.laws, step + 1, **at)
        self.step = step

    def finish(self) -> dict[str, Branch]:
        self._pressing.forget()
        self._settling.forget()
        for site in self.sites:
            site.mask.law = None
        for parameter in self.resting:
            parameter.requires_grad_(True)
        return super().finish()

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "step": torch.tensor(self.step)}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        self._begin_after(int(state["step"]))
