"""Checkpoints of several ranks through torch's distributed checkpoint: whole or not there, verified, read anywhere."""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparseforge_core import checkpoint, distributed, files
from sparseforge_core.checkpoint import MANIFEST, tensor_hashes
from sparseforge_core.errors import CheckpointMismatch, RanksDisagree
from sparseforge_core.rank_checkpoint import RankCheckpoints
from tests.core.train.team import start, team

pytestmark = pytest.mark.slow

ROWS = 5
"""Of the sharded weight: two ranks hold 3 and 2, four hold 2, 2, 1 and none."""


class Track:
    """A mask as the weight is kept, a statistic that each rank has for itself, and a number that all have alike."""

    def __init__(self, like: Tensor) -> None:
        self.kept = {
            "mask": torch.ones_like(like, requires_grad=False),
            "mine": torch.full((3,), float(distributed.rank())),
            "updates": torch.tensor(7),
        }

    def state(self) -> dict[str, Tensor]:
        return dict(self.kept)

    def restore(self, state: dict[str, Tensor]) -> None:
        self.kept = dict(state)


def parts(*, trained: bool, sharded: bool = True) -> tuple[nn.Module, torch.optim.Optimizer, Track]:
    """A weight that the ranks share out, its moments and its track: after one step, or as they begin."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Linear(8, ROWS, bias=False)
    if sharded and distributed.world() > 1:
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    if trained:
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
    track = Track(next(model.parameters()))
    if not trained:
        for value in track.kept.values():
            distributed.part(value).zero_()
    return model, optimizer, track


def all_of(model: nn.Module, optimizer: torch.optim.Optimizer, track: Track) -> dict[str, list[Any]]:
    """Everything that a checkpoint keeps but the random state, whole."""
    state = checkpoint.state_of(model, optimizer, track)
    return {name: distributed.whole(x).tolist() for name, x in state.items() if name != "track/random"}


def saved(folder: Path, steps: Iterable[int] = (1,), *, sharded: bool = True) -> dict[str, list[Any]]:
    found = parts(trained=True, sharded=sharded)
    for step in steps:
        RankCheckpoints(folder, "cell").save(step, *found)
    return all_of(*found)


def taken_up(folder: Path, *, sharded: bool = True) -> tuple[int, dict[str, list[Any]]]:
    found = parts(trained=False, sharded=sharded)
    step = RankCheckpoints(folder, "cell").resume(*found)
    return step, all_of(*found)


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointMismatch) as error:
        taken_up(folder)
    return str(error.value)


def saved_without_room(folder: Path, room: int) -> str:
    """Save where the kernel lets the second rank write only so many bytes of a file, as on a full disk."""
    found = parts(trained=True)
    if distributed.rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        RankCheckpoints(folder, "cell").save(2, *found)
    except OSError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return ""


def killed_in_writing(folder: Path) -> None:
    """The second rank dies when its file is written and not yet hashed."""
    from sparseforge_core import shard_files

    found = parts(trained=True)
    if distributed.rank() == 1:
        shard_files.tensor_hashes = lambda path: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,return-value]
    RankCheckpoints(folder, "cell").save(2, *found)


def drifted(folder: Path) -> str:
    model, optimizer, track = parts(trained=True, sharded=False)
    if distributed.rank() == 1:
        with torch.no_grad():
            next(model.parameters())[0, 0] += 1e-6
    with pytest.raises(RanksDisagree) as error:
        RankCheckpoints(folder, "cell").save(1, model, optimizer, track)
    return str(error.value)


def altered(file: Path, at: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_what_ranks_wrote_is_taken_up_on_any_number_of_them(tmp_path: Path) -> None:
    alone = saved(tmp_path / "1")
    (four,) = team(4, [functools.partial(saved, tmp_path / "4")])[0]
    whole = {name: value for name, value in alone.items() if name != "track/mine"}
    assert {name: value for name, value in four.items() if name != "track/mine"} == whole
    jobs = [functools.partial(saved, tmp_path / "2"), functools.partial(saved, tmp_path / "alike", sharded=False)]
    jobs += [functools.partial(taken_up, tmp_path / name) for name in ("1", "2", "4", "alike")]
    jobs += [functools.partial(taken_up, tmp_path / "2", sharded=False)]
    for place, found in enumerate(team(2, jobs)):
        for (step, state), mine in zip(found[2:], (0.0, place, 1.5, place, place), strict=True):
            assert (step, state["track/mine"]) == (1, [float(mine)] * 3)
            assert {name: value for name, value in state.items() if name != "track/mine"} == whole
    for name, mine in (("2", 0.5), ("4", 1.5), ("alike", 0.5)):
        step, state = taken_up(tmp_path / name)
        assert (step, state) == (1, whole | {"track/mine": [mine] * 3})


def test_every_tensor_of_every_rank_has_its_hash_and_nothing_is_a_pickle(tmp_path: Path) -> None:
    team(2, [functools.partial(saved, tmp_path, (1, 2, 3))])
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000003"]
    folder = tmp_path / "step-00000003"
    names = ["shard-00001.safetensors", "shard-00002.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, *names]
    body = json.loads((folder / MANIFEST).read_text())
    assert body["tensors"] == {name: tensor_hashes(folder / name) for name in names}
    assert body["files"] == {name: files.sha256(folder / name) for name in names}
    with safe_open(folder / names[1], framework="pt") as file:
        begins = json.loads(file.metadata()["DCP_SHARDING_INFO"])
        assert begins["model/weight"] == {"saved_offsets": [3, 0]}
        assert tuple(file.get_slice("model/weight").get_shape()) == (2, 8)


def test_an_altered_file_costs_one_checkpoint_and_its_tensor_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    team(2, [functools.partial(saved, tmp_path, (1, 2))])
    altered(tmp_path / "step-00000002" / "shard-00002.safetensors")
    assert taken_up(tmp_path)[0] == 1
    assert "shard-00002.safetensors is missing, truncated or altered (tensor " in caplog.text
    assert [step for step, _ in (one[0] for one in team(2, [functools.partial(taken_up, tmp_path)]))] == [1, 1]
    stranger = tmp_path / "step-00000001" / "shard-00003.safetensors"
    save_file({"model/weight": torch.zeros(ROWS, 8)}, stranger)
    with pytest.raises(CheckpointMismatch, match="none of the 2 checkpoints"):
        taken_up(tmp_path)
    assert f"has {stranger.name}, which is not in its manifest.json; move that file away" in caplog.text
    stranger.unlink()
    (tmp_path / "step-00000001" / "shard-00001.safetensors").unlink()
    for (said,) in team(2, [functools.partial(refused, tmp_path)]):
        assert str(said).startswith(f"none of the 2 checkpoints in {tmp_path} verifies; delete that folder")


def test_any_file_cut_altered_or_gone_costs_the_checkpoint_that_it_belongs_to(tmp_path: Path) -> None:
    team(2, [functools.partial(saved, tmp_path, (1, 2))])
    damage: list[Callable[[Path], object]] = [
        *(functools.partial(altered, at=at) for at in (0, 9, -2)),
        lambda file: os.truncate(file, 0),
        lambda file: os.truncate(file, file.stat().st_size - 2),  # one less is the manifest without its last newline
        lambda file: file.unlink(),
    ]
    for file in sorted((tmp_path / "step-00000002").iterdir()):
        sound = file.read_bytes()
        for act in damage:
            act(file)
            assert taken_up(tmp_path)[0] == 1, file.name
            file.write_bytes(sound)
    assert taken_up(tmp_path)[0] == 2


@pytest.mark.parametrize("room", [0, 100])
def test_a_disk_that_is_full_for_one_rank_leaves_the_checkpoint_before(tmp_path: Path, room: int) -> None:
    jobs = [functools.partial(saved, tmp_path), functools.partial(saved_without_room, tmp_path, room)]
    jobs += [functools.partial(taken_up, tmp_path), functools.partial(saved, tmp_path, (2,))]
    for _, said, (step, _), _ in team(2, jobs):  # type: ignore[misc]
        assert "could not be written; rank 1: " in str(said)
        assert "File too large" in str(said)
        assert step == 1
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000002"]


def test_a_rank_killed_while_it_writes_leaves_nothing_that_is_taken_for_a_checkpoint(tmp_path: Path) -> None:
    members, pipes = start(2, [functools.partial(saved, tmp_path), functools.partial(killed_in_writing, tmp_path)])
    try:
        members[0].join(60.0)
        assert members[0].exitcode is not None, "rank 0 still waits for rank 1"
        assert "peer" in pipes[0].recv()
    finally:
        for member in members:
            member.kill()
    assert taken_up(tmp_path)[0] == 1


def wanting_more(folder: Path) -> str:
    """Resume a method that keeps something that the checkpoint does not know."""
    model, optimizer, track = parts(trained=False)
    track.kept["later"] = torch.zeros(2)
    with pytest.raises(CheckpointMismatch) as error:
        RankCheckpoints(folder, "cell").resume(model, optimizer, track)
    return str(error.value)


def test_a_checkpoint_that_lacks_what_the_method_keeps_is_refused_by_its_name(tmp_path: Path) -> None:
    for _, said in team(2, [functools.partial(saved, tmp_path), functools.partial(wanting_more, tmp_path)]):
        assert "has no track/later: other code wrote it; finish the cell with that, or delete" in str(said)
    assert "has no track/later" in wanting_more(tmp_path)


def test_replicas_that_have_drifted_apart_write_no_checkpoint(tmp_path: Path) -> None:
    for (said,) in team(2, [functools.partial(drifted, tmp_path)]):
        assert "tensors differ between ranks that should have them alike, for instance model/weight" in str(said)
    assert list(tmp_path.iterdir()) == []


def test_forms_of_earlier_versions_are_refused_with_a_sentence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank files by nobody, the nameless kinds of a single process by several ranks."""
    folder = tmp_path / "rank-files" / "step-00000001"
    folder.mkdir(parents=True)
    save_file({"model/weight": torch.zeros(ROWS, 8)}, folder / "rank-0000.safetensors")
    hashes = {"rank-0000.safetensors": files.sha256(folder / "rank-0000.safetensors")}
    body = {"cell": "cell", "step": 1, "world": 1, "files": hashes, "places": {}}
    (folder / MANIFEST).write_text(json.dumps(files.seal(body)))
    with pytest.raises(CheckpointMismatch, match="none of the 1 checkpoints"):
        taken_up(folder.parent)
    assert "is in a form of an earlier version, which is not read any more; finish the cell" in caplog.text
    saved(tmp_path / "alone")
    folder = tmp_path / "alone" / "step-00000001"
    body = json.loads((folder / MANIFEST).read_text())
    for file in folder.glob("*.safetensors"):
        save_file({name.partition("/")[2]: x for name, x in load_file(file).items()}, file)
        body["files"][file.name] = files.sha256(file)
    body = {name: body[name] for name in ("cell", "step", "files")}
    (folder / MANIFEST).write_text(json.dumps(body))
    assert taken_up(folder.parent)[0] == 1
    for (said,) in team(2, [functools.partial(refused, folder.parent)]):
        assert "none of the 1 checkpoints" in str(said)
