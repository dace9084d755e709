"""Every estimator against the exact diagonal, worked out with torch.func on a network that knows no masks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparseforge_core.errors import CurvatureUnavailable, RecipeError
from sparseforge_core.observe.curvature import (
    ESTIMATORS,
    AdamSecondMoment,
    Curvature,
    FiniteDifference,
    Fisher,
    GaussNewtonBartlett,
    Hutchinson,
    KFACDiagonal,
    MicroBatchFisher,
    second_order,
)
from tests.core.observe.known import Quadratic, TwoMatrices, estimated, masked_site, relative_error
from tests.tiny import sites_of, tiny_model, tokens


def dense_quadratic() -> Quadratic:
    root = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Quadratic(root @ root.T)


# ------------------------------------------------------------------ second order: the Hessian's diagonal


@pytest.mark.parametrize("spec", [Hutchinson(probes=1), FiniteDifference(probes=1), Hutchinson(probes=1, joint=False)])
def test_one_probe_is_exact_where_the_hessian_is_diagonal(spec: Curvature) -> None:
    """v_i^2 = 1, so without off-diagonal entries every single probe answers exactly, pruned entries included."""
    diagonal = torch.linspace(0.1, 3.0, 12, dtype=torch.float64)
    model = Quadratic(torch.diag(diagonal))
    assert torch.allclose(estimated(spec, model).of(model.sites[0]).flatten(), diagonal, rtol=1e-9)


@pytest.mark.parametrize("spec", [Hutchinson(probes=2000), FiniteDifference(probes=2000)])
def test_probes_converge_to_the_diagonal_of_a_quadratic(spec: Curvature) -> None:
    model = dense_quadratic()
    error = estimated(spec, model).of(model.sites[0]).flatten() - model.matrix.diagonal()
    off_diagonal = model.matrix - torch.diag(model.matrix.diagonal())
    deviation = off_diagonal.square().sum(1).div(2000).sqrt()  # of the mean of 2000 probes
    assert bool((error.abs() < 5 * deviation).all())
    assert float((error / deviation).square().mean()) < 3.0


@pytest.mark.parametrize("spec", [Hutchinson(probes=500, joint=False), FiniteDifference(probes=500, eps=1e-4)])
def test_probes_converge_to_the_hessian_of_a_network(spec: Hutchinson | FiniteDifference) -> None:
    """The error of n probes is the off-diagonal noise over sqrt(n); probing a site at a time leaves out other sites."""
    model = TwoMatrices()
    hessian = model.hessian(model.batch().tokens)
    exact = hessian.diagonal()
    assert bool((exact < 0).any()), "the test needs an indefinite Hessian"
    noise = hessian - torch.diag(exact)
    if isinstance(spec, Hutchinson):
        cut = model.sites[0].weight.numel()
        noise[:cut, cut:] = noise[cut:, :cut] = 0.0
    deviation = model.split(noise.square().sum(1).div(spec.probes).sqrt())
    estimate = estimated(spec, model)
    for site, diagonal in zip(model.sites, model.split(exact).values(), strict=True):
        error = (estimate.of(site) - diagonal.clamp_min(0.0)).abs()
        assert bool((error < 5 * deviation[site.name]).all())
        assert float(error.norm() / deviation[site.name].norm()) < 1.5


def test_differences_of_gradients_are_the_products_of_double_backward() -> None:
    """Same probes, so the same products but for O(e^2)."""
    model = TwoMatrices()
    exact = estimated(Hutchinson(probes=3), model)
    near = estimated(FiniteDifference(probes=3, eps=1e-4), model)
    for site in model.sites:
        assert torch.allclose(exact.of(site), near.of(site), rtol=1e-5, atol=1e-9)


def test_the_three_treatments_of_signs() -> None:
    model = dense_quadratic()
    site = model.sites[0]
    raw = []
    for step in (1, 2):  # single probes, unclamped, from the parts of a diagonal shifted far into the positive
        shifted = Quadratic(model.matrix + 1000.0 * torch.eye(12, dtype=torch.float64))
        one = Hutchinson(probes=1, every=1).start(shifted.sites, seed=3)
        one.observe(shifted.batch(step))
        raw.append(one.of(shifted.sites[0]) - 1000.0)
    assert bool((raw[0] < 0).any())
    assert bool((raw[0] + raw[1] < 0).any())
    weights = (0.98 / 1.98, 1.0 / 1.98)
    before = estimated(Hutchinson(probes=1, every=1, signs="before"), model, steps=2).of(site)
    after = estimated(Hutchinson(probes=1, every=1, signs="after"), model, steps=2).of(site)
    assert torch.allclose(before, sum(w * r.clamp_min(0.0) for w, r in zip(weights, raw, strict=True)))
    assert torch.allclose(after, sum(w * r for w, r in zip(weights, raw, strict=True)).clamp_min(0.0))
    mean = estimated(Hutchinson(probes=2, signs="mean"), model).of(site)
    apart = estimated(Hutchinson(probes=2, signs="before"), model).of(site)
    together = estimated(Hutchinson(probes=2, signs="after"), model).of(site)
    assert torch.allclose(mean, together)  # of one step they are the same
    assert bool((apart >= mean).all())
    assert bool((apart > mean).any())


# ------------------------------------------------------------------ first order: E[g g] and the Gauss-Newton matrix


def test_micro_batch_fisher_is_the_mean_square_of_each_sequences_gradient() -> None:
    model = TwoMatrices()
    exact = model.split(model.per_sequence_gradients(model.batch().tokens).square().mean(0))
    assert relative_error(estimated(MicroBatchFisher(), model), model, exact) < 1e-12
    pairs = model.per_sequence_gradients(model.batch().tokens).view(4, 2, -1).mean(1)
    exact = model.split(pairs.square().mean(0))
    assert relative_error(estimated(MicroBatchFisher(sequences=2), model), model, exact) < 1e-12


def test_fisher_and_adam_see_the_square_of_the_batch_gradient() -> None:
    model = TwoMatrices()
    batch = model.batch()
    exact = model.split(model.per_sequence_gradients(batch.tokens).mean(0).square())
    fisher, adam = Fisher().start(model.sites), AdamSecondMoment().start(model.sites)
    for _ in range(3):  # at learning rate 0 the gradient stays what it is, and so must both averages
        model.loss(batch.tokens).backward()
        fisher.observe(batch)
        adam.observe(batch)
        batch.optimizer.step()
        batch.optimizer.zero_grad()
        assert relative_error(fisher, model, exact) < 1e-12
        assert relative_error(adam, model, exact) < 1e-12


@pytest.mark.parametrize("sequences", [1, 4])
def test_gauss_newton_bartlett_converges_to_the_gauss_newton_diagonal(sequences: int) -> None:
    model = TwoMatrices()
    exact = model.gauss_newton_diagonal(model.batch().tokens)
    spec = GaussNewtonBartlett(sequences=sequences, every=1, decay=0.999)
    batch = model.batch(sequences=8)
    steps = 300 * sequences
    estimate = estimated(spec, model, steps, lambda step: dataclasses.replace(batch, step=step))
    assert relative_error(estimate, model, exact) < 0.06


def test_kfac_is_the_product_of_both_second_moments() -> None:
    model = TwoMatrices()
    batch = model.batch(sequences=4)
    every = KFACDiagonal(every=1, decay=0.999)
    estimate = estimated(every, model, 1500, lambda step: dataclasses.replace(batch, step=step))
    x = model.table[batch.tokens]
    hidden = torch.tanh(x @ model.first.weight.T).detach()
    p = (hidden[:, :-1] @ model.second.weight.T).softmax(-1).detach()
    spread = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)  # E[d d^T] over the model's own labels
    back = model.second.weight.detach() * (1.0 - hidden[:, :-1, None, :].square())
    outputs = {
        "second.weight": spread.diagonal(dim1=-2, dim2=-1).mean((0, 1)),
        "first.weight": torch.einsum("ntvi,ntvu,ntui->nti", back, spread, back).mean((0, 1)),
    }
    inputs = {"first.weight": x.square().mean((0, 1)), "second.weight": hidden.square().mean((0, 1))}
    exact = {name: outputs[name].unsqueeze(-1) * inputs[name] for name in outputs}
    assert relative_error(estimate, model, exact) < 0.06


def test_kfac_is_the_gauss_newton_diagonal_where_all_inputs_are_alike() -> None:
    """With one input vector the two factors are independent, and the factorisation is exact."""
    model = TwoMatrices()
    with torch.no_grad():
        model.table[:] = model.table[0]
    batch = model.batch(sequences=4)
    exact = model.gauss_newton_diagonal(batch.tokens)
    spec = KFACDiagonal(every=1, decay=0.999)
    estimate = estimated(spec, model, 1500, lambda step: dataclasses.replace(batch, step=step))
    assert relative_error(estimate, model, exact) < 0.06


@pytest.mark.parametrize("spec", [Hutchinson(probes=2), FiniteDifference(probes=2), KFACDiagonal()])
def test_how_a_batch_is_cut_into_memory_portions_changes_nothing(spec: Curvature) -> None:
    model = TwoMatrices()
    whole = estimated(spec, model)
    parts = estimated(spec, model, batch=lambda step: model.batch(step, micro_batch=3))
    for site in model.sites:
        assert torch.allclose(whole.of(site), parts.of(site), rtol=1e-9, atol=1e-14)


def test_double_backward_takes_no_more_at_once_than_its_graph_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Hutchinson(probes=2, signs="before", every=1)
    model = TwoMatrices()
    whole = estimated(spec, model)
    asked: list[int] = []

    def loss(piece: Tensor, place: int) -> Tensor:
        asked.append(piece.shape[0])
        return model.loss(piece)

    monkeypatch.setattr(second_order, "DOUBLE_BACKWARD_TOKENS", 17)  # three sequences of five tokens
    cut = estimated(spec, model, batch=lambda step: model.batch(step, loss=loss))
    assert set(asked) == {3, 2}
    for site in model.sites:
        torch.testing.assert_close(cut.of(site), whole.of(site))


@pytest.mark.parametrize("spec", [MicroBatchFisher(sequences=3), Hutchinson(probes=1), FiniteDifference(probes=1)])
def test_a_loss_is_told_which_sequences_it_is_asked_for(spec: Curvature) -> None:
    """An objective may draw something for each sequence: it must be that sequence's on any rank."""
    model = TwoMatrices()
    told: set[tuple[int, int]] = set()

    def loss(tokens: torch.Tensor, place: int) -> torch.Tensor:
        told.add((place, tokens.shape[0]))
        return model.loss(tokens)

    estimated(spec, model, batch=lambda step: model.batch(step, loss=loss, micro_batch=3, first=8))
    assert told == {(8, 3), (11, 3), (14, 2)}


