"""Ideas for the study's method, tried one at a time (docs/lab-log.md): 6 M tokens and seed 0 unless said, text of no
result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flows.grids.planned import Grid, Planned
from flows.grids.study import (
    CALIBRATION,
    FOLLOWING,
    FORGE,
    LENGTH,
    MILLION,
    MIXED,
    PERMUTED,
    SEQUENCES,
    SPARSEGPT,
    TRIED_ON,
    WIDE_SEQUENCES,
    Contender,
    contenders,
    rate,
)
from sparseforge_core.data.corpora import TextFiles
from sparseforge_core.evaluate.suites import PerplexitySuite
from sparseforge_core.methods import ALPS, FrozenMask, SparseForge
from sparseforge_core.objective import Distill
from sparseforge_core.objective.correction import TeacherCorrection
from sparseforge_core.objective.hidden import HiddenMatch
from sparseforge_core.recipe import Trained
from sparseforge_core.schedules import Constant, Linear, Product
from sparseforge_core.sparsity.compensation import Compensation
from sparseforge_core.sparsity.criteria import HessianOBD, SparseGPTScore, WandaScore
from sparseforge_core.sparsity.slorb import SLoRB

SOFT = SparseForge(criterion=SparseGPTScore(), calibration_samples=CALIBRATION // 2)
"""The specification's schedules, the strongest one-shot score."""
FITTED = Compensation(samples=CALIBRATION, length=LENGTH)
EARLY: dict[str, Any] = {"quench_begin": 0.2, "freeze_at": 0.4, "compensation": FITTED}
HIDDEN = Distill(hidden=HiddenMatch())
BEGUN: dict[str, Any] = {"start_from": SPARSEGPT, "quench_begin": 0.1, "freeze_at": 0.5}


def _annealed(label: str, peak: float, **changes: Any) -> Contender:
    """A change of one thing: fields of the contender, or of its method."""
    contender = Contender(label=label, method=SOFT, lr=rate(peak))
    ours = {name: value for name, value in changes.items() if name in Contender.__dataclass_fields__}
    method = {name: value for name, value in changes.items() if name not in ours}
    return replace(contender, method=replace(SOFT, **method), **ours)


def _as(name: str, label: str, peak: float, **changes: Any) -> Contender:
    return replace(contenders(peak)[name], label=label, **changes)


def _frozen(label: str, peak: float, **changes: Any) -> Contender:
    return _as("frozen-sparsegpt", label, peak, **changes)


def _followed(label: str, rate_scale: float, kl_weight: float) -> Contender:
    objective = Distill(kl_weight=kl_weight, correction=TeacherCorrection(rate_scale=rate_scale))
    return _frozen(label, 2.4e-3, unmasked_rate=0.25, objective=objective)


