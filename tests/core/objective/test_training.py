"""Objectives inside a whole cell: other teachers, draws that survive interruption, refusals before any training."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.errors import Interrupted, SparseForgeError
from sparseforge_core.execution import Execution
from sparseforge_core.methods import METHODS
from sparseforge_core.models.hub import load_model, weights_digest
from sparseforge_core.models.sources import Local, Tiny, TrainedBPE
from sparseforge_core.objective import Distill, HiddenMatch, Sampled, TopK, batch
from sparseforge_core.recipe import Cell, Recipe, TrainPlan
from sparseforge_core.run import train_cell
from sparseforge_core.schedules import WarmupLinear
from sparseforge_core.sparsity.patterns import nm
from tests.tiny import tiny_source

STEPS = 4
WIDER = tiny_source("qwen3", width=96, layers=3)


def cell(objective: Distill, *, sparse: bool = False, seed: int = 0) -> Cell:
    """A few steps of a tiny LLaMA on sentences of a small grammar."""
    return Cell(
        recipe=Recipe(
            model=tiny_source("llama"),
            method=METHODS["sr-ste"]() if sparse else METHODS["dense-control"](),
            corpus=Synthetic(documents_count=50),
            pattern=nm(2, 4) if sparse else None,
            objective=objective,
            train=TrainPlan(steps=STEPS, sequences=4, length=16, lr=WarmupLinear(peak=1e-3)),
        ),
        seed=seed,
    )


def journal(folder: Path) -> list[dict[str, float]]:
    lines = (json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines())
    return [line.get("scalars", {}) for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def test_a_teacher_of_another_width_depth_and_family_teaches(tmp_path: Path) -> None:
    taught = cell(Distill(teacher=WIDER, task_weight=0.0, kl_weight=1.0, temperature=2.0), sparse=True)
    train_cell(taught, tmp_path / "wide", tmp_path)
    found = [row for row in journal(tmp_path / "wide") if "loss/kl" in row]
    assert found
    assert all(row["loss/kl"] > 0.0 for row in found)
    # two random models are far apart, and the student moves towards the one that teaches it
    assert found[-1]["loss/kl"] < found[0]["loss/kl"]
    assert found[0]["loss/total"] == pytest.approx(found[0]["loss/kl"], rel=1e-6)


@pytest.mark.parametrize("split_from", [batch.SPLIT_FROM, 1], ids=["whole", "chunks"])
def test_sampled_teachers_resume_to_the_bit(split_from: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "SPLIT_FROM", split_from)
    drawn = cell(Distill(teacher=WIDER, teacher_logits=Sampled(n=3)), seed=5)
    train_cell(drawn, tmp_path / "whole", tmp_path)
    seen: list[int] = []
    with pytest.raises(Interrupted):
        train_cell(
            drawn,
            tmp_path / "parts",
            tmp_path,
            on_step=lambda progress: seen.append(progress.step),
            should_stop=lambda: seen[-1] == 2,
        )
    train_cell(drawn, tmp_path / "parts", tmp_path)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_neither_micro_batches_nor_chunks_change_what_is_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = cell(
        Distill(
            teacher=tiny_source("llama", init_seed=1),
            teacher_logits=Sampled(n=3),
            hidden=HiddenMatch(weight=0.1),
            temperature=2.0,
        )
    )
    train_cell(drawn, tmp_path / "whole", tmp_path)
    train_cell(drawn, tmp_path / "micro", tmp_path, execution=Execution(micro_batch=1))
    monkeypatch.setattr(batch, "SPLIT_FROM", 1)
    monkeypatch.setattr(batch, "CHUNK_LOGITS", 2000)
    train_cell(drawn, tmp_path / "chunks", tmp_path)
    whole = weights(tmp_path / "whole")
    start = dict(load_model(drawn.recipe.model, tmp_path).named_parameters())
    moved = max(float((whole[name] - start[name].detach()).abs().max()) for name in whole)
    for other in ("micro", "chunks"):
        found = weights(tmp_path / other)
        apart = max(float((whole[name] - found[name]).abs().max()) for name in whole)
        assert apart < 0.02 * moved, other  # rounding, enlarged by Adam where a gradient is nearly 0
    rows = [row["loss/hidden"] for row in journal(tmp_path / "whole") if "loss/hidden" in row]
    assert rows
    assert rows[-1] < rows[0]


def other_tokenizer() -> Tiny:
    """A teacher whose vocabulary is as large as the student's and has other tokens."""
    corpus = Synthetic(documents_count=3, seed=9)
    return Tiny(architecture="llama", tokenizer=TrainedBPE(corpus=corpus, size=300), width=64, layers=2, heads=2)


def smaller_vocabulary() -> Tiny:
    corpus = Synthetic(documents_count=50)
    return Tiny(architecture="llama", tokenizer=TrainedBPE(corpus=corpus, size=280), width=64, layers=2, heads=2)


@pytest.mark.parametrize(
    ("objective", "named"),
    [
        (
            Distill(teacher=smaller_vocabulary()),
            r"objective\.teacher: its vocabulary has 280 entries, the student's 300",
        ),
        (Distill(teacher=other_tokenizer()), r"objective\.teacher: its tokenizer gives \d+ tokens other ids"),
        (Distill(teacher_logits=TopK(k=301)), r"objective\.teacher_logits\.k=301: the vocabulary has 300"),
        (Distill(teacher=WIDER, hidden=HiddenMatch()), r"objective\.hidden: the teacher's hidden states have width 96"),
        (Distill(hidden=HiddenMatch(layers=(1, 7))), r"objective\.hidden\.layers: block 7 was asked for"),
    ],
    ids=["vocabulary", "tokenizer", "k", "width", "layers"],
)
def test_what_does_not_fit_is_refused_by_field_before_any_training(
    objective: Distill, named: str, tmp_path: Path
) -> None:
    with pytest.raises(SparseForgeError, match=named):
        train_cell(cell(objective), tmp_path / "train", tmp_path)
    assert not (tmp_path / "train" / "journal.jsonl").exists()
    assert not (tmp_path / "train" / "checkpoints").exists()


def test_a_teacher_without_a_tokenizer_teaches_with_a_warning(tmp_path: Path, caplog: Any) -> None:
    load_model(tiny_source("llama", init_seed=1), tmp_path).save_pretrained(tmp_path / "teacher")
    source = Local(path=str(tmp_path / "teacher"), sha256=weights_digest(tmp_path / "teacher"))
    with caplog.at_level(logging.WARNING):
        train_cell(cell(Distill(teacher=source)), tmp_path / "train", tmp_path)
    assert "only the sizes of the vocabularies were compared" in caplog.text
