"""One cell at a time: train it, evaluate it, write what was measured. Knows nothing of grids, stores or servers.

python -m sparseforge_core.run train CELL.json DIR
torchrun --nproc-per-node N -m sparseforge_core.run train CELL.json DIR
python -m sparseforge_core.run evaluate CELL.json SUITE.json DIR
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import torch

from sparseforge_core import bundle_status, bundles, files, measured, specs
from sparseforge_core.bundle_processes import LOGS, run_together
from sparseforge_core.bundle_run import TURNS, Walk, Work, add_commands
from sparseforge_core.checkpoint import MANIFEST, save_final, verify
from sparseforge_core.distributed import rank, world
from sparseforge_core.errors import BundleError, Diverged, Interrupted, RecipeError, SparseForgeError
from sparseforge_core.evaluate.contamination import NGRAM
from sparseforge_core.evaluate.measure import evaluate_model
from sparseforge_core.evaluate.result import measurement
from sparseforge_core.evaluate.subject import Subject
from sparseforge_core.evaluate.suites import Suite, metrics_of, suite_key
from sparseforge_core.execution import Execution, check_memory, check_recording, default_device
from sparseforge_core.identity import cell_key, dumps, loads
from sparseforge_core.models.regions import compiled_within_limits
from sparseforge_core.models.sites import Site, assign_patterns, find_sites
from sparseforge_core.opening import (
    cell_folder,
    divergence,
    open_family,
    open_finished,
    open_tokenizer,
    weights_identity,
)
from sparseforge_core.packing import MIB, pack
from sparseforge_core.preparing import Prepared
from sparseforge_core.rank_checkpoint import RankCheckpoints
from sparseforge_core.ranks import HEARTBEAT, LOST, Beats, agree, join, launched, leave, was_lost
from sparseforge_core.recipe import Cell
from sparseforge_core.stage_rows import context_of, facts, row, train_rows, write_stage
from sparseforge_core.tf32 import products_in_tf32
from sparseforge_core.tracking.tracker import Journal, NullTracker, Tracker
from sparseforge_core.train.loop import Outcome, Progress, train
from sparseforge_core.train.parallel import (
    Sharding,
    assemble,
    refuse,
    same_bits,
)
from sparseforge_core.turns import Turns

log = logging.getLogger(__name__)


def train_cell(
    cell: Cell,
    directory: Path,
    home: Path,
    *,
    on_step: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    execution: Execution | None = None,
) -> Path:
    """Run a cell's train stage in `directory` and return its measurements file; a finished one is not run again.

    One that diverges has a result all the same: measurements without a value, and why. Raises Interrupted after saving
    a checkpoint when asked to stop; the same call then goes on from there. On several ranks every one of them calls it;
    rank 0 alone writes what is left in the end: the file is there once it is back.
    """
    execution = execution or Execution()
    refuse(cell.recipe, execution.sharding, world(), compiled=bool(execution.compiled), recompute=execution.recompute)
    check_recording(cell.recipe, execution, default_device())
    agree("cell", f"{cell_key(cell)}, {execution}")
    done = finished_training(cell, directory)
    agree("state of the folder, which all must see", "finished" if done else "not finished")
    if done:
        return done
    if default_device().type == "cuda" and cell.recipe.method.trains:
        check_memory(cell.recipe, home, execution, torch.cuda.mem_get_info(default_device())[1])
    began = time.perf_counter()
    directory.mkdir(parents=True, exist_ok=True)
    if rank() == 0:
        files.write_text(cell_folder(home, cell) / "cell.json", dumps(cell))
        files.remove_temporaries(directory)
        files.remove_temporaries(cell_folder(home, cell), below=False)
    seen = _Seen(on_step)
    try:
        with Beats(seconds=execution.heartbeat) as beats, same_bits(execution.deterministic):
            return _train_to_the_end(cell, directory, home, seen, should_stop, execution, beats, began)
    except Diverged as error:
        why = f"{error}; step {seen.last.step} was the last good one" if seen.last else str(error)
        if rank() > 0:
            return directory / "measurements.json"
        log.warning("cell %s diverged: %s", cell_key(cell), why)
        rows = [*seen.facts, row("final_loss", None, {"status": "diverged", "why": why})]
        context = {**context_of(default_device()), **_spent(began, seen, execution)}
        return write_stage(directory, cell, "train", None, rows, context, diverged=why)


class _Seen:
    """What is known of a training so far, for one that ends badly."""

    def __init__(self, on_step: Callable[[Progress], None] | None) -> None:
        self.on_step = on_step
        self.last: Progress | None = None
        """The last step that was made."""
        self.facts: list[dict[str, Any]] = []
        """Measurements that hold however it ends."""
        self.waited = 0.0
        """Seconds until its turn to train."""

    def __call__(self, progress: Progress) -> None:
        self.last = progress
        if self.on_step is not None:
            self.on_step(progress)

    def close(self, journal: Tracker, error: Diverged, steps: int) -> None:
        """End the journal of a run that diverged with the last step's loss, whether it was its turn or not."""
        if self.last is not None:
            journal.scalars(self.last.step, {"loss/total": self.last.loss})
        after = self.last.step if self.last is not None else 0
        journal.event("diverged", {"why": str(error), "after": after, "of": steps})


