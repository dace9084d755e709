"""Several processes at one bundle by one command: where they run, how they are stopped, what is said of failures.

That they share the cells is seen in `test_carrying.py`, whose bundle two of them run.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flows.bundle import choose, write_bundle
from sparseforge_core import bundles, measured
from sparseforge_core.bundle_processes import LOGS, places, run_together
from sparseforge_core.bundle_run import TRAIN
from sparseforge_core.errors import CellsFailed, Interrupted
from sparseforge_core.run import main as core
from tests.there import command, environment

pytestmark = pytest.mark.slow


def test_who_is_stopped_stops_all_processes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "carried"
    write_bundle(choose(["tiny-smoke"]), folder)
    for name, value in environment(folder).items():
        monkeypatch.setenv(name, value)
    logs = folder / bundles.HOME / LOGS

    def at_work() -> bool:
        return any("preparing" in path.read_text() for path in logs.glob("*.log"))

    with caplog.at_level("INFO"), pytest.raises(Interrupted, match="run the same command again"):
        run_together(command(folder)[3:], 2, logs, at_work)
    ended = re.findall(r"ended with (130|-15)", caplog.text)
    assert len(ended) == 2
    assert "130" in ended
    assert len(list(logs.with_name("cells").glob(f"*/{TRAIN}/{measured.FILE}"))) < 4


def test_a_process_that_a_signal_ends_is_said_and_what_cannot_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(CellsFailed, match="cpu-1 was ended by signal 9; cpu-2"):
        run_together(["status", "nowhere"], 2, tmp_path / LOGS, lambda: False)
    for options, why in (
        (["--processes", "-1"], "--processes -1: at least 1"),
        (["--processes", "2", "--index", "0"], "--index 0 is one cell"),
        (["--processes", "2"], "bundle.json"),
    ):
        folder = tmp_path / "none" if why == "bundle.json" else tmp_path / "carried"
        if not (tmp_path / "carried").exists():
            write_bundle(choose(["tiny-smoke"]), tmp_path / "carried")
        assert core(["bundle", str(folder), *options]) == 2
        assert why in capsys.readouterr().err


def test_each_gpu_gets_as_many_processes_and_the_cores_are_shared() -> None:
    named = {"CUDA_VISIBLE_DEVICES": "3, MIG-7/1"}
    assert places(2, gpus=2, cores=13, environment=named) == {
        name: {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "3"}
        for name, gpu in (
            ("gpu-3-1", "3"),
            ("gpu-MIG-7-1-1", "MIG-7/1"),
            ("gpu-3-2", "3"),
            ("gpu-MIG-7-1-2", "MIG-7/1"),
        )
    }
    threads = {"OMP_NUM_THREADS": "1"}
    assert places(1, gpus=2, cores=13, environment=threads) == {
        f"gpu-{index}-1": {"CUDA_VISIBLE_DEVICES": str(index)} for index in range(2)
    }
    assert places(2, gpus=0, cores=13, environment=threads) == {"cpu-1": {}, "cpu-2": {}}
