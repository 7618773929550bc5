"""Pictures of a study: what an axis cuts off is shown to go on, and colours tell what is asked."""

import numpy as np
import pandas as pd
import pytest

from koff_lightning.studies.analysis.report import figures, memory_figures
from koff_lightning.studies.analysis.report.drawing import within_rows
from koff_lightning.studies.analysis.study import Settings, Study


def study(**tables):
    return Study(Settings(), tables={name: pd.DataFrame(rows) for name, rows in tables.items()})


def selection(low, high):
    ends = {"rate": 0.1, "bar": 0.9, "specific": 8, "within": "cells", "odds_ratio": 1.0, "low": low, "high": high}
    return study(selections=[ends])


def arrows(figure):
    """(marker, place) of what is drawn over the frame."""
    return [
        (line.get_marker(), line.get_xdata()[0])
        for line in figure.axes[0].lines
        if len(line.get_xdata()) and not line.get_clip_on()
    ]


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [
        (0.5, 2.0, []),
        (0.5, 42.0, [(">", 20)]),
        (0.01, 42.0, [("<", 0.05), (">", 20)]),
        (0.01, 0.5, [("<", 0.05)]),
        (0.5, np.inf, [(">", 20)]),
        (np.nan, np.nan, []),
    ],
)
def test_an_interval_beyond_the_axis_ends_in_an_arrow(low, high, marks):
    figure = figures._selections(selection(low, high))
    assert arrows(figure) == marks
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert ("interval goes on" in words) == bool(marks)


def test_the_forest_marks_only_the_classes_it_shows():
    row = {"kind": "koff", "within": "layers", "odds_ratio": 1.0, "low": 0.5, "high": 2.0}
    rows = [row | {"class": "G2"}, row | {"class": "specific:en", "high": 42.0}]
    figure = figures._forest(study(pooled=rows))
    assert arrows(figure) == []
    assert len(figure.legends[0].get_texts()) == 2


def test_shares_say_what_they_are_of_and_each_layer_has_its_tick():
    row = {"kind": "koff", "run": "a", "neurons": 8, "removed": 2, "marked": 2, "both": 1}
    rows = [row | {"layer": layer, "class": name} for layer in range(6) for name in ("specific", "G2")]
    left, right = figures._removed_by_layer(study(layers=rows)).axes
    assert right.get_ylabel() == "removed, % of the class"
    assert list(left.get_xticks()) == list(right.get_xticks()) == list(range(6))


@pytest.mark.parametrize(("count", "ticks"), [(6, range(6)), (28, range(0, 28, 3))])
def test_layers_of_the_mask_are_numbered(count, ticks):
    kinds = ("channel", "kv_group")
    kept = [{"kind": kind, "layer": layer, "kept": 3, "of": 4} for layer in range(count) for kind in kinds]
    found = Study(Settings(), about={"runs": {"a": {"kept": kept}}})
    assert [list(axes.get_xticks()) for axes in figures._sparsity(found).axes] == [list(ticks)] * 2


def test_a_text_is_coloured_by_what_is_best_for_it():
    assert within_rows(np.array([[1.0, 3.0, 2.0], [70.0, 60.0, 65.0], [5.0, 5.0, 5.0]])) == pytest.approx(
        np.array([[0, 1, 0.5], [1, 0, 0.5], [0, 0, 0]])
    )
    assert within_rows(np.array([[2.0, 4.0, 1.0]]), 2) == pytest.approx(np.array([[0, 1, 0]]))


@pytest.mark.parametrize(("name", "own"), [("transfer", "+20.0"), ("perplexity", "1.20")])
def test_the_own_memory_stands_out_however_hard_the_text(name, own):
    rows = [(1.0, 1.3, 1.2, 1.4), (90.0, 99.0, 97.0, 96.0)]
    columns = ["dense", "none", "de", "fr"]
    table = pd.DataFrame(rows, columns=columns).assign(run="a", domain=["de", "fr"])
    (axes,) = getattr(memory_figures, name)(study(**{name: table})).axes
    shades = axes.collections[0].get_array()[:, :3]
    memories = [label.get_text() for label in axes.get_xticklabels()][:2]
    texts = [label.get_text() for label in axes.get_yticklabels()]
    for text, line in zip(texts, shades, strict=True):
        assert line.min() == line[memories.index(text)] == 0
        assert line.max() == 1
    assert "within each text" in axes.get_xlabel()
    assert own in [text.get_text() for text in axes.texts], "the figures stay"


def test_what_comes_back_is_told_in_bits_per_byte_and_narrow_bars():
    row = {"domain": "zh", "run": "a", "neurons": 2, "off_before": 1.41, "off_after": 1.40, "off_control": 1.409}
    figure = memory_figures.causal(study(causal=[row | {"on_before": 1.3, "on_after": 1.29, "on_control": 1.299}]))
    (axes,) = figure.axes
    assert axes.get_ylabel() == "bits per byte gained"
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.01, 0.001, 0.01, 0.001])
    left, right = axes.get_xlim()
    assert all(bar.get_width() < 0.1 * (right - left) for bar in axes.patches)


@pytest.mark.parametrize("gone", [False, True])
def test_empty_cells_are_explained_and_the_first_layer_is_on_top(gone):
    rows = [{"run": "a", "domain": "de", "layer": i, "head": j, "mass": 0.1} for i in range(2) for j in range(2)]
    (axes,) = memory_figures.attention(study(attention=rows[: 3 if gone else 4])).axes
    assert ("removed heads" in axes.get_title()) == gone
    bottom, top = axes.get_ylim()
    assert bottom > top


def test_masks_of_different_layers_have_no_overlap_to_draw():
    row = {"a": "koff/a", "b": "koff/b", "jaccard": 0.0, "chance": 0.0}
    assert figures._overlap(study(overlap=[row])) is None
    both = [row, row | {"b": "koff/c", "jaccard": 0.3, "chance": 0.1}]
    (axes,) = figures._overlap(study(overlap=both)).axes
    assert [text.get_text() for text in axes.texts] == ["3.0"]


def test_the_mask_with_memories_off_is_not_called_by_the_papers_word_for_another():
    table = pd.DataFrame({"run": ["a"], "domain": ["de"], "dense": [3.0], "none": [4.0], "de": [3.5], "fr": [5.0]})
    (axes,) = memory_figures.perplexity(study(perplexity=table)).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["de", "fr", "memories\noff", "dense"]
