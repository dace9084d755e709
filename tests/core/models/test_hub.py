"""Loading: what holds for every architecture, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparseforge_core.errors import RecipeError, UnsupportedModel
from sparseforge_core.models import hub
from sparseforge_core.models.tiny import CONFIGURATIONS, tiny_config
from tests.tiny import tiny_source, tokens


def test_chance_is_off_and_the_longest_sequence_known_in_every_architecture(home: Path) -> None:
    """A training mode that differs from evaluation would make a recipe's numbers depend on dropout or jitter."""
    for architecture in CONFIGURATIONS:
        model = hub.load_model(tiny_source(architecture), home)
        length = getattr(model.config, "max_position_embeddings", None) or model.config.n_positions
        assert length == 64, architecture
        with torch.no_grad():
            evaluated = model(tokens(), use_cache=False).logits
            assert torch.equal(model.train()(tokens(), use_cache=False).logits, evaluated), architecture


def test_a_configuration_without_a_length_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tiny_source("bloom"), 64, 0)
    del config.seq_length
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="a bloom does not say how long a sequence may be"):
        hub.from_pretrained(dtype=torch.float32, what="a folder", pretrained_model_name_or_path=str(tmp_path))


def test_an_unknown_architecture_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"unknown architecture 'mixtrall'\. Did you mean 'mixtral'"):
        tiny_config(tiny_source("mixtrall"), 64, 0)
