"""Attention of one decode step over the cache: each program reads one stretch, the last of a head adds them up.

Queries that share keys are the rows of a program. Where programs are few, each has its own queries alone and multiplies
in float32 (`DOTS` false). Where they are many (rows of a batch, long texts), a program must cost little beside its
reading: queries are filled up to 16 rows of a product on tensor cores, so that several programs fit a multiprocessor
and the loads of later blocks run ahead.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton reads the arguments of its functions itself, and has no types for them.

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _turned(head, partner, at, other, scale, cos, sin, eps, HEAD: tl.constexpr, NORMED: tl.constexpr):
    """Heads `[rows, head]` normed, if the model does so, and turned; `partner` holds the other half's values."""
    if NORMED:
        root = tl.rsqrt(tl.sum(head * head, 1) / HEAD + eps)[:, None]
        head = head * root * tl.load(scale + at).to(tl.float32)[None, :]
        partner = partner * root * tl.load(scale + other).to(tl.float32)[None, :]
    sign = tl.where(at < HEAD // 2, -1.0, 1.0)
    return head * cos[None, :] + (sign * sin)[None, :] * partner


@triton.jit
def _add_up(base, target, active, real, whole, group, STRETCHES: tl.constexpr, PADDED: tl.constexpr,
            HEAD: tl.constexpr, TOGETHER: tl.constexpr):  # fmt: skip
    """The sums of all stretches of a pair into its rows of the output."""
    highest = tl.full([PADDED], float("-inf"), tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    mixed = tl.zeros([PADDED, HEAD], tl.float32)
    for first in range(0, STRETCHES, TOGETHER):
        which = first + tl.arange(0, TOGETHER)
        there = (which < active)[:, None]
        other = base + (which[:, None] * PADDED + group[None, :]) * (HEAD + 2)
        tops = tl.load(other + HEAD, mask=there, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(other + HEAD + 1, mask=there, other=0.0, cache_modifier=".cg")
        pieces = tl.load(
            other[:, :, None] + whole[None, None, :], mask=there[:, :, None], other=0.0, cache_modifier=".cg"
        )
        higher = tl.maximum(highest, tl.max(tops, 0))
        share = tl.exp2(tops - higher[None, :])
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(sums * share, 0)
        mixed = mixed * fade[:, None] + tl.sum(pieces * share[:, :, None], 0)
        highest = higher
    tl.store(target, (mixed / total[:, None]).to(target.dtype.element_ty), mask=real)


@triton.jit
def attend(
    qkv, keys, values, cos_table, sin_table, position, out, partial, counters, q_norm, k_norm, eps, scale, capacity,
    KV: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, HEAD: tl.constexpr, STRETCH: tl.constexpr,
    STRETCHES: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr, NORMED: tl.constexpr, ROWS: tl.constexpr,
    DOTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One stretch of one pair of text and key head; the last of a pair adds the stretches up."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    pair = tl.program_id(0)
    stretch = tl.program_id(1)
    place = tl.load(position)
    begin = stretch * STRETCH
    if (stretch > 0) & (begin >= place):
        return
    HALF: tl.constexpr = HEAD // 2
    row = (pair // KV).to(tl.int64) * ((GROUP * KV + 2 * KV) * HEAD)
    kv = pair % KV
    lane = tl.arange(0, ROWS)
    whole = tl.arange(0, HEAD)
    half = tl.arange(0, HALF)
    partner = (whole + HALF) % HEAD
    cos = tl.load(cos_table + place * HALF + whole % HALF)
    sin = tl.load(sin_table + place * HALF + whole % HALF)
    at = row + (kv * GROUP + lane[:, None]) * HEAD
    mine = lane[:, None] < GROUP
    q = tl.load(qkv + at + whole[None, :], mask=mine, other=0.0).to(tl.float32)
    q_partner = tl.load(qkv + at + partner[None, :], mask=mine, other=0.0).to(tl.float32)
    q = _turned(q, q_partner, whole, partner, q_norm, cos, sin, eps, HEAD, NORMED)
    if DOTS:
        q = q.to(keys.dtype.element_ty)
    else:
        low, high = tl.split(tl.permute(tl.reshape(q, (ROWS, 2, HALF)), (0, 2, 1)))
    held = pair.to(tl.int64) * capacity * HEAD

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, HEAD], tl.float32)
    if stretch == 0:  # the new token: turned, stored as it will be read, and seen
        one = tl.zeros([1, HEAD], tl.int32)
        new = row + (GROUP * KV + kv) * HEAD
        k = tl.load(qkv + new + one + whole[None, :]).to(tl.float32)
        k_partner = tl.load(qkv + new + one + partner[None, :]).to(tl.float32)
        k = _turned(k, k_partner, whole, partner, k_norm, cos, sin, eps, HEAD, NORMED).to(keys.dtype.element_ty)
        tl.store(keys + held + place * HEAD + one + whole[None, :], k)
        v = tl.load(qkv + new + KV * HEAD + whole)
        tl.store(values + held + place * HEAD + whole, v)
        highest = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale
        total += 1.0
        mixed += v.to(tl.float32)[None, :]

    for start in range(0, STRETCH, BLOCK):
        token = begin + start + tl.arange(0, BLOCK)
        seen = (token < place)[:, None]
        place_of = held + token[:, None] * HEAD
        old_values = tl.load(values + place_of + whole[None, :], mask=seen, other=0.0)
        if DOTS:
            old_keys = tl.load(keys + place_of + whole[None, :], mask=seen, other=0.0)
            score = tl.dot(q, tl.trans(old_keys), input_precision="ieee") * scale
        else:  # half by half: a sum over half as many threads
            first_half = tl.load(keys + place_of + half[None, :], mask=seen, other=0.0).to(tl.float32)
            second_half = tl.load(keys + place_of + HALF + half[None, :], mask=seen, other=0.0).to(tl.float32)
            terms = low[:, None, :] * first_half[None, :, :] + high[:, None, :] * second_half[None, :, :]
            score = tl.sum(terms, 2) * scale
        score = tl.where((token < place)[None, :], score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        share = tl.exp2(score - higher[:, None])
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(share, 1)
        if DOTS:
            added = tl.dot(share.to(old_values.dtype), old_values, input_precision="ieee")
        else:
            added = tl.sum(share[:, :, None] * old_values.to(tl.float32)[None, :, :], 1)
        mixed = mixed * fade[:, None] + added
        highest = higher

    first = out + (pair // KV).to(tl.int64) * GROUP * KV * HEAD + kv * GROUP * HEAD
    active = tl.maximum(1, tl.cdiv(place, STRETCH))
    if active == 1:
        target = first + lane[:, None] * HEAD + whole[None, :]
        tl.store(target, (mixed / total[:, None]).to(out.dtype.element_ty), mask=mine)
    else:
        base = partial + (pair * STRETCHES).to(tl.int64) * PADDED * (HEAD + 2)
        own = base + (stretch * PADDED + lane) * (HEAD + 2)
        tl.store(own[:, None] + whole[None, :], mixed, mask=mine)
        tl.store(own + HEAD, highest, mask=lane < GROUP)
        tl.store(own + HEAD + 1, total, mask=lane < GROUP)
        tl.debug_barrier()  # all of this program is written before it says so
        done = tl.atomic_add(counters + pair, 1, sem="acq_rel", scope="gpu")
        if done == active - 1:
            group = tl.arange(0, PADDED)
            target = first + group[:, None] * HEAD + whole[None, :]
            real = group[:, None] < GROUP
            _add_up(base, target, active, real, whole, group, STRETCHES, PADDED, HEAD, TOGETHER)
            tl.store(counters + pair, 0)
