"""Which FFN neurons serve one domain and which serve all: LAPE, a weighted variant, and three ideas of "general".

LAPE (language activation probability entropy; Tang et al., ACL 2024) as in the authors' released code: the entropy of a
neuron's rates of activity over domains. Low entropy is specific. "Domain" stands for their "language" throughout.

Letters: N neurons, D domains.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from koff_lightning.support.errors import KoffError

Floats, Bools = NDArray[np.float64], NDArray[np.bool_]
RATE, BAR = 0.01, 0.95  # the published shares: of neurons that are selected, of rates that lie below the bar


@dataclass(frozen=True)
class Specialists:
    """What was found in the rates of activity.

    Attributes:
        domains: Names of the D domains.
        entropy: LAPE in nats, [N]; infinite for a neuron that exceeds the bar nowhere. Of the variant: its score.
        bar: Rate of activity that counts as active.
        selected: The specific neurons, bool [N].
        assigned: To which domains each of them belongs (its rate there exceeds the bar), bool [N, D].
        general: Three kinds of language-general neurons by name, bool [N] each; see `general`.
        tied: Neurons that were left out though their entropy is that of the last one selected.
        weight: Weight of the rate's size in the variant; None for LAPE itself.
    """

    domains: list[str]
    entropy: Floats
    bar: float
    selected: Bools
    assigned: Bools
    general: dict[str, Bools]
    tied: int
    weight: float | None = None

    def classes(self) -> dict[str, Bools]:
        """All classes of neurons by name: `specific`, `specific:<domain>` for each, and the general ones."""
        by_domain = {f"specific:{name}": self.assigned[:, place] for place, name in enumerate(self.domains)}
        return {"specific": self.selected} | by_domain | self.general


def entropy(rates: Floats) -> Floats:
    """Entropy of each neuron's rates [N, D] over domains, in nats, [N]; 0 for one that is never active."""
    total = rates.sum(1, keepdims=True)
    shares = np.divide(rates, total, out=np.zeros_like(rates), where=total > 0)
    return -np.sum(shares * np.log(np.where(shares > 0, shares, 1.0)), axis=1) + 0.0  # no negative zeros


def identify(rates: Floats, domains: list[str], rate: float = RATE, bar: float = BAR) -> Specialists:
    """Select specific neurons by LAPE as published.

    A neuron that exceeds the bar (the `bar` quantile of all N D rates) in no domain is out. Of all N neurons, the share
    `rate` with the lowest entropy is selected, and each is assigned to every domain where it exceeds the bar. Of equal
    entropies the lower numbers are taken, and `tied` says how many were left out. Where fewer neurons pass the filter
    than are to be selected, all of them are (the released code fills up with neurons that belong to no domain).

    Args:
        rates: Rates of activity, [N, D].
        domains: Names of the D domains, two or more.
        rate: Share of neurons to select.
        bar: Quantile of all rates that counts as active.

    Raises:
        KoffError: One domain only, or so few neurons that none would be selected.
    """
    _check(rates, domains, rate, bar)
    threshold = _bar(rates.ravel(), bar)
    above = rates > threshold  # [N, D]
    score = np.where(above.any(1), entropy(rates), np.inf)
    return _found(rates, domains, score, threshold, (rate, bar))


def identify_weighted(
    rates: Floats, domains: list[str], rate: float = RATE, bar: float = BAR, weight: float | None = None
) -> Specialists:
    """Select by entropy / ln D - weight * largest rate / norm, norm = (1 + 1/2 + ... + 1/D) / D.

    As in the released code of "Language-Neurons-Alignment" (NJUNLP, AAAI 2026). It has no filter: the weight keeps
    neurons that are hardly ever active out. With weight None it is the largest in [0, 0.2] (to 0.001, by bisection, as
    they do) at which no selected neuron exceeds the bar in all domains; 0 where even that does not hold.

    Raises:
        KoffError: As `identify`.
    """
    _check(rates, domains, rate, bar)
    count = len(domains)
    threshold, base = _bar(rates.ravel(), bar), entropy(rates) / math.log(count)
    size = rates.max(1) / (sum(1 / k for k in range(1, count + 1)) / count)
    above = rates > threshold

    def clean(weight: float) -> bool:
        return not above[_lowest(base - weight * size, rate)[0]].all(1).any()

    if weight is None:
        low, high = 0.0, 0.2
        if clean(high):
            low = high
        while high - low > 1e-3:
            middle = (low + high) / 2
            low, high = (middle, high) if clean(middle) else (low, middle)
        weight = low
    return _found(rates, domains, base - weight * size, threshold, (rate, bar), weight)


