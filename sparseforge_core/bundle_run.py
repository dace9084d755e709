"""Going through the cells of a bundle: processes may share it, a cell that fails stops no other, time is kept.

A cell is worked on by the process that holds its lock, which goes with the process. What is finished is passed over,
what failed is said in `failures/STAGE.json` of the cell's folder, and each process tries a cell once. Memory that ran
out beside others is no failure of the cell: it is tried again, from its last checkpoint, when fewer are at work.
"""

from __future__ import annotations

import argparse
import gc
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparseforge_core import files, measured
from sparseforge_core.bundles import Entry
from sparseforge_core.checkpoint import MANIFEST, drop_weights, dropped
from sparseforge_core.errors import BundleError, CellsFailed, FolderHeld, Interrupted, SparseForgeError, described
from sparseforge_core.evaluate.suites import Suite, suite_key
from sparseforge_core.identity import cell_key, required_cells
from sparseforge_core.opening import divergence
from sparseforge_core.recipe import Cell

log = logging.getLogger(__name__)

TRAIN, FINAL = "train", "final"
FAILURES, CLAIMS, CROWDED, TURNS = "failures", "claims", "crowded", "turns"
"""Folder of a cell with what failed in it; folders of the bundle's home with the locks of its cells, with how many
others were at work when a cell found no memory, and with the locks of those whose turn it is to train."""
LEAST = 0.25
"""Share of another cell's time that one of fewer tokens is expected to take: after a pretraining come short ones."""
POLL = 0.5
"""Seconds between two looks at cells that other processes hold."""
FAILS = (SparseForgeError, OSError, RuntimeError, ValueError, ArithmeticError, LookupError, ImportError)
"""What ends a stage and not the bundle: refusals, full memory, what is not installed, numbers that make no sense."""


