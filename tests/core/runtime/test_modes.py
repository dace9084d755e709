"""What mode `throughput` holds, joined and counted, and which batches mode `decode` refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseforge_core.errors import ExportError
from sparseforge_core.runtime import load_sparse, prediction
from sparseforge_core.runtime.decode import admission, plain
from sparseforge_core.runtime.decode.loop import Decoder
from sparseforge_core.runtime.decode.on_kernels import Sparse, on_kernels
from sparseforge_core.runtime.decode.parts import Block, Parts, parts_of
from sparseforge_core.runtime.decode.products import Dense, Modules, reference
from sparseforge_core.runtime.kernels import KernelWeight, choices, table
from sparseforge_core.runtime.kernels.table import Choice
from sparseforge_core.runtime.linear import KernelLinear, SparseLinear
from sparseforge_core.runtime.loading import resident_bytes
from tests.core.runtime.exports import packed_export, pruned_model
from tests.core.runtime.test_decode import said
from tests.tiny import tokens


def test_what_large_batches_hold_is_counted_and_shared(tmp_path: Path) -> None:
    """Mode `throughput` on the CPU: a dense copy of the joined weight, whose rows the modules hold; nothing twice."""
    model: Any = load_sparse(packed_export(pruned_model("llama"), tmp_path))
    expected = said(Decoder(parts_of(model, reference), capacity=30), tokens(1, 6), 20)
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLinear):
            weight = KernelWeight.of(module.packed, mode="throughput")
            model.set_submodule(name, KernelLinear(weight, module.bias))
    before, logits = resident_bytes([model]), model(tokens()).logits
    parts = parts_of(model, on_kernels(plain))
    assert said(Decoder(parts, capacity=30), tokens(1, 6), 20) == expected
    assert torch.equal(model(tokens()).logits, logits)
    qkv, layer = parts.blocks[0].qkv, model.model.layers[0].self_attn
    whole = qkv.kernel  # type: ignore[attr-defined]
    assert whole.mode == "throughput"
    assert layer.v_proj.kernel.dense_copy.data_ptr() == whole.dense_copy[64:].data_ptr()
    assert qkv.held_bytes == qkv.nbytes + 3 * 32 * 32 * 4
    assert resident_bytes([model, *(p.kernel for p in parts.products if isinstance(p, Sparse))]) == before
    whole.hold("decode")
    assert whole.dense_copy is None
    assert whole.resident_bytes == qkv.nbytes


def seven_b(mode: str) -> Parts:
    """One layer of LLaMA-2-7B as a GPU holds it, without memory: what is decided from shapes and measurements."""
    sizes, blocks = prediction.KNOWN["llama-2-7b"], {}
    for name, (out, inputs) in prediction.product_shapes(sizes).items():
        values = torch.empty(out // 16, inputs // 256, 8, 32, 8, dtype=torch.bfloat16, device="meta")
        weight = KernelWeight(values, torch.empty(0, dtype=torch.int32, device="meta"), (out, inputs), "mma")
        if mode == "throughput":
            weight.mode = "throughput"
            forms = choices.forms_for(out, inputs, torch.bfloat16, None)
            weight.dense_copy = torch.empty(0, device="meta") if "dense" in forms else None
            weight.compressed = torch.empty(0, device="meta") if "cusparselt" in forms else None
        blocks["out" if name == "o" else name] = Sparse(weight, None, name, plain)
    empty = torch.empty(0)
    block = Block(norm=empty, mlp_norm=empty, **blocks)  # type: ignore[arg-type]
    head = Dense(torch.empty(1, 1), None, "head")
    return Parts(dataclasses.replace(sizes, layers=1), empty, [block], empty, head, empty, empty)


@pytest.fixture
def slow_beyond_64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measurements of LLaMA-2-7B's shapes by which 128 rows take 1.25 times as long as dense, but with a dense copy."""
    ways = (Choice("expand", seconds=1.25e-3), Choice("dense", seconds=1e-3))
    lines = {
        table.key(out, inputs, 128, torch.bfloat16): ways
        for out, inputs in prediction.product_shapes(prediction.KNOWN["llama-2-7b"]).values()
    }
    choices.choose.cache_clear()
    monkeypatch.setattr(table, "read_table", lambda major, minor: lines)
    yield
    choices.choose.cache_clear()


@pytest.mark.usefixtures("slow_beyond_64")
def test_batches_that_were_measured_to_lose_are_refused() -> None:
    packed, prepared = seven_b("decode"), seven_b("throughput")
    for rows in (1, 17, 64):
        assert admission.refusal(packed, rows) is None
    for rows in (65, 100, 128):
        why = admission.refusal(packed, rows)
        assert why is not None
        assert why.startswith(f"a step of {rows} rows: its products took 1.25 times as long as dense ones")
        assert "at most 64 rows at a time, or load with mode='throughput'" in why
        assert admission.refusal(prepared, rows) is None, "a dense copy is held where it wins"
    assert all(product.unpacks(128) for product in packed.products if isinstance(product, Sparse))
    assert not any(product.unpacks(128) for product in prepared.products)
    with pytest.raises(ExportError, match="a step of 128 rows"):
        Decoder(packed, batch=128, capacity=20)


def test_no_batch_of_llama_is_refused() -> None:
    """By the committed measurements the packed weight alone takes every number of rows."""
    packed = seven_b("decode")
    for rows in (1, 16, 64, 65, 96, 128, 200, 256, 500, 1000, 2048, 8192):
        assert admission.refusal(packed, rows) is None, rows
        assert not any(product.unpacks(rows) for product in packed.products), rows


def test_a_shape_that_nobody_measured_is_multiplied_as_it_is_packed() -> None:
    values = torch.empty(1, 1, 8, 32, 8, dtype=torch.bfloat16, device="meta")
    weight = KernelWeight(values, torch.empty(0, dtype=torch.int32, device="meta"), (16, 256), "mma")
    parts = dataclasses.replace(seven_b("decode"), blocks=[], head=Sparse(weight, None, "head", plain))
    apart = dataclasses.replace(parts, head=Modules([KernelLinear(weight, None)], "head"))
    for rows in (64, 65, 1000):
        for each in (parts, apart):
            assert admission.refusal(each, rows) is None
            assert not each.head.unpacks(rows)
    assert choices.choose(16, 256, 1000, torch.bfloat16, None).kind == "kernel"
