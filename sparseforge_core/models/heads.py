"""A causal language model as its body and its head, so that the head can be applied to few positions at a time.

Models differ in what follows the last hidden state: a bias, a scale (Cohere, Granite), a soft cap (Gemma 2). None of
this is repeated here. The head is the model's own forward, run on a copy of its outermost modules whose body hands
over the hidden states it is given; all parameters are shared. That both parts together are the model is checked by
its logits when it is split.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseforge_core.errors import UnsupportedModel

PROBE = 8
"""Tokens of the check, spread over the vocabulary."""


@dataclass(frozen=True)
class Split:
    """The two parts of a model."""

    body: Any
    """Called like the model; its output has `last_hidden_state`."""
    head: Callable[[Tensor], Tensor]
    """Hidden states `[positions, width]` to logits `[positions, vocabulary]`."""
    vocabulary: int
    """Number of logits of a position."""
    matrix: nn.Parameter | None = None
    """`[vocabulary, width]` where logits are its product with the hidden states, and nothing else is done to them."""
    gathered: Callable[[], Tensor] | None = None
    """Where the matrix is kept in shards: what gives all of it, once the body has run and until its backward has."""
    fused: bool = False
    """Whether losses may be computed by `objective/fused.py`, which has no second derivative."""

    def whole_matrix(self) -> Tensor | None:
        """`matrix`, or what it is gathered to at this moment."""
        return self.matrix if self.gathered is None else self.gathered()


def split(model: Any) -> Split:
    """Split `model`. Raises UnsupportedModel if the logits of its parts are not those of the whole."""
    name = type(model).__name__
    body = model.get_decoder()
    if body is model:  # what it answers where it knows none; the usual name is then worth the check below
        body = getattr(model, "model", None)
    path = next((path for path, module in model.named_modules() if module is body), None)
    if path is None:
        raise UnsupportedModel(f"{name}: no body was found that could be told apart from the head")
    shell = replaced(model, path, _Given())

    def head(hidden: Tensor) -> Tensor:
        logits: Tensor = shell(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits
        return logits[0]

    vocabulary = int(model.config.vocab_size)
    device = next(model.parameters()).device
    probe = torch.arange(PROBE, device=device)[None] * (vocabulary // PROBE)
    with torch.no_grad():
        whole = model(input_ids=probe, use_cache=False).logits[0]
        try:
            hidden = body(input_ids=probe, use_cache=False).last_hidden_state[0]
            parts = head(hidden)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UnsupportedModel(f"{name}: its head cannot be applied to given hidden states ({error})") from error
        if parts.shape != whole.shape or not torch.allclose(parts, whole, rtol=1e-5, atol=1e-6):
            raise UnsupportedModel(f"{name}: its head, applied to the body's hidden states, gives other logits than it")
        matrix = _plain_matrix(model, head, hidden)
    return Split(body=body, head=head, vocabulary=vocabulary, matrix=matrix)


def _plain_matrix(model: Any, head: Callable[[Tensor], Tensor], hidden: Tensor) -> nn.Parameter | None:
    """The head's matrix, if the head is nothing else: seen on large hidden states too, where a cap would show."""
    linear = model.get_output_embeddings()
    if type(linear) is not nn.Linear or linear.bias is not None:
        return None
    for states in (hidden, 100.0 * hidden):
        if not torch.allclose(head(states), nn.functional.linear(states, linear.weight), rtol=1e-5, atol=1e-6):
            return None
    return linear.weight


class _Given(nn.Module):
    """Stands in for a body: its output is its input."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Output:
        return _Output(inputs_embeds)


class _Output:
    """What heads ask of a body's output: the hidden states, by name or as the first item, and nothing else."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, item: int) -> Tensor:
        return (self.last_hidden_state,)[item]

    def __getattr__(self, name: str) -> None:
        """Caches, attentions, routers: there are none."""


def replaced(module: nn.Module, path: str, part: nn.Module) -> nn.Module:
    """A copy of `module` that shares everything with it but the submodule at `path`."""
    made = copy.copy(module)
    first, _, rest = path.partition(".")
    made.__dict__["_modules"] = dict(module._modules)
    made._modules[first] = replaced(module.get_submodule(first), rest, part) if rest else part
    return made
