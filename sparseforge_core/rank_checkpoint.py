"""Checkpoints of a cell that trains on several ranks; what one process reads, many do, and the other way round.

Every rank writes one safetensors file: its rows of what is sharded, and what it alone knows (averages of its own share
of the batches, its random state). What all ranks have alike is written once, by rank 0, after they have compared it: a
replica that has drifted is an error. The manifest holds every file's hash and where the rows of each tensor begin, so
that another number of ranks can take them up. torch's own distributed format describes its files by a pickle; ours
has nothing in it that could run.

On the same number of ranks a run goes on to the bit. On another, sums over ranks are formed in another order.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparseforge_core import files
from sparseforge_core.checkpoint import KEPT, MANIFEST, Checkpoints, Stateful, verify
from sparseforge_core.distributed import (
    first_row,
    is_sharded,
    of_all_ranks,
    of_parts,
    part,
    rank,
    rows_of,
    said_by_all,
    world,
)
from sparseforge_core.errors import CheckpointMismatch, RanksDisagree

log = logging.getLogger(__name__)

ALONE = {"model": "model.safetensors", "optimizer": "optimizer.safetensors", "track": "track.safetensors"}
"""Where a single process keeps what is named `model/...` and so on here."""


class RankCheckpoints(Checkpoints):
    """The checkpoints of one cell in one folder that all ranks see. Every method is collective."""

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, track: Stateful) -> Path:
        """Write everything that determines the steps after `step`. Raises OSError, on all ranks, if one cannot."""
        if world() == 1:
            return super().save(step, model, optimizer, track)
        path = self._path(step)
        state = _state(model, optimizer, track)
        if rank() == 0:
            with files.new_folder(path) as temporary:
                said_by_all(temporary.name)
                hashes = self._write_own(temporary, state)
                body = {"cell": self.cell, "step": step, "world": world(), "files": hashes, "places": _places(state)}
                files.write_json(temporary / MANIFEST, files.seal(body))
            for old in self.steps()[:-KEPT]:
                files.remove_folder(self._path(old))
        else:
            self._write_own(path.parent / said_by_all("")[0], state)
        said_by_all("written")
        return path

    def _restore(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, track: Stateful) -> None:
        if (self._path(step) / _file(0)).is_file():
            _restore(_Reader(self._path(step), self._verified(step)), model, optimizer, track)
        else:
            super()._restore(step, model, optimizer, track)

    def _verified(self, step: int) -> dict[str, Any]:
        """The manifest of a checkpoint of which every rank has checked its share of the files. Raises as `verify`."""
        path = self._path(step)
        manifest = verify(path, self.cell, (rank(), world()))
        if manifest.get("step") != step:
            raise CheckpointMismatch(
                f"{path} says that it is of step {manifest.get('step')!r}; the folder was renamed or altered"
            )
        return manifest

    def _write_own(self, folder: Path, state: _State) -> dict[str, str]:
        """Write this rank's file; the hashes of all ranks' files by their names."""
        path = folder / _file(rank())
        said, digest = "", "0" * 64
        try:
            save_file(state.ours(), path)
            digest = files.sha256(path)
        except (OSError, SafetensorError) as error:
            said = f"{type(error).__name__}: {error}"
        failed = [f"rank {i}: {why}" for i, why in enumerate(said_by_all(said)) if why]
        if failed:
            raise OSError(f"the checkpoint of step folder {folder.name} could not be written; {failed[0]}")
        return {_file(i): found.decode() for i, found in enumerate(of_all_ranks(digest.encode()))}

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer, track: Stateful) -> int:
        """As `Checkpoints.resume`; all ranks take up the same step, the newest that is good on each of them."""
        if world() == 1:
            return super().resume(model, optimizer, track)
        steps = [int(step) for step in said_by_all(" ".join(str(step) for step in self.steps()))[0].split()]
        for step in reversed(steps):
            trouble = ""
            try:
                manifest = self._verified(step)
            except (CheckpointMismatch, OSError) as error:
                trouble = str(error)
            bad = [why for why in said_by_all(trouble) if why]
            if any("another cell" in why for why in bad):
                raise CheckpointMismatch(bad[0])
            if bad:
                log.warning("checkpoint %s is not usable: %s", self._path(step).name, bad[0])
                continue
            _restore(_Reader(self._path(step), manifest), model, optimizer, track)
            return step
        if steps:
            raise CheckpointMismatch(
                f"none of the {len(steps)} checkpoints in {self.folder} verifies; delete that folder to start the cell "
                "anew"
            )
        return 0


class _State:
    """Everything that a checkpoint holds, by name, as this rank has it."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        plain = sorted(name for name, x in tensors.items() if not is_sharded(x))
        digests = of_all_ranks(b"".join(_digest(tensors[name]) for name in plain))
        size = len(digests[0]) // max(len(plain), 1)
        said = [[whole[i * size : (i + 1) * size] for whole in digests] for i in range(len(plain))]
        self.own = {name for name, one in zip(plain, said, strict=True) if len(set(one)) > 1}
        """Tensors of which every rank has another."""
        drifted = sorted(name for name in self.own if not name.startswith("track/"))
        if drifted:
            raise RanksDisagree(
                f"{len(drifted)} tensors differ between ranks that should have them alike, for instance {drifted[0]}; "
                "no checkpoint was written. The replicas have drifted apart: go on from the last checkpoint"
            )

    def ours(self) -> dict[str, Tensor]:
        """What this rank writes."""
        return {
            name: part(x).contiguous()
            for name, x in self.tensors.items()
            if is_sharded(x) or name in self.own or rank() == 0
        }


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, track: Stateful) -> _State:
    tensors = {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}|{key}"] = torch.as_tensor(value).detach()
    state = {**track.state(), "random": torch.get_rng_state()}
    return _State({**tensors, **{f"track/{name}": value for name, value in state.items()}})


