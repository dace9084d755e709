"""What our sources never do: unpickle, run remote code, open a shell, or write values into SQL text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("sparseforge_core", "flows", "analysis", "infra")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

LOADERS = {
    "torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "joblib.load", "dill.load", "dill.loads", "marshal.load", "marshal.loads", "shelve.open", "os.system", "os.popen",
    "pandas.read_pickle", "pd.read_pickle", "eval", "exec",
}  # fmt: skip
SWITCHES = {"trust_remote_code", "shell", "allow_pickle"}
"""Keywords that must never be given as anything but False."""
EXCUSED = {
    ("sparseforge_core/store/engine.py", "connection.execute of a text put together from values"): "PRAGMA takes none",
    ("sparseforge_core/store/engine.py", "cursor.execute of a text put together from values"): "SET takes none",
}
"""(file, breach) -> why it is right: these statements take no parameters, and their values are our own numbers."""
SQL = {"execute", "exec_driver_sql", "text"}
"""Calls whose first argument may be SQL."""


def breaches(source: str) -> Iterator[str]:
    """What is forbidden in a source, with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if f"{node.module}.{alias.name}" in LOADERS:
                    yield f"{node.lineno}: imports {node.module}.{alias.name}"
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in LOADERS:
            yield f"{node.lineno}: calls {name}"
        for keyword in node.keywords:
            off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if (
                keyword.arg in SWITCHES
                and not off
                and (keyword.arg != "shell" or "subprocess" in name or "open" in name)
            ):
                yield f"{node.lineno}: gives {keyword.arg}={ast.unparse(keyword.value)}"
        if name.rpartition(".")[2] in SQL and node.args and built(node.args[0]):
            yield f"{node.lineno}: {name} of a text put together from values"


def built(node: ast.expr) -> bool:
    """Whether a text is an f-string with values in it, a sum or % of texts, or a `.format`."""
    if isinstance(node, ast.JoinedStr):
        return any(isinstance(part, ast.FormattedValue) for part in node.values)
    if isinstance(node, ast.BinOp):
        return any(isinstance(n, ast.Constant) and isinstance(n.value, str) for n in ast.walk(node))
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format"


def test_no_source_does_what_is_forbidden() -> None:
    assert len(SOURCES) > 50
    found, excused = [], set()
    for path in SOURCES:
        file = path.relative_to(ROOT).as_posix()
        for breach in breaches(path.read_text(encoding="utf-8")):
            key = (file, breach.partition(": ")[2])
            if key in EXCUSED:
                excused.add(key)
            else:
                found.append(f"{file}:{breach}")
    assert not found, "\n".join(found)
    assert excused == set(EXCUSED), "an excuse is no longer needed"


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "from pickle import loads",
        "yaml.load(text)",
        "open_model(name, trust_remote_code=True)",
        "open_model(name, trust_remote_code=options.trust)",
        "subprocess.run(line, shell=True)",
        "np.load(path, allow_pickle=True)",
        "connection.exec_driver_sql(f'PRAGMA {name}')",
        "sa.text('SELECT ' + name)",
        "connection.execute('SELECT {}'.format(name))",
    ],
)
def test_each_forbidden_thing_is_seen(line: str) -> None:
    assert list(breaches(line))


@pytest.mark.parametrize(
    "line", ["open_model(name, trust_remote_code=False)", "sa.text('SELECT 1')", "yaml.safe_load(t)"]
)
def test_what_is_allowed_passes(line: str) -> None:
    assert not list(breaches(line))
