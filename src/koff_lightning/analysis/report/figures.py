"""The pictures of a study. Colours are Okabe and Ito's, or lie between two of them: safe for the colour-blind."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from koff_lightning.analysis.report import memory_figures
from koff_lightning.analysis.report.drawing import GREEN, WIDE, heat, plain
from koff_lightning.analysis.study import Study
from koff_lightning.run.plots import BLACK, BLUE, GREY, KIND_TITLE, MARKERS, ORANGE, sparsity_by_layer

if TYPE_CHECKING:
    import pandas as pd

CLASS = {"specific": ("specific", ORANGE), "G2": ("general", GREEN), "other": ("neither", GREY)}


def draw_all(found: Study) -> dict[str, Figure]:
    """Every picture that the tables of a study allow, by name."""
    makers = {
        "removed_by_layer": ("layers", _removed_by_layer),
        "enrichment": ("enrichment", _forest),
        "transfer": ("transfer", memory_figures.transfer),
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
    right.set(title="Share of each class removed", xlabel="layer", ylabel="%")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        plain(axes)
    return figure


def _forest(found: Study) -> Figure:
    table = found.tables["enrichment"]
    kinds = sorted(table["kind"].unique(), key=lambda kind: kind != found.settings.name)
    classes = [("specific", "specific"), ("specific_weighted", "specific, variant"), ("G2", "general (G2)")]
    figure = Figure(
        figsize=(WIDE, 1.4 + 0.28 * len(table[table["class"] == "specific"]) * len(classes) / 1.4), layout="constrained"
    )
    axes = figure.add_subplot()
    at, ticks, seen = 0.0, [], []
    for name, label in classes:
        for number, kind in enumerate(kinds):
            rows = table[(table["class"] == name) & (table["kind"] == kind)]
            for _, row in rows.iterrows():
                _interval(axes, at, row, "mh", BLUE, MARKERS[0], full=number == 0)
                _interval(axes, at + 0.32, row, "cell", ORANGE, MARKERS[1], full=number == 0)
                at += 1
            ticks.append((at - len(rows) / 2 - 0.35, f"{label}, {kind}"))
            seen.append(len(rows))
        at += 0.6
    axes.axvline(1, color=BLACK, linewidth=1, linestyle="--")
    axes.set_xscale("log")
    axes.set_yticks([place for place, _ in ticks], [label for _, label in ticks])
    axes.invert_yaxis()
    axes.set(xlabel="odds of being removed, against other neurons", title="Removed more often than others?")
    axes.set_xlim(0.05, 20)
    axes.set_xticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
    axes.minorticks_off()
    axes.plot([], [], MARKERS[0], color=BLUE, label="same layer")
    axes.plot([], [], MARKERS[1], color=ORANGE, label="same layer, activity and importance")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    plain(axes, "x")
    return figure


def _interval(axes: Axes, at: float, row: "pd.Series", which: str, colour: str, marker: str, full: bool) -> None:
    value, low, high = row[f"{which}_odds_ratio"], row[f"{which}_low"], row[f"{which}_high"]
    if not 0 < value < np.inf:
        return
    axes.plot(np.clip(value, 0.055, 18), at, marker, color=colour, markersize=5, fillstyle="full" if full else "none")
    if np.isfinite([low, high]).all():
        axes.plot(np.clip([low, high], 0.05, 20), [at, at], color=colour, linewidth=1.4)


def _overlap(found: Study) -> Figure:
    table = found.tables["overlap"]
    names = list(dict.fromkeys([*table["a"], *table["b"]]))
    values = np.full((len(names), len(names)), np.nan)
    for _, row in table.iterrows():
        i, j = names.index(row["a"]), names.index(row["b"])
        values[max(i, j), min(i, j)] = row["jaccard"] / row["chance"]
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
    kinds = [kind for kind in KIND_TITLE if kind in share.index.get_level_values(0)]
    figure = Figure(figsize=(WIDE, 2.8), layout="constrained")
    for place, kind in enumerate(kinds):
        axes = figure.add_subplot(1, len(kinds), place + 1)
        axes.bar(share[kind].index, share[kind], color=(BLUE, ORANGE)[place])
        axes.set(
            title=KIND_TITLE[kind],
            xlabel="layer",
            ylabel="removed, %" if place == 0 else "",
            ylim=(0, max(share.max() * 1.1, 5)),
        )
        axes.xaxis.get_major_locator().set_params(integer=True)
        plain(axes)
    return figure


def _gates(found: Study, points: Sequence[dict[str, Any]]) -> Figure:
    kept = next(iter(found.about["runs"].values()))["kept"]
    figure = sparsity_by_layer(points, [(group["layer"], group["kind"]) for group in kept])
    figure.set_size_inches(WIDE, 3)
    return figure
