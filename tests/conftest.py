"""What every test may rely on: a quiet, offline environment, a workspace of its own, and real databases.

Nothing heavy is imported here: a test of the store must not pay for torch.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import sqlalchemy as sa

QUIET = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "TQDM_DISABLE": "1",
    "MPLBACKEND": "Agg",
}
"""No network, no telemetry, one thread: set before any test module imports a library that reads them."""

WORKSPACE_VARIABLES = ("SPARSEFORGE_HOME", "SPARSEFORGE_DB", "MLFLOW_TRACKING_URI")

SERVED = Path(__file__).parent / "integration"
"""Tests of whole systems."""

os.environ.update(QUIET)
for variable in WORKSPACE_VARIABLES:
    os.environ.pop(variable, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs PostgreSQL, so that `-m "not postgres"` leaves it out; put files in the order to run them in.

    Fast files first, so that a mistake shows soon; then those that start servers, then those with most slow tests: a
    long file that begins last is waited for by the other workers.
    """
    slow: Counter[Path] = Counter()
    for item in items:
        if "postgres_server" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.postgres)
        slow[item.path] += item.get_closest_marker("slow") is not None
    served = {path: path.is_relative_to(SERVED) for path in slow}
    items.sort(key=lambda item: (slow[item.path] > 0, not served[item.path], -slow[item.path]))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty workspace, which commands under test find by themselves."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("SPARSEFORGE_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[sa.URL]:
    """The administration URL of a real PostgreSQL; fails, saying what to install, where there is none."""
    from tests import postgres

    if os.environ.get(postgres.SKIP_VARIABLE) == "1":
        pytest.skip(f"{postgres.SKIP_VARIABLE}=1: not tested on PostgreSQL")
    try:
        with postgres.server() as url:
            yield url
    except postgres.NoPostgres as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture
def postgres_url(postgres_server: sa.URL) -> Iterator[str]:
    """The URL of an empty PostgreSQL database of this test's own."""
    from tests import postgres

    with postgres.database(postgres_server) as url:
        yield url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of a SQLite file of this test's own, which does not exist yet."""
    return f"sqlite:///{tmp_path / 'store.db'}"


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def store_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty store, once on SQLite and once on PostgreSQL."""
    name = "sqlite_url" if request.param == "sqlite" else "postgres_url"
    return str(request.getfixturevalue(name))
