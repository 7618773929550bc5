"""Does one way of pruning prefer a class of neurons more than another does? The ratio of their odds ratios.

Each way is given by its masks from several seeds. The interval is a bootstrap over both sources of chance: which seeds
were drawn, and which neurons a model happens to have. The neurons of a layer are drawn once for all masks, since all
masks are of the same neurons. Three seeds drawn with replacement give an interval that is much too short, so the pooled
log odds are moved by the spread of the seeds as in `bootstrap.over_seeds`, with Student's correction.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from koff_lightning.studies.analysis.odds import common_odds
from koff_lightning.studies.analysis.tables import Bools, Floats, Ints, count
from koff_lightning.studies.bootstrap import AT_ONCE, over_seeds


@dataclass(frozen=True)
class RatioOfOdds:
    """Two odds ratios compared.

    Attributes:
        first: Mantel-Haenszel odds ratio of the first way, over all its seeds and layers.
        second: That of the second.
        ratio: first / second.
        low: Lower end of the 95 % interval (percentiles).
        high: Upper end.
        seeds: How many masks either has.
        undefined: Share of draws without a ratio; the interval allows for any value of theirs.
        note: What a reader must know, or "".
    """

    first: float
    second: float
    ratio: float
    low: float
    high: float
    seeds: tuple[int, int]
    undefined: float
    note: str


def odds_ratio_ratio(
    first: Sequence[Bools],
    second: Sequence[Bools],
    marked: Bools,
    layer: Ints,
    draws: int = 2000,
    seed: int = 0,
) -> RatioOfOdds:
    """Compare the masks of one way of pruning with those of another.

    Args:
        first: Removed neurons by seed, bool [N] each.
        second: The same of the other way.
        marked: Members of the class, bool [N].
        layer: Layer of each neuron, or its cell, [N].
        draws: Draws of the bootstrap.
        seed: Seed of the bootstrap.

    Raises:
        KoffError: Masks of another length, or one that removes nothing, or everything.
    """
    ways = (np.arange(len(first)), len(first) + np.arange(len(second)))
    found, drawn = _resampled([*first, *second], ways, marked, layer, draws, seed)
    with np.errstate(invalid="ignore"):
        low, high, undefined = _interval(drawn[0] - drawn[1], found)
    note = _few(min(len(first), len(second)))
    if not _finite(found):
        note = f"an odds ratio is {' and the other '.join(f'{value:.2g}' for value in found)}: too few members"
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = float(np.divide(*found))
    return RatioOfOdds(*found, ratio, low, high, (len(first), len(second)), undefined, note)


@dataclass(frozen=True)
class OddsOfRuns:
    """One way of pruning over all its runs.

    Attributes:
        odds_ratio: Mantel-Haenszel over runs and strata.
        low: Lower end of the 95 % interval: of one run by Robins, Breslow and Greenland, else by resampling.
        high: Upper end.
        runs: How many.
        note: What a reader must know, or "".
    """

    odds_ratio: float
    low: float
    high: float
    runs: int
    note: str


def odds_of_runs(masks: Sequence[Bools], marked: Bools, layer: Ints, draws: int = 1000, seed: int = 0) -> OddsOfRuns:
    """Pool the runs of one way of pruning; the interval resamples runs and neurons. Arguments as `odds_ratio_ratio`."""
    if len(masks) == 1:
        one = common_odds(count(masks[0], marked, layer))
        return OddsOfRuns(one.ratio, one.low, one.high, 1, _few(1))
    found, drawn = _resampled(masks, [np.arange(len(masks))], marked, layer, draws, seed)
    low, high, _ = _interval(drawn[0], found)
    return OddsOfRuns(*found, low, high, len(masks), _few(len(masks)))


def _resampled(
    masks: Sequence[Bools], ways: Sequence[Ints], marked: Bools, layer: Ints, draws: int, seed: int
) -> tuple[list[float], list[Floats]]:
    """Odds ratios of several ways, each the numbers of its masks: as measured, and their logs over draws [R].

    Neurons of a layer that are alike in all masks are one pattern: how often it is drawn is all that matters.
    """
    for removed in masks:
        count(removed, marked, layer)  # refuses what cannot be compared
    rows = np.vstack([layer, marked, *masks]).astype(np.int64)  # [2 + S, N]
    patterns, sizes = np.unique(rows.T, axis=0, return_counts=True)  # [patterns, 2 + S]
    starts = np.flatnonzero(np.diff(patterns[:, 0], prepend=-1))  # of each layer
    whole = _parts(patterns, sizes[None].astype(float), starts)  # [2, 1, S]
    random = np.random.default_rng(seed)
    step = max(AT_ONCE // len(patterns), 1)
    drawn: list[list[Floats]] = [[] for _ in ways]
    for rounds in [min(step, draws - first) for first in range(0, draws, step)]:
        parts = _parts(patterns, _redrawn(sizes, starts, rounds, random), starts)
        for values, way in zip(drawn, ways, strict=True):
            values.append(_log_odds(parts[:, :, way]))
    moved = [
        _moved(np.concatenate(values), whole[:, 0, way], seed + place)
        for place, (values, way) in enumerate(zip(drawn, ways, strict=True))
    ]
    return [float(np.exp(_log_odds(whole[:, :, way])[0])) for way in ways], moved


def _moved(logs: Floats, parts: Floats, seed: int) -> Floats:
    """Drawn log odds [R], moved by what the spread of the seeds leaves open.

    What one of S seeds does to the pooled log odds is, to first order, its numerator over their mean less its
    denominator over theirs: finite also where the odds of that seed alone are not. `parts` is [2, S].
    """
    if not parts.any(1).all():
        return logs
    above, below = parts / parts.mean(1, keepdims=True)  # [S] each
    alike = np.repeat(logs[:, None, None], len(above), axis=2)  # [R, 1, S]
    return over_seeds(alike, (above - below)[None], seed)[:, 0]


def _redrawn(sizes: Ints, starts: Ints, draws: int, random: np.random.Generator) -> Floats:
    """Counts of the patterns when each layer's neurons are drawn anew with replacement, [draws, patterns]."""
    parts = np.split(sizes, starts[1:])
    return np.hstack([random.multinomial(part.sum(), part / part.sum(), draws) for part in parts]).astype(float)


