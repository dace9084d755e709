"""Numbers quoted from papers and their repositories, each with its source. Nothing here was measured by this project.

Columns carry the titles of our own tables, values their printed units: percent, perplexity, tokens. A cell that a paper
leaves empty has no number here, and a perplexity whose window the source does not state stays in a column of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sparseforge_core.store.rows import PublishedNumber

PAPER = "SparseForge, arXiv 2605.06402"
WANDA = "Wanda repository, README, commit 8e8fc87: WikiText-2 at window 4096"
README = "the authors' repository, README, commit a7fd22f"
AST = "Adaptive-Sparse-Trainer repository, README, commit 723d742"
BILLION = 1e9

CAST_TASKS = ("Tokens", "HellaSwag", "RACE", "PIQA", "WinoGrande", "ARC-e", "ARC-c", "OBQA", "Avg", "PPL")

TABLE_2 = {
    "Dense": "- 57.18 39.52 78.07 69.06 76.26 43.52 31.40 56.43 5.12",
    "Wanda": "0 41.05 35.02 70.78 62.67 61.99 27.56 22.80 45.98 11.29",
    "SparseGPT": "0 43.36 36.84 71.38 63.69 62.84 29.18 22.80 47.16 10.42",
    "MaskLLM": "2B 50.91 40.77 74.92 64.48 69.57 36.00 28.00 52.09 6.72",
    "Naive retrain": "10B 53.90 38.28 76.61 68.27 75.21 41.21 29.60 54.73 5.78",
    "SR-STE": "10B 54.02 39.02 76.88 68.35 75.58 41.46 29.60 54.99 5.74",
    "AST": "7.5B 54.66 - - 67.87 73.61 39.93 28.60 - -",
    "AST + SLoRB": "7.5B 55.24 - - 68.48 74.91 41.11 29.40 - -",
    "CAST": "7.5B 54.50 40.48 77.09 68.27 76.52 43.68 30.80 55.91 5.58",
    "CAST (40B)": "40B 56.13 40.86 77.58 69.53 77.78 47.18 33.60 57.52 5.21",
    "SparseForge": "1.25B 52.95 41.15 75.46 69.14 76.35 43.86 32.80 55.96 6.24",
    "SparseForge (5B)": "5B 54.42 41.63 76.88 69.69 77.95 45.31 35.00 57.27 6.09",
}
"""Row: the columns of `CAST_TASKS`; LLaMA-2-7B."""

WANDA_PERPLEXITIES = {"Dense": "5.12", "Magnitude": "54.59", "SparseGPT": "10.17", "Wanda": "11.02"}
"""LLaMA-2-7B, 2:4, one-shot."""

TABLE_3 = {
    "Dense": "59.71 5.1983",
    "SparseForge (full)": "57.23 6.3823",
    "SparseForge (Dolmino)": "59.22 6.1037",
    "w/ 10k steps": "55.89 6.4755",
    "w/ magnitude score": "55.61 6.5275",
    "w/o SLoRB": "55.04 6.3617",
    "w/ larger teacher (13B)": "54.87 6.6089",
    "w/o distillation": "55.72 6.6594",
}
"""Row: mean accuracy, perplexity; LLaMA-2-7B, C4 and 20,000 steps unless said."""

TABLE_1 = {
    "GPT-2-Medium": "40.97 40.31 21.80 25.90",
    "GPT-2-Large": "42.76 42.10 18.95 23.57",
    "GPT-2-XL": "45.49 44.34 17.12 20.53",
    "OPT-2.7B": "47.76 46.67 12.45 15.14",
    "Qwen3-1.7B": "56.51 53.33 15.56 10.54",
    "Qwen3-8B": "65.73 63.31 8.97 8.03",
    "Qwen3-14B": "68.36 65.44 7.89 7.17",
    "DeepSeek-MoE-16B": "59.54 58.57 6.28 6.92",
}
"""Row: mean accuracy dense and sparse, perplexity dense and sparse."""

TABLE_1_DIFFERENCES = {
    "GPT-2-Medium": "-0.66",
    "GPT-2-Large": "-0.66",
    "GPT-2-XL": "-1.15",
    "OPT-2.7B": "-1.09",
    "Qwen3-1.7B": "-3.18",
    "Qwen3-8B": "-2.42",
    "Qwen3-14B": "-2.93",
    "DeepSeek-MoE-16B": "-0.97",
}
"""As the authors print them beside the same pairs of accuracies; -2.93 is -2.92 from the printed pair, by rounding."""

TABLE_5 = {
    "LLaMA-2-7B": "59.70 59.02",
    "OPT-2.7B": "47.76 47.93",
    "GPT-2": "37.13 37.58",
    "GPT-2-Medium": "41.01 39.45",
    "GPT-2-Large": "42.65 41.87",
    "GPT-2-XL": "45.49 45.14",
    "Qwen3-1.7B": "56.47 53.49",
    "DeepSeek-MoE-16B": "59.54 58.20",
}
"""Row: mean accuracy dense and block-16."""

AST_TASKS = {
    "BoolQ": "73.12",
    "RTE": "66.06",
    "HellaSwag": "54.66",
    "WinoGrande": "67.87",
    "ARC-e": "73.61",
    "ARC-c": "39.93",
    "OBQA": "28.60",
    "Mean": "57.68",
}
"""LLaMA-2-7B, AST without its side branch."""

AST_PERPLEXITIES = {
    "GPT-2": "29.95 115.64 50.09 32.23 31.13",
    "GPT-2-Medium": "21.72 63.71 31.03 23.65 23.03",
    "GPT-2-Large": "19.43 49.97 25.98 21.29 20.66",
    "GPT-2-XL": "17.40 30.44 21.14 18.33 18.01",
    "OPT-125M": "27.76 - - - 28.68",
    "OPT-350M": "22.00 - - - 24.03",
    "OPT-1.3B": "14.62 - - - 15.43",
}
"""Row: WikiText-2 perplexity dense, Wanda, SparseGPT, AST (naive), AST with its side branch (boosted)."""
AST_VARIANTS = ("Dense", "Wanda", "SparseGPT", "AST", "AST + SLoRB")

SUMMARY = ("Dense acc", "SparseForge acc", "Dense PPL", "SparseForge PPL")


def _row(exhibit: str, row: str, columns: Iterable[str], texts: Iterable[str], source: str) -> list[PublishedNumber]:
    """Numbers as printed; '-' is a cell that the source leaves empty, a final B means billions."""
    return [
        PublishedNumber(
            exhibit=exhibit, row=row, column=column, value=_value(text), text=text, source=source, position=0
        )
        for column, text in zip(columns, texts, strict=True)
        if text != "-"
    ]


def _value(text: str) -> float:
    return float(text[:-1]) * BILLION if text.endswith("B") else float(text)


def _summary(
    exhibit: str, rows: Mapping[str, str], source: str, differences: Mapping[str, str]
) -> list[PublishedNumber]:
    found = []
    for name, line in rows.items():
        texts = line.split()
        found += _row(exhibit, name, SUMMARY[: len(texts)], texts, source)
        if name in differences:
            found += _row(exhibit, name, ("Difference",), (differences[name],), source)
    return found


def _table_2() -> list[PublishedNumber]:
    found = []
    for name, line in TABLE_2.items():
        found += _row("table-2", name, CAST_TASKS, line.split(), f"{PAPER}, Table 2")
    for name, perplexity in WANDA_PERPLEXITIES.items():
        found += _row("table-2", f"{name} (Wanda's README)", ("PPL",), (perplexity,), WANDA)
    return found


def _table_3() -> list[PublishedNumber]:
    found = []
    for name, line in TABLE_3.items():
        found += _row("table-3", name, ("Mean", "PPL"), line.split(), f"{PAPER}, Table 3")
    return found


def _table_7() -> list[PublishedNumber]:
    source = f"{PAPER}, Table 7 (TensorRT-LLM, one H800, LLaMA-2-7B)"
    return [
        *_row("table-7", "Low-batch decoding (tokens/s)", ("Dense", "2:4"), ("75", "109"), source),
        *_row("table-7", "Decoding, smallest speed-up", ("Ratio",), ("1.40",), source),
        *_row("table-7", "Decoding, largest speed-up", ("Ratio",), ("1.44",), source),
        *_row("table-7", "Weights (GB)", ("Dense", "2:4"), ("12.55", "7.31"), source),
    ]


def _figure() -> list[PublishedNumber]:
    """What Table 2 says of a method's tokens, on the same seven tasks; rows are '<method>/<tokens>'."""
    source = f"{PAPER}, Table 2"
    found = []
    for name, line in TABLE_2.items():
        tokens, *_, mean, perplexity = line.split()
        method = "Dense, untouched" if name == "Dense" else name.partition(" (")[0]
        row = f"{method}/{0 if tokens == '-' else _value(tokens):.0f}"
        found += _row("accuracy-vs-tokens", row, ("accuracy (cast-7)", "perplexity"), (mean, perplexity), source)
    return found


