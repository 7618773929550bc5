"""Logistic regression of "removed" on class, activity, importance and layer: all confounds at once."""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from koff_lightning.studies.analysis.tables import Bools, Floats, Ints
from koff_lightning.support.errors import KoffError

if TYPE_CHECKING:
    import pandas as pd

FEW = 20  # clusters below which errors clustered by layer are known to come out too small (Cameron and Miller 2015)


@dataclass(frozen=True)
class Logistic:
    """The fit.

    Attributes:
        table: One line per term: `term`, `coefficient`, `odds_ratio`, `low`, `high` (95 %), `p`; the layers' own terms
            are left out. Empty where there is no fit.
        note: What a reader must know, or "".
    """

    table: "pd.DataFrame"
    note: str


def logistic(
    removed: Bools, specific: Bools, general: Bools, rates: Floats, importance: Floats, layer: Ints
) -> Logistic:
    """Fit removed ~ specific + general + mean rate + largest rate + log importance + layer, errors clustered by layer.

    The continuous terms are standardised, so their odds ratios are per standard deviation. Layers in which nothing or
    everything is removed say nothing and are left out; so are a term that does not vary and a class of which all
    members, or none, are removed.

    Args:
        removed: bool [N].
        specific: Specific neurons, bool [N].
        general: Neurons that serve all domains, bool [N].
        rates: Rates of activity, [N, D].
        importance: Importance of each neuron, [N].
        layer: Layer of each neuron, [N].

    Raises:
        KoffError: A mask that removes nothing, or everything, of every layer.
    """
    shares = np.bincount(layer, weights=removed) / np.maximum(np.bincount(layer), 1)
    used = ((shares > 0) & (shares < 1))[layer]
    if not used.any():
        raise KoffError("in every layer the mask removes nothing, or everything: there is nothing to explain")
    terms = {
        "specific": specific.astype(float),
        "general": general.astype(float),
        "mean_rate": _standard(rates.mean(1)),
        "max_rate": _standard(rates.max(1)),
        "log_importance": _standard(np.log(importance + 1e-12)),
    }
    terms = {name: values[used] for name, values in terms.items()}
    constant = {name: "does not vary" for name, values in terms.items() if np.ptp(values) == 0}
    for name, members in (("specific", specific), ("general", general)):
        if name not in constant and len(set(gone := removed[used & members])) == 1:
            constant[name] = f"has {'no kept' if gone[0] else 'no removed'} member: its odds ratio is not finite"
    for name in constant:
        del terms[name]
    layers = np.unique(layer[used])
    notes = [f"{name} {why}" for name, why in constant.items()]
    if len(layers) < FEW:
        notes.append(f"errors are clustered by {len(layers)} layers, few enough for them to come out too small")
    return _fit(removed[used].astype(float), terms, layer[used], layers, notes)


def _fit(removed: Floats, terms: dict[str, Floats], layer: Ints, layers: Ints, notes: list[str]) -> Logistic:
    import pandas as pd
    from statsmodels.discrete.discrete_model import Logit
    from statsmodels.tools.sm_exceptions import PerfectSeparationError

    dummies = (layer[:, None] == layers).astype(float)  # one per layer, no common intercept
    design = np.column_stack([*terms.values(), dummies])
    kind = {"cov_type": "cluster", "cov_kwds": {"groups": layer}} if len(layers) > 1 else {"cov_type": "HC1"}
    empty = pd.DataFrame(columns=["term", "coefficient", "odds_ratio", "low", "high", "p"])
    try:
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            fit = Logit(removed, design).fit(disp=0, maxiter=200, **kind)
            interval, p = fit.conf_int()[: len(terms)], fit.pvalues[: len(terms)]
    except (PerfectSeparationError, np.linalg.LinAlgError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Logistic(empty, "; ".join([*notes, f"no fit: {reason}"]))
    value = fit.params[: len(terms)]
    if not fit.mle_retvals["converged"] or np.abs(value).max() > 15:
        return Logistic(empty, "; ".join([*notes, "no fit: a term separates removed and kept neurons perfectly"]))
    notes += sorted({str(w.message).splitlines()[0] for w in raised})
    columns = {"term": list(terms), "coefficient": value, "odds_ratio": np.exp(value)}
    columns |= {"low": np.exp(interval[:, 0]), "high": np.exp(interval[:, 1]), "p": p}
    return Logistic(pd.DataFrame(columns), "; ".join(notes))


def _standard(values: Floats) -> Floats:
    spread = values.std()
    return (values - values.mean()) / spread if spread > 0 else values * 0
