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
        width: int = 64,
        layers: int = 2,
        heads: int = 2,
        positions: int = 64,
        experts: int = 4,
        chosen: int = 2,
        **rest: Any,
    ) -> None:
        super().__init__(**rest)
        self.vocab_size = vocab_size
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = width, layers, heads
        self.max_position_embeddings = positions
        self.n_routed_experts, self.num_experts_per_tok = experts, chosen
        self.width, self.layers, self.heads, self.positions = width, layers, heads, positions
        self.experts, self.chosen = experts, chosen


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

    def __init__(self, width: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.gate = MoEGate(width, experts, chosen)
        self.experts = nn.ModuleList(MLP(width, width // 2) for _ in range(experts))
        self.shared_experts = MLP(width, width)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(flat)
        out = self.shared_experts(flat)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == number)
            out = out.index_add(0, rows, expert(flat[rows]) * weights[rows, place, None])
        return out.view_as(x)


class Layer(nn.Module):
    """One block; the first has no experts."""

    def __init__(self, config: DeepseekConfig, number: int) -> None:
        super().__init__()
        self.self_attn = Attention(config.width, config.heads)
        self.mlp: nn.Module = MLP(config.width, 2 * config.width)
        if number:
            self.mlp = DeepseekMoE(config.width, config.experts, config.chosen)
        self.input_layernorm = RMSNorm(config.width)
        self.post_attention_layernorm = RMSNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class DeepseekModel(nn.Module):
    """Embedding, blocks, norm."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.layers))
        self.norm = RMSNorm(config.width)

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
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding, MoEGate)):
            nn.init.normal_(module.weight, std=0.1)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids)))
