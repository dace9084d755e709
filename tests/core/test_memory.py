"""The arithmetic of memory: what it adds up, what it refuses, and that a refusal's advice fits."""

from __future__ import annotations

import gc
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flows import cli
from flows.memory import ASSUMED, Rates, plan, rates, shape_of, step_seconds, table
from sparseforge_core import memory
from sparseforge_core.errors import RecipeError
from sparseforge_core.execution import Execution, check_memory
from sparseforge_core.memory import GIB, Spread, lines, need, refusal, start_lines
from sparseforge_core.methods import MagnitudePruning, SparseForge, Wanda
from sparseforge_core.methods.base import MaskedTrack, Surroundings
from sparseforge_core.methods.one_shot import one_shot_solution
from sparseforge_core.models.hub import load_model, load_skeleton
from sparseforge_core.models.sites import Site
from sparseforge_core.models.sources import Local
from sparseforge_core.sparsity.criteria import Magnitude
from sparseforge_core.sparsity.masking import Branch
from sparseforge_core.sparsity.patterns import nm
from tests.core.train.team import cell
from tests.tiny import tiny_source

SEVEN = shape_of("llama-2-7b")

spreads = st.builds(
    Spread,
    gpus=st.sampled_from([1, 2, 4, 8]),
    sharded=st.booleans(),
    micro_batch=st.integers(1, 8),
    length=st.sampled_from([128, 1024, 4096]),
    recompute=st.booleans(),
    teacher=st.sampled_from([0, memory.TEACHER_BYTES, 16, 18]),
    masks=st.booleans(),
    starts=st.booleans(),
    calibration=st.sampled_from([0, 128 * 2048]),
)


def test_llama_2_7b_is_as_large_as_its_checkpoint() -> None:
    assert SEVEN.parameters == 6_738_415_616
    assert SEVEN.masked == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    # 4 + 4 + 8 bytes of every weight, 13 of a masked one, 2 of the teacher's
    state = sum(line.count for line in lines(SEVEN, Spread())[:6])
    assert state == 16 * SEVEN.parameters + 13 * SEVEN.masked + 2 * SEVEN.parameters


@given(spreads)
def test_less_is_needed_where_less_is_kept(spread: Spread) -> None:
    def without(**changes: object) -> float:
        return need(SEVEN, Spread(**{**vars(spread), **changes}))

    assert need(SEVEN, spread) > 0
    assert without(teacher=0) <= need(SEVEN, spread)
    assert without(starts=False) <= need(SEVEN, spread)
    assert without(micro_batch=1) <= need(SEVEN, spread)
    if spread.sharded and spread.gpus > 1:
        assert without(gpus=2 * spread.gpus) < need(SEVEN, spread)
        assert need(SEVEN, spread) < without(sharded=False)


@given(spreads, st.sampled_from([24, 80, 141]))
def test_what_is_refused_names_a_placement_that_fits(spread: Spread, gib: int) -> None:
    why = refusal(SEVEN, spread, gib * GIB)
    assert (why is None) == (need(SEVEN, spread) <= (1 - memory.RESERVE) * gib * GIB)
    if why is None:
        return
    assert "weights" in why
    found = re.search(r"Use (\d+) GPU\(s\), sharded, micro-batch 1( with recomputed)?.*: ([\d.]+) GiB each", why)
    if found is None:
        assert ("start from dense weights" if spread.starts else "shorten train.length") in why
    else:
        assert float(found[3]) <= (1 - memory.RESERVE) * gib


def test_a_cell_that_cannot_fit_is_refused_before_loading(tmp_path: Path) -> None:
    recipe = replace(cell().recipe, model=tiny_source("llama", width=1024, layers=8, heads=16))
    check_memory(recipe, tmp_path, Execution(), 80 * GIB)
    said = r"placement: LlamaForCausalLM on 1 GPU.*weights 0\.3 \(4 B x 84M\).*Use 2 GPU\(s\), sharded"
    with pytest.raises(RecipeError, match=said):
        check_memory(recipe, tmp_path, Execution(), 2.5e9)


class _Counted(MagnitudePruning):
    """Magnitude pruning that counts, when all that it found is copied, the bytes that lie about."""

    seen: ClassVar[list[int]] = []

    def start(self, around: Surroundings) -> MaskedTrack:
        track = super().start(around)
        before = track.finish

        def finish() -> dict[str, Branch]:
            gc.collect()
            shapes = {site.weight.shape for site in track.sites}
            # By type alone: what compilers left about has neither memory nor a shape of numbers.
            found = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
            tensors = {t.data_ptr(): t for t in found if t.shape in shapes}
            _Counted.seen.append(sum(t.nbytes for t in tensors.values()))
            return before()

        track.finish = finish
        return track


