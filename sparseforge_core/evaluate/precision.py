"""In which numbers a model is measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def products_in_tf32(device: torch.device) -> Iterator[None]:
    """Inside, a GPU multiplies float32 matrices on its tensor cores: factors of 10 bits, sums in float32.

    Several times as fast as float32 throughout; a mean over a text moves by far less than its standard error. Elsewhere
    nothing changes.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def dtype_of(model: Any) -> str:
    """Number format of the weights that are run, such as float32, and of their products where it is another."""
    weight = next(model.parameters())
    name = str(weight.dtype).removeprefix("torch.")
    shorter = weight.is_cuda and weight.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return f"{name}, products in TF32" if shorter else name
