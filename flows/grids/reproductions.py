"""Numbers of other papers that can be checked at small size: AST's GPT-2 and OPT rows, Wanda's README on LLaMA-2-7B.

Each row is the paper's own setting as far as it is known, measured with our protocol (WikiText-2 raw, joined by blank
lines, the model's window). AST trains GPT-2 for 40,000 steps of 128 x 1,024 tokens of C4 at 2e-4 -> 2e-5 with 0.33 CE +
0.67 KL at T = 2 and a decay of 1e-4 reached after 10,000 steps; its last 2,000 steps, linear to zero, are here the end
of the cosine. OPT's setting is not printed: these rows take GPT-2's, with sequences of 2,048.
"""

from __future__ import annotations

from dataclasses import replace

from flows.grids import zoo
from flows.grids.paper import dense, perplexity
from flows.grids.planned import Grid, Planned, Slot
from flows.placements import card_of, model_name
from sparseforge_core.methods import AST, MagnitudePruning, Method, SparseGPT, Wanda
from sparseforge_core.models.sources import Hub
from sparseforge_core.objective import Distill
from sparseforge_core.recipe import Recipe, TrainPlan
from sparseforge_core.schedules import Linear, WarmupCosine
from sparseforge_core.sparsity.patterns import nm
from sparseforge_core.sparsity.slorb import SLoRB

STEPS = 40_000
TOKENS_PER_STEP = 128 * 1024

GPT2 = (zoo.GPT2, zoo.GPT2_MEDIUM, zoo.GPT2_LARGE, zoo.GPT2_XL)
OPT = (zoo.OPT_125M, zoo.OPT_350M, zoo.OPT_1_3B)

CAPTION = (
    "2:4 at the settings of the papers that print these perplexities (AST's README for GPT-2 and OPT, Wanda's README "
    "for LLaMA-2-7B at window 4096). One seed; 5.2 B tokens where a method retrains."
)


def trained_by_ast(model: Hub) -> Recipe:
    """AST at its GPT-2 setting, without a side branch."""
    length = min(card_of(model).context, 2048)
    return Recipe(
        model=model,
        method=AST(decay=Linear(first=0.0, last=1e-4, end=0.25)),
        corpus=zoo.C4,
        pattern=nm(2, 4),
        objective=Distill(kl_weight=0.67, temperature=2.0),
        train=TrainPlan(
            steps=STEPS,
            sequences=TOKENS_PER_STEP // length,
            length=length,
            lr=WarmupCosine(peak=2e-4, warmup=0.05, last=2e-5),
            compute_dtype="bfloat16",
        ),
    )


def pruned(model: Hub, method: Method) -> Recipe:
    """A one-shot row."""
    return Recipe(model=model, method=method, corpus=zoo.C4, pattern=nm(2, 4))


def _rows(model: Hub) -> dict[str, tuple[str, Recipe]]:
    """Variant -> label, recipe."""
    length = min(card_of(model).context, 4096)
    rows = {"dense": ("Dense", dense(model))}
    if model == zoo.LLAMA2_7B:
        rows["magnitude"] = ("Magnitude", pruned(model, MagnitudePruning()))
    if model not in OPT:
        rows["wanda"] = ("Wanda", pruned(model, Wanda(length=length)))
        rows["sparsegpt"] = ("SparseGPT", pruned(model, SparseGPT(length=length)))
    if model in GPT2:
        rows["ast"] = ("AST", trained_by_ast(model))
    if model in GPT2 or model in OPT:
        rows["ast-slorb"] = ("AST + SLoRB", replace(trained_by_ast(model), slorb=SLoRB(k=16)))
    return rows


def reproductions() -> Grid:
    """A row for each number, in the papers' order."""
    entries = [
        Planned(
            recipe=recipe,
            variant=label,
            suites=(perplexity(model),),
            slots=(
                Slot(
                    exhibit="reproductions",
                    row=f"{model_name(model)}/{variant}",
                    label=f"{model_name(model)} {label}",
                ),
            ),
        )
        for model in (*GPT2, *OPT, zoo.LLAMA2_7B)
        for variant, (label, recipe) in _rows(model).items()
    ]
    return Grid(
        name="reproductions",
        title="Published perplexities of small models",
        entries=tuple(entries),
        captions={"reproductions": CAPTION},
        published=True,
    )
