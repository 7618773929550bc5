"""Does one way of pruning prefer a class of neurons more than another does? The ratio of their odds ratios.

Each way is given by its masks from several seeds. The interval is a bootstrap over both sources of chance: which seeds
were drawn, and which neurons a model happens to have. The neurons of a layer are drawn once for all masks, since all
masks are of the same neurons.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from koff_lightning.analysis.odds import mantel_haenszel
from koff_lightning.analysis.tables import Bools, Floats, Ints, count

FEW_SEEDS = 5


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
        undefined: Share of draws without a ratio, which the interval leaves out.
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
        layer: Of each neuron, or its cell, [N].
        draws: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        KoffError: Masks of another length, or one that removes nothing, or everything.
    """
    for removed in (*first, *second):
        count(removed, marked, layer)  # refuses what cannot be compared
    rows = np.stack([marked, *first, *second])  # [1 + S, N]
    # Neurons of a layer that are alike in all masks are one pattern.
    patterns, sizes = np.unique(np.vstack([layer, rows]).T, axis=0, return_counts=True)  # [patterns, 2 + S]
    starts = np.flatnonzero(np.diff(patterns[:, 0], prepend=-1))  # of each layer
    ways = (np.arange(len(first)), len(first) + np.arange(len(second)))

    def odds(weights: Floats, way: Ints) -> float:
        return mantel_haenszel(_tables(patterns, weights, starts, way))

    random = np.random.default_rng(seed)
    whole = sizes.astype(float)
    found = [odds(whole, way) for way in ways]
    logs = []
    for _ in range(draws):
        weights = _redrawn(sizes, starts, random)
        pair = [odds(weights, random.choice(way, len(way))) for way in ways]
        logs.append(_log_ratio(*pair))
    usable = np.array([value for value in logs if not math.isnan(value)])
    ends = np.quantile(usable, [0.025, 0.975], method="nearest") if len(usable) else [math.nan] * 2
    low, high = (float(np.exp(end)) for end in ends)
    few = min(len(first), len(second))
    note = "" if few >= FEW_SEEDS else f"{few} seed{'s' * (few > 1)} of one way: the interval understates that chance"
    if not all(0 < value < math.inf for value in found):  # resampled neurons would all agree, and prove nothing
        low = high = math.nan
        note = f"an odds ratio is {' and the other '.join(f'{value:.2g}' for value in found)}: too few members"
    seeds, undefined = (len(first), len(second)), 1 - len(usable) / draws
    return RatioOfOdds(*found, math.exp(_log_ratio(*found)), low, high, seeds, undefined, note)


def _redrawn(sizes: Ints, starts: Ints, random: np.random.Generator) -> Floats:
    """Counts of the patterns when each layer's neurons are drawn anew with replacement, [patterns]."""
    parts = np.split(sizes, starts[1:])
    return np.concatenate([random.multinomial(part.sum(), part / part.sum()) for part in parts]).astype(float)


def _tables(patterns: Ints, weights: Floats, starts: Ints, way: Ints) -> Floats:
    """One table per layer and mask, [layers * masks, 2, 2]."""
    marked, removed = patterns[:, 1:2] == 1, patterns[:, 2 + way] == 1  # [patterns, 1], [patterns, masks]
    cells = [marked & removed, marked & ~removed, ~marked & removed, ~marked & ~removed]
    sums = [np.add.reduceat(weights[:, None] * cell, starts, axis=0) for cell in cells]  # [layers, masks] each
    return np.stack(sums, axis=-1).reshape(-1, 2, 2)


def _log_ratio(first: float, second: float) -> float:
    logs = [math.log(value) if value > 0 else -math.inf if value == 0 else math.nan for value in (first, second)]
    return logs[0] - logs[1]
