"""Channels whose order is free: a model that has them in another order computes the same.

The hidden units of an MLP, the values of an attention head and the residual stream are sums over channels, with one
number of every weight that touches a channel. Where that is, is declared for LLaMA's block and GPT-2's; what a
declaration says is checked by running the model before and after (`permuting.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseforge_core.errors import UnsupportedModel
from sparseforge_core.models.families import Family
from sparseforge_core.models.families.gpt2 import GPT2
from sparseforge_core.models.families.llama import LLAMA, LLAMA_BLOCK


@dataclass(frozen=True)
class Place:
    """Where a parameter has the channels: along `dim`, from `start` on."""

    parameter: str
    dim: int
    start: int = 0


@dataclass(frozen=True)
class Channels:
    """Channels that may stand in any order, in all their places alike."""

    name: str
    size: int
    places: tuple[Place, ...]


def free_channels(model: nn.Module, family: Family) -> list[Channels]:
    """All of a model's, those of blocks first and in order. Raises UnsupportedModel where nobody declared them."""
    declared = _DECLARED.get(family.name)
    if declared is None:
        raise UnsupportedModel(
            f"permutation: which channels of family {family.name} may change places is not declared; leave "
            f"`permutation` out. Declared: {', '.join(_DECLARED)}. Add it to sparseforge_core/models/channels.py"
        )
    return declared(model)


@torch.no_grad()
def permute(model: nn.Module, channels: Channels, order: Tensor) -> None:
    """Put the channels of a model in an order `[size]`: place i gets what was at order[i]."""
    parameters = dict(model.named_parameters())
    for place in channels.places:
        part = parameters[place.parameter].data.narrow(place.dim, place.start, channels.size)
        part.copy_(part.index_select(place.dim, order.to(part.device)))


def _llama(model: nn.Module) -> list[Channels]:
    """Gated MLP; q, k, v and o apart; as many query heads read a head of values as `config` says."""
    config: Any = model.config
    names = dict(model.named_parameters())
    heads, readers, width = _heads(config)
    found = []
    for block in _blocks(names, r"(model\.layers\.\d+)\.mlp\.down_proj\.weight"):
        mlp, attention = f"{block}.mlp", f"{block}.self_attn"
        made = [place for part in ("gate_proj", "up_proj") for place in _outputs(names, f"{mlp}.{part}")]
        units = names[f"{mlp}.down_proj.weight"].shape[1]
        found.append(Channels(f"{mlp} units", units, (*made, Place(f"{mlp}.down_proj.weight", 1))))
        for head in range(heads):
            read = [Place(f"{attention}.o_proj.weight", 1, (head * readers + each) * width) for each in range(readers)]
            values = _outputs(names, f"{attention}.v_proj", head * width)
            found.append(Channels(f"{attention} values {head}", width, (*values, *read)))
    stream = {
        r".*embed_tokens\.weight|lm_head\.weight|.*\.(q|k|v|gate|up)_proj\.weight": 1,
        r".*\.(o|down)_proj\.(weight|bias)|model\.norm\.(weight|bias)": 0,
        r"model\.layers\.\d+\.(input|post_attention|(pre|post)_feedforward)_layernorm\.(weight|bias)": 0,
    }
    apart = r".*\.(q|k|v|gate|up)_proj\.bias|.*\.self_attn\.(q|k|query|key)_(layer)?norm\..*|lm_head\.bias"
    return [*found, _stream(names, int(config.hidden_size), stream, apart)]


def _gpt2(model: nn.Module) -> list[Channels]:
    """Weights stored `[in, out]`; q, k and v one after the other in one matrix."""
    config: Any = model.config
    names = dict(model.named_parameters())
    hidden, heads = int(config.n_embd), int(config.n_head)
    width = hidden // heads
    found = []
    for block in _blocks(names, r"(transformer\.h\.\d+)\.mlp\.c_proj\.weight"):
        fc, down = f"{block}.mlp.c_fc", f"{block}.mlp.c_proj.weight"
        units = (Place(f"{fc}.weight", 1), Place(f"{fc}.bias", 0), Place(down, 0))
        found.append(Channels(f"{block}.mlp units", names[down].shape[0], units))
        attention = f"{block}.attn"
        for head in range(heads):
            start = 2 * hidden + head * width
            values = (Place(f"{attention}.c_attn.weight", 1, start), Place(f"{attention}.c_attn.bias", 0, start))
            read = Place(f"{attention}.c_proj.weight", 0, head * width)
            found.append(Channels(f"{attention} values {head}", width, (*values, read)))
    stream = {
        r"transformer\.w[tp]e\.weight|lm_head\.weight|.*\.c_proj\.weight": 1,
        r".*\.(c_attn|c_fc)\.weight|.*\.c_proj\.bias|.*\.ln_(1|2|f)\.(weight|bias)": 0,
    }
    return [*found, _stream(names, hidden, stream, r".*\.(c_attn|c_fc)\.bias")]


_DECLARED: dict[str, Callable[[nn.Module], list[Channels]]] = {
    **{family.name: _llama for family in (LLAMA, *LLAMA_BLOCK)},
    GPT2.name: _gpt2,
}
"""By the name of the family."""


def _heads(config: Any) -> tuple[int, int, int]:
    """(heads of values, query heads that read each, channels of each)."""
    queries = int(config.num_attention_heads)
    heads = int(getattr(config, "num_key_value_heads", None) or queries)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // queries)
    return heads, queries // heads, width


def _blocks(names: dict[str, nn.Parameter], pattern: str) -> list[str]:
    return [match.group(1) for name in names if (match := re.fullmatch(pattern, name))]


def _outputs(names: dict[str, nn.Parameter], module: str, start: int = 0) -> list[Place]:
    """A linear layer's outputs: rows of its weight, and its bias if it has one."""
    return [Place(name, 0, start) for part in ("weight", "bias") if (name := f"{module}.{part}") in names]


def _stream(names: dict[str, nn.Parameter], size: int, dims: dict[str, int], apart: str) -> Channels:
    """The residual stream; `dims` says by name along which dimension a parameter has it, `apart` which have it not."""
    places = []
    for name in names:
        dim = next((dim for pattern, dim in dims.items() if re.fullmatch(pattern, name)), None)
        if dim is not None:
            places.append(Place(name, dim))
        elif not re.fullmatch(apart, name):
            raise UnsupportedModel(
                f"permutation: nothing says whether {name} {tuple(names[name].shape)} has the channels of the "
                "residual stream; add it to sparseforge_core/models/channels.py"
            )
    return Channels("residual stream", size, tuple(places))
