"""Two real processes against one: curvature is the same, replicated or sharded, and what cannot be had is refused."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseforge_core import distributed
from sparseforge_core.errors import CurvatureUnavailable
from sparseforge_core.objective import next_token_loss, predictions
from sparseforge_core.observe.curvature import (
    AdamSecondMoment,
    Batch,
    Curvature,
    FiniteDifference,
    Fisher,
    GaussNewtonBartlett,
    Hutchinson,
    KFACDiagonal,
    MicroBatchFisher,
)
from tests.tiny import sites_of, tiny_model, tokens

SPECS: list[Curvature] = [
    Fisher(),
    MicroBatchFisher(every=1),
    AdamSecondMoment(),
    GaussNewtonBartlett(every=1),
    KFACDiagonal(every=1),
    FiniteDifference(probes=2, every=1),
    FiniteDifference(probes=2, every=1, signs="before"),
]
WHERE_PLAIN: list[Curvature] = [*SPECS, Hutchinson(probes=2, every=1, signs="mean")]
STEPS = 2
SEQUENCES = 4


def masked_llama() -> tuple[Any, list[Any]]:
    """A tiny model under soft masks, the same in every process."""
    model = tiny_model("llama", layers=1)
    sites = sites_of(model)
    for number, site in enumerate(sites):
        view = torch.rand(site.weight.shape, generator=torch.Generator().manual_seed(number))
        site.attach(None).view.data.copy_(view)
    return model, sites


def curvatures(model: Any, sites: list[Any], forward: Any, specs: list[Curvature]) -> dict[str, Tensor]:
    """Curvature of every site by these estimators after two training steps, on this rank's share of the batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    estimates = [spec.start(sites, seed=5) for spec in specs]
    share = SEQUENCES // distributed.world()
    for step in range(1, STEPS + 1):
        first = distributed.rank() * share
        mine = tokens(SEQUENCES, 12, seed=step)[first : first + share]
        next_token_loss(forward(input_ids=mine, use_cache=False).logits, mine).backward()
        batch = Batch(
            step=step,
            model=model,
            tokens=mine,
            loss=lambda piece, place: next_token_loss(model(input_ids=piece, use_cache=False).logits, piece),
            predictions=lambda piece: predictions(model, piece),
            optimizer=optimizer,
            first=first,
        )
        for estimate in estimates:
            estimate.observe(batch)
        optimizer.step()
        optimizer.zero_grad()
    found = {f"{i}|{site.name}": estimate.of(site) for i, estimate in enumerate(estimates) for site in sites}
    return {key: x.full_tensor() if distributed.is_sharded(x) else x for key, x in found.items()}


def replicated(folder: Path) -> None:
    model, sites = masked_llama()
    found = curvatures(model, sites, torch.nn.parallel.DistributedDataParallel(model), WHERE_PLAIN)
    torch.save(found, folder / f"replicated-{distributed.rank()}.pt")


def sharded(folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model, sites = masked_llama()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert all(distributed.is_sharded(site.weight) for site in sites)
    found = curvatures(model, sites, model, SPECS)
    torch.save(found, folder / f"sharded-{distributed.rank()}.pt")
    mine = tokens(2, 12)
    batch = Batch(
        step=1,
        model=model,
        tokens=mine,
        loss=lambda piece, place: next_token_loss(model(input_ids=piece, use_cache=False).logits, piece),
        predictions=lambda piece: predictions(model, piece),
        optimizer=torch.optim.AdamW(model.parameters()),
    )
    with pytest.raises(CurvatureUnavailable, match=r"7 sites: model\.layers\.0.*use FiniteDifference"):
        Hutchinson().start(sites).observe(batch)


def means(folder: Path) -> None:
    here = torch.tensor([1.0, 2.0]) * (distributed.rank() + 1)
    assert distributed.mean_over_ranks(here).tolist() == [1.5, 3.0]
    assert here.tolist() == [distributed.rank() + 1.0, 2.0 * distributed.rank() + 2.0], "the argument stays"
    bad = torch.tensor([torch.nan if distributed.rank() == 1 else 0.0])
    assert distributed.finite_everywhere([here, bad]) == [True, False], "every rank hears of one rank's NaN"
    assert distributed.world() == 2


def one_of_two(rank: int, port: int, folder: str) -> None:
    """What each spawned process does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        parts: list[Callable[[Path], None]] = [means, replicated, sharded]
        for part in parts:
            part(Path(folder))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_find_the_curvature_that_one_finds(tmp_path: Path) -> None:
    model, sites = masked_llama()
    alone = curvatures(model, sites, model, WHERE_PLAIN)
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (port, str(tmp_path)), nprocs=2)
    for layout in ("replicated", "sharded"):
        ranks = [torch.load(tmp_path / f"{layout}-{rank}.pt") for rank in (0, 1)]
        assert set(ranks[0]) == {key for key in alone if layout == "replicated" or int(key.split("|")[0]) < len(SPECS)}
        for key in ranks[0]:
            expected = alone[key]
            spec, site = WHERE_PLAIN[int(key.split("|")[0])], key.split("|")[1]
            assert torch.equal(ranks[0][key], ranks[1][key]), f"{layout}: ranks differ in {spec} of {site}"
            error = float((ranks[0][key] - expected).norm() / expected.norm())
            assert error < (5e-3 if isinstance(spec, FiniteDifference) else 1e-4), f"{layout}: {spec} of {site}"


def test_alone_nothing_is_averaged() -> None:
    x = torch.randn(3)
    assert (distributed.world(), distributed.rank()) == (1, 0)
    assert distributed.mean_over_ranks(x) is x
    assert distributed.laid_out_like(x, x) is x
    assert not distributed.is_sharded(x)
    assert distributed.finite_everywhere([x, torch.tensor([torch.inf])]) == [True, False]
    assert distributed.finite_everywhere([]) == []
