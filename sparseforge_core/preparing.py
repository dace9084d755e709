"""What a training stands on: a cell's model, teacher, text and sites, loaded and checked before anything trains."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseforge_core import specs
from sparseforge_core.checkpoint import Checkpoints
from sparseforge_core.data.calibration import calibration_batches
from sparseforge_core.data.tokens import TokenFile, TokenStream, check_vocabulary, tokenize_once
from sparseforge_core.distributed import world
from sparseforge_core.errors import DataError
from sparseforge_core.execution import Execution, records
from sparseforge_core.methods.base import MaskTrack, Surroundings
from sparseforge_core.models.families import Family
from sparseforge_core.models.families.automatic import AUTOMATIC
from sparseforge_core.models.regions import compile_blocks
from sparseforge_core.models.sites import Site, assign_patterns, coverage, find_sites
from sparseforge_core.models.sources import ModelSource
from sparseforge_core.objective import faster, forwards
from sparseforge_core.opening import open_family, open_source, open_tokenizer, source_identity
from sparseforge_core.permuting import put_in_order
from sparseforge_core.ranks import Beats
from sparseforge_core.recipe import Cell
from sparseforge_core.solutions import KeptSolutions, code_hash, computed_on
from sparseforge_core.tracking.tracker import Tracker
from sparseforge_core.train.correction import Correction, anchor_of, fixed
from sparseforge_core.train.loop import Run
from sparseforge_core.train.mean_weights import MeanWeights
from sparseforge_core.train.optimizer import build_optimizer
from sparseforge_core.train.parallel import (
    Ranks,
    Replicas,
    Sharding,
    Shards,
    chosen_sharding,
    inside,
    recompute_activations,
    refuse,
    shard,
)
from sparseforge_core.train.recording import Recording

log = logging.getLogger(__name__)

COMPILED_FROM = 200
"""Steps from which on a run on a GPU earns back the time that compiling its blocks takes."""


class Prepared:
    """A cell's model, data and sites, loaded and checked before anything trains."""

    def __init__(self, cell: Cell, home: Path, device: torch.device, sharding: Sharding = "none") -> None:
        recipe = cell.recipe
        self.cell, self.home, self.device = cell, home, device
        self.tokenizer = open_tokenizer(recipe.model, home)
        model: Any = open_source(recipe.model, home, cell.seed)
        family = open_family(recipe.model, model)
        self.sites: list[Site] = []
        if recipe.pattern is not None:
            self.sites = assign_patterns(find_sites(model, family), recipe.pattern)
        self.coverage = coverage(model, family, recipe.pattern)
        log.log(logging.WARNING if family.name == AUTOMATIC else logging.INFO, "%s", self.coverage)
        self._tokens: TokenFile | None = None
        self.model = model
        self.permuted = self._put_in_order(family)
        self.sharding = chosen_sharding(sharding, recipe, model, self.sites, device)
        # One-shot methods move a block at a time to the device: a model that fits in no GPU can still be pruned.
        # What is to be sharded is cut in the memory of the CPU.
        whole = recipe.method.trains and self.sharding != "shard"
        self.loaded_on = device if whole else torch.device("cpu")
        self.model = model.to(self.loaded_on)
        taught_by = getattr(recipe.objective, "teacher", None)
        self.taught_by = None if taught_by is None else source_identity(taught_by, home, cell.seed)
        """Which weights a teacher from another source came with."""
        self.teacher = self._teacher()
        self.anchor = anchor_of(self.teacher, recipe.objective.correcting, recipe.train)
        self.solutions = KeptSolutions(home, self._about_solutions)

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
            solutions=self.solutions if recipe.method.trains else None,
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
            compiled = self.device.type == "cuda" and plan.steps >= COMPILED_FROM and self._uncompiled() is None
        plain = forwards(self.model, self.teacher)
        # Sharded blocks are compiled as they are: FSDP2's hooks are theirs, and run between what is compiled.
        forward, teacher = faster(*plain, compiled=compiled and self.sharding != "shard")
        anchor = None
        if self.anchor is not None:
            anchor, _ = faster(forwards(self.anchor, None)[0], None, compiled=compiled and self.sharding != "shard")
        if compiled and self.sharding == "shard":
            refuse(self.cell.recipe, "shard", world(), compiled=True)  # which 'auto' has only now turned out to be
            for model in (self.model, self.teacher, self.anchor):
                if model is not None:
                    compile_blocks(model)
        whole: Any = self.model
        if execution.recompute:
            recompute_activations(self.model)
        recorded = records(self.cell.recipe, execution, self.device)
        ranks = Ranks(beats)
        if self.sharding == "shard":
            root = shard(self.model, self.sites, self.device)
            plain = inside(root, plain[0]), plain[1]
            forward, whole = inside(root, forward), inside(root, self.model)
            if teacher is not None and self.teacher is not None:
                root = shard(self.teacher, [], self.device)
                plain, teacher = (plain[0], inside(root, plain[1])), inside(root, teacher)
            if self.anchor is not None:
                anchor = inside(shard(self.anchor, [], self.device), anchor)
            track.placed()
            ranks = Shards(beats)
        elif self.sharding == "replicate":
            ranks = Replicas(self.model, beats, teacher=self.teacher)
        return Run(
            recipe=self.cell.recipe,
            model=self.model,
            forward=forward,
            teacher=teacher,
            whole=whole,
            plain=plain,
            ranks=ranks,
            track=track,
            correction=self._correction(),
            anchor=anchor,
            mean=self._mean(),
            recording=Recording(self.model, self.teacher, required=bool(execution.recorded)) if recorded else None,
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

    def _uncompiled(self) -> str | None:
        """Why blocks are not compiled unless somebody asks for it, or None."""
        if self.sharding == "shard":
            return "sharded blocks have been compiled on CPUs alone so far"
        matched = any(self.cell.recipe.objective.at(share).matching for share in (0.0, 1.0))
        return "compiled blocks do not show the hidden states that are matched" if matched else None

    def _put_in_order(self, family: Family) -> dict[str, Any] | None:
        """What was found of the order of channels; None where the recipe leaves it."""
        permutation = self.cell.recipe.permutation
        if permutation is None:
            return None
        return put_in_order(
            self.model,
            family,
            self.sites,
            permutation,
            calibration=self._calibration,
            device=self.device,
            home=self.home,
            about={**self._about(), "on": computed_on(self.device, torch.device("cpu")), "code": code_hash()},
        )

    def _about(self) -> dict[str, Any]:
        """What everything that calibration text decides depends on."""
        return {
            "weights": source_identity(self.cell.recipe.model, self.home, self.cell.seed),
            "pattern": specs.encode(self.cell.recipe.pattern),
            "tokens": self.tokens.sha256,
            "seed": self.cell.seed,
        }

    def _teacher(self) -> Any | None:
        objective = self.cell.recipe.objective
        if not objective.distills:
            return None
        source = getattr(objective, "teacher", None)
        if source is None:
            teacher = copy.deepcopy(self.model)
        else:
            teacher = open_source(source, self.home, self.cell.seed).to(self.loaded_on)  # type: ignore[arg-type]
        objective.check(self.model.config, teacher.config)
        if source is not None:
            self._check_tokenizer(source)
        if objective.correcting is not None:
            return teacher.requires_grad_(True)  # what takes steps is kept in float32
        return fixed(teacher, self.cell.recipe.train)

    def _mean(self) -> MeanWeights | None:
        plan = self.cell.recipe.train
        return MeanWeights(self.model, plan.averaged_after + 1) if plan.averages else None

    def _correction(self) -> Correction | None:
        spec = self.cell.recipe.objective.correcting
        if spec is None:
            return None
        assert self.teacher is not None, "what corrects a teacher distills"
        return Correction(self.teacher, spec, self.cell.recipe.train)

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

    def _about_solutions(self) -> dict[str, Any]:
        """What a one-shot solution of this cell depends on besides the method."""
        permutation = {"permutation": self.permuted["key"]} if self.permuted else {}
        return {**self._about(), **permutation, "on": computed_on(self.device, self.loaded_on)}

    def _calibration(self, samples: int, length: int) -> list[Tensor]:
        length = min(length, _positions(self.model))
        return calibration_batches(self.tokens, samples=samples, length=length, seed=self.cell.seed, batch=8)


def _positions(model: Any) -> int:
    return int(getattr(model.config, "max_position_embeddings", None) or model.config.n_positions)
