"""The losses of a batch: student and teacher run, whole or with their heads applied to few positions at a time.

Logits are by far the largest tensor of a model with many tokens: 2048 positions of a vocabulary of 128k are 1 GiB in
float32, and cross-entropy and divergence need several of that size. From `SPLIT_FROM` entries on, the head is therefore
applied to chunks of positions, and each chunk is forgotten and computed again in the backward pass, at the price of
one more product with each head. Gradients add up in the precision of the weights, and a second derivative exists.

The rule looks at the recipe's models alone, so that a result does not depend on where it was computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparseforge_core.errors import RecipeError, UnsupportedModel
from sparseforge_core.models.heads import Split, split
from sparseforge_core.models.regions import compiled_blocks, has_compiled_blocks
from sparseforge_core.models.rows import one_sequence_a_row
from sparseforge_core.objective.divergence import SparseTarget
from sparseforge_core.objective.fused import fused_losses, refusal
from sparseforge_core.objective.objectives import Distill, Losses, Objective, TaskOnly
from sparseforge_core.objective.teaching import Draws

log = logging.getLogger(__name__)

SPLIT_FROM = 2**14
"""Entries of the vocabulary from which on logits are computed in chunks. Below it, results are as they ever were."""

CHUNK_LOGITS = 2**23
"""Logits of a chunk, 32 MiB in float32, or a quarter of the head's weight where that is more.

Every chunk adds to the gradient of the whole head, so that its logits being few would save little beside that and cost
the time to read and write it.
"""

CHUNK_LOGITS_ON_GPU = 2**27
"""The same on a GPU, where small products leave it idle: half a GiB in float32. Sums are rounded in another order."""


def forwards(model: Any, teacher: Any | None) -> tuple[Any, Any | None]:
    """What `batch_losses` calls for student and teacher: the models themselves, or split where the vocabulary is large.

    A model whose head cannot be told from its body is used whole, with a warning.
    """
    found = [model, teacher]
    if model.config.vocab_size >= SPLIT_FROM:
        try:
            found = [model if model is None else split(model) for model in (model, teacher)]
        except UnsupportedModel as error:
            log.warning(
                "%s; the logits of all %d entries are kept at once. If memory runs out, lower the micro-batch",
                error,
                model.config.vocab_size,
            )
    return found[0], found[1]


def faster(student: Any, teacher: Any | None, *, compiled: bool) -> tuple[Any, Any | None]:
    """What `forwards` gave, for steps: a GPU may make the losses' gradient in the forward pass; blocks are compiled.

    There is no second derivative of these forms.
    """
    found = [dataclasses.replace(p, fused=True) if isinstance(p, Split) else p for p in (student, teacher)]
    if compiled:
        found = [_compiled(part) for part in found]
    return found[0], found[1]


def batch_losses(
    model: Any,
    teacher: Any | None,
    objective: Objective,
    tokens: Tensor,
    draws: Draws | None = None,
    *,
    correct: bool = False,
    anchor: Any | None = None,
) -> Losses:
    """Run student and teacher on `tokens` `[batch, length]` and compute the losses.

    With `correct` the teacher's own loss is among them, with its graph, from the forward pass that it teaches with.
    `anchor` is what it is held to, where the objective's correction says so; it runs without a graph.
    """
    if objective.distills and teacher is None:
        raise RecipeError("objective: distillation was asked for without a teacher")
    teacher = teacher if objective.distills else None
    own = _own(objective) if correct else None
    anchor = anchor if own is not None and own.distills else None
    if own is not None and own.distills and anchor is None:
        raise RecipeError("objective.correction.anchor: the teacher is to be held to a model that is not given")
    uniform = None
    if draws is not None and objective.taught.samples:
        uniform = draws.uniform(tokens.shape[0], tokens.shape[1] - 1, objective.taught.samples).to(tokens.device)
    if objective.matching is not None and has_compiled_blocks(_body(model)):
        raise RecipeError("objective.hidden: compiled blocks do not show their hidden states; run without --compile")
    asked = {"use_cache": False} if objective.matching is None else {"use_cache": False, "output_hidden_states": True}
    with one_sequence_a_row():
        ours = _body(model)(input_ids=tokens, **asked)
        with torch.set_grad_enabled(correct):
            theirs = None if teacher is None else _body(teacher)(input_ids=tokens, **asked)
        with torch.no_grad():
            held = None if anchor is None else _body(anchor)(input_ids=tokens, use_cache=False)
    losses = _losses(model, teacher, objective, ours, theirs, tokens, uniform)
    if objective.matching is not None and theirs is not None:
        states = [state.detach() for state in theirs.hidden_states]
        losses = objective.with_hidden(losses, objective.matching.loss(ours.hidden_states, states))
    if own is None or theirs is None:
        return losses
    return dataclasses.replace(losses, teacher=_losses(teacher, anchor, own, theirs, held, tokens, None).total)


def _own(objective: Objective) -> Objective:
    """What a teacher that takes steps minimises."""
    share = 0.0 if objective.correcting is None else objective.correcting.anchor
    return Distill(kl_weight=share) if share else TaskOnly()


def _losses(
    model: Any,
    teacher: Any | None,
    objective: Objective,
    ours: Any,
    theirs: Any | None,
    tokens: Tensor,
    uniform: Tensor | None,
) -> Losses:
    """The losses of what two bodies, or two whole models, put out for `tokens`; no gradient reaches the teacher."""
    if not isinstance(model, Split):
        logits = None if theirs is None else theirs.logits.detach()
        return objective.losses(ours.logits, logits, tokens, uniform)
    taught = None if theirs is None else theirs.last_hidden_state.detach()
    if refusal(model, teacher, objective) is not None:
        return _in_chunks(model, teacher, objective, ours.last_hidden_state, taught, tokens, uniform)
    states, labels = _predicting(ours.last_hidden_state), tokens[:, 1:].flatten()
    return fused_losses(model, teacher, objective, states, None if taught is None else _predicting(taught), labels)


def predictions(model: Any, tokens: Tensor) -> Tensor:
    """Logits of every position that has a next token, `[batch, length - 1, vocabulary]`."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits[:, :-1]


