"""The user's command: what it is told, and that nothing it does can end a run."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from pathlib import Path

import pytest

from flows.notify import VARIABLE, Notifier, words_of
from sparseforge_core.errors import SparseForgeError


def hook(folder: Path, body: str) -> str:
    script = folder / "hook.py"
    script.write_text(body)
    return shlex.join([sys.executable, str(script), "it's one word; $HOME"])


def test_the_command_gets_its_words_and_an_object_on_standard_input(tmp_path: Path) -> None:
    log = tmp_path / "log"
    body = f"import sys\nopen({str(log)!r}, 'a').write(sys.argv[1] + '\\n' + sys.stdin.read())"
    with Notifier(hook(tmp_path, body)) as notifier:
        notifier.cell_failed("g", cell="k-s0", error="DataError: no text")
        notifier.ended({"grid": "g", "executed": 2}, seconds=1.23)
    lines = log.read_text().splitlines()
    assert lines[0] == lines[2] == "it's one word; $HOME", "no shell has touched it"
    failed, ended = json.loads(lines[1]), json.loads(lines[3])
    assert failed == {"event": "cell-failed", "grid": "g", "cell": "k-s0", "error": "DataError: no text"}
    assert ended == {"event": "grid-ended", "grid": "g", "executed": 2, "seconds": 1.2, "pool": None}


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("import sys; sys.exit('no such channel')", "it ended with code 1: no such channel"),
        ("import time; time.sleep(60)", "timed out"),
    ],
)
def test_a_command_that_fails_or_hangs_is_one_warning(
    tmp_path: Path, body: str, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), Notifier(hook(tmp_path, body), seconds=0.5) as notifier:
        notifier.cell_failed("g")
        notifier.cell_failed("g")
    (record,) = caplog.records
    assert sentence in record.getMessage()
    assert "the run goes on" in record.getMessage()


def test_a_command_that_does_not_exist_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), Notifier("/no/such/command --now") as notifier:
        notifier.ended({"grid": "g"}, seconds=0.0, pool="cpu")
    assert "No such file" in caplog.text


def test_without_a_command_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with Notifier() as notifier:
        notifier.cell_failed("g")
    assert notifier.words == []
    monkeypatch.setenv(VARIABLE, "ring the bell")
    assert Notifier().words == ["ring", "the", "bell"]


def test_an_open_quote_is_refused_before_anything_runs() -> None:
    with pytest.raises(SparseForgeError, match="No closing quotation"):
        words_of("echo 'oops")


@pytest.mark.slow
def test_a_run_tells_of_its_failed_cell_and_of_its_end(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cell folder that is a file fails its cell; the run ends, and says so as one line of JSON."""
    from flows import cli
    from flows.home import Home
    from flows.local import open_grid

    store, states = open_grid(Home.of(), "tiny-smoke")
    store.close()
    first = next(s.cell_key for s in states if not s.requires)
    (home / "cells" / first).mkdir(parents=True)
    (home / "cells" / first / "cell.json").mkdir()
    log = tmp_path / "log"
    monkeypatch.setenv(VARIABLE, hook(tmp_path, f"import sys\nopen({str(log)!r}, 'a').write(sys.stdin.read())"))
    assert cli.main(["run", "tiny-smoke", "--workers", "1", "--quiet", "--json"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    said = json.loads(line)
    assert (said["planned"], said["executed"], said["complete"]) == (4, 0, False)
    events = [json.loads(event) for event in log.read_text().splitlines()]
    assert [event["event"] for event in events] == ["cell-failed", "grid-ended"]
    assert events[0]["cell"] == first
    assert events[1]["failed"].keys() == said["failed"].keys() == {first}
