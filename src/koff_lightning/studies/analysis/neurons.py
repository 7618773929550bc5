"""The questions about neurons: which are specific, are they removed more often, by this way of pruning or by any."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from koff_lightning.studies.analysis.activations import Activations
from koff_lightning.studies.analysis.comparison import odds_of_runs, odds_ratio_ratio
from koff_lightning.studies.analysis.enrichment import enrichment_table
from koff_lightning.studies.analysis.lape import Specialists, identify, identify_weighted
from koff_lightning.studies.analysis.masks import Mask
from koff_lightning.studies.analysis.overlap import overlap_table
from koff_lightning.studies.analysis.paper import ends_lines
from koff_lightning.studies.analysis.ranking import ranking
from koff_lightning.studies.analysis.regression import logistic
from koff_lightning.studies.analysis.stability import stability
from koff_lightning.studies.analysis.tables import Bools, Ints, layer_table, strata
from koff_lightning.support.errors import KoffError

if TYPE_CHECKING:
    import pandas as pd

Masks = Mapping[tuple[str, str], Mask]  # kind and name of the run -> mask
MAIN = ("specific", "specific_weighted", "G1", "G2", "G3")  # classes that are compared between ways of pruning
# Shares of neurons and bars beside the published ones: does the answer hang on them? Our choice.
SELECTIONS = ((0.01, 0.95), (0.02, 0.95), (0.05, 0.95), (0.05, 0.8), (0.1, 0.8), (0.2, 0.5))


def classes_of(seen: Activations, found: Specialists, rate: float, bar: float) -> dict[str, Bools]:
    """All classes that are tested, those of the weighted variant of LAPE among them."""
    variant = identify_weighted(seen.rates(), seen.domains, rate, bar)
    return found.classes() | {"specific_weighted": variant.selected}


def neuron_table(
    seen: Activations, masks: Masks, found: Specialists | None, classes: Mapping[str, Bools]
) -> "pd.DataFrame":
    """One line per neuron of the dense model: its activity, its classes, and which masks remove it."""
    import pandas as pd

    table = seen.table().assign(cell=strata(seen.layer.numpy(), seen.rates(), seen.importance()))
    if found is not None:
        table["entropy"] = found.entropy
    columns = {name.replace(":", "_"): members for name, members in classes.items()}
    columns |= {f"removed_{kind}_{name}": mask.removed for (kind, name), mask in masks.items()}
    return pd.concat([table, pd.DataFrame(columns)], axis=1)


def mask_table(masks: Masks) -> "pd.DataFrame":
    """One line per run and unit: kind, run, then the columns of `Mask.table`."""
    import pandas as pd

    return pd.concat([_named(mask.table(), *key) for key, mask in masks.items()], ignore_index=True)


def ranking_table(seen: Activations, masks: Masks) -> "pd.DataFrame":
    """The paper's Table 3 for every mask: kind, run, then the columns of `ranking`."""
    import pandas as pd

    tables = []
    for (kind, run), mask in masks.items():
        halves = {name.removesuffix("_channel"): half["removed"] for name, half in mask.halves.items()}
        gone = halves | {"either": mask.removed} if halves else {"neuron": mask.removed}
        tables.append(_named(ranking(seen.rates(), gone), kind, run))
    return pd.concat(tables, ignore_index=True)


def ends_of_runs(seen: Activations, masks: Masks, name: str) -> "pd.DataFrame":
    """What the paper says of Table 3, over all studied runs: lines of the table `statements`."""
    import pandas as pd

    own = [mask for (kind, _), mask in masks.items() if kind == name]
    halves = sorted(set.intersection(*(set(mask.halves) for mask in own))) if own else []
    gone = {half.removesuffix("_channel"): [mask.halves[half]["removed"] for mask in own] for half in halves}
    return pd.DataFrame(ends_lines(seen.rates(), gone or {"neurons": [mask.removed for mask in own]}) if own else [])


def removal_tables(
    seen: Activations, masks: Masks, classes: Mapping[str, Bools], draws: int, seed: int
) -> dict[str, "pd.DataFrame"]:
    """Every mask tested: `enrichment`, `layers` and `logistic`.

    Raises:
        KoffError: No mask removes neurons.
    """
    import pandas as pd

    layer, rates, importance = seen.layer.numpy(), seen.rates(), seen.importance()
    cells = strata(layer, rates, importance)
    tests, layers, fits = [], [], []
    for key, mask in masks.items():
        tests.append(_named(enrichment_table(mask.removed, classes, layer, cells, draws, seed), *key))
        for name in MAIN:
            layers.append(_named(layer_table(mask.removed, classes[name], layer).assign(**{"class": name}), *key))
        fit = logistic(mask.removed, classes["specific"], classes["G2"], rates, importance, layer)
        fits.append(_named(fit.table.assign(note=fit.note), *key))
        if fit.table.empty:
            fits[-1] = pd.DataFrame([{"kind": key[0], "run": key[1], "note": fit.note}])
    together = {"enrichment": tests, "layers": layers, "logistic": fits}
    return {name: pd.concat(parts, ignore_index=True) for name, parts in together.items()}


