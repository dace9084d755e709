"""Bringing home what a bundle made: everything is checked before anything is recorded, and each stage once.

A model comes with its weights, or as its manifest alone where they were dropped: the store then knows what it was, and
its folder is not there.

Nothing in a bundle is trusted: its description and every file of a stage must give their hashes, names are plain, and
nothing is a link.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from flows.cycle import FOLDER_SECONDS, beating, plan_grid, record, recorded
from flows.failures import patiently
from flows.home import Home
from flows.provenance import provenance
from flows.stages import TRAIN
from sparseforge_core import bundles, files, measured, specs
from sparseforge_core.checkpoint import MANIFEST, dropped, verify
from sparseforge_core.errors import BundleError, CellTaken, CheckpointMismatch, RecipeError
from sparseforge_core.evaluate.suites import suite_key
from sparseforge_core.identity import cell_key
from sparseforge_core.recipe import Trained
from sparseforge_core.store.rows import StageState
from sparseforge_core.store.store import ResultStore

log = logging.getLogger(__name__)

FINAL, FAILURES = "final", "failures"
ELSEWHERE = "another machine, by bundle"
"""The host of what was ingested: its models are not made again here, where they would come out otherwise."""


@dataclass(frozen=True)
class Carried:
    """A finished stage that came home, checked."""

    cell: str
    stage: str
    folder: Path
    names: tuple[str, ...]
    """The files that belong to it, relative to the folder."""
    device: str
    torch: str
    python: str
    """Empty of results that do not say it."""
    model: str | None
    """Hash of the manifest of the model that a train stage made; None of other stages, and where it diverged."""
    measured: str
    """Hash of the measurements file."""


@dataclass(frozen=True)
class Ingested:
    """What an ingest did, in stages."""

    recorded: int
    known: int
    """Done in the store before."""
    unfinished: int
    """Not finished on the other machine yet."""
    other: int = 0
    """Measured on another model than the one that the store has of the cell, and therefore left out."""
    failed: tuple[str, ...] = ()
    """`CELL, STAGE: ERROR` of what failed there and is not finished."""


@dataclass(frozen=True)
class Checked:
    """A bundle that came back, of which every file gave its hash."""

    bundle: bundles.Bundle
    cells: Path
    carried: list[Carried]


def checked(folder: Path) -> Checked:
    """What a bundle brings, without a store. Raises BundleError for what is foreign, altered, incomplete or a link."""
    bundle = bundles.read_bundle(folder)
    cells = folder / bundles.HOME / "cells"
    try:
        _refuse_strangers(bundle, cells)
        carried = [stage for entry in bundle.entries for stage in _stages(entry, cells / cell_key(entry.cell))]
    except OSError as error:
        raise BundleError(f"{folder} cannot be read: {error}. Nothing was recorded; copy the folder again") from error
    return Checked(bundle, cells, carried)


def ingest(store: ResultStore, home: Home, folder: Path) -> Ingested:
    """Check a bundle, then `bring` it. Raises BundleError, with nothing recorded, as either does."""
    return bring(store, home, checked(folder))


def bring(store: ResultStore, home: Home, found: Checked) -> Ingested:
    """Record every stage of a bundle that is finished in its `home` and not in the store, and keep its files.

    Raises BundleError, with nothing recorded, for results of a cell that is not planned here; one that was carried for
    a choice that fell otherwise, and has none, is passed over. A stage that cannot be copied as it
    was checked is a BundleError too: it is not recorded, those before it are, and the same command goes on there. Doing
    it again changes nothing.
    """
    bundle, cells, carried = found.bundle, found.cells, found.carried
    states = _planned(store, bundle, {cell_key(entry.cell) for entry in bundle.entries})
    wanted = {(cell_key(e.cell), name) for e in bundle.entries for name in (TRAIN, *map(suite_key, e.suites))}
    for key, stage in sorted({(stage.cell, stage.stage) for stage in carried} - set(states)):
        raise BundleError(
            f"stage {stage} of cell {key} is not planned here: no grid of {', '.join(bundle.grids)} has that recipe. "
            "The bundle was made by other code or from a changed grid; ingest it with that code, or plan it again"
        )
    done = {place for place, state in states.items() if state.status == "done"}
    fresh = [stage for stage in carried if (stage.cell, stage.stage) not in done]
    foreign = _of_other_models(store, bundle, carried, done)
    count = sum(_bring(store, home, bundle, stage) for stage in fresh if stage.cell not in foreign)
    failed = tuple(why for entry in bundle.entries for why in _failures(cells / cell_key(entry.cell)))
    return Ingested(
        recorded=count,
        known=len(carried) - len(fresh),
        unfinished=len(wanted & set(states)) - len(carried),
        other=sum(stage.cell in foreign for stage in fresh),
        failed=failed,
    )


def _of_other_models(
    store: ResultStore, bundle: bundles.Bundle, carried: list[Carried], done: set[tuple[str, str]]
) -> set[str]:
    """Cells whose model came out otherwise than the recorded one, and those that were made from such a model.

    What was measured of them is of another model. A teacher that was trained anew is no reason: it is of the same
    recipe, and no row is compared with it; the pupil's context says which weights taught it.
    """
    found = set()
    for stage in carried:
        if stage.stage != TRAIN or (stage.cell, TRAIN) not in done:
            continue
        recorded_ = next(a for a in store.attempts(stage.cell) if (a.stage, a.status) == (TRAIN, "done"))
        if (recorded_.context or {}).get("model_sha256") != stage.model:
            log.warning("cell %s was trained before, to another model; what is new of this one is left out", stage.cell)
            found.add(stage.cell)
    for entry in bundle.entries:  # each comes after those it needs
        source, key = entry.cell.recipe.model, cell_key(entry.cell)
        if isinstance(source, Trained) and cell_key(source.cell(entry.cell.seed)) in found:
            log.warning("cell %s stands on a model that was made anew and is another one; it is left out", key)
            found.add(key)
    return found


def _failures(folder: Path) -> Iterator[str]:
    """What failed of a cell and is not finished."""
    for path in sorted((folder / FAILURES).glob("*.json")):
        _refuse_link(path)
        body = files.read_json(path)
        if not (folder / path.stem / measured.FILE).is_file():
            yield f"{folder.name}, {path.stem}: {body.get('error')}"


def _planned(store: ResultStore, bundle: bundles.Bundle, cells: set[str]) -> dict[tuple[str, str], StageState]:
    """The planned stages of the bundle's grids, which are planned again where the store lacks some of its cells."""
    states = [state for name in bundle.grids for state in store.work(name)]
    if not cells <= {state.cell_key for state in states}:
        for name in bundle.grids:
            try:
                plan_grid(store, name)
            except RecipeError as error:
                raise BundleError(f"the bundle is of a grid that is not known here: {error}") from error
        states = [state for name in bundle.grids for state in store.work(name)]
    return {(state.cell_key, state.stage): state for state in states}


