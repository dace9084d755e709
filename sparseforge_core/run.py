"""One cell at a time: train it, evaluate it, write what was measured. Knows nothing of grids, stores or servers.

python -m sparseforge_core.run train CELL.json DIR
torchrun --nproc-per-node N -m sparseforge_core.run train CELL.json DIR
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from sparseforge_core import bundles, files, measured, memory, specs
from sparseforge_core.checkpoint import MANIFEST, Checkpoints, save_final, verify
from sparseforge_core.data.calibration import calibration_batches
from sparseforge_core.data.tokens import TokenFile, TokenStream, check_vocabulary, tokenize_once
from sparseforge_core.distributed import rank, world
from sparseforge_core.errors import BundleError, DataError, Diverged, Interrupted, RecipeError, SparseForgeError
from sparseforge_core.evaluate.contamination import NGRAM
from sparseforge_core.evaluate.measure import evaluate_model
from sparseforge_core.evaluate.result import measurement
from sparseforge_core.evaluate.subject import Subject
from sparseforge_core.evaluate.suites import Suite, metrics_of, suite_key
from sparseforge_core.identity import cell_key, dumps, loads
from sparseforge_core.methods.base import MaskTrack, Method, Surroundings
from sparseforge_core.methods.sparseforge import SparseForge
from sparseforge_core.models.families.automatic import AUTOMATIC
from sparseforge_core.models.sites import Coverage, Site, assign_patterns, coverage, find_sites
from sparseforge_core.models.sources import ModelSource
from sparseforge_core.objective import faster, forwards
from sparseforge_core.observe.curvature import AdamSecondMoment
from sparseforge_core.opening import (
    cell_folder,
    divergence,
    open_family,
    open_finished,
    open_skeleton,
    open_source,
    open_tokenizer,
    weights_identity,
)
from sparseforge_core.rank_checkpoint import RankCheckpoints
from sparseforge_core.ranks import HEARTBEAT, LOST, Beats, agree, join, launched, leave, own_device, was_lost
from sparseforge_core.recipe import Cell, Recipe
from sparseforge_core.sparsity.masking import Branch
from sparseforge_core.tracking.tracker import Journal, NullTracker, Tracker
from sparseforge_core.train.loop import Outcome, Progress, Run, train
from sparseforge_core.train.optimizer import build_optimizer
from sparseforge_core.train.parallel import (
    Ranks,
    Replicas,
    Sharding,
    Shards,
    assemble,
    chosen_sharding,
    inside,
    recompute_activations,
    refuse,
    same_bits,
    shard,
)

log = logging.getLogger(__name__)

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
    sharding: Sharding = "auto"
    """How ranks share the work: everything on each of them, or a part of each weight; by itself what fits."""
    recompute: bool = False
    """Whether activations of a block are computed again in backward instead of kept."""
    deterministic: bool = False
    """Whether GPUs use only algorithms that give the same bits each time, where there are any; slower."""
    heartbeat: float = HEARTBEAT
    """Seconds after which a rank that is silent, or behind the others, ends them all."""


def default_device() -> torch.device:
    """The GPU of this rank, the first one of a process alone, or the CPU where there is none."""
    return own_device()


def device_memory() -> int:
    """Bytes of memory of the first GPU, or of the host where there is none."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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
        rows = [*seen.facts, _row("final_loss", None, {"status": "diverged", "why": why})]
        context = {**_context(default_device()), "wall_seconds": time.perf_counter() - began}
        return _write_measurements(directory, cell, "train", None, rows, context, diverged=why)


def check_memory(recipe: Recipe, home: Path, execution: Execution, gpu_bytes: float) -> None:
    """Raise RecipeError, with the arithmetic and before any weight is loaded, if the cell cannot fit on its GPUs."""
    model: Any = open_skeleton(recipe.model, home)
    if model is None:
        return
    sites: list[Site] = []
    if recipe.pattern is not None:
        sites = assign_patterns(find_sites(model, open_family(recipe.model, model)), recipe.pattern)
    shapes = [tuple(site.matrix(site.weight).shape) for site in sites]
    shape = memory.shape_of(
        type(model).__name__, model.config, shapes, sum(parameter.numel() for parameter in model.parameters())
    )
    share = recipe.train.sequences // world()
    memory.check(
        shape,
        memory.Spread(
            gpus=world(),
            sharded=world() > 1 and execution.sharding != "replicate",
            micro_batch=min(execution.micro_batch or share, share),
            length=recipe.train.length,
            recompute=execution.recompute,
            teacher=recipe.objective.distills,
            masks=recipe.method.sparsifies,
            mask_bytes=2 if getattr(recipe.method, "mask_storage", "float32") == "int16" else memory.MASK_BYTES,
            curvature_bytes=_curvature_bytes(recipe.method),
        ),
        gpu_bytes,
    )