def ratio_table(
    seen: Activations, masks: Masks, name: str, classes: Mapping[str, Bools], resamples: int, seed: int
) -> "pd.DataFrame":
    """The odds ratio of the studied runs over that of every other kind, within layers and within cells.

    One line per class, other kind and `within`; columns of `RatioOfOdds`.
    """
    import pandas as pd

    own = removed_by(masks, name)
    rows = [
        {"class": kind_of_neuron, "against": other, "within": word}
        | asdict(odds_ratio_ratio(own, removed_by(masks, other), classes[kind_of_neuron], stratum, resamples, seed))
        for kind_of_neuron in MAIN
        for other in dict.fromkeys(kind for kind, _ in masks if kind != name)
        for word, stratum in _within(seen).items()
        if classes[kind_of_neuron].any()
    ]
    return pd.DataFrame(rows)


def pooled_table(
    seen: Activations, masks: Masks, classes: Mapping[str, Bools], resamples: int, seed: int
) -> "pd.DataFrame":
    """Every class under every kind of mask, over all its runs: one line per class, kind and `within`."""
    import pandas as pd

    rows = [
        {"class": name, "kind": kind, "within": word}
        | asdict(odds_of_runs(removed_by(masks, kind), members, stratum, resamples, seed))
        for name, members in classes.items()
        if members.any()
        for kind in dict.fromkeys(kind for kind, _ in masks)
        for word, stratum in _within(seen).items()
    ]
    return pd.DataFrame(rows)


def selection_table(
    seen: Activations, masks: Masks, name: str, chosen: tuple[float, float], resamples: int, seed: int
) -> "pd.DataFrame":
    """Does the answer hang on how many neurons are called specific? One line per share, bar and `within`."""
    import pandas as pd

    rows = []
    for rate, bar in dict.fromkeys([chosen, *SELECTIONS]):
        try:
            selected = identify(seen.rates(), seen.domains, rate, bar).selected
        except KoffError:  # so few neurons that this share of them is none
            continue
        about = {"rate": rate, "bar": bar, "specific": int(selected.sum())}
        own = removed_by(masks, name)
        about["removed"] = float(np.mean([(mask & selected).sum() for mask in own]))
        for word, stratum in _within(seen).items():
            rows.append(about | {"within": word} | asdict(odds_of_runs(own, selected, stratum, resamples, seed)))
    return pd.DataFrame(rows).drop_duplicates(["specific", "bar", "within"])


def _within(seen: Activations) -> dict[str, Ints]:
    """What neurons are compared within."""
    layer = seen.layer.numpy()
    return {"layers": layer, "cells": strata(layer, seen.rates(), seen.importance())}


def overlaps(masks: Masks) -> "pd.DataFrame":
    """Every two masks compared, with the kinds of both.

    Raises:
        KoffError: One mask only.
    """
    if len(masks) < 2:
        raise KoffError("there is one mask only: give more seeds with --model, or others with --against")
    layer = next(iter(masks.values())).layer
    named = {f"{kind}/{run}": mask.removed for (kind, run), mask in masks.items()}
    return overlap_table(named, layer)


def stability_table(seen: Activations, rate: float, bar: float) -> tuple["pd.DataFrame", str]:
    """Jaccard index between the halves of the text, overall and by domain; and what it says, in a sentence.

    Raises:
        KoffError: A domain with all its text in one half.
    """
    import pandas as pd

    found = stability(seen, rate, bar)
    rows = [{"domain": "all", "jaccard": found.jaccard, "chance": found.chance}] + [
        {"domain": domain, "jaccard": value} for domain, value in found.by_domain.items()
    ]
    table = pd.DataFrame(rows).assign(tokens=found.tokens, needed=found.needed)
    return table, found.sentence


def removed_by(masks: Masks, kind: str) -> list[Bools]:
    """The removed neurons of all runs of one kind."""
    return [mask.removed for (other, _), mask in masks.items() if other == kind]


def _named(table: "pd.DataFrame", kind: str, run: str) -> "pd.DataFrame":
    front, table = {"kind": kind, "run": run}, table.rename(columns={"kind": "unit_kind"})
    return table.assign(**front)[[*front, *table.columns]]
