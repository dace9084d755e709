"""MaskLLM: a distribution over the patterns of each group is learned, the weights stay as they are (arXiv 2409.17481).

Each group has a logit for each of the C(M, N) ways to keep N of M entries. Training samples a soft pattern,
y = softmax((kappa p + Gumbel) / tau), mask = y S, and gradients of the language loss reach p through it. A one-shot
mask may give the logits a head start, and a term -lambda sum ||W * mask||^2 keeps large weights in play. At the end
each group takes its likeliest pattern.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods.base import MaskedTrack, Method, MethodCard, Surroundings
from sparseforge_core.methods.directed import regroup
from sparseforge_core.methods.one_shot import one_shot_solution
from sparseforge_core.methods.sparsegpt import SparseGPT
from sparseforge_core.models.sites import Site
from sparseforge_core.schedules import Linear, Schedule
from sparseforge_core.sparsity.masking import Branch
from sparseforge_core.specs import spec

MOST_PATTERNS = 128
"""A group with more ways to keep its entries needs more logits than a model has weights many times over."""


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


class PatternLogits(nn.Module):
    """The effective weight W * mask, the mask sampled from the logits of one site, `[..., tiles, patterns]`.

    The noise is a function of (seed, step), drawn when a step begins and kept: a forward that is repeated (recomputed
    activations, another micro-batch, a run that goes on) sees the same mask. What changes from step to step is in
    tensors, so that a compiled forward is compiled once, for all sites of a shape.
    """

    of_tensors: ClassVar[bool] = True
    """Whether all that it depends on is in tensors that change in place: a recorded step then follows it."""

    def __init__(self, site: Site, seed: int, spread: float) -> None:
        super().__init__()
        self.seed, self.pattern, self.transposed = seed, site.pattern, site.transposed
        matrix = site.matrix(site.weight.detach())
        self.shape = matrix.shape
        grouped = site.pattern.groups(matrix)
        size = grouped.shape[-1]
        keep = site.pattern.keep_of(size)
        if math.comb(size, keep) > MOST_PATTERNS:
            raise RecipeError(
                f"pattern {site.pattern.name}: a group of {size} has {math.comb(size, keep):,} ways to keep {keep}; "
                f"MaskLLM learns a logit for each and takes at most {MOST_PATTERNS}: use 2:4 or 4:8"
            )
        self.patterns = patterns_of(size, keep).to(grouped.device)
        start = torch.empty((*grouped.shape[:-1], len(self.patterns)), device=grouped.device)
        self.logits = nn.Parameter(start.normal_(std=spread, generator=self._generator(0, start.device)))
        self.temperature, self.confidence = start.new_ones(()), start.new_ones(())
        self.noise = torch.zeros_like(start)
        """Gumbel noise of the step."""
        self.begin(0, temperature=1.0, confidence=1.0)

    @torch.no_grad()
    def begin(self, step: int, *, temperature: float, confidence: float) -> None:
        """Draw the noise of a step, and set its constants tau and kappa."""
        self.temperature.fill_(temperature)
        self.confidence.fill_(confidence)
        drawn = self.noise.exponential_(generator=self._generator(step, self.noise.device))
        drawn.clamp_min_(torch.finfo(drawn.dtype).tiny).log_().neg_()

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.sample()

    def sample(self) -> Tensor:
        """The soft mask of this step, in the weight's layout."""
        return self._mask(torch.softmax((self.confidence * self.logits + self.noise) / self.temperature, dim=-1))

    def expected(self) -> Tensor:
        """The mask without noise."""
        return self._mask(torch.softmax(self.confidence * self.logits / self.temperature, dim=-1))

    def likeliest(self) -> Tensor:
        """The pattern of the largest logit of each group; bool, in the weight's layout."""
        return self._mask(nn.functional.one_hot(self.logits.argmax(-1), len(self.patterns)).to(self.logits.dtype)) > 0.5

    @torch.no_grad()
    def favour(self, hard: Tensor, strength: float) -> None:
        """p += (|S_i & M0| - its mean over the patterns) std(p) strength, M0 = `hard` in the weight's layout."""
        grouped = self.pattern.groups(self._matrix(hard)).to(self.logits.dtype)
        overlap = grouped @ self.patterns.T
        usual = float(self.patterns[0].sum()) ** 2 / self.patterns.shape[1]
        self.logits.add_((overlap - usual) * self.logits.std() * strength)

    def _mask(self, chosen: Tensor) -> Tensor:
        """y S in the weight's layout."""
        with torch.autocast(chosen.device.type, enabled=False):
            grouped = chosen @ self.patterns
        return self._matrix(self.pattern.ungroup(grouped, self.shape))

    def _matrix(self, x: Tensor) -> Tensor:
        """A tensor of the weight's layout as `[..., out, in]`, and back."""
        return x.transpose(-1, -2) if self.transposed else x

    def _generator(self, step: int, device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed((self.seed * 1_000_003 + step) % 2**63)


def patterns_of(size: int, keep: int) -> Tensor:
    """S: every way to keep `keep` of `size` entries, `[C(size, keep), size]`, of zeros and ones."""
    ways = list(itertools.combinations(range(size), keep))
    return torch.stack([torch.zeros(size).index_fill_(0, torch.tensor(way), 1.0) for way in ways])


class MaskLLMTrack(MaskedTrack):
    """Logits under the loop's optimizer; every other parameter of the model rests."""

    def __init__(self, method: MaskLLM, around: Surroundings) -> None:
        prior = one_shot_solution(method.prior, around) if method.prior is not None else {}
        super().__init__(around)
        self.method = method
        self.laws: list[PatternLogits] = []
        self.resting = [p for p in around.model.parameters() if p.requires_grad]
        for parameter in self.resting:
            parameter.requires_grad_(False)
        for index, site in enumerate(self.sites):
            law = PatternLogits(site, around.seed * 100_003 + index, method.spread)
            if site.name in prior:
                law.favour(prior[site.name].hard, method.prior_strength)
            site.mask.law = law
            self.laws.append(law)
        self._prepare(0)

    def optimizer(
        self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        decay = max(group["weight_decay"] for group in groups)
        logits = [law.logits for law in self.laws]
        groups = regroup(groups, logits, weight_decay=decay, rate_scale=self.method.rate_scale)
        return super().optimizer(groups, betas=betas, eps=eps)

    def before_update(self, step: int) -> None:
        weight = self.method.keep_alive.at(step / self.steps)
        if weight > 0:
            for site, law in zip(self.sites, self.laws, strict=True):
                kept = (site.weight.detach() * law.sample()).square().sum()
                (-weight * kept).backward()  # type: ignore[no-untyped-call]

    def after_update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        self._prepare(step)

    @torch.no_grad()
    def _prepare(self, step: int) -> None:
        """Masks as they are after `step`, and the constants of the step that follows."""
        counts = []
        for site, law in zip(self.sites, self.laws, strict=True):
            self._begin_after(law, step)
            before = site.mask.hard.clone()
            site.mask.hard.copy_(law.likeliest())
            site.mask.mask.copy_(law.expected())
            counts.append((before != site.mask.hard).sum())
        self.step = step
        self.count_flips(torch.stack(counts))

    def _begin_after(self, law: PatternLogits, step: int) -> None:
        progress = step / self.steps
        at = {"temperature": self.method.temperature.at(progress), "confidence": self.method.confidence.at(progress)}
        law.begin(step + 1, **at)

    def finish(self) -> dict[str, Branch]:
        for site in self.sites:
            site.mask.law = None
        for parameter in self.resting:
            parameter.requires_grad_(True)
        return super().finish()

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "step": torch.tensor(self.step)}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        self.step = int(state["step"])
        for law in self.laws:
            self._begin_after(law, self.step)