@pytest.mark.parametrize("spec", [GaussNewtonBartlett(), Hutchinson(probes=1), FiniteDifference(), KFACDiagonal()])
def test_what_is_drawn_is_a_function_of_seed_and_step(spec: Curvature) -> None:
    model = TwoMatrices()
    site = model.sites[0]

    def of(seed: int, step: int) -> torch.Tensor:
        estimate = spec.start(model.sites, seed=seed)
        torch.manual_seed(step)  # the global state must not matter
        estimate.observe(model.batch(step))
        return estimate.of(site)

    before = torch.get_rng_state()
    estimated(spec, model)
    assert torch.equal(before, torch.get_rng_state()), "an observation must not disturb the run's random state"
    assert torch.equal(of(0, 10), of(0, 10))
    assert not torch.equal(of(0, 10), of(1, 10))
    assert not torch.equal(of(0, 10), of(0, 20))


# ------------------------------------------------------------------ on a real architecture


OWN_PASSES: list[Curvature] = [
    MicroBatchFisher(), GaussNewtonBartlett(), KFACDiagonal(), FiniteDifference(probes=1), Hutchinson(probes=1)
]  # fmt: skip


@pytest.mark.parametrize("spec", OWN_PASSES, ids=lambda s: s.kind)
def test_only_double_backward_leaves_fused_attention_and_only_meanwhile(spec: Curvature) -> None:
    model, batch = llama_batch()
    seen: set[str] = set()
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda m, a: seen.add(model.config._attn_implementation))
    estimate = spec.start(sites_masked(model))
    estimate.observe(batch)
    assert seen == {"eager" if isinstance(spec, Hutchinson) else "sdpa"}
    assert model.config._attn_implementation == "sdpa"
    assert all(p.grad is None for p in model.parameters()), "an observation must leave .grad alone"


