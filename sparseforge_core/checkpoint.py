"""Checkpoints: safetensors and a sealed manifest of their hashes, complete or ignored, refused by any other cell.

`Checkpoints` holds the state to go on from (weights, masks, moments, the track's statistics, random state);
`save_final` writes the finished model as an ordinary Hugging Face folder, its side branches apart.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparseforge_core import files
from sparseforge_core.distributed import rank, said_by_all, world
from sparseforge_core.errors import CheckpointMismatch
from sparseforge_core.sparsity.masking import Branch

log = logging.getLogger(__name__)

KEPT = 2
"""Good checkpoints kept, so that one that turns out bad still leaves another."""

KINDS = ("model", "optimizer", "track")
"""What begins the name of a tensor in a checkpoint."""

FORM = 2
"""Of the names in a checkpoint. The first had no kinds in them; single processes wrote it, and read it still."""

MANIFEST = "manifest.json"

UNSEALED = ({"cell", "step", "files"}, {"cell", "pattern", "files"})
"""What a manifest holds that was written before manifests were sealed, exactly."""

BRANCHES = "slorb.safetensors"
B_KEY, P_KEY = ".slorb_B", ".slorb_P"
"""After the name of a site's weight: its branch's factors, eq. (1)."""


class Stateful(Protocol):
    """What a checkpoint keeps beyond the weights and their moments."""

    def state(self) -> dict[str, Tensor]:
        """Tensors by name."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` gave."""


