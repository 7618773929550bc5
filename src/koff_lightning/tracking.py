"""Hold the mask to its target: shift all logits by the least amount that brings the sparsity there.

Sparsity is counted in two ways. The soft count is the differentiable one, from the probabilities that gates are open;
the hard count takes each gate as open or closed, whichever is more likely. Both are to be near the target.

The Lagrangian multipliers alone would do it in a long run. In a few hundred steps they are too slow: Adam moves all
logits together, sparsity overshoots, and the memories learn for a model that will not be the final one (docs/log.md).
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Gaps = tuple[float, float]  # soft and hard sparsity, less the target
EVERY = slice(None)  # index of all units
APART = 6  # if the two counts differ by more bands than this, one says little about the other
WORST = 4  # bands that either count may be off the target: 1 for their mean and half of APART
ROUNDS = 20  # sharpenings at most; each makes the gates 1.2 times as sharp


class Gate(Protocol):
    """What a kind of gate (gates.py) has to offer here."""

    bound: float

    def keep(self, logits: Tensor) -> Tensor:
        """Differentiable count of each unit, [U] in 0..1; the hard count rounds it."""

    def shift(self, logits: Tensor, delta: float) -> Tensor:
        """Logits that keep more (delta > 0) or fewer units, in the same order."""

    def sharpen(self, logits: Tensor) -> Tensor:
        """Logits whose soft count is nearer to the hard count; the hard count stays."""


@torch.no_grad()
def shift_to_target(
    gate: Gate, logits: Tensor, target: float, band: float, counts: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> None:
    """Shift all `logits` [U], in place, until the mean of both counts lies in target +- band.

    With the mean on target both counts are equally far from it, so no other shift has the worse of them nearer. That
    may still be too far: the counts can lie far apart, or the hard one jumps across the target by one large unit. Then
    the gates are sharpened, which brings the counts together, and shifted again. Counts that are far apart are judged
    at the shift that puts the hard count on target: which units are closed there depends on the order of the units
    alone, not on how sharp the gates are.

    Args:
        gate: Kind of gate.
        logits: Logits of the gates, [U].
        target: Wanted sparsity.
        band: Nothing is moved while the mean is within this distance of the target.
        counts: (soft, hard) sparsity for keep probabilities [U], as `Budget.counts`.
    """

    def gaps_after(shift: float) -> Gaps:
        keep = gate.keep(gate.shift(logits, shift) if shift else logits)
        soft, hard = torch.stack(counts(keep)).tolist()  # the only sync with the device
        return soft - target, hard - target

    def move(count: Callable[[Gaps], float], now: Gaps) -> Gaps:
        shift, then = _find_shift(gaps_after, count, now, band, gate.bound / 64)
        if shift:
            logits.copy_(gate.shift(logits, shift))
        return then

    best, least = (logits, getattr(gate, "width", None)), math.inf  # ShrinkingReLU sharpens by its width
    for _ in range(ROUNDS):
        now = shifted = gaps_after(0.0)
        shift = 0.0
        if _apart(now, band):
            shift, shifted = _find_shift(gaps_after, _hard, now, band, gate.bound / 64)
        if not _apart(shifted, band):
            if shift:
                logits.copy_(gate.shift(logits, shift))
            now = move(_mean, shifted)
            if max(map(abs, now)) <= WORST * band:
                return
        if max(map(abs, now)) < least:
            best, least = (logits.clone(), getattr(gate, "width", None)), max(map(abs, now))
        logits.copy_(gate.sharpen(logits))
    # One unit is larger than WORST bands, so sharpening cannot help. Too sharp a gate learns nothing: go back.
    logits.copy_(best[0])
    if best[1] is not None:
        gate.width = best[1]
    move(_mean, gaps_after(0.0))


def _mean(gaps: Gaps) -> float:
    return sum(gaps) / 2


def _hard(gaps: Gaps) -> float:
    return gaps[1]


def _apart(gaps: Gaps, band: float) -> bool:
    return abs(gaps[0] - gaps[1]) > APART * band


def _find_shift(
    gaps_after: Callable[[float], Gaps], count: Callable[[Gaps], float], now: Gaps, band: float, step: float
) -> tuple[float, Gaps]:
    """The smallest shift that brings a count into the band, by bisection, and both gaps after it.

    The count falls as the shift grows. If it jumps across the band, the side nearer to the target is taken.

    Args:
        gaps_after: Both counts minus the target, after a shift.
        count: Picks one of the two gaps, or their mean.
        now: `gaps_after(0)`.
        band: Half-width of the band around 0.
        step: First shift to try; doubled until the goal is passed.
    """
    goal = min(max(count(now), -band), band)
    if goal == count(now):
        return 0.0, now
    sign = 1.0 if count(now) > goal else -1.0
    near, far = (0.0, now), (sign * step, gaps_after(sign * step))
    while (count(far[1]) - goal) * sign > 0 and abs(far[0]) < 1e5 * step:
        near, far = far, (2 * far[0], gaps_after(2 * far[0]))
    for _ in range(30):
        middle = (near[0] + far[0]) / 2
        trial = middle, gaps_after(middle)
        beyond = (goal - count(trial[1])) * sign  # how far past the goal
        if 0 <= beyond < 1e-5:
            return trial
        near, far = (near, trial) if beyond > 0 else (trial, far)
    return min(near, far, key=lambda place: abs(count(place[1])))
