"""How many bytes a GPU needs to train a cell, by arithmetic, before anything is loaded.

Every line says what is kept and why. Weights are float32 masters with AdamW; the forward computes in bfloat16 under
autocast, on a float32 residual stream. What the arithmetic leaves out (the allocator's gaps, the CUDA context, NCCL's
buffers) is the RESERVE; `benchmarks/ranks.py` measures how well the rest agrees. Imports nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparseforge_core.errors import RecipeError

MASK_BYTES = 4 + 4 + 1
"""Of a masked weight: m, view, hard mask."""
CURVATURE_BYTES = 4
ADAM_BYTES = 8
TEACHER_BYTES = 2
"""Of a weight of a teacher in bfloat16; one that is corrected takes 16, one that is held beside that 18."""
STEP_BYTES = 12
"""Of these, gradient and moments, which come with its first step."""
EIGHT_BIT_BYTES = 2 + 8 / 256
"""Of a masked weight whose moments are kept in 8 bits: two codes, and two float32 scales for 256 of them."""
MOVING_BYTES = 28
"""Of each entry of the one tensor whose 8-bit moments move: both in float32, their shares, codes and signs."""
UPDATE_BYTES = 64
"""Of each entry of the one site whose mask is being updated: it is whole then, and its scores in several forms."""
START_BYTES = 4 + MASK_BYTES + 5
"""Of a masked weight while a one-shot method finds where a training begins (`methods/one_shot.py`): a dense copy, that
method's masks, and what it found."""
RESERVE = 0.08
"""Share of the memory that is never planned."""
GIB = 2**30
CHUNK_LOGITS = 2**27
"""Logits of a chunk on a GPU, as in `objective/batch.py`."""
SPLIT_FROM = 2**14


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the arithmetic needs to know of a model."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    """Width of the MLP; of a mixture, of all experts that a token passes through."""
    vocabulary: int
    parameters: int
    masked: int
    largest_site: int
    key_values: int
    """Width of keys, and of values."""

    @property
    def block(self) -> int:
        """Parameters of a block: nearly all of them are masked."""
        return self.masked // self.layers

    @property
    def outside(self) -> int:
        """Parameters outside of the blocks: embedding, head, norms."""
        return self.parameters - self.masked


def decoder(
    name: str,
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    vocabulary: int,
    key_values: int | None = None,
    tied: bool = False,
    matrices: int = 3,
) -> Shape:
    """The shape of a decoder whose MLP has so many matrices; `key_values` is the width of keys, and of values."""
    attention = 2 * hidden * hidden + 2 * hidden * (key_values or hidden)
    masked = layers * (attention + matrices * hidden * intermediate)
    outside = (1 if tied else 2) * vocabulary * hidden + (2 * layers + 1) * hidden
    return Shape(
        name=name,
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        vocabulary=vocabulary,
        parameters=masked + outside,
        masked=masked,
        largest_site=hidden * max(hidden, intermediate),
        key_values=key_values or hidden,
    )


def shape_of(name: str, config: Any, sites: Sequence[tuple[int, ...]], parameters: int) -> Shape:
    """The shape of a model of this configuration, whose masked weights have these shapes."""
    counts = [math.prod(shape) for shape in sites]
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    widest = max((max(shape[-2:]) for shape in sites), default=4 * hidden)
    return Shape(
        name=name,
        layers=int(config.num_hidden_layers),
        hidden=hidden,
        intermediate=widest,
        vocabulary=int(config.vocab_size),
        parameters=parameters,
        masked=sum(counts),
        largest_site=max(counts, default=0),
        key_values=hidden * int(getattr(config, "num_key_value_heads", None) or heads) // heads,
    )


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How a cell is put on GPUs."""

    gpus: int = 1
    sharded: bool = True
    """Whether each GPU holds a part of everything; a single one holds all."""
    micro_batch: int = 1
    """Sequences per forward on one GPU."""
    length: int = 4096
    recompute: bool = True
    """Whether activations inside a block are computed again in backward."""
    teacher: int = TEACHER_BYTES
    """Of a weight of the teacher, of the student's shape, that runs beside it; 0 where none does."""
    masks: bool = True
    mask_bytes: int = MASK_BYTES
    curvature_bytes: int = CURVATURE_BYTES
    """Of a masked weight; 0 where no average of its own is kept."""
    mean_bytes: int = 0
    """Of a weight, for the mean that training ends with, where the plan averages (`TrainPlan.averaged_from`)."""
    moment_bytes: float = ADAM_BYTES
    """Of a weight inside of blocks: EIGHT_BIT_BYTES where `TrainPlan.moments` is "8-bit"."""
    starts: bool = False
    """Whether training begins at what a one-shot method makes of the model, which comes to be on the same GPU."""
    calibration: int = 0
    """Tokens that this method carries from block to block."""

    @property
    def parts(self) -> int:
        """Parts that each tensor is cut into."""
        return self.gpus if self.sharded else 1


