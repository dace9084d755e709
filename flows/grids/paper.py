"""The paper as data: Tables 1-7 and the figure. Each row is a recipe; each ablation a one-line difference.

Budgets are the paper's (1.25 B tokens; 5 B for the long LLaMA run), the finetune counted in them. CAST's 40 B run of
Table 2 is quoted and not planned.
"""

from __future__ import annotations

from dataclasses import replace

from flows.grids import zoo
from flows.grids.planned import Grid, Planned, Slot
from flows.placements import card_of, model_name
from sparseforge_core import presets
from sparseforge_core.evaluate.suites import (
    CAST_7,
    DECODE,
    WIKITEXT2_1024,
    WIKITEXT2_2048,
    WIKITEXT2_4096,
    ZERO_SHOT_7,
    Suite,
)
from sparseforge_core.methods import (
    AST,
    CAST,
    SRSTE,
    Dense,
    DenseControl,
    FrozenMask,
    MagnitudePruning,
    MaskLLM,
    Method,
    SparseForge,
    SparseGPT,
    Wanda,
)
from sparseforge_core.models.sources import Hub
from sparseforge_core.objective import Distill, TaskOnly
from sparseforge_core.recipe import Recipe, TrainPlan
from sparseforge_core.schedules import WarmupCosine, WarmupLinear
from sparseforge_core.sparsity.criteria import Magnitude
from sparseforge_core.sparsity.patterns import BLOCK_16, GroupPattern, nm
from sparseforge_core.sparsity.slorb import SLoRB

SEEDS = (0, 1, 2)
TOKENS = 1_250_000_000
LONG_TOKENS = 5_000_000_000
SEQUENCES = 64
"""Sequences per step, as in the published launch scripts."""

CROSS_MODEL = (
    zoo.GPT2_MEDIUM, zoo.GPT2_LARGE, zoo.GPT2_XL, zoo.OPT_2_7B, zoo.LLAMA2_7B, zoo.QWEN3_1_7B, zoo.QWEN3_8B,
    zoo.QWEN3_14B, zoo.DEEPSEEK_MOE_16B,
)  # fmt: skip
BLOCK_MODELS = (
    zoo.LLAMA2_7B, zoo.OPT_2_7B, zoo.GPT2, zoo.GPT2_MEDIUM, zoo.GPT2_LARGE, zoo.GPT2_XL, zoo.QWEN3_1_7B,
    zoo.DEEPSEEK_MOE_16B,
)  # fmt: skip


def plan(model: Hub, tokens: int = TOKENS, *, lr: float = 1e-4) -> TrainPlan:
    """A plan of that many tokens at the model's context length (4,096 at most)."""
    length = min(card_of(model).context, 4096)
    steps = round(tokens / (SEQUENCES * length))
    return TrainPlan(
        steps=steps, sequences=SEQUENCES, length=length, lr=WarmupLinear(peak=lr), compute_dtype="bfloat16"
    )


def forge(model: Hub, *, tokens: int = TOKENS, pattern: GroupPattern | None = None) -> Recipe:
    """SparseForge with the decided defaults: C4, the model's own dense weights as teacher, no side branch."""
    return Recipe(
        model=model,
        method=SparseForge(),
        corpus=zoo.C4,
        pattern=pattern or nm(2, 4),
        objective=Distill(),
        train=plan(model, tokens),
    )


def dense(model: Hub) -> Recipe:
    """The untouched model."""
    return Recipe(model=model, method=Dense(), corpus=zoo.C4)


FULL = replace(forge(zoo.LLAMA2_7B), slorb=SLoRB(k=64))
"""Table 3's reference: the paper's full method on C4, with its side branch."""

PAPER = presets.PAPER.recipe(
    FULL.model,
    FULL.corpus,
    steps=FULL.train.steps,
    sequences=FULL.train.sequences,
    length=FULL.train.length,
    compute_dtype="bfloat16",
)
"""What the paper ran, as far as it can be told."""

