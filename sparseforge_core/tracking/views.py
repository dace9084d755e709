"""Saved views of an MLflow experiment: filter, columns, grouping and charts behind one link.

MLflow's pages keep a shared view in a tag of the experiment, as JSON of their own state, and open it by a key in the
address (`viewStateShareKey`, MLflow 3.17). So a link shows everybody the same table or the same charts, and following
it twice shows it twice. Knows the form of that state, and nothing of how to reach MLflow.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

TAG = "mlflow.sharedViewState."
WORKFLOW = "machine_learning"
"""Which of MLflow's menus stands beside the page: that of training, not that of language-model apps."""
LOSSES, SCORES, SEEDS = "losses", "scores", "seeds"
TRAINING = "Training"
CURVES = (
    (TRAINING, "loss/total"),
    (TRAINING, "loss/task"),
    ("Mask", "mask/mid_fraction"),
    ("Mask", "mask/soft_hard_gap"),
    ("Mask", "mask/flip_rate"),
    (TRAINING, "grad_norm"),
)
"""Charts of the training, by section."""
ABOUT = ("variant", "pattern", "tokens", "seed", "method", "cell_key")
"""Tags that are columns."""
PRETRAINING = "pretraining"
"""The tag `variant` of a cell whose model other cells start from."""
BEST = ("perplexity", "mean/acc")
"""Ends of the scores that people look at first."""


@dataclass(frozen=True)
class View:
    """A saved view of the experiment of one model."""

    name: str
    about: str
    charts: bool
    """Whether it opens on charts instead of the table."""
    state: dict[str, Any]

    def key(self, grid: str) -> str:
        """What the address names it by."""
        return f"{grid}-{self.name}"

    def tag(self, grid: str) -> tuple[str, str]:
        """The experiment's tag that holds it."""
        return TAG + self.key(grid), json.dumps(self.state, sort_keys=True, separators=(",", ":"))

    def address(self, server: str, experiment: str, grid: str) -> str:
        """The link to it."""
        mode = f"&workflowType={WORKFLOW}" + ("&compareRunsMode=CHART" if self.charts else "")
        return f"{server.rstrip('/')}/#/experiments/{experiment}/runs?viewStateShareKey={self.key(grid)}{mode}"


def views_of(grid: str, scores: Sequence[str]) -> tuple[View, ...]:
    """The views of one experiment in a grid; `scores` are names of the metrics that its suites have given."""
    first = [name for end in BEST for name in scores if name.endswith(end)] or list(scores[:2])
    facets = {"searchFilter": f"tags.grid = '{grid}'", "startTime": "ALL", "lifecycleFilter": "Active"}
    newest = {"orderByKey": "attributes.start_time", "orderByAsc": True}
    best = {"orderByKey": _column("metrics", first[0]), "orderByAsc": not first[0].endswith("acc")} if first else newest
    together = {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "group"}]}
    table = {"selectedColumns": _columns(first)}
    # a model's own pretraining is many times as long, and would press every other curve into the axis
    retrained = {**facets, "searchFilter": f"tags.grid = '{grid}' AND tags.variant != '{PRETRAINING}'"}
    losses = {**retrained, **newest, **table, "groupBy": together, **_charts("LINE", CURVES)}
    seeds = {
        **retrained,
        **newest,
        **table,
        "groupBy": together,
        **_charts("BAR", [("Scores", name) for name in scores]),
    }
    everyone = {"runsHiddenMode": "SHOW_ALL", "hideEmptyCharts": True, "useGroupedValuesInCharts": True}
    return (
        View(SCORES, "a table of every run, best first", False, {**facets, **best, **table, "groupBy": None}),
        View(LOSSES, "curves of training and mask, the seeds of a recipe as one line", True, {**losses, **everyone}),
        View(SEEDS, "what suites measured, the seeds of a recipe as one bar", True, {**seeds, **everyone}),
    )


def _column(kind: str, name: str) -> str:
    return f"{kind}.`{name}`"


def _columns(scores: Iterable[str]) -> list[str]:
    return [*(_column("tags", name) for name in ABOUT), *(_column("metrics", name) for name in scores)]


def _charts(kind: str, wanted: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Cards and the sections that they stand in, as the page keeps them."""
    sections = {name: f"sparseforge-{name.lower()}" for name, _ in wanted}
    cards = []
    for section, metric in wanted:
        card: dict[str, Any] = {"type": kind, "uuid": f"{kind}-{metric}", "metricKey": metric}
        card |= {"metricSectionId": sections[section], "deleted": False, "isGenerated": False, "runsCountToCompare": 50}
        if kind == "LINE":
            scale = "log" if section == TRAINING else "linear"  # a linear axis begins at 0, far below any loss
            card |= {"selectedMetricKeys": [metric], "xAxisKey": "step", "scaleType": scale, "lineSmoothness": 0}
            card |= {"useGlobalXaxisKey": True, "useGlobalLineSmoothing": True, "displayPoints": False}
        cards.append(card)
    shown = {"display": True, "isReordered": False, "deleted": False, "isGenerated": False}
    return {
        "isAccordionReordered": True,  # else the page sorts its own sections before ours
        "compareRunCharts": cards,
        "compareRunSections": [{"uuid": uuid, "name": name, **shown} for name, uuid in sections.items()],
    }