class _NoRoom(Exception):
    """A stage found no memory beside other cells."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """How one cell is trained and measured here."""

    train: Callable[[Cell, int], object]
    """Given the number of other processes at work on the bundle too."""
    measure: Callable[[Cell, Suite], object]
    should_stop: Callable[[], bool]


@dataclass
class Walk:
    """One process on its way through a bundle's cells."""

    bundle: Sequence[Entry]
    """All cells of it."""
    entries: Sequence[Entry]
    """Those to run, each after those it needs."""
    cells: Path
    """The folder of the cells' folders."""
    work: Work
    seconds: float | None = None
    """From now, in which cells may be started; None: all."""
    drop_models: bool = False
    """Whether the weights of a cell are deleted once all of it is measured and no other cell waits for them."""
    failed: dict[str, list[str]] = field(default_factory=dict)
    """What went wrong, by cell, since this process began."""
    took: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Seconds and tokens of the cells that were finished since this process began, by whomever."""

    def __post_init__(self) -> None:
        self.began, self.clock = time.time(), time.monotonic()
        self.left = {cell_key(entry.cell): entry for entry in self.entries}
        self.late: dict[str, float] = {}

    def go(self) -> None:
        """Until every cell is finished, has failed, or would take longer than is left.

        Raises CellsFailed in the end if something failed, Interrupted when asked to stop.
        """
        while self.left:
            if not self._step():
                if not set(self.left) - set(self.late):
                    log.info("%d cells are not started: they would take longer than is left", len(self.late))
                    break
                time.sleep(POLL)
        if self.failed:
            said = "; ".join(f"{key}: {why}" for key, reasons in self.failed.items() for why in reasons[:1])
            raise CellsFailed(
                f"{len(self.failed)} of {len(self.entries)} cells failed, all others went on: {said}. Run the same "
                f"command again to try them again; {self.cells}/CELL/{FAILURES}/ says more"
            )

    def _step(self) -> bool:
        """Settle the first cell that can be; False if all that are left are waited for, held by others or too long."""
        for key, entry in list(self.left.items()):
            if self.work.should_stop():
                raise Interrupted("stopped between two cells; run the same command again to go on from here")
            if self._settled(key, entry):
                return True
            if self._is_late(key, entry) or self._waits(key, entry) or self._is_crowded(key):
                continue
            try:
                with files.held(self.cells.parent / CLAIMS / key, seconds=0):
                    if not self._settled(key, entry):  # somebody may have finished it in the meantime
                        try:
                            self._run(key, entry)
                        except _NoRoom:
                            continue
                        if not self._settled(key, entry):
                            raise BundleError(f"cell {key} ended and left no results in {self.cells / key}")
            except FolderHeld:
                continue
            return True
        return False

    def _settled(self, key: str, entry: Entry) -> bool:
        """Whether a cell is finished or has failed since this process began; then it is left behind."""
        if key in self.left and self.finished(entry):
            del self.left[key]
            self.late.pop(key, None)
            self._drop()
            return True
        if key in self.left and (key in self.failed or self._failed_elsewhere(key)):
            del self.left[key]
            self.late.pop(key, None)
            return True
        return key not in self.left

    def _is_crowded(self, key: str) -> bool:
        """Whether as many others are at work as when the cell found no memory beside them."""
        path = self.cells.parent / CROWDED / f"{key}.json"
        try:
            if path.stat().st_mtime < self.began:
                return False  # of another time, perhaps of another device
            return self._companions(key) >= int(files.read_json(path)["others"])
        except FileNotFoundError:
            return False

    def _failed_elsewhere(self, key: str) -> bool:
        """Whether another process has tried a cell in vain since this one began."""
        found = [why for path, why in failures(self.cells / key).items() if path.stat().st_mtime >= self.began]
        if found:
            self.failed[key] = found
        return bool(found)

    def finished(self, entry: Entry) -> bool:
        """Whether a cell is trained and measured under every suite."""
        folder = self.cells / cell_key(entry.cell)
        return is_trained(folder / TRAIN) and all(
            (folder / suite_key(suite) / measured.FILE).is_file() for suite in entry.suites
        )

    def _waits(self, key: str, entry: Entry) -> bool:
        """Whether a cell that this one reads is still to be made; it is late where that one is."""
        read = {cell_key(cell) for cell in required_cells(entry.cell)} & set(self.left)
        needed = {one for one in read if not is_trained(self.cells / one / TRAIN)}
        if late := [self.late[one] for one in needed if one in self.late]:
            self.late[key] = max(late)
        return bool(needed)

    def _is_late(self, key: str, entry: Entry) -> bool:
        """Whether a cell, by what one like it took, would not end in time."""
        if self.seconds is None:
            return False
        rest = self.seconds - (time.monotonic() - self.clock)
        expected = self._expected(entry.cell.recipe.train.tokens)
        if rest > expected:
            return False
        self.late[key] = expected
        return True

    def _expected(self, tokens: int) -> float:
        """Seconds for a cell of so many tokens, by the finished one that is nearest to it; 0 where there is none.

        Cells that train and cells that do not say nothing of each other.
        """
        for entry in self.bundle:
            key = cell_key(entry.cell)
            if key not in self.took and self.finished(entry) and (seconds := self._written(entry)) is not None:
                self.took[key] = seconds, entry.cell.recipe.train.tokens
        like = [(took, of) for took, of in self.took.values() if bool(of) == bool(tokens)]
        if not like:
            return 0.0
        if not tokens:
            return max(took for took, _ in like)
        took, of = min(like, key=lambda known: abs(math.log(tokens / known[1])))
        return took * max(LEAST, tokens / of)

    def _written(self, entry: Entry) -> float | None:
        """Seconds that a finished cell's stages say they took; None of one from before this process began."""
        folder = self.cells / cell_key(entry.cell)
        paths = [folder / stage / measured.FILE for stage in (TRAIN, *map(suite_key, entry.suites))]
        if paths[0].stat().st_mtime < self.began:
            return None
        contexts = [files.read_json(path)["context"] for path in paths]
        return float(sum(context.get(part, 0.0) for context in contexts for part in ("wall_seconds", "waited_seconds")))

    def _run(self, key: str, entry: Entry) -> None:
        """Train and measure a cell. Raises _NoRoom where it found no memory beside other cells."""
        began = time.monotonic()
        if self._stage(key, TRAIN, lambda: self._train(entry)):
            for suite in entry.suites:
                if self.work.should_stop():
                    raise Interrupted("stopped between two stages; run the same command again to go on from here")
                stage = suite_key(suite)
                if not (self.cells / key / stage / measured.FILE).is_file():
                    self._stage(key, stage, lambda suite=suite: self.work.measure(entry.cell, suite))  # type: ignore[misc]
        spent = time.monotonic() - began
        if key not in self.failed:
            self.took[key] = spent, entry.cell.recipe.train.tokens
            log.info("cell %s done in %.1f s", key, spent)
        _free_memory()

    def _train(self, entry: Entry) -> None:
        folder = self.cells / cell_key(entry.cell) / TRAIN
        if not dropped(folder):
            self.work.train(entry.cell, self._companions(cell_key(entry.cell)))

    def _companions(self, own: str) -> int:
        """How many other cells somebody works on now, of this bundle or of another one that has the same home."""
        claims = self.cells.parent / CLAIMS
        return sum(files.is_held(claims / name) for name in files.ever_held(claims) if name != own)

    def _stage(self, key: str, stage: str, run: Callable[[], object]) -> bool:
        """Run a stage; what ends it is written down. Returns whether it ended well."""
        path = self.cells / key / FAILURES / f"{stage}.json"
        _free_memory()
        try:
            run()
        except Interrupted:
            raise
        except FAILS as error:
            others = self._companions(key) if isinstance(error, torch.OutOfMemoryError) else 0
            if others:
                log.warning("cell %s, stage %s: no memory beside %d others; to be tried with fewer", key, stage, others)
                files.write_json(self.cells.parent / CROWDED / f"{key}.json", {"cell": key, "others": others})
                raise _NoRoom from None
            log.exception("cell %s, stage %s failed", key, stage)
            why = described(error)
            files.write_json(path, {"cell": key, "stage": stage, "error": why, "process": os.getpid()})
            self.failed.setdefault(key, []).append(f"{stage}: {why}")
            return False
        path.unlink(missing_ok=True)
        return True

    def _drop(self) -> None:
        """Delete the weights of finished cells that no unfinished one reads."""
        if not self.drop_models:
            return
        unfinished = [entry for entry in self.bundle if not self.finished(entry)]
        read = {cell_key(cell) for entry in unfinished for cell in required_cells(entry.cell)}
        for entry in self.bundle:
            key = cell_key(entry.cell)
            if key in read or not (self.cells / key / TRAIN / FINAL).is_dir() or not self.finished(entry):
                continue
            with files.only_one(self.cells.parent / CLAIMS / f"drop-{key}"):
                drop_weights(self.cells / key / TRAIN / FINAL)


