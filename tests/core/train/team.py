"""Real processes that train one cell together over gloo, started from a server that has imported torch once."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sparseforge_core import distributed, preparing, ranks, run
from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.errors import SparseForgeError
from sparseforge_core.execution import Execution
from sparseforge_core.methods import METHODS
from sparseforge_core.methods.base import Method
from sparseforge_core.models.regions import compile_blocks
from sparseforge_core.objective import Distill, Objective, batch
from sparseforge_core.recipe import Cell, Recipe, TrainPlan
from sparseforge_core.schedules import WarmupLinear
from sparseforge_core.sparsity.patterns import Pattern, nm
from sparseforge_core.sparsity.slorb import SLoRB
from sparseforge_core.tracking.tracker import read_journal
from tests.tiny import tiny_source

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.core.train.team", "transformers.models.llama.modeling_llama"])

TWO_OF_FOUR = nm(2, 4)
TAUGHT = Distill()
STEPS = 10

Job = Callable[[], object]
"""What every process of a team does, one after the other."""


def cell(
    method: str | Method = "sparseforge",
    *,
    architecture: str = "llama",
    steps: int = STEPS,
    pattern: Pattern = TWO_OF_FOUR,
    slorb: SLoRB | None = None,
    objective: Objective = TAUGHT,
    averaged_from: float = 1.0,
    seed: int = 0,
) -> Cell:
    """A few steps of a tiny model on sentences of a small grammar."""
    chosen = METHODS[method]() if isinstance(method, str) else method
    return Cell(
        recipe=Recipe(
            model=tiny_source(architecture),
            method=chosen,
            corpus=Synthetic(documents_count=50),
            pattern=pattern if chosen.sparsifies else None,
            objective=objective,
            train=TrainPlan(
                steps=steps, sequences=4, length=16, lr=WarmupLinear(peak=1e-3), averaged_from=averaged_from
            ),
            slorb=slorb,
        ),
        seed=seed,
    )


def trained(what: Cell, folder: Path, *, stop_after: int | None = None, chunks: bool = False, **execution: Any) -> str:
    """Train a cell in `folder`; what came of it: 'done', or the error's class and sentence.

    `chunks` applies the head to chunks of positions, as with a large vocabulary. What is compiled is traced as for a
    GPU, and run without a compiler's minute.
    """
    seen: list[int] = []
    usual = batch.SPLIT_FROM
    batch.SPLIT_FROM = 1 if chunks else usual
    preparing.compile_blocks = functools.partial(compile_blocks, backend="aot_eager")  # type: ignore[assignment]
    try:
        run.train_cell(
            what,
            folder,
            folder.parent,
            on_step=lambda progress: seen.append(progress.step),
            should_stop=lambda: stop_after is not None and seen[-1] >= stop_after,
            execution=Execution(**execution),
        )
    except SparseForgeError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        batch.SPLIT_FROM = usual
    return "done"


def each_its_own(folder: Path) -> str:
    """Ranks that were given different seeds."""
    return trained(cell(seed=distributed.rank()), folder)


def at_step(what: Cell, folder: Path, step: int, signal: int, heartbeat: float) -> None:
    """Train, but in this step rank 1 sends itself a signal."""

    def act(progress: Any) -> None:
        if progress.step == step and distributed.rank() == 1:
            os.kill(os.getpid(), signal)

    execution = Execution(sharding="replicate", heartbeat=heartbeat)
    run.train_cell(what, folder, folder.parent, on_step=act, execution=execution)


def flip_newest(folder: Path, name: str) -> None:
    """Rank 0 alters one byte in a file of the newest checkpoint."""
    if distributed.rank() == 0:
        path = max(folder.glob("checkpoints/step-*")) / name
        data = bytearray(path.read_bytes())
        data[-9] ^= 1
        path.write_bytes(data)


def team(size: int, jobs: list[Job], *, seconds: float = 120.0) -> list[list[object]]:
    """Run the jobs on `size` ranks; what each rank's jobs returned. Raises AssertionError with a rank's traceback."""
    members, pipes = start(size, jobs)
    found: list[list[object]] = []
    try:
        for place, pipe in enumerate(pipes):
            assert pipe.poll(seconds), f"rank {place} of {size} said nothing for {seconds} s"
            answer = pipe.recv()
            assert not isinstance(answer, str), f"rank {place} of {size}: {answer}"
            found.append(answer)
        for member in members:
            member.join(seconds)
    finally:
        for member in members:
            member.kill()
    return found


def start(size: int, jobs: list[Job]) -> tuple[list[Any], list[Any]]:
    """The processes of a team at work on the jobs, and the pipe that each will answer through."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(size)]
    members = [CONTEXT.Process(target=_member, args=(i, size, port, jobs, pipes[i][1])) for i in range(size)]
    for member in members:
        member.start()
    return members, [receive for receive, _ in pipes]


def _member(place: int, size: int, port: int, jobs: list[Job], pipe: Any) -> None:
    place_of = {"RANK": place, "LOCAL_RANK": place, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place_of.items()})
    torch.set_num_threads(1)
    try:
        ranks.join()
        pipe.send([job() for job in jobs])
        ranks.leave()
    except BaseException:
        pipe.send(traceback.format_exc())
        raise


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The finished model of a cell that was trained in `folder`, its side branches too."""
    branches = folder / "final" / "slorb.safetensors"
    return {**load_file(folder / "final" / "model.safetensors"), **(load_file(branches) if branches.is_file() else {})}


def curve(folder: Path) -> dict[int, float]:
    """The journalled losses by step."""
    lines = read_journal(folder / "journal.jsonl")[0]
    return {line["step"]: line["scalars"]["loss/total"] for line in lines if "scalars" in line}


def agreement(one: Path, other: Path) -> float:
    """Share of the entries of all masked weights that both finished models keep, or both prune."""
    ours, theirs = weights(one), weights(other)
    sparse = [name for name, x in ours.items() if x.ndim >= 2 and float((x == 0).float().mean()) > 0.4]
    assert sparse
    same = sum(int(((ours[name] == 0) == (theirs[name] == 0)).sum()) for name in sparse)
    return same / sum(ours[name].numel() for name in sparse)


def same_bits(one: Path, other: Path) -> bool:
    """Whether two runs left the same losses and the same weights, to the bit."""
    ours, theirs = weights(one), weights(other)
    return curve(one) == curve(other) and all(torch.equal(ours[name], theirs[name]) for name in ours)
