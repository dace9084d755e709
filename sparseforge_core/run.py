"""One cell at a time: train it, evaluate it, write what was measured. Knows nothing of grids, stores or servers.

python -m sparseforge_core.run train CELL.json DIR
python -m sparseforge_core.run evaluate CELL.json SUITE.json DIR
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseforge_core import files, specs
from sparseforge_core.checkpoint import MANIFEST, Checkpoints, save_final, verify
from sparseforge_core.data.calibration import calibration_batches
from sparseforge_core.data.tokens import TokenFile, TokenStream, check_vocabulary, tokenize_once
from sparseforge_core.errors import DataError, Interrupted, SparseForgeError
from sparseforge_core.evaluate.contamination import NGRAM
from sparseforge_core.evaluate.measure import evaluate_model
from sparseforge_core.evaluate.subject import Subject
from sparseforge_core.evaluate.suites import Suite, suite_key
from sparseforge_core.identity import cell_key, dumps, loads
from sparseforge_core.methods.base import MaskTrack, Surroundings
from sparseforge_core.models.families.automatic import AUTOMATIC
from sparseforge_core.models.sites import Coverage, Site, assign_patterns, coverage, find_sites
from sparseforge_core.models.sources import ModelSource
from sparseforge_core.objective import faster, forwards
from sparseforge_core.opening import (
    cell_folder,
    open_family,
    open_finished,
    open_source,
    open_tokenizer,
    weights_identity,
)
from sparseforge_core.recipe import Cell, Recipe
from sparseforge_core.sparsity.masking import Branch
from sparseforge_core.tracking.tracker import Journal
from sparseforge_core.train.loop import Outcome, Progress, Run, train
from sparseforge_core.train.optimizer import build_optimizer

log = logging.getLogger(__name__)

FORMAT = 1

COMPILED_FROM = 200
"""Steps from which on a run on a GPU earns back the time that compiling its blocks takes."""

STORED_BYTES = 2
"""Of a value of a side branch at inference (bfloat16)."""


@dataclass(frozen=True)
class Execution:
    """How a cell is executed on this machine; never part of its identity."""

    micro_batch: int | None = None
    """Sequences per forward; None takes the whole batch."""
    compiled: bool | None = None
    """Whether the blocks go through torch.compile: half a minute for the first cell of a shape in a process, then
    faster steps. None: on a GPU, in runs of COMPILED_FROM steps or more, unless hidden states are matched."""


def default_device() -> torch.device:
    """The first GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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

    Raises Interrupted after saving a checkpoint when asked to stop; the same call then goes on from there.
    """
    done = finished_training(cell, directory)
    if done:
        return done
    began = time.perf_counter()
    directory.mkdir(parents=True, exist_ok=True)
    files.write_text(cell_folder(home, cell) / "cell.json", dumps(cell))
    prepared = _Prepared(cell, home, default_device())
    checkpoints = Checkpoints(directory / "checkpoints", cell_key(cell))
    track = cell.recipe.method.start(prepared.surroundings())
    outcome = Outcome(final_loss=math.nan, seconds=0.0)
    gap = math.nan
    if cell.recipe.train.steps:
        steps = checkpoints.steps()
        journal = Journal(directory / "journal.jsonl", resume_step=steps[-1] if steps else 0)
        try:
            run = prepared.run(track, checkpoints, journal, execution or Execution())
            outcome = train(run, on_step=on_step, should_stop=should_stop)
            gap = track.summary().get("mask/soft_hard_gap", math.nan)
        finally:
            journal.close()
    branches = track.finish()
    about = {"cell": cell_key(cell), "pattern": cell.recipe.pattern.name if cell.recipe.pattern else None}
    changed = cell.recipe.method.sparsifies or cell.recipe.method.trains
    save_final(directory / "final", prepared.model if changed else None, branches, about)
    checkpoints.clear()
    rows = _train_measurements(cell.recipe, prepared.coverage, outcome, branches, gap, track.findings())
    hashes = {"model_sha256": files.sha256(directory / "final" / MANIFEST), "data_sha256": prepared.data_sha256}
    context = {**_context(prepared.device), **hashes, "wall_seconds": time.perf_counter() - began}
    return _write_measurements(directory, cell, "train", None, rows, context, None)


def finished_training(cell: Cell, directory: Path) -> Path | None:
    """The measurements file of a train stage that is complete on disk and verifies, or None."""
    path = directory / "measurements.json"
    if not path.is_file():
        return None
    verify(directory / "final", cell_key(cell))
    return path


def evaluate_cell(
    cell: Cell, suite: Suite, directory: Path, home: Path, *, batch_size: int = 16, ngram: int | None = NGRAM
) -> Path:
    """Measure a finished cell under a suite and return the measurements file in `directory`.

    `ngram` is the length, in words, of what the contamination scan looks for; None leaves the scan out.
    """
    began = time.perf_counter()
    directory.mkdir(parents=True, exist_ok=True)
    device = default_device()
    recipe = cell.recipe
    model = open_finished(cell, home).to(device)  # type: ignore[arg-type]
    sites: list[Site] = []
    if recipe.pattern is not None:
        sites = assign_patterns(find_sites(model, open_family(recipe.model, model)), recipe.pattern)
    subject = Subject(
        model=model,
        tokenizer=open_tokenizer(recipe.model, home),
        identity=weights_identity(cell, home),
        source=recipe.model,
        corpus=recipe.corpus,
        retrained=recipe.method.trains,
        home=home,
        items_dir=cell_folder(home, cell) / "items",
        device=device,
        batch_size=batch_size,
        sparse=[(site.weight.numel(), site.pattern.density) for site in sites],
    )
    result = evaluate_model(subject, suite, ngram=ngram)
    digest = None
    if result.items:
        lines = "".join(json.dumps(item, sort_keys=True) + "\n" for item in result.items)
        files.write_text(directory / "items.jsonl", lines)
        digest = files.sha256(directory / "items.jsonl")
    context = {**_context(device), **result.context, "wall_seconds": time.perf_counter() - began}
    return _write_measurements(directory, cell, suite_key(suite), suite, list(result.measurements), context, digest)


class _Prepared:
    """A cell's model, data and sites, loaded and checked before anything trains."""

    def __init__(self, cell: Cell, home: Path, device: torch.device) -> None:
        recipe = cell.recipe
        self.cell, self.home, self.device = cell, home, device
        self.tokenizer = open_tokenizer(recipe.model, home)
        model: Any = open_source(recipe.model, home)
        family = open_family(recipe.model, model)
        self.sites: list[Site] = []
        if recipe.pattern is not None:
            self.sites = assign_patterns(find_sites(model, family), recipe.pattern)
        self.coverage = coverage(model, family, recipe.pattern)
        log.log(logging.WARNING if family.name == AUTOMATIC else logging.INFO, "%s", self.coverage)
        # One-shot methods move a block at a time to the device: a model that fits in no GPU can still be pruned.
        self.model = model.to(device) if recipe.method.trains else model
        self.teacher = self._teacher()
        self._tokens: TokenFile | None = None

    @property
    def tokens(self) -> TokenFile:
        """The training split of the recipe's corpus, tokenised."""
        if self._tokens is None:
            self._tokens = tokenize_once(self.cell.recipe.corpus, "train", self.tokenizer, self.home)
            check_vocabulary(self._tokens, self.model.config.vocab_size)
        return self._tokens

    @property
    def data_sha256(self) -> str | None:
        """Hash of the token file; None if the run has read none."""
        return None if self._tokens is None else self._tokens.sha256

    def surroundings(self) -> Surroundings:
        recipe = self.cell.recipe
        return Surroundings(
            model=self.model,
            sites=self.sites,
            slorb=recipe.slorb,
            steps=recipe.train.steps,
            calibration=self._calibration,
            device=None if recipe.method.trains else self.device,
            seed=self.cell.seed,
        )

    def run(self, track: MaskTrack, checkpoints: Checkpoints, journal: Journal, execution: Execution) -> Run:
        plan = self.cell.recipe.train
        if plan.length > _positions(self.model):
            raise DataError(f"train.length={plan.length}: the model accepts at most {_positions(self.model)} tokens")
        stream = TokenStream(self.tokens, seed=self.cell.seed, sequences=plan.sequences, length=plan.length)
        compiled = execution.compiled
        if compiled is None:
            matched = any(self.cell.recipe.objective.at(share).matching for share in (0.0, 1.0))
            compiled = self.device.type == "cuda" and plan.steps >= COMPILED_FROM and not matched
        plain = forwards(self.model, self.teacher)
        forward, teacher = faster(*plain, compiled=compiled)
        return Run(
            recipe=self.cell.recipe,
            model=self.model,
            forward=forward,
            teacher=teacher,
            plain=plain,
            track=track,
            optimizer=build_optimizer(self.model, self.sites, plan, track),
            stream=stream,
            checkpoints=checkpoints,
            tracker=journal,
            device=self.device,
            seed=self.cell.seed,
            micro_batch=execution.micro_batch,
            log_every=max(1, min(10, plan.steps // 40)),
            save_every=max(50, plan.steps // 10),
            histogram_every=max(1, plan.steps // 5),
        )

    def _teacher(self) -> Any | None:
        objective = self.cell.recipe.objective
        if not objective.distills:
            return None
        source = getattr(objective, "teacher", None)
        teacher = copy.deepcopy(self.model) if source is None else open_source(source, self.home).to(self.device)  # type: ignore[arg-type]
        objective.check(self.model.config, teacher.config)
        if source is not None:
            self._check_tokenizer(source)
        if self.cell.recipe.train.compute_dtype == "bfloat16":
            teacher = teacher.to(torch.bfloat16)  # autocast would cast it again in every forward
        return teacher.requires_grad_(False)

    def _check_tokenizer(self, source: ModelSource) -> None:
        """Raise DataError unless the teacher's tokenizer, where it is known, gives every text the student's ids."""
        try:
            theirs = open_tokenizer(source, self.home).get_vocab()
        except DataError as error:
            log.warning("objective.teacher: only the sizes of the vocabularies were compared: %s", error)
            return
        ours = self.tokenizer.get_vocab()
        if theirs != ours:
            differing = sorted({token for token, _ in theirs.items() ^ ours.items()})
            raise DataError(
                f"objective.teacher: its tokenizer gives {len(differing)} tokens other ids than the student's, for "
                f"instance {differing[0]!r}; distillation needs the same vocabulary"
            )

    def _calibration(self, samples: int, length: int) -> list[Tensor]:
        length = min(length, _positions(self.model))
        return calibration_batches(self.tokens, samples=samples, length=length, seed=self.cell.seed, batch=8)


def _positions(model: Any) -> int:
    return int(getattr(model.config, "max_position_embeddings", None) or model.config.n_positions)


def _train_measurements(
    recipe: Recipe,
    cover: Coverage,
    outcome: Outcome,
    branches: dict[str, Branch],
    gap: float,
    findings: dict[str, float],
) -> list[dict[str, Any]]:
    values: dict[str, float] = {
        "coverage": cover.share if recipe.pattern else 0.0,
        "masked_parameters": cover.masked if recipe.pattern else 0,
        "total_parameters": cover.total,
        "extra_parameters": sum(branch.cost.parameters for branch in branches.values()),
        "extra_bytes": sum(branch.cost.parameters for branch in branches.values()) * STORED_BYTES,
        "extra_flops_per_token": sum(branch.cost.flops for branch in branches.values()),
        "tokens": recipe.train.tokens,
    }
    if recipe.train.steps:
        values |= {
            "final_loss": outcome.final_loss,
            "train_seconds": outcome.seconds,
            "tokens_per_second": recipe.train.tokens / max(outcome.seconds, 1e-9),
        }
    if math.isfinite(gap):
        values["soft_hard_gap"] = gap
    values |= findings
    details = {"coverage": {"family": cover.family, "included": cover.included, "excluded": cover.excluded}}
    return [
        {"metric": name, "value": float(value), "stderr": None, "n": 1, "detail": details.get(name, {})}
        for name, value in values.items()
    ]


def _context(device: torch.device) -> dict[str, Any]:
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": name,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "max_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _write_measurements(
    directory: Path,
    cell: Cell,
    stage: str,
    suite: Suite | None,
    rows: list[dict[str, Any]],
    context: dict[str, Any],
    items_sha256: str | None,
) -> Path:
    body = {
        "format": FORMAT,
        "cell": cell_key(cell),
        "stage": stage,
        "suite": None if suite is None else specs.encode(suite, omit_defaults=False),
        "context": context,
        "items_sha256": items_sha256,
        "measurements": rows,
    }
    path = directory / "measurements.json"
    files.write_json(path, body)
    return path


def main(arguments: list[str] | None = None) -> int:
    """Command line of one cell; exit code 0 done, 2 refused, 130 stopped with a checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m sparseforge_core.run", description=__doc__)
    parser.add_argument("--home", type=Path, default=Path(os.environ.get("SPARSEFORGE_HOME", "runs")))
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train one cell, or go on where it stopped")
    evaluation = commands.add_parser("evaluate", help="measure a finished cell under a suite")
    for command in (training, evaluation):
        command.add_argument("cell", type=Path, help="cell file written by `sparseforge plan GRID --out DIR`")
    bundle = commands.add_parser("bundle", help="run many cells in one warm process, for machines without a store")
    bundle.add_argument("folder", type=Path, help="folder with bundle.json, written by `sparseforge bundle`")
    for command in (training, bundle):
        command.add_argument("--micro-batch", type=int, help="sequences per forward (placement, not identity)")
        choice = argparse.BooleanOptionalAction
        command.add_argument("--compile", action=choice, help="compile the blocks; on a GPU in long runs unless told")
    evaluation.add_argument("suite", type=Path, help="suite file (JSON)")
    evaluation.add_argument(
        "--ngram", type=int, default=NGRAM, help="words in a row that the contamination scan looks for; 0: no scan"
    )
    for command in (training, evaluation):
        command.add_argument("directory", type=Path, help="folder for what the stage makes")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    stopping = [False]
    signal.signal(signal.SIGTERM, lambda *_: stopping.__setitem__(0, True))
    try:
        print(_run(options, lambda: stopping[0]))
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 130
    except (SparseForgeError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace, should_stop: Callable[[], bool]) -> Path:
    if options.command == "evaluate":
        suite = specs.decode(json.loads(options.suite.read_text()), Suite, "suite")
        cell = loads(options.cell.read_text())
        return evaluate_cell(cell, suite, options.directory, options.home, ngram=options.ngram or None)
    execution = Execution(options.micro_batch, options.compile)
    if options.command == "bundle":
        return run_bundle(options.folder, options.home, execution, should_stop)
    cell = loads(options.cell.read_text())
    return train_cell(cell, options.directory, options.home, should_stop=should_stop, execution=execution)


def run_bundle(folder: Path, home: Path, execution: Execution, should_stop: Callable[[], bool]) -> Path:
    """Run the cells of `bundle.json` in order, each stage once; what is finished is passed over.

    The file holds `{"cells": [{"cell": <cell file>, "suites": [<suite JSON>]}]}`. Returns HOME/cells, whose folders
    `sparseforge ingest` records.
    """
    body = json.loads((folder / "bundle.json").read_text())
    for entry in body["cells"]:
        cell = loads(json.dumps(entry["cell"]))
        base = cell_folder(home, cell)
        began = time.perf_counter()
        train_cell(cell, base / "train", home, should_stop=should_stop, execution=execution)
        for data in entry["suites"]:
            suite = specs.decode(data, Suite, "suite")
            if not (base / suite_key(suite) / "measurements.json").is_file():
                evaluate_cell(cell, suite, base / suite_key(suite), home)
        log.info("cell %s done in %.1f s", cell_key(cell), time.perf_counter() - began)
    return home / "cells"


if __name__ == "__main__":
    sys.exit(main())
