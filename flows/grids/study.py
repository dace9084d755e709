"""The study: every method at equal tokens on a real model, SmolLM2-135M, all block linears 2:4.

Text: three shards of public-domain English books and a third as much of modern prose, about 42 million tokens, read in
one order by every method of a seed. Trials read five shards of books, and are judged on documents of these that no cell
trains on; what is reported is measured on nine other books and on WikiText-2, which no trial ever sees.
`$SPARSEFORGE_DATA` names the folder that holds `books/` and `more/`.

Every method gets the same number of trials, one for each of `PEAKS`; what they chose is `TUNED` in `study_grid.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from flows.grids.planned import Grid, Planned
from sparseforge_core import presets
from sparseforge_core.data.corpora import TextFiles
from sparseforge_core.evaluate.suites import WIKITEXT2_2048, DivergenceSuite, PerplexitySuite, Suite
from sparseforge_core.methods import (
    AST,
    CAST,
    SRSTE,
    DenseControl,
    FrozenMask,
    MaskLLM,
    Method,
    SparseGPT,
    Wanda,
)
from sparseforge_core.models.sources import ModelSource, Packaged
from sparseforge_core.objective import Distill, Objective, TaskOnly
from sparseforge_core.observe.curvature import Hutchinson
from sparseforge_core.recipe import Recipe, TrainPlan
from sparseforge_core.schedules import Schedule, WarmupCosine, WarmupLinear
from sparseforge_core.sparsity.patterns import nm
from sparseforge_core.sparsity.permutation import ChannelPermutation
from sparseforge_core.sparsity.slorb import SLoRB

MODEL = Packaged(name="smollm2-135m")
BOOKS = TextFiles(
    paths=tuple(f"books/train-{shard:02}.txt.xz" for shard in range(5)),
    sha256=(
        "2342a1fa22cbdacf099dbb3b9b2b78dead81f5a0b1a7589ecb0a0bad545d67de",
        "6aed54802f87ed5d68fcdda7f30860a927a288412b6eddd40c3e58d4a2a03911",
        "bd7a6054c4509f299af9aa4ea07f4df64b70c346491a3602198beb41f3616cff",
        "bf19094933bcd902ea45c769af1fad6cf3c009636f7daf4680812ac807d486f1",
        "fddf40d5558a62460969b5d30bfbe1008d423d65fd5cf26c45f57c5cedbbca22",
    ),
)
MIXED = TextFiles(
    paths=(*BOOKS.paths[:3], "more/modern.txt"),
    sha256=(*BOOKS.sha256[:3], "f2fb77e913521dd60d0dd621d55a28878c264387478ecbe356906ab8fa53a4f9"),
)
"""Three shards of books, and a third as much again written since: news, an encyclopaedia, essays, glosses
(`benchmarks/modern_text.py`)."""
OTHER_BOOKS = TextFiles(
    paths=("books/heldout.txt.xz",),
    sha256=("625439b92404afcac5b3034bba7a10a0ef6de4d265dedbca6c6dbe44dd8df0ca",),
)

TRIED_ON = PerplexitySuite(name="heldout-1024", text="heldout", window=1024, limit=256)
"""What trials are judged by: documents of the training shards that nothing trains on."""
PERPLEXITIES: tuple[Suite, ...] = (
    PerplexitySuite(name="books-2048", text="named", window=2048, corpus=OTHER_BOOKS),
    WIKITEXT2_2048,
)
KL = DivergenceSuite(name="kl-to-dense-1024", window=1024, limit=256)
"""On documents of the training shards that nothing trains on."""
REPORTED: tuple[Suite, ...] = (*PERPLEXITIES, KL)

SEQUENCES, LENGTH = 16, 1024
WIDE_SEQUENCES = 2 * SEQUENCES
"""Of a wide step, which some take at the larger budgets."""
MILLION = 1_000_000

CALIBRATION = 128
"""Sequences of `LENGTH` tokens that one-shot methods and priors see: 131,072 tokens."""


def plan(tokens: int, lr: Schedule, sequences: int = SEQUENCES) -> TrainPlan:
    """At least that many tokens, in steps of `sequences` x 1,024."""
    steps = math.ceil(tokens / (sequences * LENGTH))
    return TrainPlan(steps=steps, sequences=sequences, length=LENGTH, lr=lr, compute_dtype="bfloat16")


TAUGHT = Distill()


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A method of the study with the settings that its trials chose."""

    label: str
    method: Method
    lr: Schedule | None = None
    """None for a method that does not train."""
    rule: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.0
    decayed: Literal["unmasked", "all"] = "unmasked"
    unmasked_rate: float = 1.0
    averaged_from: float = 1.0
    objective: Objective = TAUGHT
    slorb: SLoRB | None = None
    sequences: int = SEQUENCES
    """Of a step."""
    permutation: ChannelPermutation | None = None
    corpus: TextFiles = BOOKS

    def recipe(self, tokens: int, model: ModelSource = MODEL) -> Recipe:
        """The contender at a budget, on the study's model or another one; one-shot methods have no budget."""
        return Recipe(
            model=model,
            method=self.method,
            corpus=self.corpus,
            pattern=nm(2, 4) if self.method.sparsifies else None,
            objective=self.objective if self.lr else TaskOnly(),
            train=self.plan(tokens),
            slorb=self.slorb,
            permutation=self.permutation,
        )

    def plan(self, tokens: int) -> TrainPlan:
        """The contender's steps at a budget; none where it has no learning rate."""
        if self.lr is None:
            return TrainPlan()
        return replace(
            plan(tokens, self.lr, self.sequences),
            rule=self.rule,
            weight_decay=self.weight_decay,
            decayed=self.decayed,
            unmasked_rate=self.unmasked_rate,
            averaged_from=self.averaged_from,
        )


