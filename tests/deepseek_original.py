"""A small model with the parameter names that DeepSeek-MoE-16B is published with: one Linear a matrix of an expert.

The published modelling code can be had from the hub only, and is written for an older transformers. This file is a
working model of that layout (ordinary attention with rotary positions, a first dense layer, then routed experts with
a shared one, softmax routing without renormalisation), small enough to be a repository's remote code in a test: it
imports nothing but torch and transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class DeepseekConfig(PretrainedConfig):
    """What the layout depends on."""

    model_type = "deepseek"

    def __init__(
        self,
        *,
        vocab_size: int = 64,
        hidden_size: int = 64,
        intermediate_size: int = 128,
        moe_intermediate_size: int = 32,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 2,
        max_position_embeddings: int = 64,
        n_routed_experts: int = 4,
        n_shared_experts: int = 2,
        num_experts_per_tok: int = 2,
        first_k_dense_replace: int = 1,
        **rest: Any,
    ) -> None:
        super().__init__(**rest)
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.moe_intermediate_size = moe_intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.n_routed_experts, self.n_shared_experts = n_routed_experts, n_shared_experts
        self.num_experts_per_tok, self.first_k_dense_replace = num_experts_per_tok, first_k_dense_replace


class RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(batch, length, self.heads, -1).transpose(1, 2)

        q, k = _rotate(split(self.q_proj(x))), _rotate(split(self.k_proj(x)))
        mixed = nn.functional.scaled_dot_product_attention(q, k, split(self.v_proj(x)), is_causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return out


def _rotate(x: Tensor) -> Tensor:
    """Turn pairs of features by their position."""
    length, half = x.shape[-2], x.shape[-1] // 2
    rates = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(length, device=x.device)[:, None] * rates
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


class MLP(nn.Module):
    """A gated MLP: the dense layer's, a routed expert or the shared one."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class MoEGate(nn.Module):
    """The router: a bare weight `[experts, width]`."""

    def __init__(self, width: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.chosen = chosen
        self.weight = nn.Parameter(torch.empty(experts, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        best = nn.functional.linear(x, self.weight).softmax(-1).topk(self.chosen, dim=-1)
        return best.values, best.indices


class DeepseekMoE(nn.Module):
    """Routed experts, each a module of its own, and shared ones in one module."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.moe_intermediate_size
        self.gate = MoEGate(width, config.n_routed_experts, config.num_experts_per_tok)
        self.experts = nn.ModuleList(MLP(width, inner) for _ in range(config.n_routed_experts))
        self.shared_experts = MLP(width, inner * config.n_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(flat)
        out = self.shared_experts(flat)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == number)
            out = out.index_add(0, rows, expert(flat[rows]) * weights[rows, place, None])
        return out.view_as(x)


class Layer(nn.Module):
    """One block; the first ones have no experts."""

    def __init__(self, config: DeepseekConfig, number: int) -> None:
        super().__init__()
        self.self_attn = Attention(config.hidden_size, config.num_attention_heads)
        dense = number < config.first_k_dense_replace
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if dense else DeepseekMoE(config)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class DeepseekModel(nn.Module):
    """Embedding, blocks, norm."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.norm(x)
        return out


class DeepseekForCausalLM(PreTrainedModel):
    """The whole model; `lm_head` is not tied."""

    config_class = DeepseekConfig

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        self.model = DeepseekModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding, MoEGate)):
            nn.init.normal_(module.weight, std=0.1)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids)))
