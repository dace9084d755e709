"""One exhibit's data: its rows in order, and each row's values by metric and seed, checked for mixtures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from analysis.aggregate import Estimate, difference, half_width, over_seeds
from analysis.items import Bank, Items
from sparseforge_core.errors import SparseForgeError
from sparseforge_core.store.rows import PublishedNumber
from sparseforge_core.store.shown import MissingStage, ShownMeasurement, ShownSlot

CAPTION = "__caption__"
"""The row whose note is the exhibit's caption."""
DECODE = "decode_tokens_per_second/"
NLL = "nll"
"""The outcome of a window of text; its mean is the log of the perplexity."""
FOUND = "contaminated"
"""Share of a task's items that were found in the text that a row was retrained on."""
REFERENCES = ("dense", "dense-control")
"""Methods that prune nothing."""


class MixedSuites(SparseForgeError):
    """One column would hold numbers that do not compare: two suites, harness versions, splits or devices."""


@dataclass
class ExhibitRow:
    """A row: what it is, which seeds it should have, and its values."""

    row: str
    label: str
    tokens: int
    seeds: tuple[int, ...]
    method: str
    plans: frozenset[str]
    """Metrics that the row's suites define."""
    recipe: str
    """The key of its recipe."""
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    """By metric and seed."""
    errors: dict[str, dict[int, tuple[float, int]]] = field(default_factory=dict)
    """Standard error within a seed's measurement, and the number of its values, by metric and seed."""
    diverged: dict[str, int] = field(default_factory=dict)
    """How many seeds have no number because the model diverged, by metric."""
    reasons: dict[int, str] = field(default_factory=dict)
    """Why, by seed, where it is known."""
    missing: list[tuple[str, str, str]] = field(default_factory=list)
    """(cell, stage, status) of what is not done."""
    sources: dict[str, dict[int, tuple[str, str]]] = field(default_factory=dict)
    """(cell, stage) that each value comes from, by metric and seed."""
    contaminated: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(items found in the retraining corpus, items) by task; empty for a row that was not scanned."""
    unscanned: str = ""
    """Why the corpus was not scanned, where it should have been."""
    parts: dict[str, list[str]] = field(default_factory=dict)
    """The metrics whose items make another one's: the tasks of a mean."""
    bank: Bank = field(default_factory=lambda: Bank({}))
    """Where outcomes of single items are."""
    _estimates: dict[str, Estimate | None] = field(default_factory=dict)
    """What `estimate` has given, by metric: a table, its differences and its figures ask for the same."""

    def items(self, metric: str) -> Items | None:
        """Outcomes of the items behind a metric; None if a seed is not in or the store has no outcomes of it."""
        values = self.values.get(metric, {})
        if not values or set(values) != set(self.seeds):
            return None
        names = [NLL] if metric.endswith(":perplexity") else self.parts.get(metric, [metric])
        where = self.sources[metric]
        return self.bank.stack(tuple(tuple((*where[seed], name) for seed in sorted(values)) for name in names))

    @property
    def group(self) -> str:
        """The part of the row's name before the last slash: rows of one model belong together."""
        return self.row.rpartition("/")[0]

    @property
    def variant(self) -> str:
        """The part behind it."""
        return self.row.rpartition("/")[2]

    @property
    def is_reference(self) -> bool:
        """Whether the row is of a model that is not sparse."""
        return self.method in REFERENCES

    def estimate(self, metric: str) -> Estimate | None:
        """Over the seeds that have the metric."""
        if metric not in self._estimates:
            self._estimates[metric] = over_seeds(value for _, value in sorted(self.values.get(metric, {}).items()))
        return self._estimates[metric]

    def places(self, metric: str) -> tuple[tuple[str, str], ...]:
        """(cell, stage) behind each seed's value."""
        return tuple(place for _, place in sorted(self.sources.get(metric, {}).items()))

    def timed(self, metric: str) -> Estimate | None:
        """Like `estimate`, with the interval over the timed repeats of all seeds: speed does not depend on the seed."""
        found = self.estimate(metric)
        repeats = list(self.errors.get(metric, {}).values())
        freedom = sum(n - 1 for _, n in repeats)
        if found is None or len(repeats) < found.n or freedom < 1:
            return found
        error = math.sqrt(sum(error**2 for error, _ in repeats)) / len(repeats)
        return Estimate(found.mean, None, found.n, half_width(error, freedom + 1))

    def versus(self, reference: ExhibitRow | None, metric: str, *, log: bool = False) -> Estimate | None:
        """This row minus the reference, seed by seed where both have seeds; `log`: of the natural logarithms."""
        if reference is None:
            return None
        of, to = self.values.get(metric, {}), reference.values.get(metric, {})
        if log:
            of, to = ({seed: math.log(value) for seed, value in side.items()} for side in (of, to))
        return difference(of, to, one_of=len(self.seeds) == 1, one_to=len(reference.seeds) == 1)


