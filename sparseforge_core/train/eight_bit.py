"""AdamW whose two moments are kept in 8 bits an entry: block-wise dynamic quantisation (arXiv 2110.02861).

A block of 256 entries shares one float32 scale, its largest magnitude; an entry is the code of the nearest of a fixed
list of magnitudes, dense near zero (section 1.3 there: a code's leading zeros are a power of ten, the rest a linear
fraction). 2.03 bytes a weight instead of 8. Each step reads the moments back into float32, computes exactly with them,
and keeps them rounded. Small tensors and embeddings keep float32, as the paper does.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from sparseforge_core.sparsity.fused import available

BLOCK = 256
"""Entries that share a scale."""

BYTES = 2 + 8 / BLOCK
"""Of a weight: two codes, and two float32 scales for each block."""

SMALL = 4096
"""Tensors with fewer entries keep their moments in float32."""


@functools.cache
def magnitudes(bits: int, device: torch.device) -> Tensor:
    """The magnitudes in [0, 1] that codes of so many bits stand for, ascending; code 0 is 0, the last one is 1."""
    values = [0.0]
    for zeros in reversed(range(bits)):
        count = 2 ** (bits - 1 - zeros)
        values += [10.0**-zeros * (0.1 + 0.9 * (i + 0.5) / count) for i in range(count)]
    values[-1] = 1.0
    return torch.tensor(values, dtype=torch.float32, device=device)


@functools.cache
def _between(bits: int, device: torch.device) -> Tensor:
    """Midway between neighbouring magnitudes."""
    values = magnitudes(bits, device)
    return 0.5 * (values[1:] + values[:-1])


@functools.cache
def _bounds(bits: int, device: torch.device) -> Tensor:
    """`_between` of codes, with an infinity at both ends: code c is right from the c-th of these to the next."""
    return nn.functional.pad(nn.functional.pad(_between(bits, device), (1, 0), value=-math.inf), (0, 1), value=math.inf)


def _in_blocks(x: Tensor) -> Tensor:
    """`[blocks, BLOCK]` of a tensor, zeros behind its end."""
    flat = x.flatten()
    missing = -flat.numel() % BLOCK
    return (nn.functional.pad(flat, (0, missing)) if missing else flat).view(-1, BLOCK)


def quantised(x: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes of `x` in its shape, int8 or for `signed=False` (x must not be negative) uint8, and scales `[blocks]`.

    What is not 0 keeps a code that is not 0 where there is no sign: a second moment of 0 under a first one that is not
    would make a step without bound.
    """
    blocks = _in_blocks(x)
    scales = blocks.abs().amax(1)
    shares = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(shares.abs(), _between(7 if signed else 8, x.device), out_int32=True)
    if signed:
        codes = torch.where(shares < 0, -codes, codes)
    else:
        codes = torch.where(blocks > 0, codes.clamp_min(1), codes)
    return codes.to(torch.int8 if signed else torch.uint8).flatten()[: x.numel()].view(x.shape), scales


def restored(codes: Tensor, scales: Tensor) -> Tensor:
    """What codes and scales stand for, float32 in the codes' shape."""
    signed = codes.dtype == torch.int8
    blocks = _in_blocks(codes).int()
    found = magnitudes(7 if signed else 8, codes.device)[blocks.abs()] * scales[:, None]
    if signed:
        found = torch.where(blocks < 0, -found, found)
    return found.flatten()[: codes.numel()].view(codes.shape)


ROWS = 8
"""Blocks that a program of the kernel works on at once."""


def refusal(weight: Tensor, gradient: Tensor, *, on: str = "cuda") -> str | None:
    """Why this weight's step is not one for the kernel, or None. `on` is the kind of device that it runs on."""
    if weight.device.type != on:
        return f"it is on {weight.device.type}"
    if any(type(x.data) is not Tensor or x.dtype != torch.float32 or not x.is_contiguous() for x in (weight, gradient)):
        return "weight or gradient is sharded, strided or not float32"
    return None if available() else "Triton is not installed"


MOMENTS = (("exp_avg", True), ("exp_avg_sq", False))
"""Adam's moments by torch's names, and whether they have a sign."""


class EightBitAdamW(torch.optim.Optimizer):
    """AdamW over `groups`, with moments in 8 bits but of `spared` and small parameters."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        spared: set[int] | None = None,
    ) -> None:
        """`spared` holds the ids of parameters whose moments stay float32."""
        self.spared = spared or set()
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})

    def in_eight_bits(self, parameter: Tensor) -> bool:
        """Whether this parameter's moments are kept in 8 bits."""
        return parameter.numel() >= SMALL and id(parameter) not in self.spared

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self._begin(parameter, self.state[parameter])
                self.state[parameter]["step"] += 1
                fits = self.in_eight_bits(parameter) and refusal(parameter, parameter.grad) is None
                (self._move_fused if fits else self._move)(parameter, parameter.grad, group)

    def _move_fused(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        """`_move` in one kernel."""
        from sparseforge_core.train import eight_bit_kernels as kernels

        (first_decay, second_decay), rate = group["betas"], group["lr"]
        state, size, device = self.state[parameter], parameter.numel(), parameter.device
        tiny = torch.finfo(torch.float32).tiny
        kernels.move[(-(-size // (BLOCK * ROWS)),)](
            parameter, gradient, *(state[f"{name}_{what}"] for name, _ in MOMENTS for what in ("codes", "scales")),
            state["step"], magnitudes(7, device), _bounds(7, device), magnitudes(8, device), _bounds(8, device), size,
            rate, 1.0 - rate * group["weight_decay"], first_decay, 1.0 - first_decay, second_decay, 1.0 - second_decay,
            *(math.log(max(decay, tiny)) for decay in group["betas"]), group["eps"], tiny,
            ROWS=ROWS, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip

    def _move(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        first_decay, second_decay = group["betas"]
        state = self.state[parameter]
        first, second = (self._read(state, name) for name, _ in MOMENTS)
        first.lerp_(gradient, 1.0 - first_decay)
        second.mul_(second_decay).addcmul_(gradient, gradient, value=1.0 - second_decay)
        self._write(state, (first, second))
        # On the device: a host that asked for the step would wait for it.
        rate = group["lr"] / (1.0 - first_decay ** state["step"])
        size = second.sqrt_().div_((1.0 - second_decay ** state["step"]).sqrt()).add_(group["eps"])
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"]).sub_(first.div_(size).mul_(rate))

    def _begin(self, parameter: Tensor, state: dict[str, Any]) -> None:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for name, signed in MOMENTS:
            zeros = torch.zeros_like(parameter, dtype=torch.float32)
            if self.in_eight_bits(parameter):
                state[f"{name}_codes"], state[f"{name}_scales"] = quantised(zeros, signed=signed)
            else:
                state[name] = zeros

    @staticmethod
    def _read(state: dict[str, Any], name: str) -> Tensor:
        if name in state:
            kept: Tensor = state[name]
            return kept.clone()
        return restored(state[f"{name}_codes"], state[f"{name}_scales"])

    @staticmethod
    def _write(state: dict[str, Any], moments: tuple[Tensor, Tensor]) -> None:
        for (name, signed), moment in zip(MOMENTS, moments, strict=True):
            if name in state:
                state[name].copy_(moment)
                continue
            codes, scales = quantised(moment, signed=signed)
            state[f"{name}_codes"].copy_(codes)
            state[f"{name}_scales"].copy_(scales)
