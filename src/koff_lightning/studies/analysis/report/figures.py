"""The pictures of a study. Colours are Okabe and Ito's, or lie between two of them: safe for the colour-blind."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from koff_lightning.reports.plots import BLACK, BLUE, GREY, MARKERS, ORANGE, number_layers, plain, sparsity_by_layer
from koff_lightning.studies.analysis.report import memory_figures
from koff_lightning.studies.analysis.report.drawing import GREEN, WIDE, heat
from koff_lightning.studies.analysis.study import Study
from koff_lightning.support.mask_words import KIND_NAMES

if TYPE_CHECKING:
    import pandas as pd

LOW, HIGH = 0.05, 20  # ends of the axis of odds
CLASSES = {"specific": "specific", "specific_weighted": "specific, variant", "G2": "general (G2)"}
WITHIN = {
    "layers": ("same layer", BLUE, MARKERS[0]),
    "cells": ("same layer, activity and importance", ORANGE, MARKERS[1]),
}
CLASS = {"specific": ("specific", ORANGE), "G2": ("general", GREEN), "other": ("neither", GREY)}


def draw_all(found: Study) -> dict[str, Figure]:
    """Every picture that the tables of a study allow, by name."""
    makers = {
        "removed_by_layer": ("layers", _removed_by_layer),
        "enrichment": ("pooled", _forest),
        "selections": ("selections", _selections),
        "transfer": ("transfer", memory_figures.transfer),
        "perplexity": ("perplexity", memory_figures.perplexity),
        "knockout": ("knockout", memory_figures.knockout),
        "causal": ("causal", memory_figures.causal),
        "attention": ("attention", memory_figures.attention),
        "adapters": ("adapters", memory_figures.adapters),
        "overlap": ("overlap", _overlap),
    }
    drawn = {name: draw(found) for name, (table, draw) in makers.items() if len(found.tables.get(table, ()))}
    drawn["sparsity"] = _sparsity(found)
    if points := found.about.get("history"):
        drawn["gates"] = _gates(found, points)
    return {name: each for name, each in drawn.items() if each is not None}


def _removed_by_layer(found: Study) -> Figure | None:
    own = found.tables["layers"][lambda t: t["kind"] == found.settings.name]
    if own.empty:
        return None
    figure = Figure(figsize=(WIDE, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    runs = own["run"].nunique()
    tables = {
        name: own[own["class"] == name].groupby("layer")[["marked", "both"]].sum() / runs for name in ("specific", "G2")
    }
    every = own[own["class"] == "specific"].groupby("layer")[["neurons", "removed"]].sum() / runs
    layers = every.index.to_numpy()
    gone = {name: table["both"].to_numpy() for name, table in tables.items()}
    of = {name: table["marked"].to_numpy() for name, table in tables.items()}
    gone["other"] = every["removed"].to_numpy() - gone["specific"] - gone["G2"]
    of["other"] = every["neurons"].to_numpy() - of["specific"] - of["G2"]
    bottom = np.zeros(len(layers))
    for place, (name, (label, colour)) in enumerate(CLASS.items()):
        left.bar(layers, gone[name], bottom=bottom, color=colour, label=label)
        bottom += gone[name]
        share = np.divide(100 * gone[name], of[name], out=np.full(len(layers), np.nan), where=of[name] > 0)
        right.bar(layers + (place - 1) * 0.27, share, 0.27, color=colour)
    left.set(title="Removed neurons", xlabel="layer", ylabel="neurons, mean over runs" if runs > 1 else "neurons")
    right.set(title="Share of each class removed", xlabel="layer", ylabel="removed, % of the class")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    for axes in (left, right):
        number_layers(axes.xaxis, list(layers))
        plain(axes)
    return figure


def _forest(found: Study) -> Figure:
    """Odds ratios of every kind of mask, class by class."""
    table = found.tables["pooled"][lambda t: t["class"].isin(CLASSES)]
    kinds = sorted(table["kind"].unique(), key=lambda kind: kind != found.settings.name)
    rows = [(f"{label}, {kind}", kind, name) for name, label in CLASSES.items() for kind in kinds]
    figure, axes = _odds_axes(table, len(rows) + 0.6 * len(CLASSES), "Removed more often than others?")
    places = [place + 0.6 * (place // len(kinds)) for place in range(len(rows))]
    for place, (_, kind, name) in zip(places, rows, strict=True):
        part = table[(table["class"] == name) & (table["kind"] == kind)]
        _two(axes, place, part, full=kind == found.settings.name)
    axes.set_yticks(np.array(places) + 0.16, [label for label, *_ in rows])
    return figure


def _selections(found: Study) -> Figure:
    """The same of the studied runs, by how many neurons are called specific."""
    table = found.tables["selections"]
    groups = list(table.groupby(["rate", "bar"], sort=False))
    figure, axes = _odds_axes(table, len(groups), "If more neurons are called specific")
    for place, (_, part) in enumerate(groups):
        _two(axes, place, part, full=True)
    labels = [f"{part['specific'].iloc[0]} neurons, bar {100 * bar:g} %" for (_, bar), part in groups]
    axes.set_yticks(np.arange(len(groups)) + 0.16, labels)
    return figure


def _odds_axes(table: "pd.DataFrame", lines: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDE, 1.5 + 0.24 * lines), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(1, color=BLACK, linewidth=1, linestyle="--")
    axes.set_xscale("log")
    axes.set(xlabel="odds of being removed, against other neurons", title=title, xlim=(LOW, HIGH))
    axes.set_xticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
    axes.minorticks_off()
    axes.margins(y=0.4 / lines)  # room for the first and last marker
    axes.invert_yaxis()
    for label, colour, marker in WITHIN.values():
        axes.plot([], [], marker, color=colour, label=label)
    if ((table["low"] < LOW) | (table["high"] > HIGH)).any():
        axes.plot([], [], ">", color=GREY, label="interval goes on")
    figure.legend(loc="outside lower center", ncols=3, columnspacing=1, frameon=False)
    plain(axes, "x")
    return figure, axes


def _two(axes: Axes, place: float, rows: "pd.DataFrame", full: bool) -> None:
    """The odds ratios within layers and within cells, with their intervals."""
    for step, (within, (_, colour, marker)) in enumerate(WITHIN.items()):
        at = place + 0.32 * step
        for _, row in rows[rows["within"] == within].iterrows():
            if LOW < row["odds_ratio"] < HIGH:
                style = "full" if full else "none"
                axes.plot(row["odds_ratio"], at, marker, color=colour, markersize=5, fillstyle=style)
            if not np.isnan(row["low"]):
                axes.plot(np.clip([row["low"], row["high"]], LOW, HIGH), [at, at], color=colour, linewidth=1.4)
                beyond = [(LOW, "<")] * (row["low"] < LOW) + [(HIGH, ">")] * (row["high"] > HIGH)
                for end, arrow in beyond:  # over the frame, so that no end of the axis is taken for that of an interval
                    axes.plot(end, at, arrow, color=colour, markersize=5, clip_on=False)


def _overlap(found: Study) -> Figure | None:
    table = found.tables["overlap"]
    names = list(dict.fromkeys([*table["a"], *table["b"]]))
    values = np.full((len(names), len(names)), np.nan)
    for _, row in table.iterrows():
        i, j = names.index(row["a"]), names.index(row["b"])
        if row["chance"] > 0:  # else the two remove neurons of different layers, and no chance would let them meet
            values[max(i, j), min(i, j)] = row["jaccard"] / row["chance"]
    if np.isnan(values).all():
        return None
    figure = Figure(figsize=(WIDE, 1.6 + 0.36 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    heat(axes, values, "{:.1f}" if len(names) <= 14 else "", "cividis", low=0)
    labels = [name.split("/")[1] if name.split("/")[0] in name.split("/")[1] else name for name in names]
    axes.set_xticks(np.arange(len(names)) + 0.5, labels, rotation=35, ha="right")
    axes.set_yticks(np.arange(len(names)) + 0.5, labels)
    axes.set_title("Overlap of two masks, times chance")
    return figure


def _sparsity(found: Study) -> Figure:
    import pandas as pd

    parts = [pd.DataFrame(run["kept"]) for run in found.about["runs"].values()]
    table = pd.concat(parts).groupby(["kind", "layer"], sort=False)[["kept", "of"]].sum()
    share = 100 * (1 - table["kept"] / table["of"])
    kinds = [kind for kind in KIND_NAMES if kind in share.index.get_level_values(0)]
    figure = Figure(figsize=(WIDE, 2.8), layout="constrained")
    for place, kind in enumerate(kinds):
        axes = figure.add_subplot(1, len(kinds), place + 1)
        axes.bar(share[kind].index, share[kind], color=(BLUE, ORANGE)[place % 2])
        axes.set(
            title=KIND_NAMES[kind],
            xlabel="layer",
            ylabel="removed, %" if place == 0 else "",
            ylim=(0, max(share.max() * 1.1, 5)),
        )
        axes.title.set_size(9 if len(kinds) > 3 else 12)  # five kinds of channels have little room for their names
        number_layers(axes.xaxis, list(share[kind].index), most=24 // len(kinds))
        plain(axes)
    return figure


def _gates(found: Study, points: Sequence[dict[str, Any]]) -> Figure:
    kept = next(iter(found.about["runs"].values()))["kept"]
    figure = sparsity_by_layer(points, [(group["layer"], group["kind"]) for group in kept])
    figure.set_size_inches(WIDE, 3)
    return figure
