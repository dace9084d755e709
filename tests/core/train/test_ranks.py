"""One cell on 1, 2 and 4 ranks: the same losses and masks, resumed to the bit, and an end when a rank is lost."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseforge_core import distributed, ranks
from sparseforge_core.identity import dumps
from sparseforge_core.methods.ast import AST
from sparseforge_core.methods.cast import CAST
from sparseforge_core.methods.frozen_mask import FrozenMask
from sparseforge_core.methods.maskllm import MaskLLM
from sparseforge_core.methods.sparseforge import SparseForge
from sparseforge_core.methods.sparsegpt import SparseGPT
from sparseforge_core.models.heads import split
from sparseforge_core.objective import Distill
from sparseforge_core.objective.correction import TeacherCorrection
from sparseforge_core.observe.curvature import MicroBatchFisher
from sparseforge_core.sparsity.fused import available
from sparseforge_core.sparsity.patterns import BLOCK_16
from sparseforge_core.sparsity.slorb import SLoRB
from sparseforge_core.train.parallel import inside, shard
from tests.core.train.team import (
    agreement,
    at_step,
    cell,
    curve,
    each_its_own,
    flip_newest,
    same_bits,
    start,
    team,
    trained,
)
from tests.interpreted import assert_agreement
from tests.tiny import tiny_model, tokens

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
WATCHED = cell(SparseForge(curvature=MicroBatchFisher(every=2), statistics_of="last-update"))
"""Its curvature is each replica's own, or in shards: what a checkpoint must keep apart; its statistics are of all."""

FOLLOWED = cell(
    objective=Distill(kl_weight=0.75, correction=TeacherCorrection(rate_scale=0.5, every=2, anchor=0.5)),
    averaged_from=0.3,
)
"""Its teacher takes steps too, fast enough that ranks which took others would show, and is held to what it was."""

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "replicas": (cell(), {"sharding": "replicate", "micro_batch": 1}),
    "shards": (cell(), {"sharding": "shard", "recompute": True}),
    "shards-in-chunks": (cell(), {"sharding": "shard", "chunks": True}),
    "shards-compiled": (cell(), {"sharding": "shard", "compiled": True, "chunks": True}),
    "shards-compiled-again": (cell(), {"sharding": "shard", "compiled": True, "recompute": True}),
    # GPT-2 stores [in, out]: its shards cut the inputs, and with them every group, tile, row and block mean.
    "shards-across-groups": (
        cell(
            SparseForge(gate_scope="layer", rescale_rows=True), architecture="gpt2", pattern=BLOCK_16, slorb=SLoRB(k=16)
        ),
        {"sharding": "shard"},
    ),
    "ast": (cell(AST(refresh_every=3), slorb=SLoRB(k=16)), {"sharding": "shard"}),
    "cast": (cell(CAST(scale_blocks=4)), {"sharding": "shard"}),
    "maskllm": (cell(MaskLLM(prior=None)), {"sharding": "replicate"}),
    "from-a-solution": (cell(FrozenMask(prior=SparseGPT(samples=4, length=16))), {"sharding": "replicate"}),
    "experts": (cell(architecture="qwen3_moe"), {"sharding": "replicate"}),
    "teacher-follows": (FOLLOWED, {"sharding": "replicate", "micro_batch": 1}),
    "teacher-follows-in-shards": (FOLLOWED, {"sharding": "shard", "chunks": True}),
}


def job(what: Any, folder: Path, **options: Any) -> Any:
    return functools.partial(trained, what, folder, **options)


def test_two_ranks_train_what_one_trains(tmp_path: Path) -> None:
    alone: dict[str, Path] = {}
    for name, (what, _) in CASES.items():
        if str(what) not in alone:
            alone[str(what)] = tmp_path / f"{name}-alone"
            assert trained(what, alone[str(what)]) == "done"
    found = team(2, [job(what, tmp_path / name, **how) for name, (what, how) in CASES.items()])
    assert found == [["done"] * len(CASES)] * 2
    for name, (what, _) in CASES.items():
        one, two = alone[str(what)], tmp_path / name
        assert curve(two) == pytest.approx(curve(one), rel=1e-5), name
        assert agreement(one, two) >= 0.999, name


