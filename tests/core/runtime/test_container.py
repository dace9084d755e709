"""The streaming container writes ordinary safetensors and accounts for every byte that it reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparseforge_core.errors import ExportError
from sparseforge_core.runtime.container import DTYPES, NAMES, Reader, Stored, Writer, digest, dtype_name

TENSORS = {
    "bytes": torch.arange(5, dtype=torch.uint8),
    "half": torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "flag": torch.tensor([True, False, True]),
    "number": torch.tensor(3.5),
    "none": torch.empty(0, 4),
    "long": torch.arange(2),
}


def planned() -> list[Stored]:
    return [Stored(name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in TENSORS.items()]


def written(path: Path) -> dict[str, str]:
    writer = Writer(path, planned(), {"format": "test"})
    hashes = {name: writer.write(name, TENSORS[name]) for name in reversed(TENSORS)}  # in any order
    writer.close()
    return hashes


def test_the_safetensors_library_reads_it_and_so_do_we(tmp_path: Path) -> None:
    hashes = written(tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == TENSORS.keys()
    reader = Reader(tmp_path / "x.safetensors")
    assert reader.metadata == {"format": "test"}
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded[name], tensor), name
        again = reader.read(name, hashes[name])
        assert again.dtype == tensor.dtype
        assert torch.equal(again, tensor)
        assert digest(tensor) == hashes[name]
    with pytest.raises(ExportError, match="tensor half is truncated or altered"):
        reader.read("half", hashes["long"])
    reader.close()
    order = list(reader.tensors)
    sizes = [DTYPES[reader.tensors[name].dtype].itemsize for name in order]
    assert sizes == sorted(sizes, reverse=True), "each tensor is aligned to its own elements"


def test_a_plan_must_be_kept(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="two tensors would be called 'bytes'"):
        Writer(tmp_path / "x", [*planned(), planned()[0]], {})
    writer = Writer(tmp_path / "x", planned(), {})
    with pytest.raises(ExportError, match="half: planned BF16"):
        writer.write("half", TENSORS["half"].float())
    with pytest.raises(ExportError, match="planned but not written"):
        writer.close()
    with pytest.raises(ExportError, match=r"w: values of torch\.complex64 are not stored"):
        dtype_name(torch.complex64, "w")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (b"[0,16]", b"[0,24]", "does not fit its shape"),
        (b'"I64"', b'"U64"', "has the type U64"),
        (b'"shape"', b'"shapf"', "no safetensors file"),
        (b'{"__', b'["__', "no safetensors file"),
    ],
)
def test_a_header_that_lies_is_refused(old: bytes, new: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    written(path)
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    with pytest.raises(ExportError, match=sentence):
        Reader(path)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ExportError, match="does not begin like a safetensors file"):
        Reader(path)
