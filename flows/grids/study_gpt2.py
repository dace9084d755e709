"""The study's second model: GPT-2's shape, pretrained here on the books, then made sparse with untouched settings.

No peak, schedule or weight of an objective is chosen anew: every row is a contender of the study with what its trials
on SmolLM2-135M chose (`TUNED`), ours and one rival with their channels in order as there, on another architecture
(fused attention projection, learned positions, LayerNorm, GELU). What it shows is whether the winner was tuned to one
model.
"""

from __future__ import annotations

from flows.grids.planned import Grid, Planned, Slot
from flows.grids.study import BOOKS, KL, MILLION, OTHER_BOOKS, Contender, plan
from flows.grids.study_grid import MAIN, OURS, SEEDS, put_in_order, tuned, untrained
from sparseforge_core.data.corpora import TextFiles
from sparseforge_core.evaluate.suites import WIKITEXT2_1024, PerplexitySuite, Suite
from sparseforge_core.methods import DenseControl
from sparseforge_core.models.sources import Tiny, TokenizerDir
from sparseforge_core.recipe import Recipe, Trained, TrainPlan
from sparseforge_core.schedules import Constant, WarmupLinear

NAME = "gpt2-study"

ALL_BOOKS = TextFiles(
    paths=(*BOOKS.paths, "books/train-05.txt.xz", "books/train-06.txt.xz", "books/train-07.txt.xz"),
    sha256=(
        *BOOKS.sha256,
        "c4510769bf0800867a4c82cec31330a42a18e9c44add2a7e31ae49771a211c1e",
        "92c0f1fb4e6c86c3e3859185f4bbefe4a57468264d72a6f1fb6e68964a558621",
        "1efca7eecb19ae0817aeb031f9d99ef16e0aff4d92cfcd5293b38ad308243f43",
    ),
)
"""All eight shards: what the retraining reads was seen in pretraining, as of a model that comes with its own text."""

GPT2 = Tiny(
    architecture="gpt2",
    tokenizer=TokenizerDir(
        path="tokenizers/gpt2", sha256="a73a055627f30e6a530741d6dd925a75c90b616f098e3734501cd4ca0aae7315"
    ),
    width=768,
    layers=12,
    heads=12,
    positions=1024,
    mlp=3072,
)
"""GPT-2's shape, 124 million parameters, and its tokenizer."""

PRETRAINING = Recipe(
    model=GPT2,
    method=DenseControl(),
    corpus=ALL_BOOKS,
    train=TrainPlan(
        steps=5200,
        sequences=32,
        length=1024,
        lr=WarmupLinear(peak=8e-4),
        weight_decay=0.1,
        compute_dtype="bfloat16",
    ),
)
"""170 million tokens, each of the text's about twice: minutes of one GPU, a weak model. Its settings were not tuned."""
MODEL = Trained(recipe=PRETRAINING)

TEXTS: tuple[Suite, ...] = (
    PerplexitySuite(name="books-1024", text="named", window=1024, corpus=OTHER_BOOKS),
    WIKITEXT2_1024,
)
"""The study's texts in windows of 1,024 tokens, which is as far as the model's positions go."""
SUITES: tuple[Suite, ...] = (*TEXTS, KL)

ROWS: dict[str, tuple[int, ...]] = {
    "paper": (0,),
    "improved": SEEDS,
    "frozen-sparsegpt": SEEDS,
    "ast": (0,),
    "frozen-wanda": (0,),
    "dense-control": (0,),
}
"""Who runs, with which seeds: three for ours and for its strongest rival. What takes longest comes first, so that it
is not waited for at the end of a session."""
IN_ORDER = "frozen-sparsegpt"
"""The rival that is also shown with its channels in order, as ours has them, and as many seeds."""


def second(model: Trained = MODEL) -> Grid:
    """All of it, on a model that a cell makes."""
    entries = [
        _planned(row, contender, contender.recipe(0, model), (0,)) for row, (contender, _) in untrained(BOOKS).items()
    ]
    for row, seeds in ROWS.items():
        contender = OURS.contender(row, BOOKS)
        entries.append(_planned(row, contender, contender.recipe(MAIN * MILLION, model), seeds))
    rival = put_in_order(tuned(IN_ORDER, BOOKS))
    entries.append(_planned(f"{IN_ORDER}-in-order", rival, rival.recipe(MAIN * MILLION, model), ROWS[IN_ORDER]))
    title = "The study's second model: GPT-2's shape, pretrained here, all block linears 2:4"
    return Grid(name=NAME, title=title, entries=tuple(entries), captions={"table-2": CAPTION})


def _planned(row: str, contender: Contender, recipe: Recipe, seeds: tuple[int, ...]) -> Planned:
    slot = Slot(exhibit="table-2", row=row, label=contender.label, suites=TEXTS)
    return Planned(recipe=recipe, variant=contender.label, seeds=seeds, suites=SUITES, slots=(slot,))


CAPTION = (
    "GPT-2's shape (12 blocks of width 768, 124 million parameters, its tokenizer), pretrained here from random "
    f"weights on {PRETRAINING.train.tokens:,} tokens of eight shards of public-domain books, each about twice. All "
    f"block linears 2:4, {plan(MAIN * MILLION, Constant(value=0.0)).tokens:,} retraining tokens of five of the shards "
    "for the retrained rows, every setting as the trials on SmolLM2-135M chose it; SparseForge (improved) and the row "
    'that ends in "(in order)" have their channels in order, as there. Perplexity at window 1024, on nine '
    "books that no cell trains on (books-1024) and on the raw WikiText-2 test set; the tokenizer is another one than "
    "SmolLM2's, so numbers of the two models do not compare. A model of so little text answers questions by chance: no "
    "accuracy is measured."
)
