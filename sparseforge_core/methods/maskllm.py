"""MaskLLM: a distribution over the patterns of each group is learned, the weights stay as they are (arXiv 2409.17481).

Each group has a logit for each of the C(M, N) ways to keep N of M entries. Training samples a soft pattern,
y = softmax((kappa p + Gumbel) / tau), mask = y S, and gradients of the language loss reach p through it. A one-shot
mask may give the logits a head start, and a term -lambda sum ||W * mask||^2 keeps large weights in play. At the end
each group takes its likeliest pattern.

What a step does besides forward and backward (noise, the term's gradient, masks) is done for many sites by each kernel:
a model has hundreds, and a device is done with one of them sooner than a host has started its kernels. Where steps are
recorded, these kernels are recorded too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods.base import MaskedTrack, Method, MethodCard, Surroundings
from sparseforge_core.methods.directed import regroup
from sparseforge_core.methods.one_shot import one_shot_solution
from sparseforge_core.methods.sparsegpt import SparseGPT
from sparseforge_core.models.sites import Site
from sparseforge_core.recorded import Again, Capture
from sparseforge_core.schedules import Linear, Schedule
from sparseforge_core.sparsity.masking import Branch
from sparseforge_core.sparsity.patterns import Pattern
from sparseforge_core.specs import spec

MOST_PATTERNS = 128
"""A group with more ways to keep its entries needs more logits than a model has weights many times over."""

ADDED = 8
"""Patterns up to which a compiled forward adds up the mask: inductor writes so few terms out and fuses them."""

LOGITS_AT_ONCE = 2**22
"""Logits of the sites that share a kernel. About six tensors of so many entries, 16 MB each, are all that a step needs
beside what it keeps, and they lie in a large cache."""


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


class Sampling:
    """What the laws of a model sample with: tau, kappa and the noise of a step, set for all of them at once.

    What changes from step to step is in tensors, so that a compiled forward is compiled once, for all sites of a shape.
    """

    def __init__(self, device: torch.device) -> None:
        self.temperature, self.confidence = torch.ones((), device=device), torch.ones((), device=device)
        self._generator = torch.Generator(device)

    def stream(self, seed: int, step: int) -> torch.Generator:
        """Random numbers of `seed` and `step`, from their beginning; the next call ends them."""
        return self._generator.manual_seed((seed * 1_000_003 + step) % 2**63)

    @torch.no_grad()
    def begin(self, laws: Sequence[PatternLogits], step: int, *, temperature: float, confidence: float) -> None:
        """Draw the noise of a step for each law, and set tau and kappa."""
        self.temperature.fill_(temperature)
        self.confidence.fill_(confidence)
        drawn = [law.noise.exponential_(generator=self.stream(law.seed, step)) for law in laws]
        torch._foreach_clamp_min_(drawn, torch.finfo(drawn[0].dtype).tiny)
        torch._foreach_log_(drawn)
        torch._foreach_neg_(drawn)


class PatternLogits(nn.Module):
    """The effective weight W * mask, the mask sampled from the logits of one site, `[..., tiles, patterns]`.

    The noise is a function of (seed, step), drawn when a step begins and kept: a forward that is repeated (recomputed
    activations, another micro-batch, a run that goes on) sees the same mask.
    """

    of_tensors: ClassVar[bool] = True
    """Whether all that it depends on is in tensors that change in place: a recorded step then follows it."""

    def __init__(self, site: Site, seed: int, spread: float, sampling: Sampling) -> None:
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
        self.logits = nn.Parameter(start.normal_(std=spread, generator=sampling.stream(seed, 0)))
        self.temperature, self.confidence = sampling.temperature, sampling.confidence
        self.noise = torch.zeros_like(start)
        """Gumbel noise of the step, as `Sampling.begin` draws it."""

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
        return self.ungrouped(likeliest(self.logits, self.patterns))

    @torch.no_grad()
    def favour(self, hard: Tensor, strength: float) -> None:
        """p += (|S_i & M0| - its mean over the patterns) std(p) strength, M0 = `hard` in the weight's layout."""
        grouped = self.grouped(hard).to(self.logits.dtype)
        overlap = grouped @ self.patterns.T
        usual = float(self.patterns[0].sum()) ** 2 / self.patterns.shape[1]
        self.logits.add_((overlap - usual) * self.logits.std() * strength)

    def grouped(self, x: Tensor) -> Tensor:
        """A tensor of the weight's layout as `[..., tiles, size]`."""
        return self.pattern.groups(self._matrix(x))

    def ungrouped(self, grouped: Tensor) -> Tensor:
        """Inverse of `grouped`."""
        return self._matrix(self.pattern.ungroup(grouped, self.shape))

    def _mask(self, chosen: Tensor) -> Tensor:
        """y S in the weight's layout."""
        with torch.autocast(chosen.device.type, enabled=False):
            if torch.compiler.is_compiling() and len(self.patterns) <= ADDED:
                # A matrix product is a kernel of its own, before and after which all probabilities go to memory.
                grouped = (chosen.unsqueeze(-1) * self.patterns).sum(-2)
            else:
                grouped = chosen @ self.patterns
        return self.ungrouped(grouped)

    def _matrix(self, x: Tensor) -> Tensor:
        """A tensor of the weight's layout as `[..., out, in]`, and back."""
        return x.transpose(-1, -2) if self.transposed else x


