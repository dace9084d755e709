"""The named readings of the method, so that every claim can be traced: `paper`, `released`, `lean`, `improved`.

`paper` is the paper's text; where it prints no constant, that of its published script for most model families stands
in. `released` is what that script would do if its curvature estimator worked. `lean` is the specification's annealing
(the defaults), kept in few bytes (of the same quality: `benchmarks/lean_storage.py`). `improved` is what the study
found best (results/README.md; how it was found: docs/lab-log.md), and what we recommend. A preset fixes method,
objective, side branch, order of channels and optimizer; model, text, budget and the peak of the learning rate are the
caller's.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

from sparseforge_core.data.corpora import Corpus
from sparseforge_core.errors import RecipeError, unknown
from sparseforge_core.methods.sparseforge import SparseForge
from sparseforge_core.methods.sparsegpt import SparseGPT
from sparseforge_core.models.sources import ModelSource
from sparseforge_core.objective import Distill, Objective, TaskOnly, Then
from sparseforge_core.objective.correction import TeacherCorrection
from sparseforge_core.observe.curvature import Fisher, Hutchinson
from sparseforge_core.recipe import Recipe, TrainPlan
from sparseforge_core.schedules import (
    Constant,
    Geometric,
    Linear,
    Product,
    Schedule,
    SmoothStep,
    Switch,
    WarmupCosine,
    WarmupLinear,
)
from sparseforge_core.sparsity.criteria import SparseGPTScore
from sparseforge_core.sparsity.patterns import GroupPattern, PatternChoice, nm
from sparseforge_core.sparsity.permutation import ChannelPermutation
from sparseforge_core.sparsity.slorb import SLoRB

log = logging.getLogger(__name__)

STEPS, ANNEALED, EARLY, DELAY = 20_000, 17_000, 2_000, 500
"""The script's steps: all with the finetune, without it, until T_update falls from 30 to 10, without any update."""

FREEZE = ANNEALED / STEPS
BEGIN = EARLY / ANNEALED
"""Progress of heating and quench at which the script's structural windows open."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """All of a recipe but its model, text and budget."""

    name: str
    about: str
    method: SparseForge
    objective: Objective
    lr: Schedule
    weight_decay: float = 0.0
    decayed: Literal["unmasked", "all"] = "unmasked"
    unmasked_rate: float = 1.0
    """Share of the learning rate for what carries no mask."""
    slorb: SLoRB | None = None
    permutation: ChannelPermutation | None = None
    """For one pattern of N:M inputs; under others, mixed ones too, channels stay as they stand."""

    def recipe(
        self,
        model: ModelSource,
        corpus: Corpus,
        *,
        steps: int,
        sequences: int,
        length: int,
        pattern: PatternChoice | None = None,
        compute_dtype: Literal["float32", "bfloat16"] = "float32",
        in_order: bool = True,
    ) -> Recipe:
        """The preset on a model and a text, `steps` of `sequences` x `length` tokens; 2:4 unless told otherwise.

        With `in_order` channels are put in order where the preset says so and the pattern is one of N:M inputs. A model
        of no declared family, or whose heads or units groups do not divide, is refused when it is opened: it needs
        `in_order=False`.
        """
        plan = TrainPlan(
            steps=steps,
            sequences=sequences,
            length=length,
            lr=self.lr,
            weight_decay=self.weight_decay,
            decayed=self.decayed,
            unmasked_rate=self.unmasked_rate,
            compute_dtype=compute_dtype,
        )
        pattern = pattern or nm(2, 4)
        by_inputs = isinstance(pattern, GroupPattern) and pattern.rows == 1
        if in_order and self.permutation and not by_inputs:
            log.info("preset %s: under pattern %s channels stay as they stand", self.name, pattern.name)
        return Recipe(
            model=model,
            method=self.method,
            corpus=corpus,
            pattern=pattern,
            objective=self.objective,
            train=plan,
            slorb=self.slorb,
            permutation=self.permutation if in_order and by_inputs else None,
        )


_HUTCHINSON = Hutchinson(probes=1, signs="before", every=1, decay=0.98)
"""One joint probe a step. With so short an average of so few, clamping late is the worse of two biases."""

_TAUGHT = Distill(task_weight=1.0, kl_weight=1.0, temperature=2.0)
_OBJECTIVE = Then(before=_TAUGHT, after=TaskOnly(), switch_at=FREEZE)
"""CE + KL at T = 2 (times T^2 = 4), then a finetune without the teacher."""

_LR = WarmupCosine(peak=1e-4, warmup=0.05, last=1e-5, end=FREEZE)
"""1e-4 to 1e-5 along a cosine, which is also the finetune's rate."""

