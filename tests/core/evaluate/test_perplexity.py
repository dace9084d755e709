"""Perplexity against the formula written out, and what defines it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
import transformers

from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.data.tokens import tokenize_once
from sparseforge_core.errors import DataError, RecipeError
from sparseforge_core.evaluate.perplexity import c4_validation, perplexity, wikitext2_test, window_losses
from sparseforge_core.evaluate.suites import PerplexitySuite
from tests.core.evaluate.subjects import tiny_subject
from tests.tiny import tiny_model, tokens

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


def test_the_loss_of_a_window_is_the_formula() -> None:
    model, ids = tiny_model("llama"), tokens(3, 12)
    losses = window_losses(model, ids)
    for row, loss in zip(ids, losses, strict=True):
        with torch.no_grad():
            logits = model(row[None]).logits[0].double()
        total = sum(float(logits[t].logsumexp(0) - logits[t, row[t + 1]]) for t in range(len(row) - 1))
        assert float(loss) == pytest.approx(total / (len(row) - 1), rel=1e-5)


def measured(suite: PerplexitySuite, home: Path, batch_size: int = 4) -> dict[str, object]:
    subject = tiny_subject(home, batch_size=batch_size, positions=64, items_dir=home / f"items-{batch_size}")
    result = perplexity(subject, suite)
    available = tokenize_once(subject.corpus, "heldout", subject.tokenizer, home).tokens
    return {"rows": {row["metric"]: row for row in result.measurements}, "items": result.items, "tokens": available}


def test_windows_do_not_overlap_and_everything_that_defines_the_number_is_stored(home: Path) -> None:
    found = measured(PerplexitySuite(name="heldout", text="heldout", window=16), home)
    row = found["rows"]["perplexity"]  # type: ignore[index]
    windows = found["tokens"] // 16  # type: ignore[operator]
    assert row["detail"]["windows"] == windows == len(found["items"])  # type: ignore[arg-type]
    assert row["n"] == windows * 15
    assert {"window", "stride", "bos", "text", "sha256"} <= set(row["detail"])
    nll = sum(item["nll"] for item in found["items"]) / windows  # type: ignore[attr-defined]
    assert row["value"] == pytest.approx(math.exp(nll), rel=1e-9)


def test_the_batch_size_does_not_change_the_answer(home: Path) -> None:
    suite = PerplexitySuite(name="heldout", text="heldout", window=16, limit=9)
    one, many = (measured(suite, home, batch_size=size)["rows"]["nll"]["value"] for size in (1, 9))  # type: ignore[index]
    assert one == pytest.approx(many, rel=1e-6)


def test_an_interrupted_pass_goes_on_with_the_windows_left(home: Path) -> None:
    suite = PerplexitySuite(name="heldout", text="heldout", window=16, limit=12)
    whole = perplexity(tiny_subject(home, batch_size=4, items_dir=home / "whole"), suite)
    broken, forwards = tiny_subject(home, batch_size=4), [0]

    def stop(*_: object) -> None:
        forwards[0] += 1
        if forwards[0] == 2:
            raise KeyboardInterrupt

    broken.model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        perplexity(broken, suite)
    again, rows = tiny_subject(home, batch_size=4), list[int]()
    again.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    assert perplexity(again, suite).items == whole.items
    assert rows == [4, 4]


def test_a_text_of_the_suite_s_own_is_read_whole_and_is_never_what_trains(home: Path, tmp_path: Path) -> None:
    other = Synthetic(documents_count=30, seed=7)
    suite = PerplexitySuite(name="other", text="named", window=16, corpus=other)
    subject = tiny_subject(home, positions=64, items_dir=tmp_path)
    result = perplexity(subject, suite)
    every = tokenize_once(other, "all", subject.tokenizer, home).tokens
    parts = [tokenize_once(other, split, subject.tokenizer, home).tokens for split in ("train", "heldout")]
    assert every == sum(parts)
    assert len(result.items) == every // 16
    with pytest.raises(DataError, match="suite own: corpus shares all of it with the text that the recipe trains on"):
        perplexity(subject, dataclasses.replace(suite, name="own", corpus=subject.corpus))
    for text, corpus in (("named", None), ("heldout", other)):
        with pytest.raises(RecipeError, match="suite odd: text="):
            PerplexitySuite(name="odd", text=text, window=16, corpus=corpus)  # type: ignore[arg-type]


def test_two_texts_of_one_kind_keep_their_windows_apart(home: Path, tmp_path: Path) -> None:
    subject, rows = tiny_subject(home, positions=64, items_dir=tmp_path), list[int]()
    subject.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    suites = [
        PerplexitySuite(
            name=f"other-{seed}", text="named", window=16, corpus=Synthetic(documents_count=30, seed=seed), limit=4
        )
        for seed in (7, 8)
    ]
    first = [perplexity(subject, suite).items for suite in suites]
    assert sum(rows) == 8
    assert [perplexity(subject, suite).items for suite in suites] == first
    assert sum(rows) == 8


def test_a_window_beyond_the_model_and_a_text_too_short_are_refused(home: Path) -> None:
    with pytest.raises(DataError, match="window=65, and the model accepts at most 64"):
        measured(PerplexitySuite(name="long", text="heldout", window=65), home)


def test_a_model_that_diverged_is_recorded_as_such() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[:] = torch.nan
    assert not math.isfinite(float(window_losses(model, tokens(1, 8))[0]))


def test_wikitext2_is_read_as_the_field_reads_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEFORGE_WIKITEXT2", str(tmp_path))
    with pytest.raises(DataError, match=r"there is no wiki\.test\.raw"):
        wikitext2_test()
    folder = SHARED / "wikitext2"
    if not folder.is_dir():
        pytest.skip("the shared WikiText-2 files are not beside this checkout")
    monkeypatch.setenv("SPARSEFORGE_WIKITEXT2", str(folder))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(SHARED / "tokenizers/gpt2/tokenizer.json"))
    assert len(tokenizer.backend_tokenizer.encode(wikitext2_test(), add_special_tokens=False).ids) == 287_644


def test_c4_is_the_first_documents_of_a_local_file_or_said_to_be_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path
) -> None:
    with pytest.raises(DataError, match=r"Set SPARSEFORGE_C4 to a JSON-lines file"):
        c4_validation()
    path = tmp_path / "c4.jsonl"
    path.write_text("".join(json.dumps({"text": f"The fox {i} sees the dog."}) + "\n" for i in range(1200)))
    monkeypatch.setenv("SPARSEFORGE_C4", str(path))
    text = c4_validation()
    assert text.startswith("The fox 0 sees the dog. The fox 1 sees")
    assert text.endswith("The fox 1099 sees the dog.")
    found = measured(PerplexitySuite(name="c4", text="c4", window=64, limit=4), home)["rows"]["nll"]  # type: ignore[index]
    assert found["detail"]["text"] == "C4 validation, first 1100 documents"
    assert found["detail"]["windows"] == 4
    path.write_text('{"body": "no text"}\n')
    with pytest.raises(DataError, match="unknown field 'text'"):
        c4_validation()


def test_a_real_small_checkpoint_has_its_known_loss() -> None:
    folder = SHARED / "tiny-checkpoints" / "stories260k"
    if not folder.is_dir():
        pytest.skip("the shared tiny checkpoint is not beside this checkout")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    stories = re.split(r"\n(?=Once upon a time|One day)", (folder / "sample-stories.txt").read_text())[:40]
    ids = [
        torch.tensor([[model.config.bos_token_id, *tokenizer(s, add_special_tokens=False).input_ids][:256]])
        for s in stories
    ]
    losses = [float(window_losses(model, row)) for row in ids if row.shape[1] == 256]
    assert sum(losses) / len(losses) == pytest.approx(1.27, abs=0.15)


def test_items_are_plain_json(home: Path) -> None:
    found = measured(PerplexitySuite(name="heldout", text="heldout", window=16, limit=3), home)
    assert json.loads(json.dumps(list(found["items"])))  # type: ignore[call-overload]
