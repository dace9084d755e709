"""Answers on disk: taken up again, and never trusted when damaged."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparseforge_core.evaluate.answers import Answers, file_name, remembered

ABOUT = {"task": "arc_easy", "task_version": "1.0", "harness": "0.4.13", "model": "abc", "dtype": "float32"}


def filled(path: Path, count: int = 5) -> list[str]:
    answers = Answers(path, ABOUT)
    for item in range(count):
        answers.put(item, f"asked-{item}", [[-1.5 * item, True], [None, False]])
    answers.close()
    return path.read_text().splitlines()


def known(path: Path) -> set[int]:
    answers = Answers(path, ABOUT)
    answers.close()
    return set(answers.known)


def test_answers_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    filled(path)
    answers = Answers(path, ABOUT)
    assert answers.get(3, "asked-3") == [[-4.5, True], [None, False]]
    assert answers.get(9, "asked-9") is None
    answers.close()


def test_an_item_that_asks_something_else_is_answered_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "answers.jsonl"
    filled(path)
    answers = Answers(path, ABOUT)
    assert answers.get(3, "another question") is None
    assert "item 3 now asks something else" in caplog.text
    answers.close()


@pytest.mark.parametrize("damage", ["cut", "edited", "garbage"])
def test_a_damaged_line_is_reported_and_only_its_item_is_lost(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "answers.jsonl"
    lines = filled(path)
    lines[3] = {"cut": lines[3][:20], "edited": lines[3].replace("-3.0", "-0.1"), "garbage": "\x00\x00"}[damage]
    path.write_text("\n".join(lines) + "\n")
    with caplog.at_level(logging.WARNING):
        assert known(path) == {0, 1, 3, 4}
    assert "1 of 6 lines are damaged" in caplog.text
    caplog.clear()
    assert known(path) == {0, 1, 3, 4}
    assert not caplog.text, "the damaged line was not taken out"


def test_a_file_of_something_else_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "answers.jsonl"
    filled(path)
    answers = Answers(path, {**ABOUT, "model": "other"})
    answers.close()
    assert not answers.known
    assert "of something else" in caplog.text


@pytest.mark.parametrize("name", sorted(ABOUT))
def test_whatever_an_answer_depends_on_is_in_the_name(name: str) -> None:
    assert file_name("arc_easy", ABOUT) != file_name("arc_easy", {**ABOUT, name: "changed"})


def test_a_pass_whose_answers_are_all_there_asks_nothing(tmp_path: Path) -> None:
    """As after a kill between the last answer and the measurements: an empty batch would be an error in a model."""

    def run(left: list[int]) -> Iterator[dict[int, Any]]:
        assert left, "asked for no items"
        yield {item: item * 2 for item in left}

    for _ in range(2):
        assert remembered(tmp_path, "arc_easy", ABOUT, ["a", "b", "c"], run) == [0, 2, 4]
