"""The prose inside Python and the installed scientific packages, read from their sources without importing them.

Python's own reference topics come first, then package by package, file by file. The paragraphs of one file make one
document, so that what belongs together stays on one side of the held-out split. PyTorch is left out because its
version differs between machines with and without a GPU, and with it the text would; benchmark and evaluation
packages are left out because a corpus must not hold what is measured.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path

from sparseforge_core.data import english
from sparseforge_core.errors import DataError

PACKAGES = ("numpy", "scipy", "scikit-learn", "networkx", "sqlalchemy", "matplotlib", "pandas", "huggingface_hub")
"""Distributions whose docstrings are read, in this order; all are in our lock."""

MODULES = {"scikit-learn": "sklearn"}
"""Module of a distribution that is named otherwise."""

SKIPPED = frozenset({"tests", "testing", "_vendor", "vendored"})
"""Folders without prose of the package's own."""

SHORTEST_DOCUMENT = 200
"""Characters."""


def versions() -> dict[str, str]:
    """Version of Python and of each package: the text changes with them. Raises DataError if one is missing."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise DataError(
                f"the corpus python-docs reads the installed package {name}, which is missing; install the project's "
                "locked requirements"
            ) from error
    return found


def prose() -> Iterator[str]:
    """The documents, in a fixed order."""
    import pydoc_data.topics

    seen = english.Seen()
    for _, text in sorted(pydoc_data.topics.topics.items()):
        yield from _document([text], seen)
    for name in PACKAGES:
        for file in _sources(MODULES.get(name, name)):
            yield from _document(_docstrings(file), seen)


def _document(texts: list[str], seen: english.Seen) -> Iterator[str]:
    kept = [paragraph for text in texts for paragraph in english.paragraphs(text) if seen.fresh(paragraph)]
    document = "\n\n".join(kept)
    if len(document) >= SHORTEST_DOCUMENT:
        yield document + "\n"


def _sources(module: str) -> list[Path]:
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise DataError(f"the corpus python-docs reads the installed module {module}, which is missing")
    root = Path(found.submodule_search_locations[0])
    return sorted(path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts))


def _docstrings(file: Path) -> list[str]:
    """The docstrings of a file's module, classes and functions, outermost first, indentation removed."""
    source = file.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return []  # parsing is what costs time
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # other people's escapes are not ours to report
        try:
            tree = ast.parse(source)
        except SyntaxError:  # a template for another Python version holds no text for us
            return []
    return [inspect.cleandoc(text) for text in _walk(tree)]


def _walk(node: ast.AST) -> Iterator[str]:
    """Docstrings under a node, visiting statements only: expressions hold none and are most of the tree."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield text
    for block in ("body", "orelse", "handlers", "finalbody"):
        inner = getattr(node, block, ())
        for child in inner if isinstance(inner, list) else ():
            yield from _walk(child)
