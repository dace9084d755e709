"""Numbers on their way from the device: a host that asks for each at once waits for the device at every step."""

from __future__ import annotations

import torch
from torch import Tensor


class Arriving:
    """A tensor's values at this moment; the host waits for them when it reads them, and not before."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values.detach(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))
        else:
            self._host = values.detach().clone()

    def read(self) -> list[float]:
        """The values, flat."""
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._host.flatten().tolist()]