def _train_to_the_end(
    cell: Cell,
    directory: Path,
    home: Path,
    seen: _Seen,
    should_stop: Callable[[], bool] | None,
    execution: Execution,
    beats: Beats,
    began: float,
) -> Path:
    prepared = Prepared(cell, home, default_device(), execution.sharding)
    seen.facts = facts(cell.recipe, prepared.coverage)
    checkpoints = RankCheckpoints(directory / "checkpoints", cell_key(cell))
    track = cell.recipe.method.start(prepared.surroundings())
    outcome = Outcome(final_loss=math.nan, seconds=0.0)
    gap = math.nan
    if cell.recipe.train.steps:
        steps = checkpoints.steps()
        journal: Tracker = NullTracker()
        if rank() == 0:
            journal = Journal(directory / "journal.jsonl", resume_step=steps[-1] if steps else 0)
        for used in prepared.solutions.used:
            journal.event("solution", used)
        if prepared.permuted is not None:
            journal.event("permutation", prepared.permuted)
        try:
            run = prepared.run(track, checkpoints, journal, execution, beats)
            with compiled_within_limits(), _turn(execution, prepared.device, should_stop) as seen.waited:
                outcome = train(run, on_step=seen, should_stop=should_stop)
            gap = track.summary().get("mask/soft_hard_gap", math.nan)
        except Diverged as error:
            seen.close(journal, error, cell.recipe.train.steps)
            raise
        finally:
            journal.close()
    if prepared.sharding == "shard":
        assemble(prepared.model)
    if rank() > 0:
        return directory / "measurements.json"
    branches = track.finish()
    about = {"cell": cell_key(cell), "pattern": cell.recipe.pattern.name if cell.recipe.pattern else None}
    changed = cell.recipe.method.sparsifies or cell.recipe.method.trains
    save_final(directory / "final", prepared.model if changed else None, branches, about)
    checkpoints.clear()
    rows = train_rows(cell.recipe, prepared.coverage, outcome, branches, gap, track.findings())
    hashes = {"model_sha256": files.sha256(directory / "final" / MANIFEST), "data_sha256": prepared.data_sha256}
    context = {**context_of(prepared.device), **hashes, **_spent(began, seen, execution)}
    if prepared.solutions.used:
        context["solutions"] = prepared.solutions.used
    if prepared.taught_by is not None:
        context["teacher"] = prepared.taught_by
    if prepared.permuted is not None:
        context["permutation"] = prepared.permuted
    return write_stage(directory, cell, "train", None, rows, context)


def _spent(began: float, seen: _Seen, execution: Execution) -> dict[str, Any]:
    """How long a training took without what it waited for its turn, and who used the device meanwhile."""
    found: dict[str, Any] = {"wall_seconds": time.perf_counter() - began - seen.waited}
    if execution.turns is not None:
        found |= {"trained_at_once": execution.turns.at_once, "waited_seconds": seen.waited}
    if execution.companions is not None:
        found["companions"] = execution.companions
    return found


def _turn(
    execution: Execution, device: torch.device, should_stop: Callable[[], bool] | None
) -> contextlib.AbstractContextManager[float]:
    return contextlib.nullcontext(0.0) if execution.turns is None else execution.turns.turn(device, should_stop)


def finished_training(cell: Cell, directory: Path) -> Path | None:
    """The measurements file of a train stage that is complete on disk and verifies, or None.

    One whose model is gone, for instance because an error said to delete it, is not complete.
    """
    path = directory / measured.FILE
    if not path.is_file():
        return None
    if divergence(directory) is not None:  # it left no model, by rights
        return path
    if not (directory / "final").is_dir():
        return None
    verify(directory / "final", cell_key(cell))
    return path


