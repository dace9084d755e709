"""Small configurations of each family: the workhorses of the demo and of the tests, random until they are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparseforge_core.models.sources import Tiny

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def tiny_config(source: Tiny, vocabulary: int, eos: int) -> PretrainedConfig:
    """The configuration of `source` for a vocabulary of that many tokens; all families get comparable sizes."""
    import transformers

    common: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": eos, "eos_token_id": eos, "pad_token_id": eos}
    gated = 2 * source.width + (-2 * source.width) % 16
    decoder = {
        "hidden_size": source.width,
        "num_hidden_layers": source.layers,
        "num_attention_heads": source.heads,
        "num_key_value_heads": source.heads,
        "max_position_embeddings": source.positions,
        "intermediate_size": gated,
        "tie_word_embeddings": True,
    }
    if source.architecture == "llama":
        return transformers.LlamaConfig(**common, **decoder)
    if source.architecture == "qwen3":
        return transformers.Qwen3Config(**common, **decoder, head_dim=source.width // source.heads)
    if source.architecture == "gpt2":
        return transformers.GPT2Config(
            **common,
            n_embd=source.width,
            n_layer=source.layers,
            n_head=source.heads,
            n_positions=source.positions,
            n_inner=3 * source.width,
        )
    if source.architecture == "opt":
        return transformers.OPTConfig(
            **common,
            hidden_size=source.width,
            word_embed_proj_dim=source.width,
            num_hidden_layers=source.layers,
            num_attention_heads=source.heads,
            max_position_embeddings=source.positions,
            ffn_dim=3 * source.width,
        )
    return _deepseek_config(source, common, decoder)


def _deepseek_config(source: Tiny, common: dict[str, Any], decoder: dict[str, Any]) -> PretrainedConfig:
    """Latent attention, one dense layer, then layers of 4 routed experts (2 active) and a shared one."""
    from transformers import DeepseekV2Config

    head = source.width // source.heads
    return DeepseekV2Config(
        **common,
        **decoder,
        q_lora_rank=None,
        kv_lora_rank=source.width // 2,
        qk_rope_head_dim=head // 2,
        qk_nope_head_dim=head // 2,
        v_head_dim=head,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=source.width // 2,
        first_k_dense_replace=1,
    )
