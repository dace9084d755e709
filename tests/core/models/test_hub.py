"""Loading: what holds for every architecture, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparseforge_core.errors import RecipeError
from sparseforge_core.models import hub
from sparseforge_core.models.tiny import CONFIGURATIONS, tiny_config
from tests.tiny import tiny_source, tokens


def test_chance_is_off_in_every_architecture(home: Path) -> None:
    """A training mode that differs from evaluation would make a recipe's numbers depend on dropout or jitter."""
    for architecture in CONFIGURATIONS:
        model = hub.load_model(tiny_source(architecture), home)
        with torch.no_grad():
            evaluated = model(tokens(), use_cache=False).logits
            assert torch.equal(model.train()(tokens(), use_cache=False).logits, evaluated), architecture


def test_an_unknown_architecture_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"unknown architecture 'mixtrall'\. Did you mean 'mixtral'"):
        tiny_config(tiny_source("mixtrall"), 64, 0)