IDEAS: tuple[Contender, ...] = (
    _frozen("frozen SparseGPT 6e-4", 6e-4),
    _annealed("annealed, SparseGPT score 6e-4", 6e-4),
    _annealed("early projection, compensated 6e-4", 6e-4, **EARLY),
    _annealed("early projection, compensated 1.2e-3", 1.2e-3, **EARLY),
    _annealed("hidden states 6e-4", 6e-4, objective=HIDDEN),
    _annealed("Muon 6e-4", 6e-4, rule="muon"),
    _frozen("frozen SparseGPT 1.2e-3", 1.2e-3),
    _annealed("annealed, SparseGPT score 1.2e-3", 1.2e-3),
    _annealed("annealed, Fisher score 6e-4", 6e-4, criterion=HessianOBD()),
    _as("frozen-wanda", "frozen Wanda 6e-4", 6e-4),
    _frozen("frozen SparseGPT, Muon 6e-4", 6e-4, rule="muon"),
    _frozen("frozen SparseGPT, hidden states 6e-4", 6e-4, objective=HIDDEN),
    _as("dense-control", "dense control 6e-4", 6e-4),
    # How fast, and what moves
    _frozen("frozen SparseGPT 2.4e-3", 2.4e-3),
    _frozen("frozen 2.4e-3, unmasked a quarter", 2.4e-3, unmasked_rate=0.25),
    _frozen("frozen 4.8e-3, unmasked an eighth", 4.8e-3, unmasked_rate=0.12),
    _frozen("frozen Muon 1.2e-3", 1.2e-3, rule="muon"),
    _frozen("frozen Muon 1.7e-3, unmasked a third", 1.7e-3, rule="muon", unmasked_rate=0.35),
    _frozen("frozen Muon 2.4e-3, unmasked a half", 2.4e-3, rule="muon", unmasked_rate=0.5),
    _frozen("frozen Muon 4e-3, unmasked a third", 4e-3, rule="muon", unmasked_rate=0.3),
    # What is minimised
    _frozen("frozen 1.2e-3, KL 0.25", 1.2e-3, objective=Distill(kl_weight=0.25)),
    _frozen("frozen 1.2e-3, KL 0.75", 1.2e-3, objective=Distill(kl_weight=0.75)),
    _frozen("frozen 1.2e-3, hidden states", 1.2e-3, objective=HIDDEN),
    _frozen(
        "frozen 2.4e-3, unmasked a quarter, KL 0.65", 2.4e-3, unmasked_rate=0.25, objective=Distill(kl_weight=0.65)
    ),
    _followed("teacher follows at 1/4, KL 0.5", 0.25, 0.5),
    _followed("teacher follows at 1/4, KL 0.75", 0.25, 0.75),
    _followed("teacher follows at 1/16, KL 0.75", 0.0625, 0.75),
    _followed("teacher follows at 1/48, KL 0.75", 1 / 48, 0.75),
    _followed("teacher follows at 1/48, KL 0.5", 1 / 48, 0.5),
    # Which mask, and when
    _as("frozen-wanda", "frozen Wanda 2.4e-3", 2.4e-3),
    _annealed("from SparseGPT, T 0.05, 1.2e-3", 1.2e-3, temperature=Constant(value=0.05), **BEGUN),
    _annealed(
        "from SparseGPT, T 0.05, Wanda score to 0.8, 1.2e-3",
        1.2e-3,
        **{**BEGUN, "criterion": WandaScore(), "freeze_at": 0.8, "temperature": Constant(value=0.05)},
    ),
    _annealed(
        "from SparseGPT, T 0.1, 2.4e-3, unmasked a quarter",
        2.4e-3,
        unmasked_rate=0.25,
        temperature=Constant(value=0.1),
        **BEGUN,
    ),
    _annealed(
        "projection at 0.15, compensated, 2.4e-3, unmasked a quarter",
        2.4e-3,
        unmasked_rate=0.25,
        quench_begin=0.02,
        freeze_at=0.15,
        compensation=FITTED,
    ),
    _as("ast", "AST 2.4e-3", 2.4e-3),
)
"""In the order of the log; `results/smollm2/lab` has what was run."""


PEAK = 2.4e-3


def _moving(label: str, **changes: Any) -> Contender:
    """The study's method with masks that move for longer; teacher and rates as they are."""
    return _as("improved", label, PEAK, method=replace(FORGE, **changes))


LONG: tuple[Contender, ...] = (
    _as("improved", "improved", PEAK),
    _moving("improved, masks move until a half", temperature=Constant(value=0.1), quench_begin=0.1, freeze_at=0.5),
    _moving(
        "improved, annealed from ones, Fisher score",
        start_from=None,
        criterion=HessianOBD(),
        temperature=SparseForge().temperature,
        quench_begin=0.4,
        freeze_at=0.6,
        compensation=FITTED,
    ),
)
"""Whether masks that move gain by a larger budget: 24 M tokens, seed 1."""


