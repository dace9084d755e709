"""Channels whose order is free: a model that has them in another order computes the same.

They are the hidden units of an MLP and of each expert, the values of an attention head, the latents of a low-rank
projection, and the residual stream. Whatever reads them sums over them, so that an order applied to every weight along
that dimension changes nothing. Which dimension that is, is declared for each family in `channel_layouts.py`; what a
declaration says is checked by running the model before and after (`permuting.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseforge_core.errors import UnsupportedModel
from sparseforge_core.models.channel_layouts import APART, LAYOUTS, Experts, Inner, Layout
from sparseforge_core.models.families import Family

Shapes = dict[str, torch.Size]


@dataclass(frozen=True)
class Place:
    """Where a parameter has the channels: along `dim`, from `start` on, every `step`; of experts in one tensor, one."""

    parameter: str
    dim: int
    start: int = 0
    step: int = 1
    expert: int | None = None
    """Index along the first dimension of a tensor `[experts, ., .]`, in which `dim` counts without it."""

    def of(self, weight: Tensor, size: int) -> Tensor:
        """The view of a parameter's tensor that has the channels, along `dim`."""
        mine = weight if self.expert is None else weight[self.expert]
        last = self.start + self.step * (size - 1) + 1
        return mine[(slice(None),) * self.dim + (slice(self.start, last, self.step),)]


@dataclass(frozen=True)
class Channels:
    """Channels that may stand in any order, in all their places alike."""

    name: str
    size: int
    places: tuple[Place, ...]


def free_channels(model: nn.Module, family: Family) -> list[Channels]:
    """All of a model's, the residual stream last. Raises UnsupportedModel where nobody declared them."""
    layout = LAYOUTS.get(family.name)
    if layout is None:
        raise UnsupportedModel(
            f"permutation: which channels of family {family.name} may change places is not declared; leave "
            f"`permutation` out. Declared: {', '.join(LAYOUTS)}. Add it to sparseforge_core/models/channel_layouts.py"
        )
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    found = [channels for inner in layout.inner for channels in _inner(shapes, inner)]
    found += [channels for experts in layout.experts for channels in _experts(shapes, experts)]
    found += _values(shapes, layout, model.config)
    return [*found, _stream(shapes, layout)]


@torch.no_grad()
def permute(model: nn.Module, channels: Channels, order: Tensor) -> None:
    """Put the channels of a model in an order `[size]`: place i gets what was at order[i]."""
    parameters = dict(model.named_parameters())
    for place in channels.places:
        part = place.of(parameters[place.parameter].data, channels.size)
        part.copy_(part.index_select(place.dim, order.to(part.device)))


def _inner(shapes: Shapes, inner: Inner) -> list[Channels]:
    """Channels between two linear layers: outputs of what makes them, inputs of what reads them."""
    found = []
    for prefix in _matches(shapes, rf"({inner.prefix})\.{inner.read}\.weight"):
        read = f"{prefix}.{inner.read}.weight"
        size = shapes[read][0 if inner.transposed else 1]
        made = [
            place for name, part in inner.made for place in _outputs(shapes, f"{prefix}.{name}", part * size, inner)
        ]
        found.append(Channels(f"{prefix} {inner.what}", size, (*made, Place(read, 0 if inner.transposed else 1))))
    return found


def _experts(shapes: Shapes, experts: Experts) -> list[Channels]:
    """Hidden units of experts whose matrices are tensors of all of them, `[experts, out, in]` or transposed."""
    out, read = (1, 0) if experts.transposed else (0, 1)
    found = []
    for prefix in _matches(shapes, rf"({experts.prefix})\.down_proj"):
        count, *matrix = shapes[f"{prefix}.down_proj"]
        size = matrix[read]
        for expert in range(count):
            places = []
            for half in range(2):
                start, step = (half, 2) if experts.interleaved else (half * size, 1)
                places.append(Place(f"{prefix}.gate_up_proj", out, start, step, expert))
                if (bias := f"{prefix}.gate_up_proj_bias") in shapes:
                    places.append(Place(bias, 0, start, step, expert))
            places.append(Place(f"{prefix}.down_proj", read, expert=expert))
            found.append(Channels(f"{prefix} {expert} units", size, tuple(places)))
    return found


def _values(shapes: Shapes, layout: Layout, config: object) -> list[Channels]:
    """What each head of values gives, with all the query heads that read it."""
    heads = layout.heads(config)
    found = []
    for prefix in _matches(shapes, rf"({layout.attention})\.{layout.output}\.weight"):
        for head in range(heads.count):
            start = heads.start(head)
            values = _outputs(shapes, f"{prefix}.{layout.values}", start, layout)
            dim = 0 if layout.transposed else 1
            first = head * heads.readers
            read = [
                Place(f"{prefix}.{layout.output}.weight", dim, each * heads.width)
                for each in range(first, first + heads.readers)
            ]
            found.append(Channels(f"{prefix} values {head}", heads.width, (*values, *read)))
    return found


def _stream(shapes: Shapes, layout: Layout) -> Channels:
    """The residual stream: every parameter has it along some dimension, or has it not, by name."""
    dims = dict(layout.stream)
    if layout.projected and any(re.fullmatch(layout.projected[0], name) for name in shapes):
        dims = {layout.projected[1]: APART, **dims}
    places = []
    for name, shape in shapes.items():
        dim = next((dim for pattern, dim in dims.items() if re.fullmatch(pattern, name)), None)
        if dim is None:
            raise UnsupportedModel(
                f"permutation: nothing says whether {name} {tuple(shape)} has the channels of the residual stream; "
                "add it to sparseforge_core/models/channel_layouts.py"
            )
        if dim != APART:
            places.append(Place(name, dim))
    sizes = {shapes[place.parameter][place.dim] for place in places}
    if len(sizes) > 1:
        raise UnsupportedModel(f"permutation: the residual stream would have {sorted(sizes)} channels at once")
    return Channels("residual stream", sizes.pop(), tuple(places))


def _matches(shapes: Shapes, pattern: str) -> list[str]:
    return [match.group(1) for name in shapes if (match := re.fullmatch(pattern, name))]


def _outputs(shapes: Shapes, module: str, start: int, layout: Inner | Layout) -> list[Place]:
    """Outputs of a layer: rows of its weight (columns where it is stored `[in, out]`), and its bias if it has one.

    A norm has its channels along the only dimension of its weight.
    """
    weight, bias = f"{module}.weight", f"{module}.bias"
    if weight not in shapes:
        raise UnsupportedModel(
            f"permutation: {weight} should make channels and is not in this model; mend its layout in "
            "sparseforge_core/models/channel_layouts.py, or leave `permutation` out"
        )
    places = [Place(weight, 1 if layout.transposed and len(shapes[weight]) > 1 else 0, start)]
    return [*places, Place(bias, 0, start)] if bias in shapes else places