def rate(peak: float) -> Schedule:
    """Up over a twentieth of the budget, then straight to zero: the same shape for every method but the presets."""
    return WarmupLinear(peak=peak)


WANDA = Wanda(samples=CALIBRATION, length=LENGTH)
SPARSEGPT = SparseGPT(samples=CALIBRATION, length=LENGTH)
PERMUTED = ChannelPermutation(samples=CALIBRATION, length=LENGTH)
"""Channels in the order in which groups lose least (docs/lab-log.md, section 14)."""

PEAKS = (6e-4, 1.2e-3, 2.4e-3)
"""Each method's trials: these peaks of its learning rate, everything else as its source has it."""
LOWER = (3e-4, 6e-4, 1.2e-3)
LOWER_PEAKS = ("ast", "ast-slorb", "cast")
"""Who tries `LOWER` instead: at 2.4e-3 their held-out perplexity is above 300."""
PRESSURE = 4e-4
"""CAST's lambda. The paper's 4e-7 is for billions of tokens: of so few it leaves a fifth of the weights, by magnitude,
to be cut off at the end, and a perplexity above 100 at every peak. Ten times the gradients' root mean square moves an
entry by the whole learning rate a step, which takes what is pruned to zero within 3 M tokens."""
CURVATURE_EVERY = 10
"""Steps between the paper's curvature estimates. The paper has one at every step, at several times a step's cost."""

FORGE = presets.IMPROVED.method
"""Where development stands (docs/lab-log.md): SparseGPT's solution, near ties settled in the first tenth."""
_TAUGHT = presets.IMPROVED.objective
assert isinstance(_TAUGHT, Distill)
FOLLOWING: Distill = _TAUGHT
"""The teacher follows the text, a fiftieth as fast as the student."""
UNMASKED_RATE = presets.IMPROVED.unmasked_rate
"""Of our rows: what carries no mask was not damaged, and forgets other text when it moves fast."""


def _paper(peak: float) -> Contender:
    """The paper's text with its weight decay, its cosine scaled to another peak, curvature at every tenth step."""
    preset = presets.PAPER
    assert isinstance(preset.lr, WarmupCosine)
    assert isinstance(preset.method.curvature, Hutchinson)
    lr = replace(preset.lr, peak=peak, last=peak / 10)
    return Contender(
        label="SparseForge (paper)",
        method=replace(preset.method, curvature=replace(preset.method.curvature, every=CURVATURE_EVERY)),
        lr=lr,
        weight_decay=preset.weight_decay,
        decayed=preset.decayed,
        objective=preset.objective,
        slorb=preset.slorb,
    )


def contenders(peak: float) -> dict[str, Contender]:
    """Every retraining method with one peak of the learning rate; the row it fills, and what it is."""
    lr = rate(peak)
    ast = AST()
    return {
        "dense-control": Contender(label="Dense control", method=DenseControl(), lr=lr),
        "naive": Contender(label="Naive retraining", method=FrozenMask(), lr=lr, objective=TaskOnly()),
        "frozen-wanda": Contender(label="Wanda mask, frozen, KD", method=FrozenMask(prior=WANDA), lr=lr),
        "frozen-sparsegpt": Contender(label="SparseGPT, mask frozen, KD", method=FrozenMask(prior=SPARSEGPT), lr=lr),
        "sr-ste": Contender(label="SR-STE", method=SRSTE(), lr=lr),
        "ast": Contender(label="AST", method=ast, lr=lr, objective=Distill(kl_weight=0.67)),
        "ast-slorb": Contender(
            label="AST + SLoRB", method=ast, lr=lr, objective=Distill(kl_weight=0.67), slorb=SLoRB(k=16)
        ),
        "cast": Contender(label="CAST", method=CAST(pressure=PRESSURE), lr=lr, objective=Distill(kl_weight=1 / 3)),
        "maskllm": Contender(label="MaskLLM", method=MaskLLM(prior=SPARSEGPT), lr=lr, objective=TaskOnly()),
        "paper": _paper(peak),
        # As it was before channels were put in order (docs/lab-log.md, section 14): what trials and ablations are of.
        "improved": Contender(
            label="SparseForge (improved)", method=FORGE, lr=lr, objective=FOLLOWING, unmasked_rate=UNMASKED_RATE
        ),
    }


def peaks(name: str) -> tuple[float, ...]:
    """The peaks that a method tries."""
    return LOWER if name in LOWER_PEAKS else PEAKS


TRIAL = 3
"""Budget of a trial, in millions of tokens: a quarter of the tables'."""


def trials(names: Iterable[str] = ()) -> Grid:
    """The trials of all methods, or of those named: `TRIAL` tokens, seed 0, judged on held-out text of the shards."""
    wanted = set(names)
    labels = [(name, contender.label) for name, contender in contenders(PEAKS[0]).items()]
    entries = tuple(
        Planned(
            recipe=contenders(peaks(name)[place])[name].recipe(TRIAL * MILLION),
            variant=f"{label} {peaks(name)[place]:g}",
            suites=(TRIED_ON,),
        )
        for place in range(len(PEAKS))
        for name, label in labels
        if not wanted or name in wanted
    )
    return Grid(name="smollm2-trials", title="SmolLM2-135M, trials", entries=entries, captions={})
