"""What the kernels can run, and the sentence where they cannot."""

from __future__ import annotations

import torch

from sparseforge_core.errors import ExportError

CAPABILITIES = ((9, 0),)
"""GPU generations that the kernels were checked on; on others nothing is known, so nothing is run."""

DTYPES = (torch.bfloat16, torch.float16)
"""Types of values that the tensor cores take with 2:4 metadata and float32 accumulation."""

ROWS, COLUMNS = 16, 256
"""Outputs and inputs of the blocks that weights are stored in."""


def supported(device: torch.device | str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Why a 2:4 weight `[out, in]` of this type cannot be multiplied on this device, or None if it can.

    The reference path of the CPU takes every type and every shape that divides into groups.
    """
    device = torch.device(device)
    if len(shape) != 2:
        return f"a weight of shape {tuple(shape)} is not a matrix [out, in]; load the model with dense=True"
    out, inputs = shape
    if out < 1 or inputs < 4 or inputs % 4:
        return f"{inputs} inputs do not divide into groups of 4; load the model with dense=True"
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip:
        return f"there are no 2:4 kernels for {device.type} devices; use --device cuda on an NVIDIA GPU, or cpu"
    if dtype not in DTYPES:
        return f"the 2:4 kernels take bfloat16 and float16 values, not {dtype}; export the model with --dtype bfloat16"
    if out % ROWS or inputs % 64:
        return (
            f"a weight {out}x{inputs} does not divide into {ROWS} outputs and 64 inputs, as the 2:4 kernels need; "
            "load the model with dense=True"
        )
    return _no_kernels_on(device)


def check_memory(needed: int, device: torch.device, what: str) -> None:
    """Raise ExportError if a CUDA device has less free memory than is needed; other devices are not asked."""
    free = free_memory(device)
    if free is not None and needed > free:
        raise ExportError(
            f"{what} needs {needed / 2**30:.1f} GiB and {device} has {free / 2**30:.1f} GiB free; ask for fewer tokens "
            "or a smaller batch, or free the device"
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still have of a CUDA device: the driver's, and what torch keeps for later use."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def _no_kernels_on(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; use --device cpu, or install a CUDA build of torch"
    capability = torch.cuda.get_device_capability(device)
    if capability not in CAPABILITIES:
        known = ", ".join(f"{major}.{minor}" for major, minor in CAPABILITIES)
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, and the 2:4 "
            f"kernels were checked on {known} alone; load the model with dense=True"
        )
    return None
