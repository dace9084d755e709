"""Exports: the same bytes each time, plain transformers can load them, nothing damaged or dense passes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseforge_core.errors import ExportError, PatternViolation
from sparseforge_core.export.source import open_any, open_export
from sparseforge_core.export.verify import verify_export
from sparseforge_core.export.write import export
from sparseforge_core.models.hub import from_pretrained
from sparseforge_core.runtime import load_sparse
from sparseforge_core.runtime.manifest import MANIFEST, WEIGHTS, read_manifest, write_sums
from sparseforge_core.sparsity.patterns import BLOCK_16, nm
from tests.core.runtime.exports import logits_of, packed_export, pruned_model, source_of


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def plain(folder: Path) -> Any:
    """As a user of transformers loads it."""
    return from_pretrained(dtype="auto", what=str(folder), pretrained_model_name_or_path=str(folder))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_export_load_export_gives_the_same_bytes(architecture: str, tmp_path: Path) -> None:
    first = packed_export(pruned_model(architecture), tmp_path, commit="abc")
    export(open_export(first), tmp_path / "again", form="packed", commit="another commit")
    assert digests(first) == digests(tmp_path / "again")
    export(open_export(first), tmp_path / "dense", form="hf")
    export(open_export(tmp_path / "dense"), tmp_path / "third", form="packed")
    assert digests(first)[WEIGHTS] == digests(tmp_path / "third")[WEIGHTS]


@pytest.mark.parametrize(("architecture", "pattern"), [("llama", nm(2, 4)), ("gpt2", BLOCK_16), ("mixtral", nm(4, 8))])
def test_a_hugging_face_export_loads_in_plain_transformers(architecture: str, pattern: Any, tmp_path: Path) -> None:
    model = pruned_model(architecture, pattern)
    source = source_of(model, tmp_path / "saved", pattern)
    sites = len(source.sites)
    export(source, tmp_path / "hf", form="hf")
    assert torch.equal(logits_of(plain(tmp_path / "hf")), logits_of(model))
    saved, ours = load_file(tmp_path / "saved/model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    assert saved.keys() == ours.keys()
    assert all(torch.equal(saved[name], ours[name]) for name in saved)
    found = verify_export(tmp_path / "hf")
    assert (found.format, found.sites) == ("sparseforge-hf", sites)
    assert found.groups > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_export_is_the_cast_model(dtype: str, tmp_path: Path) -> None:
    model = pruned_model("llama")
    folder = packed_export(model, tmp_path, dtype=dtype)
    kind = getattr(torch, dtype)
    wanted = from_pretrained(dtype=kind, what="saved", pretrained_model_name_or_path=str(tmp_path / "saved"))
    loaded = load_sparse(folder)
    assert loaded.dtype == loaded.config.dtype == kind
    assert torch.equal(logits_of(loaded), logits_of(wanted))
    assert verify_export(folder).sites == 14


def test_a_value_too_large_for_the_type_is_refused_by_name(tmp_path: Path) -> None:
    model = pruned_model("llama")
    model.model.layers[1].self_attn.q_proj.weight.data[5] *= 1e9
    with pytest.raises(ExportError, match=r"layers\.1\.self_attn\.q_proj\.weight holds values beyond torch\.float16"):
        packed_export(model, tmp_path, dtype="float16")
    model.model.norm.weight.data[0] = float("nan")
    for form in ("packed", "hf"):
        with pytest.raises(ExportError, match=r"model\.norm\.weight holds a value that is not finite"):
            export(source_of(model, tmp_path / form), tmp_path / "out", form=form)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["packed", "hf"])
def test_a_model_that_is_not_sparse_is_refused_by_site_and_leaves_nothing(form: str, tmp_path: Path) -> None:
    model = pruned_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[7, 4:8] = 1.0
    with pytest.raises(PatternViolation, match=r"site model\.layers\.1\.mlp\.down_proj\.weight"):
        export(source_of(model, tmp_path / "saved"), tmp_path / "out", form=form)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


def test_what_cannot_be_packed_names_what_to_use(tmp_path: Path) -> None:
    source = source_of(pruned_model("llama", BLOCK_16), tmp_path / "saved", BLOCK_16)
    with pytest.raises(PatternViolation, match=r"not block-16; use --format hf"):
        export(source, tmp_path / "out", form="packed")
    with pytest.raises(ExportError, match=r"compressed-tensors reads no 2:4 weights.*use --format hf or packed"):
        export(source, tmp_path / "out", form="compressed-tensors")
    with pytest.raises(ExportError, match="unknown format 'gguf'"):
        export(source, tmp_path / "out", form="gguf")
    with pytest.raises(ExportError, match="unknown dtype 'int8'"):
        export(source, tmp_path / "out", form="hf", dtype="int8")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(ExportError, match="exists and is no export"):
        export(source, tmp_path / "mine", form="hf")
    assert not (tmp_path / "out").exists()


def test_negative_zeros_of_a_multiplied_mask_become_positive_and_are_counted(tmp_path: Path) -> None:
    model = pruned_model("llama")
    weight = model.model.layers[0].mlp.up_proj.weight.data
    weight[3] = torch.where(weight[3] == 0, -0.0, weight[3])
    folder = packed_export(model, tmp_path)
    dropped = read_manifest(folder).about["negative_zeros_dropped"]
    assert dropped == {"model.layers.0.mlp.up_proj.weight": 16}
    assert "16 pruned weights were -0.0" in (folder / "README.md").read_text()
    assert torch.equal(logits_of(load_sparse(folder)), logits_of(model))
    verify_export(folder)


def _side_branch(model: Any, folder: Path) -> Any:
    """Save the model with a branch of a fixed and one of a trained projection; returns it with both added in."""
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    up, down = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down"))
    fixed = torch.randn(64, 4, generator=generator)
    b, p = torch.randn(32, 2, generator=generator), torch.randn(2, 64, generator=generator)
    save_file({f"{up}.slorb_B": fixed, f"{down}.slorb_B": b, f"{down}.slorb_P": p}, folder / "slorb.safetensors")
    model.model.layers[0].mlp.up_proj.weight.data += fixed.repeat_interleave(8, dim=-1)
    model.model.layers[0].mlp.down_proj.weight.data += b @ p
    return model


def test_side_branches_stay_apart_and_take_part(tmp_path: Path) -> None:
    effective = _side_branch(pruned_model("llama"), tmp_path / "saved")
    source = open_any(str(tmp_path / "saved"), tmp_path, nm(2, 4))
    export(source, tmp_path / "packed", form="packed")
    for dense in (False, True):
        assert torch.equal(logits_of(load_sparse(tmp_path / "packed", dense=dense)), logits_of(effective))
    assert verify_export(tmp_path / "packed").sites == 14, "the stored weights are still 2:4"
    export(open_export(tmp_path / "packed"), tmp_path / "again", form="packed")
    assert digests(tmp_path / "packed") == digests(tmp_path / "again")
    assert "plain transformers ignores it" in (tmp_path / "packed" / "README.md").read_text()
    export(open_export(tmp_path / "packed"), tmp_path / "hf", form="hf")
    assert verify_export(tmp_path / "hf").sites == 14
    apart = load_file(tmp_path / "hf" / "slorb.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in apart.items()} == {
        "model.layers.0.mlp.up_proj.weight.slorb_B": (64, 4),
        "model.layers.0.mlp.down_proj.weight.slorb_B": (32, 2),
        "model.layers.0.mlp.down_proj.weight.slorb_P": (2, 64),
    }


def test_verification_finds_a_weight_that_is_another(tmp_path: Path) -> None:
    folder = packed_export(pruned_model("llama"), tmp_path)
    body = json.loads((folder / MANIFEST).read_text())
    site = "model.layers.0.self_attn.q_proj.weight"  # square: transposed still fits
    body["tensors"][site]["transposed"] = True
    (folder / MANIFEST).write_text(json.dumps(body))
    write_sums(folder)
    with pytest.raises(ExportError, match=rf"{site} is not the tensor that was exported"):
        verify_export(folder)


def test_verification_of_a_hugging_face_export_reads_the_weights(tmp_path: Path) -> None:
    export(source_of(pruned_model("llama"), tmp_path / "saved"), tmp_path / "hf", form="hf")
    file = tmp_path / "hf" / "model.safetensors"
    state = load_file(file)
    state["model.layers.1.mlp.up_proj.weight"][2, 8] += 1.0
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"model\.safetensors is truncated or altered"):
        verify_export(tmp_path / "hf")
    write_sums(tmp_path / "hf")
    with pytest.raises(ExportError, match=r"layers\.1\.mlp\.up_proj\.weight is not the tensor"):
        verify_export(tmp_path / "hf")
    with pytest.raises(ExportError, match="is a sparseforge-hf export"):
        load_sparse(tmp_path / "hf")


def test_what_is_no_source_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is no cell in"):
        open_any("nothing", tmp_path)
    pruned_model("llama").save_pretrained(tmp_path / "saved")
    with pytest.raises(ExportError, match="does not say which pattern"):
        open_any(str(tmp_path / "saved"), tmp_path)


@pytest.mark.parametrize(
    ("dtype", "form", "sentence"),
    [
        ("bfloat16", "packed", "compute capability 9.0"),
        ("float32", "packed", "loads this export as its reference does"),
        ("bfloat16", "hf", "Export it as packed for this project's runtime"),
    ],
)
def test_the_card_says_who_runs_it_fast(tmp_path: Path, dtype: str, form: str, sentence: str) -> None:
    export(source_of(pruned_model("llama"), tmp_path / "saved"), tmp_path / "out", form=form, dtype=dtype)
    said = (tmp_path / "out" / "README.md").read_text()
    assert "No public engine gains speed" in said
    assert sentence in said
    others = {"compute capability 9.0", "as its reference does", "Export it as packed"} - {sentence}
    assert sum(other in said and other not in sentence for other in others) == 0
