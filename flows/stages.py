"""One stage in this process: its inputs beside its outputs, and as much at once as memory has been known to hold."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flows.failures import halvings, inputs_of, is_out_of_memory, patiently
from flows.home import Home
from sparseforge_core import files, measured
from sparseforge_core.errors import CheckpointMismatch, DoesNotFit, OutOfMemory
from sparseforge_core.store.store import ResultStore

log = logging.getLogger(__name__)

TRAIN = "train"
"""The name of the stage that makes a cell's model; every other is the key of a suite."""
BATCH_SIZE = 16
"""Sequences that a suite puts through the model at once."""


def finished(store: ResultStore, home: Home, key: str, stage: str) -> Path | None:
    """The measurements of a suite that are complete on disk; training knows by itself what it has finished."""
    path = home.cell(key) / stage / measured.FILE
    if stage == TRAIN or not path.is_file():
        return None
    if measured.read(path).get("suite") != json.loads(patiently(lambda: store.suite_spec(stage))):
        log.warning("%s says another suite than the store; measuring again", path)
        return None
    return path


def run_stage(
    store: ResultStore,
    home: Home,
    key: str,
    stage: str,
    on_step: Callable[[Any], None] | None,
    should_stop: Callable[[], bool],
) -> Path:
    """Train or measure in this process; returns the measurements file.

    What ran out of memory before is run with half as much at once for each time it did. Raises OutOfMemory, or
    DoesNotFit where nothing is left to halve, and whatever else the stage raises.
    """
    from flows.launching import train_on_ranks
    from flows.placements import placement_for
    from flows.remaking import restore_models
    from sparseforge_core import execution, run, specs
    from sparseforge_core.evaluate.suites import Suite
    from sparseforge_core.identity import loads, required_cells

    body = patiently(lambda: store.cell_body(key))  # the attempt has begun: a store that is away must not cost it
    asked = None if stage == TRAIN else patiently(lambda: store.suite_spec(stage))
    _write_inputs(home, key, stage, body, asked)
    cell = loads(body)
    placement = placement_for(cell.recipe)
    directory = home.cell(key) / stage
    halved = halvings(patiently(lambda: store.attempts(key)), stage)
    restore_models(store, home, (() if stage == TRAIN else (cell,)) + required_cells(cell), should_stop)
    if asked is None:
        plan = cell.recipe.train
        whole = placement.micro_batch or plan.sequences
        size = max(1, whole >> halved)
        if placement.gpus > 1:  # a process of its own for each device
            return train_on_ranks(
                body, directory, home.root, placement, micro_batch=size, on_step=on_step, should_stop=should_stop
            )
        how = execution.Execution(micro_batch=size if halved else placement.micro_batch)
        try:
            with _memory_accounted(cell.recipe, size if plan.steps else 1, halved, execution.device_memory()):
                return run.train_cell(
                    cell, directory, home.root, on_step=on_step, should_stop=should_stop, execution=how
                )
        except CheckpointMismatch as error:
            raise CheckpointMismatch(f"{error}; or delete {directory} to train this cell anew") from error
    suite = specs.decode(json.loads(asked), Suite, "suite")
    size = max(1, BATCH_SIZE >> halved)
    with _memory_accounted(cell.recipe, size, halved, execution.device_memory()):
        return run.evaluate_cell(cell, suite, directory, home.root, batch_size=size)


def _write_inputs(home: Home, key: str, stage: str, body: str, suite: str | None) -> None:
    """The cell file, and that of the suite: what it takes to run the stage again without the store."""
    for path in inputs_of(home, key, stage):
        if not path.is_file():
            files.write_text(path, body if suite is None or path.stem != stage else suite)
        if path.stem == stage:  # only who holds the stage writes it; the rest of the folder is cleaned by training
            files.remove_leftovers(path)


@contextlib.contextmanager
def _memory_accounted(recipe: Any, size: int, halved: int, available: int) -> Iterator[None]:
    """Raise OutOfMemory where memory ended and half of `size` is left to try, else DoesNotFit with the arithmetic.

    Even what cannot be halved gets one more try: alone, in a fresh process.
    """
    from flows.placements import memory_gib

    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        if size > 1 or not halved:
            plan = f"with {max(1, size // 2)} of {size} sequences at once" if size > 1 else "once more"
            raise OutOfMemory(f"{said}; next, {plan}, alone and in a fresh process") from error
        raise DoesNotFit(
            f"{said}; it ran alone with 1 sequence at once, and nothing is left to halve: weights and the state beside "
            f"them take about {memory_gib(recipe):.2f} GiB, activations of {recipe.train.length} tokens come on top, "
            f"and there are {available / 2**30:.2f} GiB. Take a machine with more memory or a smaller model"
        ) from error
