"""Hold the mask to its target: the least change of the logits that brings the soft and the hard count there.

The multipliers find the price of a parameter, but in a run of a few hundred steps Adam moves all logits together and
overshoots before they do; memories would then learn for the wrong model (docs/log.md).
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Gaps = tuple[float, float]  # soft and hard sparsity, less the target
EVERY = slice(None)  # units
APART = 6  # bands between the two counts beyond which one says little about the other
WORST = 4  # bands that either count may be off: 1 of their mean and half of APART
ROUNDS = 20  # sharpenings at most; each makes the gates 1.2 times as sharp


class Gate(Protocol):
    """What is asked of a kind of gate (gates.py)."""

    bound: float

    def keep(self, logits: Tensor) -> Tensor:
        """Differentiable count of kept units, [U]; a unit counts as kept in the hard count from 0.5."""

    def shift(self, logits: Tensor, delta: float) -> Tensor:
        """Logits that keep more (delta > 0) or fewer units, in the same order."""

    def sharpen(self, logits: Tensor) -> Tensor:
        """Logits whose soft count is nearer to the hard one, which stays."""


@torch.no_grad()
def shift_to_target(
    gate: Gate, logits: Tensor, target: float, band: float, counts: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> None:
    """Shift all `logits` [U], in place, until the mean of both counts lies in target +- band.

    Of all shifts the one with the mean on target has the worse of the two counts nearest to it. Where that is not near
    enough, because the counts lie apart or one large unit is a jump of the hard one, the gates are sharpened. Counts
    far apart are brought together first, at the shift that has the hard one on target: the order of the units decides
    it, however sharp the gates.

    Args:
        gate: Kind of gate.
        logits: Logits of the gates, [U].
        target: Sparsity to be at.
        band: Distance of the mean from it that is left alone.
        counts: (soft, hard) sparsity for keep probabilities [U], as `Budget.counts`.
    """

    def at(shift: float) -> Gaps:
        keep = gate.keep(gate.shift(logits, shift) if shift else logits)
        soft, hard = torch.stack(counts(keep)).tolist()  # the only wait for the device
        return soft - target, hard - target

    def move(count: Callable[[Gaps], float], now: Gaps) -> Gaps:
        shift, then = _find(at, count, now, band, gate.bound / 64)
        if shift:
            logits.copy_(gate.shift(logits, shift))
        return then

    best, least = (logits, getattr(gate, "width", None)), math.inf  # one gate sharpens by a width of its own
    for _ in range(ROUNDS):
        now = at(0.0)
        shift, there = _find(at, _hard, now, band, gate.bound / 64) if _apart(now, band) else (0.0, now)
        if not _apart(there, band):
            if shift:
                logits.copy_(gate.shift(logits, shift))
            now = move(_mean, there)
            if max(map(abs, now)) <= WORST * band:
                return
        if max(map(abs, now)) < least:
            best, least = (logits.clone(), getattr(gate, "width", None)), max(map(abs, now))
        logits.copy_(gate.sharpen(logits))
    # A unit is larger than the bounds: sharpening has not helped, and too sharp a gate learns nothing.
    logits.copy_(best[0])
    if best[1] is not None:
        gate.width = best[1]
    move(_mean, at(0.0))


def _mean(gaps: Gaps) -> float:
    return sum(gaps) / 2


def _hard(gaps: Gaps) -> float:
    return gaps[1]


def _apart(gaps: Gaps, band: float) -> bool:
    return abs(gaps[0] - gaps[1]) > APART * band


def _find(
    at: Callable[[float], Gaps], count: Callable[[Gaps], float], now: Gaps, band: float, step: float
) -> tuple[float, Gaps]:
    """The least shift that brings a count into the band, and both counts there; the count falls as the shift grows.

    Where it jumps across the band the side nearer to the target is taken.

    Args:
        at: Both counts less the target after a shift.
        count: Picks one of the two counts, or their mean.
        now: `at(0)`.
        band: Half-width of the band around 0.
        step: First shift to try, doubled until the goal lies between.
    """
    goal = min(max(count(now), -band), band)
    if goal == count(now):
        return 0.0, now
    sign = 1.0 if count(now) > goal else -1.0
    near, far = (0.0, now), (sign * step, at(sign * step))
    while (count(far[1]) - goal) * sign > 0 and abs(far[0]) < 1e5 * step:
        near, far = far, (2 * far[0], at(2 * far[0]))
    for _ in range(30):
        middle = (near[0] + far[0]) / 2
        trial = middle, at(middle)
        beyond = (goal - count(trial[1])) * sign  # how far past the goal
        if 0 <= beyond < 1e-5:
            return trial
        near, far = (near, trial) if beyond > 0 else (trial, far)
    return min(near, far, key=lambda place: abs(count(place[1])))