def evaluate_cell(
    cell: Cell, suite: Suite, directory: Path, home: Path, *, batch_size: int = 16, ngram: int | None = NGRAM
) -> Path:
    """Measure a finished cell under a suite and return the measurements file in `directory`.

    A cell that diverged made no model: its measurements have no value, and say why.

    `ngram` is the length, in words, of what the contamination scan looks for; None leaves the scan out.
    """
    began = time.perf_counter()
    directory.mkdir(parents=True, exist_ok=True)
    device = default_device()
    recipe = cell.recipe
    try:
        model = open_finished(cell, home).to(device)  # type: ignore[arg-type]
    except Diverged as error:
        rows = [measurement(metric, None, None, 0, {"why": str(error)}) for metric in metrics_of(suite)]
        context = {**context_of(device), "wall_seconds": time.perf_counter() - began}
        return write_stage(directory, cell, suite_key(suite), suite, rows, context, diverged=str(error))
    sites: list[Site] = []
    if recipe.pattern is not None:
        sites = assign_patterns(find_sites(model, open_family(recipe.model, model)), recipe.pattern)
    subject = Subject(
        model=model,
        tokenizer=open_tokenizer(recipe.model, home),
        identity=weights_identity(cell, home),
        source=recipe.model,
        seed=cell.seed,
        corpus=recipe.corpus,
        retrained=recipe.method.trains,
        home=home,
        items_dir=cell_folder(home, cell) / "items",
        device=device,
        batch_size=batch_size,
        sparse=[(site.weight.numel(), site.pattern.density) for site in sites],
    )
    with products_in_tf32(device):
        result = evaluate_model(subject, suite, ngram=ngram)
    for folder in (directory, subject.items_dir):
        files.remove_temporaries(folder)
    lines = "".join(json.dumps(item, sort_keys=True) + "\n" for item in result.items)
    if lines:
        files.write_text(directory / measured.ITEMS, lines)
    else:
        (directory / measured.ITEMS).unlink(missing_ok=True)
    context = {**context_of(device), **result.context, "wall_seconds": time.perf_counter() - began}
    return write_stage(directory, cell, suite_key(suite), suite, list(result.measurements), context)