ABLATIONS: dict[str, tuple[str, Recipe]] = {
    "full": ("SparseForge (full)", FULL),
    "dolmino": ("SparseForge (Dolmino)", replace(FULL, corpus=zoo.DOLMINO)),
    "half-steps": ("w/ half the steps", replace(FULL, train=plan(zoo.LLAMA2_7B, TOKENS // 2))),
    "magnitude": ("w/ magnitude score", replace(FULL, method=SparseForge(criterion=Magnitude()))),
    "no-slorb": ("w/o SLoRB", replace(FULL, slorb=None)),
    "teacher-13b": ("w/ 13B teacher", replace(FULL, objective=Distill(teacher=zoo.LLAMA2_13B))),
    "no-distillation": ("w/o distillation", replace(FULL, objective=TaskOnly())),
    "paper-constants": ("w/ the paper's constants", PAPER),
}
"""Table 3: row, label, recipe. The last row is ours."""


def perplexity(model: Hub) -> Suite:
    """WikiText-2 at the largest stated window that the model allows."""
    context = card_of(model).context
    return WIKITEXT2_4096 if context >= 4096 else WIKITEXT2_2048 if context >= 2048 else WIKITEXT2_1024


def _pair(model: Hub, variant: str, label: str, exhibits: tuple[str, ...]) -> tuple[Slot, ...]:
    name = model_name(model)
    return tuple(
        Slot(exhibit=e, row=f"{name}/{variant}", label=f"{name} {label}", suites=(ZERO_SHOT_7, perplexity(model)))
        for e in exhibits
    )


def _dense_and_sparse(model: Hub, exhibits: tuple[str, ...], recipe: Recipe) -> list[Planned]:
    suites = (ZERO_SHOT_7, perplexity(model))
    variant = "SparseForge block-16" if recipe.pattern == BLOCK_16 else "SparseForge"
    return [
        Planned(recipe=dense(model), variant="dense", suites=suites, slots=_pair(model, "dense", "Dense", exhibits)),
        Planned(
            recipe=recipe,
            variant=variant,
            seeds=SEEDS,
            suites=suites,
            slots=_pair(model, "sparseforge", "SparseForge", exhibits),
        ),
    ]


def tables_1_and_4() -> list[Planned]:
    """Across models, 2:4."""
    return [e for model in CROSS_MODEL for e in _dense_and_sparse(model, ("table-1", "table-4"), forge(model))]


def tables_5_and_6() -> list[Planned]:
    """Across models, block-16."""
    return [
        e
        for model in BLOCK_MODELS
        for e in _dense_and_sparse(model, ("table-5", "table-6"), forge(model, pattern=BLOCK_16))
    ]


def table_2() -> list[Planned]:
    """Every method on LLaMA-2-7B at equal tokens, teacher and data, and the long runs."""
    model, suites = zoo.LLAMA2_7B, (CAST_7, WIKITEXT2_4096, WIKITEXT2_2048)
    one_shot: dict[str, tuple[str, Method]] = {
        "magnitude": ("Magnitude", MagnitudePruning()),
        "wanda": ("Wanda", Wanda(length=4096)),
        "sparsegpt": ("SparseGPT", SparseGPT(length=4096)),
    }
    # The published baselines keep AST's LLaMA learning rate; our own controls differ from SparseForge in nothing else.
    ast = replace(plan(model), lr=WarmupCosine(peak=2e-5, last=2e-6))
    retrained: dict[str, tuple[str, Method]] = {
        "naive": ("Naive retraining", FrozenMask(prior=MagnitudePruning())),
        "frozen-wanda": ("Frozen Wanda mask + KD", FrozenMask(prior=Wanda(length=4096))),
        "sr-ste": ("SR-STE", SRSTE()),
        "dense-control": ("Dense control", DenseControl()),
    }
    rows: list[tuple[str, str, Recipe, tuple[int, ...]]] = [("dense", "Dense", dense(model), (0,))]
    for row, (label, method) in one_shot.items():
        recipe = Recipe(model=model, method=method, corpus=zoo.C4, pattern=nm(2, 4))
        rows.append((row, label, recipe, (0,) if row == "magnitude" else SEEDS))
    for row, (label, method) in retrained.items():
        pattern = nm(2, 4) if method.sparsifies else None
        objective = TaskOnly() if row == "naive" else Distill()
        train = ast if row in ("naive", "sr-ste") else plan(model)
        recipe = Recipe(model=model, method=method, corpus=zoo.C4, pattern=pattern, objective=objective, train=train)
        rows.append((row, label, recipe, SEEDS))
    rows += [(row, label, recipe, SEEDS) for row, (label, recipe) in published_methods(model, ast).items()]
    dolmino = replace(forge(model), corpus=zoo.DOLMINO)
    rows.append(("sparseforge", "SparseForge (1.25B)", forge(model), SEEDS))
    rows.append(("sparseforge-dolmino", "SparseForge (1.25B, Dolmino)", dolmino, SEEDS))
    long = replace(dolmino, train=plan(model, LONG_TOKENS))
    rows.append(("sparseforge-5b", "SparseForge (5B, Dolmino)", long, SEEDS))
    return [
        Planned(
            recipe=recipe,
            variant=label,
            seeds=seeds,
            suites=suites,
            slots=(Slot(exhibit="table-2", row=row, label=label, suites=(CAST_7, WIKITEXT2_4096)),),
        )
        for row, label, recipe, seeds in rows
    ]


def published_methods(model: Hub, ast: TrainPlan) -> dict[str, tuple[str, Recipe]]:
    """The methods that come with a loss and a plan of their own, at the table's tokens: row -> label, recipe.

    AST: CE + 0.5 KL at T = 2, so a third of the sum is KL; its branch has k = 16. CAST: a third KL at T = 1, a rate
    that falls to zero (what its pressure leaves of a weight is of the last rate's order). MaskLLM: no teacher.
    """
    base = Recipe(model=model, method=AST(), corpus=zoo.C4, pattern=nm(2, 4), train=ast)
    with_kl = replace(base, objective=Distill(kl_weight=1 / 3, temperature=2.0))
    return {
        "maskllm": (
            "MaskLLM",
            replace(
                base,
                method=MaskLLM(prior=SparseGPT(length=4096)),
                train=replace(ast, lr=WarmupCosine(peak=5e-5, warmup=0.0, last=5e-6), eps=1e-5, weight_decay=0.1),
            ),
        ),
        "ast": ("AST", with_kl),
        "ast-slorb": ("AST + SLoRB", replace(with_kl, slorb=SLoRB(k=16))),
        "cast": (
            "CAST",
            replace(
                base,
                method=CAST(),
                objective=Distill(kl_weight=1 / 3),
                train=replace(ast, lr=WarmupLinear(peak=2e-5), betas=(0.9, 0.999)),
            ),
        ),
    }


def table_3() -> list[Planned]:
    """Ablations on LLaMA-2-7B."""
    suites = (ZERO_SHOT_7, WIKITEXT2_4096)
    dense_slot = (Slot(exhibit="table-3", row="dense", label="Dense"),)
    entries = [Planned(recipe=dense(zoo.LLAMA2_7B), variant="dense", suites=suites, slots=dense_slot)]
    for row, (label, recipe) in ABLATIONS.items():
        slot = Slot(exhibit="table-3", row=row, label=label)
        entries.append(Planned(recipe=recipe, variant=label, seeds=SEEDS, suites=suites, slots=(slot,)))
    return entries


def table_7() -> list[Planned]:
    """Decoding speed of LLaMA-2-7B, dense and 2:4."""
    return [
        Planned(
            recipe=recipe,
            variant=label,
            suites=(DECODE,),
            slots=(Slot(exhibit="table-7", row=f"LLaMA-2-7B/{variant}", label=f"LLaMA-2-7B {label}"),),
        )
        for variant, label, recipe in (
            ("dense", "dense", dense(zoo.LLAMA2_7B)),
            ("sparseforge", "SparseForge", forge(zoo.LLAMA2_7B)),
        )
    ]


def figure() -> list[Planned]:
    """Accuracy against tokens on LLaMA-2-7B."""
    model, suites = zoo.LLAMA2_7B, (CAST_7, WIKITEXT2_4096)
    entries = [
        Planned(
            recipe=recipe,
            variant=label,
            suites=suites,
            slots=(Slot(exhibit="accuracy-vs-tokens", row=f"{label}/0", label=label),),
        )
        for label, recipe in (
            ("Dense, untouched", dense(model)),
            ("Wanda", Recipe(model=model, method=Wanda(length=4096), corpus=zoo.C4, pattern=nm(2, 4))),
        )
    ]
    for tokens in (TOKENS // 4, TOKENS // 2, TOKENS, 2 * TOKENS, LONG_TOKENS):
        for label, recipe in (
            ("SparseForge", forge(model, tokens=tokens)),
            ("Dense control", Recipe(
                model=model, method=DenseControl(), corpus=zoo.C4, objective=Distill(), train=plan(model, tokens)
            )),
        ):  # fmt: skip
            slot = Slot(exhibit="accuracy-vs-tokens", row=f"{label}/{recipe.train.tokens}", label=label)
            entries.append(Planned(recipe=recipe, variant=label, seeds=SEEDS, suites=suites, slots=(slot,)))
    return entries


def _caption(what: str) -> str:
    return f"{what} Three seeds; C4 unless said; the finetune is counted in the tokens."


CAPTIONS = {
    "table-1": _caption("Dense against SparseForge 2:4, 1.25 B tokens, AST-7 mean and WikiText-2."),
    "table-2": _caption(
        "LLaMA-2-7B, 2:4, CAST-7. Methods with a loss and a plan of their own keep them, at these tokens and this data."
    ),
    "table-3": _caption("Ablations on LLaMA-2-7B, AST-7, 1.25 B tokens."),
    "table-4": _caption("Table 1 task by task."),
    "table-5": _caption("Dense against SparseForge block-16, 1.25 B tokens."),
    "table-6": _caption("Table 5 task by task."),
    "table-7": "LLaMA-2-7B decoding on one GPU, batch 1.",
    "accuracy-vs-tokens": _caption("LLaMA-2-7B, CAST-7 mean and WikiText-2 against retraining tokens."),
}


def _merge(entries: list[Planned]) -> tuple[Planned, ...]:
    """One entry for each recipe: seeds, suites and slots of all that name it."""
    merged: dict[Recipe, Planned] = {}
    for entry in entries:
        known = merged.get(entry.recipe)
        if known is None:
            merged[entry.recipe] = entry
            continue
        merged[entry.recipe] = replace(
            known,
            seeds=tuple(sorted({*known.seeds, *entry.seeds})),
            suites=tuple(dict.fromkeys((*known.suites, *entry.suites))),
            slots=(*(_pinned(s, known) for s in known.slots), *(_pinned(s, entry) for s in entry.slots)),
        )
    return tuple(merged.values())


def _pinned(slot: Slot, entry: Planned) -> Slot:
    """A slot that names its suites, so that merging does not widen it."""
    return slot if slot.suites else replace(slot, suites=entry.suites)


def _grid(name: str, title: str, entries: list[Planned]) -> Grid:
    merged = _merge(entries)
    shown = {slot.exhibit for entry in merged for slot in entry.slots}
    captions = {exhibit: text for exhibit, text in CAPTIONS.items() if exhibit in shown}
    return Grid(name=name, title=title, entries=merged, captions=captions, published=True)


def full() -> Grid:
    """Everything the paper shows."""
    parts = (tables_1_and_4, table_2, table_3, tables_5_and_6, table_7, figure)
    return _grid("full", "The whole paper", [entry for part in parts for entry in part()])


GRIDS = {
    "full": full,
    "table-1": lambda: _grid("table-1", "Table 1 (and 4)", tables_1_and_4()),
    "table-2": lambda: _grid("table-2", "Table 2", table_2()),
    "table-3": lambda: _grid("table-3", "Table 3", table_3()),
    "table-4": lambda: _grid("table-4", "Table 4 (and 1)", tables_1_and_4()),
    "table-5": lambda: _grid("table-5", "Table 5 (and 6)", tables_5_and_6()),
    "table-6": lambda: _grid("table-6", "Table 6 (and 5)", tables_5_and_6()),
    "table-7": lambda: _grid("table-7", "Table 7", table_7()),
    "ablations": lambda: _grid("ablations", "Ablations", table_3()),
    "figure": lambda: _grid("figure", "Accuracy against tokens", figure()),
}
