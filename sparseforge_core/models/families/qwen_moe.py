"""Qwen's mixtures: fused routed experts; Qwen2-MoE adds a shared expert and a gate of one row that weighs it."""

from dataclasses import replace

from sparseforge_core.models.families.base import rule
from sparseforge_core.models.families.mixtral import MIXTRAL

_DENSE_LAYERS = rule("mlp", "model.layers.#.mlp.(gate|up|down)_proj.weight", optional=True)
"""Layers that the configuration keeps without experts (`mlp_only_layers`, `decoder_sparse_step`)."""

QWEN3_MOE = replace(MIXTRAL, name="qwen3_moe", model_types=("qwen3_moe",), include=(*MIXTRAL.include, _DENSE_LAYERS))

QWEN2_MOE = replace(
    QWEN3_MOE,
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    include=(
        *QWEN3_MOE.include,
        rule("shared-experts", "model.layers.#.mlp.shared_expert.(gate|up|down)_proj.weight"),
    ),
    exclude=(rule("shared-gate", "model.layers.#.mlp.shared_expert_gate.weight"), *QWEN3_MOE.exclude),
)
