"""Products with 2:4 weights on a GPU: one weight, one function, and the reason where there is none.

`KernelWeight.of(packed)` arranges a packed weight for the kernels, `sparse_linear(x, weight, bias)` multiplies by it.
On the CPU the product is the reference path; on a GPU, `supported` says beforehand what cannot be run, and why.
"""

from __future__ import annotations

from sparseforge_core.runtime.kernels.operator import sparse_linear
from sparseforge_core.runtime.kernels.support import supported
from sparseforge_core.runtime.kernels.weight import KernelWeight

__all__ = ["KernelWeight", "sparse_linear", "supported"]
