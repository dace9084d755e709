"""Products with 2:4 weights: the order of the tensor cores, the one function, refusals, and every kernel, given a GPU.

What a machine without a GPU cannot run is named by the skips; the Triton kernels run there in its interpreter.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparseforge_core.errors import ExportError
from sparseforge_core.runtime.kernels import KernelWeight, cusparselt, nvrtc, operator, sparse_linear, supported
from sparseforge_core.runtime.kernels.candidates import candidates
from sparseforge_core.runtime.kernels.fragments import from_fragments, to_fragments
from sparseforge_core.runtime.kernels.nvrtc import (
    FOLDER,
    ByValue,
    compile_ahead,
    compile_source,
    compiler_is_there,
    source,
)
from sparseforge_core.runtime.kernels.operator import PRODUCT
from sparseforge_core.runtime.kernels.plans import Plan
from sparseforge_core.runtime.kernels.rehearsal import PAIRS, random_packed
from sparseforge_core.runtime.kernels.table import Choice
from sparseforge_core.runtime.linear import KernelLinear, PackedWeight, SparseLinear
from sparseforge_core.runtime.packed import Layout, Packed, check_indices, layout_of, pack, unpack
from sparseforge_core.sparsity.patterns import nm, top_mask

TWO_FOUR = Layout(2, 4, transposed=False)

ON_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no CUDA device: the kernels of cuda/, cuSPARSELt and compiled Triton kernels not run",
)


def packed_weight(out: int, inputs: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> PackedWeight:
    values, indices = random_packed(out, inputs, dtype, device)
    return PackedWeight(Packed(values, indices), TWO_FOUR, (out, inputs))


def multiply_lanes(values: Tensor, places: Tensor, x: Tensor) -> Tensor:
    """What a warp's sparse matrix instructions compute from fragments, lane by lane as the instruction set documents.

    One row of x `[in]` -> `[out]` in float64: lane 4 q + t holds four registers of two values, of which register r
    belongs to output q + 8 (r % 2) and group t + 4 (r // 2) of a step; for step s the places are those of the lanes
    with t // 2 = s % 2, in their word s // 2: those with even t hold groups 0 to 3, the others 4 to 7, 16 bits each
    for outputs q and q + 8.
    """
    tiles, blocks = values.shape[:2]
    y = torch.zeros(tiles * 16, dtype=torch.float64)
    words = places.long() & 0xFFFFFFFF
    for tile, block, step, lane in torch.cartesian_prod(*map(torch.arange, (tiles, blocks, 8, 32))).tolist():
        q, t = divmod(lane, 4)
        for register in range(4):
            half, group = register % 2, t + 4 * (register // 2)
            holder = 4 * q + 2 * (step % 2) + group // 4
            bits = int(words[tile, block, holder, step // 2]) >> (16 * half + 4 * (group % 4))
            for n in range(2):
                column = block * 256 + step * 32 + group * 4 + (bits >> (2 * n) & 3)
                if column < len(x):
                    value = values[tile, block, step, lane, 2 * register + n].double()
                    y[tile * 16 + q + 8 * half] += value * x[column].double()
    return y


def test_fragments_multiply_as_the_instruction_does() -> None:
    out, inputs = 32, 320
    values, indices = random_packed(out, inputs, torch.bfloat16, "cpu")
    x = torch.randn(inputs, dtype=torch.bfloat16)
    exact = unpack(values, indices, TWO_FOUR, (out, inputs)).double() @ x.double()
    assert torch.allclose(multiply_lanes(*to_fragments(values, indices), x), exact, rtol=1e-12, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(
    tiles=st.integers(1, 4),
    steps=st.integers(1, 12),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_fragments_are_a_permutation(tiles: int, steps: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    out, inputs = 16 * tiles, 64 * steps
    values, indices = random_packed(out, inputs, dtype, "cpu")
    fragments = to_fragments(values, indices)
    back = from_fragments(*fragments, inputs)
    assert torch.equal(back[0].view(torch.int16), values.view(torch.int16))
    assert torch.equal(back[1], indices)
    assert fragments[0].nbytes == out * -(-inputs // 256) * 256  # half the values, two bytes each
    assert fragments[1].nbytes * 8 == fragments[0].nbytes


def test_rehearsal_weights_are_exactly_two_of_four() -> None:
    values, indices = random_packed(64, 256, torch.float16, "cpu")
    check_indices(indices, TWO_FOUR, (64, 256), "rehearsal")
    nibbles = torch.cat([indices & 15, indices >> 4], 1)
    assert set(nibbles.unique().tolist()) == set(PAIRS)
    assert bool((values != 0).any())


@pytest.mark.parametrize("mode", ["decode", "throughput"])
@pytest.mark.parametrize("transposed", [False, True])
def test_cpu_products_are_those_of_the_dense_weight(mode: str, transposed: bool) -> None:
    layout = layout_of(nm(2, 4), transposed=transposed, where="w")
    matrix = torch.randn(24, 40) * top_mask(torch.randn(24, 40), nm(2, 4))
    stored = matrix.T.contiguous() if transposed else matrix
    packed = PackedWeight(pack(stored, layout, "w"), layout, tuple(stored.shape))
    weight, bias = KernelWeight.of(packed, mode=mode), torch.randn(24)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 40)
    assert torch.equal(sparse_linear(x, weight, bias), torch.nn.functional.linear(x, matrix, bias))
    assert sparse_linear(x[:, :0], weight, bias).shape == (2, 0, 24)
    assert torch.equal(weight.dense(), matrix)
    held = matrix.nbytes // 2 + 24 * 40 // 8 + (matrix.nbytes if mode == "throughput" else 0)
    assert weight.resident_bytes == held


@pytest.mark.parametrize("stored", [False, True], ids=["fixed", "trained"])
def test_a_side_branch_is_added_as_two_factors(stored: bool) -> None:
    packed = packed_weight(16, 64, torch.float32)
    branch, projection = torch.randn(16, 4), torch.randn(4, 64) if stored else None
    whole = PackedWeight(Packed(packed.values, packed.indices), TWO_FOUR, (16, 64), (branch, projection))
    x = torch.randn(5, 64)
    expected = SparseLinear(whole, None)(x)
    assert torch.allclose(sparse_linear(x, KernelWeight.of(whole)), expected, atol=1e-5)


class Asked:
    """A compiler that runs a graph as it is, and remembers what it calls."""

    def __init__(self) -> None:
        self.targets: list[object] = []

    def __call__(self, graph: torch.fx.GraphModule, _given: object) -> Callable[..., Any]:
        self.targets += [node.target for node in graph.graph.nodes]
        return graph.forward


def test_compilers_take_the_product_whole() -> None:
    weight = KernelWeight.of(packed_weight(16, 64, torch.float32))
    x = torch.randn(3, 64)
    compiled = torch.compile(lambda x: sparse_linear(x, weight) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), sparse_linear(x, weight) + 1)
    branch = torch.randn(16, 4), torch.randn(4, 64)
    packed = packed_weight(16, 64, torch.float32)
    whole = PackedWeight(Packed(packed.values, packed.indices), TWO_FOUR, (16, 64), branch)
    module = KernelLinear(KernelWeight.of(whole), torch.nn.Parameter(torch.randn(16), requires_grad=False))
    asked = Asked()
    compiled = torch.compile(module, backend=asked, fullgraph=True)
    assert torch.equal(compiled(x[None]), module(x[None]))
    assert operator.PRODUCT in asked.targets, "the product is one operator to a compiler"


def test_a_product_has_no_gradient_and_says_so() -> None:
    weight, x = KernelWeight.of(packed_weight(16, 64, torch.float32)), torch.randn(3, 64, requires_grad=True)
    with pytest.raises(ValueError, match="load the model with dense=True to train"):
        sparse_linear(x, weight)
    with torch.no_grad():
        assert torch.equal(sparse_linear(x, weight), sparse_linear(x.detach(), weight))


def test_the_operator_is_a_good_one_for_compilers() -> None:
    """torch's own checks: schema, no hidden aliases, the shape that compilers are told."""
    weight = KernelWeight.of(packed_weight(16, 64, torch.float32), mode="throughput")
    given = (
        torch.randn(3, 64),
        weight.values,
        weight.places,
        torch.randn(16),
        weight.dense_copy,
        None,
        16,
        "reference",
    )
    for checked in ("test_schema", "test_faketensor"):
        assert torch.library.opcheck(PRODUCT, given, test_utils=checked) == {checked: "SUCCESS"}
        several = (torch.randn(2, 3, 64), *given[1:])
        assert torch.library.opcheck(PRODUCT, several, test_utils=checked) == {checked: "SUCCESS"}


class Seen(TorchDispatchMode):
    """What operators torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_who_looks_at_operators_finds_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode, a transform, a fake tensor, a trace; elsewhere the dispatcher is not asked."""
    weight, x = KernelWeight.of(packed_weight(16, 64, torch.float32)), torch.randn(2, 3, 64)
    expected = sparse_linear(x, weight)
    with Seen() as seen:
        assert torch.equal(sparse_linear(x, weight), expected)
    assert "sparseforge::linear_24" in seen.names
    assert torch.equal(torch.func.vmap(lambda row: sparse_linear(row, weight))(x), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert sparse_linear(mode.from_tensor(x), weight).shape == (2, 3, 16)
    traced = torch.jit.trace(lambda x: sparse_linear(x, weight), x, check_trace=False)
    assert "sparseforge::linear_24" in str(traced.graph)

    def refused(*_: object) -> Tensor:
        raise AssertionError("the operator was asked for")

    monkeypatch.setattr(operator, "PRODUCT", refused)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            assert torch.equal(sparse_linear(x, weight), expected)
    wants = torch.zeros(16, requires_grad=True)
    with pytest.raises(AssertionError, match="asked for"), torch.enable_grad():
        sparse_linear(x, weight, wants)


class Driver:
    """Its entry of a launch, as a function of C that reads what a driver would."""

    def __init__(self, kinds: str, during: Callable[[], object] = lambda: None) -> None:
        """`kinds` of a kernel's parameters: p for pointers, i for whole numbers, m for 128 bytes by value."""
        self.kinds, self.during, self.launches = kinds, during, list[dict[str, Any]]()
        of = ctypes.c_void_p
        self.cuLaunchKernelEx = ctypes.CFUNCTYPE(ctypes.c_int, of, of, of, of)(self._launch)

    def _launch(self, config: int, function: int, pointers: int, _extra: None) -> int:
        self.during()
        grid, block = ctypes.c_uint * 3, ctypes.c_uint * 3
        places = (ctypes.c_void_p * len(self.kinds)).from_address(pointers)
        read = {"p": ctypes.c_void_p, "i": ctypes.c_int}
        self.launches.append(
            {
                "grid": tuple(grid.from_address(config)),
                "block": tuple(block.from_address(config + 12)),
                "shared": ctypes.c_uint.from_address(config + 24).value,
                "stream": ctypes.c_void_p.from_address(config + 32).value,
                "early": tuple((ctypes.c_int * 3).from_address(ctypes.c_void_p.from_address(config + 40).value or 0)),
                "attributes": ctypes.c_uint.from_address(config + 48).value,
                "function": function,
                "arguments": [
                    ctypes.string_at(place, 128) if kind == "m" else read[kind].from_address(place).value
                    for kind, place in zip(self.kinds, places, strict=True)
                ],
            }
        )
        return 0


def launching(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> list[int]:
    """Let launches go to such a driver; the list's only element is the current stream."""
    stream = [7]
    monkeypatch.setattr(nvrtc, "driver", lambda: driver)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: stream[0] + device, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    return stream


def test_a_launch_says_what_a_driver_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time anew: grid, stream, addresses, numbers, and what is taken by value."""
    driver = Driver("ppmmppi")
    stream = launching(monkeypatch, driver)
    kernel = nvrtc.Kernel(ctypes.c_void_p(11), 288, 4096, 0)
    tensors = [torch.zeros(n + 1) for n in range(4)]
    maps = [ByValue(128, 64) for _ in range(4)]
    for n, by_value in enumerate(maps):
        ctypes.memset(by_value.address, n + 1, 128)
    kernel((5, 1), tensors[0], tensors[1], maps[0], maps[1], None, tensors[2], 2**31 - 1)
    stream[0] = 2**48 + 9
    kernel((6, 2), tensors[3], tensors[0], maps[2], maps[3], tensors[1], tensors[2], 0)
    first, second = driver.launches
    assert first["grid"] == (5, 1, 1)
    assert second["grid"] == (6, 2, 1)
    assert [launch["stream"] for launch in driver.launches] == [7, 2**48 + 9]
    for launch in driver.launches:
        assert launch["block"] == (288, 1, 1)
        assert (launch["shared"], launch["function"], launch["attributes"]) == (4096, 11, 1)
        assert launch["early"] == (nvrtc.PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
    at = [tensor.data_ptr() for tensor in tensors]
    assert first["arguments"] == [at[0], at[1], b"\1" * 128, b"\2" * 128, None, at[2], 2**31 - 1]
    assert second["arguments"] == [at[3], at[0], b"\3" * 128, b"\4" * 128, at[1], at[2], 0]


def test_launches_at_once_do_not_write_into_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver may read while another thread launches the same kernel, as it holds no lock of Python."""
    kernel, ran = nvrtc.Kernel(ctypes.c_void_p(11), 32, 0, 0), list[int]()

    def during() -> None:
        if not ran:
            ran.append(1)
            other = threading.Thread(target=kernel, args=((2, 1), None, 2))
            other.start()
            other.join()

    driver = Driver("pi", during)
    launching(monkeypatch, driver)
    tensor = torch.zeros(1)
    kernel((1, 1), tensor, 1)
    kernel((3, 1), tensor, 3)
    found = [(launch["grid"][0], *launch["arguments"]) for launch in driver.launches]
    assert found == [(2, None, 2), (1, tensor.data_ptr(), 1), (3, tensor.data_ptr(), 3)]


def test_a_thread_without_a_context_is_given_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """And any other refusal of the driver is said in its words."""
    asked = list[str]()

    def launch(*_: object) -> int:
        asked.append("launch")
        return 0 if "context" in asked else nvrtc.INVALID_CONTEXT

    def entry(name: str, status: int = 0) -> Callable[..., int]:
        return lambda *_: asked.append(name) or status  # type: ignore[func-returns-value]

    driver = types.SimpleNamespace(
        cuLaunchKernelEx=launch, cuDeviceGet=entry("device"), cuDevicePrimaryCtxRetain=entry("retain"),
        cuCtxSetCurrent=entry("context"), cuGetErrorString=entry("words"),
    )  # fmt: skip
    launching(monkeypatch, driver)  # type: ignore[arg-type]
    kernel = nvrtc.Kernel(ctypes.c_void_p(11), 32, 0, 0)
    nvrtc._context.cache_clear()
    kernel((1, 1), 1)
    assert asked == ["launch", "device", "retain", "context", "launch"]
    nvrtc._context.cache_clear()
    driver.cuLaunchKernelEx = entry("launch", 700)
    with pytest.raises(RuntimeError, match="the CUDA driver says: error 700"):
        kernel((1, 1), 1)


@pytest.mark.parametrize("rows", [96, 100])
def test_cusparselt_is_given_its_operands_anew(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Weight, x, output and stream of each call; the factors 1 and 0, and one stream."""
    of, calls = ctypes.c_void_p, list[tuple[Any, ...]]()

    def matmul(*given: Any) -> int:
        one, zero = (ctypes.c_float.from_address(given[n]).value for n in (2, 5))
        stream = of.from_address(given[9]).value
        calls.append((one, zero, given[3], given[4], given[6], given[7], stream, given[10]))
        return 0

    names = ("StructuredDescriptorInit", "DenseDescriptorInit", "MatmulDescriptorInit", "MatmulAlgSelectionInit",
             "MatmulAlgSetAttribute", "MatmulPlanInit", "MatmulGetWorkspace")  # fmt: skip
    library = types.SimpleNamespace(**{f"cusparseLt{name}": lambda *_: 0 for name in names})
    library.cusparseLtMatmul = ctypes.CFUNCTYPE(ctypes.c_int, *[of] * 10, ctypes.c_int32)(matmul)
    monkeypatch.setattr(cusparselt, "_library", lambda: library)
    monkeypatch.setattr(cusparselt, "_handle", lambda device: ctypes.create_string_buffer(16))
    stream = launching(monkeypatch, Driver(""))
    plan = cusparselt.Plan(32, 64, cusparselt.filled_up(rows), torch.bfloat16, 3, 0)
    monkeypatch.setattr(cusparselt, "plan", lambda *_: plan)
    compressed, bias = torch.zeros(2, 32 * 18, dtype=torch.bfloat16), torch.ones(32, dtype=torch.bfloat16)
    for weight in compressed:
        x = torch.randn(rows, 64, dtype=torch.bfloat16)
        y = cusparselt.run(x, weight, None, 32, 3)
        one, zero, *operands, current, streams = calls[-1]
        assert (one, zero, streams, current) == (1.0, 0.0, 1, stream[0])
        assert operands[0] == weight.data_ptr()
        assert (operands[1] == x.data_ptr()) == (cusparselt.filled_up(rows) == rows)
        assert operands[2:] == [y.data_ptr(), y.data_ptr()]
        assert y.shape == (rows, 32)
        stream[0] += 1
    assert cusparselt.run(x, weight, bias, 32, 3).shape == (rows, 32)


@pytest.mark.parametrize(
    ("device", "dtype", "shape", "words"),
    [
        ("cpu", torch.float32, (16, 30), "groups of 4"),
        ("cpu", torch.float32, (4, 16, 32), "not a matrix"),
        ("cuda", torch.float32, (16, 256), "bfloat16 and float16"),
        ("cuda", torch.bfloat16, (24, 256), "16 outputs"),
        ("cuda", torch.bfloat16, (16, 96), "64 inputs"),
        ("mps", torch.bfloat16, (16, 256), "mps"),
    ],
)
def test_what_cannot_run_is_said(device: str, dtype: torch.dtype, shape: tuple[int, ...], words: str) -> None:
    why = supported(device, dtype, shape)
    assert why is not None
    assert words in why


def test_other_gpu_generations_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert "compute capability 8.0" in (supported("cuda", torch.bfloat16, (16, 256)) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert supported("cuda", torch.bfloat16, (16, 256)) is None


def test_a_weight_says_what_is_wrong() -> None:
    wide = PackedWeight(pack(torch.zeros(8, 32), Layout(4, 8, False), "w"), Layout(4, 8, False), (8, 32))
    with pytest.raises(ExportError, match="not 4:8"):
        KernelWeight.of(wide)
    packed = packed_weight(16, 64)
    with pytest.raises(ExportError, match="backend"):
        KernelWeight.of(packed, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="runs on a GPU"):
        KernelWeight.of(packed, backend="mma")
    with pytest.raises(ExportError, match="mode"):
        KernelWeight.of(packed, mode="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="convert x"):
        sparse_linear(torch.randn(1, 64), KernelWeight.of(packed))
    with pytest.raises(ValueError, match="x has 32 inputs a row, the 2:4 weight 64"):
        sparse_linear(torch.randn(2, 32, dtype=torch.bfloat16), KernelWeight.of(packed))


LLAMA = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))
SMALL = ((16, 64), (32, 256), (768, 768), (576, 1536), (1536, 576), (2048, 5632))


@pytest.mark.parametrize("rows", [1, 2, 9, 17, 33, 64, 65, 100, 128, 257, 1000, 8192, 20_000])
def test_every_shape_has_plans_that_fit(rows: int) -> None:
    for out, inputs in (*LLAMA, *SMALL):
        plans = candidates(out, inputs, rows)
        assert plans
        for plan in plans:
            assert plan.shared(inputs) <= 227 * 1024
            assert plan.threads() <= 1024
            blocks, _ = plan.grid(out, rows, 132)
            assert blocks % plan.split == 0
            if plan.kernel == "tiles":
                assert blocks // plan.split * plan.tiles * 16 * plan.rows >= out * rows
            if plan.kernel == "wide":
                assert blocks % (plan.share * plan.split) == 0
                assert plan.split == 1 or blocks // plan.split * plan.tiles * 16 * plan.rows >= out * rows
                assert plan.split > 1 or blocks <= 132 * plan.resident, "tiles beyond those at once are taken in turn"
            assert Choice.from_json(json.loads(json.dumps(Choice("kernel", plan, seconds=1e-5).to_json()))).plan == plan


INTERPRETED = """
import torch
from sparseforge_core.runtime.kernels import triton_products
from sparseforge_core.runtime.kernels.rehearsal import random_packed
from sparseforge_core.runtime.packed import Layout, unpack

torch.manual_seed(0)
for dtype, out, inputs, rows in (
    (torch.bfloat16, 48, 192, 1), (torch.float16, 20, 320, 1), (torch.float16, 80, 192, 3), (torch.float16, 32, 320, 20)
):
    values, places = random_packed(out, inputs, dtype, "cpu")
    x, bias = torch.randn(rows, inputs).to(dtype), torch.randn(out).to(dtype)
    y = torch.full((rows, out), float("nan"), dtype=dtype)
    triton_products.run(x, values, places, bias, y)
    exact = x.double() @ unpack(values, places, Layout(2, 4, False), (out, inputs)).double().T + bias.double()
    error = float((y.double() - exact).norm() / exact.norm())
    assert error < 6e-3, (dtype, out, inputs, rows, error)
print("agree")
"""


def test_triton_kernels_agree_in_the_interpreter() -> None:
    """In a process of its own, as Triton reads its switch once; bfloat16 matrix products are beyond its interpreter."""
    pytest.importorskip("triton", reason="no Triton: _vector and _matrix not run")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "agree", done.stderr[-2000:]


def test_the_sources_of_the_kernels_are_packaged() -> None:
    kernels = {f"{name}.cu" for name in ("gemv", "stream", "tiles", "wide", "expand")}
    assert {path.name for path in FOLDER.iterdir()} >= {"common.cuh", *kernels}


@ON_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "inputs"), [(16, 256), (48, 576), (272, 1024)])
def test_plans_agree_with_float64(out: int, inputs: int, dtype: torch.dtype) -> None:
    values, indices = random_packed(out, inputs, dtype, "cuda")
    fragments = to_fragments(values, indices)
    dense = unpack(values.cpu(), indices.cpu(), TWO_FOUR, (out, inputs))
    bias = torch.randn(out, device="cuda").to(dtype)
    plans = {rows: candidates(out, inputs, rows)[::4] for rows in (1, 3, 8, 16, 20, 64, 130)}
    compile_ahead([(p.kernel, p.constants(out, inputs, dtype)) for several in plans.values() for p in several], 0)
    for rows, several in plans.items():
        x = torch.randn(rows, inputs, device="cuda").to(dtype)
        exact = x.cpu().double() @ dense.double().T + bias.cpu().double()
        for plan in several:
            y = torch.full((rows, out), float("nan"), dtype=dtype, device="cuda")
            plan.run(x, *fragments, bias, y)
            assert float((y.cpu().double() - exact).norm() / exact.norm()) < 1e-2, (rows, plan)


@ON_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["mma", "triton"])
@pytest.mark.parametrize("mode", ["decode", "throughput"])
def test_gpu_products_and_graphs(backend: str, mode: str) -> None:
    packed = packed_weight(64, 512, device="cuda")
    weight = KernelWeight.of(packed, backend=backend, mode=mode)  # type: ignore[arg-type]
    dense = packed.dense()
    assert torch.equal(weight.dense(), dense)
    for rows in (1, 5, 64, 200):
        x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
        expected = torch.nn.functional.linear(x, dense).float()
        assert float((sparse_linear(x, weight).float() - expected).norm() / expected.norm()) < 1e-2
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = sparse_linear(x, weight)
        x.copy_(torch.randn_like(x))
        graph.replay()
        expected = torch.nn.functional.linear(x, dense).float()
        assert float((y.float() - expected).norm() / expected.norm()) < 1e-2


@ON_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cusparselt_multiplies_prompts_of_any_length(dtype: torch.dtype) -> None:
    """Rows are filled up to those of a plan; what is beyond the last row is no output."""
    packed = packed_weight(128, 512, dtype, device="cuda")
    dense, bias = packed.dense(), torch.randn(128, device="cuda").to(dtype)
    compressed, ran = cusparselt.compress(dense), 0
    for rows in (65, 200, 1030):
        x = torch.randn(rows, 512, device="cuda").to(dtype)
        exact = x.double() @ dense.double().T + bias.double()
        for algorithm in range(cusparselt.ALGORITHMS):
            try:
                y = cusparselt.run(x, compressed, bias, 128, algorithm)
            except ExportError:  # an algorithm that the library does not have for these sizes
                continue
            assert y.shape == (rows, 128)
            assert float((y.double() - exact).norm() / exact.norm()) < 1e-2, (rows, algorithm)
            ran += 1
    assert ran >= 3


@ON_GPU
@pytest.mark.gpu
def test_building_during_a_capture_is_refused() -> None:
    weight = KernelWeight.of(packed_weight(32, 768, device="cuda"))
    x = torch.randn(1, 768, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ExportError, match="run the product once before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        sparse_linear(x, weight)


def test_a_plan_knows_its_memory() -> None:
    assert Plan(kernel="gemv", rows=1, warps=4, depth=1).shared(4096) == 0
    assert not Plan(kernel="tiles", rows=64, warps=16, depth=4, tiles=16).fits(4096)
    wide = Plan(kernel="wide", rows=256, warps=8, tiles=8, depth=4)
    rings, outputs = 4 * 256 * 128 + 4 * 8 * 1152, 2 * 2 * 64 * 128
    assert wide.shared(4096) == 1024 + rings + outputs + 4 * 16, "x, weights, outputs on their way, two barriers each"
    assert wide.fits(4096)
    assert not dataclasses.replace(wide, depth=5).fits(4096)
    parts = dataclasses.replace(wide, depth=2, split=2)
    assert parts.shared(4096) == 1024 + 256 * (128 + 4) * 4 + 2 * 16, "sums in float32 need more than such rings"


def every_wide_plan() -> list[Plan]:
    """All sizes of `wide` that may be measured, whatever the shape."""
    plans = [
        plan
        for out, inputs in (*LLAMA, *SMALL)
        for rows in (17, 33, 64, 96, 128, 192, 256, 512, 2048)
        for plan in candidates(out, inputs, rows)
        if plan.kernel == "wide"
    ]
    return list(dict.fromkeys(plans))


def test_sizes_of_the_wide_kernel_are_those_of_its_instructions() -> None:
    plans = every_wide_plan()
    assert {plan.rows for plan in plans} <= {32, 48, 64, 96, 128, 192, 256}, "as wide.cu spells them out"
    for plan in plans:
        assert plan.share * plan.split <= 4, "clusters of more leave multiprocessors idle"
        assert plan.warps % 4 == 0, "a warpgroup is four warps"
        assert plan.tiles % plan.warps == 0
        assert plan.rows % (8 * plan.share) == 0, "parts of x begin where the swizzle does"
        assert plan.threads() * plan.resident <= 2048
        constants = dict(plan.constants(4096, 4096, torch.bfloat16))
        assert constants["GROUPS"] * constants["MT"] * 64 == plan.tiles * 16
        assert plan.threads() == 128 * constants["GROUPS"] + constants["HELPERS"]


@pytest.mark.skipif(not compiler_is_there(), reason="no libnvrtc: the text of the kernels is not compiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_wide_plan_compiles(dtype: torch.dtype) -> None:
    """It needs the compiler library and no GPU."""
    for plan in every_wide_plan()[:: 2 if dtype == torch.bfloat16 else 7]:
        image = compile_source(source("wide"), "wide", plan.constants(272, 832, dtype), "sm_90a")
        assert image.startswith(b"\x7fELF")


def test_what_a_kernel_takes_by_value_is_aligned() -> None:
    for alignment in (64, 128):
        for _ in range(8):
            assert ByValue(128, alignment).address % alignment == 0


@ON_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "inputs"), [(64, 256), (48, 576), (272, 832), (512, 2816)])
def test_the_wide_kernel_agrees_with_float64(out: int, inputs: int, dtype: torch.dtype) -> None:
    """Every size of tile, with rows just short of a tile, just over and several tiles long; each output is written."""
    values, indices = random_packed(out, inputs, dtype, "cuda")
    fragments = to_fragments(values, indices)
    dense = unpack(values.cpu(), indices.cpu(), TWO_FOUR, (out, inputs)).double().cuda()
    plans = [plan for plan in every_wide_plan() if plan.split <= -(-inputs // 256)]
    compile_ahead([(p.kernel, p.constants(out, inputs, dtype)) for p in plans], 0)
    for plan in plans:
        for rows, biased in ((1, True), (plan.rows - 1, False), (plan.rows, True), (plan.rows + 1, True), (901, False)):
            x = torch.randn(rows, inputs, device="cuda").to(dtype)
            bias = torch.randn(out, device="cuda").to(dtype) if biased else None
            exact = x.double() @ dense.T + (0.0 if bias is None else bias.double())
            y = torch.full((rows + 1, out), float("nan"), dtype=dtype, device="cuda")
            plan.run(x, *fragments, bias, y[:rows])
            assert float((y[:rows].double() - exact).norm() / exact.norm()) < 1e-2, (rows, plan)
            assert bool(y[rows].isnan().all()), (rows, plan, "nothing is written beyond the last row")


@ON_GPU
@pytest.mark.gpu
def test_kernels_that_follow_each_other_wait_for_x() -> None:
    """Each begins before the one in front has ended: x of one is y of the other, again and again, in a graph."""
    weight = KernelWeight.of(packed_weight(512, 512, device="cuda"))
    dense = weight.dense()
    for rows in (8, 64, 100, 300):
        x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
        for _ in range(2):  # once before the capture, for what is built
            y = x
            for _ in range(4):
                y = sparse_linear(y, weight)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x
            for _ in range(4):
                y = sparse_linear(y, weight)
        for _ in range(20):
            x.copy_(torch.randn_like(x))
            graph.replay()
            expected = x
            for _ in range(4):
                expected = torch.nn.functional.linear(expected, dense)
            assert float((y.float() - expected.float()).norm() / expected.float().norm()) < 2e-2, rows


@ON_GPU
@pytest.mark.gpu
def test_products_of_several_threads_on_streams_of_their_own() -> None:
    """The same weight and kernels at once, also from threads that have asked the driver for nothing before."""
    weight = KernelWeight.of(packed_weight(512, 512, device="cuda"))
    dense = weight.dense()
    sizes = (1, 8, 64, 100, 300)
    given = [[torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16) for rows in sizes] for _ in range(4)]
    for x in given[0]:
        sparse_linear(x, weight)  # built
    torch.cuda.synchronize()
    wrong = list[float]()

    def multiply(several: list[Tensor]) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(100):
                for x in several:
                    y = sparse_linear(x, weight)
            for x in several:
                y, expected = sparse_linear(x, weight).float(), torch.nn.functional.linear(x, dense).float()
                wrong.append(float((y - expected).norm() / expected.norm()))

    threads = [threading.Thread(target=multiply, args=(several,)) for several in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == len(sizes) * len(given)
    assert max(wrong) < 1e-2


@ON_GPU
@pytest.mark.gpu
def test_a_product_of_a_thread_that_asked_for_nothing_else() -> None:
    """Its output comes of memory that torch keeps, so that the launch is the first that the driver hears of it."""
    weight, failed = KernelWeight.of(packed_weight(512, 512, device="cuda")), list[Exception]()
    x = torch.randn(1, 300, 512, device="cuda", dtype=torch.bfloat16)
    expected = sparse_linear(x, weight).clone()
    found = list[Tensor]()

    def multiply() -> None:
        try:
            found.append(sparse_linear(x, weight))
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=multiply)
    thread.start()
    thread.join()
    assert not failed
    assert torch.equal(found[0], expected)
