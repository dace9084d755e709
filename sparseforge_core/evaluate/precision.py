"""In which numbers a model is measured."""

from __future__ import annotations

from typing import Any

import torch


def dtype_of(model: Any) -> str:
    """Number format of the weights that are run, such as float32, and of their products where it is another."""
    weight = next(model.parameters())
    name = str(weight.dtype).removeprefix("torch.")
    shorter = weight.is_cuda and weight.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return f"{name}, products in TF32" if shorter else name