def _refuse_strangers(bundle: bundles.Bundle, cells: Path) -> None:
    """Only folders of the bundle's cells may lie under its home, and no links."""
    known = {cell_key(entry.cell) for entry in bundle.entries}
    for place in (cells.parent, cells):
        _refuse_link(place)
    for found in sorted(cells.iterdir()) if cells.is_dir() else []:
        _refuse_link(found)
        if found.name not in known:
            raise BundleError(f"{found} is of no cell of this bundle; results of another bundle belong to that one")


def _refuse_link(path: Path) -> None:
    """Raise BundleError for a link, a device or anything else that is neither a file nor a folder."""
    if os.path.lexists(path):
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise BundleError(f"{path} is a link or no ordinary file; copy what it stands for in its place")


def _stages(entry: bundles.Entry, folder: Path) -> Iterator[Carried]:
    """The finished stages of one cell, each checked to the last byte."""
    key = cell_key(entry.cell)
    suites = {suite_key(suite): specs.encode(suite, omit_defaults=False) for suite in entry.suites}
    for stage in (TRAIN, *suites):
        place = folder / stage
        for part in (folder, place, place / measured.FILE):
            _refuse_link(part)
        if not (place / measured.FILE).exists():
            continue
        names = [measured.FILE]
        for name in (measured.ITEMS, measured.JOURNAL):
            _refuse_link(place / name)
            names += [name] if (place / name).exists() else []
        try:
            body = measured.read(place / measured.FILE)
            model = body["context"].get("model_sha256") if stage == TRAIN else None
            if stage == TRAIN and "diverged" not in body:
                names += _model_names(place, key, model)
        except CheckpointMismatch as error:
            raise BundleError(f"{error}. Nothing was recorded; copy the folder again, or run the cell again") from error
        found = (body["cell"], body["stage"], body["suite"])
        if found != (key, stage, suites.get(stage)):
            raise BundleError(f"{place / measured.FILE} is of cell {found[0]}, stage {found[1]}; wanted {key}, {stage}")
        about = body["context"]
        digest = files.sha256(place / measured.FILE)
        yield Carried(
            key,
            stage,
            place,
            tuple(names),
            str(about["device"]),
            str(about["torch"]),
            str(about.get("python", "")),
            model,
            digest,
        )


