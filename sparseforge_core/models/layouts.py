"""How modules store their matrices: which axis is the input, and what each fused expert receives.

A family declares an orientation; a module that knows its own is asked, and the two must agree. transformers' fused
experts say how they are stored (`is_transposed`, `has_gate`, `has_bias`) and gate themselves (`_apply_gate`); Llama
4's, which compute every expert on every token with unrouted tokens scaled to zero, do not, and are known by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparseforge_core.errors import UnsupportedModel

BATCHED_EXPERTS = ("Llama4TextExperts",)
"""Classes of experts `[experts, in, out]` that receive all tokens once for each expert, in order of the experts."""


def is_transposed(module: nn.Module, weight: Tensor) -> bool | None:
    """Whether `module` stores this matrix as `[..., in, out]`, or None if it does not say."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return False
    if isinstance(module, Conv1D):
        return True
    if weight.ndim == 3:
        if _named(module, BATCHED_EXPERTS):
            return True
        said = getattr(module, "is_transposed", None)
        return said if isinstance(said, bool) else None
    return None


def expert_inputs(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each fused expert, in order: its number, the inputs of its first matrix and those of its second.

    `args` and `kwargs` are what the module's forward received. Inputs are `[tokens, in]`, of the tokens routed to
    the expert only. Raises UnsupportedModel for a module whose routing we do not know.
    """
    routed = _routed(module, args, kwargs)
    gated = getattr(module, "has_gate", True)
    name = "gate_up_proj" if gated else "up_proj"
    weight = getattr(module, name)  # once: reading it evaluates the mask on it
    bias = getattr(module, f"{name}_bias", None)
    stored_in_out = bool(is_transposed(module, weight))
    for expert, x in enumerate(routed):
        matrix = weight[expert].T if stored_in_out else weight[expert]
        first = nn.functional.linear(x.to(matrix.dtype), matrix, None if bias is None else bias[expert])
        yield expert, x, _gate(module, first) if gated else module.act_fn(first)


def _routed(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tokens of each expert, `[tokens, in]`."""
    given = [*args, *kwargs.values()]
    hidden = given[0]
    if _named(module, BATCHED_EXPERTS):
        return list(hidden.reshape(module.num_experts, -1, hidden.shape[-1]))
    chosen = next((x for x in given[1:] if isinstance(x, Tensor) and not x.is_floating_point()), None)
    if chosen is None or getattr(module, "is_transposed", None) is None:
        raise UnsupportedModel(
            f"{type(module).__name__}: how it routes tokens to its experts is not known; a layout that does not "
            "receive (hidden_states, chosen experts, weights) needs its own rule in models/layouts.py"
        )
    hidden = hidden.reshape(-1, hidden.shape[-1])
    chosen = chosen.reshape(hidden.shape[0], -1)
    return [hidden[(chosen == expert).any(-1)] for expert in range(module.num_experts)]


def _gate(module: Any, first: Tensor) -> Tensor:
    """The module's own way from the outputs of the first matrix to the inputs of the second."""
    if hasattr(module, "_apply_gate"):
        gated = module._apply_gate(first)
    else:
        gate, up = first.chunk(2, dim=-1)
        gated = module.act_fn(gate) * up
    assert isinstance(gated, torch.Tensor)
    return gated


def _named(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether a module's class or an ancestor has one of these names (a mask makes a subclass)."""
    return any(cls.__name__ in names for cls in type(module).__mro__)
