"""Pictures of what memories are worth, where they sit, and what has moved into them."""

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from koff_lightning.reports.plots import BLACK, BLUE, GREY, ORANGE, plain, room
from koff_lightning.studies.analysis.report.drawing import SKY, WIDE, heat, ticks, within_rows
from koff_lightning.studies.analysis.study import Study
from koff_lightning.studies.analysis.transfer import Transfer

if TYPE_CHECKING:
    import pandas as pd

# Texts differ more from each other than the memories do on one text: one scale for all would show the texts alone.
SHADES = "memory\n(colour: within each text, from the least, light, to the most, dark)"


def transfer(found: Study) -> Figure:
    """What every memory does to every domain's text, and a tree of memories that do alike."""
    from scipy.cluster.hierarchy import dendrogram

    mean = Transfer(_mean_table(found.tables["transfer"]))
    order = mean.order()
    lines = [d for d in order if d in mean.bpb.index] + [d for d in mean.bpb.index if d not in order]
    change = 100 * (mean.bpb.div(mean.bpb["dense"], axis=0) - 1).loc[lines, [*order, "none"]]
    tree = len(order) > 2
    figure = Figure(figsize=(WIDE, 1.3 + 0.42 * len(lines) + 0.7 * tree), layout="constrained")
    top, axes = (
        figure.subplots(2, 1, height_ratios=[0.7, 0.42 * len(lines) + 0.6]) if tree else (None, figure.add_subplot())
    )
    if tree:
        drawn = dendrogram(mean.linkage(), no_plot=True)
        for x, y in zip(drawn["icoord"], drawn["dcoord"], strict=True):
            top.plot(np.array(x) / 10, y, color=BLACK, linewidth=1)
        top.set_xlim(0, len(order) + 1)
        top.set_axis_off()
    heat(axes, change.to_numpy(), "{:+.1f}", "cividis_r", shades=within_rows(change.to_numpy()))
    axes.set_xticks(np.arange(len(order) + 1) + 0.5, [*order, "none"])
    axes.set_yticks(np.arange(len(lines)) + 0.5, lines)
    axes.set(xlabel=SHADES, ylabel="text")
    runs = found.tables["transfer"]["run"].nunique()
    figure.suptitle("Bits per byte against dense, %" + (f", mean of {runs} runs" if runs > 1 else ""))
    return figure


def perplexity(found: Study) -> Figure:
    """The same text and memories as the paper shows them (Fig. 3): perplexities, with the dense model's.

    And with memories off, where the paper has a mask learned without memories ("pruned only"): the mean of that column
    is what its Table 1 has for such a mask of Qwen2.5-3B, 12.10.
    """
    mean = _mean_table(found.tables["perplexity"])
    columns = [*(name for name in mean.columns if name not in ("none", "dense")), "none", "dense"]
    figure = Figure(figsize=(WIDE, 1.3 + 0.42 * len(mean)), layout="constrained")
    axes = figure.add_subplot()
    values = mean[columns].to_numpy()
    shades = within_rows(values, len(columns) - 1)  # of the dense model, far below, the others would look alike
    heat(axes, values, "{:.2f}", "cividis_r", shades=shades)
    names = {"none": "memories\noff", "dense": "dense"}
    axes.set_xticks(np.arange(len(columns)) + 0.5, [names.get(column, column) for column in columns])
    axes.set_yticks(np.arange(len(mean)) + 0.5, mean.index)
    axes.set(xlabel=SHADES, ylabel="text", title="Perplexity per token")
    return figure


def knockout(found: Study) -> Figure:
    """What the adapter alone, the slots alone and both gain."""
    table = found.tables["knockout"].groupby("domain", sort=False)[["none", "lora", "kv", "both"]].mean()
    gain = table[["lora", "kv", "both"]].rsub(table["none"], axis=0)
    figure = Figure(figsize=(WIDE, 3), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, label, colour) in enumerate(
        (("lora", "LoRA alone", SKY), ("kv", "KV alone", ORANGE), ("both", "both", BLUE))
    ):
        axes.bar(np.arange(len(gain)) + (place - 1) * 0.27, gain[name], 0.27, color=colour, label=label)
    axes.set_xticks(range(len(gain)), gain.index)
    room(axes, len(gain))
    axes.axhline(0, color=BLACK, linewidth=0.8)
    axes.set(ylabel="bits per byte gained", title="What the parts of a memory are worth")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    plain(axes)
    return figure


def causal(found: Study) -> Figure | None:
    """What removed specialists gain when they come back, beside other neurons; None where none was removed."""
    table = found.tables["causal"].dropna(subset=["off_after"])
    if table.empty:
        return None
    table = table.groupby("domain", sort=False).mean(numeric_only=True)
    figure = Figure(figsize=(WIDE, 3), layout="constrained")
    axes = figure.add_subplot()
    bars = (("off", "after", "memory off", ORANGE), ("off", "control", "memory off, other neurons", GREY))
    bars += (("on", "after", "memory on", BLUE), ("on", "control", "memory on, other neurons", SKY))
    for place, (arm, when, label, colour) in enumerate(bars):
        gain = table[f"{arm}_before"] - table[f"{arm}_{when}"]
        axes.bar(np.arange(len(table)) + (place - 1.5) * 0.2, gain, 0.2, color=colour, label=label)
    axes.set_xticks(range(len(table)), [f"{d}\n{n:.3g} back" for d, n in table["neurons"].items()])
    room(axes, len(table))
    axes.axhline(0, color=BLACK, linewidth=0.8)
    axes.set(ylabel="bits per byte gained", title="Removed specialists put back")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    plain(axes)
    return figure


def attention(found: Study) -> Figure:
    """Attention on the slots by layer and head."""
    table = found.tables["attention"].groupby(["layer", "head"])["mass"].mean().unstack()
    figure = Figure(figsize=(WIDE, 1.3 + 0.34 * len(table)), layout="constrained")
    axes = figure.add_subplot()
    heat(axes, 100 * table.to_numpy(), "{:.0f}" if table.size <= 200 else "", "cividis")
    white = "\n(empty: removed heads)" if table.isna().to_numpy().any() else ""
    axes.set(xlabel="query head", ylabel="layer", title=f"Attention on the memory's slots, %{white}")
    ticks(axes, len(table.columns), list(table.index))
    return figure


def adapters(found: Study) -> Figure:
    """Size of the adapters by linear and layer."""
    table = found.tables["adapters"].groupby(["linear", "layer"], sort=False)["relative"].mean().unstack()
    figure = Figure(figsize=(WIDE, 1.3 + 0.34 * len(table)), layout="constrained")
    axes = figure.add_subplot()
    heat(axes, 100 * table.to_numpy(), "{:.1f}" if table.size <= 120 else "", "cividis")
    axes.set(xlabel="layer", title="Adapter against frozen weight, % of its norm")
    axes.set_yticks(np.arange(len(table)) + 0.5, table.index)
    ticks(axes, len(table.columns), None)
    return figure


def _mean_table(table: "pd.DataFrame") -> "pd.DataFrame":
    """Mean over runs of a table with one line per run and domain."""
    return table.drop(columns="run").groupby("domain", sort=False).mean()