def _digest(x: Tensor) -> bytes:
    data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.data).digest()


def _places(state: _State) -> dict[str, Any]:
    """What the manifest says of tensors that are not the same on all ranks."""
    found: dict[str, Any] = {name: {"kind": "own"} for name in state.own}
    for name, x in state.tensors.items():
        if is_sharded(x):
            begins = [rows_of(x, place)[0] for place in range(world())]
            found[name] = {"kind": "rows", "shape": list(x.shape), "begins": begins}
    return found


def _file(place: int) -> str:
    return f"rank-{place:04d}.safetensors"


class _Reader:
    """The tensors of a verified checkpoint of either form, by their names here."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.world: int = manifest.get("world", 1)
        self.places: dict[str, Any] = manifest.get("places", {})
        self.alone = "world" not in manifest
        names = list(ALONE.values()) if self.alone else [_file(place) for place in range(self.world)]
        self.open: dict[str, Any] = {name: safe_open(folder / name, framework="pt") for name in names}

    def names(self, kind: str) -> list[str]:
        """Names of this kind ('model', 'optimizer', 'track')."""
        if self.alone:
            return [f"{kind}/{key}" for key in list(self.open[ALONE[kind]].keys())]
        return [key for key in list(self.open[_file(0)].keys()) if key.startswith(f"{kind}/")]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        place = self.places.get(name, {})
        if "shape" in place:
            return tuple(place["shape"])
        file, key = self._where(name, 0)
        return tuple(self.open[file].get_slice(key).get_shape())

    def whole(self, name: str) -> Tensor:
        """All of a tensor; of what each rank had for itself ours, or where there were others than now, their mean."""
        kind = self.places.get(name, {}).get("kind")
        if kind == "rows":
            return self.rows(name, 0, self.shape(name)[0])
        if kind == "own" and self.world == world():
            return self._read(name, rank())
        return self._mean(name) if kind == "own" else self._read(name, 0)

    def _mean(self, name: str) -> Tensor:
        first = self._read(name, 0)
        if not first.is_floating_point():
            return first
        return torch.stack([self._read(name, place) for place in range(self.world)]).mean(0)

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Rows `begin` to `end` of a tensor, or of the mean of what each rank had for itself."""
        if self.places.get(name, {}).get("kind") == "own":
            return self._mean(name)[begin:end]
        if name not in self.places:
            file, key = self._where(name, 0)
            rows: Tensor = self.open[file].get_slice(key)[begin:end]
            return rows
        begins = [*self.places[name]["begins"], self.shape(name)[0]]
        found = []
        for place, (start, stop) in enumerate(itertools.pairwise(begins)):
            low, high = max(begin, start), min(end, stop)
            if low < high or (begin == end and place == 0):
                file, key = self._where(name, place)
                found.append(self.open[file].get_slice(key)[max(low - start, 0) : max(high - start, 0)])
        return torch.cat(found)

    def _read(self, name: str, place: int) -> Tensor:
        file, key = self._where(name, place)
        tensor: Tensor = self.open[file].get_tensor(key)
        return tensor

    def _where(self, name: str, place: int) -> tuple[str, str]:
        if self.alone:
            kind, _, key = name.partition("/")
            return ALONE[kind], key
        return _file(place), name


@torch.no_grad()
def _restore(reader: _Reader, model: nn.Module, optimizer: torch.optim.Optimizer, track: Stateful) -> None:
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        part(parameter).copy_(_ours(reader, f"model/{name}", parameter))
    optimizer.state.clear()
    for name in reader.names("optimizer"):
        owner, _, field = name.removeprefix("optimizer/").rpartition("|")
        parameter = parameters[owner]
        optimizer.state[parameter][field] = _like(reader, name, parameter)
    track.restore({name: _like(reader, f"track/{name}", value) for name, value in track.state().items()})
    torch.set_rng_state(reader.whole("track/random"))


def _ours(reader: _Reader, name: str, target: Tensor) -> Tensor:
    """This rank's part of a tensor that is kept as `target` is."""
    if not is_sharded(target):
        return reader.whole(name)
    begin = first_row(target)
    return reader.rows(name, begin, begin + part(target).shape[0])


def _like(reader: _Reader, name: str, target: Tensor) -> Tensor:
    """A tensor on the device of `target`, and sharded if that is and has its shape."""
    if not is_sharded(target) or reader.shape(name) != tuple(target.shape):
        return reader.whole(name).to(target.device)
    return of_parts(_ours(reader, name, target).to(target.device), target, tuple(target.shape))
