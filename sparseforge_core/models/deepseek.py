"""DeepSeek-MoE-16B (`model_type: deepseek`) out of transformers' own parts, with fused experts.

transformers has no class for it, and the code in its repository was written for an older transformers. Its block is
LLaMA's attention with DeepSeek-V2's mixture (softmax routing over all experts, greedy choice, weights not
renormalised, shared experts beside), so these classes put those two together. Loading stacks the experts of a
published checkpoint, one matrix each, into `[experts, out, in]`; saving takes them apart again, so that files keep
the published names.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts, DeepseekV2Moe, DeepseekV2TopkRouter

from sparseforge_core.errors import UnsupportedModel


class DeepseekConfig(LlamaConfig):  # type: ignore[misc]
    """The fields of the published configuration that LLaMA's lacks, under their published names."""

    model_type = "deepseek"
    attribute_map: ClassVar[dict[str, str]] = {"num_experts": "n_routed_experts"}

    first_k_dense_replace: int = 0
    """First layers without experts."""
    moe_layer_freq: int = 1
    """Every how many-th of the others has experts."""
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int = 1407
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"

    routed_scaling_factor = 1.0
    topk_method = "greedy"
    n_group = None
    topk_group = None


class FusedDeepseekModel(LlamaModel):  # type: ignore[misc]
    """Embedding, blocks, norm; the mixtures take the place of LLaMA's MLP."""

    config_class = DeepseekConfig

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        for number, layer in enumerate(self.layers):
            if number >= config.first_k_dense_replace and number % config.moe_layer_freq == 0:
                layer.mlp = DeepseekV2Moe(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        _init_weights(super(), module, self.config.initializer_range)


class FusedDeepseekForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """The whole model. Raises UnsupportedModel for a configuration whose routing DeepSeek-V2's router does not do."""

    config_class = DeepseekConfig

    def __init__(self, config: DeepseekConfig) -> None:
        needs = {"norm_topk_prob": False, "scoring_func": "softmax"}
        other = {name: getattr(config, name) for name, value in needs.items() if getattr(config, name) != value}
        if other or not (config.n_routed_experts and config.num_experts_per_tok and config.n_shared_experts):
            raise UnsupportedModel(
                f"model_type deepseek with {other or 'no routed or no shared experts'}: only {needs}, with both kinds "
                "of experts, is built from transformers' parts; load its own code with remote_code=True"
            )
        super().__init__(config)
        self.model = FusedDeepseekModel(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        _init_weights(super(), module, self.config.initializer_range)


def _init_weights(parent: Any, module: nn.Module, std: float) -> None:
    """LLaMA's initialisation, and the same for the weights that are no module's `weight`."""
    parent._init_weights(module)
    if isinstance(module, DeepseekV2Experts):
        nn.init.normal_(module.gate_up_proj, std=std)
        nn.init.normal_(module.down_proj, std=std)
    elif isinstance(module, DeepseekV2TopkRouter):
        nn.init.normal_(module.weight, std=std)


register_checkpoint_conversion_mapping(
    FusedDeepseekForCausalLM.__name__, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True
)
