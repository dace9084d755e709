"""How one cell's training is spread over ranks: alone, as replicas, or with everything of a weight in shards.

The loop is the same in all three; what differs is what it asks of its `Ranks`: which sequences are ours, when gradients
are complete, how their norm is taken, and what the losses of the whole batch are. Placement, never identity.

| | weights, masks, curvature, moments | gradients |
|---|---|---|
| alone | whole | ours |
| replicate | whole on every rank | averaged while backward runs (`averaging.py`) |
| shard | FSDP2: one part a rank; a block's weights and views are gathered while it runs | scattered by FSDP2 |

FSDP2 gathers what takes part in the forward. The mask's state and the hard mask do not: they lie in shards beside the
weight's, and come together for mask updates alone (`methods/shards.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from sparseforge_core import distributed
from sparseforge_core.data.tokens import TokenStream
from sparseforge_core.errors import RecipeError
from sparseforge_core.models.heads import Split
from sparseforge_core.models.sites import Site
from sparseforge_core.ranks import Beats
from sparseforge_core.recipe import Recipe
from sparseforge_core.train import eight_bit
from sparseforge_core.train.averaging import Average
from sparseforge_core.train.optimizer import clip

Sharding = Literal["auto", "none", "replicate", "shard"]

RESTING = ("mask", "hard")
"""Parameters of a mask that no forward reads."""

SHARDS_INTEGERS = (2, 12)
"""The version of torch from which on FSDP2 cuts parameters of integers too."""

FITS = 0.6
"""Share of a GPU's memory that a replica's state may take; the rest is for activations."""


class Ranks:
    """One process that trains alone: every method is what the loop would do without it."""

    deferred: bool | None = None
    """Whether the host may look later whether a step was finite (`watch.py`); None: where that saves waiting."""

    def __init__(self, beats: Beats | None = None) -> None:
        self.rank, self.world = distributed.rank(), distributed.world()
        self.beats = beats or Beats()
        self.vote = distributed.Vote()

    def batch(self, stream: TokenStream, step: int) -> Tensor:
        """Our sequences of the step's batch."""
        return stream.batch(step) if self.world == 1 else stream.batch(step, self.rank, self.world)

    def first(self, sequences: int) -> int:
        """Place of our first sequence in a batch of which we have so many."""
        return self.rank * sequences

    def begin(self, step: int) -> None:
        """A step begins."""
        self.beats.pass_point(2 * step)

    def expect(self, *, last: bool, correct: bool = False) -> None:
        """A backward follows, perhaps the step's last; with `correct` the teacher has gradients of its own."""

    def complete(self, step: int) -> None:
        """All backwards of the step are through: make the gradients those of the whole batch."""
        self.beats.pass_point(2 * step + 1)

    def clip(self, trained: list[nn.Parameter], limit: float) -> Tensor:
        """`optimizer.clip` by the norm of the whole gradient."""
        return clip(trained, limit)

    def means(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of the whole batch from those of every rank's share, which are equally large."""
        if self.world == 1:
            return losses
        return dict(zip(losses, distributed.mean_over_ranks(torch.stack([*losses.values()])), strict=True))

    def stop(self, wanted: bool) -> bool:
        """Whether to stop after this step, the same on all ranks; of several, they do a step after one wanted to."""
        return self.vote.cast(wanted)

    def end(self) -> None:
        """No step follows."""
        self.vote.close()


class Replicas(Ranks):
    """Every rank has everything; gradients are averaged, so that all take the same step."""

    def __init__(self, model: nn.Module, beats: Beats | None = None, *, teacher: nn.Module | None = None) -> None:
        super().__init__(beats)
        students, teachers = (
            [p for p in module.parameters() if p.requires_grad] if module is not None else []
            for module in (model, teacher)
        )
        self.average = Average(students, teachers)

    def expect(self, *, last: bool, correct: bool = False) -> None:
        if last:
            self.average.arm(guests=correct)

    def complete(self, step: int) -> None:
        super().complete(step)
        self.average.finish()


class Shards(Ranks):
    """Every rank has its part of each weight and of all that belongs to it."""

    deferred = False

    def clip(self, trained: list[nn.Parameter], limit: float) -> Tensor:
        return distributed.clip_over_ranks([p.grad for p in trained if p.grad is not None], limit)


def refuse(recipe: Recipe, sharding: Sharding, ranks: int, *, compiled: bool = False, recompute: bool = False) -> None:
    """Raise RecipeError, by name and before anything is loaded, if the recipe cannot be spread so."""
    method = recipe.method
    if ranks > 1 and not method.trains:
        raise RecipeError(
            f"{ranks} ranks: method {method.kind!r} does not train; one process decides its masks block by block: "
            "start it without torchrun"
        )
    if ranks > 1 and recipe.train.sequences % ranks:
        raise RecipeError(
            f"train.sequences={recipe.train.sequences} do not divide over {ranks} ranks; start "
            f"{_largest_divisor(recipe.train.sequences, ranks)} of them"
        )
    if ranks > 1 and sharding == "none":
        raise RecipeError(f"sharding none: {ranks} ranks would each train the cell; use replicate or shard")
    why = method.unshardable() if sharding == "shard" and ranks > 1 else None
    if why:
        raise RecipeError(f"sharding shard: method {method.kind!r} cannot be sharded: {why}; use replicate")
    if sharding == "shard" and ranks > 1 and getattr(method, "mask_storage", "") == "int16" and not shards_integers():
        raise RecipeError(
            f"sharding shard: method.mask_storage='int16' needs torch 2.12 or newer, this is {torch.__version__}, "
            "whose FSDP2 cuts no integers; use mask_storage='float32', or replicate"
        )
    if sharding == "shard" and ranks > 1 and recipe.train.rule == "muon":
        raise RecipeError(
            "sharding shard: train.rule='muon' makes the singular values of whole matrices one, and a rank has a part "
            "of each; use replicate"
        )
    if sharding == "shard" and ranks > 1 and recipe.train.moments != "float32":
        raise RecipeError(
            f"sharding shard: train.moments={recipe.train.moments!r} keeps a scale for each 256 entries of a whole "
            "tensor, and a rank has a part of each; use replicate"
        )
    why = uncompiled_shards(recipe) if compiled and sharding == "shard" and ranks > 1 else None
    if why:
        raise RecipeError(f"compile: {why}; leave --compile out, or use replicate")
    curvature = getattr(method, "curvature", None)
    if recompute and curvature is not None and method.criterion.needs == "curvature" and curvature.looks_again:  # type: ignore[attr-defined]
        raise RecipeError(
            f"recompute: curvature {type(curvature).__name__} needs the effective weights of one forward, which "
            "recomputed activations make anew; use Fisher or AdamSecondMoment, or a smaller micro-batch"
        )


def uncompiled_shards(recipe: Recipe) -> str | None:
    """Why the blocks of a model cannot be compiled where they are sharded, or None.

    They are compiled as they are, since FSDP2's hooks are theirs; whoever looks at them again finds them compiled.
    """
    if any(recipe.objective.at(share).matching for share in (0.0, 1.0)):
        return "compiled blocks do not show the hidden states that are matched"
    curvature = getattr(recipe.method, "curvature", None)
    if curvature is not None and recipe.method.criterion.needs == "curvature" and curvature.looks_again:  # type: ignore[attr-defined]
        return f"curvature {type(curvature).__name__} looks again at the effective weights, which compiled blocks hide"
    return None


def shards_integers() -> bool:
    """Whether this torch can shard masks that are kept as integers."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= SHARDS_INTEGERS


def _largest_divisor(number: int, limit: int) -> int:
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks: the members of the outermost lists of modules, in the model's order."""
    return list(_listed(model))


def _listed(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _listed(child)


def recompute_activations(model: nn.Module) -> None:
    """Keep only what enters each block, and run the block again in backward: a third more work, far less memory."""
    for block in blocks_of(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


@contextlib.contextmanager
def same_bits(wanted: bool) -> Iterator[None]:
    """Within: where `wanted`, torch uses algorithms that give the same bits each time, and warns where it has none.

    Attention is then plain matrix products: the backwards of fused kernels add up in no fixed order.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Inside(nn.Module):
    """The root of a sharded model: whatever part of it runs, the weights outside of its blocks are gathered first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, part: Any, **asked: Any) -> Any:
        return part(**asked)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a sharded model, called as it was before."""

    root: Inside
    part: Any

    def __call__(self, **asked: Any) -> Any:
        return self.root(self.part, **asked)


def shard(model: nn.Module, sites: list[Site], device: torch.device) -> Inside:
    """Cut all parameters of `model` into one part a rank, on `device`; masks in the same way as their weights.

    The model is to be called by `Part`s of what is returned from now on.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (distributed.world(),))
    resting = [(site, name) for site in sites for name in RESTING if site.mask._parameters.get(name) is not None]
    ignored = {site.mask._parameters[name] for site, name in resting}
    root = Inside(model)
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)  # type: ignore[arg-type]
    fully_shard(root, mesh=mesh, ignored_params=ignored)  # type: ignore[arg-type]
    for site, name in resting:
        state = distributed.cut(getattr(site.mask, name).detach().to(device), site.weight)
        setattr(site.mask, name, nn.Parameter(state, requires_grad=False))
    return root


