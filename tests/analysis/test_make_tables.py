from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from analysis.make_tables import main, make_tables, run_make_tables
from sparseforge_core.errors import IncompleteExhibit, SparseForgeError
from sparseforge_core.store.results import Results
from sparseforge_core.store.store import ResultStore
from tests.analysis.filled import Filled, ablations, curve, everything, scores, speeds
from tests.calls import calls

ROOT = Path(__file__).resolve().parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def complete(url: str) -> None:
    curve(speeds(ablations(Filled()))).write(url).close()


def test_every_format_of_every_exhibit_is_written_and_nothing_else(sqlite_url: str, tmp_path: Path) -> None:
    everything().write(sqlite_url).close()
    out = tmp_path / "out"
    report = make_tables(Results(sqlite_url), None, out)
    wanted = {f"tables/table-{n}.{ending}" for n in (1, 2, 3, 4, 7) for ending in ("md", "tex", "csv", "html")}
    wanted |= {f"tables/table-{n}.tests.csv" for n in (1, 2, 3, 4)}
    endings = ("csv", "pdf", "png", "svg")
    wanted |= {f"figures/{name}.{ending}" for name in ("accuracy-vs-tokens", "ablations") for ending in endings}
    assert set(contents(out)) == wanted == {str(path.relative_to(out)) for path in report.files}
    assert report.empty == ["table-5", "table-6", "reproductions", "hard-vs-soft", "mask-softness", "mask-histograms"]


def test_the_same_store_gives_the_same_bytes(sqlite_url: str, tmp_path: Path) -> None:
    everything().write(sqlite_url).close()
    make_tables(Results(sqlite_url), None, tmp_path / "first")
    make_tables(Results(sqlite_url), None, tmp_path / "second")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_what_is_missing_is_named_with_the_command_that_fills_it(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything().write(f"sqlite:///{home / 'store.db'}").close()
    assert main([]) == 0
    said = capsys.readouterr().out
    assert f"grid demo (the one planned last): 32 files in {home / 'demo'}" in said
    assert "table-2: 3 planned results are missing" in said
    assert "wanda: cell" in said
    assert "fill what is missing with: sparseforge run demo\n" in said


def test_the_command_names_a_store_and_home_of_its_own(
    tmp_path: Path, sqlite_url: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything().write(sqlite_url).close()
    assert main(["--db", sqlite_url, "--home", str(tmp_path / "other")]) == 0
    assert f"sparseforge --home {tmp_path / 'other'} --db {sqlite_url} run demo" in capsys.readouterr().out


def test_strict_writes_everything_and_exits_2_when_something_is_partial(
    sqlite_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything().write(sqlite_url).close()
    assert main(["--db", sqlite_url, "--out", str(tmp_path / "out"), "--strict"]) == 2
    assert "table-1, table-2, table-4 of grid demo lack results" in capsys.readouterr().err
    assert (tmp_path / "out" / "tables" / "table-2.md").is_file()
    with pytest.raises(IncompleteExhibit):
        make_tables(Results(sqlite_url), None, tmp_path / "out", strict=True)


def test_strict_looks_only_at_what_was_asked_for(sqlite_url: str, tmp_path: Path) -> None:
    everything().write(sqlite_url).close()
    arguments = ["--db", sqlite_url, "--out", str(tmp_path / "out"), "--strict", "--only", "table-3", "table-7"]
    assert main(arguments) == 0
    assert {Path(name).stem for name in contents(tmp_path / "out")} == {"table-3", "table-3.tests", "table-7"}


def test_strict_is_content_with_a_complete_grid(sqlite_url: str, tmp_path: Path) -> None:
    complete(sqlite_url)
    assert main(["--db", sqlite_url, "--out", str(tmp_path), "--strict"]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "table-9"], "unknown exhibit 'table-9'. Did you mean"),
        (["--only", "table-5"], "grid demo has no rows for table-5; --grid names another grid"),
        (["--grid", "dem"], "Did you mean 'demo'?"),
    ],
)
def test_wrong_names_get_a_sentence(
    sqlite_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    complete(sqlite_url)
    assert main(["--db", sqlite_url, "--out", str(tmp_path / "out"), *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_empty_store_and_no_store_get_a_sentence(
    sqlite_url: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == 2
    assert "there is no store at" in capsys.readouterr().err
    ResultStore(sqlite_url).close()
    assert main(["--db", sqlite_url]) == 2
    assert "the store holds no grid yet" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_gets_a_sentence(sqlite_url: str, tmp_path: Path) -> None:
    complete(sqlite_url)
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(SparseForgeError, match=r"cannot be written .*name another folder with --out"):
        run_make_tables(sqlite_url, tmp_path, out=tmp_path / "out")
    assert (tmp_path / "out").read_text() == "in the way"


def test_it_runs_as_a_plain_script_without_torch_prefect_or_mlflow(sqlite_url: str, tmp_path: Path) -> None:
    complete(sqlite_url)
    script = (
        "import runpy, sys; sys.argv = ['make_tables.py', '--db', sys.argv[1], '--out', sys.argv[2]]\n"
        "try: runpy.run_path('analysis/make_tables.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "heavy = {'torch', 'transformers', 'prefect', 'mlflow', 'lm_eval'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-c", script, sqlite_url, str(tmp_path / "out")]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    direct = [sys.executable, "analysis/make_tables.py", "--db", sqlite_url, "--out", str(tmp_path / "again")]
    found = subprocess.run(direct, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


@pytest.mark.slow
def test_twice_as_many_rows_are_no_more_than_twice_the_work(tmp_path: Path) -> None:
    def work(rows: int) -> int:
        grid = Filled()
        for number in range(rows):
            values = scores([0.3, 0.31], [0.4, 0.41], [20.0, 21.0])
            grid.row("table-2", f"m{number}", f"Method {number}", values, seeds=(0, 1))
        url = f"sqlite:///{tmp_path / f'{rows}.db'}"
        grid.write(url).close()
        out = tmp_path / str(rows)
        found = calls(lambda: make_tables(Results(url), None, out))
        assert (out / "tables" / "table-2.md").read_text().count("| Method ") == rows + 1
        return found

    work(1)
    assert work(60) <= 2 * work(30)