def main(arguments: list[str] | None = None) -> int:
    """Command line of one cell; exit code 0 done, 2 refused, 75 a rank was lost, 130 stopped with a checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m sparseforge_core.run", description=__doc__)
    home = os.environ.get("SPARSEFORGE_HOME")
    parser.add_argument("--home", type=Path, help="default $SPARSEFORGE_HOME, else runs; of a bundle its own home/")
    parser.set_defaults(home=Path(home) if home else None)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train one cell, or go on where it stopped")
    evaluation = commands.add_parser("evaluate", help="measure a finished cell under a suite")
    for command in (training, evaluation):
        command.add_argument("cell", type=Path, help="cell file written by `sparseforge plan GRID --out DIR`")
    bundle = add_commands(commands)
    for command in (training, bundle):
        command.add_argument("--micro-batch", type=int, help="sequences per forward (placement, not identity)")
        choice = argparse.BooleanOptionalAction
        command.add_argument("--compile", action=choice, help="compile the blocks; on a GPU in long runs unless told")
        command.add_argument(
            "--recompute", action="store_true", help="compute activations again instead of keeping them"
        )
        command.add_argument(
            "--record",
            action=choice,
            help="start the kernels of a step by one call (a CUDA graph); in long runs unless told",
        )
        command.add_argument("--deterministic", action="store_true", help="the same bits each time on a GPU, slower")
        command.add_argument(
            "--sharding",
            choices=get_args(Sharding),
            default="auto",
            help="how ranks share the work",
        )
    evaluation.add_argument("suite", type=Path, help="suite file (JSON)")
    for command in (evaluation, bundle):
        command.add_argument(
            "--ngram", type=int, default=NGRAM, help="words in a row that the contamination scan looks for; 0: no scan"
        )
    training.add_argument(
        "--heartbeat", type=float, default=HEARTBEAT, help="seconds after which a rank that is silent ends them all"
    )
    for command in (training, evaluation):
        command.add_argument("directory", type=Path, help="folder for what the stage makes")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    stopping = [False]
    signal.signal(signal.SIGTERM, lambda *_: stopping.__setitem__(0, True))
    try:
        if launched() > 1:
            if options.command != "train":
                raise RecipeError(f"{options.command}: one process does that; start it without torchrun")
            join()
        if options.command == "status":
            print(_status(options.folder, options.home, as_json=options.json))
            return 0
        if options.command == "bundle" and options.processes:
            path = _together(sys.argv[1:] if arguments is None else arguments, options, lambda: stopping[0])
        else:
            path = _run(options, lambda: stopping[0])
        if rank() == 0:
            print(path)
        leave()
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 130
    except (SparseForgeError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if world() == 1 or not was_lost(error):
            raise
        print(f"RankLost: another rank ended while this one waited for it: {error}", file=sys.stderr)
        return LOST
    return 0


def _run(options: argparse.Namespace, should_stop: Callable[[], bool]) -> Path:
    runs = options.home or Path("runs")
    if options.command == "evaluate":
        suite = specs.decode(json.loads(options.suite.read_text()), Suite, "suite")
        cell = loads(options.cell.read_text())
        return evaluate_cell(cell, suite, options.directory, runs, ngram=options.ngram or None)
    if options.command == "pack":
        return pack(options.folder, options.out, part_bytes=int(options.part_mib * MIB), partial=options.partial)[0]
    execution = Execution(options.micro_batch, options.compile, options.sharding, options.recompute)
    if options.command == "train":
        execution = replace(execution, heartbeat=options.heartbeat)
    execution = replace(execution, recorded=options.record, deterministic=options.deterministic)
    if options.command == "bundle":
        home = options.home or options.folder / bundles.HOME
        if options.train_at_once is not None:
            execution = replace(execution, turns=Turns(home / TURNS, options.train_at_once))
        return run_bundle(
            options.folder,
            home,
            execution,
            should_stop,
            index=options.index,
            seconds=options.seconds,
            drop_models=options.drop_models,
            ngram=options.ngram or None,
        )
    cell = loads(options.cell.read_text())
    return train_cell(cell, options.directory, runs, should_stop=should_stop, execution=execution)


def _together(arguments: list[str], options: argparse.Namespace, should_stop: Callable[[], bool]) -> Path:
    """The bundle by several processes, each with the same arguments but for their number."""
    if options.index is not None:
        raise RecipeError(f"--processes {options.processes}: --index {options.index} is one cell, for one process")
    bundles.read_bundle(options.folder)
    home: Path = options.home or options.folder / bundles.HOME
    arguments = [*arguments, "--processes", "0"]
    run_together(arguments, options.processes, home / LOGS, should_stop, gpus=torch.cuda.device_count())
    return home / "cells"


def _status(folder: Path, home: Path | None, *, as_json: bool) -> str:
    lines = bundle_status.status(folder, home)
    return json.dumps([asdict(line) for line in lines], indent=1) if as_json else bundle_status.table(lines)


def run_bundle(
    folder: Path,
    home: Path,
    execution: Execution,
    should_stop: Callable[[], bool],
    *,
    index: int | None = None,
    seconds: float | None = None,
    drop_models: bool = False,
    ngram: int | None = NGRAM,
) -> Path:
    """Run the cells of a bundle in order, or the one at `index`, each stage once; see `bundle_run.Walk`.

    Returns HOME/cells, which `sparseforge ingest` brings home. Raises BundleError for a bundle that is not whole, and
    CellsFailed in the end if a cell failed.
    """
    bundle = bundles.read_bundle(folder)
    bundles.prepare(bundle)
    if index is not None and not 0 <= index < len(bundle.entries):
        raise BundleError(f"--index {index}: the bundle has cells 0 to {len(bundle.entries) - 1}")
    entries = bundle.entries if index is None else bundle.entries[index : index + 1]

    def train_one(cell: Cell, companions: int) -> Path:
        directory = cell_folder(home, cell) / "train"
        how = replace(execution, companions=companions)
        return train_cell(cell, directory, home, should_stop=should_stop, execution=how)

    def measure(cell: Cell, suite: Suite) -> Path:
        return evaluate_cell(cell, suite, cell_folder(home, cell) / suite_key(suite), home, ngram=ngram)

    work = Work(train=train_one, measure=measure, should_stop=should_stop)
    Walk(bundle.entries, entries, home / "cells", work, seconds=seconds, drop_models=drop_models).go()
    return home / "cells"


if __name__ == "__main__":
    sys.exit(main())
