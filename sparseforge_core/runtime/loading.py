"""From a packed export to a transformers model: everything is checked before the model exists for anyone else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparseforge_core.checkpoint import load_branches
from sparseforge_core.errors import ExportError, unknown
from sparseforge_core.models.folders import is_plain_linear, shell
from sparseforge_core.runtime.archive import Archive, open_archive
from sparseforge_core.runtime.container import DTYPES
from sparseforge_core.runtime.kernels import KernelWeight, supported
from sparseforge_core.runtime.kernels.choices import held_bytes, large_sizes
from sparseforge_core.runtime.kernels.support import check_memory
from sparseforge_core.runtime.kernels.tuning import LARGE_ROWS, tune
from sparseforge_core.runtime.kernels.weight import MODES, Mode, device_number, forms_of
from sparseforge_core.runtime.linear import KernelLinear, PackedWeight, SparseLinear, add_branch
from sparseforge_core.runtime.manifest import WEIGHTS, Manifest, read_manifest
from sparseforge_core.runtime.packed import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Branches = dict[str, tuple[Tensor, Tensor | None]]


@dataclass
class LoadReport:
    """What a load did."""

    packed: list[str] = field(default_factory=list)
    """Sites that stay packed and are unpacked in each forward."""
    unpacked: dict[str, str] = field(default_factory=dict)
    """Sites that were unpacked when loading, and why."""
    resident_bytes: int = 0
    """Of all parameters and packed weights."""
    dense_bytes: int = 0
    """What the same model takes with every weight dense, side branches added in."""
    mode: Mode = "decode"
    """Whether forms for large batches are held beside the packed weights; `resident_bytes` counts them."""

    def __str__(self) -> str:
        share = self.resident_bytes / max(1, self.dense_bytes)
        text = f"{len(self.packed)} sites packed, {self.resident_bytes:,} bytes resident, {share:.4f} of dense"
        text += "" if self.mode == "decode" else f", mode {self.mode}"
        for why in dict.fromkeys(self.unpacked.values()):
            names = [name for name, said in self.unpacked.items() if said == why]
            text += f"; {len(names)} sites dense ({why})"
        return text


def load_packed(folder: Path, *, dense: bool = False, branches: bool = True) -> tuple[PreTrainedModel, LoadReport]:
    """The model of a packed export on the CPU, in evaluation mode, and what was done.

    Args:
        folder: the export.
        dense: unpack every weight once.
        branches: whether side branches take part; without them the weights stay as sparse as they were trained.

    Raises ExportError if a file is missing, truncated, altered, of another format, or does not fit its configuration;
    PatternViolation, naming site and group, if a packed group is not valid.
    """
    manifest = read_manifest(folder, skip=(WEIGHTS,))  # each of its tensors has a hash of its own
    side = load_branches(folder) if branches else {}
    with open_archive(folder, manifest) as archive:
        model: Any = shell(folder, _dtype(manifest))
        _check_fit(folder, model, manifest, side)
        report = LoadReport()
        for name in manifest.tensors:
            _fill(model, name, archive, side.get(name), report, dense=dense)
    model.tie_weights()
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise ExportError(f"{folder} lacks the weight {left[0]}; export the model anew")
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    report.resident_bytes = sum(t.nbytes for t in tensors.values())
    weights = sum(m.packed.resident_bytes for m in model.modules() if isinstance(m, SparseLinear))
    report.dense_bytes = report.resident_bytes - weights + sum(_bytes(manifest, name) for name in report.packed)
    return model.eval().requires_grad_(False), report


def arm(model: Any, device: torch.device, *, mode: Mode = "decode") -> Any:
    """Move a model that holds packed weights to a CUDA device, each arranged for its kernels, one after the other.

    In mode `throughput` large batches are measured first, where this machine has not done so: half a minute, once.
    Raises ExportError before anything moves, naming the site and the reason, if a weight cannot be multiplied there or
    the device has no room.
    """
    check_mode(mode, device)
    sites = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    for path, module in sites.items():
        packed = module.packed
        _check_site(f"{path}.weight", packed.layout, packed.values.dtype, tuple(packed.shape), device)
    tensors = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    shapes = [(module.packed.shape, module.packed.values.dtype) for module in sites.values()]
    if mode == "throughput":
        for dtype in {dtype for _, dtype in shapes}:
            those = [(shape[0], shape[1]) for shape, kind in shapes if kind == dtype]
            tune(those, dtype, LARGE_ROWS, device=device_number(device), copies=True)
    forms = sum(extra_bytes(shape, dtype, device, mode) for shape, dtype in shapes)
    check_memory(sum(tensors.values()) + forms, device, "the model")
    for name, module in sites.items():
        model.set_submodule(name, KernelLinear(KernelWeight.of(module.packed, device=device, mode=mode), module.bias))
    return model.to(device)


def check_mode(mode: str, device: torch.device) -> None:
    """Raise ExportError for a mode that is none, or that a device does not have."""
    if mode not in MODES:
        raise ExportError(unknown("mode", mode, MODES))
    if mode == "throughput" and device.type != "cuda":
        raise ExportError(
            f"mode={mode!r}: holds forms of weights that a GPU multiplies; on {device.type} load with dense=True"
        )


def extra_bytes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None, mode: Mode) -> int:
    """Of what a mode holds beside a packed weight on a GPU; without a device, on one of the committed measurements."""
    out, inputs = shape[0], shape[1]
    forms = forms_of(out, inputs, dtype, device, "mma", mode)
    return held_bytes(out, inputs, forms, dtype.itemsize) - held_bytes(out, inputs, itemsize=dtype.itemsize)


def resident_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of all tensors of modules, each memory once, whoever else looks at a part of it."""
    storages = [t.untyped_storage() for m in modules for t in (*m.parameters(), *m.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def check_device(folder: Path, device: torch.device, *, dense: bool = False, mode: Mode = "decode") -> None:
    """Raise ExportError, before a weight is read, if a CUDA device cannot run an export or has no room for it.

    A weight whose module takes no packed form is unpacked on every device, and so is not asked about.
    """
    check_mode(mode, device)
    if device.type != "cuda":
        return
    manifest, needed = read_manifest(folder, skip=(WEIGHTS,)), 0
    for name, entry in manifest.tensors.items():
        if dense or entry.layout is None:
            needed += _bytes(manifest, name)
            continue
        if len(entry.shape) == 2:
            _check_site(name, entry.layout, DTYPES[entry.dtype], entry.shape, device)
            known = large_sizes(*entry.shape, DTYPES[entry.dtype], device_number(device))  # `arm` measures the others
            needed += extra_bytes(entry.shape, DTYPES[entry.dtype], device, mode) if known else 0
        needed += sum(stored.nbytes for stored in entry.stored())
    check_memory(needed, device, f"{folder}")


def _check_site(name: str, layout: Layout, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise ExportError, naming the site and the reason, if the kernels of a device cannot multiply by a weight."""
    if layout.name != "2:4" or layout.transposed:
        how = "stored transposed" if layout.transposed else f"{layout.name}, not 2:4"
        raise ExportError(f"site {name} is {how}, and the kernels cannot multiply by it; load with dense=True")
    why = supported(device, dtype, shape)
    if why is not None:
        raise ExportError(f"site {name}: {why}")


def check_configuration(folder: Path, manifest: Manifest) -> None:
    """Raise ExportError unless the export's configuration makes a model of exactly its tensors and side branches."""
    _check_fit(folder, shell(folder, _dtype(manifest)), manifest, load_branches(folder))


def _dtype(manifest: Manifest) -> torch.dtype:
    said = manifest.about.get("dtype")
    if said not in DTYPES:
        raise ExportError(f"the manifest says dtype {said!r}; known are {', '.join(DTYPES)}")
    return DTYPES[said]


def _bytes(manifest: Manifest, name: str) -> int:
    entry = manifest.tensors[name]
    return torch.Size(entry.shape).numel() * DTYPES[entry.dtype].itemsize


def _check_fit(folder: Path, model: Any, manifest: Manifest, side: Branches) -> None:
    """Raise ExportError unless the configuration's model has exactly these tensors."""
    places = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name, entry in manifest.tensors.items():
        if name not in places or tuple(places[name].shape) != entry.shape:
            found = tuple(places[name].shape) if name in places else "nothing of that name"
            raise ExportError(f"{folder}: {name} {entry.shape} does not fit its configuration, which has {found}")
    missing = [name for name, parameter in model.named_parameters() if name not in manifest.tensors]
    if missing:
        raise ExportError(f"{folder} lacks {len(missing)} weights of its configuration, for instance {missing[0]}")
    for name, (branch, projection) in side.items():
        _check_branch(folder, name, branch, projection, manifest)


def _check_branch(folder: Path, name: str, branch: Tensor, projection: Tensor | None, manifest: Manifest) -> None:
    """Raise ExportError unless B `[..., out, r]` and P `[..., r, in]` belong to a packed weight."""
    entry = manifest.tensors.get(name)
    if entry is None or entry.layout is None:
        raise ExportError(f"{folder}: the side branch of {name} belongs to no packed weight; export the model anew")
    *lead, out, inputs = entry.layout.matrix_shape(entry.shape)
    blocks = branch.shape[-1] if branch.ndim else 0
    fits = tuple(branch.shape) == (*lead, out, blocks) and blocks > 0
    if projection is None:
        fits = fits and inputs % blocks == 0
    else:
        fits = fits and tuple(projection.shape) == (*lead, blocks, inputs)
    if not fits:
        raise ExportError(f"{folder}: the side branch of {name} {entry.shape} has another shape; export the model anew")


def _fill(
    model: Any,
    name: str,
    archive: Archive,
    branch: tuple[Tensor, Tensor | None] | None,
    report: LoadReport,
    *,
    dense: bool,
) -> None:
    """Give the model one tensor: packed where its module can hold it so, else as it was trained."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    entry = archive.entries[name]
    if entry.layout is None:
        _assign(module, attribute, archive.dense(name))
        return
    if dense:
        why = "asked for"
    elif attribute != "weight" or not is_plain_linear(module):
        why = f"{type(module).__name__} has no packed forward"
    else:
        packed = PackedWeight(archive.packed(name), entry.layout, entry.shape, branch)
        model.set_submodule(path, SparseLinear(packed, module.bias))
        report.packed.append(name)
        return
    weight = archive.dense(name)
    _assign(module, attribute, weight if branch is None else add_branch(weight, entry.layout, branch))
    report.unpacked[name] = why


def _assign(module: nn.Module, attribute: str, tensor: Tensor) -> None:
    if attribute in module._buffers:
        module._buffers[attribute] = tensor
    else:
        setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))
