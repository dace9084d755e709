"""Blocks are compiled without a graph break, once for all blocks of a shape and for every model that comes after."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from benchmarks.steps import Shape, bench
from sparseforge_core.errors import NotCompilable, RecipeError
from sparseforge_core.methods import AST, CAST, SRSTE, SSTE, MaskLLM, Method, ProxSparse, SparseForge
from sparseforge_core.models import regions
from sparseforge_core.models.regions import blocks_path, compiled_blocks
from sparseforge_core.models.sites import Site
from sparseforge_core.objective import Distill, HiddenMatch, batch_losses
from sparseforge_core.sparsity.masking import Storage
from sparseforge_core.sparsity.patterns import nm
from sparseforge_core.train.loop import Progress, train
from tests.tiny import sites_of, tiny_model, tokens


def masked(architecture: str, storage: Storage, seed: int = 0) -> tuple[Any, list[Site]]:
    """A model whose masks hold something else than ones."""
    model = tiny_model(architecture, seed=seed)
    sites = sites_of(model)
    for site in sites:
        soft = site.attach(None, storage)
        mask = torch.rand(site.weight.shape)
        soft.move(soft.matrix(mask), soft.matrix(mask > 0.5))
        soft.set_view(0.5)
    return model, sites


def gradients(model: Any, sites: list[Site], forward: Any) -> list[torch.Tensor]:
    model.zero_grad()
    logits = forward(input_ids=tokens(), use_cache=False).logits
    logits.square().mean().backward()
    found = [logits.detach()]
    for site in sites:
        assert site.weight.grad is not None
        found.append(site.weight.grad.clone())
    return found


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])  # Linear, Conv1D, fused experts
@pytest.mark.parametrize("storage", ["float32", "int16"])
def test_masked_blocks_compile_whole_and_are_compiled_once(architecture: str, storage: Storage) -> None:
    model, sites = masked(architecture, storage)
    compiled = compiled_blocks(model, backend="aot_eager", fullgraph=True)
    before = graphs()
    for one, other in zip(gradients(model, sites, compiled), gradients(model, sites, model), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
    once = graphs() - before
    assert once <= 1, "two blocks of one shape were compiled apart"
    # What changes in an annealing: masks, views, and the next cell's model.
    for site in sites:
        site.mask.set_view(0.25)
    gradients(model, sites, compiled)
    fresh, its_sites = masked(architecture, storage, seed=1)
    gradients(fresh, its_sites, compiled_blocks(fresh, backend="aot_eager", fullgraph=True))
    assert graphs() - before == once, "a mask update or a new model was compiled anew"
    for site in sites:
        with torch.no_grad():
            site.mask.harden(torch.rand(site.weight.shape), nm(2, 4))
            site.mask.freeze(site.weight, nm(2, 4), site.name)
    gradients(model, sites, compiled)
    assert graphs() - before <= once + 1, "freezing may compile once"


TRAINED = [
    AST(refresh_every=2),
    CAST(refresh_every=2),
    MaskLLM(prior=None),
    ProxSparse(),
    SparseForge(update_every=2),
    SRSTE(),
    SSTE(),
]


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED, ids=lambda method: method.kind)
def test_no_method_is_compiled_anew_for_each_step_or_site(method: Method, tmp_path: Path) -> None:
    class EnoughError(Exception):
        pass

    def on_step(progress: Progress) -> None:
        if progress.step == 6:
            raise EnoughError

    torch._dynamo.reset()
    made = bench(Shape(4, 32, 64, 2, 1, 128, True, 2, 8), method, torch.device("cpu"), compiled=False, folder=tmp_path)
    forward = compiled_blocks(made.run.model, backend="eager", fullgraph=True)
    before = graphs()
    with pytest.raises(EnoughError):
        train(replace(made.run, forward=forward, teacher=made.teacher), on_step=on_step)
    assert 1 <= graphs() - before <= 2, "a forward depends on a number of the host's, or on which site it is"


def test_what_is_compiled_ever_anew_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(torch.nn.Module):
        """Depends on a number that the host changes."""

        def __init__(self) -> None:
            super().__init__()
            self.calls = -1.5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.calls if self.calls < 0 else x + self.calls

    def steps(counting: Counting, compiled: Any) -> None:
        for step in range(8):
            counting.calls = step + 0.25
            compiled(torch.ones(2))

    torch._dynamo.reset()
    monkeypatch.setattr(regions, "KEPT", 4)
    with torch._dynamo.config.patch(recompile_limit=4, accumulated_recompile_limit=16, automatic_dynamic_shapes=False):
        for _ in range(2):  # the second cell is not refused for what the first one compiled
            counting = Counting()
            compiled = compiled_blocks(counting, backend="eager")
            assert torch.equal(compiled(torch.ones(2)), torch.full((2,), -1.5))
            with pytest.raises(NotCompilable, match=r"compile: 4 forms .* --no-compile"):
                regions.compiled_within_limits()(steps)(counting, compiled)
    torch._dynamo.reset()


def test_what_earlier_cells_compiled_is_forgotten_before_it_fills_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[int] = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: forgotten.append(graphs()))
    monkeypatch.setattr(regions, "_made_before", graphs())
    model = tiny_model("llama")
    compiled_blocks(model, backend="eager")
    assert forgotten == []
    monkeypatch.setitem(counters["stats"], "unique_graphs", graphs() + regions.KEPT // 2)
    compiled_blocks(model, backend="eager")
    compiled_blocks(model, backend="eager")
    assert forgotten == [graphs()]


def test_blocks_share_their_classes_and_take_their_masks_off() -> None:
    model, sites = masked("mixtral", "float32")
    shared = {(type(site.module), site.parameter) for site in sites}
    assert len(shared) == len({(type(site.module).__name__, site.parameter) for site in sites})
    first, *others = [site for site in sites if site.module is not sites[0].module]
    first.squash()
    assert all(other.weight is not None and other.mask is not None for other in others if other.module is first.module)
    model(input_ids=tokens(), use_cache=False)
    for site in sites:
        if site.soft is not None:
            site.squash()
    assert sites_of(model)


def test_the_cache_of_parametrizations_tells_modules_of_one_class_apart() -> None:
    model, _ = masked("llama", "float32")
    plain = model(input_ids=tokens(), use_cache=False).logits
    with torch.nn.utils.parametrize.cached():
        cached = model(input_ids=tokens(), use_cache=False).logits
    assert torch.equal(plain, cached)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_masks_are_made_again_under_activation_checkpointing(compiled: bool) -> None:
    model, sites = masked("llama", "int16")
    forward = compiled_blocks(model, backend="aot_eager", fullgraph=True) if compiled else model
    whole = gradients(model, sites, model)

    def forgetful(**given: Any) -> Any:
        return checkpoint(lambda: forward(**given), use_reentrant=False)

    for one, other in zip(whole, gradients(model, sites, forgetful), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


def test_where_blocks_lie() -> None:
    assert blocks_path(tiny_model("llama")) == "model.layers"
    assert blocks_path(tiny_model("gpt2")) == "transformer.h"
    assert blocks_path(torch.nn.Sequential(torch.nn.Linear(2, 2))) is None


def test_hidden_states_are_not_matched_through_compiled_blocks() -> None:
    model = tiny_model("llama")
    compiled = compiled_blocks(model, backend="eager")
    with pytest.raises(RecipeError, match="without --compile"):
        batch_losses(compiled, model, Distill(hidden=HiddenMatch()), tokens())
