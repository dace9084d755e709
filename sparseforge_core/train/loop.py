"""The one training loop. It reads as algorithm 1: weights every step, the mask's own track beside them."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparseforge_core.checkpoint import Checkpoints
from sparseforge_core.data.tokens import TokenStream
from sparseforge_core.errors import Diverged, Interrupted, SparseForgeError
from sparseforge_core.methods.base import MaskTrack
from sparseforge_core.objective import Draws, Objective, batch_losses, predictions
from sparseforge_core.observe.curvature import Batch
from sparseforge_core.recipe import Recipe
from sparseforge_core.sparsity.report import HISTOGRAM_EDGES
from sparseforge_core.tracking.tracker import Tracker
from sparseforge_core.train.ahead import Ahead
from sparseforge_core.train.beside import Beside
from sparseforge_core.train.correction import Correction
from sparseforge_core.train.mean_weights import MeanWeights
from sparseforge_core.train.optimizer import set_rate
from sparseforge_core.train.parallel import Ranks
from sparseforge_core.train.recording import Recording
from sparseforge_core.train.watch import Watch

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a running cell tells whoever watches it."""

    step: int
    steps: int
    loss: float
    """Of this step; where the host runs ahead of its device, of one a few steps ago, and NaN before any is known."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything one training run works on."""

    recipe: Recipe
    model: Any
    forward: Any
    """What the objective calls for the student: the model itself or its split form, compiled or not."""
    teacher: Any | None
    """The same for the teacher."""
    track: MaskTrack
    optimizer: torch.optim.Optimizer
    stream: TokenStream
    checkpoints: Checkpoints
    tracker: Tracker
    device: torch.device
    ranks: Ranks = field(default_factory=Ranks)
    """How the work is spread; this process alone unless said otherwise."""
    whole: Any | None = None
    """What gives the student's logits of a few tokens, where that is not `model` itself."""
    plain: tuple[Any, Any | None] | None = None
    """Student and teacher in a form that has second derivatives, neither compiled nor fused; None: they are that."""
    correction: Correction | None = None
    """The teacher's own steps, where the objective asks for them."""
    anchor: Any | None = None
    """What a teacher that takes steps is held to, as the objective calls it; None where it is not held."""
    mean: MeanWeights | None = None
    """What training ends with, where that is not the last step's weights."""
    recording: Recording | None = None
    """What starts forward and backward of a whole batch by one call; None: each kernel is started by the host."""
    seed: int = 0
    """The cell's, for what the objective draws."""
    micro_batch: int | None = None
    """Sequences per forward; None takes the whole batch. Placement, not identity."""
    log_every: int = 10
    save_every: int = 200
    histogram_every: int = 100


@dataclass(frozen=True)
class Outcome:
    """What training leaves besides the model: the last smoothed losses, and seconds spent in steps."""

    final_loss: float
    seconds: float


