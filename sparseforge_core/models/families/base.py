"""A family is a declaration: which weights of an architecture are masked, which are left dense, and by what rule."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A named set of parameters: `pattern` is matched against the whole parameter name."""

    name: str
    pattern: str
    optional: bool = False
    """Whether some members of the family have no such weight; a rule that is not optional must match."""

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
    transposed: bool = False
    """Whether the masked weights are stored `[in, out]` (GPT-2's Conv1D)."""


def rule(name: str, pattern: str, *, optional: bool = False) -> Rule:
    """A Rule, with a number in place of each `#`."""
    return Rule(name=name, pattern=pattern.replace(".", r"\.").replace("#", r"\d+"), optional=optional)
