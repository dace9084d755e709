"""The report: whole, self-contained, quiet; a browser opens it without a request or an error."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from analysis.report import inline_svg, render, write_report
from sparseforge_core.errors import SparseForgeError
from sparseforge_core.store.results import Results
from tests.analysis.filled import Filled, everything, scores
from tests.analysis.test_motivation import with_curves
from tests.analysis.test_tables import PUBLISHED

VOID = {"meta", "link", "path", "use", "rect", "br", "input", "image"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Reader(HTMLParser):
    """Collects what a browser might fetch, headings, and whether tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.origins = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            if values.get(name):
                self.addresses.append(str(values[name]))
        if values.get("id") and tag in ("h2", "section"):
            self.ids.append(str(values["id"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    url = f"sqlite:///{folder / 'store.db'}"
    filled = with_curves(everything())
    filled.caption("table-3", "</script><script>alert(1)</script> & \N{GREEK SMALL LETTER ALPHA}")
    filled.write(url, PUBLISHED).close()
    return write_report(Results(url), None, folder / "deep" / "report.html")


def test_it_names_no_address_outside_itself(report: Path) -> None:
    text = report.read_text()
    reader = Reader()
    reader.feed(text)
    assert {a for a in reader.addresses if not a.startswith(("#", "data:"))} == set()
    assert re.findall(r"url\((?!#|\"#|'#)", text) == []
    assert "@import" not in text
    assert re.findall(r"https?://", text) == []
    assert "default-src 'none'" in text
    assert reader.open == []


def test_everything_is_in_it(report: Path) -> None:
    reader = Reader()
    text = report.read_text()
    reader.feed(text)
    wanted = {"status", "figures", "comparison", "ablation-deltas", "tasks", "masks", "checks"}
    assert wanted | {f"table-{n}" for n in (1, 2, 3, 4, 7)} <= set(reader.ids)
    assert set(re.findall(r'<a href="#([^"]+)"', text)) <= set(reader.ids)
    assert text.count("<svg") == 5
    assert "planned results are missing" in text
    assert "The results log matches every result." in text
    assert "These tables add up." in text
    assert "commit 0123abc" in text
    assert 'class="word worse">worse</td>' in text
    assert "Published (not measured here)" in text


def test_texts_of_the_store_cannot_become_markup(report: Path) -> None:
    text = report.read_text()
    assert "<script>alert" not in text
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in text


def test_the_same_store_gives_the_same_report(report: Path) -> None:
    results = Results(f"sqlite:///{report.parent.parent / 'store.db'}")
    again = write_report(results, "demo", report.with_name("again.html"))
    assert again.read_bytes() == report.read_bytes()


def test_a_store_without_results_has_a_report_too(sqlite_url: str) -> None:
    grid = Filled()
    grid.row("table-2", "a", "A", {}, done=())
    grid.write(sqlite_url).close()
    from analysis.make_tables import collect

    results = Results(sqlite_url)
    text = render(results, collect(results, "demo"))
    assert "0 / 1" in text
    assert "no result yet" not in text
    assert "<svg" not in text


def test_what_contradicts_the_log_is_shown(sqlite_url: str, tmp_path: Path) -> None:
    import sqlalchemy as sa

    from sparseforge_core.store import schema

    grid = Filled()
    grid.row("table-2", "a", "A", scores([0.3], [0.4], [9.0]))
    store = grid.write(sqlite_url)
    with store.engine.begin() as connection:
        connection.execute(sa.update(schema.measurement).values(value=0.99))
    text = write_report(Results(sqlite_url), None, tmp_path / "r.html").read_text()
    assert "contradictions in the results log" in text


def test_a_folder_that_cannot_be_written_is_named(sqlite_url: str, tmp_path: Path) -> None:
    everything().write(sqlite_url).close()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SparseForgeError, match=r"report\.html cannot be written .*--out"):
        write_report(Results(sqlite_url), None, tmp_path / "file" / "report.html")


def test_svg_loses_its_prologue_and_metadata() -> None:
    made = inline_svg(
        '<?xml?><!DOCTYPE x "http://a"><svg a="1" viewBox="0 0 2 1" b="2"><metadata>http</metadata><g/></svg>'
    )
    assert made == '<svg viewBox="0 0 2 1" role="img"><g/></svg>'


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the page was not opened in a browser")
def test_a_browser_opens_it_without_an_error(report: Path) -> None:
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run(
        [str(CHROMIUM), *options, report.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr, "the page logged an error"
    assert 'data-theme="' in done.stdout
    assert re.search(r'<th data-sort="" tabindex="0">', done.stdout), "the script ran to its end"