def _curvature_bytes(method: Method) -> int:
    """Bytes that a method keeps of each masked weight's curvature; none where Adam's second moment serves."""
    if not isinstance(method, SparseForge) or method.criterion.needs != "curvature":
        return 0
    if isinstance(method.curvature, AdamSecondMoment):
        return 0
    return 2 if getattr(method.curvature, "storage", "float32") == "bfloat16" else memory.CURVATURE_BYTES


class _Seen:
    """What is known of a training so far, for one that ends badly."""

    def __init__(self, on_step: Callable[[Progress], None] | None) -> None:
        self.on_step = on_step
        self.last: Progress | None = None
        """The last step that was made."""
        self.facts: list[dict[str, Any]] = []
        """Measurements that hold however it ends."""

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
    prepared = _Prepared(cell, home, default_device(), execution.sharding)
    seen.facts = _facts(cell.recipe, prepared.coverage)
    checkpoints = RankCheckpoints(directory / "checkpoints", cell_key(cell))
    track = cell.recipe.method.start(prepared.surroundings())
    outcome = Outcome(final_loss=math.nan, seconds=0.0)
    gap = math.nan
    if cell.recipe.train.steps:
        steps = checkpoints.steps()
        journal: Tracker = NullTracker()
        if rank() == 0:
            journal = Journal(directory / "journal.jsonl", resume_step=steps[-1] if steps else 0)
        try:
            run = prepared.run(track, checkpoints, journal, execution, beats)
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
    rows = _train_measurements(cell.recipe, prepared.coverage, outcome, branches, gap, track.findings())
    hashes = {"model_sha256": files.sha256(directory / "final" / MANIFEST), "data_sha256": prepared.data_sha256}
    context = {**_context(prepared.device), **hashes, "wall_seconds": time.perf_counter() - began}
    return _write_measurements(directory, cell, "train", None, rows, context)


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
        context = {**_context(device), "wall_seconds": time.perf_counter() - began}
        return _write_measurements(directory, cell, suite_key(suite), suite, rows, context, diverged=str(error))
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
    for folder in (directory, subject.items_dir):
        files.remove_temporaries(folder)
    lines = "".join(json.dumps(item, sort_keys=True) + "\n" for item in result.items)
    if lines:
        files.write_text(directory / measured.ITEMS, lines)
    else:
        (directory / measured.ITEMS).unlink(missing_ok=True)
    context = {**_context(device), **result.context, "wall_seconds": time.perf_counter() - began}
    return _write_measurements(directory, cell, suite_key(suite), suite, list(result.measurements), context)


