"""What all pictures of a study share. Colours are Okabe and Ito's, or lie on a map that is safe like them."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize

GREEN, SKY = "#009E73", "#56B4E9"
WIDE = 6.2  # inches, of all figures: their text is then of one size in the page


def heat(
    axes: Axes,
    values: np.ndarray,
    words: str,
    colours: str,
    low: float | None = None,
    shades: np.ndarray | None = None,
) -> None:
    """A heat map [rows, columns], with its values written into the cells unless `words` is empty.

    Args:
        axes: Where.
        values: What is written.
        words: Format of the values.
        colours: Name of a colour map.
        low: What has the first of its colours; the least value by default.
        shades: What is coloured, in place of the values, [rows, columns].
    """
    shades = values if shades is None else shades
    known = shades[np.isfinite(shades)]
    scale = Normalize(known.min() if low is None else low, max(known.max(), 1e-9))
    axes.pcolormesh(
        np.where(np.isfinite(shades), shades, np.nan), cmap=colours, norm=scale, rasterized=values.size > 400
    )
    axes.set(xlim=(0, values.shape[1]), ylim=(values.shape[0], 0))
    map_ = axes.collections[0].get_cmap()
    for (row, column), value in np.ndenumerate(values):
        if words and np.isfinite(value):
            ink = _ink(map_, scale(shades[row, column]))
            axes.text(column + 0.5, row + 0.5, words.format(value), color=ink, ha="center", va="center", fontsize=8)


def within_rows(values: np.ndarray, first: int | None = None) -> np.ndarray:
    """Where each value lies between the least (0) and the most (1) of its row, or of the `first` of the row."""
    low, high = (end(values[:, :first], axis=1, keepdims=True) for end in (np.nanmin, np.nanmax))
    return np.clip((values - low) / np.where(high > low, high - low, 1.0), 0, 1)


def _ink(colours: Colormap, place: float) -> str:
    """White or near-black, whichever stands out from a cell's colour."""
    red, green, blue, _ = colours(place)
    return "#ffffff" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5 else "#111111"


def ticks(axes: Axes, columns: int, rows: list[int] | None) -> None:
    """Number the columns of a heat map, and its rows if they are numbers; not more than 16 of either."""
    step = -(-columns // 16)
    axes.set_xticks(np.arange(0, columns, step) + 0.5, range(0, columns, step))
    if rows is not None:
        step = -(-len(rows) // 16)
        axes.set_yticks(np.arange(0, len(rows), step) + 0.5, rows[::step])
