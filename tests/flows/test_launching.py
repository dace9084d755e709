"""The launcher over real torchrun with two gloo ranks: how it ends, how it stops, and that nothing outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flows import launching
from flows.launching import (
    Ending,
    RanksFailed,
    RanksLost,
    RanksRefused,
    Where,
    _Teller,
    last_line,
    launch,
    measured,
    train_on_ranks,
)
from flows.placements import Placement
from flows.provenance import process_alive
from sparseforge_core.errors import Diverged, Interrupted, RecipeError, described
from sparseforge_core.identity import dumps
from sparseforge_core.store.causes import cause_of
from tests.core.train.team import cell, curve
from tests.processes import wait_until

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "tests.flows.ranks_program"


def _pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("pid-*") if path.read_text()]


@pytest.mark.slow
def test_ranks_run_together_and_what_they_print_is_kept(tmp_path: Path) -> None:
    ending = launch([PROGRAM, str(tmp_path), "say"], 2, tmp_path / "ranks", lambda: False)
    assert ending.done
    assert ending.codes == {0: 0, 1: 0}
    log = ending.log.read_text()
    assert log.count("sum over the ranks: 3") == 2
    assert last_line(ending.log) == "sum over the ranks: 3"


@pytest.mark.slow
def test_a_refusal_of_one_rank_is_a_refusal_with_its_sentence(tmp_path: Path) -> None:
    ending = launch([PROGRAM, str(tmp_path), "refuse"], 2, tmp_path / "ranks", lambda: False)
    assert ending.codes[1] == 2
    with pytest.raises(RecipeError, match=r"^pattern: 3:2 keeps more than there is .log: "):
        measured(ending, tmp_path / "measurements.json")


@pytest.mark.slow
def test_a_stop_reaches_every_rank_and_waits_for_what_it_saves(tmp_path: Path) -> None:
    ending = launch([PROGRAM, str(tmp_path), "wait"], 2, tmp_path / "ranks", lambda: len(_pids(tmp_path)) == 2)
    assert ending.stopped
    assert ending.codes == {0: 130, 1: 130}
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]
    with pytest.raises(Interrupted):
        measured(ending, tmp_path / "measurements.json")


@pytest.mark.slow
def test_killing_torchrun_ends_its_ranks_which_save_first(tmp_path: Path) -> None:
    def kill_torchrun() -> None:
        assert wait_until(lambda: len(_pids(tmp_path)) == 2, 60)
        os.kill(_parent(_pids(tmp_path)[0]), signal.SIGKILL)

    killer = threading.Thread(target=kill_torchrun)
    killer.start()
    ending = launch([PROGRAM, str(tmp_path), "wait"], 2, tmp_path / "ranks", lambda: False)
    killer.join()
    assert not any(process_alive(pid) for pid in _pids(tmp_path))
    assert len(list(tmp_path.glob("saved-*"))) == 2
    assert not ending.done


@pytest.mark.slow
def test_killing_the_launcher_ends_torchrun_and_its_ranks(tmp_path: Path) -> None:
    arguments = f"[{PROGRAM!r}, {str(tmp_path)!r}, 'wait'], 2, Path({str(tmp_path / 'ranks')!r}), lambda: False"
    code = f"from pathlib import Path; from flows.launching import launch; launch({arguments})"
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    try:
        assert wait_until(lambda: len(_pids(tmp_path)) == 2, 60)
        torchrun = _parent(_pids(tmp_path)[0])
    finally:
        owner.kill()
        owner.wait()
    assert wait_until(lambda: not any(process_alive(pid) for pid in [torchrun, *_pids(tmp_path)]), 60)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_rank_ends_the_launch_within_a_heartbeat_and_is_a_lost_worker(number: int, tmp_path: Path) -> None:
    heartbeat, hit = 4.0, [0.0]
    (tmp_path / "cell.json").write_text(dumps(cell("sr-ste", steps=100_000)))

    def strike() -> None:
        if not hit[0] and len(curve(tmp_path / "out")) >= 3:
            record = json.loads((tmp_path / "ranks" / "endings" / "rank-1.json").read_text())
            os.kill(record["pid"], number)
            hit[0] = time.monotonic()

    program = ["sparseforge_core.run", "--home", str(tmp_path), "train", str(tmp_path / "cell.json")]
    program += [str(tmp_path / "out"), "--sharding", "replicate", "--heartbeat", str(heartbeat)]
    ending = launch(program, 2, tmp_path / "ranks", lambda: False, tick=strike)
    seconds = time.monotonic() - hit[0]
    assert seconds < 28.0, "torchrun alone would wait for 30 s, beyond the heartbeat"  # much for a machine that is busy
    with pytest.raises(RanksLost) as error:
        measured(ending, tmp_path / "measurements.json")
    assert cause_of("failed", described(error.value)) == "lost worker"


@pytest.mark.slow
def test_a_torchrun_that_hangs_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "TORCHRUN_SECONDS", 1.0)
    hung: list[float] = []

    def hang() -> None:
        if not hung and len(_pids(tmp_path)) == 2:
            os.kill(_parent(_pids(tmp_path)[0]), signal.SIGSTOP)
            hung.append(time.monotonic())

    program = [PROGRAM, str(tmp_path), "wait"]
    ending = launch(program, 2, tmp_path / "ranks", lambda: bool(hung), stop_seconds=100.0, tick=hang)
    assert time.monotonic() - hung[0] < 50.0, "it waited for torchrun until the last moment"
    assert ending.codes == {0: 130, 1: 130}


def test_endings_are_told_apart(tmp_path: Path) -> None:
    def ending(codes: dict[int, int], *, stopped: bool = False) -> Ending:
        return Ending(codes, 2, stopped, tmp_path / "no-log")

    path = tmp_path / "measurements.json"
    with pytest.raises(RanksFailed, match="exit codes of 2 ranks") as crashed:
        measured(ending({0: 1}), path)
    assert not isinstance(crashed.value, RanksLost)
    for gone in ({}, {0: 75}, {0: 75, 1: 130}):
        with pytest.raises(RanksLost):
            measured(ending(gone), path)
    with pytest.raises(RanksFailed):  # all said that they were done, and left nothing
        measured(ending({0: 0, 1: 0}), path)
    with pytest.raises(Interrupted):
        measured(ending({0: 130}), path)
    with pytest.raises(Interrupted):
        measured(ending({}, stopped=True), path)
    path.write_text("{}")
    assert measured(ending({0: 0, 1: 0}), path) == path


def test_too_few_devices_are_named_with_what_starts_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    placement = Placement(pool="gpu-8", gpus=8)
    with pytest.raises(RecipeError, match=r"needs 8 GPUs at once, and this process sees 2; .*worker.sh gpu-8"):
        train_on_ranks(
            "{}", tmp_path / "train", tmp_path, placement, micro_batch=1, on_step=None, should_stop=lambda: False
        )


@pytest.mark.parametrize(
    ("line", "codes", "kind"),
    [
        ("Diverged: the loss is nan at step 7", {0: 2, 1: 75}, Diverged),
        ("torch.OutOfMemoryError: CUDA out of memory.", {1: 1}, MemoryError),
        ("OSError: [Errno 28] No space left on device", {1: 2, 0: 75}, OSError),
        ("something else", {1: 2}, RanksRefused),
        ("RuntimeError: no such kernel", {1: 1, 0: 75}, RanksFailed),
    ],
)
def test_what_a_rank_ended_with_is_raised_here(
    line: str, codes: dict[int, int], kind: type[Exception], tmp_path: Path
) -> None:
    blamed = 0 if codes.get(0) == 2 else 1
    log = tmp_path / "torchrun.log"
    log.write_text(f"[default{blamed}]:{line}\n[default{1 - blamed}]:RankLost: another rank ended\n")
    with pytest.raises(kind):
        measured(Ending(codes, 2, False, log), tmp_path / "measurements.json")


def test_how_far_the_ranks_are_is_told_at_once_and_as_they_go(tmp_path: Path) -> None:
    told: list[Where] = []
    journal = tmp_path / "journal.jsonl"
    teller = _Teller(journal, 10, told.append)
    teller()
    assert [(where.step, where.steps) for where in told] == [(0, 10)]
    lines = [{"step": 1, "scalars": {"loss/total": 3.5}}, {"step": 2, "histogram": {}}]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "sca')
    teller()
    assert len(told) == 1, "not again within a second"
    teller.next = 0.0
    teller()
    assert told[-1] == Where(1, 10, 3.5)
    teller.next = 0.0
    teller()
    assert len(told) == 2, "nothing new"


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
