"""Tensors of all ranks in one folder of safetensors files, and back: torch's distributed checkpoint (DCP).

DCP's planner decides which rank writes what, and which pieces of which files a rank reads for the rows that it holds.
Its safetensors storage keeps in each file where in its tensor each piece begins; there is no description beside the
files (that of DCP's default storage is a pickle), and a reader needs nothing but them. The manifest with their hashes
is ours: every rank hashes what it wrote, and rank 0 writes them down once all have.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
    SAVED_OFFSETS_KEY,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from sparseforge_core import files
from sparseforge_core.checkpoint import MANIFEST, tensor_hashes
from sparseforge_core.distributed import control, world
from sparseforge_core.errors import CheckpointMismatch


def write(folder: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write what all ranks have into `folder`, then the manifest: `about` with the hash of every file and tensor.

    A sharded tensor is written by those that hold its parts, one that several ranks have by one of them. Collective:
    every rank gives names of its own, or the same as others for the same tensor. Raises OSError, on all ranks, if one
    of them cannot write.
    """
    try:
        save(
            tensors,
            storage_writer=_Writer(folder, about),
            planner=DefaultSavePlanner(flatten_state_dict=False),
            process_group=control(),
        )
    except CheckpointException as error:
        place, why = _first(error)
        if not isinstance(why, OSError | SafetensorError):
            raise RuntimeError(f"rank {place} failed in writing {folder}: {type(why).__name__}: {why}") from error
        raise OSError(f"{folder} could not be written; rank {place}: {type(why).__name__}: {why}") from error


def described(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of every tensor in a folder that `write` left, by name."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (one.size, one.properties.dtype) for name, one in found.items()}  # type: ignore[union-attr]


def read(folder: Path, targets: dict[str, Tensor]) -> None:
    """Fill tensors, sharded in any way or not at all, with what the folder has under their names.

    Collective; every rank may ask for other names. Raises CheckpointMismatch, on all ranks, if one finds a tensor
    missing or of another shape.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads what several wrote
        try:
            load(
                targets,
                storage_reader=HuggingFaceStorageReader(str(folder)),
                planner=DefaultLoadPlanner(flatten_state_dict=False),
                process_group=control(),
                no_dist=world() == 1,
            )
        except CheckpointException as error:
            place, why = _first(error)
            raise CheckpointMismatch(f"{folder} does not fit this model: rank {place}: {why}") from error


class _Writer(HuggingFaceStorageWriter):
    """torch's writer, with our manifest for what it would say of the whole, and tensors written where they lie.

    torch's own `write_data` makes a second copy of all that a rank has in memory before it writes the first byte.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.about = about

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        done: torch.futures.Future[Any] = torch.futures.Future()
        done.set_result([self._written(plan, planner)] if plan.items else [])
        return done

    def _written(self, plan: SavePlan, planner: SavePlanner) -> tuple[str, str, dict[str, str]]:
        """Write this rank's file; its name, its hash and its tensors'."""
        path = Path(self.path) / f"shard-{plan.storage_data['shard_index']:05d}.safetensors"
        tensors: dict[str, Any] = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
        begins = {item.index.fqn: {SAVED_OFFSETS_KEY: list(item.index.offset or ())} for item in plan.items}
        about = {
            CUSTOM_METADATA_KEY: json.dumps(begins),
            DCP_VERSION_KEY: str(HF_DCP_VERSION),
            FORMAT_KEY: FORMAT_VALUE,
        }
        save_file({name: x.detach().contiguous() for name, x in tensors.items()}, path, about)
        files.sync(path)  # by the one who wrote it: on a shared disk nobody else can
        return path.name, files.sha256(path), tensor_hashes(path)

    def finish(self, metadata: Any, results: list[list[Any]]) -> None:
        found = [one for of_rank in results for one in of_rank]
        hashes = {
            "files": {name: whole for name, whole, _ in found},
            "tensors": {name: each for name, _, each in found},
        }
        files.write_json(Path(self.path) / MANIFEST, files.seal({**self.about, **hashes}))


def _first(error: CheckpointException) -> tuple[int, BaseException]:
    """The first rank that failed, and how."""
    place, (why, _) = min(error.failures.items(), key=lambda one: one[0])
    return place, why