def general(rates: Floats, score: Floats, threshold: float, selected: Bools, bar_share: float) -> dict[str, Bools]:
    """Three ideas of a neuron that serves all domains, bool [N] each.

    G1: it exceeds the bar of LAPE in every domain. G2: as many neurons as are specific, of the highest entropy among
    those that pass the filter of LAPE and are not specific themselves. G3: it exceeds in every domain the same quantile
    of that domain's own rates (our choice: by one bar for all domains this would be G1).

    Args:
        rates: [N, D].
        score: LAPE, [N], infinite where filtered.
        threshold: The bar.
        selected: The specific neurons, bool [N].
        bar_share: Share of rates below the bar, for G3.
    """
    passed = np.isfinite(score) & ~selected
    highest = np.argsort(np.where(passed, -score, np.inf), kind="stable")[: min(int(selected.sum()), int(passed.sum()))]
    g2 = np.zeros(len(rates), bool)
    g2[highest] = True
    own = np.array([_bar(column, bar_share) for column in rates.T])  # [D]
    return {"G1": (rates > threshold).all(1), "G2": g2, "G3": (rates > own).all(1)}


def _found(
    rates: Floats,
    domains: list[str],
    score: Floats,
    threshold: float,
    shares: tuple[float, float],
    weight: float | None = None,
) -> Specialists:
    above = rates > threshold
    selected, tied = _lowest(score, shares[0])
    lape = np.where(above.any(1), entropy(rates), np.inf)  # G2 goes by LAPE itself, whatever selected the others
    kinds = general(rates, lape, threshold, selected, shares[1])
    return Specialists(list(domains), score, threshold, selected, above & selected[:, None], kinds, tied, weight)


def _lowest(score: Floats, rate: float) -> tuple[Bools, int]:
    """The `rate` of all neurons with the lowest finite scores, bool [N], and how many tie with the last but are out."""
    finite = np.isfinite(score)
    chosen = np.argsort(score, kind="stable")[: min(round(rate * len(score)), int(finite.sum()))]
    selected = np.zeros(len(score), bool)
    selected[chosen] = True
    tied = int((score[~selected] == score[chosen[-1]]).sum()) if len(chosen) else 0
    return selected, tied


def _bar(rates: Floats, share: float) -> float:
    """The value of which `share` of the rates are no larger, as torch.kthvalue gives it in the released code."""
    place = max(round(len(rates) * share) - 1, 0)
    return float(np.partition(rates, place)[place])


def _check(rates: Floats, domains: list[str], rate: float, bar: float) -> None:
    if rates.ndim != 2 or rates.shape[1] != len(domains):
        raise KoffError(f"rates must be [neurons, {len(domains)} domains]; got {list(rates.shape)}")
    if len(domains) < 2:
        raise KoffError(
            f"LAPE compares domains and there is only {domains[0]!r}: give text of two or more. With one domain there "
            "are its rates of activity, what its memory is worth (knock-out) and the overlap of masks"
        )
    if not (0 < rate < 1 and 0 < bar < 1):
        raise KoffError(f"rate and bar must lie between 0 and 1; got {rate} and {bar}")
    if round(rate * len(rates)) < 1:
        raise KoffError(f"{rate:.3g} of {len(rates)} neurons is less than one: raise rate to {1 / len(rates):.3g}")