PAPER = Preset(
    name="paper",
    about="the paper's text; constants that it does not print are those of its published script",
    method=SparseForge(
        curvature=_HUTCHINSON,
        log_scores=False,
        temperature=Linear(first=1.0, last=0.05),
        cooling=0.98,
        structure_mix=SmoothStep(first=0.0, last=1.0, begin=0.12),
        mid_push=Product(first=Linear(first=0.2, last=1.0), second=Linear(first=0.0, last=0.3)),
        mask_rate=Constant(value=0.1),
        target_freeze=1.0,
        update_every=10,
        early_update_every=30,
        early_until=EARLY / STEPS,
        quench_begin=0.75 * FREEZE,
        freeze_at=FREEZE,
    ),
    objective=_OBJECTIVE,
    lr=_LR,
    weight_decay=0.1,
    decayed="all",
    slorb=SLoRB(k=16, begin="first-mask"),
)

RELEASED = Preset(
    name="released",
    about="what the published script for most model families would do if its curvature estimator worked",
    method=SparseForge(
        curvature=_HUTCHINSON,
        log_scores=False,
        gate_scope="layer",
        push_target="gate",
        # T is indexed by the step: 0.98 an update until T_update changes, where it falls to its floor at once.
        temperature=Switch(
            before=Geometric(first=1.0, last=0.98 ** (EARLY // 30), end=BEGIN),
            after=Constant(value=0.05),
            switch_at=BEGIN,
        ),
        structure_mix=SmoothStep(first=0.0, last=1.0, begin=BEGIN),
        mid_push=Linear(first=0.06, last=0.3),
        mask_rate=Constant(value=0.1),
        target_freeze=1.0,
        update_every=10,
        early_update_every=30,
        early_until=EARLY / STEPS,
        first_update=DELAY / ANNEALED,
        quench_begin=EARLY / STEPS,
        freeze_at=FREEZE,
        pruned_decay=Linear(first=0.0, last=1e-4, end=10_000 / ANNEALED),
    ),
    objective=_OBJECTIVE,
    lr=_LR,
    weight_decay=0.1,
    decayed="all",
    slorb=SLoRB(k=16, projection="trained", fit="sum", begin="start"),
)

LEAN = Preset(
    name="lean",
    about="the specification's annealing, the defaults, with masks and curvature kept in 4 bytes a weight",
    method=SparseForge(mask_storage="int16", statistics_rows=16, curvature=Fisher(storage="bfloat16")),
    objective=Distill(),
    lr=TrainPlan().lr,
)

IMPROVED = Preset(
    name="improved",
    about="what was found best: channels in an order in which groups lose less, SparseGPT's solution, near ties "
    "settled early, a teacher that follows the text",
    method=SparseForge(
        start_from=SparseGPT(samples=128, length=1024),
        criterion=SparseGPTScore(),
        calibration_samples=64,
        temperature=Constant(value=0.05),
        quench_begin=0.02,
        freeze_at=0.1,
        mask_storage="int16",
    ),
    objective=Distill(kl_weight=0.75, correction=TeacherCorrection()),
    lr=WarmupLinear(peak=2.4e-3),
    unmasked_rate=0.25,
    permutation=ChannelPermutation(samples=128, length=1024),
)
"""The peak is what trials chose for SmolLM2-135M at batches of 16,384 tokens; larger models want a lower one. At
24 million tokens 733 steps of twice the sequences were better than 1,465: perplexity on other text fell by 6.5 % for
1.3 % more on the text's own kind (docs/lab-log.md, section 12; one seed). The order of channels, which needs a declared
family, gave 0.9 % on the text's own kind and 3.7 % on other text at 12 million tokens (two seeds), 0.4 and 2.2 % at 24
(one; section 14)."""

PRESETS = {preset.name: preset for preset in (PAPER, RELEASED, LEAN, IMPROVED)}


def preset_named(name: str) -> Preset:
    """A preset by name. Raises RecipeError, naming the nearest."""
    if name not in PRESETS:
        raise RecipeError(unknown("preset", name, PRESETS))
    return PRESETS[name]
