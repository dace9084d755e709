"""Qwen3: LLaMA's block with normalised queries and keys (vectors, so no rule of their own)."""

from dataclasses import replace

from sparseforge_core.models.families.llama import LLAMA

QWEN3 = replace(LLAMA, name="qwen3", model_types=("qwen3",))