def inside(root: Inside, forward: Any) -> Any:
    """What the objective calls, a model or its split form, as part of a sharded model."""
    if not isinstance(forward, Split):
        return Part(root, forward)
    # The matrix that it was split with is the whole one, of which no rank has more than its rows now. The root's
    # weights, the head's among them, are gathered for its forward and stay so until its backward.
    model: Any = root.model
    gathered = None if forward.matrix is None else lambda: model.get_output_embeddings().weight
    return dataclasses.replace(forward, body=Part(root, forward.body), matrix=None, gathered=gathered)


@torch.no_grad()
def assemble(model: nn.Module) -> None:
    """Put a sharded model together again, as an ordinary one in the memory of rank 0. Collective.

    On the other ranks nothing of it is left.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, sharded in module._parameters.items():
            if sharded is None or not distributed.is_sharded(sharded):
                continue
            if id(sharded) not in made:
                full = distributed.whole(sharded.detach())
                kept = full.cpu() if distributed.rank() == 0 else full.new_empty(0, device="cpu")
                made[id(sharded)] = nn.Parameter(kept, requires_grad=sharded.requires_grad)
            module._parameters[name] = made[id(sharded)]


def chosen_sharding(
    asked: Sharding, recipe: Recipe, model: nn.Module, sites: list[Site], device: torch.device
) -> Sharding:
    """What 'auto' comes to: replicas where their state fits, shards where not; 'none' for a process alone."""
    if distributed.world() == 1:
        return "none"
    if asked == "replicate":
        return "replicate"
    if asked == "auto":
        fits = FITS * torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else math.inf
        if device_bytes(recipe, model, sites) < fits:
            return "replicate"
        refuse(recipe, "shard", distributed.world())
    refuse_lists_of_experts(model)
    return "shard"


def refuse_lists_of_experts(model: nn.Module) -> None:
    """Raise RecipeError for blocks with modules of which a rank's tokens may reach some only.

    FSDP2 scatters the gradients that a rank has; another rank that has others would wait for ever. Experts that are
    fused into one tensor always have a gradient.
    """
    for name, module in model.named_modules():
        if module in blocks_of(model) and any(isinstance(part, nn.ModuleList) for part in module.modules()):
            raise RecipeError(
                f"sharding shard: {name} holds its experts as a list of modules, and a rank whose tokens reach other "
                "experts than the next one's would wait for it for ever; use replicate"
            )


def device_bytes(recipe: Recipe, model: nn.Module, sites: list[Site]) -> float:
    """What a replica's state takes without activations: weights, gradients, moments, a mean; masks; a teacher."""
    total = sum(parameter.numel() for parameter in model.parameters())
    masked = sum(site.weight.numel() for site in sites)
    saved = (8.0 - eight_bit.BYTES) * masked if recipe.train.moments == "8-bit" else 0.0
    each = 16.0 + 4.0 * recipe.train.averages + recipe.objective.teacher_bytes
    return each * total - saved + 13.0 * masked