def gathered_head(steps: int) -> list[bool]:
    """Of a sharded model after its body has run: whether the head's matrix is all there, and gets the mean gradient."""
    model = tiny_model("llama")
    wanted = model.get_output_embeddings().weight.detach().clone()
    whole = split_of(model)
    root = shard(model, [], torch.device("cpu"))
    part = inside(root, whole)
    found = []
    for _ in range(steps):
        part.body(input_ids=tokens(), use_cache=False).last_hidden_state.sum().mul(0.0).backward()
        model.zero_grad()
        hidden = part.body(input_ids=tokens(), use_cache=False).last_hidden_state
        matrix = part.whole_matrix()
        assert matrix is not None
        found.append(type(matrix.data) is torch.Tensor and torch.equal(matrix, wanted))
        factor = 1.0 + distributed.rank()
        (hidden.sum() * 0.0 + factor * matrix.sum()).backward()
        gradient = distributed.whole(model.get_output_embeddings().weight.grad)
        found.append(torch.equal(gradient, torch.full_like(gradient, 1.5)))
    return found


def split_of(model: Any) -> Any:
    """A model's split form, whatever its vocabulary."""
    return dataclasses.replace(split(model), fused=True)


def test_a_sharded_head_is_whole_while_its_losses_are_computed() -> None:
    for (found,) in team(2, [functools.partial(gathered_head, 2)]):
        assert found == [True] * 4


@pytest.mark.skipif(not available(), reason="Triton is not installed: there is nothing to compare")
def test_fused_losses_of_a_sharded_head_are_those_of_one_process() -> None:
    assert_agreement(Path(__file__).with_name("shard_cases.py"))


def test_interrupted_ranks_go_on_to_the_bit_and_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    parts = ("shard", "replicate")
    assert trained(WATCHED, tmp_path / "alone") == "done"
    assert trained(WATCHED, tmp_path / "1-to-2", stop_after=4).startswith("Interrupted: stopped after step 4")
    of_four = team(
        4,
        [
            job(WATCHED, tmp_path / "four", sharding="shard"),
            job(WATCHED, tmp_path / "4-to-2", sharding="shard", stop_after=4),
            job(WATCHED, tmp_path / "four-cut", sharding="shard", stop_after=3),
            job(WATCHED, tmp_path / "four-cut", sharding="shard"),
        ],
    )
    assert of_four[3][0] == of_four[3][3] == "done"
    assert same_bits(tmp_path / "four", tmp_path / "four-cut"), "four ranks went on from another state"
    shards, replicas = tmp_path / "shard-cut", tmp_path / "replicate-cut"
    jobs = [job(WATCHED, tmp_path / how, sharding=how) for how in parts]
    jobs += [job(WATCHED, shards, sharding="shard", stop_after=step) for step in (2, 5)]
    # The newest checkpoint is altered: all ranks go back to the one before it, although only one has found out.
    jobs += [functools.partial(flip_newest, shards, "shard-00002.safetensors"), job(WATCHED, shards, sharding="shard")]
    jobs += [job(WATCHED, replicas, sharding="replicate", stop_after=5), job(WATCHED, replicas, sharding="replicate")]
    jobs += [
        job(WATCHED, tmp_path / "4-to-2", sharding="replicate"),
        job(WATCHED, tmp_path / "1-to-2", sharding="shard"),
    ]
    jobs += [job(WATCHED, tmp_path / "2-to-1", sharding="shard", stop_after=4)]
    said = [str(what).partition(" of ")[0] for what in team(2, jobs)[0]]
    stopped = "Interrupted: stopped after step"
    assert said == [
        *("done", "done", f"{stopped} 3", f"{stopped} 6", "None", "done", f"{stopped} 6", "done"),
        *("done", "done", f"{stopped} 5"),
    ]
    for how in parts:
        assert same_bits(tmp_path / how, tmp_path / f"{how}-cut"), f"{how}: went on from another state"
    assert trained(WATCHED, tmp_path / "2-to-1") == "done"
    for name in (*parts, "four", "1-to-2", "2-to-1", "4-to-2"):
        assert curve(tmp_path / name) == pytest.approx(curve(tmp_path / "alone"), rel=1e-5), name
        assert agreement(tmp_path / "alone", tmp_path / name) >= 0.999, name


