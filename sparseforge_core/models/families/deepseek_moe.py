"""DeepSeek's mixtures of experts: fused 3-D expert weights, shared experts, a router that stays dense.

transformers loads `deepseek_v2` with all experts of a layer in two tensors `[experts, out, in]`; both are masked
like any matrix. The attention is multi-head latent attention: its down- and up-projections are masked too.
"""

from sparseforge_core.models.families.base import Family, rule

DEEPSEEK_MOE = Family(
    name="deepseek_moe",
    model_types=("deepseek_v2",),
    include=(
        rule("attention", "model.layers.#.self_attn.(q|o|kv_b)_proj.weight"),
        rule("attention-down", "model.layers.#.self_attn.kv_a_proj_with_mqa.weight"),
        rule("attention-query-lora", "model.layers.#.self_attn.q_(a|b)_proj.weight", optional=True),
        rule("mlp", "model.layers.#.mlp.(gate|up|down)_proj.weight", optional=True),
        rule("experts", "model.layers.#.mlp.experts.(gate_up|down)_proj"),
        rule("shared-experts", "model.layers.#.mlp.shared_experts.(gate|up|down)_proj.weight"),
    ),
    exclude=(
        rule("router", "model.layers.#.mlp.gate.weight"),
        rule("embedding", "model.embed_tokens.weight"),
        rule("head", "lm_head.weight", optional=True),
    ),
)
