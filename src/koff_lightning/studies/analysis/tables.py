"""Neurons counted in two-by-two tables, marked or not by removed or not, one table per stratum; and what strata are.

A stratum is a layer, or a cell: neurons of one layer that fire about as often and matter about as much.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from koff_lightning.support.errors import KoffError

if TYPE_CHECKING:
    import pandas as pd

Bools, Ints, Floats = NDArray[np.bool_], NDArray[np.integer], NDArray[np.float64]
PER_CELL, MOST_BINS = 20, 10  # our choice: deciles where layers are wide enough to leave about 20 neurons per cell


def strata(layer: Ints, rates: Floats, importance: Floats, bins: int | None = None) -> Ints:
    """The cell of each neuron: layer by quantile of its mean rate by quantile of its importance, int [N].

    Quantiles are taken within the layer, those of importance within the layer and rate, so that cells are about equally
    full; equal values are told apart by their place.

    Args:
        layer: Layer of each neuron, [N].
        rates: Rates of activity, [N, D].
        importance: Importance of each neuron, [N] (`Activations.importance`).
        bins: Quantiles of each of the two; by default at most 10, fewer in narrow layers.
    """
    narrowest = int(np.bincount(layer)[np.unique(layer)].min())
    bins = bins or min(max(math.isqrt(narrowest // PER_CELL), 1), MOST_BINS)
    by_rate = layer * bins + _quantile(rates.mean(1), layer, bins)
    return by_rate * bins + _quantile(importance, by_rate, bins)


def _quantile(values: Floats, within: Ints, bins: int) -> Ints:
    """Of each value the quantile 0..bins-1 among those of its own group, int [N]."""
    order = np.lexsort((np.arange(len(values)), values, within))  # by group, then by value
    starts = np.searchsorted(within[order], within[order])  # where each one's group begins
    sizes = np.bincount(within)[within[order]]
    out = np.empty(len(values), dtype=np.int64)
    out[order] = (np.arange(len(values)) - starts) * bins // sizes
    return out


def count(removed: Bools, marked: Bools, stratum: Ints) -> Floats:
    """Tables [K, 2, 2] of the K strata in the order of their numbers: [[both, marked only], [removed only, neither]].

    Raises:
        KoffError: Arguments of different lengths, or nothing removed, or everything.
    """
    if not len(removed) == len(marked) == len(stratum):
        raise KoffError(
            f"{len(removed)} neurons in the mask, {len(marked)} in the class, {len(stratum)} in the strata: give those "
            "of one model"
        )
    if removed.all() or not removed.any():
        raise KoffError(
            f"the mask removes {'all' if removed.any() else 'none'} of the {len(removed)} FFN neurons: there is "
            "nothing to compare"
        )
    _, index = np.unique(stratum, return_inverse=True)
    cell = index * 4 + 2 * ~marked + ~removed
    return np.bincount(cell, minlength=4 * (index.max() + 1)).reshape(-1, 2, 2).astype(np.float64)


def informative(tables: Floats) -> Bools:
    """Which strata have both marked and other neurons, and both removed and kept ones, bool [K]."""
    return (tables.sum(1) > 0).all(1) & (tables.sum(2) > 0).all(1)


def haldane(tables: Floats) -> Floats:
    """Odds ratios [...] of tables [..., 2, 2] with 0.5 added to every count (Haldane), so that none is undefined."""
    shifted = tables + 0.5
    return shifted[..., 0, 0] * shifted[..., 1, 1] / (shifted[..., 0, 1] * shifted[..., 1, 0])


def layer_table(removed: Bools, marked: Bools, layer: Ints) -> "pd.DataFrame":
    """One line per layer: layer, neurons, marked, removed, both, and the odds ratio by Haldane.

    Args:
        removed: bool [N].
        marked: Members of a class, bool [N].
        layer: Layer of each neuron, [N].

    Raises:
        KoffError: As `count`.
    """
    import pandas as pd

    tables = count(removed, marked, layer)
    columns = {"layer": np.unique(layer), "neurons": tables.sum((1, 2)), "marked": tables[:, 0].sum(1)}
    columns |= {"removed": tables[:, :, 0].sum(1), "both": tables[:, 0, 0]}
    whole = {name: values.astype(np.int64) for name, values in columns.items()}
    return pd.DataFrame(whole | {"odds_ratio": haldane(tables)})