def test_attention_is_fused_again_after_an_error() -> None:
    model, batch = llama_batch()
    sites = sites_masked(model)
    model.model.layers[1].self_attn.o_proj.parametrizations.weight.original.requires_grad_(False)
    with pytest.raises(CurvatureUnavailable, match=r"1 of 14 sites \(model\.layers\.1\.self_attn\.o_proj\.weight\)"):
        Hutchinson().start(sites).observe(batch)
    assert model.config._attn_implementation == "sdpa"


def test_differences_agree_with_double_backward_in_float32_at_the_default_step() -> None:
    model, batch = llama_batch()
    sites = sites_masked(model)
    exact, near = Hutchinson(probes=1).start(sites), FiniteDifference(probes=1).start(sites)
    exact.observe(batch)
    near.observe(batch)
    for site in sites:
        assert float((exact.of(site) - near.of(site)).norm() / exact.of(site).norm()) < 1e-2, site.name


@pytest.mark.parametrize("spec", OWN_PASSES, ids=lambda s: s.kind)
def test_blocks_that_are_recomputed_in_backward_give_the_same(spec: Curvature) -> None:
    found = []
    for checkpointed in (False, True):
        model, batch = llama_batch()
        model.train()  # transformers checkpoints in training mode only; this model has no dropout
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        sites = sites_masked(model)
        estimate = spec.start(sites)
        estimate.observe(batch)
        found.append([estimate.of(site) for site in sites])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=0.0) for a, b in zip(*found, strict=True))


