"""The families we declare, found by the exact `model_type` of a configuration."""

from __future__ import annotations

from sparseforge_core.errors import UnsupportedModel, unknown
from sparseforge_core.models.families.base import Family, Rule
from sparseforge_core.models.families.deepseek_moe import DEEPSEEK, DEEPSEEK_MOE, ERNIE_MOE, GLM4_MOE, HUNYUAN_MOE
from sparseforge_core.models.families.falcon import FALCON
from sparseforge_core.models.families.glm import GLM
from sparseforge_core.models.families.gpt2 import GPT2
from sparseforge_core.models.families.gpt_bigcode import GPT_BIGCODE
from sparseforge_core.models.families.gpt_neox import GPT_NEOX
from sparseforge_core.models.families.llama import LLAMA, LLAMA_BLOCK
from sparseforge_core.models.families.mixtral import GRANITEMOE, MIXTRAL, OLMOE, PHIMOE
from sparseforge_core.models.families.opt import OPT
from sparseforge_core.models.families.phi import PHI, PHI3
from sparseforge_core.models.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from sparseforge_core.models.families.starcoder2 import STARCODER2
from sparseforge_core.models.families.transposed_experts import GPT_OSS, LLAMA4

__all__ = ["FAMILIES", "Family", "Rule", "family_of"]

_DECLARED = (
    LLAMA, *LLAMA_BLOCK, OPT, GPT2, GPT_BIGCODE, GPT_NEOX, FALCON, PHI, PHI3, GLM, STARCODER2,
    MIXTRAL, OLMOE, PHIMOE, GRANITEMOE, QWEN2_MOE, QWEN3_MOE, DEEPSEEK, DEEPSEEK_MOE, GLM4_MOE, ERNIE_MOE,
    HUNYUAN_MOE, GPT_OSS, LLAMA4,
)  # fmt: skip

FAMILIES: dict[str, Family] = {model_type: family for family in _DECLARED for model_type in family.model_types}
"""Declared family by model type."""


def family_of(model_type: str) -> Family:
    """The family that declares this model type. Raises UnsupportedModel, naming the nearest."""
    if model_type not in FAMILIES:
        raise UnsupportedModel(
            f"no family declares this model: {unknown('model_type', model_type, FAMILIES)} Say family='automatic' in "
            "the recipe's model source to have its matrices classified by their modules, or add a file to "
            "sparseforge_core/models/families/; llama.py is the nearest example."
        )
    return FAMILIES[model_type]
