"""Rows of a training batch are one sequence each, without padding: what spares a forward questions to the device.

transformers looks into the position ids of every forward without a mask, to see whether a row packs several sequences
(`masking_utils.find_packed_sequence_indices`). The answer is on the device, so a GPU runs dry at the start of each
forward while the host waits for it; and it cannot be asked while a CUDA graph is recorded. Bodies that number the
positions of their rows themselves, as ours do, have none.

While a CUDA graph is recorded it also takes itself to be traced for all kinds of inputs (`is_tracing`), and makes masks
that attention's own causal form would do without. What is recorded is the plain step, to be run as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Inside, forwards number the positions of their rows from 0 on: nothing is packed, and nobody asks."""
    from transformers import masking_utils

    packed, traced = masking_utils.find_packed_sequence_indices, masking_utils.is_tracing
    masking_utils.find_packed_sequence_indices = _nothing_packed
    masking_utils.is_tracing = _unless_recorded(traced)
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices, masking_utils.is_tracing = packed, traced


def _unless_recorded(traced: Callable[..., bool]) -> Callable[..., bool]:
    """`is_tracing` that takes no recording of a CUDA graph for a trace."""

    def answer(tensor: Any = None) -> bool:
        # Not asked where no GPU was used: a build for GPUs raises there if the machine has none.
        recorded = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        return not recorded and traced(tensor)

    return answer


def _nothing_packed(position_ids: Any) -> None:
    """What `find_packed_sequence_indices` answers for rows of one sequence."""
