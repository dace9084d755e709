"""DeepSeek's mixtures of experts: shared experts beside the routed ones, first layers without any, a dense router.

Two layouts exist and both are declared. The code that DeepSeek publishes with a checkpoint has a `Linear` for each
matrix of each expert; transformers' classes hold the experts of a layer in two tensors `[experts, out, in]`. For
`deepseek_v2` and `deepseek_v3` (multi-head latent attention, whose down- and up-projections are masked too) these are
transformers' own, for `deepseek` (DeepSeek-MoE-16B, ordinary attention) those of `models/deepseek.py`. A recipe that
says `remote_code=True` gets the published ones. DeepSeek-V3's router also has a correction bias, which is a buffer:
it is no parameter, is never trained here, and is saved with the model.
"""

from dataclasses import replace

from sparseforge_core.models.families.base import Family, rule
from sparseforge_core.models.families.llama import LLAMA

_EXPERTS = (
    rule("experts", "model.layers.#.mlp.experts.(gate_up|down)_proj"),
    rule("experts", "model.layers.#.mlp.experts.#.(gate|up|down)_proj.weight"),
)
"""Fused, or one Linear each: whichever the loaded classes have."""

_MIXTURE = (
    rule("mlp", "model.layers.#.mlp.(gate|up|down)_proj.weight", optional=True),
    *_EXPERTS,
    rule("shared-experts", "model.layers.#.mlp.shared_experts.(gate|up|down)_proj.weight", optional=True),
)

DEEPSEEK = Family(
    name="deepseek",
    model_types=("deepseek",),
    include=(rule("attention", "model.layers.#.self_attn.(q|k|v|o)_proj.weight"), *_MIXTURE),
    exclude=(rule("router", "model.layers.#.mlp.gate.weight"), *LLAMA.exclude),
)

DEEPSEEK_MOE = replace(
    DEEPSEEK,
    name="deepseek_moe",
    model_types=("deepseek_v2", "deepseek_v3"),
    include=(
        rule("attention", "model.layers.#.self_attn.(q|o|kv_b)_proj.weight"),
        rule("attention-down", "model.layers.#.self_attn.kv_a_proj_with_mqa.weight"),
        rule("attention-query-lora", "model.layers.#.self_attn.q_(a|b)_proj.weight", optional=True),
        *_MIXTURE,
    ),
)

GLM4_MOE = replace(DEEPSEEK, name="glm4_moe", model_types=("glm4_moe", "dots1"))
"""The same block under the same names: shared experts, a router with a correction bias."""

ERNIE_MOE = replace(
    DEEPSEEK,
    name="ernie_moe",
    model_types=("ernie4_5_moe",),
    exclude=(
        rule("router-correction", "model.layers.#.mlp.gate.moe_statics.e_score_correction_bias"),
        *DEEPSEEK.exclude,
    ),
)
"""Its correction bias is a parameter of one row."""

HUNYUAN_MOE = replace(
    DEEPSEEK,
    name="hunyuan_moe",
    model_types=("hunyuan_v1_moe",),
    include=(
        rule("attention", "model.layers.#.self_attn.(q|k|v|o)_proj.weight"),
        *_EXPERTS,
        rule("shared-experts", "model.layers.#.mlp.shared_mlp.(gate|up|down)_proj.weight", optional=True),
    ),
    exclude=(rule("router", "model.layers.#.mlp.gate.wg.weight"), *LLAMA.exclude),
)
