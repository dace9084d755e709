"""Mixtral and the mixtures built like it: LLaMA's attention, routed experts only, a linear router.

transformers holds all experts of a layer in two tensors: `gate_up_proj` `[experts, 2 hidden, in]` (gate above up,
so groups along the inputs do not cross them) and `down_proj` `[experts, out, hidden]`. A file on disk has one
matrix per expert; loading stacks them and saving takes them apart again, along the first axis only.
"""

from dataclasses import replace

from sparseforge_core.models.families.base import Family, rule
from sparseforge_core.models.families.llama import LLAMA

MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    include=(
        rule("attention", "model.layers.#.self_attn.(q|k|v|o)_proj.weight"),
        rule("experts", "model.layers.#.mlp.experts.(gate_up|down)_proj"),
    ),
    exclude=(rule("router", "model.layers.#.mlp.gate.weight"), *LLAMA.exclude),
)

OLMOE = replace(MIXTRAL, name="olmoe", model_types=("olmoe",))

PHIMOE = replace(
    MIXTRAL,
    name="phimoe",
    model_types=("phimoe",),
    exclude=(rule("router", "model.layers.#.mlp.router.weight"), *LLAMA.exclude),
)

GRANITEMOE = Family(
    name="granitemoe",
    model_types=("granitemoe",),
    include=(
        rule("attention", "model.layers.#.self_attn.(q|k|v|o)_proj.weight"),
        rule("experts", "model.layers.#.block_sparse_moe.experts.(gate_up|down)_proj"),
    ),
    exclude=(rule("router", "model.layers.#.block_sparse_moe.router.weight"), *LLAMA.exclude),
)
