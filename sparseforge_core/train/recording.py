"""Forward and backward pass of a step as one CUDA graph: recorded once, then started by a single call.

A small model's step is thousands of small kernels, and the host takes longer to start them than the device to run
them. The graph holds the very kernels of the plain step, so it computes the same. It holds addresses too: what a step
reads must stay where it is, and is recorded anew where it has moved or where another kind of step begins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator

import torch
from torch import Tensor, nn

from sparseforge_core.objective import Objective
from sparseforge_core.recorded import WARM, Capture, on_gpu, taking_turns
from sparseforge_core.sparsity.masking import SoftMask

log = logging.getLogger(__name__)

ASKED = "synchronizing CUDA operation"
"""What torch says of an operation that makes the host wait."""

Losses = dict[str, Tensor]
Passes = Callable[[Tensor], Losses]
"""Forward and backward of a batch of tokens: leaves gradients in the parameters, returns the losses."""


def unrecordable(objective: Objective, masks: Iterable[SoftMask]) -> str | None:
    """Why a step's passes are not the same kernels each time, or None.

    What is not on the device's side alone is refused: draws of the step, a method's own law that does not say that all
    its numbers are in tensors which change in place (`of_tensors`).
    """
    if objective.taught.samples:
        return "the teacher's logits are drawn by the host"
    if objective.matching is not None:
        return "hidden states are matched"
    if any(soft.law is not None and not getattr(soft.law, "of_tensors", False) for soft in masks):
        return "the method has a way of its own from weight to effective weight"
    return None


@dataclasses.dataclass
class _Turn:
    """The steps of a kind that differ from those beside them in what is done, not in what it is done with."""

    plain: int = 0
    """Of its steps that were not recorded."""
    replay: Callable[[], None] | None = None
    tokens: Tensor | None = None
    losses: Losses = dataclasses.field(default_factory=dict)
    gradients: list[tuple[nn.Parameter, Tensor]] = dataclasses.field(default_factory=list)


class Recording:
    """The passes of a step of `model` and its teacher, recorded once for each kind of step."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        *,
        capture: Capture | None = None,
        beside: Capture | None = None,
        required: bool = True,
        strict: Callable[[], contextlib.AbstractContextManager[None]] | None = None,
    ) -> None:
        """
        Args:
            model: the student.
            teacher: what teaches it, if anything does.
            capture: what records; CUDA graphs that share their memory unless told.
            beside: what records a method's own work of a step (`MaskTrack.record`); a CUDA graph unless told.
            required: whether a step whose host asks the device for numbers (a router's choice of experts) is an error
                when it is recorded. Otherwise steps of this model stay plain, and the log says so.
            strict: a context in which such a question raises RuntimeError; `host_ahead` unless told.
        """
        modules = [module for module in (model, teacher) if module is not None]
        # Found once: a step has no time to look for a thousand. Their optimizer holds on to them just so.
        self.parameters = [parameter for module in modules for parameter in module.parameters()]
        self.tensors = [*self.parameters, *(buffer for module in modules for buffer in module.buffers())]
        self.masks = [part for part in model.modules() if isinstance(part, SoftMask)]
        laws = [soft.law for soft in self.masks if soft.law is not None]
        self.tensors += [own for law in laws for own in vars(law).values() if isinstance(own, Tensor)]
        self._given, self._strict = capture, strict or host_ahead
        self._capture = capture or taking_turns()
        self.beside = beside or on_gpu
        self._required, self._never = required, False
        self._kind: Hashable = None
        self._turns: dict[Hashable, _Turn] = {}

    def __call__(self, objective: Objective, tokens: Tensor, passes: Passes, *, turn: Hashable = None) -> Losses:
        """The losses of `tokens`, which are on the device; gradients are left where `passes` leaves them.

        Losses and gradients of a recorded step are overwritten by the next one. Where steps of one kind do not all do
        the same, `turn` says which of them this is: each has a recording of its own.
        """
        if self._never:
            return passes(tokens)
        why = unrecordable(objective, self.masks)
        if why is not None:
            if self._kind != why:
                log.info("steps are not recorded for now: %s", why)
            self.forget()
            self._kind = why
            return passes(tokens)
        kind = (objective, tokens.shape, *self._state())
        if kind != self._kind:
            self.forget()
            self._kind = kind
        now = self._turns.setdefault(turn, _Turn())
        if now.replay is None and now.plain < WARM:
            now.plain += 1
            return passes(tokens) if self._required or now.plain < WARM else self._tried(tokens, passes)
        if now.replay is None:
            self._record(now, tokens, passes)
        assert now.replay is not None
        assert now.tokens is not None
        now.tokens.copy_(tokens)
        now.replay()
        for parameter, gradient in now.gradients:
            parameter.grad = gradient
        return now.losses

    def _tried(self, tokens: Tensor, passes: Passes) -> Losses:
        """A plain step, done again as one if its host asked the device something: then no step is ever recorded."""
        try:
            with self._strict():
                return passes(tokens)
        except RuntimeError as error:
            if ASKED not in str(error):
                raise
            log.warning("steps are not recorded: the host asks the device for numbers in each (%s)", error)
        self.forget()
        self._never = True
        for parameter in self.parameters:
            parameter.grad = None
        return passes(tokens)

    def forget(self) -> None:
        """Give the recording and its memory back."""
        recorded = any(turn.replay is not None for turn in self._turns.values())
        self._kind, self._turns = None, {}
        self._capture = self._given or taking_turns()  # memory that was given back is not shared any more
        if recorded and torch.cuda.is_initialized():
            # A graph's memory is a pool of its own: plain steps find none of it until the driver has it back.
            torch.cuda.empty_cache()

    def _state(self) -> tuple[Hashable, ...]:
        """All that the passes depend on besides the values in tensors: where these lie, and what masks are."""
        switches = tuple((soft.frozen, soft.branch_on, soft.law is None) for soft in self.masks)
        return switches, tuple((tensor.data_ptr(), tensor.requires_grad) for tensor in self.tensors)

    def _record(self, now: _Turn, tokens: Tensor, passes: Passes) -> None:
        assert all(p.grad is None for p in self.parameters), "gradients would be added to those of another step"
        gc.collect()  # graphs of plain steps would keep their streams in the recording
        static = tokens.clone()
        losses: Losses = {}
        now.replay = self._capture(lambda: losses.update(passes(static)))
        now.tokens, now.losses = static, losses
        now.gradients = [(p, p.grad) for p in self.parameters if p.grad is not None]


@contextlib.contextmanager
def host_ahead() -> Iterator[None]:
    """Within: what makes the host wait for a GPU raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
