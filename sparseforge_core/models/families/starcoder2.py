"""StarCoder2: LLaMA's attention with biases, and GPT-2's two-matrix MLP as ordinary `[out, in]` matrices."""

from sparseforge_core.models.families.base import Family, rule
from sparseforge_core.models.families.llama import LLAMA

STARCODER2 = Family(
    name="starcoder2",
    model_types=("starcoder2",),
    include=(
        rule("attention", "model.layers.#.self_attn.(q|k|v|o)_proj.weight"),
        rule("mlp", "model.layers.#.mlp.(c_fc|c_proj).weight"),
    ),
    exclude=LLAMA.exclude,
)
