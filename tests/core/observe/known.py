"""A network of two masked matrices whose curvature is known exactly, in float64, by code of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseforge_core.models.sites import Site
from sparseforge_core.observe.curvature import Batch, Curvature, Estimate

WIDTH, HIDDEN, VOCABULARY = 4, 6, 5


class TwoMatrices(nn.Module):
    """Token -> fixed vector -> matrix -> tanh -> matrix -> logits of the next token."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.register_buffer("table", torch.randn(VOCABULARY, WIDTH, dtype=torch.float64))
        self.first = nn.Linear(WIDTH, HIDDEN, bias=False, dtype=torch.float64)
        self.second = nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=torch.float64)
        self.sites = [masked_site(self.first, "first.weight", seed), masked_site(self.second, "second.weight", seed)]

    def predictions(self, tokens: Tensor) -> Tensor:
        """Logits `[n, length - 1, vocabulary]`."""
        return self.second(torch.tanh(self.first(self.table[tokens])))[:, :-1]

    def loss(self, tokens: Tensor, place: int = 0) -> Tensor:
        return F.cross_entropy(self.predictions(tokens).flatten(0, 1), tokens[:, 1:].flatten())

    def batch(self, step: int = 1, sequences: int = 8, length: int = 5, **changes: Any) -> Batch:
        generator = torch.Generator().manual_seed(1)  # the same tokens at every step: the exact answer is one
        tokens = torch.randint(0, VOCABULARY, (sequences, length), generator=generator)
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.0)
        values = {"tokens": tokens, "loss": self.loss, "predictions": self.predictions, **changes}
        return Batch(step=step, model=self, optimizer=optimizer, **values)

    # ------------------------------------------------- the same mathematics, without masks, modules or hooks
    def effective(self) -> Tensor:
        """Both effective weights, flat."""
        return torch.cat([(s.weight * s.mask.view).detach().flatten() for s in self.sites])

    def logits_of(self, flat: Tensor, tokens: Tensor) -> Tensor:
        """Logits `[n, length - 1, vocabulary]` for flat effective weights."""
        first = flat[: HIDDEN * WIDTH].view(HIDDEN, WIDTH)
        second = flat[HIDDEN * WIDTH :].view(VOCABULARY, HIDDEN)
        return torch.tanh(self.table[tokens[:, :-1]] @ first.T) @ second.T

    def loss_of(self, flat: Tensor, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self.logits_of(flat, tokens).flatten(0, 1), tokens[:, 1:].flatten())

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """A flat vector by site."""
        sizes = [HIDDEN * WIDTH, VOCABULARY * HIDDEN]
        return {site.name: part.view_as(site.weight) for site, part in zip(self.sites, flat.split(sizes), strict=True)}

    def hessian(self, tokens: Tensor) -> Tensor:
        """`[entries, entries]`, over both sites."""
        return torch.func.hessian(lambda flat: self.loss_of(flat, tokens))(self.effective())

    def gauss_newton_diagonal(self, tokens: Tensor) -> dict[str, Tensor]:
        """diag of mean over predicted tokens of J^T (diag(p) - p p^T) J."""
        jacobian = torch.func.jacrev(lambda flat: self.logits_of(flat, tokens).flatten(0, 1))(self.effective())
        p = self.logits_of(self.effective(), tokens).flatten(0, 1).softmax(-1)
        inner = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
        return self.split(torch.einsum("tvi,tvu,tui->i", jacobian, inner, jacobian) / p.shape[0])

    def per_sequence_gradients(self, tokens: Tensor) -> Tensor:
        """`[n, entries]`."""
        gradient = torch.func.grad(lambda flat, row: self.loss_of(flat, row.unsqueeze(0)))
        return torch.func.vmap(gradient, in_dims=(None, 0))(self.effective(), tokens)


def masked_site(layer: nn.Module, name: str, seed: int = 0) -> Site:
    """The weight of `layer` as a site under a soft mask that hides some entries altogether."""
    site = Site(name, layer, "weight", False, "mlp")
    soft = site.attach(None)
    view = torch.rand(site.weight.shape, generator=torch.Generator().manual_seed(seed + 7))
    with torch.no_grad():
        soft.view.copy_(torch.where(view < 0.25, 0.0, view))
    return site


class Quadratic(nn.Module):
    """loss = 1/2 w' A w over the entries of one effective weight `[3, 4]`; its Hessian is A everywhere."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix
        self.layer = nn.Linear(4, 3, bias=False, dtype=torch.float64)
        self.sites = [masked_site(self.layer, "layer.weight")]

    def loss(self, tokens: Tensor, place: int = 0) -> Tensor:
        w = self.layer.weight.flatten()
        return 0.5 * w @ self.matrix @ w

    def batch(self, step: int = 1) -> Batch:
        optimizer = torch.optim.AdamW(self.parameters())
        tokens = torch.zeros(2, 2, dtype=torch.int64)
        return Batch(
            step=step, model=self, tokens=tokens, loss=self.loss, predictions=no_predictions, optimizer=optimizer
        )


def no_predictions(tokens: Tensor) -> Tensor:
    raise AssertionError("a quadratic has no logits")


def estimated(spec: Curvature, model: Any, steps: int = 1, batch: Callable[[int], Batch] | None = None) -> Estimate:
    """The estimate after `steps` observations."""
    estimate = spec.start(model.sites, seed=3)
    for step in range(1, steps + 1):
        estimate.observe((batch or model.batch)(step))
    return estimate


def relative_error(estimate: Estimate, model: Any, exact: dict[str, Tensor]) -> float:
    """Largest over sites of |estimate - exact| / |exact|, in the l2 norm."""
    return max(float((estimate.of(s) - exact[s.name]).norm() / exact[s.name].norm()) for s in model.sites)