FORGOTTEN = PerplexitySuite(
    name="wikitext2-validation-1024",
    text="named",
    window=1024,
    corpus=TextFiles(
        paths=("wikitext2/wiki.valid.raw",),
        sha256=("4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7",),
    ),
)
"""What is forgotten of other text while books are read: the validation text of WikiText-2, which no table shows."""


def _but(label: str, **changes: Any) -> Contender:
    """The study's method, changed in one thing."""
    return _as("improved", label, PEAK, **changes)


def _kept(label: str, peak: float = PEAK, *, unmasked: float = 0.05, **objective: Any) -> Contender:
    """The study's method with several changes at once: slower unmasked weights, fields of its objective, its peak."""
    changed = replace(contenders(peak)["improved"], unmasked_rate=unmasked, objective=replace(FOLLOWING, **objective))
    return replace(changed, label=label)


HALF_AS_FAST = TeacherCorrection(rate_scale=0.01)

FORGETTING: tuple[Contender, ...] = (
    _but("improved"),
    _but("improved, KL 0.9", objective=replace(FOLLOWING, kl_weight=0.9)),
    _but("improved, KL 1", objective=replace(FOLLOWING, kl_weight=1.0)),
    _but("improved, T 2", objective=replace(FOLLOWING, temperature=2.0)),
    _but("improved, unmasked a tenth", unmasked_rate=0.1),
    _but("improved, unmasked a fiftieth", unmasked_rate=0.02),
    _but("improved, teacher half as fast", objective=replace(FOLLOWING, correction=HALF_AS_FAST)),
    replace(contenders(PEAK / 2)["improved"], label="improved 1.2e-3"),
    _kept("KL 0.9, unmasked a twentieth", kl_weight=0.9),
    _kept("KL 0.9, unmasked a twentieth, teacher half as fast", kl_weight=0.9, correction=HALF_AS_FAST),
    _kept("KL 0.9, unmasked a twentieth, 1.7e-3", 1.7e-3, kl_weight=0.9),
    _kept("KL 1, unmasked a twentieth, teacher half as fast", kl_weight=1.0, correction=HALF_AS_FAST),
    replace(contenders(6e-4)["ast-slorb"], label="AST + SLoRB 6e-4"),
)
"""What keeps other text: 6 M tokens, a seed that no table has. The last is who forgets least of the rivals."""


STEEP = Product(first=rate(PEAK), second=Linear(first=1.0, last=0.0))
"""To zero as the square of what is left: the same peak, two thirds of the way."""
RARELY = TeacherCorrection(rate_scale=0.08, every=4)
"""A quarter of the backward passes of the teacher, and the same way to go."""
THRICE_AS_FAST = TeacherCorrection(rate_scale=1 / 16)
ALPS_TOO = ALPS(samples=CALIBRATION, length=LENGTH)
"""The same text as SparseGPT's, a smaller error of each layer."""
BY_MORE = replace(SPARSEGPT, samples=8 * CALIBRATION)
MOSTLY_TAUGHT = replace(FOLLOWING, kl_weight=0.9)
BRANCH = SLoRB(k=16)

RATES: tuple[Contender, ...] = (
    _but("improved"),
    _as("improved", "improved 1.2e-3", 1.2e-3),
    _but("improved, falling as a square", lr=STEEP),
    _as("improved", "improved 1.2e-3, KL 0.9, SLoRB", 1.2e-3, objective=MOSTLY_TAUGHT, slorb=BRANCH),
    replace(contenders(6e-4)["ast-slorb"], label="AST + SLoRB 6e-4"),
)
"""Whether the rate is what forgets: the main budget, 12 M tokens, the same seed."""

ELSEWHERE = PerplexitySuite(
    name="books-07-1024",
    text="named",
    window=1024,
    limit=256,
    corpus=TextFiles(
        paths=("books/train-07.txt.xz",),
        sha256=("1efca7eecb19ae0817aeb031f9d99ef16e0aff4d92cfcd5293b38ad308243f43",),
    ),
)
"""A shard of books that no cell of this model reads, for rows of several texts."""


