"""Intervals for paired figures of several runs: documents are drawn with replacement, seeds by their spread.

Letters: A arms, S seeds, D documents, M domains, R resamples.

All arms are scored on the same documents, so a resample draws the documents of each domain once for all of them, and
the difference of two arms is a paired one. Seeds are a second level, crossed with the first: every seed is scored on
the same documents. Three seeds drawn with replacement give no interval of 95 % (one draw in nine repeats one seed three
times over), so their mean is moved by a multiplier bootstrap instead,

    mean + t * sum_s (g_s - mean g) (x_s - mean x) / sqrt(S (S - 1)),   g_s ~ N(0, 1),   t = sqrt((S - 1) / chi2_(S-1)),

which for one figure is Student's t interval of the seeds exactly, and keeps together what one seed does to all arms.
The seeds' own x_s are those of all documents. Over the drawn ones, the noise of a document in a single run would count
three times: in the mean's draw, in the seeds, and in the seeds' draw (docs/log.md).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 10_000
AT_ONCE = 4_000_000  # drawn document counts that exist at one time: 32 MB


@dataclass(frozen=True)
class Interval:
    """A figure and the interval around it."""

    value: float
    low: float
    high: float


def bits_per_byte(
    nats: Sequence[Array], num_bytes: Sequence[Array], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Array, Array]:
    """Bits per byte, mean over domains, of several runs: as measured, and over resampled documents.

    Args:
        nats: For each of M domains, nats by run and document, [N, D_m]; N runs in all.
        num_bytes: For each domain, UTF-8 bytes by document, [D_m].
        resamples: R.
        seed: Seed of the draws; the same one gives the same documents.

    Returns:
        [N] as measured and [R, N] resampled.
    """
    rng = np.random.default_rng(seed)
    measured, drawn = 0.0, 0.0
    for scores, size in zip(nats, num_bytes, strict=True):
        measured = measured + scores.sum(1) / size.sum()
        drawn = drawn + _over_drawn(scores, size, resamples, rng)
    scale = math.log(2) * len(nats)
    return measured / scale, drawn / scale


def _over_drawn(nats: Array, num_bytes: Array, resamples: int, rng: np.random.Generator) -> Array:
    """Nats per byte of R draws of as many documents, [R, N]."""
    count = len(num_bytes)
    parts = []
    for first in range(0, resamples, chunk := max(1, AT_ONCE // count)):
        times = rng.multinomial(count, np.full(count, 1 / count), size=min(chunk, resamples - first))  # [r, D]
        parts.append((times @ nats.T) / (times @ num_bytes)[:, None])
    return np.concatenate(parts)


def over_seeds(drawn: Array, measured: Array, seed: int = 0) -> Array:
    """Means over seeds and drawn documents, moved by what the spread of the seeds leaves open.

    Args:
        drawn: Resampled figures of the same seeds for each arm, [R, A, S]; with one seed nothing is moved.
        measured: Those on all documents, [A, S].
        seed: Seed of the draws.

    Returns:
        [R, A].
    """
    resamples, _, count = drawn.shape
    mean = drawn.mean(2)
    if count == 1:
        return mean
    rng = np.random.default_rng([seed, 1])
    noise = rng.standard_normal((resamples, count))
    wide = np.sqrt((count - 1) / rng.chisquare(count - 1, resamples) / (count * (count - 1)))
    weights = (noise - noise.mean(1, keepdims=True)) * wide[:, None]  # [R, S]; they add up to zero
    return mean + weights @ measured.T


def interval(value: float, draws: Array, level: float = 0.95) -> Interval:
    """The percentile interval of resampled figures [R] around the measured one."""
    # Draws themselves, not means of two: some may be infinite.
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return Interval(float(value), float(low), float(high))


def quotient(above: Array, below: Array) -> Array:
    """Draws of a quotient; one whose denominator is not positive says nothing and lies beyond any bound."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below > 0, above / below, np.copysign(np.inf, above))


def student(values: Array, level: float = 0.95) -> Interval:
    """Student's interval of the mean of [S] values; without bounds for a single one, and where all are the same.

    Figures that go in steps, as shares of four kv groups, often agree in two or three runs: that is a spread which they
    are too coarse to show, not none.
    """
    from scipy import stats

    mean, count = float(values.mean()), len(values)
    if np.ptp(values) < 1e-12:
        return Interval(mean, -np.inf, np.inf)
    half = float(stats.t.ppf((1 + level) / 2, count - 1) * values.std(ddof=1) / np.sqrt(count))
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Sample:
    """Arms with the same seeds, resampled together: arm -> figure, and arm -> its draws [R]."""

    measured: Mapping[str, float]
    draws: Mapping[str, Array]
    seeds: Sequence[int]
