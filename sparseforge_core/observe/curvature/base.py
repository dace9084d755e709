"""What an estimator of diag(H) is: a spec that starts a running estimate, which sees each step's batch.

H is the Hessian, or a positive stand-in for it, of the mean loss in the *effective* weight, the one that the forward
multiplies by: in W itself an entry whose mask is near 0 would have curvature near 0 and could never return (A9).
"""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparseforge_core.distributed import finite_everywhere, mean_over_ranks, on_any_rank
from sparseforge_core.errors import CurvatureUnavailable, NotFinite, RecipeError
from sparseforge_core.models.sites import Site


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One training step's batch after its backward, with what is needed to look at it again."""

    step: int
    model: Any
    """The model itself, never its compiled form."""
    tokens: Tensor
    """Token ids `[sequences, length]`: this rank's share of the step's batch."""
    loss: Callable[[Tensor, int], Tensor]
    """The recipe's mean loss of some of these sequences, `[n, length]`, given the place of the first of them."""
    predictions: Callable[[Tensor], Tensor]
    """Logits of every position that has a label, `[n, length]` -> `[n, length - 1, vocabulary]`."""
    optimizer: torch.optim.Optimizer
    micro_batch: int | None = None
    """Sequences that fit into memory at once; None: all."""
    first: int = 0
    """Place of this rank's first sequence in the batch of all ranks: what is drawn at random is a sequence's own."""
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    """The recipe's compute precision. Second differences leave it alone: bfloat16 would drown them."""

    def pieces(self, sequences: int | None = None) -> Iterator[tuple[Tensor, int, float]]:
        """Portions of at most `sequences` (None: as fit into memory), each with its place and its share."""
        place = self.first
        for piece in self.tokens.split(sequences or self.micro_batch or self.tokens.shape[0]):
            yield piece, place, piece.shape[0] / self.tokens.shape[0]
            place += piece.shape[0]


class Curvature(ABC):
    """Spec of an estimator of diag(H)."""

    shards: ClassVar[bool] = True
    """Whether it can be had of weights of which each rank holds a part."""
    looks_again: ClassVar[bool] = True
    """Whether it runs the model again, beside what the step does anyway."""

    @abstractmethod
    def start(self, sites: list[Site], seed: int = 0) -> Estimate:
        """A running estimate for these sites; what it draws at random is a function of `seed` and the step."""


class Estimate(ABC):
    """A running estimate of diag(H) for some sites."""

    @abstractmethod
    def observe(self, batch: Batch) -> None:
        """Take in a step, between backward and update. Raises CurvatureUnavailable naming the sites it is blind to."""

    @abstractmethod
    def of(self, site: Site) -> Tensor:
        """diag(H) of a site, finite, in the stored layout of its weight, equal on all ranks (collective).

        Raises CurvatureUnavailable, naming the site, before the first observation or if an entry is not finite.
        """

    def kept(self, site: Site) -> tuple[Tensor, float]:
        """`of`, as a tensor that may be the running one itself and a factor; whether it is finite is not looked at."""
        return self.of(site), 1.0

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must hold."""

    @abstractmethod
    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up the state of `state()`."""


class CurvatureAverage(Estimate):
    """Exponential moving average of what `look` finds at the due steps, bias-corrected by 1 - decay^n.

    Of plain weights each rank keeps its own average and the mean over ranks is formed in `of`, that is, at mask
    updates; of sharded weights each rank keeps its shard.
    """

    def __init__(self, sites: list[Site], decay: float, every: int = 1) -> None:
        self.sites = sites
        self.decay = decay
        self.every = every
        self.count = 0
        self.average = self.zeros()

    def zeros(self) -> dict[str, Tensor]:
        """What is averaged, by key; here one tensor a site, in the weight's layout and shards."""
        return {site.name: torch.zeros_like(site.weight, requires_grad=False) for site in self.sites}

    def observe(self, batch: Batch) -> None:
        if not is_due(batch.step, self.every):
            return
        found = self.look(batch)
        refuse_non_finite(found)
        with torch.no_grad():
            for key, average in self.average.items():
                average.mul_(self.decay).add_(found[key].to(average.dtype), alpha=1.0 - self.decay)
        self.count += 1

    @abstractmethod
    def look(self, batch: Batch) -> dict[str, Tensor]:
        """This step's estimates, by the keys of `zeros`."""

    def of(self, site: Site) -> Tensor:
        return checked(self.mean(site, site.name), site)

    def mean(self, site: Site, key: str) -> Tensor:
        """The bias-corrected average under `key`, over all ranks."""
        self._refuse_nothing_seen(site)
        return mean_over_ranks(self.average[key]).to(site.weight.dtype) / (1.0 - self.decay**self.count)

    def _refuse_nothing_seen(self, site: Site) -> None:
        if self.count == 0:
            raise CurvatureUnavailable(f"site {site.name}: no gradient was observed before its scores were needed")

    def state(self) -> dict[str, Tensor]:
        return {**self.average, "count": torch.tensor(self.count)}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        self.count = int(state["count"])
        for name, average in self.average.items():
            average.copy_(state[name])


def is_due(step: int, every: int) -> bool:
    """Whether an estimator that looks at every `every`-th step looks at this one; it always sees the first."""
    return step == 1 or step % every == 0


def check_pace(decay: float, every: int) -> None:
    """Raise RecipeError unless the fields that all averages share are in range."""
    if not 0.0 <= decay < 1.0:
        raise RecipeError(f"decay={decay}: must lie in [0, 1)")
    if every < 1:
        raise RecipeError(f"every={every}: must be at least 1")


def generator(device: torch.device, *parts: int | str) -> torch.Generator:
    """A generator that is a pure function of `parts`, so that a resumed run draws the same."""
    text = "/".join(str(part) for part in parts)
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
    return torch.Generator(device=device).manual_seed(number)


def named(names: Iterable[str]) -> str:
    """A few names and how many more there are, for an error."""
    listed = list(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more


def no_gradient(blind: list[str], sites: list[Site]) -> CurvatureUnavailable:
    """The error for sites that backward did not reach."""
    return CurvatureUnavailable(
        f"no gradient for {len(blind)} of {len(sites)} sites ({named(blind)}); their curvature would stay zero and "
        "their scores be magnitudes. Check that these weights train."
    )


def refuse_blind(sites: list[Site], reached: set[str]) -> None:
    """Raise CurvatureUnavailable, on all ranks together, naming the sites that no sequence of the batch reached.

    One sequence may well pass an expert by: its gradient there is zero, and that is an answer.
    """
    answered = on_any_rank([site.name in reached for site in sites], sites[0].weight.device)
    blind = [site.name for site, there in zip(sites, answered, strict=True) if not there]
    if blind:
        raise no_gradient(blind, sites)


def refuse_non_finite(found: dict[str, Tensor]) -> None:
    """Raise NotFinite, on all ranks together, naming the keys whose tensors are not finite."""
    good = finite_everywhere(list(found.values()))
    bad = [key for key, finite in zip(found, good, strict=True) if not finite]
    if bad:
        raise NotFinite(
            f"curvature of {len(bad)} of {len(found)} sites is not finite ({named(bad)}); none of it was kept. "
            "The loss or the weights have diverged: lower the learning rate"
        )


def checked(curvature: Tensor, site: Site) -> Tensor:
    """`curvature`, if all of it is finite. Raises NotFinite: a mask must never see anything else."""
    refuse_non_finite({site.name: curvature})
    return curvature