MOST: dict[str, Any] = {"objective": MOSTLY_TAUGHT, "slorb": BRANCH}
"""The two changes that other text was expected to gain most by."""


def _mixed(*contenders: Contender) -> tuple[Contender, ...]:
    """The same on the study's text."""
    return tuple(replace(one, label=f"{one.label}, modern text too", corpus=MIXED) for one in contenders)


TEXTS: tuple[Contender, ...] = _mixed(
    _but("improved"),
    _but("improved, KL 0.9", objective=MOSTLY_TAUGHT),
    _but("improved, begun from ALPS's solution", method=replace(FORGE, start_from=ALPS_TOO)),
    _but("improved, eight times the calibration", method=replace(FORGE, start_from=BY_MORE)),
    _but("improved, the teacher learns from every fourth batch", objective=replace(FOLLOWING, correction=RARELY)),
    _but("improved, a teacher three times as fast", objective=replace(FOLLOWING, correction=THRICE_AS_FAST)),
    _but("improved, the mean of the last half", averaged_from=0.5),
    _but("improved, KL 0.9, the mean of the last half", objective=MOSTLY_TAUGHT, averaged_from=0.5),
    _but("improved, KL 0.9, SLoRB", objective=MOSTLY_TAUGHT, slorb=BRANCH),
    _but("improved, SLoRB", slorb=BRANCH),
    _but("improved, KL 0.9, SLoRB, the mean of the last half", **MOST, averaged_from=0.5),
    _as("ast-slorb", "AST + SLoRB 6e-4", 6e-4),
    _as("ast-slorb", "AST + SLoRB 1.2e-3", 1.2e-3),
    _frozen("frozen SparseGPT 2.4e-3", PEAK),
)
"""What still helps once there is other text, and whether rivals would take other rates: the same budget."""

COMBINED: tuple[Contender, ...] = _mixed(
    _but("improved, KL 0.9, from ALPS's solution", objective=MOSTLY_TAUGHT, method=replace(FORGE, start_from=ALPS_TOO)),
    _but("improved, KL 0.9, SLoRB, from ALPS's solution", **MOST, method=replace(FORGE, start_from=ALPS_TOO)),
    _but(
        "improved, KL 0.9, SLoRB, the teacher learns from every fourth batch",
        objective=replace(MOSTLY_TAUGHT, correction=RARELY),
        slorb=BRANCH,
    ),
    _but(
        "improved, KL 0.9, SLoRB, a teacher three times as fast",
        objective=replace(MOSTLY_TAUGHT, correction=THRICE_AS_FAST),
        slorb=BRANCH,
    ),
)
"""Several changes at once, of which those are run that `TEXTS` leaves open."""


def _held(label: str, *, at: float, anchor: float = 0.5, kl_weight: float = FOLLOWING.kl_weight) -> Contender:
    """The study's method, its teacher held to the dense model and as fast as `at` of the plan's rate."""
    correction = TeacherCorrection(rate_scale=at, anchor=anchor)
    return _but(f"improved, {label}", objective=replace(FOLLOWING, kl_weight=kl_weight, correction=correction))


HELD: tuple[Contender, ...] = _mixed(
    _held("a held teacher", at=0.02),
    _held("a held teacher at an eighth", at=0.125),
    _held("a held teacher at a half", at=0.5),
    _held("a held teacher at an eighth, KL 0.9", at=0.125, kl_weight=0.9),
    _held("a held teacher at a half, KL 0.9", at=0.5, kl_weight=0.9),
    _held("a held teacher at a half, KL 1", at=0.5, kl_weight=1.0),
    _held("a teacher held by three quarters at a half, KL 0.9", at=0.5, anchor=0.75, kl_weight=0.9),
)
"""Whether a teacher that is held to the dense model may be fast: the same text, budget and seeds as `TEXTS`."""