def test_what_a_start_from_a_one_shot_solution_takes_is_in_the_plan() -> None:
    layer = nn.Linear(48, 40, bias=False)  # shapes that no other test leaves about
    site = Site("0.weight", layer, "weight", False, "mlp", chosen=nm(2, 4))
    around = Surroundings(model=layer, sites=[site], slorb=None, steps=1, calibration=lambda n, length: [])
    one_shot_solution(_Counted(), around)
    assert _Counted.seen == [(4 + memory.START_BYTES) * 48 * 40]


def test_a_start_from_a_one_shot_solution_can_be_what_does_not_fit(tmp_path: Path) -> None:
    lean = Spread(
        gpus=1, mask_bytes=2, curvature_bytes=0, moment_bytes=memory.EIGHT_BIT_BYTES, length=128, starts=True,
        calibration=128 * 2048,
    )  # fmt: skip
    without = need(SEVEN, replace(lean, starts=False))
    assert need(SEVEN, lean) == sum(line.count for line in start_lines(SEVEN, lean)) > without
    said = r"in its start from a one-shot solution.*dense copy, masks, solution 108\.6 \(18 B x 6,476M masked\)"
    why = refusal(SEVEN, lean, without / (1 - memory.RESERVE) + GIB)
    assert why is not None
    assert re.search(said, why)
    assert need(SEVEN, replace(lean, gpus=8)) == need(SEVEN, replace(lean, gpus=8, starts=False))

    recipe = replace(
        cell().recipe,
        model=tiny_source("llama", width=256, layers=2, heads=4),
        method=SparseForge(mask_storage="int16", criterion=Magnitude(), start_from=Wanda(samples=4096, length=512)),
    )
    room = 1.5e9
    check_memory(replace(recipe, method=replace(recipe.method, start_from=None)), tmp_path, Execution(), room)
    with pytest.raises(RecipeError, match=r"hidden states 2\.0 .* start from dense weights"):
        check_memory(recipe, tmp_path, Execution(), room)


def test_a_skeleton_has_the_shape_of_the_model_and_no_weights(tmp_path: Path) -> None:
    made = load_model(tiny_source("gpt2"), tmp_path)
    made.save_pretrained(tmp_path / "folder")
    for source in (tiny_source("gpt2"), Local(path=str(tmp_path / "folder"), sha256="not looked at")):
        skeleton = load_skeleton(source, tmp_path)
        assert skeleton is not None
        shapes = {name: weight.shape for name, weight in skeleton.named_parameters()}
        assert shapes == {name: weight.shape for name, weight in made.named_parameters()}
        assert all(weight.is_meta for weight in skeleton.parameters())


def test_the_plan_says_whether_its_times_were_measured(tmp_path: Path) -> None:
    assert "nothing measured" in rates(tmp_path / "none.json").source
    slow = Rates({**ASSUMED, "train_flops_per_second": ASSUMED["train_flops_per_second"] / 2}, "half as fast")
    usual = Rates(ASSUMED, "assumed")
    assert step_seconds(SEVEN, Spread(), slow)["student"] == 2 * step_seconds(SEVEN, Spread(), usual)["student"]
    rows = plan("LLaMA-2-7B", spreads=[Spread(gpus=n) for n in (1, 8)], gpu_gib=80.0)
    assert [row["refusal"] is None for row in rows] == [False, True]
    text = table(rows)
    assert "LLaMA-2-7B on 8 GPU(s)" in text
    assert "bytes by arithmetic" in text
    with pytest.raises(RecipeError, match="Did you mean 'LLaMA-2-7B'"):
        shape_of("llama-2-7")


def test_the_command_shows_the_plan_and_refuses_what_cannot_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--memory", "llama-2-7b", "--gpus", "4", "8"]) == 0
    shown = capsys.readouterr()
    assert "LLaMA-2-7B on 4 GPU(s), GiB on each:" in shown.out
    assert cli.main(["plan", "--memory", "llama-2-7b", "--gpus", "1", "--json"]) == 2
    refused = capsys.readouterr()
    assert [row["refusal"] is None for row in json.loads(refused.out)] == [False, False]
    assert "weights 25.1 (4 B x 6,738M)" in refused.err
    assert "Use 4 GPU(s), sharded" in refused.err
    assert cli.main(["plan", "--memory", "llama-2-7b", "--gpus", "1", "--gpu-memory", "280", "--from-one-shot"]) == 0
    begun = capsys.readouterr().out
    assert "dense copy, masks, solution" in begun
    assert "2 B x 6,738M" in begun, "the teacher is in bfloat16"
    assert cli.main(["plan"]) == 2
