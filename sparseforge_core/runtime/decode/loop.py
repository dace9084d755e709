"""The loop: a prompt fills the cache, then each step is one token a row, on CUDA one graph that is only replayed.

Everything that changes from step to step (tokens, position, what was found) lies on the device, so a step asks nothing
of the host, and prompts of one size are one graph whatever their length (`prompts.py`). Weights dense or sparse take
the same way through it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from sparseforge_core.errors import ExportError
from sparseforge_core.runtime.decode import plain
from sparseforge_core.runtime.decode.admission import refusal
from sparseforge_core.runtime.decode.cache import Cache
from sparseforge_core.runtime.decode.parts import Block, Parts
from sparseforge_core.runtime.decode.prompts import SHORT, Graphs, Prompts

LOOK = 16
"""Steps between two looks of the host at what was found; text beyond its end is cut off."""

WARM = 3
"""Steps before a capture: kernels compile and choose their configuration in them."""


class Decoder:
    """Decodes `batch` texts of equal length, at most `capacity` tokens each, prompt included."""

    def __init__(
        self,
        parts: Parts,
        *,
        batch: int = 1,
        capacity: int,
        steps: ModuleType = plain,
        graph: bool | None = None,
        fill: bool | None = None,
    ) -> None:
        """Make the cache.

        Args:
            parts: the model.
            batch: texts at a time.
            capacity: tokens of each, at most.
            steps: the small operations.
            graph: whether a step and prompts that come again are captured; by default on CUDA.
            fill: whether prompts are filled up to sizes that come again; by default where they are captured.

        Raises ExportError where it does not fit, or where so many rows need another mode.
        """
        why = refusal(parts, batch)
        if why is not None:
            raise ExportError(why)
        if not 1 <= capacity <= parts.sizes.positions:
            raise ExportError(f"{capacity} tokens exceed the model's {parts.sizes.positions}")
        self.parts, self.steps = parts, steps
        self.cache = Cache.empty(parts, batch, capacity)
        device = parts.embedding.device
        self.tokens = torch.zeros(batch, dtype=torch.long, device=device)
        self.found = torch.zeros(batch, capacity, dtype=torch.long, device=device)
        self.prompt = torch.zeros(batch, capacity, dtype=torch.long, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.logits = parts.embedding.new_zeros(batch, parts.sizes.vocabulary)
        self._wanted = device.type == "cuda" if graph is None else graph
        self._graph: torch.cuda.CUDAGraph | None = None
        recorder = functools.partial(Graphs, device) if self._wanted else None
        self.prompts = Prompts(parts, batch, capacity, fill=self._wanted if fill is None else fill, recorder=recorder)

    @torch.no_grad()
    def prefill(self, prompt: Tensor) -> Tensor:
        """Begin anew with a prompt `[batch, length]`; the logits of its next token `[batch, vocabulary]`."""
        batch, length = prompt.shape
        if batch != self.cache.batch or not 1 <= length <= self.cache.capacity:
            raise ExportError(
                f"a prompt of {batch} x {length} tokens does not fit {self.cache.batch} x {self.cache.capacity}"
            )
        size = self.prompts.size(length)
        self.prompt[:, :length] = prompt
        self.prompt[:, length:size] = 0
        self.cache.position.fill_(length)
        self.finite.fill_(True)
        with on(self.tokens.device):
            self.prompts.run(size, functools.partial(self._prompt, size))
        return self.logits

    def warm(self) -> None:
        """Record a prompt of `prompts.SHORT` rows, or of the cache's, so that the first short ones are one launch.

        It takes three passes, and memory as `Prompts.needed_bytes` says; nothing where nothing is recorded.
        """
        length = min(SHORT // self.cache.batch, self.cache.capacity)
        if not self._wanted or length < 1:
            return
        for _ in range(2):  # the second is recorded
            self.prefill(torch.zeros(self.cache.batch, length, dtype=torch.long, device=self.tokens.device))

    def _prompt(self, size: int) -> None:
        """Pass the first `size` tokens of `prompt`, of which the cache's position says how many are real."""
        hidden = functional.embedding(self.prompt[:, :size], self.parts.embedding)
        for number, block in enumerate(self.parts.blocks):
            hidden = self._block(hidden, number, block, self.steps.attend_prompt)
        self._head(hidden.index_select(1, self.cache.position - 1)[:, 0])

    def step(self) -> None:
        """The next token of each row: its embedding in, its logits and their likeliest token out."""
        with on(self.tokens.device):
            if not self._wanted:
                self._step()
                return
            if self._graph is None:
                self._capture()
            assert self._graph is not None
            self._graph.replay()

    @torch.no_grad()
    def _step(self) -> None:
        hidden = functional.embedding(self.tokens, self.parts.embedding)
        for number, block in enumerate(self.parts.blocks):
            hidden = self._block(hidden, number, block, self.steps.attend)
        self.cache.position += 1
        self._head(hidden)

    def _block(self, hidden: Tensor, number: int, block: Block, attend: object) -> Tensor:
        eps = self.parts.sizes.eps
        qkv = block.qkv(hidden, norm=(block.norm, eps))
        seen = attend(qkv, self.cache, number, block.head_norms)  # type: ignore[operator]
        hidden = block.out(seen, residual=hidden)
        inner = block.gate_up(hidden, norm=(block.mlp_norm, eps), gated=True)
        return block.down(inner, residual=hidden)

    def _head(self, hidden: Tensor) -> None:
        """The logits, and their likeliest token put down as found at the place after those in the cache."""
        self.logits.copy_(self.parts.head(hidden, norm=(self.parts.norm, self.parts.sizes.eps)))
        highest, likeliest = self.logits.max(-1)
        self.finite.logical_and_(torch.isfinite(highest).all())  # a NaN is its row's maximum
        self.put(likeliest)

    def put(self, tokens: Tensor) -> None:
        """Let these `[batch]` be the next tokens, in the place of the likeliest."""
        self.tokens.copy_(tokens)
        place = self.cache.position.clamp(max=self.cache.capacity - 1)
        self.found.index_copy_(1, place.long(), tokens[:, None])

    def _capture(self) -> None:
        """Record one step. What the warm steps change is put back; keys beyond the position are never read."""
        kept = [t.clone() for t in self._state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                self._restore(kept)
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self._restore(kept)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):  # torch's own is of the GPU that captured first
            self._step()
        self._restore(kept)

    @property
    def _state(self) -> list[Tensor]:
        return [self.tokens, self.cache.position, self.found, self.finite, self.logits]

    def _restore(self, kept: list[Tensor]) -> None:
        for tensor, value in zip(self._state, kept, strict=True):
            tensor.copy_(value)


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a GPU the current one, on which Triton launches and graphs are captured; others need nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def decode(
    decoder: Decoder,
    prompt: Tensor,
    tokens: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    ends: Collection[int] = (),
    look: int = LOOK,
) -> Iterator[list[int]]:
    """The continuation of one prompt `[1, length]`, `look` tokens at a time, without the token that ends it.

    Raises ExportError if a logit is not finite.
    """
    length, given = prompt.shape[1], 0
    decoder.prefill(prompt)
    for made in range(1, tokens + 1):
        if temperature > 0.0:
            likely = torch.softmax(decoder.logits.float() / temperature, -1)
            decoder.put(torch.multinomial(likely, 1, generator=generator)[:, 0])
        if made % look == 0 or made == tokens:
            found = decoder.found[0, length + given : length + made].tolist()
            check_finite(decoder)
            stop = next((place for place, token in enumerate(found) if token in ends), None)
            yield found[:stop]
            if stop is not None or made == tokens:
                return
            given = made
        decoder.step()


def check_finite(decoder: Decoder) -> None:
    """Raise ExportError if a logit was not finite since the prompt."""
    if not bool(decoder.finite):
        raise ExportError("a logit is not finite; the weights overflow in this type, export another --dtype")
