"""Are the neurons of a class removed more often than others? By layer, and against equally active and important ones.

Specific neurons sit in certain layers and are silent on most text, and any pruner removes what is silent. So the crude
figures are given beside those within layers, and those within cells of layer, rate of activity and importance.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from koff_lightning.studies.analysis.odds import common_odds, permutation
from koff_lightning.studies.analysis.tables import Bools, Ints, count, haldane, informative

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Enrichment:
    """How often marked neurons are removed. What cannot be said is nan.

    Attributes:
        neurons: N.
        marked: Members of the class.
        removed: Removed neurons.
        both: Removed members.
        expected: Removed members if chance chose within each cell.
        risk_ratio: Share of members that is removed over the share of all neurons that is.
        odds_ratio: Over all neurons, by Haldane.
        mh_odds_ratio: Mantel-Haenszel over layers.
        mh_low: Lower end of its 95 % interval.
        mh_high: Upper end.
        cmh_p: p-value of the Cochran-Mantel-Haenszel test over layers, two-sided.
        cell_odds_ratio: Mantel-Haenszel over cells.
        cell_low: Lower end of its 95 % interval.
        cell_high: Upper end.
        p_more: That chance within cells removes as many members or more.
        p_less: As many or fewer.
        skipped: Layers that say nothing: without members, or with nothing or all removed.
        note: What a reader must know, or "".
    """

    neurons: int
    marked: int
    removed: int
    both: int
    expected: float
    risk_ratio: float
    odds_ratio: float
    mh_odds_ratio: float
    mh_low: float
    mh_high: float
    cmh_p: float
    cell_odds_ratio: float
    cell_low: float
    cell_high: float
    p_more: float
    p_less: float
    skipped: list[int]
    note: str


def enrichment(
    removed: Bools, marked: Bools, layer: Ints, cells: Ints | None = None, draws: int = 10_000, seed: int = 0
) -> Enrichment:
    """Test one class of neurons.

    Args:
        removed: Removed neurons, bool [N].
        marked: Members of the class, bool [N].
        layer: Layer of each neuron, [N].
        cells: Cell of each neuron (`strata`), [N]; by default the layers.
        draws: Permutations.
        seed: Seed of the permutations.

    Raises:
        KoffError: Arguments of different lengths, or a mask that removes nothing, or everything.
    """
    by_layer = count(removed, marked, layer)
    by_cell = by_layer if cells is None else count(removed, marked, cells)
    whole = by_layer.sum(0)
    members, gone = whole[0].sum(), whole[:, 0].sum()
    layers, within = common_odds(by_layer), common_odds(by_cell)
    chance = permutation(by_cell, draws, seed)
    return Enrichment(
        neurons=len(removed),
        marked=int(members),
        removed=int(gone),
        both=chance.both,
        expected=chance.expected,
        risk_ratio=float(whole[0, 0] / members / (gone / len(removed))) if members else float("nan"),
        odds_ratio=float(haldane(whole)) if members else float("nan"),
        mh_odds_ratio=layers.ratio,
        mh_low=layers.low,
        mh_high=layers.high,
        cmh_p=layers.p,
        cell_odds_ratio=within.ratio,
        cell_low=within.low,
        cell_high=within.high,
        p_more=chance.p_more,
        p_less=chance.p_less,
        skipped=np.unique(layer)[~informative(by_layer)].tolist(),
        note=_note(members, layers.used, within.used, chance.expected),
    )


def _note(members: float, layers: int, cells: int, expected: float) -> str:
    if not members:
        return "no neuron of this class"
    if not layers:
        return "no layer has members and others, removed and kept ones: nothing to compare"
    if not cells:
        return "no cell has members and others, removed and kept ones: take fewer bins"
    return "few members: expect little power" if expected < 5 else ""


def enrichment_table(
    removed: Bools,
    classes: Mapping[str, Bools],
    layer: Ints,
    cells: Ints | None = None,
    draws: int = 10_000,
    seed: int = 0,
) -> "pd.DataFrame":
    """Test several classes: one line each, with the figures of `Enrichment`.

    `q_more` and `q_less` are the permutation p-values corrected for the number of classes (Benjamini and Hochberg
    1995). Arguments and errors as for `enrichment`; `classes` as `Specialists.classes` gives them.
    """
    import pandas as pd

    rows = [
        {"class": name} | asdict(enrichment(removed, marked, layer, cells, draws, seed))
        for name, marked in classes.items()
    ]
    table = pd.DataFrame(rows)
    return table.assign(q_more=corrected(table["p_more"].to_numpy()), q_less=corrected(table["p_less"].to_numpy()))


def corrected(p: np.ndarray) -> np.ndarray:
    """P-values [K] adjusted to control the false discovery rate (Benjamini and Hochberg 1995); nan stays nan."""
    from scipy.stats import false_discovery_control

    known = ~np.isnan(p)
    out = np.full(len(p), np.nan)
    if known.any():
        out[known] = false_discovery_control(p[known])
    return out
