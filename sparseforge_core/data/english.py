"""Which paragraphs of a docstring read as English: cleaning, judging and leaving out what was seen before."""

from __future__ import annotations

import itertools
import re
import zlib

SHORTEST_PARAGRAPH = 60
"""Characters; anything shorter is a caption or a fragment."""
PLAIN_WORDS = 0.8
"""Least share of words made of letters alone: below it a paragraph is code, mathematics or a list of names."""
COMMON_WORDS = 0.25
"""Least share of everyday words; running English has about 0.4, a bibliography less than 0.15."""
SHINGLE = 8
"""Words in a row that count as one piece when paragraphs are compared."""

EVERYDAY = """
a about after all also an and any are as at be because been before but by can do does each for from has have how if in
into is it its may more most must no not of on one only or other over same should since so some such than that the
their them then there these they this those to two up use used using was we were what when where which while will with
within without would you your
"""
COMMON = frozenset(EVERYDAY.split())
WORD = re.compile(r"[\"'(\u201c\u2018]*[A-Za-z][A-Za-z\u2019'-]*[.,;:!?)\"'\u201d\u2019]*$")
BREAK = re.compile(r"\n\s*\n|\n(?=\s*(?:[-*+\u2022]|\d{1,2}[.)])\s)")
BULLET = re.compile(r"^(?:[-*+\u2022]|\d{1,2}[.)])\s+")
SECTION = re.compile(r"(Args|Arguments|Attributes|Examples?|Keyword Args|Parameters|Params|Raises|Returns?|Yields):?$")
CODE = (">>>", "...", ".. ", "$ ", "|", "+-", "===", "---", "#", "@", "In [", "http")
TABLE = re.compile(r"\s*[\w*,. ]+ :(\s|$)|\s*\*{0,2}\w+( \([^)]*\))?: ")
FIELD = re.compile(r"\s*(:\w[^:]*:(\s|$)|@\w+)")
ROLE = re.compile(r"(?<!`):[a-zA-Z:+-]+:`([^`]*)`")
LINK = re.compile(r"`([^`<]+?)\s*<[^>`]*>`_{1,2}|`([^`<]+)`_{1,2}")
CITATION = re.compile(r"\s*\[#?\w+\]_{0,2}(?=[\s.,;:)]|$)")
REFERENCE = re.compile(r"(?<=[A-Za-z])_{1,2}(?=[\s.,;:)]|$)")
EMPHASIS = re.compile(r"`+|(?<=\S)\*+|\*+(?=\S)")
SENTENCE_END = re.compile(r"(?<![.\s][A-Za-z])[.!?][)\"'\u201d]*(?=\s|$)")


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a cleaned docstring that read as English, markup removed, each on one line."""
    cleaned = (_clean(lines) for block in BREAK.split(text) for lines in _bodies(block))
    return [paragraph for paragraph in cleaned if paragraph is not None]


class Seen:
    """Remembers paragraphs by their runs of eight words, so that copies with a few changed words are noticed."""

    def __init__(self) -> None:
        self._pieces: set[int] = set()

    def fresh(self, paragraph: str) -> bool:
        """Whether at most half of the paragraph's pieces were met before; its own pieces are remembered."""
        words = re.findall(r"[a-z]+", paragraph.lower())
        starts = range(max(1, len(words) - SHINGLE + 1))
        pieces = {zlib.crc32(" ".join(words[i : i + SHINGLE]).encode()) for i in starts}
        known = len(pieces & self._pieces)
        self._pieces |= pieces
        return known <= len(pieces) / 2


def _bodies(block: str) -> list[list[str]]:
    """The lines of a block; of a definition list, the lines of each definition without its term."""
    lines = block.strip("\n").splitlines()
    indents = [len(line) - len(line.lstrip()) for line in lines]
    deeper = [indent > min(indents) for indent in indents]
    if not lines or 2 * sum(deeper) < len(lines) or deeper[0] or BULLET.match(lines[0].lstrip()):
        return [lines]
    runs = itertools.groupby(zip(deeper, lines, strict=True), key=lambda pair: pair[0])
    return [[line for _, line in run] for inside, run in runs if inside]


def _clean(lines: list[str]) -> str | None:
    if len(lines) > 1 and lines[1].strip() and set(lines[1].strip()) <= set("-=~^\"'"):
        lines = lines[2:]  # an underlined heading
    end = next((i for i, line in enumerate(lines) if FIELD.match(line)), len(lines))
    lines = lines[:end]
    if sum(map(len, lines)) < SHORTEST_PARAGRAPH or SECTION.match(lines[0].strip()):
        return None
    if any(line.lstrip().startswith(CODE) or TABLE.match(line) for line in lines):
        return None
    paragraph = _sentences(_without_markup(BULLET.sub("", " ".join(" ".join(lines).split()))))
    return paragraph if _reads_as_english(paragraph) else None


def _without_markup(text: str) -> str:
    text = ROLE.sub(_role_text, text)
    text = LINK.sub(lambda found: found[1] or found[2], text)
    text = REFERENCE.sub("", CITATION.sub("", text))
    return EMPHASIS.sub("", text).replace("::", ":").strip()


def _role_text(found: re.Match[str]) -> str:
    """What a reader of the rendered page sees of a cross reference such as :func:`~package.module.name`."""
    shown, bracket, _ = found[1].partition("<")
    if bracket and shown.strip():
        return shown.strip()
    target = found[1].strip("<>~!.")
    return target.rpartition(".")[2] if found[1].startswith("~") or target.startswith("_") else target


def _sentences(text: str) -> str:
    """The text up to its last full stop: a tail that ends in a colon announces code that is gone."""
    ends = [found.end() for found in SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else ""


def _reads_as_english(paragraph: str) -> bool:
    if len(paragraph) < SHORTEST_PARAGRAPH or not paragraph[0].isupper() or "\\" in paragraph:
        return False
    words = paragraph.split()
    plain = sum(bool(WORD.match(word)) for word in words)
    common = sum(word.strip(",;:!?()\"'").lower() in COMMON for word in words)  # "A." is an author's initial
    return plain >= PLAIN_WORDS * len(words) and common >= COMMON_WORDS * len(words)
