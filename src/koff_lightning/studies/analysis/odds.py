"""Are marked neurons removed more often than others of their stratum? By an odds ratio over all strata, and by drawing.

The ratio is that of Mantel and Haenszel (1959), its interval that of Robins, Breslow and Greenland (1986).
"""

import math
from dataclasses import dataclass

import numpy as np

from koff_lightning.studies.analysis.tables import Floats, informative
from koff_lightning.studies.bootstrap import AT_ONCE


@dataclass(frozen=True)
class CommonOdds:
    """Odds of being removed, marked against other neurons, at equal stratum.

    Attributes:
        ratio: 1 when being marked makes no difference; nan where no stratum can tell.
        low: Lower end of the 95 % interval; nan where the ratio is 0, infinite or nan.
        high: Its upper end.
        p: p-value of the Cochran-Mantel-Haenszel test that the ratio is 1, without continuity correction.
        used: Strata that can tell: with marked and other, with removed and kept neurons.
    """

    ratio: float
    low: float
    high: float
    p: float
    used: int


def common_odds(tables: Floats) -> CommonOdds:
    """Pool tables [K, 2, 2] as `tables.count` gives them."""
    from scipy.stats import chi2
    from statsmodels.stats.contingency_tables import StratifiedTable

    tables = tables[informative(tables)]
    if not len(tables):
        return CommonOdds(math.nan, math.nan, math.nan, math.nan, 0)
    pooled = StratifiedTable(tables.transpose(1, 2, 0))
    p = float(chi2.sf(pooled.test_null_odds().statistic, 1))  # its own p ends at 1e-16
    with np.errstate(divide="ignore"):  # infinite where no table has a marked neuron that stayed and another that went
        ratio = float(pooled.oddsratio_pooled)
    if not 0 < ratio < math.inf:
        return CommonOdds(ratio, math.nan, math.nan, p, len(tables))
    low, high = pooled.oddsratio_pooled_confint()
    return CommonOdds(ratio, float(low), float(high), p, len(tables))


@dataclass(frozen=True)
class Permutation:
    """Marked neurons removed, against chance within cells.

    Attributes:
        both: How many are.
        expected: How many would be on average.
        p_more: (1 + draws with as many or more) / (1 + draws).
        p_less: (1 + draws with as many or fewer) / (1 + draws).
        used: Cells in which chance has a choice.
    """

    both: int
    expected: float
    p_more: float
    p_less: float
    used: int


def permutation(tables: Floats, draws: int = 10_000, seed: int = 0) -> Permutation:
    """Permute who is removed within each cell.

    Of a cell's n neurons with m marked and r removed, the marked and removed ones are then hypergeometric: drawn as
    such, which is the same and fast.

    Args:
        tables: [K, 2, 2] as `tables.count` gives them.
        draws: Permutations.
        seed: Seed of the draws.
    """
    both = int(tables[:, 0, 0].sum())
    marked, removed, size = tables[:, 0].sum(1), tables[:, :, 0].sum(1), tables.sum((1, 2))  # [K] each
    expected = float((marked * removed / size).sum())
    open_ = informative(tables)
    if not open_.any():
        return Permutation(both, expected, math.nan, math.nan, 0)
    good, drawn = marked[open_].astype(np.int64), removed[open_].astype(np.int64)
    bad = size[open_].astype(np.int64) - good
    sure = both - int(tables[open_, 0, 0].sum())  # in cells without a choice
    random = np.random.default_rng(seed)
    step = max(AT_ONCE // len(good), 1)
    rounds = [min(step, draws - start) for start in range(0, draws, step)]
    sums = np.concatenate([random.hypergeometric(good, bad, drawn, (n, len(good))).sum(1) for n in rounds]) + sure
    more, less = ((1 + int(hits.sum())) / (1 + draws) for hits in (sums >= both, sums <= both))
    return Permutation(both, expected, more, less, int(open_.sum()))