@dataclass(frozen=True)
class Line:
    """One use of memory."""

    what: str
    count: float
    """Bytes on one GPU."""
    how: str
    """The arithmetic in words."""


def lines(shape: Shape, spread: Spread) -> list[Line]:
    """What one GPU holds at the most, piece by piece."""
    p, m, b, out, n = shape.parameters, shape.masked, shape.block, shape.outside, spread.parts
    tokens = spread.micro_batch * spread.length
    cut = f" / {n}" if n > 1 else ""
    found = [
        Line("weights", 4 * p / n, f"4 B x {p / 1e6:,.0f}M{cut}"),
        Line("gradients", 4 * p / n, f"4 B x {p / 1e6:,.0f}M{cut}"),
        _moments(shape, spread, cut),
    ]
    if spread.mean_bytes:
        found.append(Line("mean weights", spread.mean_bytes * p / n, f"{spread.mean_bytes} B x {p / 1e6:,.0f}M{cut}"))
    if spread.masks:
        for what, each in (("masks", spread.mask_bytes), ("curvature", spread.curvature_bytes)):
            found.append(Line(what, each * m / n, f"{each} B x {m / 1e6:,.0f}M masked{cut}"))
    if spread.teacher:
        found.append(Line("teacher", spread.teacher * p / n, f"{spread.teacher} B x {p / 1e6:,.0f}M{cut}"))
    gathered = 8 if spread.masks else 4
    if n > 1:
        # The block that runs and the next one; its unsharded gradients, and a copy of these on their way.
        found.append(
            Line("gathered blocks", (2 * gathered + 8) * b, f"{2 * gathered + 8} B x {b / 1e6:,.0f}M of a block")
        )
        found.append(Line("gathered rest", 12 * out, f"12 B x {out / 1e6:,.0f}M outside of blocks, gradients too"))
        if spread.teacher:
            found.append(Line("gathered teacher", 4 * b + 2 * out, "2 B x two blocks and what is outside"))
    elif spread.gpus > 1:
        found.append(Line("gradient buckets", 4 * p, f"4 B x {p / 1e6:,.0f}M, averaged over {spread.gpus} GPUs"))
    blocks = 1 if spread.recompute else shape.layers
    effective = f"6 B x {b / 1e6:,.0f}M of the block that runs, 2 B of others kept"
    found.append(Line("effective weights", 4 * b + 2 * b * blocks, effective))
    found += _activations(shape, tokens, recompute=spread.recompute)
    found.append(_logits(shape, tokens, teacher=spread.teacher > 0))
    return found


def _moments(shape: Shape, spread: Spread, cut: str) -> Line:
    p, m, n = shape.parameters, shape.masked, spread.parts
    if spread.moment_bytes == ADAM_BYTES:
        return Line("Adam moments", ADAM_BYTES * p / n, f"{ADAM_BYTES} B x {p / 1e6:,.0f}M{cut}")
    count = spread.moment_bytes * m + ADAM_BYTES * shape.outside + MOVING_BYTES * shape.largest_site
    how = (
        f"{spread.moment_bytes:.2f} B x {m / 1e6:,.0f}M in blocks, {ADAM_BYTES} B outside, "
        f"{MOVING_BYTES} B x {shape.largest_site / 1e6:,.0f}M on the move"
    )
    return Line("Adam moments", count / n, how + cut)


def _activations(shape: Shape, tokens: int, *, recompute: bool) -> list[Line]:
    # float32: the residual twice, two normalised copies, turned queries; bfloat16: what seven matrices and attention
    # take in and give. An H100 kept 252,698 bytes a token of LLaMA-2-7B's block; this says 251,904.
    inside = 30 * shape.hidden + 10 * shape.key_values + 8 * shape.intermediate
    if not recompute:
        return [Line("activations", tokens * inside * shape.layers, f"{inside:,} B x {tokens} tokens x {shape.layers}")]
    kept = 4 * shape.hidden
    return [
        Line("block inputs", tokens * kept * shape.layers, f"{kept:,} B x {tokens} tokens x {shape.layers} layers"),
        Line("one block's activations", tokens * 2 * inside, f"2 x {inside:,} B x {tokens} tokens, gradients too"),
    ]


