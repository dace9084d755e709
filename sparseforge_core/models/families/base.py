"""A family is a declaration: which weights of an architecture are masked, which are left dense, and by what rule."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A named set of parameters: `pattern` is matched against the whole parameter name.

    Rules of one family that share a name are alternative spellings of one set: at least one of them must match.
    """

    name: str
    pattern: str
    optional: bool = False
    """Whether some members of the family have no such weight; a rule that is not optional must match."""
    transposed: bool = False
    """Whether the weights are stored `[..., in, out]`: GPT-2's Conv1D, the fused experts of GPT-OSS and Llama 4."""

    def matches(self, parameter: str) -> bool:
        """Whether this rule names the parameter."""
        return re.fullmatch(self.pattern, parameter) is not None


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where the maskable weights are in one model architecture. Every matrix must be claimed by exactly one rule."""

    name: str
    model_types: tuple[str, ...]
    """Exact `config.model_type` values; nothing is guessed from a path."""
    include: tuple[Rule, ...]
    """Weights under a mask."""
    exclude: tuple[Rule, ...]
    """Weights left dense on purpose. Vectors (norms, biases) need no rule."""


def rule(name: str, pattern: str, *, optional: bool = False, transposed: bool = False) -> Rule:
    """A Rule, with a number in place of each `#`."""
    expression = pattern.replace(".", r"\.").replace("#", r"\d+")
    return Rule(name=name, pattern=expression, optional=optional, transposed=transposed)
