"""Streaming a model block by block shows its sites exactly what a forward of the whole model would."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparseforge_core.errors import CurvatureUnavailable, UnsupportedModel
from sparseforge_core.observe.activations import input_norms
from sparseforge_core.observe.blocks import blocks_of, stream_blocks
from sparseforge_core.observe.grams import Grams, in_order
from tests.tiny import ARCHITECTURES, sites_of, tiny_model, tokens

BATCHES = [tokens(4, 16, seed=1), tokens(4, 16, seed=2), tokens(1, 16, seed=3)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_norms_of_a_streamed_model_are_those_of_the_whole_model_to_the_bit(architecture: str) -> None:
    model = tiny_model(architecture)
    sites = sites_of(model)
    whole = input_norms(model, sites, BATCHES)
    streamed: dict[str, torch.Tensor] = {}
    for block in stream_blocks(model, sites, BATCHES):
        streamed |= block.input_norms()
    assert streamed.keys() == whole.keys()
    assert all(torch.equal(streamed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pruned_inputs", [True, False])
def test_a_block_sees_what_the_caller_made_of_those_before_it(architecture: str, pruned_inputs: bool) -> None:
    model, changed = tiny_model(architecture), tiny_model(architecture)
    sites = sites_of(model)
    first, second = blocks_of(sites)
    with torch.no_grad():
        for site in blocks_of(sites_of(changed))[0]:
            site.weight.mul_(0.5)
    source = changed if pruned_inputs else model
    want = input_norms(source, blocks_of(sites_of(source))[1], BATCHES)
    for block in stream_blocks(model, sites, BATCHES, pruned_inputs=pruned_inputs):
        if block.sites == second:
            assert all(torch.equal(norm, want[name]) for name, norm in block.input_norms().items())
        else:
            assert block.sites == first
            with torch.no_grad():
                for site in block.sites:
                    site.weight.mul_(0.5)


def test_no_block_runs_while_the_calls_are_captured_but_the_first_one_once() -> None:
    model = tiny_model("llama", layers=3)
    runs = [0, 0, 0]

    def count(index: int) -> Any:
        return lambda *_: runs.__setitem__(index, runs[index] + 1)

    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(count(index))
    stream = stream_blocks(model, sites_of(model), BATCHES)
    next(stream)
    assert runs == [1, 0, 0]
    assert all("forward" not in vars(layer) for layer in model.model.layers)


def test_grams_are_sums_of_outer_products_and_shared_by_sites_with_one_input() -> None:
    model = tiny_model("llama")
    seen: list[torch.Tensor] = []
    down = model.model.layers[0].mlp.down_proj
    down.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().reshape(-1, down.in_features).double()))
    block = next(stream_blocks(model, sites_of(model), BATCHES))
    seen.clear()
    grams = Grams(block, block.sites)
    x = torch.cat(seen)
    by_name = {site.name.split(".")[-2]: site for site in block.sites}
    assert torch.allclose(grams.of(by_name["down_proj"]).double(), x.T @ x, rtol=1e-4, atol=1e-6)
    assert grams.of(by_name["q_proj"]) is grams.of(by_name["v_proj"])
    assert grams.of(by_name["gate_proj"]) is grams.of(by_name["up_proj"])
    assert grams.of(by_name["q_proj"]) is not grams.of(by_name["o_proj"])


def test_sites_share_a_gram_across_others_that_ran_between_them() -> None:
    """Phi's attention and MLP stand side by side on one normalised input."""
    model = tiny_model("phi")
    block = next(stream_blocks(model, sites_of(model), BATCHES))
    grams = Grams(block, block.sites)
    by_name = {site.name.split(".")[-2]: site for site in block.sites}
    assert grams.of(by_name["fc1"]) is grams.of(by_name["q_proj"])
    assert grams.of(by_name["fc2"]) is not grams.of(by_name["dense"])
    alone = Grams(block, [by_name["fc1"]])
    assert torch.equal(alone.of(by_name["fc1"]), grams.of(by_name["fc1"]))


def test_a_tensor_that_was_changed_in_place_is_another_input() -> None:
    model = tiny_model("phi")
    mlp = model.model.layers[0].mlp

    def double(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        args[0].mul_(2.0)

    mlp.fc1.register_forward_pre_hook(double)
    block = next(stream_blocks(model, sites_of(model), BATCHES))
    grams = Grams(block, block.sites)
    by_name = {site.name.split(".")[-2]: site for site in block.sites}
    assert torch.allclose(grams.of(by_name["fc1"]), 4.0 * grams.of(by_name["q_proj"]))


@pytest.mark.parametrize(
    ("architecture", "order"),
    [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]),
        ("gpt2", [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]]),
        ("opt", [["k_proj", "q_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]]),
    ],
)
def test_sites_are_told_apart_by_what_they_receive(architecture: str, order: list[list[str]]) -> None:
    model = tiny_model(architecture)
    block = next(stream_blocks(model, sites_of(model), BATCHES))
    found = [sorted(site.name.split(".")[-2] for site in group) for group in in_order(block)]
    assert found == [sorted(group) for group in order]


def test_what_cannot_be_streamed_is_refused() -> None:
    model = tiny_model("llama")
    sites = sites_of(model)
    with pytest.raises(CurvatureUnavailable, match="no calibration text"):
        next(stream_blocks(model, sites, []))
    sites[0].name = "elsewhere.0.weight"
    with pytest.raises(UnsupportedModel, match="one list of numbered blocks"):
        next(stream_blocks(model, sites, BATCHES))
