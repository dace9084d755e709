"""What a mask looks like: a few numbers and a histogram, over any set of masks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

HISTOGRAM_EDGES = tuple(i / 20 for i in range(21))
"""Twenty equal bins over [0, 1]."""


def mask_summary(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Of (mask, hard mask) pairs: share of entries in (0.1, 0.9), and mean |m - m_hat|, over all entries."""
    total = 0
    sums: list[Tensor] = []
    for mask, hard in pairs:
        total += mask.numel()
        sums += [((mask > 0.1) & (mask < 0.9)).sum().double(), (mask - hard.to(mask.dtype)).abs().sum().double()]
    found: list[float] = torch.stack(sums).tolist() if sums else []  # the device is asked once
    middle, gap = sum(found[::2]), sum(found[1::2])
    return {"mask/mid_fraction": middle / max(total, 1), "mask/soft_hard_gap": gap / max(total, 1)}


def mask_histogram(masks: Iterable[Tensor]) -> list[int]:
    """Counts of mask values in the bins of HISTOGRAM_EDGES, over all masks; the last bin includes 1."""
    counts = torch.zeros(len(HISTOGRAM_EDGES) - 1)
    for mask in masks:
        counts += torch.histc(mask.detach().float(), bins=len(HISTOGRAM_EDGES) - 1, min=0.0, max=1.0).cpu()
    return [int(count) for count in counts]
