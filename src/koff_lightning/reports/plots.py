"""Pictures of a run: the mask over training, held-out bits per byte by domain; and of many runs: arms compared.

Made with matplotlib's objects, not pyplot: nothing global is touched and no display is needed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from koff_lightning.support.errors import KoffError
from koff_lightning.support.mask_words import KIND_NAMES

# Okabe and Ito's palette, which tells apart under the common kinds of colour blindness
BLACK, GREY, BLUE, ORANGE, PURPLE = "#000000", "#999999", "#0072B2", "#E69F00", "#CC79A7"
MANY = ("#009E73", "#D55E00", "#56B4E9", BLACK)
MARKERS = ("s", "^", "v", "D", "P", "X", "*")
COLOURS = {"dense": GREY, "dense_memory": GREY, "koff": BLUE, "memory_off": ORANGE, "swapped": PURPLE}
# The other arms of `koff claims`. MANY comes round again, but no two of them have both colour and marker in common.
OTHER_ARMS = (
    *("no_memory", "two_stage", "shared_memory", "lora_only", "kv_only", "lora_equal", "kv_equal", "ddp"),
    *("fisher_prior", "magnitude", "wanda_sp", "flap", "random", "fisher"),
    *("magnitude_memory", "wanda_sp_memory", "flap_memory", "random_memory", "fisher_memory"),
)
DENSE = {"dense": "--", "dense_memory": ":"}  # arms without a mask, and the line at their level
SCORED = ("dense", "koff", "memory_off", "swapped")  # arms of one run
NAMES = {"dense": "dense", "koff": "KOFF", "memory_off": "memory off", "swapped": "swapped", "no_memory": "pruned"}
Point = Mapping[str, Any]
Bpb = Mapping[str, Mapping[str, float | None]]
Arms = Mapping[str, Sequence[float | None]]


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
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    top = float(removed.max()) or 100.0  # one scale for all panels: what looks alike is alike
    for axes, kind in zip(panels, kinds, strict=True):
        rows = [i for i, (_, k) in enumerate(groups) if k == kind]
        borders = np.arange(len(rows) + 1) - 0.5
        mesh = axes.pcolormesh(edges, borders, removed[:, rows].T, cmap="Blues", vmin=0, vmax=top, rasterized=True)
        number_layers(axes.yaxis, [groups[i][0] for i in rows], range(len(rows)))
        axes.set(title=KIND_NAMES[kind], xlabel="optimizer step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.invert_yaxis()  # layer 0 on top, as in all heat maps
    panels[0].set_ylabel("layer")
    figure.colorbar(mesh, ax=list(panels), label="removed, % of the layer's units")
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
        number_layers(axes.xaxis, [row["layer"] for row in rows])
        plain(axes)
    return figure


def domain_bars(domains: Bpb) -> Figure:
    """Held-out bits per byte of all arms by domain, and below how far each is from the dense model, if that was scored.

    Args:
        domains: {domain: {"dense_bpb": ..., "koff_bpb": ..., "memory_off_bpb": ..., "swapped_bpb": ...}}.
    """
    names = list(domains)
    arms = _scored(domains)
    change = {arm: _against(row, arms["dense"]) for arm, row in arms.items() if arm != "dense"}
    parts = 2 if any(value is not None for row in change.values() for value in row) else 1
    size = (max(6.0, 2.0 + 1.1 * len(names)), 1.1 + 2.7 * parts)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(parts, 1, sharex=True, squeeze=False)[:, 0]
    for axes, values in zip(panels, (arms, change), strict=False):
        _bars(axes, values)
        axes.tick_params(axis="x", length=0)
    panels[0].set(ylabel="bits per byte", title="Held-out text: less is better")
    panels[0].legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.1))
    if parts == 2:
        panels[1].set(ylabel="change against dense, %")
        panels[1].axhline(0, color=BLACK, linewidth=0.8)
    panels[-1].set_xticks(range(len(names)), names, rotation=30 if max(map(len, names)) > 8 else 0)
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
        colour, _, _ = arm_style(row["arm"])
        axes.plot(row["bpb"], [place] * len(row["bpb"]), "o", color=colour, markersize=4, alpha=0.5)
        axes.plot(row["mean"], place, "|", color=colour, markersize=14, markeredgewidth=2)
        beside = axes.get_yaxis_transform()  # x in shares of the width
        axes.text(1.01, place, f"{row['mean']:.4f}", transform=beside, va="center", fontsize=8)
    for row in shown:
        if row["arm"] in DENSE:
            colour, _, line = arm_style(row["arm"])
            axes.axvline(row["mean"], color=colour, linewidth=0.8, linestyle=line)
    axes.set_yticks(range(len(shown)), [row["arm"] for row in shown])
    axes.set_ylim(-0.6, len(shown) - 0.4)  # room for the marks of the first and the last
    axes.set(xlabel="bits per byte of held-out text (less is better)", title=f"Arms at {100 * sparsity:g} %")
    plain(axes)
    return figure


def quality_by_sparsity(rows: Sequence[Point]) -> Figure | None:
    """Bits per byte by sparsity, one line per arm; one sparsity alone is a mark, an arm without a mask a level line.

    None where no arm has two sparsities: there is no line to draw.

    Args:
        rows: {"arm", "sparsity", "removed", "mean", "sd"} as in `claims.json`.
    """
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    if len(rows) == len(arms):
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for arm in arms:
        points = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["removed"])
        colour, marker, line = arm_style(arm)
        if arm in DENSE:
            axes.axhline(points[0]["mean"], color=colour, linestyle=line, linewidth=1, label=arm)
            continue
        at, mean = [100 * point["removed"] for point in points], [point["mean"] for point in points]
        bars = [point["sd"] or 0 for point in points]
        style = marker + (line if len(points) > 1 else "")
        axes.errorbar(at, mean, bars, fmt=style, color=colour, label=arm, linewidth=1.6, markersize=5, capsize=2)
    axes.set(
        xlabel="parameters removed, % of body", ylabel="bits per byte of held-out text", title="Quality by sparsity"
    )
    plain(axes)
    axes.legend(frameon=False, fontsize=8, handlelength=3, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def save(figure: Figure | None, folder: Path, name: str) -> None:
    """Write `folder/name.png` and `.svg`; of a picture that there was no reason to draw nothing, nor an earlier one.

    Raises:
        KoffError: The disk did not take it.
    """
    if figure is None:
        for kind in ("png", "svg"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
        return
    figure.draw_without_rendering()  # lays it out once for both files
    figure.set_layout_engine(None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=150)
        figure.savefig(folder / f"{name}.svg")
    except OSError as error:
        raise KoffError(f"cannot write plots to {folder}: {error.strerror or error}") from error


def arm_style(arm: str) -> tuple[str, str, str]:
    """Colour, marker and line of an arm: the same in every picture, whatever other arms it shows."""
    if arm in COLOURS:
        return COLOURS[arm], MARKERS[list(COLOURS).index(arm)], DENSE.get(arm, "-")
    place = OTHER_ARMS.index(arm) if arm in OTHER_ARMS else len(OTHER_ARMS)
    return MANY[place % len(MANY)], MARKERS[place % len(MARKERS)], ("-", "--")[place // len(MANY) % 2]


def room(axes: Axes, groups: int) -> None:
    """Leave room beside few groups of bars, which would be very wide without it."""
    spare = max(4 - groups, 0) / 2
    axes.set_xlim(-0.5 - spare, groups - 0.5 + spare)


def number_layers(axis: Axis, layers: Sequence[int], places: Sequence[int] | None = None, most: int = 12) -> None:
    """A tick for each layer, or for every second, third and so on where there are more than `most`.

    Args:
        axis: Of an axes, its x or y axis.
        layers: Their numbers.
        places: Where on the axis they are; at their numbers by default.
        most: How many ticks there is room for.
    """
    every = max(-(-len(layers) // most), 1)
    axis.set_ticks((layers if places is None else places)[::every], [str(layer) for layer in layers[::every]])


def _scored(domains: Bpb) -> Arms:
    """Bits per byte of each arm by domain. Without memories KOFF is the pruned model, and is not shown twice."""
    arms = {arm: [row[f"{arm}_bpb"] for row in domains.values()] for arm in SCORED}
    on, off = arms["koff"], arms["memory_off"]
    known = [(a, b) for a, b in zip(on, off, strict=True) if a is not None and b is not None]
    swapped = any(value is not None for value in arms["swapped"])  # memories, which happen to do nothing
    if known and not swapped and all(a == b for a, b in known):
        return {"dense": arms["dense"], "no_memory": [b if a is None else a for a, b in zip(on, off, strict=True)]}
    return arms


def _bars(axes: Axes, values: Arms) -> None:
    """Grouped bars from zero, one group for each domain; arms without figures are left out."""
    shown = {arm: row for arm, row in values.items() if any(value is not None for value in row)}
    width = 0.8 / max(len(shown), 1)
    for place, (arm, row) in enumerate(shown.items()):
        at = np.arange(len(row)) + (place - (len(shown) - 1) / 2) * width
        heights = [np.nan if value is None else value for value in row]
        axes.bar(at, heights, width, color=arm_style(arm)[0], label=NAMES[arm])
    room(axes, max(map(len, values.values())))
    plain(axes)


def _against(row: Sequence[float | None], dense: Sequence[float | None]) -> list[float | None]:
    """Change against the dense model in percent, where both are known."""
    pairs = zip(row, dense, strict=True)
    return [None if value is None or base is None else 100 * (value / base - 1) for value, base in pairs]


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
