"""Pictures of a run: the mask over training, held-out bits per byte by domain; and of many runs: arms compared.

Made with matplotlib's objects, not pyplot: nothing global is touched and no display is needed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from koff_lightning.support.errors import KoffError
from koff_lightning.support.mask_words import KIND_NAMES

# Okabe and Ito's palette, which tells apart under the common kinds of colour blindness
BLACK, GREY, BLUE, ORANGE, PURPLE = "#000000", "#999999", "#0072B2", "#E69F00", "#CC79A7"
MANY = ("#009E73", "#56B4E9", "#D55E00", "#F0E442", GREY, BLACK)
MARKERS = ("s", "^", "v", "D", "P", "X", "*")
ARM_STYLE = {
    "dense": ("dense", GREY),
    "koff": ("KOFF", BLUE),
    "memory_off": ("memory off", ORANGE),
    "swapped": ("swapped", PURPLE),
}
Point = Mapping[str, Any]
Bpb = Mapping[str, Mapping[str, float | None]]


def sparsity_over_training(points: Sequence[Point], denominator: str) -> Figure:
    """Target, expected and realised sparsity by step.

    Args:
        points: As recorded by `MaskHistory`.
        denominator: What sparsity is a share of.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps = [point["step"] for point in points]
    for name, colour, style in (("target", BLACK, "--"), ("expected", BLUE, "-"), ("realised", ORANGE, "-")):
        on_top = 3 if name == "target" else 2
        share = [100 * point[name] for point in points]
        axes.plot(steps, share, style, color=colour, label=name, linewidth=1.6, zorder=on_top)
    axes.set(xlabel="optimizer step", ylabel=f"parameters removed, % of {denominator}", title="Sparsity over training")
    axes.set_ylim(bottom=0)
    plain(axes)
    axes.legend(frameon=False)
    return figure