def _logits(shape: Shape, tokens: int, *, teacher: bool) -> Line:
    positions = tokens
    if shape.vocabulary >= SPLIT_FROM:
        positions = min(tokens, max(1, CHUNK_LOGITS // shape.vocabulary, shape.hidden // 4))
    forms = 7 if teacher else 3
    what = f"{forms} float32 forms x {positions} positions x {shape.vocabulary:,}"
    return Line("logits of a chunk", 4.0 * forms * positions * shape.vocabulary, what)


def update_bytes(shape: Shape, spread: Spread) -> float:
    """Bytes of one GPU while masks are updated: no activations, but one site whole."""
    kept = (6 if spread.masks else 4) + bool(spread.mean_bytes)
    state = sum(line.count for line in lines(shape, spread)[:kept])
    return state + UPDATE_BYTES * shape.largest_site


def start_lines(shape: Shape, spread: Spread) -> list[Line]:
    """What one GPU holds while a one-shot method finds where training begins: no gradients, moments or activations.

    Nothing where it is done before the weights come to the GPU: what is to be sharded is cut in the CPU's memory.
    """
    if not spread.starts or spread.parts > 1:
        return []
    p, m, site = shape.parameters, shape.masked, shape.largest_site
    tokens = f"{4 * shape.hidden:,} B x {spread.calibration:,} tokens of calibration text"
    found = [
        Line("weights", 4 * p, f"4 B x {p / 1e6:,.0f}M"),
        Line("dense copy, masks, solution", START_BYTES * m, f"{START_BYTES} B x {m / 1e6:,.0f}M masked"),
        Line("hidden states", 4 * shape.hidden * spread.calibration, tokens),
        Line("one site solved", UPDATE_BYTES * site, f"{UPDATE_BYTES} B x {site / 1e6:,.0f}M"),
    ]
    if spread.teacher:
        each = spread.teacher - (STEP_BYTES if spread.teacher > TEACHER_BYTES else 0)
        found.append(Line("teacher", each * p, f"{each} B x {p / 1e6:,.0f}M"))
    return found


def peaks(shape: Shape, spread: Spread) -> dict[str, float]:
    """The most bytes that one GPU holds in each part of a run."""
    return {
        "a step": sum(line.count for line in lines(shape, spread)),
        "a mask update": update_bytes(shape, spread) if spread.masks else 0.0,
        "its start from a one-shot solution": sum(line.count for line in start_lines(shape, spread)),
    }


def need(shape: Shape, spread: Spread) -> float:
    """The most bytes that one GPU holds at once."""
    return max(peaks(shape, spread).values())


def refusal(shape: Shape, spread: Spread, gpu_bytes: float) -> str | None:
    """Why the cell cannot run so on GPUs of so many bytes, with the arithmetic and what would do; None: it fits."""
    wanted, usable = need(shape, spread), (1.0 - RESERVE) * gpu_bytes
    if wanted <= usable:
        return None
    most = max(peaks(shape, spread).items(), key=lambda item: item[1])[0]
    shown = start_lines(shape, spread) if most.startswith("its start") else lines(shape, spread)
    parts = "; ".join(f"{line.what} {line.count / GIB:.1f} ({line.how})" for line in shown)
    return (
        f"{shape.name} on {spread.gpus} GPU(s) of {gpu_bytes / GIB:.0f} GiB needs {wanted / GIB:.1f} GiB each in "
        f"{most}, usable are {usable / GIB:.1f}: {parts}. {_advice(shape, spread, usable)}"
    )


def _advice(shape: Shape, spread: Spread, usable: float) -> str:
    for gpus in (spread.gpus,) if spread.starts else (spread.gpus, 2, 4, 8, 16, 32, 64):
        for recompute in (spread.recompute, True):
            better = replace(spread, gpus=gpus, sharded=gpus > 1, micro_batch=1, recompute=recompute)
            if better.sharded:  # 8-bit moments are those of whole tensors
                better = replace(better, moment_bytes=ADAM_BYTES)
            if gpus >= spread.gpus and need(shape, better) <= usable:
                how = " with recomputed activations" if recompute else ""
                return f"Use {gpus} GPU(s), sharded, micro-batch 1{how}: {need(shape, better) / GIB:.1f} GiB each"
    if spread.starts:  # it prunes whole blocks before anything is sharded
        return "What starts from a one-shot solution is not sharded: use a larger GPU, or start from dense weights"
    return "No number of such GPUs up to 64 holds it at this length; shorten train.length"


def check(shape: Shape, spread: Spread, gpu_bytes: float) -> None:
    """Raise RecipeError, with the arithmetic, unless the placement fits."""
    why = refusal(shape, spread, gpu_bytes)
    if why:
        raise RecipeError(f"placement: {why}")
