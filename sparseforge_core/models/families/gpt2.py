"""GPT-2: Conv1D weights are stored [in, out], so groups run along their first axis; q, k, v are one matrix."""

from sparseforge_core.models.families.base import Family, rule

GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    include=(
        rule("attention", "transformer.h.#.attn.(c_attn|c_proj).weight", transposed=True),
        rule("mlp", "transformer.h.#.mlp.(c_fc|c_proj).weight", transposed=True),
    ),
    exclude=(
        rule("embedding", "transformer.w(te|pe).weight"),
        rule("head", "lm_head.weight", optional=True),
    ),
)