@dataclass
class ExhibitData:
    """What a builder gets."""

    exhibit: str
    caption: str
    rows: list[ExhibitRow]
    suites: dict[str, dict[str, Any]]
    """The suites that the rows show, by name: the whole of each."""
    contexts: dict[str, dict[str, str]]
    """By suite name: harness version, device and the like, as far as all rows agree."""
    published: Sequence[PublishedNumber]

    @property
    def missing(self) -> list[tuple[str, str, str, str]]:
        """(row, cell, stage, status) of what is planned and not done."""
        return [(row.row, *gap) for row in self.rows for gap in row.missing]

    def row(self, name: str) -> ExhibitRow | None:
        """A row by name."""
        return next((row for row in self.rows if row.row == name), None)

    def metrics(self) -> set[str]:
        """Every metric that some row has."""
        return {metric for row in self.rows for metric in (*row.values, *row.diverged)}

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The shown suites of a kind, by name."""
        return [suite for _, suite in sorted(self.suites.items()) if suite["kind"] == kind]


def metric_name(suite: str, metric: str) -> str:
    """Perplexities of different suites are different columns; everything else goes by the task's name."""
    return f"{suite}:perplexity" if metric == "perplexity" else metric


def exhibit_data(
    exhibit: str,
    slots: Sequence[ShownSlot],
    measured: Sequence[ShownMeasurement],
    missing: Sequence[MissingStage],
    published: Sequence[PublishedNumber],
    suite_specs: Mapping[str, dict[str, Any]],
    bank: Bank | None = None,
) -> ExhibitData:
    """Collect an exhibit from its records among those of a grid, with a bank of their items' outcomes.

    Raises MixedSuites naming the column and the two versions, SparseForgeError for a row of a suite that is missing.
    """
    own_slots = [slot for slot in slots if slot.exhibit == exhibit]
    shown = [slot for slot in own_slots if slot.row != CAPTION]
    for slot in shown:
        for key in slot.suite_keys:
            if key not in suite_specs:
                raise SparseForgeError(
                    f"{exhibit}, row {slot.row}: the store does not hold suite {key}, which the row shows; plan the "
                    "grid again, which writes its suites: `sparseforge run GRID`"
                )
    rows = {slot.row: _row(slot, suite_specs, bank or Bank({})) for slot in shown}
    columns: dict[str, tuple[Any, ...]] = {}
    contexts: dict[str, dict[str, str]] = {}
    agreed: set[tuple[str, int]] = set()
    planned = {metric.rpartition(":")[2] for row in rows.values() for metric in row.plans}
    for record in measured:
        if record.exhibit != exhibit or (record.stage != "train" and record.metric not in planned):
            continue
        # One that diverged was not measured, and puts no number into the column.
        if record.stage != "train" and record.value is not None:
            _refuse_mixture(exhibit, record, columns)
            if (seen := (record.suite, id(record.context))) not in agreed:
                agreed.add(seen)
                _agree(contexts.setdefault(record.suite, {}), record.context)
        _add(rows[record.row], record)
    for gap in missing:
        if gap.exhibit == exhibit:
            rows[gap.row].missing.append((gap.cell_key, gap.stage, gap.status))
    caption = " ".join(slot.note for slot in own_slots if slot.row == CAPTION)
    return ExhibitData(exhibit, caption, list(rows.values()), _suites(exhibit, shown, suite_specs), contexts, published)


