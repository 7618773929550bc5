"""One odds ratio over all strata (Mantel and Haenszel 1959) with its interval (Robins, Breslow and Greenland 1986)."""

import math
from dataclasses import dataclass

import numpy as np

from koff_lightning.studies.analysis.tables import Floats, informative


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
    ratio = mantel_haenszel(tables)
    if not 0 < ratio < math.inf:
        return CommonOdds(ratio, math.nan, math.nan, p, len(tables))
    low, high = pooled.oddsratio_pooled_confint()
    return CommonOdds(ratio, float(low), float(high), p, len(tables))


def mantel_haenszel(tables: Floats) -> float:
    """The pooled odds ratio of tables [K, 2, 2]; infinite without a denominator, nan without either."""
    size = tables.sum((1, 2))
    size = np.where(size > 0, size, 1.0)
    above = float((tables[:, 0, 0] * tables[:, 1, 1] / size).sum())
    below = float((tables[:, 0, 1] * tables[:, 1, 0] / size).sum())
    if below:
        return above / below
    return math.inf if above else math.nan
