"""A packed export ready to answer: loaded once, its `generate` ours where the request is one that our loop does."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseforge_core.errors import ExportError, unknown
from sparseforge_core.models.folders import tokenizer_in
from sparseforge_core.runtime.decode.prompts import BUDGET
from sparseforge_core.runtime.generate import CACHES, CacheKind, Speaker
from sparseforge_core.runtime.kernels.weight import Mode
from sparseforge_core.runtime.loading import LoadReport, arm, check_device, load_packed
from sparseforge_core.runtime.manifest import WEIGHTS, read_manifest

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "stop_strings": (None, []),
}
"""Fields of a generation config, and their values that change nothing: with others transformers' own loop generates."""

NEUTRAL_SAMPLING: dict[str, tuple[Any, ...]] = {"top_k": (None, 0), "top_p": (None, 1.0), "min_p": (None, 0.0)}
"""The same of those that matter to a text that is sampled."""


@dataclass
class Voice:
    """A loaded model with its tokenizer."""

    folder: Path
    model: Any
    tokenizer: Any
    speaker: Speaker
    report: LoadReport

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        device: str = "cpu",
        dense: bool = False,
        cache: CacheKind = "auto",
        mode: Mode = "decode",
        warm: bool = False,
    ) -> Voice:
        """From a packed export; `warm` as for a `Speaker`.

        Raises as `load_packed` and `arm` do, and ExportError where there is no tokenizer.
        """
        if cache not in CACHES:
            raise ExportError(unknown("cache", cache, CACHES))
        place = place_named(device)
        read_manifest(folder, skip=(WEIGHTS,))  # what is no export at all is not asked for its tokenizer
        tokenizer = tokenizer_in(folder)
        if tokenizer is None:
            raise ExportError(f"{folder} holds no tokenizer; copy its tokenizer.json into the source and export")
        check_device(folder, place, dense=dense, mode=mode)
        model, report = load_packed(folder, dense=dense)
        loaded: Any = arm(model, place, mode=mode) if place.type == "cuda" else model.to(place)  # type: ignore[arg-type]
        speaker = Speaker(loaded, cache, warm=warm)
        report.mode, report.resident_bytes = mode, speaker.resident_bytes
        theirs = loaded.generate
        loaded.generate = functools.partial(_generate, speaker, theirs)
        return cls(folder, loaded, tokenizer, speaker, report)

    def __str__(self) -> str:
        graphs = self.speaker.parts is not None and self.model.device.type == "cuda"
        beside = f", graphs of prompts at most {BUDGET / 2**30:.1f} GiB more" if graphs else ""
        return f"{self.report}; {self.speaker.cache} cache{beside}"


@torch.no_grad()
def _generate(
    speaker: Speaker, theirs: Any, *, input_ids: Tensor, generation_config: Any, streamer: Any = None, **others: Any
) -> Tensor:
    """As transformers' `generate` for one prompt `[1, length]`: the prompt and its continuation.

    A continuation is cut to the model's positions; `generation_config` then says so, for whoever reads the reason.
    """
    room = speaker.longest - input_ids.shape[1]
    if room < 1:
        raise ExportError(f"{input_ids.shape[1]} prompt tokens leave no room in the model's {speaker.longest}")
    generation_config.max_new_tokens = min(generation_config.max_new_tokens or room, room)
    matters = NEUTRAL | NEUTRAL_SAMPLING if generation_config.do_sample else NEUTRAL
    if any(getattr(generation_config, name, None) not in values for name, values in matters.items()):
        given = {"generation_config": generation_config, "streamer": streamer, **others}
        return theirs(input_ids=input_ids, **given)  # type: ignore[no-any-return]
    said = speaker.speak(
        input_ids,
        generation_config.max_new_tokens,
        temperature=float(generation_config.temperature or 1.0) if generation_config.do_sample else 0.0,
        seed=None,
        ends=ends_in(generation_config),
        look=1 if streamer is not None else 16,
    )
    if streamer is not None:
        streamer.put(input_ids.cpu())
        said = _streamed(said, streamer)
    found = list(itertools.chain.from_iterable(said))
    if streamer is not None:
        streamer.end()
    return torch.cat((input_ids, input_ids.new_tensor([found], dtype=torch.long)), 1)


def _streamed(said: Any, streamer: Any) -> Any:
    for tokens in said:
        streamer.put(torch.tensor(tokens, dtype=torch.long))
        yield tokens


def ends_in(generation_config: Any) -> set[int]:
    """The tokens that end a text."""
    said = generation_config.eos_token_id
    several = said if isinstance(said, list) else [said]
    return {int(token) for token in several if token is not None}


def place_named(name: str) -> torch.device:
    """The device of this name; `auto` is the GPU if there is one. Raises ExportError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ExportError(f"--device {name}: give cpu, cuda, cuda:N or auto") from error
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ExportError(
            f"--device {name}: torch sees {count} CUDA devices; use cpu, or install a CUDA build of torch"
        )
    return device