class Checkpoints:
    """The checkpoints of one cell in one folder. Every method is collective where several ranks train the cell."""

    def __init__(self, folder: Path, cell: str) -> None:
        self.folder = folder
        self.cell = cell

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, track: Stateful) -> Path:
        """Write everything that determines the steps after `step`."""
        path = self._path(step)
        state = state_of(model, optimizer, track)
        with files.new_folder(path) as temporary:
            for kind in KINDS:
                ours = {name: x.contiguous() for name, x in state.items() if name.startswith(f"{kind}/")}
                save_file(ours, temporary / f"{kind}.safetensors")
            _write_manifest(temporary, {"cell": self.cell, "step": step, "form": FORM})
        self._drop_old()
        return path

    def size(self, model: nn.Module, optimizer: torch.optim.Optimizer, track: Stateful) -> int:
        """Bytes of what `save` writes."""
        return sum(x.numel() * x.element_size() for x in state_of(model, optimizer, track).values())

    def steps(self) -> list[int]:
        """Steps with a complete folder, ascending."""
        found = (re.fullmatch(r"step-(\d+)", p.name) for p in self.folder.glob("step-*") if (p / MANIFEST).is_file())
        return sorted(int(match.group(1)) for match in found if match)

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer, track: Stateful) -> int:
        """Restore the newest checkpoint that verifies, on every rank; returns its step, or 0 where there is none.

        A truncated or altered one is reported and the one before it used. Raises CheckpointMismatch if a
        checkpoint belongs to another cell, or if none of those present verifies.
        """
        steps = [int(step) for step in said_by_all(" ".join(str(step) for step in self.steps()))[0].split()]
        for step in reversed(steps):
            trouble = ""
            try:
                manifest = self._verified(step)
            except (CheckpointMismatch, OSError) as error:
                trouble = str(error)
            bad = [why for why in said_by_all(trouble, 1024) if why]
            if any("another cell" in why for why in bad):
                raise CheckpointMismatch(bad[0])
            if bad:
                log.warning("checkpoint %s is not usable: %s", self._path(step).name, bad[0])
                continue
            self._restore(self._path(step), manifest, model, optimizer, track)
            return step
        if steps:
            raise CheckpointMismatch(
                f"none of the {len(steps)} checkpoints in {self.folder} verifies; delete that folder to start the cell "
                "anew"
            )
        return 0

    def clear(self) -> None:
        """Delete all: the cell is finished."""
        files.remove_folder(self.folder)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _drop_old(self) -> None:
        for old in self.steps()[:-KEPT]:
            files.remove_folder(self._path(old))

    def _verified(self, step: int) -> dict[str, Any]:
        """The manifest of a checkpoint of which every rank has checked its share of the files. Raises as `verify`."""
        path = self._path(step)
        manifest = verify(path, self.cell, (rank(), world()))
        if manifest.get("step") != step:
            raise CheckpointMismatch(
                f"{path} says that it is of step {manifest.get('step')!r}; the folder was renamed or altered"
            )
        return manifest

    @torch.no_grad()
    def _restore(
        self,
        path: Path,
        manifest: dict[str, Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        track: Stateful,
    ) -> None:
        found: dict[str, Tensor] = {}
        for kind in KINDS:
            kept = load_file(path / f"{kind}.safetensors")
            found |= kept if "form" in manifest else {f"{kind}/{name}": x for name, x in kept.items()}
        for name, parameter in model.named_parameters():
            parameter.copy_(found[f"model/{name}"])
        take_up(found, model, optimizer, track)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, track: Stateful) -> dict[str, Tensor]:
    """Everything that a checkpoint holds, by name, as this rank has it."""
    found = {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for field, value in optimizer.state.get(parameter, {}).items():
            found[f"optimizer/{name}|{field}"] = torch.as_tensor(value).detach()
    state = {**track.state(), "random": torch.get_rng_state()}
    return found | {f"track/{name}": value for name, value in state.items()}


def owner_of(name: str) -> tuple[str, str]:
    """The parameter that a moment belongs to, and what it is called in the optimizer's state."""
    owner, _, field = name.removeprefix("optimizer/").rpartition("|")
    return owner, field


def take_up(found: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, track: Stateful) -> None:
    """Go on from what `state_of` gave, the weights excepted."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for name, value in found.items():
        if name.startswith("optimizer/"):
            owner, field = owner_of(name)
            optimizer.state[parameters[owner]][field] = value.to(parameters[owner].device)
    state = {name.removeprefix("track/"): value for name, value in found.items() if name.startswith("track/")}
    torch.set_rng_state(state.pop("random"))
    track.restore(state)


def verify(folder: Path, cell: str | None = None, share: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """The manifest of a checkpoint folder, after checking every file's hash.

    With `share` (i, n) it checks every n-th file from the i-th on: n ranks check all of them together. Raises
    CheckpointMismatch naming the file that is missing, truncated or altered, or the cell it belongs to.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        hashes: dict[str, str] = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointMismatch(
            f"{folder} has no readable {MANIFEST}: {error}; delete {folder} to make it anew"
        ) from error
    if not files.seal_fits(manifest) and set(manifest) not in UNSEALED:
        raise CheckpointMismatch(f"{folder / MANIFEST} was altered; delete {folder} to make it anew")
    if cell is not None and manifest.get("cell") != cell:
        raise CheckpointMismatch(
            f"{folder} belongs to another cell: it says {manifest.get('cell')!r}, wanted {cell!r}; move it away"
        )
    for name, digest in list(hashes.items())[share[0] :: share[1]]:
        file = folder / name
        if not file.is_file() or files.sha256(file) != digest:
            which = _altered_tensors(file, manifest.get("tensors", {}).get(name, {}))
            raise CheckpointMismatch(f"{file} is missing, truncated or altered{which}; delete {folder} to make it anew")
    return manifest


def save_final(folder: Path, model: Any | None, branches: dict[str, Branch], about: dict[str, Any]) -> None:
    """Write the finished model: Hugging Face safetensors, side branches in BRANCHES, the manifest last.

    `model` None stands for a cell that leaves its source untouched: only the manifest is written.
    """
    with files.new_folder(folder) as temporary:
        if model is not None:
            model.save_pretrained(temporary)
        if branches:
            save_file(_branch_state(branches), temporary / BRANCHES)
        _write_manifest(temporary, about)
    (folder.parent / MANIFEST).unlink(missing_ok=True)  # of a model before, whose weights were dropped


def drop_weights(folder: Path) -> None:
    """Delete a finished model, if it is there and has files, and keep its manifest beside its folder.

    What it was stays known to the last tensor, and nothing says that it is at hand: its folder is gone. A cell that
    left its source untouched has nothing to delete.
    """
    if (folder / MANIFEST).is_file() and files.read_json(folder / MANIFEST)["files"]:
        files.write_text(folder.parent / MANIFEST, (folder / MANIFEST).read_text(encoding="utf-8"))
        files.remove_folder(folder)


def dropped(directory: Path) -> bool:
    """Whether the weights that the train stage in `directory` made were deleted on purpose."""
    return (directory / MANIFEST).is_file() and not (directory / "final").is_dir()


def load_branches(folder: Path) -> dict[str, tuple[Tensor, Tensor | None]]:
    """(B, P or None for the fixed one) of each site of a finished model; empty where it has no side branches."""
    if not (folder / BRANCHES).is_file():
        return {}
    state = load_file(folder / BRANCHES)
    names = [name.removesuffix(B_KEY) for name in state if name.endswith(B_KEY)]
    return {name: (state[name + B_KEY], state.get(name + P_KEY)) for name in names}


def _branch_state(branches: dict[str, Branch]) -> dict[str, Tensor]:
    state = {name + B_KEY: branch.values for name, branch in branches.items()}
    state |= {name + P_KEY: b.projection for name, b in branches.items() if b.projection is not None}
    return {name: value.contiguous().cpu() for name, value in state.items()}


def _write_manifest(folder: Path, about: dict[str, Any]) -> None:
    hashes = {file.name: files.sha256(file) for file in sorted(folder.iterdir()) if file.name != MANIFEST}
    tensors = {name: tensor_hashes(folder / name) for name in hashes if name.endswith(".safetensors")}
    files.write_json(folder / MANIFEST, files.seal({**about, "files": hashes, "tensors": tensors}))


def tensor_hashes(file: Path) -> dict[str, str]:
    """SHA-256 of each tensor's bytes in a safetensors file, read a tensor at a time."""
    hashes = {}
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        for name, about in header.items():
            if name != "__metadata__":
                begin, end = about["data_offsets"]
                opened.seek(8 + length + begin)
                hashes[name] = hashlib.sha256(opened.read(end - begin)).hexdigest()
    return hashes


def _altered_tensors(file: Path, wanted: dict[str, str]) -> str:
    """Which tensors of a damaged file are not what the manifest says, where the file can still be read that far."""
    try:
        found = tensor_hashes(file)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, MemoryError, OverflowError):
        return ""
    names = [name for name, digest in sorted(wanted.items()) if found.get(name) != digest]
    return f" (tensor {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''})" if names else ""