def _model_names(place: Path, key: str, digest: str | None) -> list[str]:
    """The files of a finished model; its manifest beside them where its weights were dropped.

    Raises BundleError or CheckpointMismatch unless each is as the manifest says, and that is the one that was measured.
    """
    folder = place / FINAL
    _refuse_link(folder)
    _refuse_link(place / MANIFEST)
    if dropped(place):
        if files.sha256(place / MANIFEST) != digest:
            raise BundleError(f"{place / MANIFEST} is not that of the model that was measured")
        return [MANIFEST]
    _refuse_link(folder / MANIFEST)
    if not (folder / MANIFEST).is_file() or files.sha256(folder / MANIFEST) != digest:
        raise BundleError(f"{folder} is not the model that was measured, or was not copied with its {MANIFEST}")
    names = list(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])
    for name in names:
        if name != Path(name).name or name.startswith("."):
            raise BundleError(f"{folder / MANIFEST} names a file {name!r}, which leads out of its folder")
        _refuse_link(folder / name)
    verify(folder, key)
    return [f"{FINAL}/{name}" for name in (MANIFEST, *names)]


def _bring(store: ResultStore, home: Home, bundle: bundles.Bundle, stage: Carried) -> int:
    """Claim, copy and record one stage; how many were recorded: 1, or 0 if somebody was faster.

    What made it is the bundle's code on the other machine, where nobody knows of our lock; the command is this one.
    """
    origin = replace(
        provenance(),
        git_sha=bundle.code,
        dirty=bool(bundle.changes),
        diff_sha=bundle.changes,
        lock_sha="",
        host=ELSEWHERE,
        device=stage.device,
        torch=stage.torch,
        python=stage.python,
    )
    try:
        attempt = store.claim(stage.cell, stage.stage, origin)
    except CellTaken as error:
        log.warning("%s", error)
        return 0
    target = home.cell(stage.cell) / stage.stage
    try:
        with recorded(store, attempt), beating(store, attempt), files.held(target, seconds=FOLDER_SECONDS):
            files.write_text(home.cell(stage.cell) / "cell.json", store.cell_body(stage.cell))
            with files.new_folder(target) as temporary:
                _copy(stage, temporary)
            patiently(lambda: record(store, attempt, target / measured.FILE))
    except OSError as error:
        raise BundleError(
            f"stage {stage.stage} of cell {stage.cell} could not be copied to {target}: {error}. It was not recorded; "
            "what was recorded before stays. Ingest again once that is mended"
        ) from error
    return 1


def _copy(stage: Carried, folder: Path) -> None:
    """Copy a stage into an empty folder. Raises BundleError where that is not what was checked."""
    try:
        for name in stage.names:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(stage.folder / name, folder / name, follow_symlinks=False)
            _refuse_link(folder / name)
        same = files.sha256(folder / measured.FILE) == stage.measured
        measured.read(folder / measured.FILE)
        manifests = [folder / name for name in stage.names if Path(name).name == MANIFEST]
        same = same and all(files.sha256(manifest) == stage.model for manifest in manifests)
        if (folder / FINAL).is_dir():  # not where the training diverged, nor where weights were dropped
            verify(folder / FINAL, stage.cell)
    except (BundleError, CheckpointMismatch, FileNotFoundError) as error:
        log.warning("%s", error)
        same = False
    if not same:
        raise BundleError(
            f"{stage.folder} is not what it was when it was checked: something writes there, or it was not read whole. "
            f"Stage {stage.stage} of cell {stage.cell} was not recorded; what was recorded before stays. Ingest again "
            "once nobody writes there"
        )
