"""Text from a loaded model: greedy, or sampled from a seed, so that a command repeated says the same."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from sparseforge_core.errors import ExportError


@dataclass(frozen=True)
class Generated:
    """What came of a prompt."""

    text: str
    """The continuation alone."""
    tokens: list[int]
    seconds: float


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompt: str, *, tokens: int, temperature: float = 0.0, seed: int = 0
) -> Generated:
    """Continue `prompt` by at most `tokens` tokens, fewer where the model ends its text.

    `temperature` 0 takes the likeliest token each time; above, tokens are drawn from softmax(logits / temperature),
    which `seed` alone determines. Raises ExportError if prompt and continuation do not fit the model, or a logit is
    not finite.
    """
    check_request(tokens, temperature)
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    if ids.shape[1] == 0:
        raise ExportError("the prompt holds no token; give at least one character")
    longest = int(getattr(model.config, "max_position_embeddings", None) or model.config.n_positions)
    if ids.shape[1] + tokens > longest:
        raise ExportError(f"{ids.shape[1]} prompt tokens and {tokens} more exceed the model's {longest}")
    generator = torch.Generator(device=ids.device).manual_seed(seed)
    ends = _ends(model, tokenizer)
    began, past, found, step = time.perf_counter(), None, list[int](), ids
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
            break
        found.append(int(chosen))
        step = chosen.reshape(1, 1)
    return Generated(tokenizer.decode(found), found, time.perf_counter() - began)


def check_request(tokens: int, temperature: float) -> None:
    """Raise ExportError for a request that no model could fulfil."""
    if tokens < 1:
        raise ExportError(f"tokens={tokens}: at least 1 is needed")
    if not 0.0 <= temperature < math.inf:
        raise ExportError(f"temperature={temperature}: 0 (greedy) or a positive number is needed")


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a text."""
    said = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = said if isinstance(said, list) else [said]
    return {int(token) for token in (*several, tokenizer.eos_token_id) if token is not None}
