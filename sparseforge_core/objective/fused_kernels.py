"""Triton kernel of cross-entropy and divergence: both losses of a position and their gradient, logits read twice.

What is computed is said by `divergence.summed_losses`; `fused.py` decides who comes here.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def losses_and_gradient(
    student, teacher, labels, task_sums, kl_sums, row_length, task_factor, kl_factor, cooling,
    VOCABULARY: tl.constexpr, TAUGHT: tl.constexpr, SAME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One position: its cross-entropy, its KL at temperature 1 / cooling, and the gradient of their weighted sum.

    The gradient takes the place of the student's logits. SAME says that the temperature is 1.
    """
    row = tl.program_id(0).to(tl.int64)
    ours, theirs = student + row * row_length, teacher + row * row_length
    lanes = tl.arange(0, BLOCK)
    # Maxima and sums of exponentials of the student at 1, of both at the temperature; sum of p_t (t - s) / T.
    top, mass = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
    top_s, mass_s = top, mass
    top_t, mass_t, apart = top, mass, mass
    for begin in range(0, VOCABULARY, BLOCK):
        place = begin + lanes
        there = place < VOCABULARY
        s = tl.load(ours + place, mask=there, other=float("-inf")).to(tl.float32)
        e = _apart(s, top)
        mass = tl.where(s > top, mass * e + 1.0, mass + e)
        top = tl.maximum(top, s)
        if TAUGHT:
            t = tl.load(theirs + place, mask=there, other=float("-inf")).to(tl.float32) * cooling
            e = _apart(t, top_t)
            gap = tl.where(there, t - s * cooling, 0.0)
            mass_t = tl.where(t > top_t, mass_t * e + 1.0, mass_t + e)
            apart = tl.where(t > top_t, apart * e + gap, apart + e * gap)
            top_t = tl.maximum(top_t, t)
            if not SAME:
                cooled = s * cooling
                e = _apart(cooled, top_s)
                mass_s = tl.where(cooled > top_s, mass_s * e + 1.0, mass_s + e)
                top_s = tl.maximum(top_s, cooled)
    peak = tl.max(top, 0)
    log_mass = peak + tl.log(tl.sum(mass * _shrink(top, peak), 0))
    label = tl.load(labels + row)
    tl.store(task_sums + row, log_mass - tl.load(ours + label).to(tl.float32))
    log_s, log_t = log_mass, log_mass
    if TAUGHT:
        if not SAME:
            peak = tl.max(top_s, 0)
            log_s = peak + tl.log(tl.sum(mass_s * _shrink(top_s, peak), 0))
        peak = tl.max(top_t, 0)
        shrink = _shrink(top_t, peak)
        total = tl.sum(mass_t * shrink, 0)
        log_t = peak + tl.log(total)
        tl.store(kl_sums + row, tl.sum(apart * shrink, 0) / total - (log_t - log_s))
    tl.debug_barrier()  # the label's logit is read above by all, and overwritten below by one
    for begin in range(0, VOCABULARY, BLOCK):
        place = begin + lanes
        there = place < VOCABULARY
        s = tl.load(ours + place, mask=there, other=float("-inf")).to(tl.float32)
        p = tl.exp(s - log_mass)
        slope = task_factor * (p - tl.where(place == label, 1.0, 0.0))
        if TAUGHT:
            t = tl.load(theirs + place, mask=there, other=float("-inf")).to(tl.float32) * cooling
            if not SAME:
                p = tl.exp(s * cooling - log_s)
            slope += kl_factor * cooling * (p - tl.exp(t - log_t))
        tl.store(ours + place, slope.to(student.dtype.element_ty), mask=there)


@triton.jit
def _apart(x, top):
    """exp(-|x - top|), by which the smaller of both counts; 0 where x is minus infinity even if `top` is too."""
    return tl.where(x == float("-inf"), 0.0, tl.exp(-tl.abs(x - top)))


@triton.jit
def _shrink(x, top):
    """exp(x - top), 0 where x is minus infinity even if `top` is too."""
    return tl.where(x == float("-inf"), 0.0, tl.exp(x - top))
