"""Configurations of each family, small unless told otherwise: for demo, tests and what a study pretrains itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sparseforge_core.errors import RecipeError, unknown
from sparseforge_core.models.sources import Tiny

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Fields = dict[str, Any]

MLP_FIELDS = ("intermediate_size", "n_inner", "ffn_dim")
"""What configurations call the inner width of a block's one MLP."""


def tiny_config(source: Tiny, vocabulary: int, eos: int) -> PretrainedConfig:
    """The configuration of `source` for a vocabulary of that many tokens; all families get comparable sizes.

    Raises RecipeError for an unknown architecture, naming the nearest, and for an MLP's width that it cannot have.
    """
    import transformers

    from sparseforge_core.models import deepseek

    if source.architecture not in CONFIGURATIONS:
        raise RecipeError(unknown("architecture", source.architecture, CONFIGURATIONS))
    name, fields = CONFIGURATIONS[source.architecture]
    common: Fields = {"vocab_size": vocabulary, "bos_token_id": eos, "eos_token_id": eos, "pad_token_id": eos}
    owner = deepseek if hasattr(deepseek, name) else transformers
    given = fields(source)
    if source.mlp is not None and not any(given.get(field) == source.mlp for field in MLP_FIELDS):
        raise RecipeError(
            f"mlp={source.mlp}: the configuration of {source.architecture} has no width of one MLP to set; leave it out"
        )
    made = getattr(owner, name)(**{**common, **given})
    assert isinstance(made, transformers.PretrainedConfig)
    return made


def _decoder(source: Tiny) -> Fields:
    """The fields that most decoders share; the MLP is about twice as wide as the model."""
    return {
        "hidden_size": source.width,
        "num_hidden_layers": source.layers,
        "num_attention_heads": source.heads,
        "num_key_value_heads": source.heads,
        "max_position_embeddings": source.positions,
        "intermediate_size": source.mlp or 2 * source.width + (-2 * source.width) % 16,
        "tie_word_embeddings": True,
    }