def _row(slot: ShownSlot, suite_specs: Mapping[str, dict[str, Any]], bank: Bank) -> ExhibitRow:
    plans = frozenset(metric for key in slot.suite_keys for metric in planned_metrics(suite_specs[key]))
    harness = [suite_specs[key] for key in slot.suite_keys if suite_specs[key]["kind"] == "zero-shot"]
    parts = {"mean/acc": [f"{task}/acc" for suite in harness for task in suite["tasks"]]}
    about = slot.tokens or 0, tuple(slot.seeds), str(slot.method)
    return ExhibitRow(slot.row, slot.label, *about, plans, str(slot.recipe_key), parts=parts, bank=bank)


def planned_metrics(suite: Mapping[str, Any]) -> list[str]:
    """The metrics that a table may show of a suite, by the names that rows keep them under."""
    if suite["kind"] == "zero-shot":
        return ["mean/acc", *(f"{task}/{metric}" for task in suite["tasks"] for metric in ("acc", "acc_norm", FOUND))]
    if suite["kind"] == "perplexity":
        return [metric_name(str(suite["name"]), "perplexity")]
    if suite["kind"] != "throughput":
        return []  # measured and stored, and shown in no table yet
    rates = [f"{DECODE}{prompt}x{output}" for prompt, output in suite["prompt_output"]]
    return [*rates, "weight_bytes_dense", "weight_bytes_packed"]


def _add(row: ExhibitRow, record: ShownMeasurement) -> None:
    metric, seed = metric_name(record.suite, record.metric), record.seed
    if not row.unscanned and (about := str(record.context.get("contamination", ""))).startswith("not scanned"):
        row.unscanned = about
    if record.value is None:
        row.diverged[metric] = row.diverged.get(metric, 0) + 1
        if (why := (record.detail or {}).get("why")) and (record.stage == "train" or seed not in row.reasons):
            row.reasons[seed] = str(why)
        return
    if metric.endswith(f"/{FOUND}"):
        task, of = metric.rpartition("/")[0], record.n
        row.contaminated[task] = max(row.contaminated.get(task, (0, of)), (round(record.value * of), of))
        return
    row.values.setdefault(metric, {})[seed] = record.value
    row.sources.setdefault(metric, {})[seed] = record.cell_key, record.stage
    if record.stderr is not None:
        row.errors.setdefault(metric, {})[seed] = record.stderr, record.n


def _suites(exhibit: str, slots: list[ShownSlot], specs: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    keys: dict[str, str] = {}
    for key in dict.fromkeys(key for slot in slots for key in slot.suite_keys):
        name = str(specs[key]["name"])
        if keys.setdefault(name, key) != key:
            raise MixedSuites(
                f"{exhibit} plans two suites that are both called {name!r} ({keys[name]} and {key}); give rows of one "
                "exhibit the same suite, or rename one of the two"
            )
    return {name: specs[key] for name, key in keys.items()}


def _refuse_mixture(exhibit: str, record: ShownMeasurement, columns: dict[str, tuple[Any, ...]]) -> None:
    metric = metric_name(record.suite, record.metric)
    detail = record.detail or {}
    found: tuple[Any, ...]
    if metric.startswith(DECODE):
        found = record.stage, "device", record.context.get("device"), "engine", detail.get("engine")
    else:
        found = record.stage, "lm-eval", record.context.get("harness_version"), "split", detail.get("split")
    known = columns.setdefault(metric, found)
    if known != found:
        raise MixedSuites(
            f"{exhibit}, column {metric}: some rows were measured with {_version(known)}, {record.row} with "
            f"{_version(found)}; evaluate all rows of a column alike"
        )


def _version(found: tuple[Any, ...]) -> str:
    stage, *about = found
    named = [f"{name} {value}" for name, value in zip(about[::2], about[1::2], strict=True) if value]
    return ", ".join([f"suite {stage}", *named])


def _agree(known: dict[str, str], context: Mapping[str, Any]) -> None:
    for name in ("harness_version", "device", "engine"):
        value = str(context.get(name, ""))
        known[name] = value if known.setdefault(name, value) == value else ""
