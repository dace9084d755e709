"""What the static loop takes of a loaded model: its sizes, norms and products; or the sentence why it cannot.

The matrices that read one input are one product: q, k and v, and gate and up. Their rows are concatenated, each row
is computed as before, and the model's own modules become views of the concatenation, so that nothing is held twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseforge_core.errors import UnsupportedModel
from sparseforge_core.runtime.decode.products import Maker, Product

DRIVEN = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Classes whose block is: norm, rotary attention, residual, norm, gated MLP, residual."""

FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Rotary types whose angles do not depend on the length of the text."""


@dataclass(frozen=True)
class Sizes:
    """The numbers of a model that the loop and its memory follow from."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head: int
    """Width of one head."""
    wide: int
    """Width of the MLP."""
    vocabulary: int
    positions: int
    eps: float

    @property
    def qkv(self) -> int:
        """Rows of the product that makes queries, keys and values."""
        return (self.heads + 2 * self.kv_heads) * self.head

    def cache_bytes(self, batch: int, capacity: int, itemsize: int) -> int:
        """Keys and values of `capacity` tokens a row."""
        return 2 * self.layers * batch * self.kv_heads * capacity * self.head * itemsize

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """From a configuration of transformers."""
        heads = int(config.num_attention_heads)
        return cls(
            layers=int(config.num_hidden_layers),
            width=int(config.hidden_size),
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            wide=int(config.intermediate_size),
            vocabulary=int(config.vocab_size),
            positions=int(config.max_position_embeddings),
            eps=float(config.rms_norm_eps),
        )


@dataclass(frozen=True)
class Block:
    """One layer."""

    norm: Tensor
    qkv: Product
    out: Product
    mlp_norm: Tensor
    gate_up: Product
    down: Product
    head_norms: tuple[Tensor, Tensor] | None = None
    """Of queries and keys, where the model has them."""


@dataclass(frozen=True)
class Parts:
    """A whole model."""

    sizes: Sizes
    embedding: Tensor
    blocks: list[Block]
    norm: Tensor
    head: Product
    cos: Tensor
    """`[positions, head / 2]`, float32, times the rotary type's own factor."""
    sin: Tensor

    @property
    def products(self) -> list[Product]:
        """Every product of a step, in its order."""
        return [p for b in self.blocks for p in (b.qkv, b.out, b.gate_up, b.down)] + [self.head]

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a decode step reads: all but the embedding, of which it reads a row."""
        return sum(product.nbytes for product in self.products)


def refusal(model: Any) -> str | None:
    """Why the static loop cannot drive a model, or None. The ordinary cache of transformers drives every model."""
    name, config = type(model).__name__, model.config
    if name not in DRIVEN:
        return f"the static cache drives {', '.join(DRIVEN)}, not {name}"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        return f"the static cache has no sliding window, and this model's attention has one of {window} tokens"
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotation not in FIXED_ROTATIONS:
        return f"the static cache turns keys once, and rotary type {rotation!r} depends on the length of the text"
    if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
        return f"the static loop's MLP is gated by silu, and this model's by {config.hidden_act}"
    head = Sizes.of(config).head
    if head & (head - 1) or head < 16:
        return f"the static loop needs heads of 16, 32, 64, ... values, and this model's have {head}"
    return None


@torch.no_grad()
def parts_of(model: Any, maker: Maker) -> Parts:
    """Take a model apart; `maker` makes its products. Raises UnsupportedModel with the sentence of `refusal`."""
    why = refusal(model)
    if why is not None:
        raise UnsupportedModel(f"{why}; use the ordinary cache")
    sizes, body = Sizes.of(model.config), model.model
    blocks = []
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        norms = (attention.q_norm.weight, attention.k_norm.weight) if hasattr(attention, "q_norm") else None
        blocks.append(
            Block(
                norm=layer.input_layernorm.weight,
                qkv=maker([attention.q_proj, attention.k_proj, attention.v_proj], "qkv"),
                out=maker([attention.o_proj], "o"),
                mlp_norm=layer.post_attention_layernorm.weight,
                gate_up=maker([mlp.gate_proj, mlp.up_proj], "gate_up"),
                down=maker([mlp.down_proj], "down"),
                head_norms=norms,
            )
        )
    embedding = body.embed_tokens.weight
    cos, sin = rotary(body.rotary_emb, sizes.positions, embedding.device)
    return Parts(sizes, embedding, blocks, body.norm.weight, maker([model.lm_head], "head"), cos, sin)


def rotary(module: Any, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, as the model's own module computes them."""
    frequencies = module.inv_freq.to(device, torch.float32)
    angles = torch.arange(positions, device=device, dtype=torch.float32)[:, None] * frequencies[None, :]
    return angles.cos() * module.attention_scaling, angles.sin() * module.attention_scaling
