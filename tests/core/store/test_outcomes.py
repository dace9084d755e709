"""Per-item outcomes and curves: from lines of files to the store and back, to the last bit."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseforge_core.store.curves import POINTS, curve_from, curve_row, curves_of
from sparseforge_core.store.outcomes import mean, outcomes_of, pack, unpack

QUESTION = {"task": "boolq", "split": "validation", "doc_id": 3, "doc_hash": "h", "acc": 1.0, "target": "1"}


@given(st.lists(st.one_of(st.none(), st.sampled_from([0.0, 1.0]))))
def test_questions_come_back(values: list[float | None]) -> None:
    assert unpack(pack(values)) == tuple(values)


@given(st.lists(st.one_of(st.none(), st.floats(allow_nan=False))))
def test_numbers_come_back_to_the_last_bit(values: list[float | None]) -> None:
    assert unpack(pack(values)) == tuple(values)


@pytest.mark.parametrize("body", [b"", b"bnonsense", b"x" + pack([1.0])[1:], b"d" + pack([1.0])[1:]])
def test_bytes_that_nobody_packed_are_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match="no packed outcomes"):
        unpack(body)


def test_lines_of_an_items_file() -> None:
    other = {**QUESTION, "doc_id": 4, "acc": 0.0, "acc_norm": 1.0}
    found = outcomes_of([QUESTION, other, {"window": 0, "nll": 2.5}, {"window": 1, "nll": None}, {"note": "none"}])
    assert {o.metric: o.values for o in found} == {
        "boolq/acc": (1.0, 0.0),
        "boolq/acc_norm": (1.0,),
        "nll": (2.5, None),
    }
    (first,) = outcomes_of([QUESTION])
    (second,) = outcomes_of([{**QUESTION, "acc": 0.0}])
    (third,) = outcomes_of([{**QUESTION, "doc_hash": "other"}])
    assert first.identity == second.identity != third.identity


def test_mean_of_outcomes() -> None:
    assert mean([1.0, 0.0, 1.0, 1.0]) == 0.75
    assert mean([]) is None
    assert mean([1.0, None]) is None


def test_curves_are_thinned_but_keep_their_ends() -> None:
    lines = [{"step": step, "scalars": {"loss": float(step), "tokens_per_second": 1.0}} for step in range(1, 1001)]
    lines.append({"step": 1000, "scalars": {"loss": None}})
    lines.append({"step": 10, "histogram": {"name": "mask/q", "edges": [0.0, 0.5, 1.0], "counts": [3, 1]}})
    lines.append({"event": "done", "detail": {}})
    loss, histogram = curves_of(lines)
    assert (loss.name, histogram.name) == ("loss", "histogram:mask/q")
    assert (loss.steps[0], loss.steps[-1], len(loss.steps)) == (1, 1000, POINTS)
    assert loss.values[-1] is None
    assert histogram.values == ([3, 1],)
    for curve in (loss, histogram):
        row = curve_row(curve)
        assert curve_from(row["name"], row["body"]) == curve
    assert all(math.isfinite(step) for step in loss.steps)
