"""GPT-OSS and Llama 4: ordinary attention, but fused experts stored `[experts, in, out]`.

Groups must run along the inputs, so these experts are grouped along their middle axis while the attention beside
them is grouped along its last. GPT-OSS also interleaves gate and up along the outputs, which no group crosses.
"""

from sparseforge_core.models.families.base import Family, rule
from sparseforge_core.models.families.llama import LLAMA

GPT_OSS = Family(
    name="gpt_oss",
    model_types=("gpt_oss",),
    include=(
        rule("attention", "model.layers.#.self_attn.(q|k|v|o)_proj.weight"),
        rule("experts", "model.layers.#.mlp.experts.(gate_up|down)_proj", transposed=True),
    ),
    exclude=(
        rule("expert-bias", "model.layers.#.mlp.experts.(gate_up|down)_proj_bias"),
        rule("router", "model.layers.#.mlp.router.weight"),
        *LLAMA.exclude,
    ),
)

LLAMA4 = Family(
    name="llama4",
    model_types=("llama4_text",),
    include=(
        rule("attention", "model.layers.#.self_attn.(q|k|v|o)_proj.weight"),
        rule("mlp", "model.layers.#.feed_forward.(gate|up|down)_proj.weight", optional=True),
        rule("experts", "model.layers.#.feed_forward.experts.(gate_up|down)_proj", transposed=True),
        rule("shared-experts", "model.layers.#.feed_forward.shared_expert.(gate|up|down)_proj.weight"),
    ),
    exclude=(rule("router", "model.layers.#.feed_forward.router.weight"), *LLAMA.exclude),
)