def patterns_of(size: int, keep: int) -> Tensor:
    """S: every way to keep `keep` of `size` entries, `[C(size, keep), size]`, of zeros and ones."""
    ways = list(itertools.combinations(range(size), keep))
    return torch.stack([torch.zeros(size).index_fill_(0, torch.tensor(way), 1.0) for way in ways])


def likeliest(logits: Tensor, patterns: Tensor) -> Tensor:
    """The pattern of the largest logit (the first of equals) of each group: `[..., patterns]` -> bool `[..., size]`."""
    return (patterns > 0.5)[logits.argmax(-1)]


def keep_alive_gradient(
    logits: Tensor,
    noise: Tensor,
    weights: Tensor,
    patterns: Tensor,
    *,
    temperature: Tensor,
    confidence: Tensor,
    strength: Tensor,
) -> Tensor:
    """The gradient of -lambda sum (w m)^2 in the logits p, m = y S, y = softmax((kappa p + noise) / tau).

    In the mask it is -2 lambda w^2 m, so in p it is -2 lambda (kappa / tau) y ((w^2 m) S^T - sum_j w_j^2 m_j^2): what
    softmax subtracts, a sum over patterns, is one over entries.

    Args:
        logits: p, `[..., groups, patterns]`.
        noise: of the same shape.
        weights: w, `[..., groups, size]`.
        patterns: S, `[patterns, size]`.
        temperature: tau, 0-d.
        confidence: kappa, 0-d.
        strength: lambda, 0-d.
    """
    chosen = torch.softmax(torch.addcmul(noise, logits, confidence).div_(temperature), dim=-1)
    kept = (chosen @ patterns).mul_(weights)
    usual = kept.square().sum(-1, keepdim=True)
    slopes = kept.mul_(weights) @ patterns.T
    return slopes.sub_(usual).mul_(chosen).mul_(confidence / temperature * (-2.0 * strength))


class Alike:
    """Sites with equally many groups and the same patterns: what is done to them is done to a stack of theirs.

    Tensors of the stack are `[sites, groups, patterns]` or `[sites, groups, size]`.
    """

    def __init__(self, sites: list[Site], laws: list[PatternLogits]) -> None:
        self.sites, self.laws = sites, laws
        self.patterns = laws[0].patterns
        self.temperature, self.confidence = laws[0].temperature, laws[0].confidence

    @torch.no_grad()
    def keep_alive(self, strength: Tensor) -> None:
        """Add the gradient of -strength sum ||W * mask||^2, the mask of this step, to those that the logits have."""
        gradients = keep_alive_gradient(
            self._stacked(law.logits for law in self.laws),
            self._stacked(law.noise for law in self.laws),
            self._stacked(self._grouped(site.weight for site in self.sites)).to(self.patterns.dtype),
            self.patterns,
            temperature=self.temperature,
            confidence=self.confidence,
            strength=strength,
        )
        found = [law.logits.grad for law in self.laws if law.logits.grad is not None]
        torch._foreach_add_(found, [g.view_as(of) for g, of in zip(gradients.unbind(), found, strict=True)])

    @torch.no_grad()
    def settle(self) -> Tensor:
        """Set each site's hard mask to the likeliest patterns and its mask to the expected one.

        Returns how many entries of each hard mask flipped, int64 `[sites]`.
        """
        logits = self._stacked(law.logits for law in self.laws)
        hard = likeliest(logits, self.patterns)
        flips = (self._stacked(self._grouped(site.mask.hard for site in self.sites)) != hard).sum((-2, -1))
        expected = torch.softmax(logits.mul_(self.confidence).div_(self.temperature), dim=-1) @ self.patterns
        torch._foreach_copy_([site.mask.hard for site in self.sites], self._ungrouped(hard))
        torch._foreach_copy_([site.mask.mask for site in self.sites], self._ungrouped(expected))
        return flips

    def _stacked(self, parts: Iterable[Tensor]) -> Tensor:
        """A stack, its own memory, of what each site has for its groups."""
        return torch.stack([part.reshape(-1, part.shape[-1]) for part in parts])

    def _grouped(self, parts: Iterable[Tensor]) -> Iterable[Tensor]:
        return (law.grouped(part) for law, part in zip(self.laws, parts, strict=True))

    def _ungrouped(self, stack: Tensor) -> list[Tensor]:
        return [law.ungrouped(part) for law, part in zip(self.laws, stack.unbind(), strict=True)]


def alike(laws: Sequence[PatternLogits], at_once: int = LOGITS_AT_ONCE) -> list[list[int]]:
    """Places of laws that can be stacked, at most `at_once` logits of them unless one alone has more."""
    kinds: dict[tuple[Pattern, torch.Size, int], list[int]] = {}
    for place, law in enumerate(laws):
        kinds.setdefault((law.pattern, law.patterns.shape, law.logits.numel()), []).append(place)
    found = []
    for places in kinds.values():
        count = max(1, at_once // laws[places[0]].logits.numel())
        found += [places[first : first + count] for first in range(0, len(places), count)]
    return found


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
