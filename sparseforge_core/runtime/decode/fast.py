"""The small operations between products as Triton kernels: the same functions as `plain`, few launches, no host.

A decode step attends in one launch a layer: each program turns its queries, reads one stretch of the cache, and the
last to finish of a head adds the stretches up; the program of the first stretch turns the new key and stores it.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton reads the arguments of its functions itself, and has no types for them.

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparseforge_core.runtime.decode import attention

if TYPE_CHECKING:
    from sparseforge_core.runtime.decode.cache import Cache

LOG2_E = 1.4426950408889634

PROGRAMS = 1056
"""How many programs fill a large GPU: 8 on each of 132 multiprocessors. It chooses the length of a stretch."""

SHORTEST, LONGEST = 64, 1024
"""Tokens in a stretch."""

CROWDED = 264
"""Programs that still run side by side, two on a multiprocessor: beyond, each must cost little beside its reading."""

EARLY = True
"""Whether a kernel is launched before the one ahead of it has ended and waits by itself (GPUs of generation 9 on).

It lets the one behind it begin at once: the products fetch their first weights while these small kernels run.
"""


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of `[..., width]`, computed in float32."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, width = out.numel() // out.shape[-1], out.shape[-1]
    flat = x.reshape(rows, width)
    block = triton.next_power_of_2(width)
    _norm[(rows,)](flat, weight, out, width, flat.stride(0), eps, BLOCK=block, num_warps=_warps(block), **_early(x))
    return out


def gated(x: Tensor) -> Tensor:
    """silu(gate) * up of `[..., gate and up]`."""
    wide = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], wide)
    rows = out.numel() // wide
    grid = rows, triton.cdiv(wide, 1024)
    _gated[grid](x.reshape(rows, 2 * wide), out, wide, BLOCK=1024, num_warps=4, **_early(x))
    return out


def through_branch(x: Tensor, branch: Tensor, added: Tensor | None) -> Tensor:
    """added + B P x of one row x `[in]`: eq. (1)'s side branch B `[out, blocks]`, P the sums of blocks of inputs."""
    out, blocks = branch.shape
    y = branch.new_empty(out)
    block, rows = x.numel() // blocks, 32
    _branch[(triton.cdiv(out, rows),)](
        x, branch, branch if added is None else added, y, out, BLOCKS=blocks, BLOCK=block, ROWS=rows,
        PADDED=triton.next_power_of_2(blocks), WIDE=triton.next_power_of_2(block), ADDED=added is not None, num_warps=8,
        **_early(x),
    )  # fmt: skip
    return y