def is_trained(folder: Path) -> bool:
    """Whether a train stage has ended with a model, with one whose weights were dropped, or by diverging."""
    if not (folder / measured.FILE).is_file():
        return False
    return (folder / FINAL).is_dir() or dropped(folder) or divergence(folder) is not None


def not_measured(entry: Entry, folder: Path) -> list[str]:
    """The suites that a trained cell is not measured by; none of one that has no weights of its own."""
    if not is_trained(folder / TRAIN) or divergence(folder / TRAIN) is not None:
        return []
    manifest = folder / TRAIN / FINAL / MANIFEST
    if manifest.is_file() and not files.read_json(manifest)["files"]:
        return []
    return [suite.name for suite in entry.suites if not (folder / suite_key(suite) / measured.FILE).is_file()]


def failures(folder: Path) -> dict[Path, str]:
    """`STAGE: ERROR` of every stage of a cell that failed last time, by the file that says so."""
    found = {}
    for path in sorted((folder / FAILURES).glob("*.json")):
        body = files.read_json(path)
        found[path] = f"{body['stage']}: {body['error']}"
    return found


def _free_memory() -> None:
    """Give a GPU's memory back to the processes that share it. Raises RuntimeError if the GPU has stopped working."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def add_commands(commands: Any) -> argparse.ArgumentParser:
    """Add `bundle`, `status` and `pack` to the command line of one cell; returns the parser of `bundle`."""
    bundle: argparse.ArgumentParser = commands.add_parser(
        "bundle", help="run many cells in one warm process, for machines without a store; processes may share it"
    )
    bundle.add_argument("folder", type=Path, help="folder with bundle.json, written by `sparseforge bundle`")
    bundle.add_argument("--index", type=int, help="only this cell of it, counted from 0, as a job array does")
    bundle.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="start so many processes for each visible GPU, in all without one, and wait for them; logs in home/logs",
    )
    bundle.add_argument(
        "--seconds", type=float, help="start no cell that, by what the last one took, would not end within so many"
    )
    bundle.add_argument(
        "--train-at-once",
        type=int,
        metavar="N",
        help="so many of the processes that share a device train on it at once; the others open and measure theirs",
    )
    bundle.add_argument(
        "--drop-models",
        action="store_true",
        help="delete weights once all is measured; manifests say what they were",
    )
    looking = commands.add_parser("status", help="how far each cell of a bundle is, from here or beside those at work")
    looking.add_argument("folder", type=Path, help="the bundle's folder, with its home/ in it")
    looking.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    packing = commands.add_parser("pack", help="what a bundle has made so far, without weights, in one archive")
    packing.add_argument("folder", type=Path, help="the bundle's folder, with its home/ in it")
    packing.add_argument("out", type=Path, help="NAME.tar.xz; in parts NAME.tar.xz.00 and so on where it is large")
    packing.add_argument(
        "--partial", action="store_true", help="also of cells that are trained and not measured to their end"
    )
    packing.add_argument("--part-mib", type=float, default=15.0, help="largest size of a part (default 15)")
    return bundle
