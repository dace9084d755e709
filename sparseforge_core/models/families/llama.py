"""LLaMA and the architectures that share its block: separate q, k, v, o and a gated MLP."""

from sparseforge_core.models.families.base import Family, rule

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    include=(
        rule("attention", "model.layers.#.self_attn.(q|k|v|o)_proj.weight"),
        rule("mlp", "model.layers.#.mlp.(gate|up|down)_proj.weight"),
    ),
    exclude=(
        rule("embedding", "model.embed_tokens.weight"),
        rule("head", "lm_head.weight", optional=True),
    ),
)
