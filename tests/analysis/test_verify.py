"""From a printed number to its items: sound stores verify, and every kind of tampering is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from analysis.make_tables import collect
from analysis.verify import find, origin_text, places_of, recomputed, trace_lines, verification_lines, verify
from flows.cycle import record
from sparseforge_core import files, measured
from sparseforge_core.errors import SparseForgeError
from sparseforge_core.store import schema
from sparseforge_core.store.outcomes import pack
from sparseforge_core.store.results import Results
from sparseforge_core.store.store import ResultStore
from tests.analysis.filled import Filled, everything
from tests.stores import PERPLEXITY, PROVENANCE, ZERO_SHOT, plan, planned_cell, planned_slot

CELL = planned_cell("forge")
QUESTIONS = [
    {"task": task, "split": "validation", "doc_id": number, "doc_hash": f"h{number}", "acc": float(number % 3 > 0)}
    for task in ("boolq", "rte")
    for number in range(10)
]


class World:
    """A home with one measured cell: its files, and the store that recorded them."""

    def __init__(self, folder: Path) -> None:
        self.cells = folder / "cells"
        self.url = f"sqlite:///{folder / 'store.db'}"
        self.store = ResultStore(self.url)
        plan(self.store, [CELL], [planned_slot(CELL)])
        rate = sum(item["acc"] for item in QUESTIONS[:10]) / 10
        rows = {"boolq/acc": rate, "rte/acc": rate, "mean/acc": rate}
        self._stage(ZERO_SHOT.key, rows, QUESTIONS, {"tasks": ["boolq", "rte"]})
        nats = [{"window": number, "nll": 2.0 + number / 7} for number in range(5)]
        mean = sum(item["nll"] for item in nats) / 5
        self._stage(PERPLEXITY.key, {"nll": mean, "perplexity": 2.718281828459045**mean}, nats, {})

    def _stage(self, stage: str, values: dict[str, float], items: list[dict[str, object]], detail: object) -> None:
        folder = self.cells / CELL.key / stage
        files.write_text(folder / "items.jsonl", "".join(json.dumps(item) + "\n" for item in items))
        rows = [{"metric": m, "value": v, "stderr": None, "n": 10, "detail": detail} for m, v in values.items()]
        body = {
            "cell": CELL.key,
            "stage": stage,
            "suite": None,
            "context": {"device": "cpu", "torch": "2.13", "data_sha256": "dd"},
            "measurements": rows,
        }
        record(self.store, self.store.claim(CELL.key, stage, PROVENANCE), measured.write(folder, body))

    def change(self, statement: sa.sql.expression.UpdateBase) -> None:
        with self.store.engine.begin() as connection:
            connection.execute(statement)

    def problems(self) -> str:
        return "\n".join(verify(Results(self.url), self.cells).problems)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_sound_store_verifies_down_to_its_files(world: World) -> None:
    found = verify(Results(world.url), world.cells)
    assert found.problems == []
    assert (found.entries, found.stages, found.measurements, found.files) == (2, 2, 5, 2)
    assert verification_lines(found)[-1] == "everything matches"
    assert found.as_json()["sound"] is True


def test_without_the_files_the_store_alone_is_checked(world: World) -> None:
    assert verify(Results(world.url), None).files == 0
    found = verify(Results(world.url), world.cells.parent / "elsewhere")
    assert len(found.absent) == 2
    assert found.problems == []
    assert "not on this machine" in "\n".join(verification_lines(found))


def test_a_changed_value_contradicts_its_items_and_the_log(world: World) -> None:
    table = schema.measurement
    world.change(sa.update(table).where(table.c.metric == "boolq/acc").values(value=0.9))
    said = world.problems()
    assert "boolq/acc of stage zero-shot-7-bbbbbb of cell" in said
    assert "is stored as 0.9, its items give 0.6" in said
    assert "measurement boolq/acc: the log says" in said


def test_changed_outcomes_contradict_the_file_the_value_and_the_log(world: World) -> None:
    table = schema.outcome
    world.change(sa.update(table).where(table.c.metric == "rte/acc").values(body=pack([1.0] * 10)))
    said = world.problems()
    assert "outcomes of rte/acc in the store are not those of" in said
    assert "rte/acc of stage" in said
    assert "mean/acc of stage" in said
    assert "outcomes rte/acc: the log says" in said


def test_bytes_that_are_no_outcomes_are_named(world: World) -> None:
    world.change(sa.update(schema.outcome).values(body=b"junk"))
    assert "cannot be read" in world.problems()


def test_a_changed_items_file_is_named(world: World) -> None:
    path = world.cells / CELL.key / ZERO_SHOT.key / "items.jsonl"
    path.write_text(path.read_text().replace('"acc": 0.0', '"acc": 1.0', 1))
    said = world.problems()
    assert f"{path} was altered" in said
    assert "the log" not in said


def test_a_changed_log_entry_is_named(world: World) -> None:
    table = schema.ledger
    body = sa.func.replace(table.c.body, "0.6", "0.7")
    world.change(sa.update(table).where(table.c.id == 1).values(body=body))
    assert "entry 1 of the results log" in world.problems()
    assert "was altered: its text does not give its hash" in world.problems()


def test_a_changed_value_with_a_rewritten_log_still_contradicts_the_items(world: World) -> None:
    from sparseforge_core.store import ledger

    table = schema.measurement
    world.change(sa.update(table).where(table.c.metric == "nll").values(value=1.0))
    world.change(sa.delete(schema.ledger))
    with world.store.engine.begin() as connection:
        ledger.adopt(connection)
    said = world.problems()
    assert "nll of stage heldout-aaaaaa" in said
    assert "the log" not in said


def test_a_number_without_an_answer_stays_without_one() -> None:
    measured = {"nll": (None, {}), "perplexity": (None, {}), "x/acc": (0.5, {})}
    assert recomputed({"nll": (1.0, None)}, measured) == {"nll": None, "perplexity": None}
    assert recomputed({"nll": (800.0,)}, measured)["perplexity"] is None


def test_from_a_cell_of_a_table_to_its_origins(sqlite_url: str) -> None:
    everything().write(sqlite_url).close()
    results = Results(sqlite_url)
    exhibits = collect(results, "demo").exhibits
    trace = find(exhibits, "table-2", "SparseForge", "Avg")
    assert len(trace.cell.sources) == 2
    lines = trace_lines(trace, results, "demo")
    assert lines[0].startswith("table-2, SparseForge, Avg: 0.3225 (n 2)")
    text = "\n".join(lines)
    for part in (
        "    attempt ",
        "    made by attempt ",
        "commit 0123abc, with changes (not hashed); lock ff",
        "items c0ffee",
        "results log, entry",
    ):
        assert text.count(part) == 2
    assert places_of([trace.table]) > set(trace.cell.sources)
    found = verify(results, None, trace.cell.sources)
    assert (found.stages, found.problems) == (2, [])


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        (("table-9", "a", "b"), "unknown table 'table-9'"),
        (("table-2", "SparseForgf", "Avg"), "Did you mean 'SparseForge'?"),
        (("table-2", "wanda", "Averag"), "unknown column 'Averag'"),
    ],
)
def test_a_place_that_is_not_there_gets_the_nearest(
    sqlite_url: str, place: tuple[str, str, str], sentence: str
) -> None:
    everything().write(sqlite_url).close()
    exhibits = collect(Results(sqlite_url), "demo").exhibits
    with pytest.raises(SparseForgeError) as refused:
        find(exhibits, *place)
    assert sentence in str(refused.value)


def test_an_empty_place_says_so(sqlite_url: str) -> None:
    grid = Filled()
    grid.row("table-2", "a", "A", {}, done=())
    grid.write(sqlite_url).close()
    results = Results(sqlite_url)
    trace = find(collect(results, "demo").exhibits, "table-2", "a", "Avg")
    assert trace_lines(trace, results, "demo") == ["table-2, A, Avg: no result yet"]
    assert origin_text(("c-s1", "s"), {}) == "cell c-s1 (seed 1), stage s: not done"


def test_a_measured_number_leads_to_the_text_and_the_model_behind_it() -> None:
    def origin(attempt: int, **context: str) -> dict[str, Any]:
        about = {"git_sha": f"commit{attempt}", "dirty": attempt == 1, "diff_sha": "d" * 64, "lock_sha": "1" * 64}
        about |= {"attempts": 1, "finished": "", "flow_run_id": "", "command": "run", "host": "h", "items_sha256": None}
        return {**about, "attempt": attempt, "entry": attempt, "digest": "e", "device": "", "context": context}

    made = origin(1, data_sha256="dd", model_sha256="mm", device="H200")
    origins = {("c-s1", "train"): made, ("c-s1", "s"): origin(2, harness_version="0.4.13", device="cpu")}
    said = origin_text(("c-s1", "s"), origins)
    wanted = ("data dd", "model mm", "made by attempt 1 at commit commit1, with changes on H200", "cpu, lm-eval 0.4.13")
    assert all(text in said for text in wanted), said
    own = origin_text(("c-s1", "train"), origins)
    assert "model mm" in own
    assert "made by" not in own, "it is that attempt"


def test_stages_from_before_outcomes_rest_on_the_log(sqlite_url: str) -> None:
    grid = everything()
    grid.with_items = False
    grid.write(sqlite_url).close()
    found = verify(Results(sqlite_url), None)
    assert found.problems == []
    assert found.without_items
    assert "log only" in "\n".join(verification_lines(found))
