"""Writing an export: a finished model as a Hugging Face folder or in the packed format.

Side branches stay apart in every format: added to the weights they would fill the zeros.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sparseforge_core import files, specs
from sparseforge_core.checkpoint import B_KEY, BRANCHES, P_KEY
from sparseforge_core.errors import ExportError
from sparseforge_core.export.card import card
from sparseforge_core.export.source import Exportable
from sparseforge_core.models.folders import save_about
from sparseforge_core.runtime.archive import Item, write_weights
from sparseforge_core.runtime.container import NAMES, digest, dtype_name
from sparseforge_core.runtime.manifest import (
    HF,
    PACKED,
    SUMS,
    Entry,
    Manifest,
    write_sums,
)
from sparseforge_core.runtime.packed import layout_of
from sparseforge_core.sparsity.patterns import all_finite, check_weight

FORMATS = {"packed": PACKED, "hf": HF}
"""What `--format` says -> the format's name in the manifest."""

REFUSED = {
    "compressed-tensors": "compressed-tensors reads no 2:4 weights since 0.15 (its bitmask names have no compressor "
    "left), and transformers ignores such a configuration without a word; use --format hf or packed",
}
"""Formats that people ask for, and why there is none."""

EXPORT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@torch.no_grad()
def export(source: Exportable, out: Path, *, form: str, dtype: str | None = None, commit: str = "") -> Manifest:
    """Write `source` to the folder `out` and return its manifest.

    Args:
        source: what `export_source` opened.
        out: must be new, empty or an older export, which is replaced when the new one is complete.
        form: a key of FORMATS.
        dtype: a key of EXPORT_DTYPES to cast weights to; None keeps the types that they have.
        commit: of the code that exports; a re-export keeps the first one's.

    Raises ExportError for a format, folder or type that cannot be; PatternViolation, naming site and group, for a
    weight that is not as sparse as its pattern says. Nothing is left behind then.
    """
    check_request(form, dtype)
    if out.exists() and not (out.is_dir() and ((out / SUMS).is_file() or not any(out.iterdir()))):
        raise ExportError(f"{out} exists and is no export; name a new folder")
    if form == "packed" and not source.sites:
        raise ExportError(f"{source.what} has no sparse weights to pack; use --format hf")
    if dtype is not None:
        _cast(source, EXPORT_DTYPES[dtype])
    about = {"git_commit": commit, **source.about, "dtype": dtype_name(source.model.dtype, source.what)}
    about["sites"] = {
        name: {"pattern": specs.encode(pattern), "transposed": transposed}
        for name, (pattern, transposed) in source.sites.items()
    }
    about["branches"] = {
        name: {"blocks": b.shape[-1], "projection": "fixed" if p is None else "trained"}
        for name, (b, p) in source.branches.items()
    }
    with files.new_folder(out) as folder:
        for file in source.copied:
            shutil.copyfile(file, folder / file.name)
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(folder)
        if source.branches:
            save_file(_branch_state(source), folder / BRANCHES)
        write = _write_packed if form == "packed" else _write_hf
        manifest = write(source, folder, about)
        manifest.write(folder)
        files.write_text(folder / "README.md", card(manifest))
        write_sums(folder)
    return manifest


def check_request(form: str, dtype: str | None) -> None:
    """Raise ExportError, saying why and what else there is, for a format or type that is not written."""
    if form not in FORMATS:
        raise ExportError(REFUSED.get(form) or f"unknown format {form!r}; known are {', '.join(FORMATS)}")
    if dtype is not None and dtype not in EXPORT_DTYPES:
        raise ExportError(f"unknown dtype {dtype!r}; known are {', '.join(EXPORT_DTYPES)}")


def _write_packed(source: Exportable, folder: Path, about: dict[str, Any]) -> Manifest:
    layouts = {
        name: layout_of(pattern, transposed=transposed, where=name)
        for name, (pattern, transposed) in source.sites.items()
    }
    tensors = _tensors(source.model)
    items = [Item.of(name, tensor, layouts.get(name)) for name, tensor in tensors.items()]
    _refuse_infinite(tensors)
    save_about(source.model, folder, source.model.dtype)
    entries, dropped = write_weights(folder, items)
    return Manifest(PACKED, entries, about | ({"negative_zeros_dropped": dropped} if dropped else {}))


def _write_hf(source: Exportable, folder: Path, about: dict[str, Any]) -> Manifest:
    entries = {}
    tensors = _tensors(source.model)
    _refuse_infinite(tensors)
    for name, (pattern, transposed) in source.sites.items():
        weight = tensors[name]
        check_weight(weight.transpose(-1, -2) if transposed else weight, pattern, name)
        entries[name] = Entry(name, NAMES[weight.dtype], tuple(weight.shape), digest(weight))
    source.model.save_pretrained(folder)
    return Manifest(HF, entries, about)


def _tensors(model: Any) -> dict[str, Tensor]:
    """Every tensor of a model's state once: parameters, tied ones under their first name, and stored buffers."""
    parameters = dict(model.named_parameters())
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in aliases}
    return {name: tensor.detach() for name, tensor in {**parameters, **buffers}.items()}


def _cast(source: Exportable, dtype: torch.dtype) -> None:
    """Cast every weight of one of the known types. Raises ExportError, naming it, if a value does not fit."""
    for name, parameter in source.model.named_parameters():
        if parameter.dtype in EXPORT_DTYPES.values():
            cast = parameter.detach().to(dtype)
            if not all_finite(cast) and all_finite(parameter.detach()):
                raise ExportError(f"{name} holds values beyond {dtype}; export another --dtype")
            parameter.data = cast
    source.model.config.dtype = dtype
    for name, (branch, projection) in source.branches.items():
        source.branches[name] = (branch.to(dtype), None if projection is None else projection.to(dtype))


def _refuse_infinite(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ExportError(f"{name} holds a value that is not finite; this model would answer nothing")


def _branch_state(source: Exportable) -> dict[str, Tensor]:
    state = {name + B_KEY: b for name, (b, _) in source.branches.items()}
    state |= {name + P_KEY: p for name, (_, p) in source.branches.items() if p is not None}
    return {name: value.contiguous() for name, value in state.items()}
