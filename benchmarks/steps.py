"""Training steps to be timed: the product's own loop on random models and tokens, one window of steps after another."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from sparseforge_core.checkpoint import Checkpoints
from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.methods import DenseControl, Method
from sparseforge_core.methods.base import MaskTrack, Surroundings
from sparseforge_core.models.families import family_of
from sparseforge_core.models.hub import from_config
from sparseforge_core.models.sites import Site, assign_patterns, find_sites
from sparseforge_core.models.sources import Tiny, TrainedBPE
from sparseforge_core.objective import Distill, Objective, faster, forwards
from sparseforge_core.recipe import Recipe, TrainPlan
from sparseforge_core.sparsity.patterns import nm
from sparseforge_core.tracking.tracker import NullTracker
from sparseforge_core.train.correction import Correction, anchor_of, fixed
from sparseforge_core.train.loop import Progress, Run, train
from sparseforge_core.train.optimizer import build_optimizer
from sparseforge_core.train.recording import Recording

PERIOD = 10
"""Steps of a window: one mask update, the curvature of each step, and one line of the journal lie in it."""

STEPS = 10_000
"""Of the plan, of which only the first few are taken: heating, where masks move and nothing is frozen."""


@dataclass(frozen=True)
class Shape:
    """A LLaMA by its numbers, and the batch of a step."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    sequences: int
    length: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequences * self.length

    @property
    def masked(self) -> int:
        """Weights under a mask."""
        kv = self.width // self.heads * self.kv_heads
        return self.layers * (2 * self.width * (self.width + kv) + 3 * self.width * self.ffn)

    @property
    def flops(self) -> float:
        """Of a step of distillation: 6 a weight and token for the student, 2 for the teacher, attention causal."""
        matrices = self.masked + self.width * self.vocabulary
        attention = self.layers * self.width * self.length
        return self.tokens * (8.0 * matrices + 4.0 * 2.0 * attention)  # 2 products of 2 flops, half of the positions


SHAPES = {
    "135m": Shape(30, 576, 1536, 9, 3, 49_152, True, 64, 1024),
    "1_1b": Shape(22, 2048, 5632, 32, 4, 32_000, False, 8, 2048),
    "7b_layer": Shape(3, 4096, 11_008, 32, 32, 32_000, False, 4, 4096),
}


def config_of(shape: Shape) -> Any:
    """The configuration of transformers for a shape."""
    import transformers

    return transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.length,
        tie_word_embeddings=shape.tied,
    )


class RandomTokens:
    """A stream of random tokens."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def batch(self, step: int, rank: int = 0, world: int = 1) -> torch.Tensor:
        """Token ids of `step`."""
        made = torch.Generator().manual_seed(step)
        return torch.randint(0, self.shape.vocabulary, (self.shape.sequences, self.shape.length), generator=made)


@dataclass
class Bench:
    """A run to be timed, and what it is made of."""

    run: Run
    sites: list[Site]
    track: MaskTrack
    teacher: Any


def bench(
    shape: Shape,
    method: Method | None,
    device: torch.device,
    *,
    compiled: bool,
    folder: Path,
    objective: Objective | None = None,
    steps: int = STEPS,
) -> Bench:
    """A run of `shape`: dense distillation without a method, to 2:4 with one; by `Distill()` unless told otherwise."""
    objective = objective or Distill()
    torch.manual_seed(0)
    with torch.device(device):
        model = from_config(config_of(shape)).eval()
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    plan = TrainPlan(steps=steps, sequences=shape.sequences, length=shape.length, compute_dtype=dtype)
    corpus = Synthetic(documents_count=10)
    teacher = copy.deepcopy(model)
    if objective.correcting is None:
        fixed(teacher, plan)
    anchor = anchor_of(teacher, objective.correcting, plan)
    recipe = Recipe(
        model=Tiny(architecture="llama", tokenizer=TrainedBPE(corpus=corpus, size=300)),  # names the run, no more
        method=method or DenseControl(),
        corpus=corpus,
        pattern=nm(2, 4) if method else None,
        objective=objective,
        train=plan,
    )
    sites = assign_patterns(find_sites(model, family_of("llama")), nm(2, 4)) if method else []
    around = Surroundings(model=model, sites=sites, slorb=None, steps=steps, calibration=lambda n, length: [])
    track = recipe.method.start(around)
    plain = forwards(model, teacher)
    forward, taught = faster(*plain, compiled=compiled)
    held = None if anchor is None else faster(forwards(anchor, None)[0], None, compiled=compiled)[0]
    run = Run(
        recipe=recipe,
        model=model,
        forward=forward,
        teacher=taught,
        plain=plain,
        track=track,
        correction=Correction(teacher, objective.correcting, plan) if objective.correcting else None,
        anchor=held,
        optimizer=build_optimizer(model, sites, plan, track),
        stream=RandomTokens(shape),  # type: ignore[arg-type]
        checkpoints=Checkpoints(folder, "bench"),
        tracker=NullTracker(),
        device=device,
        save_every=steps + 1,
        histogram_every=steps + 1,
    )
    return Bench(run, sites, track, teacher)


class _EnoughError(Exception):
    """All windows were seen."""


@dataclass(frozen=True)
class Times:
    """What a run's steps took."""

    step: float
    """Seconds, median over windows."""
    warm_up: float
    """Seconds until the first timed step, compilation included."""
    peak_bytes: int


def timed(
    shape: Shape,
    method: Method | None,
    device: torch.device,
    *,
    compiled: bool = True,
    recorded: bool | None = None,
    windows: int = 3,
    warm: int = 11,
) -> Times:
    """Seconds a step of the product's loop, over windows of PERIOD steps after `warm` steps.

    Steps are recorded on a GPU, as those of a long run are, unless told otherwise.
    """
    recorded = device.type == "cuda" if recorded is None else recorded
    began = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    marks: list[float] = []

    def on_step(progress: Progress) -> None:
        if progress.step >= warm and (progress.step - warm) % PERIOD == 0:
            synchronize(device)
            marks.append(time.perf_counter())
            if len(marks) > windows:
                raise _EnoughError

    with tempfile.TemporaryDirectory() as folder:
        made = bench(shape, method, device, compiled=compiled, folder=Path(folder))
        recording = Recording(made.run.model, made.teacher, required=False) if recorded else None
        try:
            train(dataclasses.replace(made.run, recording=recording), on_step=on_step)
        except _EnoughError:
            seconds = [(after - before) / PERIOD for before, after in itertools.pairwise(marks)]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    del made, recording
    release(device)
    return Times(statistics.median(seconds), marks[0] - began, peak)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back the memory of what is gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
