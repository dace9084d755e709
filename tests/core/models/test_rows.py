"""Forwards of one sequence a row are not asked whether rows pack several, and give the same."""

from __future__ import annotations

import pytest
import torch
from transformers import masking_utils

from benchmarks.steps import Shape, config_of
from sparseforge_core.models import rows
from sparseforge_core.models.hub import from_config
from sparseforge_core.objective import Distill, batch_losses


def test_nobody_asks_for_packed_rows_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    question = masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda ids: asked.append(ids) or question(ids))
    model, teacher = (from_config(config_of(Shape(2, 32, 64, 2, 1, 128, True, 2, 8))).eval() for _ in range(2))
    tokens = torch.randint(0, 128, (2, 8))
    expected = model(input_ids=tokens, use_cache=False).logits
    assert len(asked) == 1, "transformers asks no more by this name: see whether it asks by another"
    with rows.one_sequence_a_row():
        found = model(input_ids=tokens, use_cache=False).logits
    batch_losses(model, teacher, Distill(), tokens)
    assert len(asked) == 1
    assert torch.equal(found, expected)


def test_packed_rows_are_found_outside_and_after_an_error() -> None:
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    with rows.one_sequence_a_row(), rows.one_sequence_a_row():
        assert masking_utils.find_packed_sequence_indices(packed) is None
    with pytest.raises(ValueError, match="of a step"), rows.one_sequence_a_row():
        raise ValueError("of a step")
    found = masking_utils.find_packed_sequence_indices(packed)
    assert found is not None
    assert found.tolist() == [[0, 0, 0, 1, 1]]


def test_a_recorded_forward_makes_no_mask_that_the_plain_one_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model = from_config(config_of(Shape(2, 32, 64, 2, 1, 128, True, 2, 8))).eval()
    seen = []
    model.model.layers[0].register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    for question in ("is_initialized", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, question, lambda: True)
    with rows.one_sequence_a_row():
        model(input_ids=torch.zeros(2, 8, dtype=torch.long), use_cache=False)
    assert seen == [None]


def test_a_machine_without_a_gpu_is_not_asked_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> bool:
        raise RuntimeError("no driver")

    model = from_config(config_of(Shape(2, 32, 64, 2, 1, 128, True, 2, 8))).eval()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", refuse)
    monkeypatch.setattr(masking_utils, "is_tracing", lambda tensor=None: False)
    with rows.one_sequence_a_row():
        assert masking_utils.is_tracing(None) is False
        model(input_ids=torch.zeros(2, 8, dtype=torch.long), use_cache=False)
