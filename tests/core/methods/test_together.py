"""Updates of a track are recorded where nothing moves, and only there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparseforge_core.methods.together import _Places
from sparseforge_core.sparsity import fused
from tests.interpreted import assert_agreement


@pytest.mark.skipif(not fused.available(), reason="Triton is not installed: there is nothing to compare")
@pytest.mark.slow
def test_recorded_updates_are_those_of_launches() -> None:
    assert_agreement(Path(__file__).with_name("together_cases.py"))


@pytest.mark.skipif(not (fused.available() and torch.cuda.is_available()), reason="needs a GPU and Triton")
@pytest.mark.slow
def test_recorded_updates_are_those_of_launches_on_a_gpu() -> None:
    assert_agreement(Path(__file__).with_name("together_cases.py"), "cuda")


def test_places_hold_while_every_tensor_is_the_same_and_stays_where_it_is() -> None:
    places = _Places()
    one, other = torch.ones(4), torch.ones(4)
    assert not places.hold([one, other])
    assert places.hold([one, other])
    one.mul_(2.0)
    assert places.hold([one, other])
    assert not places.hold([other, one])
    assert not places.hold([other])
    assert not places.hold([other, one])
    one.data = one.data.clone()
    assert not places.hold([other, one])
    assert places.hold([other, one])
    assert not places.hold([other, one.view(4)]), "the same memory in another tensor is made anew each time"


def test_places_keep_no_tensor_alive() -> None:
    places = _Places()
    made = torch.ones(4)
    address = made.data_ptr()
    places.hold([made])
    del made
    again = torch.empty(0).set_(torch.ones(4).untyped_storage())
    assert not places.hold([again]), f"what lay at {address} is gone"