TWICE_AS_LONG: tuple[Contender, ...] = _mixed(
    _but("improved"),
    _held("a held teacher at an eighth", at=0.125),
    _held("a held teacher at a half, KL 0.9", at=0.5, kl_weight=0.9),
    _as("ast-slorb", "AST + SLoRB 6e-4", 6e-4),
)
"""Whether what holds at 12 M tokens holds at 24 M."""

WIDE_PEAK = 3.4e-3
"""The peak times the root of two, as the noise of twice the sequences allows."""
WIDER: tuple[Contender, ...] = _mixed(
    _but("improved, 32 sequences a step", sequences=WIDE_SEQUENCES),
    _as("improved", "improved 3.4e-3, 32 sequences a step", WIDE_PEAK, sequences=WIDE_SEQUENCES),
)
LONGER: tuple[Contender, ...] = (
    *WIDER,
    *_mixed(
        _but("improved, KL 0.9, 32 sequences a step", objective=MOSTLY_TAUGHT, sequences=WIDE_SEQUENCES),
        _but("improved, KL 0.9", objective=MOSTLY_TAUGHT),
        _as("ast-slorb", "AST + SLoRB 6e-4, 32 sequences a step", 6e-4, sequences=WIDE_SEQUENCES),
        _frozen("frozen SparseGPT 2.4e-3", PEAK),
        _frozen("frozen SparseGPT 2.4e-3, 32 sequences a step", PEAK, sequences=WIDE_SEQUENCES),
    ),
)
"""Whether a larger budget should go into wider steps rather than more of them, for ours and its two nearest rivals."""

IN_ORDER: dict[str, Contender] = {
    "channels in order": _but("improved", permutation=PERMUTED),
    "channels in order, begun from ALPS's solution": _but(
        "improved", permutation=PERMUTED, method=replace(FORGE, start_from=ALPS_TOO)
    ),
    "channels in order, SparseGPT's mask as it is": _but(
        "improved", permutation=PERMUTED, method=FrozenMask(prior=SPARSEGPT)
    ),
}
PERMUTING: tuple[Contender, ...] = _mixed(
    *(replace(one, label=f"improved, {change}") for change, one in IN_ORDER.items())
)
PERMUTING_LONG: tuple[Contender, ...] = _mixed(
    *(
        replace(one, label=f"improved, {change}, {WIDE_SEQUENCES} sequences a step", sequences=WIDE_SEQUENCES)
        for change, one in IN_ORDER.items()
    ),
    _frozen(
        f"frozen SparseGPT 2.4e-3, channels in order, {WIDE_SEQUENCES} sequences a step",
        PEAK,
        permutation=PERMUTED,
        sequences=WIDE_SEQUENCES,
    ),
)
"""Whether what groups lose less of is still worth something after retraining, for ours and for its nearest rival."""


def _retaught(
    label: str, millions: int, sequences: int = SEQUENCES, *, name: str = "improved", **objective: Any
) -> Contender:
    """A method of the study with channels in order, taught by the dense control of its seed, text, budget and steps."""
    control = replace(contenders(CONTROL_PEAK)["dense-control"], corpus=MIXED, sequences=sequences)
    teacher = Trained(recipe=control.recipe(millions * MILLION), seed=None)
    changed = replace(FOLLOWING, **{"correction": None, "teacher": teacher, **objective})
    wide = "" if sequences == SEQUENCES else f", {sequences} sequences a step"
    return _as(
        name, f"{label}{wide}, modern text too", PEAK, objective=changed, permutation=PERMUTED, sequences=sequences,
        corpus=MIXED,
    )  # fmt: skip