def attend(qkv: Tensor, cache: Cache, layer: int, head_norms: tuple[Tensor, Tensor] | None) -> Tensor:
    """One token a row: qkv `[batch, qkv]` -> `[batch, heads * head]`; its key and value join the cache."""
    sizes, batch = cache.sizes, qkv.shape[0]
    pairs, group = batch * sizes.kv_heads, sizes.heads // sizes.kv_heads
    stretch = stretch_of(pairs, cache.capacity)
    stretches, padded = triton.cdiv(cache.capacity, stretch), triton.next_power_of_2(group)
    partial, counters = _scratch(cache, pairs, stretches, padded)
    out = qkv.new_empty(batch, sizes.heads * sizes.head)
    norms: Any = head_norms or (qkv, qkv)  # not read where there are none
    given = (
        qkv, cache.keys[layer], cache.values[layer], cache.cos, cache.sin, cache.position, out, partial, counters,
        *norms, sizes.eps, LOG2_E * sizes.head**-0.5, cache.capacity,
    )  # fmt: skip
    sizes_of = {
        "KV": sizes.kv_heads, "GROUP": group, "PADDED": padded, "HEAD": sizes.head, "STRETCH": stretch,
        "STRETCHES": stretches, "TOGETHER": min(max(1, 8 // padded), triton.next_power_of_2(stretches)),
        "NORMED": head_norms is not None, **_early(qkv),
    }  # fmt: skip
    if pairs * stretches > CROWDED:
        how = {"ROWS": max(16, padded), "BLOCK": min(stretch, 32), "num_warps": 4, "num_stages": 3}
    else:
        how = {"ROWS": padded, "BLOCK": min(stretch, max(8, 64 // padded)), "num_warps": 8}
    dots = pairs * stretches > CROWDED
    attention.attend[(pairs, stretches)](*given, **sizes_of, **how, DOTS=dots)
    return out


def attend_prompt(qkv: Tensor, cache: Cache, layer: int, head_norms: tuple[Tensor, Tensor] | None) -> Tensor:
    """A whole prompt: qkv `[batch, length, qkv]`, changed in place -> `[batch, length, heads * head]`.

    Keys and values of tokens from the cache's position on are zero, as in `plain`.
    """
    sizes, (batch, length, _) = cache.sizes, qkv.shape
    norms: Any = head_norms or (qkv, qkv)
    several = 16
    _turn[(batch * length, triton.cdiv(sizes.heads + 2 * sizes.kv_heads, several))](
        qkv, cache.keys[layer], cache.values[layer], cache.cos, cache.sin, cache.position, *norms, sizes.eps, length,
        cache.capacity,
        HEADS=sizes.heads, KV=sizes.kv_heads, HEAD=sizes.head, SEVERAL=several, NORMED=head_norms is not None,
        num_warps=4, **_early(qkv),
    )  # fmt: skip
    query = qkv[..., : sizes.heads * sizes.head].unflatten(-1, (sizes.heads, sizes.head)).transpose(1, 2)
    seen = cache.keys[layer][:, :, :length], cache.values[layer][:, :, :length]
    out = functional.scaled_dot_product_attention(
        query, *seen, is_causal=True, enable_gqa=sizes.heads != sizes.kv_heads
    )
    return out.transpose(1, 2).reshape(batch, length, -1)


def stretch_of(pairs: int, capacity: int) -> int:
    """Tokens that one program reads: all programs together fill the device."""
    wanted: int = triton.next_power_of_2(triton.cdiv(capacity * pairs, PROGRAMS))
    whole: int = triton.next_power_of_2(capacity)
    return max(SHORTEST, min(LONGEST, wanted, whole))


def _scratch(cache: Cache, pairs: int, stretches: int, padded: int) -> tuple[Tensor, Tensor]:
    """Unfinished sums `[pairs, stretches, group, head + 2]`, and how many of each pair's stretches are done."""
    if "partial" not in cache.scratch:
        like = cache.position
        shape = (pairs, stretches, padded, cache.sizes.head + 2)
        cache.scratch["partial"] = torch.zeros(shape, dtype=torch.float32, device=like.device)
        cache.scratch["counters"] = torch.zeros(pairs, dtype=torch.int32, device=like.device)
    return cache.scratch["partial"], cache.scratch["counters"]


def _early(x: Tensor) -> dict[str, bool]:
    """The options of a launch that may begin early."""
    early = EARLY and x.is_cuda and _generation(x.device) >= 9
    return {"EARLY": early, "launch_pdl": early}


@functools.cache
def _generation(device: torch.device) -> int:
    major: int = torch.cuda.get_device_capability(device)[0]
    return major


def _warps(block: int) -> int:
    return max(1, min(16, block // 512))


@triton.jit
def _norm(x, weight, out, width, stride, eps, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    scale = tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    value = tl.load(x + row * stride + at, mask=at < width, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    tl.store(out + row * width + at, (value * scale).to(out.dtype.element_ty), mask=at < width)


@triton.jit
def _gated(x, out, wide, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * 2 * wide + at, mask=at < wide, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * wide + wide + at, mask=at < wide, other=0.0).to(tl.float32)
    tl.store(out + row * wide + at, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=at < wide)


@triton.jit
def _branch(
    x, branch, added, y, out, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
    WIDE: tl.constexpr, ADDED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.arange(0, PADDED)
    wide = tl.arange(0, WIDE)
    real = (row < out)[:, None] & (block < BLOCKS)[None, :]
    if EARLY:
        gdc_launch_dependents()
    factor = tl.load(branch + row[:, None] * BLOCKS + block[None, :], mask=real, other=0.0).to(tl.float32)
    if EARLY:
        gdc_wait()
    inside = (block < BLOCKS)[:, None] & (wide < BLOCK)[None, :]
    total = tl.sum(tl.load(x + block[:, None] * BLOCK + wide[None, :], mask=inside, other=0.0).to(tl.float32), 1)
    found = tl.sum(factor * total[None, :], 1)
    if ADDED:
        found += tl.load(added + row, mask=row < out, other=0.0).to(tl.float32)
    tl.store(y + row, found.to(y.dtype.element_ty), mask=row < out)


@triton.jit
def _turned(first, second, cos, sin, scale, eps, HEAD: tl.constexpr, NORMED: tl.constexpr):
    """Both halves of heads `[heads, head / 2]`, normed if the model does so, turned by their position.

    A thread holds both values of a pair, so that a prompt's queries can be turned in place.
    """
    half = tl.arange(0, HEAD // 2)
    if NORMED:
        root = tl.rsqrt(tl.sum(first * first + second * second, 1) / HEAD + eps)[:, None]
        first = first * root * tl.load(scale + half).to(tl.float32)[None, :]
        second = second * root * tl.load(scale + HEAD // 2 + half).to(tl.float32)[None, :]
    return first * cos[None, :] - second * sin[None, :], second * cos[None, :] + first * sin[None, :]


@triton.jit
def _turn(
    qkv, keys, values, cos_table, sin_table, position, q_norm, k_norm, eps, length, capacity,
    HEADS: tl.constexpr, KV: tl.constexpr, HEAD: tl.constexpr, SEVERAL: tl.constexpr, NORMED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0)
    HALF: tl.constexpr = HEAD // 2
    place = token % length
    filling = place >= tl.load(position)
    half = tl.arange(0, HALF)
    head = tl.program_id(1) * SEVERAL + tl.arange(0, SEVERAL)[:, None]
    cos = tl.load(cos_table + place * HALF + half)
    sin = tl.load(sin_table + place * HALF + half)
    at = token.to(tl.int64) * ((HEADS + 2 * KV) * HEAD) + head * HEAD + half[None, :]
    real = head < HEADS + 2 * KV
    first = tl.load(qkv + at, mask=real, other=0.0).to(tl.float32)
    second = tl.load(qkv + at + HALF, mask=real, other=0.0).to(tl.float32)
    q1, q2 = _turned(first, second, cos, sin, q_norm, eps, HEAD, NORMED)
    is_query = head < HEADS
    tl.store(qkv + at, q1.to(qkv.dtype.element_ty), mask=is_query)
    tl.store(qkv + at + HALF, q2.to(qkv.dtype.element_ty), mask=is_query)
    k1, k2 = _turned(first, second, cos, sin, k_norm, eps, HEAD, NORMED)
    batch_row = (token // length).to(tl.int64)
    is_key = (head >= HEADS) & (head < HEADS + KV)
    k1, k2 = tl.where(filling, 0.0, k1), tl.where(filling, 0.0, k2)
    v1, v2 = tl.where(filling, 0.0, first), tl.where(filling, 0.0, second)
    kept = ((batch_row * KV + head - HEADS) * capacity + place) * HEAD + half[None, :]
    tl.store(keys + kept, k1.to(keys.dtype.element_ty), mask=is_key)
    tl.store(keys + kept + HALF, k2.to(keys.dtype.element_ty), mask=is_key)
    is_value = (head >= HEADS + KV) & real
    kept = ((batch_row * KV + head - HEADS - KV) * capacity + place) * HEAD + half[None, :]
    tl.store(values + kept, v1.to(values.dtype.element_ty), mask=is_value)
    tl.store(values + kept + HALF, v2.to(values.dtype.element_ty), mask=is_value)
