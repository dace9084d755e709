"""The kernel of 8-bit moments against plain torch, by `tests/interpreted.py`.

TRITON_INTERPRET=1 python tests/core/train/eight_bit_cases.py [shapes ...]
DEVICE=cuda python tests/core/train/eight_bit_cases.py [shapes ...]
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from torch import Tensor, nn

from sparseforge_core.train import eight_bit
from sparseforge_core.train.eight_bit import EightBitAdamW, quantised, restored
from tests.interpreted import run_cases

DEVICE = torch.device(os.environ.get("DEVICE", "cpu"))
REFUSAL = functools.partial(eight_bit.refusal, on=DEVICE.type)
SHAPES = ((16, 256), (70, 96), (3, 32, 60), (64, 65))
"""Sizes that fill their blocks and programs, and that do not."""


def steps(decay: float, betas: tuple[float, float], spread: int) -> None:
    """Some steps of both, each from the plain one's state: what they leave differs by rounding alone.

    `spread` is the powers of ten that gradients of one weight lie apart.
    """
    asked: list[str | None] = []

    def where(*tensors: Tensor) -> str | None:
        asked.append(REFUSAL(*tensors))
        return asked[-1]

    torch.manual_seed(0)
    sides: list[list[nn.Parameter]] = [[nn.Parameter(torch.zeros(s, device=DEVICE)) for s in SHAPES] for _ in range(2)]
    plain, fused = sides
    with torch.no_grad():
        for weight in plain:
            weight.copy_(torch.randn(weight.shape))
    rules = [EightBitAdamW([{"params": side, "weight_decay": decay}], betas=betas, eps=1e-8) for side in sides]
    for step in range(5):
        for one, other in zip(plain, fused, strict=True):
            gradient = torch.randn(one.shape) * 10.0 ** (step - 2)
            gradient *= 10.0 ** (-spread * torch.rand(one.shape))
            gradient[torch.rand(one.shape) < 0.1] = 0.0
            one.grad, other.grad = gradient.to(DEVICE), gradient.to(DEVICE)
            if step:
                rules[1].state[other] = {key: value.clone() for key, value in rules[0].state[one].items()}
            with torch.no_grad():
                other.copy_(one)
        for rule, way in zip(rules, (lambda *_: "plain", where), strict=True):
            eight_bit.refusal = way  # type: ignore[assignment]
            rule.param_groups[0]["lr"] = 0.01
            rule.step()
        for one, other in zip(plain, fused, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
            compare(rules[0].state[one], rules[1].state[other], step + 1)
    assert asked == [None] * 5 * len(SHAPES)


def compare(one: dict[str, Tensor], other: dict[str, Tensor], step: int) -> None:
    """The states of a weight on both sides after so many steps."""
    assert float(one["step"]) == float(other["step"]) == step
    for name in ("exp_avg", "exp_avg_sq"):
        assert one[f"{name}_codes"].dtype == other[f"{name}_codes"].dtype
        torch.testing.assert_close(other[f"{name}_scales"], one[f"{name}_scales"], rtol=1e-6, atol=0.0)
        apart = (one[f"{name}_codes"].int() - other[f"{name}_codes"].int()).abs()
        assert int(apart.max()) <= 1
        assert float((apart > 0).double().mean()) < 1e-3, "codes differ at ties alone"
        read = [restored(state[f"{name}_codes"], state[f"{name}_scales"]) for state in (one, other)]
        assert torch.equal(read[0] == 0, read[1] == 0)


def shapes() -> None:
    """Several weights in one launch, with each pair of decays, and gradients of all sizes."""
    for decay, betas, spread in ((0.0, (0.9, 0.999), 0), (0.1, (0.9, 0.95), 8), (0.0, (0.0, 0.99), 3)):
        steps(decay, betas, spread)


def every_code() -> None:
    """What lies at a magnitude, midway to the next, or a rounding beside either, is given a code that is nearest."""
    for signed, name in ((True, "exp_avg"), (False, "exp_avg_sq")):
        bits = 7 if signed else 8
        at = torch.cat([eight_bit.magnitudes(bits, DEVICE), eight_bit._between(bits, DEVICE)])
        beside = torch.cat([at, torch.nextafter(at, torch.zeros_like(at)), torch.nextafter(at, torch.ones_like(at))])
        wanted = torch.cat([beside, beside.new_ones(-len(beside) % 255)]).view(-1, 255)
        rows = torch.cat([torch.ones_like(wanted[:, :1]), wanted], 1)  # the largest of each block is 1
        rows = torch.cat([rows] * (1 + eight_bit.SMALL // rows.numel()))
        codes, scales = quantised(rows, signed=signed)
        # A step whose decays are 0 and whose gradient is the moment itself, or its root, keeps just that.
        weight = nn.Parameter(torch.zeros_like(rows))
        rule = EightBitAdamW([{"params": [weight]}], betas=(0.0, 0.0), eps=1.0)
        weight.grad = rows if signed else rows.sqrt()
        eight_bit.refusal = REFUSAL  # type: ignore[assignment]
        rule.step()
        found = rule.state[weight][f"{name}_codes"]
        exact = torch.ones_like(rows, dtype=torch.bool) if signed else (weight.grad * weight.grad) == rows
        assert bool(exact.float().mean() > 0.2)  # of roots whose squares give back what they were taken of
        apart = [(restored(some, scales) - rows).abs()[exact] for some in (found, codes)]
        assert bool((apart[0] <= apart[1] + 1e-6 * rows[exact]).all())
        assert signed or torch.equal(found[exact] == 0, rows[exact] == 0)
        assert bool((found[exact] == codes[exact]).float().mean() > 0.7), "but for ties it is the code of plain torch"


def nothing_seen() -> None:
    """Gradients of zero leave codes, scales and weights alone."""
    weight = nn.Parameter(torch.randn(64, 80, device=DEVICE))
    before = weight.detach().clone()
    rule = EightBitAdamW([{"params": [weight]}], betas=(0.9, 0.95), eps=1e-8)
    eight_bit.refusal = REFUSAL  # type: ignore[assignment]
    rule.param_groups[0]["lr"] = 0.1
    for _ in range(2):
        weight.grad = torch.zeros_like(weight)
        rule.step()
    assert torch.equal(weight, before)
    assert not any(value.any() for key, value in rule.state[weight].items() if key != "step")


CASES = {"shapes": shapes, "every-code": every_code, "nothing-seen": nothing_seen}

if __name__ == "__main__":
    run_cases(CASES)
