"""GLM-4: separate q, k, v, o; gate and up in one matrix, stacked along its outputs, so groups do not cross them."""

from sparseforge_core.models.families.base import Family, rule
from sparseforge_core.models.families.llama import LLAMA

GLM = Family(
    name="glm",
    model_types=("glm", "glm4"),
    include=(
        rule("attention", "model.layers.#.self_attn.(q|k|v|o)_proj.weight"),
        rule("mlp", "model.layers.#.mlp.(gate_up|down)_proj.weight"),
    ),
    exclude=LLAMA.exclude,
)
