"""Phi: phi-1 and phi-2 with an ungated MLP; Phi-3 and 4 with q, k, v in one matrix and gate and up in another."""

from sparseforge_core.models.families.base import Family, rule

PHI = Family(
    name="phi",
    model_types=("phi",),
    include=(
        rule("attention", "model.layers.#.self_attn.(q_proj|k_proj|v_proj|dense).weight"),
        rule("mlp", "model.layers.#.mlp.fc(1|2).weight"),
    ),
    exclude=(
        rule("embedding", "model.embed_tokens.weight"),
        rule("head", "lm_head.weight", optional=True),
    ),
)

PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    include=(
        rule("attention", "model.layers.#.self_attn.(qkv|o)_proj.weight"),
        rule("mlp", "model.layers.#.mlp.(gate_up|down)_proj.weight"),
    ),
    exclude=PHI.exclude,
)