def train(
    run: Run,
    *,
    on_step: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Outcome:
    """Train from the last checkpoint, if any, to the recipe's last step.

    Raises Interrupted when asked to stop (a checkpoint is saved first), Diverged on a loss or gradient that is
    not finite (nothing of that step reaches a checkpoint).
    """
    plan = run.recipe.train
    beside = Beside(run.track, [kept for kept in (run.correction, run.mean) if kept is not None])
    first = run.checkpoints.resume(run.model, run.optimizer, beside) + 1
    clock = _Clock(plan.sequences * plan.length, first - 1)
    size = functools.partial(run.checkpoints.size, run.model, run.optimizer, beside)
    saving = _Saving(size, patient=run.ranks.world == 1)
    watch = Watch(run.optimizer, run.device, deferred=run.ranks.deferred)
    if run.recording is not None:
        run.track.record(run.recording.beside)
    trained = [p for p in run.model.parameters() if p.requires_grad]  # a step has no time to look for hundreds
    with Ahead(functools.partial(run.ranks.batch, run.stream), run.device, plan.steps) as ahead:
        for step in range(first, plan.steps + 1):
            # ------------------------------------------------ one training step
            set_rate(run.optimizer, plan.lr.at(step / plan.steps))
            run.ranks.begin(step)
            tokens = ahead.batch(step)
            losses = _backward(run, tokens, step, watch)
            with _diverged_first(watch):
                run.track.observe(_as_observed(run, tokens, step))
                run.track.before_update(step)
                norm = run.ranks.clip(trained, plan.clip)
                watch.before_update(step, losses["loss/total"], norm)
                run.optimizer.step()
                if run.correction is not None and _corrects(run, step):
                    run.correction.step(step / plan.steps, run.ranks.clip)
                run.optimizer.zero_grad(set_to_none=True)
                run.track.after_update(step, run.optimizer)
                if run.mean is not None:
                    run.mean.take(step)
            # -----------------------------------------------------------------
            watch.after_update(step)
            if on_step is not None:
                on_step(Progress(step=step, steps=plan.steps, loss=watch.loss))
            last = step == plan.steps
            if step % run.log_every == 0 or step == 1 or last:
                watch.check()
                values = {**_read(losses), "lr": plan.lr.at(step / plan.steps), "grad_norm": float(norm)}
                values["tokens_per_second"] = clock.rate(step)
                run.tracker.scalars(step, {**values, **run.track.summary()})
            if step % run.histogram_every == 0 or last:
                watch.check()
                for name, counts in run.track.histograms().items():
                    run.tracker.histogram(step, name, list(HISTOGRAM_EDGES), counts)
            stop = run.ranks.stop(should_stop is not None and should_stop())
            if (step % run.save_every == 0 and saving.is_due()) or (stop and not last):
                watch.check()
                with saving.timed():
                    run.checkpoints.save(step, run.model, run.optimizer, beside)
            if stop and not last:
                raise Interrupted(
                    f"stopped after step {step} of {plan.steps}; run the same command again to go on from here"
                )
    if run.mean is not None:
        run.mean.put()
    run.ranks.end()
    return Outcome(final_loss=watch.loss, seconds=clock.seconds())


@contextlib.contextmanager
def _diverged_first(watch: Watch) -> Iterator[None]:
    """What a method says of numbers that are not finite is said of the step that brought them."""
    try:
        yield
    except SparseForgeError as error:
        if not isinstance(error, Diverged):
            watch.check()
        raise


def _read(losses: dict[str, Tensor]) -> dict[str, float]:
    return dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))


def _objective(run: Run, step: int) -> Objective:
    return run.recipe.objective.at((step - 1) / run.recipe.train.steps)


def _corrects(run: Run, step: int) -> bool:
    """Whether the teacher takes a step of its own, too."""
    spec = _objective(run, step).correcting
    return run.correction is not None and spec is not None and spec.is_due(step)


def _backward(run: Run, tokens: Tensor, step: int, watch: Watch) -> dict[str, Tensor]:
    """Forward and backward of our share of a batch, in micro-batches whose gradients add up to that of the mean loss.

    Returns the losses of the whole batch, float64 on the device; the gradients then are those of the whole batch too.
    """
    size = run.micro_batch or tokens.shape[0]
    first = run.ranks.first(tokens.shape[0])
    objective, correct = _objective(run, step), _corrects(run, step)
    means: dict[str, Tensor] = {}
    alone = run.ranks.world == 1
    for row, piece in zip(range(0, tokens.shape[0], size), tokens.split(size), strict=True):
        draws = Draws(seed=run.seed, step=step, row=first + row)
        share = piece.shape[0] / tokens.shape[0]
        run.ranks.expect(last=row + size >= tokens.shape[0], correct=correct)
        on_device = piece.to(run.device)
        passes = functools.partial(_passes, run, objective, draws=draws, share=share, correct=correct)
        if run.recording is not None and size >= tokens.shape[0]:
            found = run.recording(objective, on_device, passes, turn=correct)
        else:
            # Ranks look at their losses together, below: one that left alone would leave them waiting.
            found = passes(on_device, look=functools.partial(watch.refuse_loss, step=step) if alone else None)
        for name, part in found.items():
            means[name] = means[name] + part if name in means else part
    run.ranks.complete(step)
    means = run.ranks.means(means)
    if run.recording is not None or not alone:
        watch.refuse_loss(means["loss/total"], step)
    return means


