"""Text from a loaded model: greedy, or sampled from a seed, so that a command repeated says the same."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparseforge_core.errors import ExportError, UnsupportedModel, unknown
from sparseforge_core.runtime.decode import plain
from sparseforge_core.runtime.decode.loop import LOOK, Decoder, decode
from sparseforge_core.runtime.decode.on_kernels import Sparse, on_kernels
from sparseforge_core.runtime.decode.parts import Parts, parts_of, refusal
from sparseforge_core.runtime.decode.products import reference
from sparseforge_core.runtime.loading import resident_bytes

CacheKind = Literal["auto", "static", "ordinary"]
"""Static: ours, one graph a step on a GPU. Ordinary: transformers' own. Auto: static on a GPU for what it drives."""

CACHES: tuple[CacheKind, ...] = ("auto", "static", "ordinary")


@dataclass(frozen=True)
class Generated:
    """What came of a prompt."""

    text: str
    """The continuation alone."""
    tokens: list[int]
    seconds: float
    cache: str
    """Which cache was used; and why, where it was not for the asking."""


class Speaker:
    """A model with the cache that it decodes with, prepared once."""

    def __init__(self, model: Any, cache: CacheKind = "auto", *, warm: bool = False) -> None:
        """`warm` is for who will say many things: the first short prompt then is a graph already, on a GPU.

        Raises UnsupportedModel, with the reason, if `static` is asked for and cannot be.
        """
        if cache not in CACHES:
            raise ExportError(unknown("cache", cache, CACHES))
        self.model, self.warm = model, warm
        why = refusal(model) if cache != "ordinary" else "asked for"
        if cache == "static" and why is not None:
            raise UnsupportedModel(f"{why}; use --cache ordinary")
        if cache == "auto" and why is None and model.device.type != "cuda":
            why = "no GPU"
        self.parts: Parts | None = None if why is not None else self._parts()
        self.cache = "static" if why is None else f"ordinary ({why})"
        self._decoder: Decoder | None = None

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its continuation together."""
        config = self.model.config
        return int(getattr(config, "max_position_embeddings", None) or config.n_positions)

    @property
    def resident_bytes(self) -> int:
        """Weights in memory: the model's, and what joined products hold for large batches."""
        products = [] if self.parts is None else self.parts.products
        return resident_bytes([self.model, *(p.kernel for p in products if isinstance(p, Sparse))])

    def speak(
        self,
        ids: Tensor,
        tokens: int,
        *,
        temperature: float = 0.0,
        seed: int | None = 0,
        ends: set[int],
        look: int = LOOK,
    ) -> Iterator[list[int]]:
        """Continue `[1, length]` by at most so many tokens, some at a time, without the one that ends it.

        Without a seed the device's own generator draws. Raises ExportError, before any work, for a request that does
        not fit the model, or if a logit is not finite.
        """
        check_request(tokens, temperature)
        if ids.shape[1] == 0:
            raise ExportError("the prompt holds no token; give at least one character")
        if ids.shape[1] + tokens > self.longest:
            raise ExportError(f"{ids.shape[1]} prompt tokens and {tokens} more exceed the model's {self.longest}")
        generator = None if seed is None else torch.Generator(device=ids.device).manual_seed(seed)
        how: dict[str, Any] = {"temperature": temperature, "generator": generator, "ends": ends}
        if self.parts is None:
            return ordinary(self.model, ids, tokens, **how)
        return decode(self._room(ids.shape[1] + tokens), ids, tokens, look=look, **how)

    def _parts(self) -> Parts:
        if self.model.device.type != "cuda":
            return parts_of(self.model, reference)
        return parts_of(self.model, on_kernels(_small_operations(self.model.device)))

    def _room(self, needed: int) -> Decoder:
        """A decoder with room for so many tokens; the one that there is, if it has."""
        assert self.parts is not None
        if self._decoder is None or self._decoder.cache.capacity < needed:
            self._decoder = None  # its memory first
            capacity = min(self.longest, -(-needed // 256) * 256)
            steps = _small_operations(self.model.device)
            self._decoder = Decoder(self.parts, capacity=capacity, steps=steps)
            if self.warm:
                self._decoder.warm()
        return self._decoder


def _small_operations(device: torch.device) -> Any:
    if device.type != "cuda":
        return plain
    from sparseforge_core.runtime.decode import fast  # which needs Triton

    return fast


@torch.no_grad()
def ordinary(
    model: Any, ids: Tensor, tokens: int, *, temperature: float, generator: torch.Generator | None, ends: set[int]
) -> Iterator[list[int]]:
    """As `decode`, a token at a time with transformers' own cache: for every model, on every device."""
    past, step = None, ids
    for _ in range(tokens):
        output = model(input_ids=step, past_key_values=past, use_cache=True)
        past, logits = output.past_key_values, output.logits[0, -1].float()
        if not bool(torch.isfinite(logits).all()):
            raise ExportError("a logit is not finite; the weights overflow in this type, export another --dtype")
        if temperature == 0.0:
            chosen = logits.argmax()
        else:
            chosen = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)[0]
        if int(chosen) in ends:
            return
        yield [int(chosen)]
        step = chosen.reshape(1, 1)


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    cache: CacheKind = "auto",
) -> Generated:
    """As `say`, with a model that is asked once. Raises as `say` and `Speaker` do."""
    check_request(tokens, temperature)
    return say(Speaker(model, cache), tokenizer, prompt, tokens=tokens, temperature=temperature, seed=seed)


def say(
    speaker: Speaker, tokenizer: Any, prompt: str, *, tokens: int, temperature: float = 0.0, seed: int = 0
) -> Generated:
    """Continue `prompt` by at most `tokens` tokens, fewer where the model ends its text.

    `temperature` 0 takes the likeliest token each time; above, tokens are drawn from softmax(logits / temperature),
    which `seed` alone determines. Raises ExportError if prompt and continuation do not fit the model, or a logit is
    not finite.
    """
    check_request(tokens, temperature)
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(speaker.model.device)
    ends = ends_of(speaker.model, tokenizer)
    began = time.perf_counter()
    said = speaker.speak(ids, tokens, temperature=temperature, seed=seed, ends=ends)
    found = list(itertools.chain.from_iterable(said))
    return Generated(tokenizer.decode(found), found, time.perf_counter() - began, speaker.cache)


def check_request(tokens: int, temperature: float) -> None:
    """Raise ExportError for a request that no model could fulfil."""
    if tokens < 1:
        raise ExportError(f"tokens={tokens}: at least 1 is needed")
    if not 0.0 <= temperature < math.inf:
        raise ExportError(f"temperature={temperature}: 0 (greedy) or a positive number is needed")


def ends_of(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a text."""
    said = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = said if isinstance(said, list) else [said]
    return {int(token) for token in (*several, tokenizer.eos_token_id) if token is not None}
