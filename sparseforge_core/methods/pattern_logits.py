"""MaskLLM's laws: from the logits of each site to its masks, and what a step does with those of all sites.

What a step does besides forward and backward (noise, the gradient of the regularisation, masks) is done for many sites
by each kernel: a model has hundreds, and a device is done with one of them sooner than a host has started its kernels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparseforge_core.errors import RecipeError
from sparseforge_core.models.sites import Site
from sparseforge_core.sparsity.patterns import Pattern

MOST_PATTERNS = 128
"""A group with more ways to keep its entries needs more logits than a model has weights many times over."""

ADDED = 8
"""Patterns up to which a compiled forward adds up the mask: inductor writes so few terms out and fuses them."""

LOGITS_AT_ONCE = 2**22
"""Logits of the sites that share a kernel. About six tensors of so many entries, 16 MB each, are all that a step needs
beside what it keeps, and they lie in a large cache."""


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
