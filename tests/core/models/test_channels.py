"""Channels whose order is free: every declared family computes the same in any order of all of them."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from sparseforge_core.errors import UnsupportedModel
from sparseforge_core.models.channel_layouts import LAYOUTS
from sparseforge_core.models.channels import free_channels, permute
from sparseforge_core.models.families import FAMILIES, family_of
from sparseforge_core.models.hub import from_config
from tests.tiny import EVERY_ARCHITECTURE, sites_of, tiny_model, tokens


def unlike(model: Any) -> Any:
    """No two channels alike, norms and biases included."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def assert_any_order_computes_the_same(model: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    before = model(input_ids=tokens()).logits.detach()
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    found = free_channels(model, family_of(model.config.model_type))
    assert [one.name for one in found][-1] == "residual stream"
    assert len({one.name for one in found}) == len(found)
    for one in found:
        permute(model, one, torch.randperm(one.size, generator=generator))
        torch.testing.assert_close(model(input_ids=tokens()).logits, before, rtol=1e-3, atol=1e-4, msg=one.name)
    still = {name for name, weight in model.named_parameters() if torch.equal(weight, weights[name])}
    apart = r"bias|self_attn\..*norm|self_attn\.sinks"
    if getattr(model.config, "word_embed_proj_dim", None) not in (None, model.config.hidden_size):
        apart += r"|embed_tokens"  # what is projected into the stream has channels of its own
    assert all(re.search(apart, name) for name in still), f"all but what a head has to itself: {still}"


def test_every_family_is_declared() -> None:
    assert set(LAYOUTS) == {family.name for family in FAMILIES.values()}


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
def test_a_model_with_its_channels_in_another_order_computes_the_same(architecture: str) -> None:
    assert_any_order_computes_the_same(unlike(tiny_model(architecture)))


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
def test_every_input_of_a_masked_weight_is_free_but_for_what_a_rotation_mixes(architecture: str) -> None:
    model = tiny_model(architecture)
    places = [place for one in free_channels(model, family_of(model.config.model_type)) for place in one.places]
    for site in sites_of(model):
        whole = site.weight.ndim - (2 if site.transposed else 1)
        mine = [place for place in places if place.parameter == site.name]
        assert any(place.dim == whole - (place.expert is not None) for place in mine), site.name


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("phi3", {"num_key_value_heads": 2}),
        ("falcon", {"multi_query": False}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 4, "bias": True}),
        ("gpt_bigcode", {"multi_query": False}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("opt", {"word_embed_proj_dim": 32}),
        ("deepseek_v3", {"q_lora_rank": None}),
        ("gpt_oss", {"num_key_value_heads": 2}),
        ("stablelm", {"num_key_value_heads": 2, "qk_layernorm": True}),
        ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
        ("phi", {"num_key_value_heads": 2, "qk_layernorm": True}),
        ("cohere", {"num_key_value_heads": 2, "use_qk_norm": True, "attention_bias": True}),
        ("olmoe", {"num_key_value_heads": 2, "clip_qkv": 0.5}),
        ("gemma2", {"head_dim": 32}),
        ("falcon", {"alibi": True, "bias": True, "parallel_attn": False}),
        ("bloom", {"apply_residual_connection_post_layernorm": True}),
        ("opt", {"do_layer_norm_before": False, "enable_bias": False}),
        ("granitemoe", {"num_key_value_heads": 2, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_other_layouts_of_a_family(architecture: str, changes: dict[str, Any]) -> None:
    config = copy.deepcopy(tiny_model(architecture, heads=4).config)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    assert_any_order_computes_the_same(unlike(from_config(config).eval()))


def test_a_query_head_reads_the_values_of_its_own_head() -> None:
    model = tiny_model("llama", heads=4)
    model.config.num_key_value_heads = 1
    wrong = [one for one in free_channels(model, FAMILIES["llama"]) if "values" in one.name]
    assert len(wrong) == model.config.num_hidden_layers, "one head of values a block, read by all four"
    assert {len(one.places) for one in wrong} == {1 + 4}


def test_a_layout_that_names_what_a_model_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tuple(replace(one, made=(("gate_proj", 0), ("lift_proj", 0))) for one in LAYOUTS["llama"].inner)
    monkeypatch.setitem(LAYOUTS, "llama", replace(LAYOUTS["llama"], inner=inner))
    with pytest.raises(UnsupportedModel, match=r"mlp\.lift_proj\.weight should make channels and is not in this model"):
        free_channels(tiny_model("llama"), FAMILIES["llama"])


def test_what_nobody_declared_is_refused_with_what_to_do() -> None:
    other = replace(FAMILIES["opt"], name="automatic")
    with pytest.raises(UnsupportedModel, match=r"family automatic may change places is not declared.*Declared: llama"):
        free_channels(tiny_model("opt"), other)
    model = tiny_model("llama")
    model.register_parameter("gain", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(UnsupportedModel, match=r"nothing says whether gain \(3,\) has the channels"):
        free_channels(model, family_of("llama"))
