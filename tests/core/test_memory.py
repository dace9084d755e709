"""The arithmetic of memory: what it adds up, what it refuses, and that a refusal's advice fits."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows import cli
from flows.memory import ASSUMED, Rates, plan, rates, shape_of, step_seconds, table
from sparseforge_core import memory
from sparseforge_core.errors import RecipeError
from sparseforge_core.execution import Execution, check_memory
from sparseforge_core.memory import GIB, Spread, lines, need, refusal
from sparseforge_core.models.hub import load_model, load_skeleton
from sparseforge_core.models.sources import Local
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
    teacher=st.booleans(),
    masks=st.booleans(),
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
    assert without(teacher=False) <= need(SEVEN, spread)
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
        assert "shorten train.length" in why
    else:
        assert float(found[3]) <= (1 - memory.RESERVE) * gib


def test_a_cell_that_cannot_fit_is_refused_before_loading(tmp_path: Path) -> None:
    recipe = replace(cell().recipe, model=tiny_source("llama", width=1024, layers=8, heads=16))
    check_memory(recipe, tmp_path, Execution(), 80 * GIB)
    said = r"placement: LlamaForCausalLM on 1 GPU.*weights 0\.3 \(4 B x 84M\).*Use 2 GPU\(s\), sharded"
    with pytest.raises(RecipeError, match=said):
        check_memory(recipe, tmp_path, Execution(), 2.5e9)


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
    assert cli.main(["plan"]) == 2
