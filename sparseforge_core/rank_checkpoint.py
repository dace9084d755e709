"""Checkpoints of a cell that trains on several ranks; what one process reads, many do, and the other way round.

Sharded state goes through torch's distributed checkpoint (DCP): its planner decides which rank writes what and which
pieces of which files a rank reads, its safetensors storage keeps each piece with where in its tensor it begins, so that
another number of ranks can take it up. Nothing in these files could run: DCP's default storage would describe them by a
pickle, its safetensors storage needs no description beside the files. Around it stands what a checkpoint is here: a
folder under a temporary name, synced and renamed, and a sealed manifest with the hash of every file and tensor,
verified before anything is read. What DCP does not do is done here: state that every rank has alike is compared before
it is written once (a replica that has drifted is an error), and what each rank alone knows (averages of its own share
of the batches, its random state) is kept for each.

On the same number of ranks a run goes on to the bit. On another, sums over ranks are formed in another order.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseforge_core import files
from sparseforge_core.checkpoint import FORM, MANIFEST, Checkpoints, Stateful, owner_of, state_of, take_up
from sparseforge_core.distributed import cut, is_sharded, of_all_ranks, part, rank, said_by_all, world
from sparseforge_core.errors import CheckpointMismatch, RanksDisagree


class RankCheckpoints(Checkpoints):
    """The checkpoints of one cell in one folder that all ranks see. Every method is collective."""

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, track: Stateful) -> Path:
        """Write everything that determines the steps after `step`. Raises OSError, on all ranks, if one cannot."""
        if world() == 1:
            return super().save(step, model, optimizer, track)
        from sparseforge_core import shard_files

        path = self._path(step)
        own, state = _told_apart(state_of(model, optimizer, track))
        about = {"cell": self.cell, "step": step, "form": FORM, "world": world(), "own": sorted(own)}
        if rank() == 0:
            with files.new_folder(path) as temporary:
                said_by_all(temporary.name)
                shard_files.write(temporary, state, about)
            self._drop_old()
        else:
            shard_files.write(path.parent / said_by_all("")[0], state, about)
        said_by_all("written")
        return path

    def _verified(self, step: int) -> dict[str, Any]:
        manifest, path = super()._verified(step), self._path(step)
        strange = {file.name for file in path.glob("*.safetensors")} - set(manifest["files"])
        if strange:  # torch's reader reads whatever lies there
            raise CheckpointMismatch(f"{path} has {min(strange)}, which is not in its {MANIFEST}; move that file away")
        if "places" in manifest or (world() > 1 and "form" not in manifest):
            raise CheckpointMismatch(
                f"{path} is in a form of an earlier version, which "
                f"{'several ranks cannot read' if 'places' not in manifest else 'is not read any more'}; finish the "
                "cell with that version, or delete the folder"
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
        if world() == 1 and "world" not in manifest:
            super()._restore(path, manifest, model, optimizer, track)
            return
        saved = _Saved(path, manifest)
        parameters = dict(model.named_parameters())
        state = {f"track/{name}": value for name, value in {**track.state(), "random": torch.get_rng_state()}.items()}
        targets = {f"model/{name}": parameter.detach() for name, parameter in parameters.items()}
        targets |= {name: saved.room(name, parameters[owner_of(name)[0]]) for name in saved.moments()}
        targets |= {name: saved.room(name, value) for name, value in state.items()}
        saved.fill(targets)
        take_up(targets, model, optimizer, track)


def _told_apart(tensors: dict[str, Tensor]) -> tuple[set[str], dict[str, Tensor]]:
    """The names of tensors of which every rank has another, and all tensors with those under a name of this rank's.

    Raises RanksDisagree, on all ranks, where weights or moments differ that all should have alike.
    """
    plain = sorted(name for name, x in tensors.items() if not is_sharded(x))
    digests = of_all_ranks(b"".join(_digest(tensors[name]) for name in plain))
    size = len(digests[0]) // max(len(plain), 1)
    own = {name for i, name in enumerate(plain) if len({all_[i * size : (i + 1) * size] for all_ in digests}) > 1}
    drifted = sorted(name for name in own if not name.startswith("track/"))
    if drifted:
        raise RanksDisagree(
            f"{len(drifted)} tensors differ between ranks that should have them alike, for instance {drifted[0]}; "
            "no checkpoint was written. The replicas have drifted apart: go on from the last checkpoint"
        )
    return own, {_of_rank(name, rank()) if name in own else name: x for name, x in tensors.items()}


def _digest(x: Tensor) -> bytes:
    data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.data).digest()


def _of_rank(name: str, place: int) -> str:
    """The name in the files of what the rank at `place` has under `name`."""
    return f"{name}@{place}"


class _Saved:
    """The tensors of a verified checkpoint, by their names here."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        from sparseforge_core import shard_files

        self.files = shard_files
        self.folder = folder
        self.world: int = manifest.get("world", 1)
        self.own = frozenset(manifest.get("own", ()))
        self.found = self.files.described(folder)

    def moments(self) -> list[str]:
        """Names of the optimizer's state."""
        return [name for name in self.found if name.startswith("optimizer/")]

    def room(self, name: str, like: Tensor) -> Tensor:
        """An empty tensor for what is kept, on the device of `like`, and sharded if that is and has its shape."""
        kept = _of_rank(name, 0) if name in self.own else name
        if kept not in self.found:
            raise CheckpointMismatch(
                f"{self.folder} has no {name}: other code wrote it; finish the cell with that, or delete the folder"
            )
        shape, dtype = self.found[kept]
        if is_sharded(like) and shape == like.shape:
            return torch.empty_like(like, dtype=dtype, requires_grad=False)
        return torch.empty(shape, dtype=dtype, device=like.device)

    def fill(self, targets: dict[str, Tensor]) -> None:
        """Read what is kept under the targets' names into them: whole, or this rank's rows of what is sharded.

        Of what each rank had for itself it is ours, or where there were others than now, their mean.
        """
        if self.world == world():
            named = {_of_rank(name, rank()) if name in self.own else name: target for name, target in targets.items()}
            self.files.read(self.folder, named)
            return
        self.files.read(self.folder, {name: target for name, target in targets.items() if name not in self.own})
        for name in sorted(self.own & targets.keys()):  # on all ranks in one order
            part(targets[name]).copy_(part(cut(self._mean(name), targets[name])))

    def _mean(self, name: str) -> Tensor:
        """Of what each rank had; of whole numbers, which have none, the first rank's."""
        shape, dtype = self.found[_of_rank(name, 0)]
        each = [torch.empty(shape, dtype=dtype) for _ in range(self.world)]
        self.files.read(self.folder, {_of_rank(name, place): one for place, one in enumerate(each)})
        return torch.stack(each).mean(0) if dtype.is_floating_point else each[0]
