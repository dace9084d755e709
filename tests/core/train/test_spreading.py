"""What cannot be spread over ranks is refused by name; how ranks watch each other; what a process alone makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sparseforge_core import distributed
from sparseforge_core.errors import RecipeError
from sparseforge_core.methods import METHODS
from sparseforge_core.methods.sparseforge import SparseForge
from sparseforge_core.objective import Distill
from sparseforge_core.objective.hidden import HiddenMatch
from sparseforge_core.observe.curvature import FiniteDifference, Hutchinson, MicroBatchFisher
from sparseforge_core.ranks import _Others
from sparseforge_core.sparsity.compensation import Compensation
from sparseforge_core.train.parallel import Ranks, blocks_of, recompute_activations, refuse, refuse_lists_of_experts
from tests.core.train.team import cell
from tests.tiny import ARCHITECTURES, tiny_model, tokens


@pytest.mark.parametrize(
    ("method", "sharding", "count", "sentence"),
    [
        (SparseForge(curvature=Hutchinson()), "shard", 2, "'sparseforge' cannot be sharded: curvature Hutchinson"),
        (SparseForge(compensation=Compensation()), "shard", 2, "compensation carries calibration text"),
        (METHODS["maskllm"](), "shard", 2, "'maskllm' cannot be sharded.*use replicate"),
        (METHODS["s-ste"](), "shard", 2, "'s-ste' cannot be sharded"),
        ("sparseforge", "auto", 3, "train.sequences=4 do not divide over 3 ranks; start 2"),
        ("sparseforge", "none", 2, "sharding none: 2 ranks would each"),
    ],
)
def test_what_cannot_be_spread_is_refused_by_name(method: Any, sharding: Any, count: int, sentence: str) -> None:
    recipe = cell(method).recipe
    with pytest.raises(RecipeError, match=sentence):
        refuse(recipe, sharding, count)
    refuse(recipe, sharding, 1)


def test_methods_and_options_that_need_one_process_or_one_forward() -> None:
    one_shot = cell("wanda", steps=0).recipe
    with pytest.raises(RecipeError, match="2 ranks: method 'wanda' does not train"):
        refuse(one_shot, "auto", 2)
    looks_again = cell(SparseForge(curvature=FiniteDifference())).recipe
    with pytest.raises(RecipeError, match="recompute: curvature FiniteDifference"):
        refuse(looks_again, "auto", 1, recompute=True)
    watched = cell(SparseForge(curvature=MicroBatchFisher())).recipe
    with pytest.raises(RecipeError, match="compile: curvature MicroBatchFisher looks again"):
        refuse(watched, "shard", 2, compiled=True)
    refuse(watched, "replicate", 2, compiled=True)
    matched = replace(cell().recipe, objective=Distill(hidden=HiddenMatch()))
    with pytest.raises(RecipeError, match="compile: compiled blocks do not show the hidden states"):
        refuse(matched, "shard", 2, compiled=True)
    refuse(cell().recipe, "shard", 2, compiled=True)
    muon = replace(cell().recipe, train=replace(cell().recipe.train, rule="muon"))
    with pytest.raises(RecipeError, match=r"train\.rule='muon' makes the singular values"):
        refuse(muon, "shard", 2)
    refuse(muon, "replicate", 2)
    refuse(cell(SparseForge(curvature=Hutchinson())).recipe, "replicate", 2)


@pytest.mark.parametrize(("version", "able"), [("2.11.0+cu130", False), ("2.12.0", True), ("3.0.1+cpu", True)])
def test_masks_of_integers_are_sharded_by_a_torch_that_can(
    version: str, able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = cell(SparseForge(mask_storage="int16")).recipe
    monkeypatch.setattr(torch, "__version__", version)
    if able:
        refuse(recipe, "shard", 2)
    else:
        with pytest.raises(RecipeError, match=r"mask_storage='int16' needs torch 2\.12 or newer, this is 2\.11\.0"):
            refuse(recipe, "shard", 2)
    refuse(recipe, "replicate", 2)


def test_experts_in_a_list_are_not_sharded_and_fused_ones_are() -> None:
    with pytest.raises(RecipeError, match=r"model\.layers\.\d+ holds its experts as a list of modules"):
        refuse_lists_of_experts(tiny_model("deepseek-original"))
    refuse_lists_of_experts(tiny_model("qwen3_moe"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recomputed_activations_change_no_gradient(architecture: str) -> None:
    gradients = []
    for again in (False, True):
        model = tiny_model(architecture)
        assert len(blocks_of(model)) == 2
        if again:
            recompute_activations(model)
        model(input_ids=tokens(), use_cache=False).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)


def test_a_rank_is_given_up_when_silent_or_left_behind_but_not_when_slow() -> None:
    watch = _Others(2, 15.0)
    now = watch.heard[0][1]
    for second in range(100):  # both beat; rank 1 is always half a step behind, and goes on
        beats = [f"{second} {2 * second + 1} 0", f"{second} {2 * second} 0"]
        assert watch.trouble(beats, now + second) is None
    assert watch.trouble(beats, now + 120) == "rank 0 was not heard of for 10 s"
    watch = _Others(2, 15.0)
    stays = [f"{second} {point} 0" for second, point in ((0, 8), (0, 7))]
    assert watch.trouble(stays, now) is None
    beating = [watch.trouble([f"{s} 8 0", f"{s} 7 0"], now + s) for s in range(1, 18)]
    assert beating[:15] == [None] * 15
    assert beating[-1] == "rank 1 has stayed behind the others for 15 s in one step"
    free = _Others(2, 15.0)
    assert all(free.trouble([f"{s} 8 0", f"{s} 7 1"], now + s) is None for s in range(60)), "it still compiles"
    done = _Others(2, 15.0)
    assert all(done.trouble([f"{s} 8 0", "done"], now + s) is None for s in range(60)), "it has left in peace"


def test_alone_the_ranks_do_what_the_loop_would_do() -> None:
    alone = Ranks()
    assert (alone.rank, alone.world, alone.first(4)) == (0, 1, 0)
    assert alone.means({"loss/total": 0.1}) == {"loss/total": 0.1}
    assert [alone.stop(wanted) for wanted in (False, True, False)] == [False, True, False]
    alone.end()
    x = torch.randn(5, 3)
    assert distributed.whole(x) is x
    assert distributed.part(x) is x
    assert distributed.cut(x, x) is x
    assert distributed.said_by_all("word") == ["word"]
    assert distributed.sums_over_ranks([1.0, 2.0]) == [1.0, 2.0]
