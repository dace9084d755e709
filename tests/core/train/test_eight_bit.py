"""Moments in 8 bits: what a code stands for, that AdamW is followed, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flows.memory import shape_of
from sparseforge_core.checkpoint import Checkpoints
from sparseforge_core.errors import RecipeError
from sparseforge_core.memory import ADAM_BYTES, EIGHT_BIT_BYTES, Spread, lines, need
from sparseforge_core.methods import AST, DenseControl, SparseForge
from sparseforge_core.methods.base import MaskTrack, Surroundings
from sparseforge_core.models.sites import Site, assign_patterns
from sparseforge_core.objective import TaskOnly
from sparseforge_core.observe.curvature import AdamSecondMoment
from sparseforge_core.recipe import TrainPlan
from sparseforge_core.run import train_cell
from sparseforge_core.schedules import WarmupLinear
from sparseforge_core.sparsity.fused import available
from sparseforge_core.sparsity.patterns import nm
from sparseforge_core.tracking.tracker import read_journal
from sparseforge_core.train import eight_bit
from sparseforge_core.train.eight_bit import BLOCK, SMALL, EightBitAdamW, magnitudes, quantised, restored
from sparseforge_core.train.optimizer import build_optimizer, set_rate
from sparseforge_core.train.parallel import refuse
from tests.core.train.team import cell
from tests.interpreted import assert_agreement
from tests.tiny import sites_of, tiny_model, tokens

PLAN = TrainPlan(steps=20, sequences=2, length=8, moments="8-bit")


@pytest.mark.parametrize(("bits", "count"), [(7, 128), (8, 256)])
def test_codes_stand_for_ascending_magnitudes_dense_near_zero(bits: int, count: int) -> None:
    values = magnitudes(bits, torch.device("cpu"))
    assert len(values) == count
    assert values[0] == 0.0
    assert values[-1] == 1.0
    assert (values[1:] > values[:-1]).all()
    assert values[1] < 10.0 ** -(bits - 1)
    # Within the largest power of ten neighbours differ by a fraction of 2^-(bits - 1) of 0.9.
    top = values[values > 0.1]
    assert len(top) == 2 ** (bits - 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 700), st.booleans(), st.floats(-12, 6))
def test_what_is_read_is_near_what_was_written(seed: int, size: int, signed: bool, power: float) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 10.0**power
    x = x if signed else x.square()
    codes, scales = quantised(x, signed=signed)
    found = restored(codes, scales)
    assert codes.shape == x.shape
    assert codes.dtype == (torch.int8 if signed else torch.uint8)
    for start in range(0, size, BLOCK):
        one, other = x[start : start + BLOCK], found[start : start + BLOCK]
        most = one.abs().max()
        assert torch.equal(other.abs().max(), most)  # the largest is kept as it is
        offered = magnitudes(7 if signed else 8, x.device) * most
        nearest = (one.abs()[:, None] - offered).abs().amin(1)
        least = 0.0 if signed else offered[1]  # what is not 0 is not read as 0 where there is no sign
        assert ((one - other).abs() <= nearest + least + 1e-6 * most).all()
    assert torch.equal(found == 0, x == 0) or signed


def test_zero_and_masked_entries_read_as_zero() -> None:
    x = torch.randn(3, 400)
    codes, scales = quantised(x, signed=True)
    hard = torch.rand(3, 400) > 0.5
    codes.mul_(hard)  # what the projection does to moments of the weight's shape
    found = restored(codes, scales)
    assert (found[~hard] == 0).all()
    assert (found[hard] != 0).all()
    assert (restored(*quantised(torch.zeros(600), signed=False)) == 0).all()


def _trained(rule: torch.optim.Optimizer, weight: nn.Parameter, target: torch.Tensor, steps: int) -> float:
    inputs = torch.Generator().manual_seed(1)
    for step in range(steps):
        set_rate(rule, 0.02 * (1 - step / steps))
        x = torch.randn(64, target.shape[1], generator=inputs)
        loss = (x @ (weight - target).T).square().mean()
        rule.zero_grad()
        loss.backward()
        rule.step()
    return float((weight - target).detach().square().mean())


def test_small_tensors_follow_adamw_to_the_letter() -> None:
    start, target = torch.randn(16, 16), torch.randn(16, 16)
    ends = []
    for kind in (EightBitAdamW, torch.optim.AdamW):
        weight = nn.Parameter(start.clone())
        groups = [{"params": [weight], "weight_decay": 0.1}]
        _trained(kind(groups, betas=(0.9, 0.95), eps=1e-8), weight, target, 20)
        ends.append(weight.detach())
    assert start.numel() < SMALL
    torch.testing.assert_close(*ends)


def test_a_large_matrix_is_fitted_as_well_as_by_adamw() -> None:
    torch.manual_seed(0)
    start, target = torch.zeros(64, 100), torch.randn(64, 100)
    errors = []
    for kind in (EightBitAdamW, torch.optim.AdamW):
        weight = nn.Parameter(start.clone())
        errors.append(_trained(kind([{"params": [weight]}], betas=(0.9, 0.95), eps=1e-8), weight, target, 400))
    assert errors[0] < 1.1 * errors[1] + 1e-6
    assert errors[1] < 0.05 * float(target.square().mean())


@pytest.mark.slow
@pytest.mark.skipif(not available(), reason="Triton is not installed")
def test_the_kernel_does_what_plain_torch_does() -> None:
    assert_agreement(Path(__file__).with_name("eight_bit_cases.py"))


@pytest.mark.skipif(not (available() and torch.cuda.is_available()), reason="needs a GPU and Triton")
@pytest.mark.slow
def test_the_kernel_does_what_plain_torch_does_on_a_gpu() -> None:
    assert_agreement(Path(__file__).with_name("eight_bit_cases.py"), "cuda")


def test_what_the_kernel_does_not_cover_is_said() -> None:
    weight, gradient = torch.zeros(64, 80), torch.zeros(64, 80)
    last = None if available() else "Triton is not installed"
    assert eight_bit.refusal(weight, gradient, on="cpu") == last
    assert "on cpu" in str(eight_bit.refusal(weight, gradient))
    assert "not float32" in str(eight_bit.refusal(weight.double(), gradient, on="cpu"))
    assert "strided" in str(eight_bit.refusal(weight, torch.zeros(80, 64).t(), on="cpu"))
    assert "multiple of 16 entries" in str(eight_bit.refusal(torch.zeros(7, 9), torch.zeros(7, 9), on="cpu"))
    assert "at no multiple of 64 bytes" in str(eight_bit.refusal(weight, gradient, torch.zeros(9)[1:], on="cpu"))


def _around() -> tuple[nn.Module, list[Site], Surroundings]:
    model = tiny_model("llama")
    sites = assign_patterns(sites_of(model), nm(2, 4))
    return model, sites, Surroundings(
        model=model, sites=sites, slorb=None, steps=20, calibration=lambda n, length: [tokens(n, 8, seed=0)]
    )  # fmt: skip


def test_embeddings_and_small_tensors_keep_float32() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(100, 64), "matrix": nn.Linear(64, 128)})
    around = Surroundings(model=model, sites=[], slorb=None, steps=2, calibration=lambda n, length: [])
    rule = build_optimizer(model, [], PLAN, MaskTrack(around))
    assert isinstance(rule, EightBitAdamW)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    rule.step()
    kinds = {name: "exp_avg_codes" in rule.state[parameter] for name, parameter in model.named_parameters()}
    assert kinds == {"embedding.weight": False, "matrix.weight": True, "matrix.bias": False}


def test_a_checkpoint_goes_on_to_the_bit(tmp_path: Path) -> None:
    def started() -> tuple[nn.Module, EightBitAdamW, MaskTrack]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(70, 90), nn.Linear(90, 4))
        around = Surroundings(model=model, sites=[], slorb=None, steps=9, calibration=lambda n, length: [])
        groups = [{"params": list(model.parameters()), "weight_decay": 0.0}]
        return model, EightBitAdamW(groups, betas=(0.9, 0.95), eps=1e-8), MaskTrack(around)

    def go(model: nn.Module, rule: EightBitAdamW, first: int, last: int) -> None:
        for step in range(first, last):
            set_rate(rule, 1e-2)
            x = torch.randn(8, 70, generator=torch.Generator().manual_seed(step))
            rule.zero_grad()
            model(x).square().mean().backward()
            rule.step()

    straight = started()
    go(*straight[:2], 0, 9)
    halved = started()
    go(*halved[:2], 0, 5)
    Checkpoints(tmp_path, "cell").save(5, *halved)
    resumed = started()
    assert Checkpoints(tmp_path, "cell").resume(*resumed) == 5
    go(*resumed[:2], 5, 9)
    for one, other in zip(straight[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_model_trains_as_well_as_with_adamw(tmp_path: Path) -> None:
    usual = cell(DenseControl(), steps=40)
    plan = replace(usual.recipe.train, lr=WarmupLinear(peak=1e-2))
    losses = []
    for moments in ("float32", "8-bit"):
        made = replace(usual, recipe=replace(usual.recipe, train=replace(plan, moments=moments), objective=TaskOnly()))
        train_cell(made, tmp_path / moments, tmp_path)
        lines, _ = read_journal(tmp_path / moments / "journal.jsonl")
        losses.append([line["scalars"]["loss/total"] for line in lines if "loss/total" in line.get("scalars", {})])
    first, last = losses[0][0], losses[0][-1]
    assert last < 0.6 * first
    assert losses[1][-1] == pytest.approx(last, rel=0.02)


def test_what_cannot_have_it_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match=r"moments='8-bit': rule='muon'"):
        replace(PLAN, rule="muon")
    recipe = cell(DenseControl()).recipe
    eight = replace(recipe, train=replace(recipe.train, moments="8-bit"))
    with pytest.raises(RecipeError, match=r"sharding shard: train\.moments='8-bit'"):
        refuse(eight, "shard", 2)
    refuse(eight, "replicate", 2)
    with pytest.raises(RecipeError, match=r"train\.moments='8-bit': method 'sparseforge' takes its curvature"):
        replace(cell(SparseForge(curvature=AdamSecondMoment())).recipe, train=eight.train)
    model, sites, around = _around()
    with pytest.raises(RecipeError, match=r"train\.moments='8-bit': .* brings an update rule of its own"):
        build_optimizer(model, sites, PLAN, AST().start(around))


def test_the_plan_of_memory_knows_it() -> None:
    assert eight_bit.BYTES == EIGHT_BIT_BYTES
    seven = shape_of("llama-2-7b")
    usual, eight = Spread(), Spread(moment_bytes=EIGHT_BIT_BYTES)
    saved = need(seven, usual) - need(seven, eight)
    moving = next(line for line in lines(seven, eight) if line.what == "Adam moments")
    assert "2.03 B" in moving.how
    assert 0.9 * (ADAM_BYTES - EIGHT_BIT_BYTES) * seven.masked < saved < (ADAM_BYTES - EIGHT_BIT_BYTES) * seven.masked