class _Prepared:
    """A cell's model, data and sites, loaded and checked before anything trains."""

    def __init__(self, cell: Cell, home: Path, device: torch.device, sharding: Sharding = "none") -> None:
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
        self.sharding = chosen_sharding(sharding, recipe, model, self.sites, device)
        # One-shot methods move a block at a time to the device: a model that fits in no GPU can still be pruned.
        # What is to be sharded is cut in the memory of the CPU.
        whole = recipe.method.trains and self.sharding != "shard"
        self.loaded_on = device if whole else torch.device("cpu")
        self.model = model.to(self.loaded_on)
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
            passing=not recipe.method.trains and recipe.slorb is None,
            seed=self.cell.seed,
        )

    def run(
        self, track: MaskTrack, checkpoints: Checkpoints, journal: Tracker, execution: Execution, beats: Beats
    ) -> Run:
        plan = self.cell.recipe.train
        if plan.length > _positions(self.model):
            raise DataError(f"train.length={plan.length}: the model accepts at most {_positions(self.model)} tokens")
        stream = TokenStream(self.tokens, seed=self.cell.seed, sequences=plan.sequences, length=plan.length)
        compiled = execution.compiled
        if compiled is None:
            matched = any(self.cell.recipe.objective.at(share).matching for share in (0.0, 1.0))
            compiled = self.device.type == "cuda" and plan.steps >= COMPILED_FROM and not matched
        plain = forwards(self.model, self.teacher)
        if self.sharding == "shard":
            forward, teacher = plain  # FSDP2's hooks run between blocks, and the head's matrix is in shards
        else:
            forward, teacher = faster(*plain, compiled=compiled)
        whole: Any = self.model
        if execution.recompute:
            recompute_activations(self.model)
        ranks = Ranks(beats)
        if self.sharding == "shard":
            root = shard(self.model, self.sites, self.device)
            forward, whole = inside(root, forward), inside(root, self.model)
            if teacher is not None and self.teacher is not None:
                teacher = inside(shard(self.teacher, [], self.device), teacher)
            plain = (forward, teacher)
            track.placed()
            ranks = Shards(beats)
        elif self.sharding == "replicate":
            ranks = Replicas(self.model, beats)
        return Run(
            recipe=self.cell.recipe,
            model=self.model,
            forward=forward,
            teacher=teacher,
            whole=whole,
            plain=plain,
            ranks=ranks,
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
        teacher = copy.deepcopy(self.model) if source is None else open_source(source, self.home).to(self.loaded_on)  # type: ignore[arg-type]
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
    return _facts(recipe, cover) + [_row(name, float(value)) for name, value in values.items()]


def _facts(recipe: Recipe, cover: Coverage) -> list[dict[str, Any]]:
    """What is masked, which no training changes."""
    about = {"family": cover.family, "included": cover.included, "excluded": cover.excluded}
    return [
        _row("coverage", cover.share if recipe.pattern else 0.0, about),
        _row("masked_parameters", float(cover.masked if recipe.pattern else 0)),
        _row("total_parameters", float(cover.total)),
    ]


def _row(metric: str, value: float | None, detail: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"metric": metric, "value": value, "stderr": None, "n": 1, "detail": detail or {}}


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
    *,
    diverged: str | None = None,
) -> Path:
    body = {
        "cell": cell_key(cell),
        "stage": stage,
        "suite": None if suite is None else specs.encode(suite, omit_defaults=False),
        "context": context,
        "measurements": rows,
    }
    if diverged is not None:
        body["diverged"] = diverged
    return measured.write(directory, body)


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
    bundle = commands.add_parser("bundle", help="run many cells in one warm process, for machines without a store")
    bundle.add_argument("folder", type=Path, help="folder with bundle.json, written by `sparseforge bundle`")
    bundle.add_argument("--index", type=int, help="only this cell of it, counted from 0, as a job array does")
    for command in (training, bundle):
        command.add_argument("--micro-batch", type=int, help="sequences per forward (placement, not identity)")
        choice = argparse.BooleanOptionalAction
        command.add_argument("--compile", action=choice, help="compile the blocks; on a GPU in long runs unless told")
        command.add_argument(
            "--recompute", action="store_true", help="compute activations again instead of keeping them"
        )
        command.add_argument("--deterministic", action="store_true", help="the same bits each time on a GPU, slower")
        command.add_argument(
            "--sharding",
            choices=get_args(Sharding),
            default="auto",
            help="how ranks share the work",
        )
    evaluation.add_argument("suite", type=Path, help="suite file (JSON)")
    evaluation.add_argument(
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
    execution = Execution(options.micro_batch, options.compile, options.sharding, options.recompute)
    if options.command == "train":
        execution = replace(execution, heartbeat=options.heartbeat)
    execution = replace(execution, deterministic=options.deterministic)
    if options.command == "bundle":
        home = options.home or options.folder / bundles.HOME
        return run_bundle(options.folder, home, execution, should_stop, index=options.index)
    cell = loads(options.cell.read_text())
    return train_cell(cell, options.directory, runs, should_stop=should_stop, execution=execution)


def run_bundle(
    folder: Path,
    home: Path,
    execution: Execution,
    should_stop: Callable[[], bool],
    *,
    index: int | None = None,
    ngram: int | None = NGRAM,
) -> Path:
    """Run the cells of a bundle in order, or the one at `index`, each stage once; what is finished is passed over.

    Returns HOME/cells, which `sparseforge ingest` brings home. Raises BundleError for a bundle that is not whole.
    """
    bundle = bundles.read_bundle(folder)
    bundles.prepare(bundle)
    if index is not None and not 0 <= index < len(bundle.entries):
        raise BundleError(f"--index {index}: the bundle has cells 0 to {len(bundle.entries) - 1}")
    for entry in bundle.entries if index is None else bundle.entries[index : index + 1]:
        base = cell_folder(home, entry.cell)
        began = time.perf_counter()
        train_cell(entry.cell, base / "train", home, should_stop=should_stop, execution=execution)
        for suite in entry.suites:
            if should_stop():
                raise Interrupted("stopped between two stages; run the same command again to go on from here")
            if not (base / suite_key(suite) / measured.FILE).is_file():
                evaluate_cell(entry.cell, suite, base / suite_key(suite), home, ngram=ngram)
        log.info("cell %s done in %.1f s", cell_key(entry.cell), time.perf_counter() - began)
    return home / "cells"


if __name__ == "__main__":
    sys.exit(main())
