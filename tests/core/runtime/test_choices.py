"""Which way a product takes and what a weight holds for it: from measurements, here or of the GPU's generation."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseforge_core.errors import ExportError
from sparseforge_core.runtime.kernels import choices, table
from sparseforge_core.runtime.kernels.candidates import candidates
from sparseforge_core.runtime.kernels.cusparselt import filled_up
from sparseforge_core.runtime.kernels.measure import COLD
from sparseforge_core.runtime.kernels.table import Choice
from sparseforge_core.runtime.kernels.tuning import counts, trial_bytes

LLAMA = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))

COMPRESSED = choices.FORMS[False, True]


@pytest.fixture(autouse=True)
def looked_up_anew() -> Iterator[None]:
    """What a test puts into the tables decides for no other."""
    choices.choose.cache_clear()
    yield
    choices.choose.cache_clear()


def measured(monkeypatch: pytest.MonkeyPatch, lines: dict[str, tuple[Choice, ...]]) -> None:
    """Let these be all that GPU 0 measured; its generation measured nothing."""
    monkeypatch.setattr(table, "table", lambda device: lines)
    monkeypatch.setattr(table, "generation", lambda device: {})


def test_choices_come_from_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = candidates(32, 256, 8)[0]
    fast, slow = Choice("cusparselt", algorithm=3, seconds=1e-6), Choice("kernel", plan, seconds=2e-6)
    refused = Choice("cusparselt")
    large = (Choice("dense", seconds=1e-6), Choice("cusparselt", seconds=0.99e-6), Choice("expand", seconds=2e-6))
    measured(
        monkeypatch,
        {
            table.key(32, 256, 8, torch.float16): (slow, fast),
            table.key(32, 256, 512, torch.float16): large,
            table.key(32, 256, 2048, torch.float16): (refused, large[2], large[0]),
        },
    )
    choose = functools.partial(choices.choose, 32, 256, dtype=torch.float16, device=0)
    assert choose(rows=5, forms=choices.BOTH) == fast
    assert choose(rows=5) == slow
    assert choose(rows=400, forms=choices.BOTH).kind == "dense", "one per cent is no reason to change"
    assert choose(rows=400, forms=COMPRESSED).kind == "cusparselt"
    assert choose(rows=400).kind == "expand"
    assert choose(rows=4096, forms=COMPRESSED).kind == "expand", "what was refused is not taken"
    assert choices.choose(32, 256, 5, torch.bfloat16, 0).seconds is None
    assert choices.against_dense(32, 256, 400, torch.float16, 0) == (1e-6, 2e-6)
    assert choices.against_dense(32, 256, 5, torch.float16, 0) is None


def test_sizes_between_the_measured_ones_take_their_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """No prompt length falls between the lines of a table back to what is taken before anything was measured."""
    best = Choice("cusparselt", algorithm=17, seconds=1e-6)
    lines = {table.key(32, 256, size, torch.float16): (best,) for size in (128, 1024, 2048)}
    measured(monkeypatch, lines)
    for rows in (65, 100, 128, 520, 1000, 1025, 1500, 2048, 2049, 3000, 8192, 20_000):
        assert choices.choose(32, 256, rows, torch.float16, 0, choices.BOTH) == best, rows
    for rows in (1, 2, 60, 129, 500):
        assert choices.choose(32, 256, rows, torch.float16, 0, choices.BOTH).seconds is None, rows
    assert table.deciding(1) == (1,), "one row has kernels of its own"


@given(rows=st.integers(1, 20_000))
def test_prompts_meet_few_plans(rows: int) -> None:
    filled = filled_up(rows)
    assert rows <= filled <= max(-(-rows // 8) * 8, rows * 17 / 16 + 1)
    assert filled % 8 == 0
    assert filled_up(filled) == filled


def test_prompts_of_every_length_share_a_few_plans() -> None:
    assert len({filled_up(rows) for rows in range(1025, 8193)}) == 48
    assert all(filled_up(rows) == rows for rows in (64, 128, 1024, 2048, 4096, 8192))


def test_the_committed_measurements_need_nothing_beside_the_packed_weight() -> None:
    """On the H200 that was measured: no number of rows loses to dense, and no other form is worth its memory."""
    held = total = 0
    for out, inputs in LLAMA:
        forms = choices.forms_for(out, inputs, torch.bfloat16, None)
        assert forms == choices.NONE
        for rows in (1, 16, 17, 64, 65, 96, 128, 200, 256, 500, 1000, 2048, 8192, 20_000):
            assert choices.choose(out, inputs, rows, torch.bfloat16, None).kind == "kernel"
            times = choices.against_dense(out, inputs, rows, torch.bfloat16, None)
            assert times is not None
            assert times[0] >= 1.1 * times[1], (out, inputs, rows)
        held += choices.held_bytes(out, inputs, forms)
        total += 2 * out * inputs
    assert held / total == 0.5625
    assert choices.forms_for(48, 640, torch.bfloat16, None) == choices.BOTH, "nothing is known of a new shape"


def test_a_form_is_held_where_it_is_worth_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def ways(kernel: float, cusparselt: float, dense: float) -> tuple[Choice, ...]:
        plan = candidates(32, 256, 2048)[0]
        found = Choice("kernel", plan, seconds=kernel), Choice("cusparselt", algorithm=1, seconds=cusparselt)
        return (*found, Choice("dense", seconds=dense))

    def held(**lines: tuple[Choice, ...]) -> choices.Forms:
        choices.choose.cache_clear()
        found = {table.key(32, 256, int(rows[1:]), torch.float16): several for rows, several in lines.items()}
        measured(monkeypatch, found)
        return choices.forms_for(32, 256, torch.float16, 0)

    assert held(r128=ways(1.0, 0.97, 1.5), r2048=ways(1.0, 0.96, 1.5)) == choices.NONE, "4 % is not worth 0.56"
    assert held(r128=ways(1.0, 0.97, 1.5), r2048=ways(1.0, 0.94, 1.5)) == COMPRESSED
    assert held(r128=ways(1.0, 2.0, 0.995), r2048=ways(1.0, 2.0, 1.2)) == choices.NONE
    assert held(r128=ways(1.0, 2.0, 0.98), r2048=ways(1.0, 0.5, 1.2)) == choices.BOTH


def test_every_plan_of_the_committed_tables_fits() -> None:
    files = sorted(table.MEASURED.iterdir())
    assert [file.name for file in files] == ["9.0.json"]
    known = table.read_table(9, 0)
    for out, inputs in LLAMA:
        for rows in (1, 2, 4, 8, 16, 24, 32, 48, 64):
            assert choices.choose(out, inputs, rows, torch.bfloat16, None).plan is not None
        assert {choice.kind for choice in known[f"{out}x{inputs} bfloat16 rows 2048"]} >= {"dense", "cusparselt"}
    for name, several in known.items():
        shape, _, _, rows = name.split()
        out, inputs = map(int, shape.split("x"))
        assert {choice.kind for choice in several} & choices.ALWAYS, name
        for choice in several:
            if choice.plan is not None:
                assert choice.plan.fits(inputs)
                assert choice.plan.kernel in ("tiles", "wide") or choice.plan.rows >= int(rows)
    assert table.read_table(8, 0) == {}


def test_measurements_of_bfloat16_speak_for_float16_until_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    one = choices.choose(12288, 4096, 1, torch.bfloat16, None)
    assert choices.choose(12288, 4096, 1, torch.float16, None) == one
    assert one.seconds is not None
    large = choices.choose(12288, 4096, 2048, torch.float16, None, choices.BOTH)
    assert large == choices.choose(12288, 4096, 2048, torch.bfloat16, None)
    line = table.line(12288, 4096, 2048, torch.float16, None)
    assert {choice.kind for choice in line} == {"kernel", "expand", "dense"}, "no algorithm of cuSPARSELt is known"
    own = Choice("kernel", candidates(12288, 4096, 1)[1], seconds=1.0)
    monkeypatch.setattr(table, "table", lambda device: {table.key(12288, 4096, 1, torch.float16): (own,)})
    monkeypatch.setattr(table, "generation", lambda device: table.read_table(9, 0))
    assert choices.choose(12288, 4096, 1, torch.float16, 0) == own
    assert choices.choose(12288, 4096, 1, torch.bfloat16, 0) == one


def test_the_memory_of_measuring_is_known_before() -> None:
    """Gate and up of LLaMA-2-7B at 8,192 rows: two weights in all forms, x and outputs; small weights are many."""
    dense = 22016 * 4096 * 2
    assert counts(22016, 4096) == (3, 2)
    found = trial_bytes(22016, 4096, torch.bfloat16, 8192, copies=True)
    assert found == 2 * dense * 2.125 + 2 * dense * 0.5625 + dense + 8192 * (4096 + 3 * 22016) * 2
    assert counts(16, 64) == (256, 256)
    assert counts(4096, 4096)[0] * 4096 * 4096 * 9 / 8 >= COLD


def test_a_table_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "MEASURED", tmp_path)
    (tmp_path / "7.5.json").write_text('{"choices": {"16x64 float16 rows 1": [{"kind": "dense"}]}}')
    with pytest.raises(ExportError, match=r"7\.5\.json holds no choices of kernels"):
        table.read_table(7, 5)
