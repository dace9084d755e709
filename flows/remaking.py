"""A finished model whose files are gone is trained again, and accepted only if it is the recorded one to the last bit.

Results outlive models: a disk that was cleared, or a damaged folder that was deleted as its error said, must not leave
cells that can never go on because what they read counts as done.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from flows.failures import patiently
from flows.home import Home
from flows.placements import placement_for
from flows.provenance import here, machine_of
from sparseforge_core import files
from sparseforge_core.errors import CheckpointMismatch
from sparseforge_core.identity import cell_key, required_cells
from sparseforge_core.recipe import Cell
from sparseforge_core.store.store import ResultStore

log = logging.getLogger(__name__)

TRAIN, FINAL, MANIFEST = "train", "final", "manifest.json"


def restore_models(store: ResultStore, home: Home, cells: tuple[Cell, ...], should_stop: Callable[[], bool]) -> None:
    """Make the finished models of these cells again where the store has them as done and their folder is gone.

    Raises CheckpointMismatch if another model than the recorded one came out or it was made on another machine, where
    it still may be; and Interrupted when asked to stop.
    """
    for cell in cells:
        _restore(store, home, cell, should_stop)


def _restore(store: ResultStore, home: Home, cell: Cell, should_stop: Callable[[], bool]) -> None:
    key = cell_key(cell)
    directory = home.cell(key) / TRAIN
    attempts = patiently(lambda: store.attempts(key))
    done = [a for a in attempts if (a.stage, a.status) == (TRAIN, "done")]
    if not done or (directory / FINAL).is_dir() or done[0].cause == "diverged":
        # A cell that was never trained is another matter, and the stage that needs it says so; one that diverged has
        # no model by rights, and would only diverge again.
        return
    if machine_of(done[0].provenance.host) != machine_of(here()):
        raise CheckpointMismatch(
            f"the model of cell {key} was made on {done[0].provenance.host} and is not in {directory / FINAL}; copy "
            "that folder from there, or share one home between the machines"
        )
    restore_models(store, home, required_cells(cell), should_stop)
    with files.only_one(directory / FINAL):
        if (directory / FINAL).is_dir():
            return
        log.warning("the model of cell %s is gone from %s; training it again", key, directory)
        from sparseforge_core import run
        from sparseforge_core.execution import Execution

        execution = Execution(micro_batch=placement_for(cell.recipe).micro_batch)
        run.train_cell(cell, directory, home.root, should_stop=should_stop, execution=execution)
        wanted = (done[0].context or {}).get("model_sha256")
        if files.sha256(directory / FINAL / MANIFEST) != wanted:
            files.remove_folder(directory / FINAL)
            raise CheckpointMismatch(
                f"the model of cell {key} is gone, and training it again on this machine gave another one than the "
                f"recorded one (hash {wanted}); copy its folder {directory / FINAL} back from where it was trained"
            )
