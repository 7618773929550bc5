"""How far two masks remove the same neurons, against two that remove as many of each layer at random."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from koff_lightning.support.errors import KoffError

if TYPE_CHECKING:
    import pandas as pd

Bools, Ints = NDArray[np.bool_], NDArray[np.integer]


@dataclass(frozen=True)
class Overlap:
    """Two masks compared.

    Attributes:
        both: Neurons that both remove.
        expected: The same for random masks with as many removed in each layer.
        sd: Standard deviation of that.
        z: (both - expected) / sd; nan where chance leaves no room.
        jaccard: Removed by both over removed by either; nan where neither removes any.
        chance: expected / (removed by either, were the overlap the expected one).
    """

    both: int
    expected: float
    sd: float
    z: float
    jaccard: float
    chance: float


def overlap(first: Bools, second: Bools, layer: Ints) -> Overlap:
    """Compare two masks.

    The overlap of random masks is hypergeometric in each layer: of N neurons, a and b removed, mean a b / N and
    variance a b (N - a) (N - b) / (N^2 (N - 1)).

    Args:
        first: Removed neurons, bool [N].
        second: The same of the other mask.
        layer: Layer of each neuron, [N].

    Raises:
        KoffError: The masks are of different models.
    """
    if not len(first) == len(second) == len(layer):
        raise KoffError(
            f"masks of {len(first)} and {len(second)} neurons, layers of {len(layer)}: give those of one model"
        )
    size = np.bincount(layer).astype(float)  # [L]
    a, b = (np.bincount(layer, weights=mask) for mask in (first, second))
    used = size > 0
    size, a, b = size[used], a[used], b[used]
    expected = float((a * b / size).sum())
    variance = a * b * (size - a) * (size - b) / (size**2 * np.maximum(size - 1, 1))
    sd, both = math.sqrt(variance.sum()), int((first & second).sum())
    either, union = int((first | second).sum()), float(a.sum() + b.sum() - expected)
    z = (both - expected) / sd if sd else math.nan
    shares = (part / whole if whole else math.nan for part, whole in ((both, either), (expected, union)))
    return Overlap(both, expected, sd, z, *shares)


def overlap_table(masks: Mapping[str, Bools], layer: Ints) -> "pd.DataFrame":
    """Every two of several masks compared: one line per pair, `a`, `b` and the figures of `Overlap`."""
    import pandas as pd

    pairs = combinations(masks, 2)
    return pd.DataFrame([{"a": a, "b": b} | asdict(overlap(masks[a], masks[b], layer)) for a, b in pairs])
