"""Home: the folder of everything that runs make, and the addresses in it unless the environment says otherwise."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

QUIET = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""No telemetry, no advertisements, no progress bars of libraries over our own."""


@dataclass(frozen=True)
class Home:
    """Where things are."""

    root: Path
    store_url: str
    mlflow_uri: str

    @classmethod
    def of(cls, root: str | Path | None = None, db: str | None = None) -> Home:
        """From the arguments, else $SPARSEFORGE_HOME, $SPARSEFORGE_DB, $MLFLOW_TRACKING_URI, else `runs/`."""
        folder = Path(root or os.environ.get("SPARSEFORGE_HOME") or "runs").resolve()
        store = db or os.environ.get("SPARSEFORGE_DB") or f"sqlite:///{folder / 'store.db'}"
        mlflow = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        return cls(folder, store, mlflow)

    @property
    def mlflow_ui(self) -> str:
        """Where a browser finds MLflow: $SPARSEFORGE_MLFLOW_UI, else the tracking server; empty for a local file."""
        served = self.mlflow_uri if self.mlflow_uri.startswith(("http://", "https://")) else ""
        return (os.environ.get("SPARSEFORGE_MLFLOW_UI") or served).rstrip("/")

    def cell(self, key: str) -> Path:
        """The folder of a cell."""
        return self.root / "cells" / key

    def grid(self, name: str) -> Path:
        """The folder of a grid's exhibits."""
        return self.root / name


def prefect_environment(home: Home) -> None:
    """Prefect's own records live in the home, and it keeps quiet; to be called before prefect is imported."""
    os.environ.setdefault("PREFECT_HOME", str(home.root / "prefect"))
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")


def be_quiet() -> None:
    """Set the environment that keeps libraries quiet and offline-friendly; what the user has set stays."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def shown_url(url: str) -> str:
    """A database's or server's address without its password."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", url)
