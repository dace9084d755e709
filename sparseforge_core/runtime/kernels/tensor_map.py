"""What the tensor copy engine is told of a matrix: where it lies, how large it is, and which part it copies at a time.

A part is 64 columns of some rows; in shared memory its rows of 128 bytes are swizzled as the tensor cores read them.
Rows and columns beyond the matrix are read as zeros and not written.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from sparseforge_core.runtime.kernels.nvrtc import ByValue, check, driver

TYPES = {torch.float16: 6, torch.bfloat16: 9}
"""CUtensorMapDataType."""

COLUMNS = 64
"""Columns of a part: 128 bytes, the width of the swizzle."""

SWIZZLE_128B, PROMOTE_128B = 3, 2
"""CU_TENSOR_MAP_SWIZZLE_128B and CU_TENSOR_MAP_L2_PROMOTION_L2_128B."""

SIZE, ALIGNMENT = 128, 64
"""Bytes of a CUtensorMap, and what its address must be a multiple of."""


@functools.lru_cache(maxsize=4096)
def tensor_map(address: int, height: int, width: int, rows: int, dtype: torch.dtype) -> ByValue:
    """Of a contiguous matrix `[height, width]` of two-byte values in parts of `rows` rows (256 at most).

    The address is a multiple of 16. A map says nothing but these numbers: one of memory that was given back is right
    for who has it next.
    """
    found = ByValue(SIZE, ALIGNMENT)
    u32, u64 = ctypes.c_uint32, ctypes.c_uint64
    status = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(found.address),
        ctypes.c_int(TYPES[dtype]),
        u32(2),
        ctypes.c_void_p(address),
        (u64 * 2)(width, height),
        (u64 * 1)(width * dtype.itemsize),
        (u32 * 2)(COLUMNS, rows),
        (u32 * 2)(1, 1),
        ctypes.c_int(0),  # no interleaving
        ctypes.c_int(SWIZZLE_128B),
        ctypes.c_int(PROMOTE_128B),
        ctypes.c_int(0),  # zeros beyond the edges
    )
    check(status)
    return found