CONTROL_PEAK = 1.2e-3
"""Of the dense control, as its trials chose."""
RETAUGHT: tuple[Contender, ...] = (
    _retaught("improved, in order, a retrained teacher", 12),
    _retaught("improved, in order, a retrained teacher, KL 0.9", 12, kl_weight=0.9),
    _retaught("improved, in order, a retrained teacher that follows", 12, correction=FOLLOWING.correction),
)
RETAUGHT_LONG: tuple[Contender, ...] = (
    _retaught("improved, in order, a retrained teacher", 24, WIDE_SEQUENCES),
    _retaught("improved, in order, a retrained teacher, KL 0.9", 24, WIDE_SEQUENCES, kl_weight=0.9),
    _retaught(
        "frozen SparseGPT 2.4e-3, in order, a retrained teacher",
        24,
        WIDE_SEQUENCES,
        name="frozen-sparsegpt",
        kl_weight=0.5,
    ),
)
"""Whether a teacher that has read the text before its pupil does, and is fixed, is worth more than one that follows:
the dense model retrained on the same tokens, by the study's own dense control. The rival's fellow is in
`PERMUTING_LONG`."""

_ORDERED: dict[str, Any] = {"permutation": PERMUTED, "sequences": WIDE_SEQUENCES}
SLOWER = replace(FOLLOWING, correction=TeacherCorrection(rate_scale=0.014))
"""A follower that is as fast at `WIDE_PEAK` as it is at `PEAK`."""
FASTER: tuple[Contender, ...] = _mixed(
    _as("improved", f"improved 3.4e-3, in order, {WIDE_SEQUENCES} sequences a step", WIDE_PEAK, **_ORDERED),
    _as(
        "improved",
        f"improved 3.4e-3 of masked weights alone, in order, {WIDE_SEQUENCES} sequences a step",
        WIDE_PEAK,
        unmasked_rate=0.18,
        objective=SLOWER,
        **_ORDERED,
    ),
    _but(
        f"improved, in order, masks move until a half, {WIDE_SEQUENCES} sequences a step",
        method=replace(FORGE, temperature=Constant(value=0.1), quench_begin=0.1, freeze_at=0.5),
        **_ORDERED,
    ),
    _frozen(f"frozen SparseGPT 3.4e-3, {WIDE_SEQUENCES} sequences a step", WIDE_PEAK, sequences=WIDE_SEQUENCES),
)
"""At 24 M tokens: whether wide steps take a higher rate, of all weights or of the masked ones alone, for ours and for
its nearest rival; and whether masks that move for longer are worth something there."""

UNSHOWN = (3, 4)
"""Seeds that no table has: the first for every idea, the second where the first does not settle it."""


def ideas() -> Grid:
    """The lab's runs."""
    short = [Planned(recipe=one.recipe(6 * MILLION), variant=one.label, suites=(TRIED_ON,)) for one in IDEAS]
    long = [
        Planned(recipe=one.recipe(24 * MILLION), variant=f"{one.label}, 24 M", seeds=(1,), suites=(TRIED_ON,))
        for one in LONG
    ]
    forgetting = [
        Planned(
            recipe=one.recipe(millions * MILLION),
            variant=f"{one.label}, {millions} M, seed {seed}",
            seeds=(seed,),
            suites=suites,
        )
        for millions, some, suites, seeds in (
            (6, FORGETTING, (TRIED_ON, FORGOTTEN), UNSHOWN[:1]),
            (12, RATES, (TRIED_ON, FORGOTTEN, ELSEWHERE), UNSHOWN[:1]),
            (12, (*TEXTS, *COMBINED, *HELD, *WIDER, *PERMUTING, *RETAUGHT), (FORGOTTEN, ELSEWHERE), UNSHOWN),
            (
                24,
                (*TWICE_AS_LONG, *LONGER, *PERMUTING_LONG, *RETAUGHT_LONG, *FASTER),
                (FORGOTTEN, ELSEWHERE),
                UNSHOWN[:1],
            ),
        )
        for one in some
        for seed in seeds
    ]
    entries = (*short, *long, *forgetting)
    return Grid(name="smollm2-ideas", title="SmolLM2-135M, ideas", entries=entries, captions={})
