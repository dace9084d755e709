"""CUDA C++ built when it is first needed, through the compiler library and the driver that come with torch.

No host compiler and no CUDA toolkit is needed. A kernel is built for one set of compile-time sizes and one device, and
stays loaded. Launches go to torch's current stream and are captured by CUDA graphs like any other; building is not
possible while a graph is captured, so every product is run once before.

A launch costs its host about what it costs a library in C++: what is the same each time lies in memory that is kept
(`_Frame`), and addresses, the grid and the stream alone are written anew.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sparseforge_core.errors import ExportError

FOLDER = Path(__file__).parent / "cuda"

SHARED_MEMORY = 227 * 1024
"""Bytes that one block of threads may take on compute capability 9.0."""


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an identifier, padding to 8 bytes, and a union of 64."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


PROGRAMMATIC_STREAM_SERIALIZATION = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: may start before the kernel in front has ended."""

INVALID_CONTEXT = 201
"""CUDA_ERROR_INVALID_CONTEXT: also of a thread that has asked the driver for nothing yet."""

MAX_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""


class ByValue:
    """Bytes that a kernel takes as they are, at an aligned address."""

    def __init__(self, size: int, alignment: int) -> None:
        self._memory = ctypes.create_string_buffer(size + alignment)
        self.address = -(-ctypes.addressof(self._memory) // alignment) * alignment


_put_config = struct.Struct("7IxxxxQ").pack_into
"""Grid, block, bytes of shared memory and stream of a `_Config`."""


class _Frame:
    """Memory that describes one launch of a kernel to the driver, which copies all of it before it returns.

    Arguments are words of eight bytes each, of which an `int` of the kernel is the low half (x86 and Arm are little
    endian). One that is taken by value lies elsewhere, and is pointed to where it lies.
    """

    def __init__(self, words: int) -> None:
        self.words = (ctypes.c_uint64 * words)()
        first = ctypes.addressof(self.words)
        self.pointers = (ctypes.c_void_p * words)(*(first + 8 * n for n in range(words)))
        self.put = struct.Struct(f"{words}Q").pack_into
        self._early = _Attribute(id=PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        self.config = _Config(attributes=ctypes.pointer(self._early), count=1)
        self.reference = ctypes.byref(self.config)


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel and how it is launched."""

    function: ctypes.c_void_p
    threads: int
    shared: int
    """Bytes of dynamic shared memory."""
    device: int
    """Where it is loaded."""
    by_value: tuple[int, ...] = ()
    """Which of its arguments it takes as they are; a launch is given the address where one lies."""
    _frames: list[_Frame] = field(default_factory=list, compare=False, repr=False)
    """Those that no launch is using: as many as threads ever launched it at once."""

    def __call__(self, grid: tuple[int, int], *words: int) -> None:
        """Launch on torch's current stream of its device, with addresses (0 for none) and whole numbers from 0 up.

        What lies at the addresses of arguments taken by value is the caller's to keep until this returns. Threads may
        launch at once: each takes a frame of its own from the list, in one operation of Python. One that raised is not
        given back.
        """
        try:
            frame = self._frames.pop()
        except IndexError:
            frame = _Frame(len(words))
        frame.put(frame.words, 0, *words)
        for n in self.by_value:
            frame.pointers[n] = words[n]
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        _put_config(frame.config, 0, *grid, 1, self.threads, 1, 1, self.shared, stream)
        if torch._C._cuda_getDevice() == self.device:  # asking costs a tenth of setting
            self._launch(frame)
        else:
            with torch.cuda.device(self.device):
                self._launch(frame)
        self._frames.append(frame)

    def _launch(self, frame: _Frame) -> None:
        entry = driver().cuLaunchKernelEx
        status = entry(frame.reference, self.function, frame.pointers, None)
        if status == INVALID_CONTEXT:
            check(driver().cuCtxSetCurrent(_context(self.device)))
            status = entry(frame.reference, self.function, frame.pointers, None)
        check(status)


@functools.cache
def _context(device: int) -> ctypes.c_void_p:
    """The context of a device that torch uses too; held from here on."""
    number, context = ctypes.c_int(), ctypes.c_void_p()
    check(driver().cuDeviceGet(ctypes.byref(number), device))
    check(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), number))
    return context


@functools.cache
def load(
    file: str,
    constants: tuple[tuple[str, int], ...],
    threads: int,
    shared: int,
    device: int,
    by_value: tuple[int, ...] = (),
) -> Kernel:
    """Build `cuda/<file>.cu` with its constants, and load its kernel of the same name on a device.

    Raises ExportError if the compiler refuses it, or if a CUDA graph is being captured.
    """
    if torch.cuda.is_current_stream_capturing():
        raise ExportError(
            f"kernel {file} is not built yet, and cannot be during a capture; run the product once before"
        )
    major, minor = torch.cuda.get_device_capability(device)
    image = compile_source(source(file), file, constants, f"sm_{major}{minor}a")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # the context exists from here on
        check(driver().cuModuleLoadData(ctypes.byref(module), image))
        check(driver().cuModuleGetFunction(ctypes.byref(function), module, file.encode()))
        check(driver().cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, shared))
    return Kernel(function, threads, shared, device, by_value)


def source(file: str) -> str:
    """What is compiled: the shared part, then the kernel's file."""
    return (FOLDER / "common.cuh").read_text(encoding="utf-8") + (FOLDER / f"{file}.cu").read_text(encoding="utf-8")


@functools.cache
def compile_source(text: str, name: str, constants: tuple[tuple[str, int], ...], architecture: str) -> bytes:
    """Machine code of a kernel's text. Raises ExportError with the compiler's words if it refuses."""
    library, program = _compiler(), ctypes.c_void_p()
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{key}={value}" for key, value in constants)]
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    made = library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), f"{name}.cu".encode(), 0, None, None)
    if made != 0:
        raise ExportError(f"the CUDA compiler library could not start (error {made})")
    failed = library.nvrtcCompileProgram(program, len(options), array)
    size = ctypes.c_size_t()
    if failed:
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        raise ExportError(f"kernel {name} with {dict(constants)} does not compile:\n{log.value.decode()}")
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    image = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, image)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return image.raw


