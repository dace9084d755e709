"""The dependency locks: exact, complete, installed as they say; and each way in which they could not be is seen."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "infra"))

import audit  # noqa: E402


def test_the_locks_are_exact_complete_and_installed() -> None:
    assert audit.problems() == []
    assert len(audit.locked()) > 200


Edit = Callable[[str], str]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda text: text.replace("numpy==", "numpy>="), "is no exact pin"),
        (lambda text: text + "zzz @ https://example.org/zzz.whl\n", "is no exact pin"),
        (lambda text: text.replace("alembic==", "aaa==1\nalembic==") + "aaa==1\n", "aaa is also in requirements.lock"),
        (lambda text: "zipp==1\n" + text, "not in order"),
        (lambda text: text + "torchvision==0.30.0\n", "torchvision must not be locked: pins another torch"),
        (lambda text: text + "nvidia-cublas-cu13==13.0\n", "nvidia-cublas-cu13 must not be locked"),
        (lambda text: _without(text, "psycopg"), "pyproject.toml needs psycopg, which no lock has"),
        (lambda text: _without(text, "starlette"), "fastapi needs starlette, which no lock has"),
        (lambda text: _at(text, "fastapi", "0.165.0"), "needs fastapi<0.151"),
        (lambda text: _at(text, "six", "0.0.1"), "six==0.0.1 is locked, 1."),
        (lambda text: text + "zzz-none==1.0\n", "zzz-none==1.0 is locked and not installed"),
    ],
)
def test_a_mistake_is_seen(edit: Edit, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*audit.LOCKS, "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    lock = tmp_path / "requirements.lock"
    lock.write_text(edit(lock.read_text()))
    monkeypatch.setattr(audit, "ROOT", tmp_path)
    assert any(said in problem for problem in audit.problems()), audit.problems()


def _without(text: str, name: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.lower().startswith(f"{name}=="))


def _at(text: str, name: str, version: str) -> str:
    lines = text.splitlines(keepends=True)
    return "".join(f"{name}=={version}\n" if line.lower().startswith(f"{name}==") else line for line in lines)


def test_a_condition_holds_where_it_holds() -> None:
    assert audit._applies('python_version >= "3.0"')
    assert not audit._applies('python_version < "3.0"')