def _body(model: Any) -> Any:
    return model.body if isinstance(model, Split) else model


def _in_chunks(
    model: Split,
    teacher: Split | None,
    objective: Objective,
    hidden: Tensor,
    taught: Tensor | None,
    tokens: Tensor,
    uniform: Tensor | None,
) -> Losses:
    """The losses of hidden states `[batch, length, width]`, never holding the logits of all positions."""
    labels = tokens[:, 1:].flatten()
    logits = CHUNK_LOGITS_ON_GPU if hidden.is_cuda else CHUNK_LOGITS
    size = max(1, logits // model.vocabulary, hidden.shape[-1] // 4)
    taught_parts = None if taught is None else _predicting(taught).split(size)
    drawn_parts = None if uniform is None else uniform.flatten(0, 1).split(size)
    sums = []
    for i, (states, wanted) in enumerate(zip(_predicting(hidden).split(size), labels.split(size), strict=True)):
        target: Any = None
        if teacher is not None and taught_parts is not None:
            drawn = None if drawn_parts is None else drawn_parts[i]
            target = functools.partial(_target, teacher, objective, taught_parts[i], drawn)
            if not objective.taught.dense:  # few entries are kept rather than computed again
                target = target()
        arguments = (model, objective, states, wanted, target)
        # Nothing random happens inside: models run without dropout, and draws are arguments.
        sums.append(checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False))
    task, kl = (torch.stack(parts).sum() for parts in zip(*sums, strict=True))
    return objective.of_sums(task, kl, len(labels))


def _predicting(hidden: Tensor) -> Tensor:
    """The hidden states that predict a token: all but each sequence's last, `[positions, width]`."""
    return hidden[:, :-1].flatten(0, 1)


def _chunk(model: Split, objective: Objective, hidden: Tensor, labels: Tensor, target: Any) -> tuple[Tensor, Tensor]:
    """Both sums over a chunk: hidden states `[positions, width]`, labels `[positions]`, a target or what makes it."""
    with _uncached_autocast(hidden):
        taught = target() if callable(target) else target
        return objective.sums(model.head(hidden), taught, labels)


def _target(teacher: Split, objective: Objective, hidden: Tensor, uniform: Tensor | None) -> Tensor | SparseTarget:
    """What a teacher's hidden states `[positions, width]` teach."""
    with torch.no_grad(), _uncached_autocast(hidden):
        return objective.target(teacher.head(hidden), uniform)


def _uncached_autocast(like: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The autocast in force, casting anew: a cached cast of the head's weight would add up its gradient in bfloat16."""
    device = like.device.type
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=torch.get_autocast_dtype(device), cache_enabled=False)


def _compiled(part: Any | None) -> Any | None:
    if isinstance(part, Split):
        return dataclasses.replace(part, body=compiled_blocks(part.body))
    return None if part is None else compiled_blocks(part)
