"""Products of large batches through cuSPARSELt, the library that comes with torch, with plans that are kept.

torch's own call makes a plan anew each time, which costs about 1.2 ms of host time; here a plan is made once for each
shape, number of rows and algorithm. A compressed weight is what `torch._cslt_compress` returns.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from sparseforge_core.errors import ExportError

ALGORITHMS = 24
"""Version 0.8 takes the numbers 0 to 20, and refuses what does not exist."""

OPAQUE = 16384
"""Bytes for each of the library's opaque structures, which need at most 11,024."""

REAL_TYPES = {torch.float16: 2, torch.bfloat16: 14}
"""cudaDataType."""

COLUMN_MAJOR, ROW_MAJOR, KEEP, HALF, FLOAT32 = 1, 2, 0, 0, 2
"""cusparseOrder_t, CUSPARSE_OPERATION_NON_TRANSPOSE, CUSPARSELT_SPARSITY_50_PERCENT, CUSPARSE_COMPUTE_32F."""

ALGORITHM = 0
"""CUSPARSELT_MATMUL_ALG_CONFIG_ID."""

MULTIPLE = 8
"""Rows of x are filled up to a multiple of this at least, for aligned loads."""

STEPS = 16
"""Sizes of plans between a power of two and the next, so that prompts of any length meet a plan that is there soon.

A plan costs a millisecond and is made for a number of rows; what is filled up is 1/16 of them at most.
"""


_ONE, _ZERO, _STREAMS = ctypes.c_float(1.0), ctypes.c_float(0.0), ctypes.c_int32(1)


class _Frame:
    """The arguments of one launch, in memory that is kept: addresses and the stream alone change."""

    def __init__(self, handle: ctypes.Array[ctypes.c_char], plan: ctypes.Array[ctypes.c_char]) -> None:
        self.compressed, self.x, self.y, self.work, self.stream = (ctypes.c_void_p() for _ in range(5))
        one, zero, streams = ctypes.byref(_ONE), ctypes.byref(_ZERO), ctypes.byref(self.stream)
        operands = one, self.compressed, self.x, zero, self.y, self.y
        self.arguments = (handle, plan, *operands, self.work, streams, _STREAMS)


class Plan:
    """How one product is computed: `x [rows, in]` with a compressed weight `[out, in]`."""

    def __init__(self, out: int, inputs: int, rows: int, dtype: torch.dtype, algorithm: int, device: int) -> None:
        """Raises ExportError if the library has no such algorithm for these sizes."""
        self._handle, self._device, kind = _handle(device), device, REAL_TYPES[dtype]
        self._frames: list[_Frame] = []  # those that no launch is using; taken and given back as a kernel's are
        weight, x, y, product, chosen = (_opaque() for _ in range(5))
        self._plan = _opaque()
        sizes = [ctypes.c_int64(n) for n in (out, inputs, rows)]
        m, k, n = sizes
        align, kind_ = ctypes.c_uint32(16), ctypes.c_int(kind)
        column, row = ctypes.c_int(COLUMN_MAJOR), ctypes.c_int(ROW_MAJOR)
        handle = self._handle
        _call("StructuredDescriptorInit", handle, weight, m, k, k, align, kind_, row, ctypes.c_int(HALF))
        _call("DenseDescriptorInit", handle, x, k, n, k, align, kind_, column)
        _call("DenseDescriptorInit", handle, y, m, n, m, align, kind_, column)
        keep = ctypes.c_int(KEEP)
        _call("MatmulDescriptorInit", handle, product, keep, keep, weight, x, y, y, ctypes.c_int(FLOAT32))
        _call("MatmulAlgSelectionInit", handle, chosen, product, ctypes.c_int(0))
        number = ctypes.c_int(algorithm)
        size = ctypes.c_size_t(ctypes.sizeof(number))
        _call("MatmulAlgSetAttribute", handle, chosen, ctypes.c_int(ALGORITHM), ctypes.byref(number), size)
        _call("MatmulPlanInit", handle, self._plan, product, chosen)
        needed = ctypes.c_size_t()
        _call("MatmulGetWorkspace", handle, self._plan, ctypes.byref(needed))
        self._work = -(-max(16, needed.value) // dtype.itemsize)
        self._held = (weight, x, y, product, chosen)  # the plan refers to them

    def run(self, x: Tensor, compressed: Tensor, y: Tensor) -> None:
        """Fill `y [rows, out]`; the workspace is torch's, given back at once."""
        work = x.new_empty(self._work)
        try:
            frame = self._frames.pop()
        except IndexError:
            frame = _Frame(self._handle, self._plan)
        frame.compressed.value, frame.x.value = compressed.data_ptr(), x.data_ptr()
        frame.y.value, frame.work.value = y.data_ptr(), work.data_ptr()
        frame.stream.value = torch._C._cuda_getCurrentRawStream(self._device)
        if torch._C._cuda_getDevice() == self._device:  # asking costs a tenth of setting
            _call("Matmul", *frame.arguments)
        else:
            with torch.cuda.device(self._device):
                _call("Matmul", *frame.arguments)
        self._frames.append(frame)


@functools.lru_cache(maxsize=512)
def plan(out: int, inputs: int, rows: int, dtype: torch.dtype, algorithm: int, device: int) -> Plan:
    """The plan of these sizes, made when first asked for; those of prompts long ago are let go."""
    return Plan(out, inputs, rows, dtype, algorithm, device)


def run(x: Tensor, compressed: Tensor, bias: Tensor | None, out: int, algorithm: int) -> Tensor:
    """`x [rows, in]` -> `[rows, out]`."""
    rows, inputs = x.shape
    filled = filled_up(rows)
    if filled != rows:
        x = torch.nn.functional.pad(x, (0, 0, 0, filled - rows))
    y = x.new_empty(filled, out)
    plan(out, inputs, filled, x.dtype, algorithm, x.device.index).run(x, compressed, y)
    if filled != rows:
        y = y[:rows]
    return y if bias is None else y.add_(bias)


def filled_up(rows: int) -> int:
    """The number of rows of the plan that `rows` rows take."""
    step = max(MULTIPLE, (1 << (rows - 1).bit_length()) // (2 * STEPS))
    return -(-rows // step) * step


def compress(dense: Tensor) -> Tensor:
    """A dense 2:4 weight `[out, in]` in the library's own form, 0.5625 of its bytes."""
    return torch._cslt_compress(dense)


def _opaque() -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(OPAQUE)


@functools.cache
def _handle(device: int) -> ctypes.Array[ctypes.c_char]:
    with torch.cuda.device(device):
        handle = _opaque()
        _call("Init", handle)
    return handle


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcusparseLt.so.0")  # loaded with torch
    except OSError as e:
        raise ExportError("cuSPARSELt is not part of this torch; install a CUDA build of torch for Linux") from e


def _call(name: str, *arguments: object) -> None:
    status = getattr(_library(), f"cusparseLt{name}")(*arguments)
    if status:
        said = _library().cusparseLtGetErrorString
        said.restype = ctypes.c_char_p
        raise ExportError(f"cuSPARSELt refuses {name}: {said(status).decode()}")
