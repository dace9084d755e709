"""Channels whose order is free: every declared family computes the same in any order of all of them."""

from __future__ import annotations

import re

import pytest
import torch

from sparseforge_core.errors import UnsupportedModel
from sparseforge_core.models.channels import free_channels, permute
from sparseforge_core.models.families import FAMILIES, family_of
from sparseforge_core.models.families.llama import LLAMA_BLOCK
from sparseforge_core.models.tiny import CONFIGURATIONS
from tests.tiny import tiny_model, tokens

DECLARED = ("llama", "gpt2", *(name for family in LLAMA_BLOCK for name in family.model_types if name in CONFIGURATIONS))


def test_every_architecture_with_llamas_block_is_tried() -> None:
    assert {family_of(name).name for name in DECLARED} == {"llama", "gpt2", *(family.name for family in LLAMA_BLOCK)}


@pytest.mark.parametrize("architecture", DECLARED)
def test_a_model_with_its_channels_in_another_order_computes_the_same(architecture: str) -> None:
    model = tiny_model(architecture)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # no two channels alike, norms and biases included
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    before = model(input_ids=tokens()).logits.detach()
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    found = free_channels(model, family_of(architecture))
    assert [one.name for one in found][-1] == "residual stream"
    assert len({one.name for one in found}) == len(found)
    for one in found:
        permute(model, one, torch.randperm(one.size, generator=generator))
        torch.testing.assert_close(model(input_ids=tokens()).logits, before, rtol=1e-3, atol=1e-4, msg=one.name)
    still = {name for name, weight in model.named_parameters() if torch.equal(weight, weights[name])}
    assert all(re.search(r"bias|self_attn\..*norm", name) for name in still), "all but what a head has to itself"


def test_a_query_head_reads_the_values_of_its_own_head() -> None:
    model = tiny_model("llama", heads=4)
    model.config.num_key_value_heads = 1
    wrong = [one for one in free_channels(model, FAMILIES["llama"]) if "values" in one.name]
    assert len(wrong) == model.config.num_hidden_layers, "one head of values a block, read by all four"
    assert {len(one.places) for one in wrong} == {1 + 4}


def test_what_nobody_declared_is_refused_with_what_to_do() -> None:
    with pytest.raises(UnsupportedModel, match=r"family opt may change places is not declared.*Declared: llama"):
        free_channels(tiny_model("opt"), family_of("opt"))
    model = tiny_model("llama")
    model.register_parameter("gain", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(UnsupportedModel, match=r"nothing says whether gain \(3,\) has the channels"):
        free_channels(model, family_of("llama"))
