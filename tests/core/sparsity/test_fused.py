"""The fused mask update gives what `gate.py` gives; its kernels run interpreted, in a process of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparseforge_core.sparsity import fused
from sparseforge_core.sparsity.gate import GateForm
from sparseforge_core.sparsity.masking import PackedMask, SoftMask, set_softness
from sparseforge_core.sparsity.patterns import BLOCK_16, Pattern, Unstructured, nm
from tests.interpreted import assert_agreement


def mask(shape: tuple[int, ...] = (16, 32), *, transposed: bool = False) -> tuple[torch.Tensor, SoftMask]:
    weight = torch.zeros(shape)
    return weight, SoftMask(weight, transposed=transposed, slorb=None)


@pytest.mark.parametrize(
    ("pattern", "form", "said"),
    [
        (BLOCK_16, GateForm(), "block-16"),
        (nm(2, 32), GateForm(), "2:32"),
        (nm(1, 3), GateForm(), "1:3"),
        (Unstructured(), GateForm(), "50% by row"),
        (nm(2, 4), GateForm(threshold="exact-sum"), "exact-sum"),
        (nm(2, 4), GateForm(scope="layer"), "by layer"),
    ],
)
def test_what_the_kernels_do_not_cover_is_said(pattern: Pattern, form: GateForm, said: str) -> None:
    weight, soft = mask()
    assert said in str(fused.refusal(weight, soft, pattern, form, on="cpu"))


def test_weights_of_another_kind_are_refused() -> None:
    weight, soft = mask()
    last = None if fused.available() else "Triton is not installed"  # said of what the kernels would cover
    assert fused.refusal(weight, soft, nm(2, 4), GateForm(), on="cpu") == last
    assert "is on cpu" in str(fused.refusal(weight, soft, nm(2, 4), GateForm()))
    assert "not float32" in str(fused.refusal(weight.bfloat16(), soft, nm(2, 4), GateForm(), on="cpu"))
    assert "strided" in str(fused.refusal(weight.t(), soft, nm(2, 4), GateForm(), on="cpu"))
    weight, soft = mask((16, 24))
    assert "24 entries" in str(fused.refusal(weight, soft, nm(2, 4), GateForm(), on="cpu"))


@pytest.mark.skipif(not fused.available(), reason="Triton is not installed: there is nothing to compare")
@pytest.mark.slow
def test_the_kernels_agree_with_plain_torch() -> None:
    assert_agreement(Path(__file__).with_name("fused_cases.py"))


@pytest.mark.skipif(not (fused.available() and torch.cuda.is_available()), reason="needs a GPU and Triton")
@pytest.mark.slow
def test_the_kernels_agree_with_plain_torch_on_a_gpu() -> None:
    assert_agreement(Path(__file__).with_name("fused_cases.py"), "cuda")


def test_a_packed_mask_reads_what_was_written() -> None:
    weight = torch.zeros(8, 16)
    soft = PackedMask(weight, transposed=False, slorb=None)
    assert soft.mask.eq(1.0).all()
    assert soft.hard.all()
    assert soft.view.eq(1.0).all()
    wanted, hard = torch.rand(8, 16), torch.rand(8, 16) > 0.5
    soft.move(wanted, hard)
    assert (soft.mask - wanted).abs().max() <= 0.5 / 32767 + 1e-7
    assert torch.equal(soft.hard, hard)
    assert torch.equal(soft.rounded(wanted), soft.mask)
    for softness in (1.0, 0.25, 0.0):
        soft.set_view(softness)
        assert torch.allclose(soft.view, softness * soft.mask + (1 - softness) * hard.float(), atol=1e-7)


def test_softness_that_is_shown_already_is_not_written_again() -> None:
    masks = [PackedMask(torch.zeros(4, 16), transposed=False, slorb=None) for _ in range(2)]
    set_softness(masks, 0.5)
    versions = [soft.softness._version for soft in masks]
    set_softness(masks, 0.5)
    assert [soft.softness._version for soft in masks] == versions
    masks[0].softness.fill_(1.0)  # as a checkpoint that is taken up does
    set_softness(masks, 0.5)
    assert [float(soft.softness) for soft in masks] == [0.5, 0.5]
    assert masks[1].softness._version == versions[1]
    set_softness(masks, 0.25)
    assert [float(soft.softness) for soft in masks] == [0.25, 0.25]


def test_a_packed_mask_keeps_small_steps_that_bfloat16_would_lose() -> None:
    soft = PackedMask(torch.zeros(1, 16), transposed=False, slorb=None)
    for _ in range(100):
        soft.move(torch.lerp(soft.mask, torch.full((1, 16), 0.9), 0.01), soft.hard)
    exact = 0.9 + 0.1 * 0.99**100
    assert soft.mask.mean() == pytest.approx(exact, abs=2e-3)
    rounded = torch.ones(1)
    for _ in range(100):
        rounded = torch.lerp(rounded, torch.full((1,), 0.9), 0.01).bfloat16().float()
    assert abs(float(rounded) - exact) > 0.05


def test_a_packed_mask_freezes_to_the_same_weights() -> None:
    torch.manual_seed(0)
    start, scores = torch.randn(8, 16), torch.randn(8, 16)
    frozen = []
    for kind in (SoftMask, PackedMask):
        weight = start.clone()
        soft = kind(weight, transposed=False, slorb=None)
        soft.harden(scores, nm(2, 4))
        soft.freeze(weight, nm(2, 4), "a site")
        assert torch.equal(soft(weight), weight)
        assert torch.equal(soft.mask, soft.hard.float())
        frozen.append(weight)
    assert torch.equal(*frozen)
