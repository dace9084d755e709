"""Falcon and BLOOM: q, k, v in one matrix, an ungated MLP of two, and the same names for both."""

from sparseforge_core.models.families.base import Family, rule

FALCON = Family(
    name="falcon",
    model_types=("falcon", "bloom"),
    include=(
        rule("attention", "transformer.h.#.self_attention.(query_key_value|dense).weight"),
        rule("mlp", "transformer.h.#.mlp.dense_(h_to_4h|4h_to_h).weight"),
    ),
    exclude=(
        rule("embedding", "transformer.word_embeddings.weight"),
        rule("head", "lm_head.weight", optional=True),
    ),
)
