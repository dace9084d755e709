"""Every method by its kind. One file each; adding one is a file and a line here."""

from __future__ import annotations

from sparseforge_core.errors import RecipeError, unknown
from sparseforge_core.methods.alps import ALPS
from sparseforge_core.methods.ast import AST
from sparseforge_core.methods.base import Method
from sparseforge_core.methods.besa import BESA
from sparseforge_core.methods.cast import CAST
from sparseforge_core.methods.dense import Dense, DenseControl
from sparseforge_core.methods.frozen_mask import FrozenMask
from sparseforge_core.methods.magnitude import MagnitudePruning
from sparseforge_core.methods.maskllm import MaskLLM
from sparseforge_core.methods.owl import OWL
from sparseforge_core.methods.proxsparse import ProxSparse
from sparseforge_core.methods.s_ste import SSTE
from sparseforge_core.methods.sparseforge import SparseForge
from sparseforge_core.methods.sparsegpt import SparseGPT
from sparseforge_core.methods.sr_ste import SRSTE
from sparseforge_core.methods.wanda import Wanda

__all__ = [
    "ALPS",
    "AST",
    "BESA",
    "CAST",
    "METHODS",
    "OWL",
    "SRSTE",
    "SSTE",
    "Dense",
    "DenseControl",
    "FrozenMask",
    "MagnitudePruning",
    "MaskLLM",
    "Method",
    "ProxSparse",
    "SparseForge",
    "SparseGPT",
    "Wanda",
    "method_named",
]

ALL: tuple[type[Method], ...] = (
    Dense, DenseControl,
    MagnitudePruning, Wanda, SparseGPT, ALPS, OWL, BESA,
    FrozenMask, SRSTE, SSTE, AST, CAST, MaskLLM, ProxSparse, SparseForge,
)  # fmt: skip
"""References, one-shot methods, retraining methods."""

METHODS: dict[str, type[Method]] = {str(getattr(cls, "kind")): cls for cls in ALL}  # noqa: B009 (set by @spec)


def method_named(kind: str) -> type[Method]:
    """The method class of a kind. Raises RecipeError, naming the nearest."""
    if kind not in METHODS:
        raise RecipeError(unknown("method", kind, METHODS))
    return METHODS[kind]
