"""How many marked neurons would be removed if, within each cell, it were chance who is? Asked by drawing."""

import math
from dataclasses import dataclass

import numpy as np

from koff_lightning.studies.analysis.tables import Floats, informative

AT_ONCE = 4_000_000  # draws held in memory at one time


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
