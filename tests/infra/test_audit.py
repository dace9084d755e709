"""The dependency locks: exact, complete, installed as they say; and each way in which they could not be is seen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
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


def _pip_audit(folder: Path, said: str, code: int) -> None:
    """A package of that name that says and returns what pip-audit would: its advisories need a network."""
    folder.mkdir()
    about = "pip_audit-2.9.0.dist-info"
    program = f"import sys\ndef audit():\n    print({said!r}, file=sys.stderr)\n    return {code}\n"
    with zipfile.ZipFile(folder / "pip_audit-2.9.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("pip_audit.py", program)
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: pip-audit\nVersion: 2.9.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/entry_points.txt", "[console_scripts]\npip-audit = pip_audit:audit\n")
        wheel.writestr(f"{about}/RECORD", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "code", "ends", "sentence"),
    [
        (None, 0, 3, "audit: advisories were NOT checked, pip-audit cannot be installed"),
        (
            "ERROR:pip_audit._cli:Could not connect to PyPI's vulnerability feed",
            1,
            3,
            "audit: advisories were NOT checked",
        ),
        ("Found 2 known vulnerabilities in 1 package", 1, 1, "Found 2 known vulnerabilities in 1 package"),
        ("No known vulnerabilities found", 0, 0, "No known vulnerabilities found"),
    ],
    ids=["no pip-audit", "out of reach", "found", "clean"],
)
def test_advisories_that_were_not_asked_are_said_not_to_be(
    said: str | None, code: int, ends: int, sentence: str, tmp_path: Path
) -> None:
    place = tmp_path / "checkout"
    shutil.copytree(ROOT / "infra", place / "infra")
    for name in (*audit.LOCKS, "pyproject.toml"):
        shutil.copy(ROOT / name, place / name)
    (place / ".venv").symlink_to(sys.prefix)
    if said is not None:
        _pip_audit(tmp_path / "wheels", said, code)
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels"), "PYTHON": sys.executable}
    done = subprocess.run(
        [place / "infra" / "audit.sh"], env={**os.environ, **offline}, capture_output=True, text=True, check=False
    )
    assert done.returncode == ends, done.stderr
    assert sentence in done.stderr
    assert ("NOT checked" in done.stderr) == (ends == 3)
    assert "pinned, complete, installed as locked" in done.stdout