def _headed(source: Tiny) -> Fields:
    """For configurations whose head size does not follow from the width."""
    return {**_decoder(source), "head_dim": source.width // source.heads}


def _routed(source: Tiny) -> Fields:
    """4 routed experts, 2 active, under the names that the configurations give these numbers."""
    counts: Fields = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)
    chosen = dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2)
    return {**_headed(source), **counts, **chosen, "moe_intermediate_size": source.width // 2}


def _shared(source: Tiny) -> Fields:
    """One dense layer, then layers of routed experts and a shared one."""
    shared = {"n_shared_experts": 1, "moe_num_shared_experts": 1, "num_shared_expert": 1}
    return {**_routed(source), **shared, "first_k_dense_replace": 1, "moe_layer_start_index": 1}


def _latent(source: Tiny) -> Fields:
    """DeepSeek's latent attention, with half of each head turned by its position."""
    head = source.width // source.heads
    return {
        **_decoder(source),
        "q_lora_rank": None,
        "kv_lora_rank": source.width // 2,
        "qk_rope_head_dim": head // 2,
        "qk_nope_head_dim": head // 2,
        "v_head_dim": head,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": source.width // 2,
        "first_k_dense_replace": 1,
    }


def _gpt2(source: Tiny) -> Fields:
    return {
        "n_embd": source.width,
        "n_layer": source.layers,
        "n_head": source.heads,
        "n_positions": source.positions,
        "n_inner": source.mlp or 3 * source.width,
    }


def _gptj(source: Tiny) -> Fields:
    return {**_gpt2(source), "rotary_dim": source.width // source.heads // 2, "tie_word_embeddings": False}


def _opt(source: Tiny) -> Fields:
    return {
        "hidden_size": source.width,
        "word_embed_proj_dim": source.width,
        "num_hidden_layers": source.layers,
        "num_attention_heads": source.heads,
        "max_position_embeddings": source.positions,
        "ffn_dim": source.mlp or 3 * source.width,
    }


def _falcon(source: Tiny) -> Fields:
    fields = _decoder(source)
    return {**fields, "ffn_hidden_size": fields["intermediate_size"]}


def _bloom(source: Tiny) -> Fields:
    return {
        "hidden_size": source.width,
        "n_layer": source.layers,
        "n_head": source.heads,
        "seq_length": source.positions,
    }


def _mpt(source: Tiny) -> Fields:
    return {
        "d_model": source.width,
        "n_layers": source.layers,
        "n_heads": source.heads,
        "max_seq_len": source.positions,
    }


def _qwen2_moe(source: Tiny) -> Fields:
    return {**_routed(source), "shared_expert_intermediate_size": source.width}


def _deepseek_v3(source: Tiny) -> Fields:
    return {**_latent(source), "q_lora_rank": source.width // 2, "n_group": 1, "topk_group": 1}


def _gpt_oss(source: Tiny) -> Fields:
    """Without the stretching of positions that its default asks for."""
    return {**_routed(source), "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


def _llama4(source: Tiny) -> Fields:
    """Every second layer has experts, as wide as the MLP."""
    wide = _decoder(source)["intermediate_size"]
    return {**_routed(source), "intermediate_size_mlp": wide, "interleave_moe_layer_step": 2}


CONFIGURATIONS: dict[str, tuple[str, Callable[[Tiny], Fields]]] = {
    "gpt2": ("GPT2Config", _gpt2),
    "opt": ("OPTConfig", _opt),
    "llama": ("LlamaConfig", _decoder),
    "qwen3": ("Qwen3Config", _headed),
    "deepseek_moe": ("DeepseekV2Config", _latent),
    "mistral": ("MistralConfig", _headed),
    "qwen2": ("Qwen2Config", _decoder),
    "olmo": ("OlmoConfig", _decoder),
    "olmo2": ("Olmo2Config", _decoder),
    "olmo3": ("Olmo3Config", _decoder),
    "gemma": ("GemmaConfig", _headed),
    "gemma2": ("Gemma2Config", _headed),
    "gemma3_text": ("Gemma3TextConfig", _headed),
    "cohere": ("CohereConfig", lambda source: {**_decoder(source), "use_qk_norm": True}),
    "cohere2": ("Cohere2Config", _headed),
    "granite": ("GraniteConfig", _decoder),
    "stablelm": ("StableLmConfig", _decoder),
    "smollm3": ("SmolLM3Config", _decoder),
    "ernie4_5": ("Ernie4_5Config", _headed),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", _headed),
    "seed_oss": ("SeedOssConfig", _headed),
    "phi": ("PhiConfig", _decoder),
    "phi3": ("Phi3Config", _decoder),
    "glm": ("GlmConfig", _headed),
    "glm4": ("Glm4Config", _headed),
    "gpt_neox": ("GPTNeoXConfig", lambda source: {**_decoder(source), "tie_word_embeddings": False}),
    "falcon": ("FalconConfig", _falcon),
    "bloom": ("BloomConfig", _bloom),
    "starcoder2": ("Starcoder2Config", _decoder),
    "gpt_bigcode": ("GPTBigCodeConfig", _gpt2),
    "mixtral": ("MixtralConfig", _routed),
    "olmoe": ("OlmoeConfig", _routed),
    "phimoe": ("PhimoeConfig", _routed),
    "granitemoe": ("GraniteMoeConfig", _routed),
    "qwen2_moe": ("Qwen2MoeConfig", _qwen2_moe),
    "qwen3_moe": ("Qwen3MoeConfig", _routed),
    "deepseek": ("DeepseekConfig", _shared),
    "deepseek_v3": ("DeepseekV3Config", _deepseek_v3),
    "glm4_moe": ("Glm4MoeConfig", _shared),
    "dots1": ("Dots1Config", _shared),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", _shared),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", _shared),
    "gpt_oss": ("GptOssConfig", _gpt_oss),
    "llama4_text": ("Llama4TextConfig", _llama4),
    "nemotron": ("NemotronConfig", _decoder),
    "mpt": ("MptConfig", _mpt),
    "gptj": ("GPTJConfig", _gptj),
}
"""Architecture of a Tiny source -> (configuration class of transformers or ours, the fields that make it small)."""
