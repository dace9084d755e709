"""Suites: named, versioned sets of measurements. A number is stored with the whole suite that made it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Literal

from sparseforge_core import specs
from sparseforge_core.errors import RecipeError, unknown
from sparseforge_core.specs import spec

TASKS = (
    "arc_challenge",
    "arc_easy",
    "boolq",
    "hellaswag",
    "openbookqa",
    "rte",
    "winogrande",
    "piqa",
    "race",
)
"""lm-eval tasks that our suites may name."""


class Suite:
    """Base of every suite."""

    name: str


@spec("zero-shot")
class HarnessSuite(Suite):
    """Zero-shot accuracy by lm-eval's stock tasks; reports acc, acc_norm where defined, and the mean of acc."""

    name: str
    tasks: tuple[str, ...]
    limit: int | None = None
    """Only the first so many items of each task; None takes all."""

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                raise RecipeError(f"suite {self.name}: " + unknown("task", task, TASKS))
        if self.limit is not None and self.limit < 2:
            raise RecipeError(f"suite {self.name}: limit={self.limit}: must be at least 2")


@spec("perplexity")
class PerplexitySuite(Suite):
    """exp of the mean negative log-likelihood over non-overlapping windows.

    Each window is run alone, its first token is context only, so `window - 1` tokens are predicted in each; no
    begin-of-text token is added; a last, shorter window is left out.
    """

    name: str
    text: Literal["heldout", "wikitext2"]
    """The held-out split of the recipe's own corpus, or the raw WikiText-2 test set, rows joined by blank lines."""
    window: int
    limit: int | None = None
    """Only the first so many windows; None takes all."""


@spec("throughput")
class ThroughputSuite(Suite):
    """Greedy decoding speed for (prompt, output) lengths, and the bytes of the weights."""

    name: str
    prompt_output: tuple[tuple[int, int], ...]
    batch: int = 1
    repeats: int = 3


ZERO_SHOT_7 = HarnessSuite(
    name="zero-shot-7",
    tasks=("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "rte", "winogrande"),
)
"""The tasks of the paper's Tables 1 and 3-6 (AST's seven)."""

CAST_7 = HarnessSuite(
    name="cast-7",
    tasks=("hellaswag", "race", "piqa", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
)
"""The tasks of the paper's Table 2."""

CAST_6 = HarnessSuite(
    name="cast-6",
    tasks=("hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
)
"""CAST-7 without RACE, whose items no package carries: what Table 2 can show without a network."""

WIKITEXT2_2048 = PerplexitySuite(name="wikitext2-2048", text="wikitext2", window=2048)
WIKITEXT2_4096 = PerplexitySuite(name="wikitext2-4096", text="wikitext2", window=4096)
WIKITEXT2_1024 = PerplexitySuite(name="wikitext2-1024", text="wikitext2", window=1024)
"""For models of 1,024 positions."""
HELDOUT = PerplexitySuite(name="heldout", text="heldout", window=256)
DECODE = ThroughputSuite(name="decode", prompt_output=((128, 128), (128, 1024), (1024, 128), (1024, 1024)))
"""The length pairs of the paper's Table 7."""

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (ZERO_SHOT_7, CAST_7, CAST_6, WIKITEXT2_1024, WIKITEXT2_2048, WIKITEXT2_4096, HELDOUT, DECODE)
}


def suite_named(name: str) -> Suite:
    """A suite by name. Raises RecipeError, naming the nearest."""
    if name not in SUITES:
        raise RecipeError(unknown("suite", name, SUITES))
    return SUITES[name]


def limited(suite: HarnessSuite, items: int) -> HarnessSuite:
    """The suite on the first `items` items of each task; its key differs from the whole suite's."""
    return dataclasses.replace(suite, limit=items)


def suite_key(suite: Suite) -> str:
    """`<name>-<6 hex of its contents>`: two suites that measure differently never share a key."""
    text = json.dumps(specs.encode(suite), sort_keys=True)
    return f"{suite.name}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
