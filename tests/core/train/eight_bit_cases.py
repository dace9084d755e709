"""The kernel of 8-bit moments against plain torch, by `tests/interpreted.py`."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from torch import nn

from sparseforge_core.train import eight_bit
from sparseforge_core.train.eight_bit import EightBitAdamW, restored
from tests.interpreted import run_cases

REFUSAL = eight_bit.refusal


def steps(shape: tuple[int, ...], *, decay: float, betas: tuple[float, float]) -> None:
    """Some steps of both, each from the plain one's state: what they leave differs by rounding alone."""
    asked: list[str | None] = []

    def on_cpu(weight: torch.Tensor, gradient: torch.Tensor) -> str | None:
        asked.append(REFUSAL(weight, gradient, on="cpu"))
        return asked[-1]

    torch.manual_seed(0)
    plain, fused = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
    with torch.no_grad():
        plain.copy_(torch.randn(shape))
    rules = [EightBitAdamW([{"params": [p], "weight_decay": decay}], betas=betas, eps=1e-8) for p in (plain, fused)]
    for step in range(5):
        gradient = torch.randn(shape) * 10.0 ** (step - 2)
        gradient[torch.rand(shape) < 0.1] = 0.0
        if step:
            rules[1].state[fused] = {key: value.clone() for key, value in rules[0].state[plain].items()}
        with torch.no_grad():
            fused.copy_(plain)
        for rule, parameter, way in zip(rules, (plain, fused), (lambda *_: "plain", on_cpu), strict=True):
            eight_bit.refusal = way  # type: ignore[assignment]
            parameter.grad = gradient.clone()
            rule.param_groups[0]["lr"] = 0.01
            rule.step()
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
        one, other = rules[0].state[plain], rules[1].state[fused]
        assert float(one["step"]) == float(other["step"]) == step + 1
        for name in ("exp_avg", "exp_avg_sq"):
            assert one[f"{name}_codes"].dtype == other[f"{name}_codes"].dtype
            torch.testing.assert_close(other[f"{name}_scales"], one[f"{name}_scales"], rtol=1e-6, atol=0.0)
            apart = (one[f"{name}_codes"].int() - other[f"{name}_codes"].int()).abs()
            assert int(apart.max()) <= 1
            assert float((apart > 0).double().mean()) < 1e-3, "codes differ at ties alone"
            read = [restored(state[f"{name}_codes"], state[f"{name}_scales"]) for state in (one, other)]
            assert torch.equal(read[0] == 0, read[1] == 0)
    assert asked == [None] * 5


def shapes() -> None:
    """Sizes that fill their blocks and programs, and that do not."""
    for shape, (decay, betas) in itertools.product(
        ((16, 256), (70, 90), (3, 33, 60)), ((0.0, (0.9, 0.999)), (0.1, (0.9, 0.95)), (0.0, (0.0, 0.99)))
    ):
        steps(shape, decay=decay, betas=betas)


def nothing_seen() -> None:
    """Gradients of zero leave codes, scales and weights alone."""
    weight = nn.Parameter(torch.randn(64, 80))
    before = weight.detach().clone()
    rule = EightBitAdamW([{"params": [weight]}], betas=(0.9, 0.95), eps=1e-8)
    eight_bit.refusal = lambda weight, gradient: REFUSAL(weight, gradient, on="cpu")  # type: ignore[assignment]
    rule.param_groups[0]["lr"] = 0.1
    for _ in range(2):
        weight.grad = torch.zeros_like(weight)
        rule.step()
    assert torch.equal(weight, before)
    assert not any(value.any() for key, value in rule.state[weight].items() if key != "step")


CASES = {"shapes": shapes, "nothing-seen": nothing_seen}

if __name__ == "__main__":
    run_cases(CASES)
