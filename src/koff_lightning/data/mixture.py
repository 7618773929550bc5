"""Which rows of which domains make up batch number n: a pure function of (seed, n), so that a run can resume anywhere.

Shares. Batches come in windows: a window is as many batches as it takes for every domain to have a row by its share,
at best one batch and at most `MOST`. In a window, domain d has q_d = max(1, c w_d) rows on average, where w_d is its
weight and c is such that the q_d fill the window; so every window holds every domain. Numbers of rows are made whole by
systematic sampling: lay the q_d end to end on a line, shift them by some u in [0, 1), and count the integers that fall
on each. Whatever u is, each domain gets floor(q_d) or ceil(q_d) rows, and the window is full. The shifts of successive
windows are multiples of the golden ratio, the most even sequence there is, so that no domain is ever more than a few
rows off its share.

Batches of one domain each, as in the paper, are the same with whole batches in place of rows: a window is one batch, of
which domain d has w_d on average, so the domains take turns by their shares.

Rows. Each pass over a domain follows a new seeded permutation of its rows. All ranks draw the same number of rows of
each domain in each batch, and different rows.
"""

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

UNIT = 2**32  # shares and shifts are integers in units of 1/UNIT: no rounding error however long the run
GOLDEN = 2654435769  # UNIT / golden ratio, made odd (Knuth, TAOCP vol. 3, section 6.4)
MOST = 100  # batches of a window at most: a domain with a smaller share gets more than its share
RowRef = tuple[str, int]  # domain, row


class DomainBatches:
    """An endless, indexable sequence of batches of (domain, row) references.

    Args:
        num_rows: Rows of each domain, in the order in which domains appear in a batch.
        weights: Share of each domain, any scale.
        batch_size: Rows per batch on each rank.
        seed: Seed of the row order.
        window: Batches that must together hold every domain; by default as few as give each a row by its share.
        one_domain: All rows of a batch are of one domain; there is no window then.
        rank: This process among `world_size`.
        world_size: Number of processes that draw disjoint rows.
    """

    def __init__(
        self,
        num_rows: Mapping[str, int],
        weights: Mapping[str, float],
        batch_size: int,
        seed: int = 0,
        window: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        one_domain: bool = False,
    ) -> None:
        self.domains = list(num_rows)
        self.num_rows = dict(num_rows)
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.window = 1 if one_domain else window or least_window(weights.values(), batch_size)
        self._unit = batch_size if one_domain else 1  # rows that go to one domain together
        size = self.window * batch_size // self._unit
        quotas = _quotas([weights[domain] for domain in self.domains], size, least=0 if one_domain else 1)
        self._edges = np.concatenate([[0], np.cumsum(quotas)])  # [D + 1] ends of the q_d on the line
        self._orders: dict[str, tuple[int, NDArray[np.int64]]] = {}  # the pass each domain is in, and its order

    def start_at(self, first: int) -> Iterator[list[RowRef]]:
        """Yield batches number `first`, `first` + 1, ... without end."""
        window, skip = divmod(first, self.window)
        taken = self.counts(np.arange(window)).sum(axis=0)  # [D] rows dealt to each rank before this window
        while True:
            counts = self.counts(np.array([window]))[0]
            refs = list(chain.from_iterable(map(self._draw, self.domains, taken, counts)))  # sorted by domain, so that
            yield from (refs[batch :: self.window] for batch in range(skip, self.window))  # each batch gets some of all
            taken, window, skip = taken + counts, window + 1, 0

    def identity(self) -> dict[str, Any]:
        """All that the sequence depends on, in plain values: a resumed run compares it with its checkpoint's."""
        return {
            "seed": self.seed,
            "world_size": self.world_size,
            "batch_size": self.batch_size,
            "window": self.window,
            "rows": self.num_rows,
            "shares": [int(edge) for edge in self._edges],
        }

    def counts(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of each domain in each of these windows on each rank, [W, D]."""
        shifts = windows.astype(np.uint64) * np.uint64(GOLDEN) % np.uint64(UNIT)  # overflow is harmless: UNIT | 2^64
        return np.diff((self._edges + shifts.astype(np.int64)[:, None]) // UNIT, axis=1) * self._unit

    def _draw(self, domain: str, taken: int, count: int) -> Iterator[RowRef]:
        size = self.num_rows[domain]
        for draw in range(int(taken), int(taken + count)):
            passes, place = divmod(draw * self.world_size + self.rank, size)
            yield domain, int(self._order(domain, passes)[place])

    def _order(self, domain: str, passes: int) -> NDArray[np.int64]:
        """Order of a domain's rows in one pass; it depends on the domain's name, not on which others are there."""
        if domain not in self._orders or self._orders[domain][0] != passes:
            rng = np.random.default_rng([self.seed, zlib.crc32(domain.encode()), passes])
            self._orders[domain] = passes, rng.permutation(self.num_rows[domain])
        return self._orders[domain][1]


def least_window(weights: Iterable[float], batch_size: int) -> int:
    """Fewest batches in which each domain has a row or more by its share; at most `MOST`, if these hold all domains."""
    shares = list(weights)
    rows = min(math.fsum(shares) / min(shares), float(MOST * batch_size))
    return math.ceil(max(rows, len(shares)) / batch_size - 1e-9)


def _quotas(weights: list[float], size: int, least: int) -> NDArray[np.int64]:
    """Average rows per window of each domain in units of 1/UNIT: proportional to weight, at least `least` (0 or 1)."""
    weight = np.array(weights, dtype=np.float64)
    raised = np.zeros(len(weight), dtype=bool)  # domains with a share of less than one row, which get one
    share = weight * size / weight.sum()
    while (below := ~raised & (share < least - 1e-9)).any():
        raised |= below
        share = np.where(raised, 1.0, weight * (size - raised.sum()) / weight[~raised].sum())
    quotas = np.rint(np.maximum(share, least) * UNIT).astype(np.int64)
    quotas[np.argmax(quotas)] += size * UNIT - quotas.sum()
    return quotas