def test_experts_have_curvature_and_kfac_says_it_cannot() -> None:
    model, batch = llama_batch("deepseek_moe")
    sites = sites_masked(model)
    for spec in (MicroBatchFisher(), GaussNewtonBartlett(), FiniteDifference(probes=1)):
        estimate = spec.start(sites)
        estimate.observe(batch)
        for site in sites:
            assert bool((estimate.of(site) > 0).any()), (spec, site.name)
    with pytest.raises(CurvatureUnavailable, match=r"2 of \d+ sites are fused experts.*experts\.gate_up_proj"):
        KFACDiagonal().start(sites)


def test_kfac_knows_the_tokens_of_an_expert_with_matrices_of_its_own() -> None:
    """Product of the means over the tokens that were routed to it, times their share."""
    model, batch = llama_batch("deepseek-original")
    sites = sites_masked(model)
    estimate = KFACDiagonal().start(sites)
    estimate.observe(batch)
    expert = next(site for site in sites if ".experts." in site.name)
    seen: list[torch.Tensor] = []
    expert.module.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    batch.predictions(batch.tokens)
    x = torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in seen])
    assert 0 < x.shape[0] < batch.tokens.numel()
    found = estimate.of(expert)
    assert torch.allclose(found / found.sum(1, keepdim=True), (x.square().mean(0) / x.square().mean(0).sum())[None])
    assert torch.allclose(estimate.mean(expert, f"{expert.name}|seen"), torch.tensor(x.shape[0] / batch.tokens.numel()))


def test_conv1d_statistics_lie_as_the_weight_is_stored() -> None:
    model, batch = llama_batch("gpt2")
    sites = sites_masked(model)
    for spec in (MicroBatchFisher(), KFACDiagonal(), Hutchinson(probes=1)):
        estimate = spec.start(sites)
        estimate.observe(batch)
        assert all(estimate.of(site).shape == site.weight.shape for site in sites)


def llama_batch(architecture: str = "llama") -> tuple[Any, Any]:
    from sparseforge_core.objective import next_token_loss, predictions
    from sparseforge_core.observe.curvature import Batch

    model = tiny_model(architecture)
    return model, Batch(
        step=1,
        model=model,
        tokens=tokens(2, 8),
        loss=lambda piece, place: next_token_loss(model(input_ids=piece, use_cache=False).logits, piece),
        predictions=lambda piece: predictions(model, piece),
        optimizer=torch.optim.AdamW(model.parameters()),
    )


def sites_masked(model: Any) -> list[Any]:
    sites = sites_of(model)
    for site in sites:
        site.attach(None)
    return sites


# ------------------------------------------------------------------ what cannot be answered is refused, by site


@pytest.mark.parametrize("spec", OWN_PASSES, ids=lambda s: s.kind)
def test_a_site_that_the_loss_does_not_reach_is_named(spec: Curvature) -> None:
    model = TwoMatrices()
    stray = masked_site(nn.Linear(4, 4, dtype=torch.float64), "stray.weight")
    estimate = spec.start([*model.sites, stray])
    with pytest.raises(CurvatureUnavailable, match=r"no gradient for 1 of 3 sites \(stray\.weight\)"):
        estimate.observe(model.batch())
    with pytest.raises(CurvatureUnavailable, match=r"first\.weight: no gradient was observed"):
        estimate.of(model.sites[0])


