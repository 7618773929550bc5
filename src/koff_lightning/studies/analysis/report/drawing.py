"""What all pictures of a study share. Colours are Okabe and Ito's, or lie on a map that is safe like them."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize

GREEN, SKY = "#009E73", "#56B4E9"
WIDE = 6.2  # inches, of all figures: their text is then of one size in the page


def heat(axes: Axes, values: np.ndarray, words: str, colours: str, low: float | None = None) -> None:
    """A heat map [rows, columns], with its values written into the cells unless `words` is empty."""
    known = values[np.isfinite(values)]
    scale = Normalize(known.min() if low is None else low, max(known.max(), 1e-9))
    axes.pcolormesh(
        np.where(np.isfinite(values), values, np.nan), cmap=colours, norm=scale, rasterized=values.size > 400
    )
    axes.set(xlim=(0, values.shape[1]), ylim=(values.shape[0], 0))
    map_ = axes.collections[0].get_cmap()
    for (row, column), value in np.ndenumerate(values):
        if words and np.isfinite(value):
            ink = _ink(map_, scale(value))
            axes.text(column + 0.5, row + 0.5, words.format(value), color=ink, ha="center", va="center", fontsize=8)


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
