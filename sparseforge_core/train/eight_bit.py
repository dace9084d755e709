"""AdamW whose two moments are kept in 8 bits an entry: block-wise dynamic quantisation (arXiv 2110.02861).

A block of 256 entries shares one float32 scale, its largest magnitude; an entry is the code of the nearest of a fixed
list of magnitudes, dense near zero (section 1.3 there: a code's leading zeros are a power of ten, the rest a linear
fraction). 2.03 bytes a weight instead of 8. Each step reads the moments back into float32, computes exactly with them,
and keeps them rounded. Small tensors and embeddings keep float32, as the paper does.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from sparseforge_core.sparsity.fused import ALIGNED, ROW, available, distances, on_host, owners

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
def decades(bits: int, device: torch.device) -> Tensor:
    """The numbers that the kernel computes codes and magnitudes with, `[64]`: six rows, of 8 or 16 places each.

    The decade below 10^-z has n = 2^(bits - 1 - z) codes, from n on. In four rows by z: what multiplies a magnitude and
    what is added to make it a code with its fraction; the least of these that is not nearer to the code before n, and
    one that stands for that code. In two rows by 1 + log2 n, at 0 for code 0: what multiplies a code and what is added
    to make it a magnitude.
    """
    found = torch.zeros(64, dtype=torch.float64)
    for zeros in range(bits):
        count = 2.0 ** (bits - 1 - zeros)
        ten = 10.0**-zeros
        found[zeros] = count / 0.9 / ten
        found[8 + zeros] = count * 8.0 / 9.0
        found[16 + zeros] = count + (0.2 if count > 1.0 else 0.175 / 0.9)
        found[24 + zeros] = count - 0.5
        found[32 + bits - zeros] = ten * 0.9 / count
        found[48 + bits - zeros] = ten * (0.45 / count - 0.8)
    return found.to(device, torch.float32)


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


REPEAT = 4
"""Blocks that a program of the kernel, which is one warp, works on one after another."""


def refusal(weight: Tensor, gradient: Tensor, *kept: Tensor, on: str = "cuda") -> str | None:
    """Why the step of a weight of which this is `kept` is not one for the kernel, or None.

    `on` is the kind of device that it runs on.
    """
    if weight.device.type != on:
        return f"it is on {weight.device.type}"
    if any(type(x.data) is not Tensor or x.dtype != torch.float32 or not x.is_contiguous() for x in (weight, gradient)):
        return "weight or gradient is sharded, strided or not float32"
    if weight.numel() % ROW or any(x.data_ptr() % ALIGNED for x in (weight, gradient, *kept)):
        return f"it has no multiple of {ROW} entries, or something of it begins at no multiple of {ALIGNED} bytes"
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
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in moving:
                if not self.state[parameter]:
                    self._begin(parameter, self.state[parameter])
            small = [parameter for parameter in moving if not self.in_eight_bits(parameter)]
            coded = [parameter for parameter in moving if self.in_eight_bits(parameter)]
            if small:
                self._move_wide(small, group)
            if coded:
                torch._foreach_add_([self.state[parameter]["step"] for parameter in coded], 1.0)
            together = [
                parameter
                for parameter in coded
                if refusal(parameter, parameter.grad, *self.state[parameter].values()) is None
            ]
            if together:
                self._move_together(together, group)
            ids = {id(parameter) for parameter in together}
            for parameter in coded:
                if id(parameter) not in ids:
                    self._move(parameter, parameter.grad, group)

    def _move_wide(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """AdamW, torch's own, of parameters whose moments are float32."""
        states = [self.state[parameter] for parameter in parameters]
        (first, _), (second, _) = MOMENTS
        first_decay, second_decay = group["betas"]
        adamw(
            [*parameters],
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            exp_avgs=[state[first] for state in states],
            exp_avg_sqs=[state[second] for state in states],
            max_exp_avg_sqs=[],
            state_steps=[state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=first_decay,
            beta2=second_decay,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _move_together(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """`_move` of all of them in one launch."""
        from sparseforge_core.train import eight_bit_kernels as kernels

        (first_decay, second_decay), rate = group["betas"], group["lr"]
        names = [f"{name}_{what}" for name, _ in MOMENTS for what in ("codes", "scales")] + ["step"]
        tensors = [(p, p.grad, *(self.state[p][name] for name in names)) for p in parameters]
        anchors, device = tensors[0], parameters[0].device
        programs = [-(-parameter.numel() // (BLOCK * REPEAT)) for parameter in parameters]
        begin = [0, *itertools.accumulate(programs)]
        rows = tuple(
            (*distances(of, anchors), begin[i], parameters[i].numel())  # type: ignore[arg-type]
            for i, of in enumerate(tensors)
        )
        owner, tiny = owners(tuple(programs), device), torch.finfo(torch.float32).tiny
        kernels.move[(len(owner),)](
            _table(rows, device), owner, *anchors,
            decades(7, device), decades(8, device),
            rate, 1.0 - rate * group["weight_decay"], 1.0 - first_decay, second_decay, 1.0 - second_decay,
            *(math.log(max(decay, tiny)) for decay in group["betas"]), group["eps"], tiny,
            EVEN=all(parameter.numel() % (BLOCK * REPEAT) == 0 for parameter in parameters),
            REPEAT=REPEAT, BLOCK=BLOCK, num_warps=1,
        )  # fmt: skip

    def _move(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        """A step of a parameter whose moments are codes, in plain torch: what the kernel does."""
        first_decay, second_decay = group["betas"]
        state = self.state[parameter]
        first, second = (restored(state[f"{name}_codes"], state[f"{name}_scales"]) for name, _ in MOMENTS)
        first.lerp_(gradient, 1.0 - first_decay)
        second.mul_(second_decay).addcmul_(gradient, gradient, value=1.0 - second_decay)
        for (name, signed), moment in zip(MOMENTS, (first, second), strict=True):
            codes, scales = quantised(moment, signed=signed)
            state[f"{name}_codes"].copy_(codes)
            state[f"{name}_scales"].copy_(scales)
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


@functools.lru_cache(maxsize=64)
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Where everything lies, on the device; kept, for gradients mostly come to lie where they lay."""
    return on_host(rows, torch.int64, device).to(device, non_blocking=True)
