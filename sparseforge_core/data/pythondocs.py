"""The prose inside Python and the installed scientific packages, read from their sources without importing them.

Docstrings are cut into paragraphs; doctests, parameter tables, code and drawings are dropped; what remains must look
like English sentences. Paragraphs of one file make one document; a paragraph seen before is left out.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import platform
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from sparseforge_core.errors import DataError

PACKAGES = ("numpy", "scipy", "scikit-learn", "networkx", "sqlalchemy", "matplotlib", "nltk")
"""Distributions whose docstrings are read; all are in our lock."""

MODULES = {"scikit-learn": "sklearn"}

WORD = re.compile(r"[A-Za-z][a-z'-]*[.,;:]?$")
SHORTEST_DOCUMENT = 200
SHORTEST_PARAGRAPH = 60


def versions() -> dict[str, str]:
    """Version of Python and of each package: the text changes with them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise DataError(f"the corpus python-docs reads the installed package {name}, which is missing") from error
    return found


def prose() -> Iterator[str]:
    """Documents, in a fixed order: Python's reference topics, then package by package, file by file."""
    import pydoc_data.topics

    seen: set[bytes] = set()
    for _, text in sorted(pydoc_data.topics.topics.items()):
        yield from _document(_paragraphs(text, seen))
    for name in PACKAGES:
        for file in _sources(MODULES.get(name, name)):
            yield from _document([p for text in _docstrings(file) for p in _paragraphs(text, seen)])


def _document(paragraphs: list[str]) -> Iterator[str]:
    text = "\n\n".join(paragraphs)
    if len(text) >= SHORTEST_DOCUMENT:
        yield text + "\n"


def _sources(module: str) -> list[Path]:
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise DataError(f"the corpus python-docs reads the installed module {module}, which is missing")
    root = Path(found.submodule_search_locations[0])
    return sorted(path for path in root.rglob("*.py") if "tests" not in path.parts)


def _docstrings(file: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # other people's escapes are not ours to report
        try:
            tree = ast.parse(file.read_bytes())
        except SyntaxError:  # a template for another Python version holds no text for us
            return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text and len(text) >= SHORTEST_PARAGRAPH:
                yield inspect.cleandoc(text)


def _paragraphs(text: str, seen: set[bytes]) -> list[str]:
    """The paragraphs of a text that read like English and were not seen before, each on one line."""
    kept = []
    for block in re.split(r"\n\s*\n", text):
        paragraph = _clean(block)
        if paragraph is None:
            continue
        digest = hashlib.sha256(paragraph.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            kept.append(paragraph)
    return kept


def _clean(block: str) -> str | None:
    lines = block.strip().splitlines()
    if len(lines) > 2 and set(lines[1].strip()) <= set("-=~") and lines[1].strip():
        lines = lines[2:]  # an underlined heading
    if any(re.match(r"\s*[\w*, ]+ : ", line) for line in lines):
        return None  # a parameter table
    if not lines or any(line.lstrip().startswith((">>>", "...", ".. ", "$", "|", "+-", "===")) for line in lines):
        return None
    paragraph = " ".join(" ".join(lines).split())
    paragraph = re.sub(r":[a-z:]+:`~?([^`<]*)(?:<[^`]*>)?`", r"\1", paragraph)
    paragraph = re.sub(r"[`*]+", "", paragraph).strip()
    if len(paragraph) < SHORTEST_PARAGRAPH or paragraph[-1] not in ".:!?)" or not paragraph[0].isupper():
        return None
    words = paragraph.split()
    plain = sum(bool(WORD.match(word)) for word in words)
    return paragraph if plain >= 0.8 * len(words) else None