def _reproductions() -> list[PublishedNumber]:
    """Perplexities that can be checked at small size, a row for each model and method."""
    found = []
    for model, line in AST_PERPLEXITIES.items():
        for variant, text in zip(AST_VARIANTS, line.split(), strict=True):
            found += _row("reproductions", f"{model} {variant}", ("PPL",), (text,), AST)
    for variant, text in WANDA_PERPLEXITIES.items():
        found += _row("reproductions", f"LLaMA-2-7B {variant}", ("PPL",), (text,), WANDA)
    return found


def _numbered(numbers: Iterable[PublishedNumber]) -> tuple[PublishedNumber, ...]:
    return tuple(PublishedNumber(**{**vars(number), "position": position}) for position, number in enumerate(numbers))


PUBLISHED: tuple[PublishedNumber, ...] = _numbered(
    [
        *_summary("table-1", TABLE_1, f"{PAPER}, Table 1; differences from {README}", TABLE_1_DIFFERENCES),
        *_table_2(),
        *_table_3(),
        *_row("table-4", "LLaMA-2-7B AST", AST_TASKS, AST_TASKS.values(), AST),
        *_summary("table-5", TABLE_5, f"{PAPER}, Appendix B", {}),
        *_table_7(),
        *_figure(),
        *_reproductions(),
    ]
)
"""In the papers' order. No number is computed here: a difference that nobody prints is not quoted."""

