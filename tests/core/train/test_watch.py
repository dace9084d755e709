"""A step that is not finite changes nothing, whether the host looks at once or some steps later."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparseforge_core.errors import Diverged
from sparseforge_core.train.watch import LOOK_EVERY, Watch, can_skip

BAD = 3


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(4, 4))]


def adam(weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=0.1, fused=True)


def step(watch: Watch, weights: list[torch.nn.Parameter], number: int, *, loss: float = 1.0, norm: float = 1.0) -> None:
    made = torch.Generator().manual_seed(number)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=made)
        if not math.isfinite(norm):
            weight.grad.fill_(math.nan)
    watch.before_update(number, torch.tensor(loss, dtype=torch.float64), torch.tensor(norm))
    watch.optimizer.step()
    watch.after_update(number)


def state(watch: Watch, weights: list[torch.nn.Parameter]) -> list[Tensor]:
    return [value.detach().clone() for w in weights for value in (w, *(watch.optimizer.state[w][k] for k in MOMENTS))]


MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@pytest.mark.parametrize("bad", [{"loss": math.nan}, {"norm": math.inf}])
def test_a_host_that_looks_later_finds_everything_as_it_was_before_the_bad_step(bad: dict[str, float]) -> None:
    weights = parameters()
    watch = Watch(adam(weights), torch.device("cpu"), deferred=True)
    for number in range(1, BAD):
        step(watch, weights, number)
    watch.check()
    assert watch.loss == 1.0
    before = state(watch, weights)
    step(watch, weights, BAD, **bad)
    step(watch, weights, BAD + 1)  # good again, but what it would build on is not there
    assert all(torch.equal(a, b) for a, b in zip(before, state(watch, weights), strict=True))
    with pytest.raises(Diverged, match=f"step {BAD}: the {'loss is nan' if 'loss' in bad else 'gradient norm is inf'}"):
        watch.check()


def test_a_host_that_looks_later_looks_by_itself_every_few_steps() -> None:
    weights = parameters()
    watch = Watch(adam(weights), torch.device("cpu"), deferred=True)
    for number in range(1, 2 * LOOK_EVERY):
        step(watch, weights, number, loss=math.inf if number == BAD else 1.0)
    with pytest.raises(Diverged, match=f"step {BAD}"):
        step(watch, weights, 2 * LOOK_EVERY)


def test_deferred_steps_are_those_of_a_host_that_always_looks() -> None:
    found = []
    for deferred in (False, True):
        weights = parameters()
        watch = Watch(adam(weights), torch.device("cpu"), deferred=deferred)
        for number in range(1, 6):
            step(watch, weights, number)
        found.append(state(watch, weights))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_host_that_looks_at_once_refuses_at_once() -> None:
    weights = parameters()
    watch = Watch(adam(weights), torch.device("cpu"))
    assert not watch.deferred
    with pytest.raises(Diverged, match="step 1: the loss is inf"):
        watch.refuse_loss(torch.tensor(math.inf), 1)
    with pytest.raises(Diverged, match="step 2: the gradient norm is nan"):
        step(watch, weights, 2, norm=math.nan)


def test_only_rules_that_the_device_can_stop_are_looked_at_later() -> None:
    weights = parameters()
    assert can_skip(adam(weights))
    assert not can_skip(torch.optim.AdamW(weights, fused=False))
    assert not can_skip(torch.optim.SGD(weights))
