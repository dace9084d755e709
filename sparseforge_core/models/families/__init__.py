"""The families we declare, found by the exact `model_type` of a configuration."""

from __future__ import annotations

from sparseforge_core.errors import UnsupportedModel, unknown
from sparseforge_core.models.families.base import Family, Rule
from sparseforge_core.models.families.deepseek_moe import DEEPSEEK_MOE
from sparseforge_core.models.families.gpt2 import GPT2
from sparseforge_core.models.families.llama import LLAMA
from sparseforge_core.models.families.opt import OPT
from sparseforge_core.models.families.qwen3 import QWEN3

__all__ = ["FAMILIES", "Family", "Rule", "family_of"]

FAMILIES: dict[str, Family] = {
    model_type: family for family in (LLAMA, QWEN3, OPT, GPT2, DEEPSEEK_MOE) for model_type in family.model_types
}


def family_of(model_type: str) -> Family:
    """The family that declares this model type. Raises UnsupportedModel, naming the nearest."""
    if model_type not in FAMILIES:
        raise UnsupportedModel(
            f"no family declares this model: {unknown('model_type', model_type, FAMILIES)} Add a file to "
            "sparseforge_core/models/families/; llama.py is the nearest example."
        )
    return FAMILIES[model_type]
