"""Parameter groups: who decays, and at what share of the learning rate what carries no mask trains."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from torch import nn

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods import FrozenMask
from sparseforge_core.methods.base import Surroundings
from sparseforge_core.models.sites import assign_patterns
from sparseforge_core.recipe import TrainPlan
from sparseforge_core.sparsity.patterns import nm
from sparseforge_core.train.optimizer import build_optimizer, set_rate
from tests.tiny import sites_of, tiny_model, tokens


def _rates(rule: Literal["adamw", "muon"], share: float) -> tuple[nn.Module, list[Any], dict[int, float]]:
    """A tiny model, its sites, and the learning rate of each parameter at a plan's rate of 0.01."""
    model = tiny_model("llama")
    sites = assign_patterns(sites_of(model), nm(2, 4))
    around = Surroundings(
        model=model, sites=sites, slorb=None, steps=20, calibration=lambda n, length: [tokens(n, 8, seed=0)]
    )
    plan = TrainPlan(steps=20, sequences=2, length=8, rule=rule, unmasked_rate=share, weight_decay=0.1)
    optimizer = build_optimizer(model, sites, plan, FrozenMask().start(around))
    set_rate(optimizer, 0.01)
    return model, sites, {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("rule", ["adamw", "muon"])
@pytest.mark.parametrize("share", [1.0, 0.25, 0.0])
def test_only_what_carries_no_mask_trains_slower(rule: Literal["adamw", "muon"], share: float) -> None:
    model, sites, rates = _rates(rule, share)
    masked = {id(site.weight) for site in sites}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(rates) == len(trained)
    assert masked < set(rates)
    for parameter in trained:
        assert rates[id(parameter)] == pytest.approx(0.01 if id(parameter) in masked else 0.01 * share)


def test_a_negative_share_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match=r"unmasked_rate=-1"):
        TrainPlan(unmasked_rate=-1.0)