def test_a_teacher_that_follows_goes_on_to_the_bit_and_on_one_rank(tmp_path: Path) -> None:
    assert trained(FOLLOWED, tmp_path / "alone") == "done"
    parts = ("shard", "replicate")
    jobs = [job(FOLLOWED, tmp_path / how, sharding=how) for how in parts]
    for how in parts:
        jobs += [job(FOLLOWED, tmp_path / f"{how}-cut", sharding=how, stop_after=5)]
        jobs += [job(FOLLOWED, tmp_path / f"{how}-cut", sharding=how)]
    jobs += [job(FOLLOWED, tmp_path / "2-to-1", sharding="shard", stop_after=5)]
    for said in team(2, jobs):
        assert [str(what).partition(":")[0] for what in said] == [
            *("done", "done"),
            *("Interrupted", "done", "Interrupted", "done", "Interrupted"),
        ]
    for how in parts:
        assert same_bits(tmp_path / how, tmp_path / f"{how}-cut"), f"{how}: went on from another state"
    assert trained(FOLLOWED, tmp_path / "2-to-1") == "done"
    for name in (*parts, "2-to-1"):
        assert curve(tmp_path / name) == pytest.approx(curve(tmp_path / "alone"), rel=1e-5), name


def test_ranks_that_were_given_different_cells_stop_at_once(tmp_path: Path) -> None:
    for place, (said,) in enumerate(team(2, [functools.partial(each_its_own, tmp_path / "cell")])):
        assert str(said).startswith("RanksDisagree: the ranks do not agree on the cell: rank 0 has"), place
        assert "-s0" in str(said)
        assert "rank 1 has" in str(said)
    assert not (tmp_path / "cell").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_rank_ends_the_others_within_a_heartbeat(number: int, tmp_path: Path) -> None:
    heartbeat = 2.0
    members, pipes = start(
        2, [functools.partial(at_step, cell(steps=1000), tmp_path / "cell", 8, number, heartbeat=heartbeat)]
    )
    try:
        members[0].join(30.0 + heartbeat)
        assert members[0].exitcode is not None, "rank 0 still waits for rank 1"
        if number == signal.SIGSTOP:
            assert members[0].exitcode == ranks.LOST
        else:  # the closed connection speaks first
            assert "peer" in pipes[0].recv()
    finally:
        for member in members:
            member.kill()


def test_torchrun_saves_on_sigterm_and_a_team_goes_on(tmp_path: Path) -> None:
    long = cell("sr-ste", steps=100)
    (tmp_path / "cell.json").write_text(dumps(long))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "sparseforge_core.run", "--home", str(tmp_path), "train", str(tmp_path / "cell.json")]
    command += [str(tmp_path / "out"), "--sharding", "replicate"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and len(curve(tmp_path / "out")) < 3:
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.05)
    first.terminate()
    said = first.communicate(timeout=60)[1]
    assert said.count("stopped after step") == 2, said
    assert not (tmp_path / "out" / "final").exists()
    assert team(2, [job(long, tmp_path / "out", sharding="replicate")]) == [["done"]] * 2
    assert max(curve(tmp_path / "out")) == long.recipe.train.steps
