"""What finishing a stage stores: everything once, in one transaction, and nothing that cannot be read back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event

from sparseforge_core.errors import StoreError
from sparseforge_core.store import schema
from sparseforge_core.store.rows import Measurement
from sparseforge_core.store.store import ResultStore
from tests.stores import PERPLEXITY, PROVENANCE, plan, planned_cell, value

CELL = planned_cell("wanda")


@pytest.fixture
def store(store_url: str) -> Iterator[ResultStore]:
    opened = ResultStore(store_url)
    plan(opened, [CELL])
    yield opened
    opened.close()


def stored(store: ResultStore) -> dict[str, Any]:
    with store.engine.connect() as connection:
        rows = connection.execute(sa.select(schema.measurement)).all()
    return {row.metric: (row.value, row.stderr, row.n, row.detail) for row in rows}


def test_recording_twice_is_recording_once(store: ResultStore) -> None:
    attempt = store.claim(CELL.key, "train", PROVENANCE)
    store.finish(attempt, [value("loss", 1.5, 0.25, 8, window=128)], {"device": "cpu"}, "c0ffee")
    before, tries = stored(store), store.attempts(CELL.key)
    store.finish(attempt, [value("loss", 99.0)], {"device": "other"}, "bad")
    assert stored(store) == before == {"loss": (1.5, 0.25, 8, {"window": 128})}
    assert store.attempts(CELL.key) == tries


def test_stages_do_not_touch_each_other(store: ResultStore) -> None:
    store.finish(store.claim(CELL.key, "train", PROVENANCE), [value("loss", 1.5)], {})
    store.finish(store.claim(CELL.key, PERPLEXITY.key, PROVENANCE), [value("perplexity", 20.0)], {})
    assert set(stored(store)) == {"loss", "perplexity"}


@pytest.mark.parametrize("number", [None, math.nan, math.inf])
def test_a_diverged_number_is_null_and_says_so(store: ResultStore, number: float | None) -> None:
    attempt = store.claim(CELL.key, "train", PROVENANCE)
    with pytest.raises(StoreError, match="without being marked diverged"):
        store.finish(attempt, [value("loss", 1.0), value("perplexity", number)], {})
    assert stored(store) == {}
    store.finish(attempt, [value("perplexity", number, 0.5, 3, status="diverged")], {})
    assert stored(store) == {"perplexity": (None, None, 3, {"status": "diverged"})}
    assert store.fsck() == []


def test_a_stderr_that_is_not_finite_is_absent(store: ResultStore) -> None:
    store.finish(store.claim(CELL.key, "train", PROVENANCE), [value("loss", 1.0, math.nan)], {})
    assert stored(store)["loss"][1] is None


@pytest.mark.parametrize(
    ("measurements", "context", "sentence"),
    [
        ([value("loss", 1.0), value("loss", 2.0)], {}, "measurement loss .* comes twice"),
        ([value("loss", 1.0, spread=math.nan)], {}, "detail of measurement loss .* is no JSON"),
        ([value("loss", 1.0)], {"seconds": math.inf}, "context of stage train .* is no JSON"),
        ([value("loss", 1.0)], {"device": object()}, "context of stage train .* is no JSON"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_the_attempt_lives(
    store: ResultStore, measurements: list[Measurement], context: dict[str, Any], sentence: str
) -> None:
    attempt = store.claim(CELL.key, "train", PROVENANCE)
    with pytest.raises(StoreError, match=sentence):
        store.finish(attempt, measurements, context)
    assert stored(store) == {}
    assert store.heartbeat(attempt)


def test_a_database_that_fails_midway_leaves_nothing_and_finishing_again_works(store: ResultStore) -> None:
    attempt = store.claim(CELL.key, "train", PROVENANCE)

    def fail(_c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith("INSERT INTO measurement"):
            raise ConnectionResetError("the server went away")

    event.listen(store.engine, "before_cursor_execute", fail)
    with pytest.raises(ConnectionResetError):
        store.finish(attempt, [value("loss", 1.0)], {})
    event.remove(store.engine, "before_cursor_execute", fail)
    assert [a.status for a in store.attempts(CELL.key)] == ["running"]
    store.finish(attempt, [value("loss", 1.0)], {})
    assert stored(store)["loss"][0] == 1.0
    assert [a.status for a in store.attempts(CELL.key)] == ["done"]


def test_numbers_come_back_to_the_last_bit(store: ResultStore) -> None:
    numbers = {"third": 1 / 3, "tiny": 5e-324, "large": 1.7976931348623157e308, "minus": -0.1, "count": float(2**53)}
    rows = [value(name, number, number, 2**40) for name, number in numbers.items()]
    store.finish(store.claim(CELL.key, "train", PROVENANCE), rows, {})
    assert {name: row[:3] for name, row in stored(store).items()} == {k: (v, v, 2**40) for k, v in numbers.items()}
