"""What must hold before benchmarks/decode.py times anything: the kernels' numbers are those of plain torch."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.decode_models import Sides, random_parts, rotations, sparse_side
from benchmarks.decode_report import Machine, Report
from sparseforge_core.runtime.decode import plain
from sparseforge_core.runtime.decode.cache import Cache
from sparseforge_core.runtime.decode.loop import Decoder
from sparseforge_core.runtime.decode.parts import Block
from sparseforge_core.runtime.decode.products import Dense, Product


@torch.no_grad()
def same_numbers(report: Report, sides: Sides, machine: Machine) -> None:
    """The kernels' step against plain torch on the unpacked weights, in one model of two layers."""
    if sides.sizes is None:
        return
    sizes = replace(sides.sizes, layers=2, positions=min(1024, sides.sizes.positions))
    make = sparse_side(machine.device, sides.dtype, machine.steps, block=None, mode="decode")
    parts = random_parts(sizes, make, machine.device, sides.dtype)
    plainly = replace(parts, blocks=[unpacked(block) for block in parts.blocks], head=unpacked_product(parts.head))
    for name, batch, length in (("batch_1", 1, 100), ("long", 1, 2 * sizes.positions // 3), ("batch_4", 4, 100)):
        tokens = torch.randint(0, sizes.vocabulary, (batch, length), device=machine.device)
        capacity = sizes.positions if name == "long" else 256
        fast = Decoder(parts, batch=batch, capacity=capacity, steps=machine.steps)
        slow = Decoder(plainly, batch=batch, capacity=capacity, graph=False)
        worst = 0.0
        for step in range(12):
            for decoder in (fast, slow):
                if step == 0:
                    for _ in range(1 if decoder is slow else 3):  # the third prompt of a size is the replay of a graph
                        decoder.prefill(tokens)
                else:
                    decoder.step()
            error = (fast.logits.double() - slow.logits.double()).norm() / slow.logits.double().norm()
            worst = max(worst, float(error))
            following = slow.tokens.clone()
            for decoder in (fast, slow):
                decoder.put(following)
        report.add(f"decode_logits_error.{name}", worst, "of the norm of the logits")
        if not worst < 2e-2:
            raise ArithmeticError(f"{name}: the kernels' logits are off by {worst:.3g} of their norm")


@torch.no_grad()
def same_attention(report: Report, sides: Sides, machine: Machine) -> None:
    """Both kernels of attention against plain torch in float32, where queries look at few keys; and what they store."""
    if sides.sizes is None or not machine.cuda:
        return
    sizes, usual = replace(sides.sizes, layers=1, positions=2048), machine.steps.CROWDED
    cos, sin = rotations(sizes, machine.device)
    for batch, place, capacity in ((1, 200, 256), (1, 1000, 1024), (1, 64, 1024), (4, 100, 256), (16, 300, 320)):
        like = torch.empty(batch, sizes.kv_heads, capacity, sizes.head, device=machine.device, dtype=sides.dtype)
        qkv = 2.0 * torch.randn(batch, sizes.qkv, device=machine.device, dtype=sides.dtype)
        keys, values = torch.randn_like(like), torch.randn_like(like)
        found = []
        for limit in (None, 0, 2**30):
            position = torch.full((1,), place, dtype=torch.int32, device=machine.device)
            kind = torch.float32 if limit is None else sides.dtype
            cache = Cache(sizes, [keys.to(kind, copy=True)], [values.to(kind, copy=True)], cos, sin, position)
            if limit is not None:
                machine.steps.CROWDED = limit  # type: ignore[attr-defined]
            out = (plain if limit is None else machine.steps).attend(qkv.to(kind), cache, 0, None)
            seen = slice(0, place + 1)
            found.append((out, cache.keys[0][:, :, seen], cache.values[0][:, :, seen]))
        machine.steps.CROWDED = usual  # type: ignore[attr-defined]
        for name, other in (("crowded", found[1]), ("uncrowded", found[2])):
            errors = [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(other, found[0])]
            report.add(f"attention_error.{name}.{batch}x{place}", max(errors), "of the norm")
            if not max(errors) < 1.5e-2:
                raise ArithmeticError(f"{name} attention, {batch} x {place}: off by {errors}")


def unpacked(block: Block) -> Block:
    """A layer with plain dense products of the same weights."""
    named = {name: unpacked_product(getattr(block, name)) for name in ("qkv", "out", "gate_up", "down")}
    return replace(block, **named)


def unpacked_product(product: Product) -> Product:
    """One of them."""
    weight = product.weight if isinstance(product, Dense) else product.kernel.dense()  # type: ignore[attr-defined]
    return Dense(weight, None, product.name)
