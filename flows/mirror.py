"""MLflow behind a run: finished cells are copied from a thread. What MLflow does not take now, a later run fills in."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterable, Sequence
from types import TracebackType

from flows.home import Home, shown_url
from sparseforge_core.store.rows import StageState
from sparseforge_core.tracking.mlflow_tracker import (
    MirrorError,
    is_mirrored,
    mirror_cell,
    run_of,
    save_views,
    saved_views,
    score_names,
)
from sparseforge_core.tracking.views import views_of

log = logging.getLogger(__name__)


def lacking(home: Home, states: Sequence[StageState]) -> list[str]:
    """Cells with finished stages in this home that MLflow does not have yet; reads one small file a cell."""
    done: dict[str, list[str]] = {}
    for state in states:
        if state.status == "done" and (home.cell(state.cell_key) / state.stage / "measurements.json").is_file():
            done.setdefault(state.cell_key, []).append(state.stage)
    return [key for key, stages in done.items() if not is_mirrored(home.cell(key), stages, home.mlflow_uri)]


class Mirror:
    """Copies cells of one grid into MLflow while its block runs; an outage is a warning, never a failure."""

    def __init__(self, home: Home, grid: str, states: Sequence[StageState]) -> None:
        self.home, self.grid = home, grid
        self.about = {state.cell_key: state for state in states}
        self._waiting: queue.Queue[str | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._away = False
        self._closing = threading.Event()
        self._dropped: set[str] = set()
        self._scores: dict[str, dict[str, None]] = {}
        """Names of the scores of the models that were copied now, in the order in which they came."""

    def put(self, cells: Iterable[str]) -> None:
        """Have these cells copied soon."""
        for key in cells:
            self._waiting.put(key)

    def drop(self) -> None:
        """Leave what is still waiting to the next run: the user wants to stop."""
        self._away = True
        self._closing.set()

    def __enter__(self) -> Mirror:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._waiting.put(None)
        self._thread.join()
        if self._dropped:
            log.warning("MLflow does not have %d cells yet; the next run of the grid fills them in", len(self._dropped))

    def _work(self) -> None:
        while (key := self._waiting.get()) is not None:
            if self._away and self._closing.is_set():
                self._dropped.add(key)
                continue
            try:
                mirror_cell(self.home.mlflow_uri, self.home.root, self.home.cell(key), self.grid, self.about[key])
            except MirrorError as error:
                if not self._away:
                    log.warning("%s; the run goes on without it", error)
                self._away = True
                self._dropped.add(key)
            else:
                self._away = False
                self._dropped.discard(key)
                names = self._scores.setdefault(self.about[key].model, {})
                names.update(dict.fromkeys(score_names(self.home.cell(key))))
        self._save_views()

    def _save_views(self) -> None:
        """Put the saved views beside what was copied: the links that `links` gives open them."""
        if not self._scores or self._away:
            return
        try:
            wanted = {model: list(names) for model, names in self._scores.items()}
            save_views(self.home.mlflow_uri, self.home.root, self.grid, wanted)
        except MirrorError as error:
            log.warning("%s; the saved views are as they were", error)


def links(home: Home, grid: str, models: Iterable[str]) -> list[tuple[str, str, str]]:
    """(model, what a view shows, its address) where MLflow is a server; nothing where it is a file.

    Raises MirrorError if the server cannot be reached.
    """
    server = home.mlflow_uri
    if not server.startswith(("http://", "https://")):
        return []
    found = saved_views(server, home.root, models)
    return [
        (model, view.about, view.address(server, number, grid))
        for model, (number, kept) in found.items()
        for view in views_of(grid, ())
        if view.tag(grid)[0] in kept
    ]


def runs_of(home: Home, cells: Iterable[str]) -> dict[str, str]:
    """The MLflow runs of some cells, as far as this home has mirrored them: each with the MLflow that holds it."""
    found = {key: run_of(home.cell(key)) for key in dict.fromkeys(cells)}
    return {key: f"{run['run']} in {shown_url(run['uri'])}" for key, run in found.items() if run is not None}


__all__ = ["Mirror", "MirrorError", "lacking", "links", "runs_of"]
