"""Rows of a training batch are one sequence each: what spares a forward the question, and the host the wait for it.

transformers looks into the position ids of every forward without a mask, to see whether a row packs several sequences
(`masking_utils.find_packed_sequence_indices`). The answer is on the device, so a GPU runs dry at the start of each
forward while the host waits for it; and it cannot be asked while a CUDA graph is recorded. Bodies that number the
positions of their rows themselves, as ours do, have none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import masking_utils

_known = False
"""Whether forwards are of such rows now. A plain global, which compiled models can read; one thread trains."""


@contextlib.contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Inside, forwards number the positions of their rows from 0 on: nothing is packed, and nobody asks."""
    global _known
    before, _known = _known, True
    try:
        yield
    finally:
        _known = before


_asked = masking_utils.find_packed_sequence_indices


def _unless_known(position_ids: Any) -> Any:
    """`find_packed_sequence_indices`, answered at once where the answer is known."""
    return None if _known else _asked(position_ids)


masking_utils.find_packed_sequence_indices = _unless_known
