"""OPT: learned positions, biases, a two-matrix MLP; the 350M model also projects its embeddings."""

from sparseforge_core.models.families.base import Family, rule

OPT = Family(
    name="opt",
    model_types=("opt",),
    include=(
        rule("attention", "model.decoder.layers.#.self_attn.(q|k|v|out)_proj.weight"),
        rule("mlp", "model.decoder.layers.#.fc(1|2).weight"),
    ),
    exclude=(
        rule("embedding", "model.decoder.embed_(tokens|positions).weight"),
        rule("embedding-projection", "model.decoder.project_(in|out).weight", optional=True),
        rule("head", "lm_head.weight", optional=True),
    ),
)
