"""ALPS, one-shot: ADMM on each layer's reconstruction error, then conjugate gradients on its support (2406.07831).

The equations are in `sparsity/admm.py`; blocks are pruned in order on pruned inputs, as SparseGPT does.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods.base import Method, MethodCard, Surroundings
from sparseforge_core.methods.layerwise import LayerwiseTrack
from sparseforge_core.models.sites import Site
from sparseforge_core.sparsity.admm import Spectrum, prune, spectrum
from sparseforge_core.specs import spec


@spec("alps")
class ALPS(Method):
    """Pruning by operator splitting, with an update of the surviving weights."""

    samples: int = 128
    """Calibration sequences."""
    length: int = 2048
    """Tokens per calibration sequence; cut to what the model and the corpus allow by the loader."""
    damping: float = 0.01
    """Share of the Hessian's mean diagonal that is added to its diagonal."""
    penalty: float = 0.1
    """rho of the first iterations, for inputs scaled to unit energy."""
    iterations: int = 300
    """ADMM iterations at most; they end when the support rests and both copies of the weight agree."""
    refinements: int = 10
    """Steps of conjugate gradients on the support."""

    trains: ClassVar[bool] = False
    card: ClassVar[MethodCard] = MethodCard("Meng et al., arXiv 2406.07831", "one-shot")

    def __post_init__(self) -> None:
        for name in ("samples", "length", "iterations"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.damping <= 0 or self.penalty <= 0 or self.refinements < 0:
            raise RecipeError(
                f"damping={self.damping}, penalty={self.penalty}, refinements={self.refinements}: needs damping > 0, "
                "penalty > 0, refinements >= 0"
            )

    def calibrates(self) -> bool:
        return True

    def moves_weights(self) -> bool:
        return True

    def start(self, around: Surroundings) -> ALPSTrack:
        return ALPSTrack(self, around)


class ALPSTrack(LayerwiseTrack[Spectrum]):
    """Masks and weights as ADMM and the refinement left them."""

    def __init__(self, method: ALPS, around: Surroundings) -> None:
        self.method = method
        super().__init__(around, samples=method.samples, length=method.length, true_sequential=False)

    def prepare(self, hessian: Tensor, site: Site) -> Spectrum:
        return spectrum(hessian, self.method.damping, f"site {site.name}")

    def solve(self, weight: Tensor, prepared: Spectrum, site: Site) -> tuple[Tensor, Tensor]:
        return prune(
            weight,
            prepared,
            site.pattern,
            penalty=self.method.penalty,
            iterations=self.method.iterations,
            refinements=self.method.refinements,
        )