def sparsity_by_layer(points: Sequence[Point], groups: Sequence[tuple[int, str]]) -> Figure:
    """Share of units removed in each layer by step, a panel for each kind of unit.

    Args:
        points: As recorded by `MaskHistory`.
        groups: (layer, kind) of each entry of a point's `removed`.
    """
    kinds = [kind for kind in KIND_NAMES if any(k == kind for _, k in groups)]
    removed = 100 * np.array([point["removed"] for point in points])  # [points, groups]
    edges = _edges([point["step"] for point in points])
    figure = Figure(figsize=(1.5 + 4.2 * len(kinds), 4), layout="constrained")
    for place, kind in enumerate(kinds):
        rows = [i for i, (_, k) in enumerate(groups) if k == kind]
        layers = [groups[i][0] for i in rows]
        axes = figure.add_subplot(1, len(kinds), place + 1)
        top = max(float(removed[:, rows].max()), 1.0)
        mesh = axes.pcolormesh(
            edges, np.arange(len(rows) + 1) - 0.5, removed[:, rows].T, cmap="Blues", vmin=0, vmax=top, rasterized=True
        )
        every = -(-len(layers) // 12)
        axes.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
        axes.set(title=KIND_NAMES[kind], xlabel="optimizer step", ylabel="layer" if place == 0 else "")
        figure.colorbar(mesh, ax=axes, label="removed, % of the layer's units" if place == len(kinds) - 1 else "")
    return figure


def kept_by_layer(kept: Sequence[Mapping[str, Any]]) -> Figure:
    """Share of units kept in each layer, a panel for each kind of unit.

    Args:
        kept: {"layer", "kind", "of", "kept"} of every group.
    """
    kinds = [kind for kind in KIND_NAMES if any(entry["kind"] == kind for entry in kept)]
    figure = Figure(figsize=(1.5 + 4.2 * max(len(kinds), 1), 4), layout="constrained")
    for place, kind in enumerate(kinds):
        rows = [entry for entry in kept if entry["kind"] == kind]
        axes = figure.add_subplot(1, len(kinds), place + 1)
        axes.bar([row["layer"] for row in rows], [100 * row["kept"] / row["of"] for row in rows], color=BLUE)
        axes.set(title=KIND_NAMES[kind], xlabel="layer", ylabel="units kept, %" if place == 0 else "", ylim=(0, 100))
        axes.xaxis.get_major_locator().set_params(integer=True)
        plain(axes)
    return figure


def domain_bars(domains: Bpb) -> Figure:
    """Held-out bits per byte of all arms by domain, and below how far each arm is from the dense model.

    Args:
        domains: {domain: {"dense_bpb": ..., "koff_bpb": ..., "memory_off_bpb": ..., "swapped_bpb": ...}}.
    """
    names = list(domains)
    figure = Figure(figsize=(max(6.0, 2.0 + 1.1 * len(names)), 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    _bars(above, {arm: [domains[name][f"{arm}_bpb"] for name in names] for arm in ARM_STYLE})
    rest = [arm for arm in ARM_STYLE if arm != "dense"]
    _bars(below, {arm: [_against_dense(domains[name], arm) for name in names] for arm in rest})
    above.set(ylabel="bits per byte", title="Held-out text: less is better")
    above.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.1))
    below.set(ylabel="change against dense, %")
    below.axhline(0, color=BLACK, linewidth=0.8)
    below.set_xticks(range(len(names)), names, rotation=30 if max(map(len, names)) > 8 else 0)
    for axes in (above, below):
        axes.tick_params(axis="x", length=0)
    return figure


def arms_compared(rows: Sequence[Point], sparsity: float) -> Figure:
    """Bits per byte of every arm at one sparsity, a line each, the best on top; every seed is a dot.

    Args:
        rows: {"arm", "sparsity", "bpb": by seed, "mean"} as in `claims.json`.
        sparsity: Which of its sparsities.
    """
    shown = sorted((row for row in rows if row["sparsity"] == sparsity), key=lambda row: -row["mean"])
    figure = Figure(figsize=(7, 1.2 + 0.28 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(shown):
        colour = ARM_STYLE.get(row["arm"], ("", BLACK))[1]
        axes.plot(row["bpb"], [place] * len(row["bpb"]), "o", color=colour, markersize=4, alpha=0.5)
        axes.plot(row["mean"], place, "|", color=colour, markersize=14, markeredgewidth=2)
        beside = axes.get_yaxis_transform()  # x in shares of the width
        axes.text(1.01, place, f"{row['mean']:.4f}", transform=beside, va="center", fontsize=8)
    for row in shown:
        if row["arm"] in ("dense", "dense_memory"):
            axes.axvline(row["mean"], color=GREY, linewidth=0.8, linestyle="--" if row["arm"] == "dense" else ":")
    axes.set_yticks(range(len(shown)), [row["arm"] for row in shown])
    axes.set(xlabel="bits per byte of held-out text (less is better)", title=f"Arms at {100 * sparsity:g} %")
    plain(axes)
    return figure


def quality_by_sparsity(rows: Sequence[Point]) -> Figure:
    """Bits per byte by sparsity, one line per arm; one sparsity alone is a mark, an arm without a mask a level line.

    Args:
        rows: {"arm", "sparsity", "removed", "mean", "sd"} as in `claims.json`.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for place, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
        points = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["removed"])
        colour = ARM_STYLE.get(arm, ("", MANY[place % len(MANY)]))[1]
        if arm in ("dense", "dense_memory"):
            level = "--" if arm == "dense" else ":"
            axes.axhline(points[0]["mean"], color=BLACK, linestyle=level, linewidth=1, label=arm)
            continue
        at, mean = [100 * point["removed"] for point in points], [point["mean"] for point in points]
        bars = [point["sd"] or 0 for point in points]
        line = ("-", "--")[place // len(MANY) % 2] if len(points) > 1 else ""  # where colours come round again
        style = MARKERS[place % len(MARKERS)] + line
        axes.errorbar(at, mean, bars, fmt=style, color=colour, label=arm, linewidth=1.6, markersize=5, capsize=2)
    axes.set(
        xlabel="parameters removed, % of body", ylabel="bits per byte of held-out text", title="Quality by sparsity"
    )
    plain(axes)
    axes.legend(frameon=False, fontsize=8, handlelength=3, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write `folder/name.png` and `.svg`.

    Raises:
        KoffError: The disk did not take it.
    """
    figure.draw_without_rendering()  # lays it out once for both files
    figure.set_layout_engine(None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=150)
        figure.savefig(folder / f"{name}.svg")
    except OSError as error:
        raise KoffError(f"cannot write plots to {folder}: {error.strerror or error}") from error


def _bars(axes: Axes, values: Mapping[str, Sequence[float | None]]) -> None:
    """Grouped bars from zero, one group for each domain; arms without figures are left out."""
    shown = {arm: row for arm, row in values.items() if any(value is not None for value in row)}
    width = 0.8 / max(len(shown), 1)
    for place, (arm, row) in enumerate(shown.items()):
        label, colour = ARM_STYLE[arm]
        at = np.arange(len(row)) + (place - (len(shown) - 1) / 2) * width
        axes.bar(at, [np.nan if value is None else value for value in row], width, color=colour, label=label)
    plain(axes)


def _against_dense(row: Mapping[str, float | None], arm: str) -> float | None:
    dense, value = row["dense_bpb"], row[f"{arm}_bpb"]
    return None if dense is None or value is None else 100 * (value / dense - 1)


def _edges(steps: Sequence[int]) -> np.ndarray:
    """Cell borders around the steps, [points + 1]."""
    at = np.asarray(steps, dtype=float)
    if len(at) == 1:
        return np.array([at[0] - 0.5, at[0] + 0.5])
    middle = (at[1:] + at[:-1]) / 2
    return np.concatenate([[2 * at[0] - middle[0]], middle, [2 * at[-1] - middle[-1]]])


def plain(axes: Axes, grid: str = "y") -> None:
    """No frame, and a light grid behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
