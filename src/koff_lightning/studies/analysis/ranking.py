"""The paper's own test of which neurons leave (Table 3): shares removed of the two ends of the LAPE ranking.

Of all FFN neurons the 15 % of lowest entropy are called specific, the 15 % of highest entropy general, and the share of
each that is removed is set against the share of all. No layers are told apart and no interval is given: enrichment.py
is the stricter test. Where gate and up channels are gated each by itself, each has a line, and what loses either.
"""

from typing import TYPE_CHECKING

import numpy as np

from koff_lightning.studies.analysis.lape import entropy
from koff_lightning.studies.analysis.tables import Bools, Floats

if TYPE_CHECKING:
    import pandas as pd

END = 0.15  # share of the ranking at either end


def ends(rates: Floats, share: float = END) -> tuple[Bools, Bools]:
    """The specific and the general end of the ranking, bool [N] each, disjoint.

    Args:
        rates: Rates of activity by domain, [N, D]. A neuron that is never active is at neither end.
        share: Share of all neurons, at each end; of the neurons that are ever active at most half.
    """
    score, active = entropy(rates), rates.sum(1) > 0
    order = np.argsort(np.where(active, score, np.inf), kind="stable")[: int(active.sum())]
    count = min(int(share * len(rates)), len(order) // 2)
    found = [np.zeros(len(rates), dtype=bool) for _ in range(2)]
    found[0][order[:count]] = True
    found[1][order[len(order) - count :]] = True
    return found[0], found[1]


def ranking(rates: Floats, removed: dict[str, Bools], share: float = END) -> "pd.DataFrame":
    """Shares removed of all neurons and of either end, and the ends' ratios to all.

    Args:
        rates: [N, D].
        removed: What is removed by name, bool [N] each: `gate`, `up`, `either`; or `neuron` where they leave together.
        share: Share of all neurons, at each end.
    """
    import pandas as pd

    specific, general = ends(rates, share)
    lines = []
    for name, gone in removed.items():
        part = {"all": gone.mean(), "specific": gone[specific].mean(), "general": gone[general].mean()}
        ratio = {f"{end}_ratio": part[end] / part["all"] if part["all"] else np.nan for end in ("specific", "general")}
        lines.append({"what": name, "ranked": int(specific.sum())} | part | ratio)
    return pd.DataFrame(lines)
