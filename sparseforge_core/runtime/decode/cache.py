"""Keys and values of a fixed number of tokens, and where the next one goes: on the device, so that a graph sees it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparseforge_core.runtime.decode.parts import Parts, Sizes
from sparseforge_core.runtime.kernels.support import check_memory


@dataclass
class Cache:
    """The state of one batch of texts of equal length."""

    sizes: Sizes
    keys: list[Tensor]
    """One a layer: `[batch, kv_heads, capacity, head]`."""
    values: list[Tensor]
    cos: Tensor
    """`[positions, head / 2]`."""
    sin: Tensor
    position: Tensor
    """`[1]` int32: how many tokens the cache holds, which is the place of the next."""
    scratch: dict[str, Tensor] = field(default_factory=dict)
    """What the kernels keep between calls."""

    @property
    def batch(self) -> int:
        """Texts."""
        return self.keys[0].shape[0]

    @property
    def capacity(self) -> int:
        """Tokens of each."""
        return self.keys[0].shape[2]

    @classmethod
    def empty(cls, parts: Parts, batch: int, capacity: int) -> Cache:
        """A cache for `capacity` tokens in each of `batch` rows. Raises ExportError if the device has no room."""
        sizes, like = parts.sizes, parts.embedding
        check_memory(sizes.cache_bytes(batch, capacity, like.element_size()), like.device, "the cache")
        shape = (batch, sizes.kv_heads, capacity, sizes.head)
        keys, values = ([like.new_zeros(shape) for _ in range(sizes.layers)] for _ in range(2))
        position = torch.zeros(1, dtype=torch.int32, device=like.device)
        return cls(sizes, keys, values, parts.cos, parts.sin, position)