def _passes(
    run: Run,
    objective: Objective,
    tokens: Tensor,
    *,
    draws: Draws,
    share: float,
    correct: bool,
    look: Callable[[Tensor], None] | None = None,
) -> dict[str, Tensor]:
    """Forward, a look at the loss, and backward of a micro-batch on the device; its share of the batch's losses."""
    with _autocast(run):
        losses = batch_losses(run.forward, run.teacher, objective, tokens, draws, correct=correct, anchor=run.anchor)
    if look is not None:
        look(losses.total)
    total = losses.total if losses.teacher is None else losses.total + losses.teacher
    (total * share).backward()  # type: ignore[no-untyped-call]
    parts = {
        "loss/total": losses.total,
        "loss/task": losses.task,
        "loss/kl": losses.kl,
        "loss/hidden": losses.hidden,
        "loss/teacher": losses.teacher,
    }
    return {name: share * value.detach().double() for name, value in parts.items() if value is not None}


def _as_observed(run: Run, tokens: Tensor, step: int) -> Batch:
    """The step's batch for whoever wants to look at it again, through the model itself, not its compiled form."""
    student, teacher = run.plain or (run.forward, run.teacher)

    def loss(piece: Tensor, row: int) -> Tensor:
        draws = Draws(seed=run.seed, step=step, row=row)
        return batch_losses(student, teacher, _objective(run, step), piece, draws).total

    return Batch(
        step=step,
        model=run.model,
        tokens=tokens.to(run.device),
        loss=loss,
        predictions=lambda piece: predictions(run.whole or run.model, piece),
        optimizer=run.optimizer,
        first=run.ranks.first(tokens.shape[0]),
        micro_batch=run.micro_batch,
        autocast=lambda: _autocast(run),
    )


def _autocast(run: Run) -> contextlib.AbstractContextManager[Any]:
    if run.recipe.train.compute_dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(run.device.type, dtype=torch.bfloat16)


class _Clock:
    """Tokens per second since the last question, and seconds in all."""

    def __init__(self, tokens_per_step: int, step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.begin = self.last = time.perf_counter()
        self.last_step = step

    def rate(self, step: int) -> float:
        now = time.perf_counter()
        rate = (step - self.last_step) * self.tokens_per_step / max(now - self.last, 1e-9)
        self.last, self.last_step = now, step
        return rate

    def seconds(self) -> float:
        return time.perf_counter() - self.begin


SLOW_SAVE = 0.5
"""Seconds from which on a checkpoint is worth waiting for the next one."""
SAVING_SHARE = 0.1
"""Most of a training's time that slow checkpoints may take."""
SAVE_RATE = 250e6
"""Bytes a second that a checkpoint is expected to be written and hashed at, until one was."""


class _Saving:
    """Whether a checkpoint is due: a slow one is passed over until ten times what it takes has been trained.

    Fast steps of a large model would otherwise write checkpoints for as long as they train, and a training of a minute
    spend a sixth of it on one. Ranks do not pass any over: their clocks differ, and a checkpoint is the work of all.
    """

    def __init__(self, size: Callable[[], int], *, patient: bool) -> None:
        """`size` counts the bytes of a checkpoint."""
        self.size, self.patient = size, patient
        self.took: float | None = None
        """Seconds of the last one."""
        self.ended = time.perf_counter()

    def is_due(self) -> bool:
        """Whether to save at a step where a checkpoint is planned."""
        if not self.patient:
            return True
        took = self.size() / SAVE_RATE if self.took is None else self.took
        return took < SLOW_SAVE or (time.perf_counter() - self.ended) * SAVING_SHARE >= took

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Around a save."""
        began = time.perf_counter()
        yield
        self.ended = time.perf_counter()
        self.took = self.ended - began
