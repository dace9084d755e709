"""The recipe: everything that determines a number, except the seed. A recipe and a seed make a cell."""

from __future__ import annotations

from typing import Literal

from sparseforge_core.data.corpora import Corpus
from sparseforge_core.errors import RecipeError
from sparseforge_core.methods import Method
from sparseforge_core.models.sources import ModelSource
from sparseforge_core.objective import Objective, TaskOnly
from sparseforge_core.schedules import Schedule, WarmupLinear
from sparseforge_core.sparsity.patterns import PatternChoice
from sparseforge_core.sparsity.permutation import ChannelPermutation
from sparseforge_core.sparsity.slorb import SLoRB
from sparseforge_core.specs import spec


@spec("plan")
class TrainPlan:
    """How long and how fast the weights train. The token budget is derived, never typed."""

    steps: int = 0
    """Optimizer steps, the frozen finetune included; 0 for methods that do not train."""
    sequences: int = 8
    """Sequences per step, over all devices."""
    length: int = 128
    """Tokens per sequence."""
    lr: Schedule = WarmupLinear(peak=1e-4)
    """Learning rate over progress = step / steps."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam moment decay rates."""
    eps: float = 1e-8
    """Adam denominator constant."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the matrices in `decayed`; norms and biases never get any."""
    decayed: Literal["unmasked", "all"] = "unmasked"
    """Matrices that carry no mask and are no embeddings, or every matrix as in the paper's published code."""
    rule: Literal["adamw", "muon"] = "adamw"
    """Update rule of the masked weights, where the method has none of its own; everything else follows AdamW."""
    unmasked_rate: float = 1.0
    """Factor on the learning rate of what carries no mask (embeddings, norms, biases): it was not damaged."""
    moments: Literal["float32", "8-bit"] = "float32"
    """How AdamW's two moments of large matrices are kept; "8-bit" rounds them in blocks of 256 (arXiv 2110.02861)."""
    averaged_from: float = 1.0
    """Share of the steps after which the weights of each are averaged: training then ends with their mean instead of
    the last step's (Polyak averaging, SWA). 1: with the last step's."""
    clip: float = 1.0
    """Global gradient norm above which gradients are scaled down."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Autocast type of the forward; master weights and moments stay float32."""

    def __post_init__(self) -> None:
        for name in ("sequences", "length"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.steps < 0:
            raise RecipeError(f"steps={self.steps}: must be 0 or more")
        if self.unmasked_rate < 0:
            raise RecipeError(f"unmasked_rate={self.unmasked_rate}: must not be negative; 0 leaves them as they are")
        if not 0.0 <= self.averaged_from <= 1.0:
            raise RecipeError(f"averaged_from={self.averaged_from}: must lie in [0, 1]; 1 averages nothing")
        if self.clip <= 0:
            raise RecipeError(f"clip={self.clip}: must be above 0")
        if self.moments == "8-bit" and self.rule != "adamw":
            raise RecipeError(f"moments='8-bit': rule={self.rule!r} keeps no moments of masked weights; use 'adamw'")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise RecipeError(f"betas={self.betas}: each must lie in [0, 1)")

    @property
    def averages(self) -> bool:
        """Whether training ends with a mean of weights."""
        return self.averaged_after < self.steps

    @property
    def averaged_after(self) -> int:
        """The last step whose weights are no part of the mean."""
        return int(self.averaged_from * self.steps)

    @property
    def tokens(self) -> int:
        """Tokens seen by the student: steps x sequences x length."""
        return self.steps * self.sequences * self.length


@spec("recipe")
class Recipe:
    """All that determines the numbers, except the seed."""

    model: ModelSource
    """What is made sparse, and its tokenizer."""
    method: Method
    """How the mask comes to be."""
    corpus: Corpus
    """Text for retraining and calibration."""
    pattern: PatternChoice | None = None
    """Which entries compete and how many survive, everywhere or by rule; None keeps every weight."""
    objective: Objective = TaskOnly()
    """What is minimised."""
    train: TrainPlan = TrainPlan()
    """How long and how fast."""
    slorb: SLoRB | None = None
    """Optional dense side branch, eq. (1)."""
    permutation: ChannelPermutation | None = None
    """Whether channels are put in another order before anything is pruned, so that groups lose less."""

    def __post_init__(self) -> None:
        if self.method.sparsifies and self.pattern is None:
            raise RecipeError(f"pattern: method {self.method.kind!r} needs one, for instance nm(2, 4)")
        if not self.method.sparsifies and self.pattern is not None:
            raise RecipeError(f"pattern: method {self.method.kind!r} keeps every weight; leave the pattern out")
        if not self.method.trains and self.train.steps:
            raise RecipeError(f"train.steps={self.train.steps}: method {self.method.kind!r} does not train; use 0")
        if self.method.trains and not self.train.steps:
            raise RecipeError(f"train.steps=0: method {self.method.kind!r} trains; give it steps")
        if self.train.moments == "8-bit" and self.method.reads_moments:
            raise RecipeError(
                f"train.moments='8-bit': method {self.method.kind!r} takes its curvature from AdamW's second moment, "
                "which is rounded then; use moments='float32', or curvature Fisher"
            )
        if self.train.averages and not self.method.trains_weights:
            raise RecipeError(
                f"train.averaged_from={self.train.averaged_from}: method {self.method.kind!r} leaves the weights as "
                "they are, so their mean is the weights; use 1"
            )
        if self.permutation is not None and not self.method.sparsifies:
            raise RecipeError(
                f"permutation: method {self.method.kind!r} prunes nothing, whatever the order of channels"
            )
        if self.permutation is not None and _matches_another(self.objective):
            raise RecipeError(
                "permutation: hidden states are matched with those of another teacher (objective.teacher), whose "
                "channels keep their order; leave out one of the two, or have the model as it was teach"
            )
        if self.slorb is not None and not self.method.sparsifies:
            raise RecipeError(f"slorb: method {self.method.kind!r} prunes nothing that a branch could restore")
        if self.slorb is not None and not self.method.branches:
            raise RecipeError(
                f"slorb: method {self.method.kind!r} decides its mask at the end, so a branch has nothing to restore "
                "while it trains; leave the branch out"
            )


def _matches_another(objective: Objective) -> bool:
    """Whether hidden states are matched at any time with those of a model that is opened from elsewhere."""
    matched = any(objective.at(share).matching is not None for share in (0.0, 1.0))
    return matched and getattr(objective, "teacher", None) is not None


@spec("trained")
class Trained(ModelSource):
    """The model that another cell produced: its final checkpoint. The whole recipe is part of this identity."""

    recipe: Recipe
    seed: int | None = 0
    """None: that of the cell which reads it, so that both saw the same text."""

    def cell(self, seed: int) -> Cell:
        """The cell that made it, for a reader of this seed."""
        return Cell(recipe=self.recipe, seed=seed if self.seed is None else self.seed)


@spec("cell")
class Cell:
    """One unit of work: a recipe and a seed."""

    recipe: Recipe
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise RecipeError(f"seed={self.seed}: must be 0 or more")
