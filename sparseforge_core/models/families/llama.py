"""LLaMA and the architectures that share its block: separate q, k, v, o and a gated MLP, under the same names.

What tells the others apart are vectors (normalised queries and keys, biases, norms in other places) and
arithmetic between the matrices; neither needs a rule.
"""

from dataclasses import replace

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

QWEN3 = replace(LLAMA, name="qwen3", model_types=("qwen3",))

COHERE = replace(
    LLAMA,
    name="cohere",
    model_types=("cohere", "cohere2"),
    exclude=(*LLAMA.exclude, rule("head-norm", "model.layers.#.self_attn.(q|k)_norm.weight", optional=True)),
)
"""Its larger models normalise each head by a row of its own: a norm that is stored as a matrix."""

LLAMA_BLOCK = (
    QWEN3,
    COHERE,
    replace(LLAMA, name="mistral", model_types=("mistral",)),
    replace(LLAMA, name="qwen2", model_types=("qwen2",)),
    replace(LLAMA, name="olmo", model_types=("olmo", "olmo2", "olmo3")),
    replace(LLAMA, name="gemma", model_types=("gemma", "gemma2", "gemma3_text")),
    replace(LLAMA, name="granite", model_types=("granite",)),
    replace(LLAMA, name="stablelm", model_types=("stablelm",)),
    replace(LLAMA, name="smollm3", model_types=("smollm3",)),
    replace(LLAMA, name="ernie", model_types=("ernie4_5",)),
    replace(LLAMA, name="hunyuan", model_types=("hunyuan_v1_dense",)),
    replace(LLAMA, name="seed-oss", model_types=("seed_oss",)),
)
"""Everything else with LLaMA's block and LLaMA's names."""
