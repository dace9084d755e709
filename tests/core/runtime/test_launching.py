"""Launches of kernels: what the driver and cuSPARSELt are handed each time, by whichever thread.

Where there is no GPU, an entry of a driver that reads what it is given stands in for one.
"""

from __future__ import annotations

import ctypes
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseforge_core.runtime.kernels import KernelWeight, cusparselt, nvrtc, sparse_linear
from sparseforge_core.runtime.kernels.nvrtc import ByValue
from tests.core.runtime.test_kernels import ON_GPU, packed_weight


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


def launching(monkeypatch: pytest.MonkeyPatch, driver: object) -> list[int]:
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
    kernel = nvrtc.Kernel(ctypes.c_void_p(11), 288, 4096, 0, by_value=(2, 3))
    at = [1009, 2003, 3001, 2**63 + 5]
    maps = [ByValue(128, 64) for _ in range(4)]
    for n, by_value in enumerate(maps):
        ctypes.memset(by_value.address, n + 1, 128)
    kernel((5, 1), at[0], at[1], maps[0].address, maps[1].address, 0, at[2], 2**31 - 1)
    stream[0] = 2**48 + 9
    kernel((6, 2), at[3], at[0], maps[2].address, maps[3].address, at[1], at[2], 0)
    first, second = driver.launches
    assert first["grid"] == (5, 1, 1)
    assert second["grid"] == (6, 2, 1)
    assert [launch["stream"] for launch in driver.launches] == [7, 2**48 + 9]
    for launch in driver.launches:
        assert launch["block"] == (288, 1, 1)
        assert (launch["shared"], launch["function"], launch["attributes"]) == (4096, 11, 1)
        assert launch["early"] == (nvrtc.PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
    assert first["arguments"] == [at[0], at[1], b"\1" * 128, b"\2" * 128, None, at[2], 2**31 - 1]
    assert second["arguments"] == [at[3], at[0], b"\3" * 128, b"\4" * 128, at[1], at[2], 0]


def test_launches_at_once_do_not_write_into_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver may read while another thread launches the same kernel, as it holds no lock of Python."""
    kernel, ran = nvrtc.Kernel(ctypes.c_void_p(11), 32, 0, 0), list[int]()

    def during() -> None:
        if not ran:
            ran.append(1)
            other = threading.Thread(target=kernel, args=((2, 1), 0, 2))
            other.start()
            other.join()

    driver = Driver("pi", during)
    launching(monkeypatch, driver)
    kernel((1, 1), 77, 1)
    kernel((3, 1), 77, 3)
    found = [(launch["grid"][0], *launch["arguments"]) for launch in driver.launches]
    assert found == [(2, None, 2), (1, 77, 1), (3, 77, 3)]


def test_a_thread_without_a_context_is_given_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """And any other refusal of the driver is said in its words."""
    asked = list[str]()

    def launch(*_: object) -> int:
        asked.append("launch")
        return 0 if "context" in asked else nvrtc.INVALID_CONTEXT

    def entry(name: str, status: int = 0) -> Callable[..., int]:
        def refuse(*_: object) -> int:
            asked.append(name)
            return status

        return refuse

    driver = types.SimpleNamespace(
        cuLaunchKernelEx=launch, cuDeviceGet=entry("device"), cuDevicePrimaryCtxRetain=entry("retain"),
        cuCtxSetCurrent=entry("context"), cuGetErrorString=entry("words"),
    )  # fmt: skip
    launching(monkeypatch, driver)
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


def test_what_a_kernel_takes_by_value_is_aligned() -> None:
    for alignment in (64, 128):
        for _ in range(8):
            assert ByValue(128, alignment).address % alignment == 0


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