@pytest.mark.parametrize("spec", [MicroBatchFisher(), Hutchinson(probes=1), FiniteDifference(probes=1, eps=1e-4)])
def test_a_sequence_that_passes_a_site_by_has_no_slope_there(spec: Curvature) -> None:
    """An expert that one sequence is not routed to, while another is: a zero, not an error."""
    model = TwoMatrices()

    def loss(tokens: torch.Tensor, place: int) -> torch.Tensor:
        return model.loss(tokens) if place else model.first.weight.square().sum()

    batch = model.batch(sequences=2, micro_batch=1, loss=loss)
    only = dataclasses.replace(batch, tokens=batch.tokens[1:], first=1)
    estimate, alone = estimated(spec, model, batch=lambda _: batch), estimated(spec, model, batch=lambda _: only)
    second = model.sites[1]
    assert torch.allclose(estimate.of(second), alone.of(second) / 2, rtol=1e-6, atol=1e-12)
    assert bool((estimate.of(second) > 0).any())


def test_a_second_derivative_that_does_not_exist_is_named() -> None:
    model = TwoMatrices()
    linear = model.batch(loss=lambda tokens, place: model.first.weight.sum() + model.second.weight.square().sum())
    with pytest.raises(CurvatureUnavailable, match=r"no second gradient for 1 of 2 sites \(first\.weight\)"):
        Hutchinson().start(model.sites).observe(linear)


def test_attention_that_cannot_be_made_eager_is_refused() -> None:
    """A fused kernel has a first derivative only; a model that calls it itself has no switch for it."""
    model = TwoMatrices()

    def loss(tokens: torch.Tensor, place: int) -> torch.Tensor:
        x = torch.nn.functional.linear(model.table[tokens].float(), model.first.weight.float())[:, None, :, :].tanh()
        attended = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        return torch.nn.functional.linear(attended, model.second.weight.float()).square().mean()

    with pytest.raises(CurvatureUnavailable, match=r"cannot be differentiated twice.*first\.weight, second\.weight"):
        Hutchinson().start(model.sites).observe(model.batch(loss=loss))
    estimate = FiniteDifference(probes=1).start(model.sites)
    estimate.observe(model.batch(loss=loss))
    assert all(bool((estimate.of(site) > 0).any()) for site in model.sites)


@pytest.mark.parametrize("spec", OWN_PASSES, ids=lambda s: s.kind)
def test_curvature_that_is_not_finite_is_refused_and_not_kept(spec: Curvature) -> None:
    model = TwoMatrices()
    good = estimated(spec, model)
    before = {site.name: good.of(site) for site in model.sites}
    with torch.no_grad():
        model.table[0, 0] = torch.inf
    with pytest.raises(CurvatureUnavailable, match=r"(first|second)\.weight.*none of it was kept"):
        good.observe(model.batch(step=10))
    assert all(torch.equal(good.of(site), before[site.name]) for site in model.sites)


@pytest.mark.parametrize("spec", [Fisher(), AdamSecondMoment()], ids=lambda s: s.kind)
def test_an_average_that_is_not_finite_never_reaches_a_mask(spec: Curvature) -> None:
    model = TwoMatrices()
    batch = model.batch()
    estimate = spec.start(model.sites)
    (model.loss(batch.tokens) * torch.inf).backward()
    estimate.observe(batch)
    batch.optimizer.step()
    with pytest.raises(CurvatureUnavailable, match=r"first\.weight"):
        estimate.of(model.sites[0])


def test_adam_without_a_second_moment_is_refused() -> None:
    model = TwoMatrices()
    estimate = AdamSecondMoment().start(model.sites)
    with pytest.raises(CurvatureUnavailable, match="needs an Adam"):
        estimate.of(model.sites[0])
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    estimate.observe(dataclasses.replace(model.batch(), optimizer=plain))
    with pytest.raises(CurvatureUnavailable, match=r"first\.weight: the optimizer keeps no second moment"):
        estimate.of(model.sites[0])


@pytest.mark.parametrize(
    ("kind", "changes", "field"),
    [
        ("fisher", {"decay": 1.0}, "decay"),
        ("micro-batch-fisher", {"sequences": 0}, "sequences"),
        ("gauss-newton-bartlett", {"every": 0}, "every"),
        ("kfac-diagonal", {"decay": -0.1}, "decay"),
        ("hutchinson", {"probes": 0}, "probes"),
        ("finite-difference", {"eps": 0.0}, "eps"),
    ],
)
def test_fields_out_of_range_are_refused_by_name(kind: str, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError, match=field):
        ESTIMATORS[kind](**changes)