def _parts(patterns: Ints, weights: Floats, starts: Ints) -> Floats:
    """What the Mantel-Haenszel odds ratio divides, summed over layers, of every draw and mask: [2, draws, S]."""
    size = np.add.reduceat(weights, starts, axis=1)  # [draws, layers]
    marked = patterns[:, 1] == 1
    parts = []
    for removed in (patterns[:, 2:] == 1).T:  # [patterns], of one mask
        cells = [marked & removed, ~marked & ~removed, marked & ~removed, ~marked & removed]
        both, neither, only, other = (np.add.reduceat(weights * cell, starts, axis=1) for cell in cells)
        parts.append([(both * neither / size).sum(1), (only * other / size).sum(1)])
    return np.array(parts).transpose(1, 2, 0)


def _log_odds(parts: Floats) -> Floats:
    """Log of the odds ratio over all masks of parts [2, draws, masks], [draws]; infinite or nan as it comes."""
    above, below = parts.sum(2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(above / below)


def _interval(logs: Floats, found: Sequence[float]) -> tuple[float, float, float]:
    """Ends of the 95 % interval of drawn log ratios, and the share of draws that have none.

    Such a draw, without a removed member in either way, could lie anywhere, so it counts below and above: leaving it
    out would keep the draws in which the ways differ. Where a measured odds ratio is 0 or infinite there is no
    interval: draws of the same neurons would all agree, and prove nothing.
    """
    undefined = np.isnan(logs)
    if not _finite(found):
        return math.nan, math.nan, float(undefined.mean())
    low = np.quantile(np.where(undefined, -np.inf, logs), 0.025, method="nearest")
    high = np.quantile(np.where(undefined, np.inf, logs), 0.975, method="nearest")
    return float(np.exp(low)), float(np.exp(high)), float(undefined.mean())


def _finite(odds: Sequence[float]) -> bool:
    return all(0 < value < math.inf for value in odds)


def _few(seeds: int) -> str:
    return "" if seeds > 1 else "1 seed of one way: what another would give is not in the interval"
