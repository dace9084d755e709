"""GPT-BigCode (SantaCoder, StarCoder): GPT-2's names over ordinary `[out, in]` matrices, one key and value head."""

from sparseforge_core.models.families.base import Family, rule

GPT_BIGCODE = Family(
    name="gpt_bigcode",
    model_types=("gpt_bigcode",),
    include=(
        rule("attention", "transformer.h.#.attn.(c_attn|c_proj).weight"),
        rule("mlp", "transformer.h.#.mlp.(c_fc|c_proj).weight"),
    ),
    exclude=(
        rule("embedding", "transformer.w(te|pe).weight"),
        rule("head", "lm_head.weight", optional=True),
    ),
)
