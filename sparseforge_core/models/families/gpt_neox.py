"""GPT-NeoX (Pythia): q, k, v of each head lie together in one matrix; the output embedding is never tied."""

from sparseforge_core.models.families.base import Family, rule

GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    include=(
        rule("attention", "gpt_neox.layers.#.attention.(query_key_value|dense).weight"),
        rule("mlp", "gpt_neox.layers.#.mlp.dense_(h_to_4h|4h_to_h).weight"),
    ),
    exclude=(
        rule("embedding", "gpt_neox.embed_in.weight"),
        rule("head", "lm_head.weight", optional=True),
    ),
)
