"""Saved views of MLflow: what they filter, group, chart and show, in the form in which its pages keep them."""

from __future__ import annotations

import json

import pytest

from sparseforge_core.tracking.views import CURVES, LOSSES, SCORES, SEEDS, TAG, View, views_of

NAMES = ("eval/zero-shot-7/mean/acc", "eval/wikitext2-4096/perplexity")


def named(name: str) -> View:
    return next(view for view in views_of("demo", NAMES) if view.name == name)


def test_every_view_shows_its_grid_and_nothing_else() -> None:
    for view in views_of("demo", NAMES):
        everything = "tags.grid = 'demo'"
        without = f"{everything} AND tags.variant != 'pretraining'"
        assert view.state["searchFilter"] == (without if view.charts else everything)
        assert view.state["lifecycleFilter"] == "Active"
        tag, body = view.tag("demo")
        assert tag == f"{TAG}demo-{view.name}"
        assert json.loads(body) == view.state


def test_scores_are_a_table_with_the_lowest_perplexity_first() -> None:
    state = named(SCORES).state
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`eval/wikitext2-4096/perplexity`", True)
    assert "tags.`variant`" in state["selectedColumns"]
    assert "metrics.`eval/zero-shot-7/mean/acc`" in state["selectedColumns"]
    accuracy = next(view for view in views_of("demo", NAMES[:1]) if view.name == SCORES).state
    assert accuracy["orderByAsc"] is False


@pytest.mark.parametrize(("name", "kind", "count"), [(LOSSES, "LINE", len(CURVES)), (SEEDS, "BAR", len(NAMES))])
def test_charts_hold_the_seeds_of_a_recipe_together(name: str, kind: str, count: int) -> None:
    state = named(name).state
    assert state["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "group"}]
    cards, sections = state["compareRunCharts"], state["compareRunSections"]
    assert [card["type"] for card in cards] == [kind] * count
    assert len({card["uuid"] for card in cards}) == count
    scales = {card["metricKey"]: card.get("scaleType") for card in cards if kind == "LINE"}
    assert all(scale == ("linear" if "mask/" in metric else "log") for metric, scale in scales.items())
    assert {card["metricSectionId"] for card in cards} == {section["uuid"] for section in sections}


def test_addresses_open_the_view_in_its_mode() -> None:
    base = "http://here:5000/#/experiments/7/runs?viewStateShareKey=demo-"
    assert named(SCORES).address("http://here:5000/", "7", "demo") == f"{base}scores&workflowType=machine_learning"
    assert named(LOSSES).address("http://here:5000", "7", "demo") == (
        f"{base}losses&workflowType=machine_learning&compareRunsMode=CHART"
    )


def test_an_experiment_without_scores_has_views_too() -> None:
    state = next(view for view in views_of("demo", ()) if view.name == SCORES).state
    assert state["orderByKey"] == "attributes.start_time"