@functools.cache
def _compiler() -> ctypes.CDLL:
    names = [f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"] if torch.version.cuda else []
    for name in (*names, "libnvrtc.so", "libnvrtc.so.13"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise ExportError("the CUDA compiler library libnvrtc is not found; install a CUDA build of torch, which brings it")


def compiler_is_there() -> bool:
    """Whether kernels can be compiled here; no GPU is needed for that."""
    try:
        _compiler()
    except ExportError:
        return False
    return True


@functools.cache
def driver() -> ctypes.CDLL:
    """The library of the CUDA driver."""
    return ctypes.CDLL("libcuda.so.1")


def compile_ahead(jobs: Iterable[tuple[str, tuple[tuple[str, int], ...]]], device: int) -> None:
    """Compile kernels (file and constants) side by side, for `load` to find; the compiler needs no lock of Python."""
    major, minor = torch.cuda.get_device_capability(device)

    def one(job: tuple[str, tuple[tuple[str, int], ...]]) -> None:
        compile_source(source(job[0]), *job, f"sm_{major}{minor}a")

    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(one, jobs))


def driver_version() -> int:
    """The newest CUDA that the driver serves, as 1000 major + 10 minor."""
    found = ctypes.c_int()
    check(driver().cuDriverGetVersion(ctypes.byref(found)))
    return found.value


def check(status: int) -> None:
    """Raise RuntimeError, with the driver's words, for a status that is not success."""
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        said = text.value.decode() if text.value else f"error {status}"
        raise RuntimeError(f"the CUDA driver says: {said}")
