"""The small operations between products in plain torch: the reference, and the path of machines without a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from sparseforge_core.runtime.decode.cache import Cache


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of `[..., width]`, computed in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def gated(x: Tensor) -> Tensor:
    """silu(gate) * up of `[..., gate and up]`."""
    gate, up = x.chunk(2, -1)
    return functional.silu(gate) * up


def through_branch(x: Tensor, branch: Tensor, added: Tensor | None) -> Tensor:
    """added + B P x of one row x `[in]`: eq. (1)'s side branch B `[out, blocks]`, P the sums of blocks of inputs."""
    found = branch @ x.view(branch.shape[1], -1).sum(-1)
    return found if added is None else added + found


def attend(qkv: Tensor, cache: Cache, layer: int, head_norms: tuple[Tensor, Tensor] | None) -> Tensor:
    """One token a row: qkv `[batch, qkv]` -> `[batch, heads * head]`; its key and value join the cache."""
    place = int(cache.position)
    query, key, value = split_heads(qkv[:, None], cache, head_norms)
    span = slice(place, place + 1)
    query, key = turn(query, cache.cos[span], cache.sin[span]), turn(key, cache.cos[span], cache.sin[span])
    cache.keys[layer][:, :, span], cache.values[layer][:, :, span] = key, value
    seen = cache.keys[layer][:, :, : place + 1], cache.values[layer][:, :, : place + 1]
    out = functional.scaled_dot_product_attention(query, *seen, enable_gqa=True)
    return out.transpose(1, 2).reshape(qkv.shape[0], -1)


def attend_prompt(qkv: Tensor, cache: Cache, layer: int, head_norms: tuple[Tensor, Tensor] | None) -> Tensor:
    """A whole prompt: qkv `[batch, length, qkv]` -> `[batch, length, heads * head]`; it fills an empty cache.

    Of tokens at the cache's position and behind it, which fill a prompt up, keys and values are zero: a value that is
    not finite would spoil a product even where its share is 0.
    """
    length = qkv.shape[1]
    query, key, value = split_heads(qkv, cache, head_norms)
    query, key = turn(query, cache.cos[:length], cache.sin[:length]), turn(key, cache.cos[:length], cache.sin[:length])
    real = (torch.arange(length, device=qkv.device) < cache.position)[:, None]
    key, value = key.where(real, 0.0), value.where(real, 0.0)
    cache.keys[layer][:, :, :length], cache.values[layer][:, :, :length] = key, value
    out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).reshape(*qkv.shape[:2], -1)


def split_heads(qkv: Tensor, cache: Cache, head_norms: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """`[batch, length, qkv]` -> queries, keys and values `[batch, heads, length, head]`."""
    sizes = cache.sizes
    shaped = qkv.view(*qkv.shape[:2], -1, sizes.head)
    query, key, value = shaped.split([sizes.heads, sizes.kv_heads, sizes.kv_heads], dim=2)
    if head_norms is not None:
        query, key = norm(query, head_norms[0], sizes.eps), norm(key, head_norms[1], sizes.eps)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position: x `[batch, heads, length, head]` by cos and sin `[length, head / 2]`; halves are pairs."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