FIGURE_2 = PublishedNumber(
    exhibit="figure-2",
    row="SparseForge (Dolmino)",
    column="Mean",
    value=59.20,
    text="59.20",
    source=f"{PAPER}, Figure 2",
    position=0,
)
"""Quoted for the auditor only: the paper's figure prints one mean of Table 3 again."""

TWICE: tuple[tuple[tuple[str, str, str], tuple[str, str, str]], ...] = (
    *((("table-5", model, "Dense acc"), ("table-1", model, "Dense acc")) for model in TABLE_5 if model in TABLE_1),
    (("table-5", "LLaMA-2-7B", "Dense acc"), ("table-3", "Dense", "Mean")),
    (("table-2", "Dense", "PPL"), ("table-3", "Dense", "PPL")),
    (("figure-2", "SparseForge (Dolmino)", "Mean"), ("table-3", "SparseForge (Dolmino)", "Mean")),
)
"""Places of the paper that state one quantity: the same dense models under the same tasks, and one mean of ours."""

NOT_AT_HAND = (
    "Table 4, Qwen3-8B: mean and difference are known to be wrong; the paper's numbers by task are not quoted here",
    "Table 5, GPT-2-Large: the printed difference is known to be wrong; only its pair of accuracies is quoted here",
)
"""Known errors that the auditor cannot find, because the numbers that they contradict are not among the quoted ones.

The paper's abstract and the authors' README can be had without a network, its tables cannot; `docs/auditing.md` says
what was searched and what the auditor would do with the two rows.
"""
