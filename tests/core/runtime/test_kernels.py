"""Products with 2:4 weights: the order of the tensor cores, the one function, refusals, and every kernel, given a GPU.

What a machine without a GPU cannot run is named by the skips; the Triton kernels run there in its interpreter.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
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
from sparseforge_core.runtime.kernels import KernelWeight, cusparselt, operator, sparse_linear, supported
from sparseforge_core.runtime.kernels.candidates import candidates
from sparseforge_core.runtime.kernels.fragments import from_fragments, to_fragments
from sparseforge_core.runtime.kernels.nvrtc import (
    FOLDER,
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
    # of three rows at a time, which a CPU's product may add up in another order than six
    torch.testing.assert_close(torch.func.vmap(lambda row: sparse_linear(row, weight))(x), expected)
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
