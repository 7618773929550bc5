"""Pictures of a study: what an axis cuts off is shown to go on, and colours tell what is asked."""

import re
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from koff_lightning.studies.analysis.report import figures, memory_figures, page, words
from koff_lightning.studies.analysis.report.drawing import heat, within_rows
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


def test_each_selection_is_named_beside_its_odds():
    rows = [{"rate": 0.1, "bar": bar, "specific": n, "within": "cells"} for bar, n in ((0.95, 8), (0.9, 30))]
    rows = [row | {"odds_ratio": odds, "low": 0.5, "high": 9.0} for row, odds in zip(rows, (2.0, 3.0), strict=True)]
    figure = figures._selections(study(selections=rows))
    (axes,) = figure.axes
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["8 neurons, bar 95 %", "30 neurons, bar 90 %"]
    assert [(odds, round(height)) for odds, height, _ in points(figure)] == [(2.0, 0), (3.0, 1)]
    assert [round(place) for place in axes.get_yticks()] == [0, 1]


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
    values = np.array([[2.0, 4.0, 1.0], [2.0, 4.0, 9.0], [3.0, 3.0, 3.5]])
    assert within_rows(values, 2) == pytest.approx(np.array([[0, 1, 0], [0, 1, 1], [0, 0, 0.5]]))


@pytest.mark.parametrize("colours", ["cividis", "cividis_r", "hsv"])
def test_what_is_written_into_a_cell_can_be_read(colours):
    """In the ink whose luminance is further from the cell's, but for greys between, where either can be read."""
    shades = np.linspace(0, 1, 33)[None]
    axes = Figure().add_subplot()
    heat(axes, shades, "{:.2f}", colours)
    for text, (*colour, _) in zip(axes.texts, axes.collections[0].get_cmap()(shades[0]), strict=True):
        light = np.dot((0.2126, 0.7152, 0.0722), colour)
        if abs(light - 0.5) > 0.05:
            assert (text.get_color() == "#ffffff") == (light < 0.5)


@pytest.mark.parametrize(("name", "own"), [("transfer", "+20.0"), ("perplexity", "1.20")])
def test_the_own_memory_stands_out_however_hard_the_text(name, own):
    rows = [(1.0, 1.3, 1.2, 1.4), (90.0, 99.0, 97.0, 96.0)]
    columns = ["dense", "none", "de", "fr"]
    table = pd.DataFrame(rows, columns=columns).assign(run="a", domain=["de", "fr"])
    (axes,) = getattr(memory_figures, name)(study(**{name: table})).axes
    shades = axes.collections[0].get_array()[:, :3]
    memories = [label.get_text() for label in axes.get_xticklabels()][:2]
    texts = [label.get_text() for label in axes.get_yticklabels()]
    assert list(axes.get_yticks()) == [0.5, 1.5] and list(axes.get_xticks())[:2] == [0.5, 1.5]
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
    assert beside(axes, 1)
    left, right = axes.get_xlim()
    assert all(bar.get_width() < 0.1 * (right - left) for bar in axes.patches)


ROWS = [{"run": "a", "domain": "de", "layer": i, "head": j, "mass": 0.1} for i in range(2) for j in range(2)]


@pytest.mark.parametrize("gone", [False, True])
def test_empty_cells_are_explained_and_the_first_layer_is_on_top(gone):
    (axes,) = memory_figures.attention(study(attention=ROWS[: 3 if gone else 4])).axes
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


def heights(axes):
    return [bar.get_height() for bar in axes.patches]


def beside(axes, groups):
    """The bars' middles in order: none on another, as many near 0 as near 1 and so on, each series left to right."""
    middles = [bar.get_x() + bar.get_width() / 2 for bar in axes.patches]
    ordered = sorted(middles)
    assert all(b - a >= axes.patches[0].get_width() - 1e-9 for a, b in pairwise(ordered))
    series = [middles[first : first + groups] for first in range(0, len(middles), groups)]
    assert [[round(middle) for middle in one] for one in series] == [list(range(groups))] * len(series)
    firsts = [one[0] for one in series]
    return firsts == sorted(firsts)


def test_the_bars_of_a_layer_add_up_to_what_it_lost():
    """Over runs: means of the counts, and shares of all neurons of a class together. Other masks are not asked."""
    counts = {"specific": [(4, 1), (0, 0), (2, 2), (0, 0)], "G2": [(2, 0), (4, 3), (2, 1), (2, 1)]}  # marked, both
    removed, rows = [3, 6, 7, 4], []  # of 16 each: layers 0 and 1 of run a, then of b
    for name, cells in counts.items():
        for place, (marked, both) in enumerate(cells):
            row = {"kind": "koff", "run": "ab"[place // 2], "layer": place % 2, "class": name, "neurons": 16}
            rows.append(row | {"removed": removed[place], "marked": marked, "both": both})
    others = [row | {"kind": "bare", "run": "c", "removed": 16} for row in rows]
    left, right = figures._removed_by_layer(study(layers=[*rows, *others])).axes
    assert heights(left) == [1.5, 0, 0.5, 2, 3, 3]  # of both layers: specific, general, neither
    assert [bar.get_y() + bar.get_height() for bar in left.patches][4:] == [5, 5], "means of 3 and 7, and of 6 and 4"
    wanted = [100 * 3 / 6, np.nan, 100 * 1 / 4, 100 * 4 / 6, 100 * 6 / 22, 100 * 6 / 26]
    assert heights(right) == pytest.approx(wanted, nan_ok=True)
    assert left.get_ylabel() == "neurons, mean over runs"
    assert beside(right, 2)


def test_the_mask_is_drawn_over_all_runs():
    runs = {"a": {"kept": [{"kind": "channel", "layer": 0, "kept": 6, "of": 8}]}}
    runs["a"]["kept"] += [{"kind": "channel", "layer": 1, "kept": 8, "of": 8}]
    runs["b"] = {"kept": [{"kind": "channel", "layer": layer, "kept": 3, "of": 8} for layer in (0, 1)]}
    runs["b"]["kept"].append({"kind": "kv_group", "layer": 0, "kept": 1, "of": 4})
    first, second = figures._sparsity(Study(Settings(), about={"runs": runs})).axes
    by_title = {axes.get_title(): heights(axes) for axes in (first, second)}
    assert sorted(by_title.values()) == [pytest.approx([43.75, 31.25]), pytest.approx([75.0])]
    assert first.get_ylim()[1] == second.get_ylim()[1] > 75
    assert (first.get_ylabel(), second.get_ylabel()) == ("removed, %", "")


def points(figure):
    """(place, height, marker) of the single points within the frame."""
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 1 and line.get_clip_on()]
    return [(line.get_xdata()[0], round(float(line.get_ydata()[0]), 2), line.get_marker()) for line in lines]


def test_odds_stand_where_their_class_and_comparison_do():
    values = {("specific", "koff"): (0.5, 0.6), ("specific", "bare"): (0.7, 0.8)}
    values |= {("G2", "koff"): (2.0, 30.0), ("G2", "bare"): (4.0, 5.0)}
    rows = [
        {"kind": kind, "class": name, "within": within, "odds_ratio": odds, "low": odds / 2, "high": odds * 2}
        for (name, kind), pair in values.items()
        for within, odds in zip(("layers", "cells"), pair, strict=True)
    ]
    figure = figures._forest(study(pooled=rows))
    (axes,) = figure.axes
    labels = dict(zip((text.get_text() for text in axes.get_yticklabels()), axes.get_yticks(), strict=True))
    assert next(iter(labels)) == "specific, koff", "the studied runs come first"
    found = {(odds, height) for odds, height, _ in points(figure)}
    names = {"specific": "specific", "G2": "general (G2)"}
    wanted = set()
    for (name, kind), pair in values.items():
        middle = labels[f"{names[name]}, {kind}"]
        wanted |= {(odds, round(middle - 0.16 + 0.32 * step, 2)) for step, odds in enumerate(pair) if odds < 20}
    assert found == wanted
    assert len({marker for *_, marker in points(figure)}) == 2
    ends = {tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2}
    assert {(1.0, 4.0), (0.25, 1.0), (15.0, 20.0)} <= ends


def cells(axes):
    """Text of each cell of a heat map, by row and column."""
    return {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axes.texts}


def test_overlaps_stand_below_the_diagonal_in_units_of_chance():
    """In whichever order a pair is named."""
    pairs = [("koff/a", "koff/b", 0.4, 0.1), ("koff/a", "bare/c", 0.3, 0.2), ("bare/c", "koff/b", 0.1, 0.2)]
    rows = [dict(zip(("a", "b", "jaccard", "chance"), pair, strict=True)) for pair in pairs]
    (axes,) = figures._overlap(study(overlap=rows)).axes
    names = [text.get_text() for text in axes.get_yticklabels()]
    found = {frozenset(names[place] for place in cell): text for cell, text in cells(axes).items()}
    assert found == {frozenset(pair[:2]): text for pair, text in zip(pairs, ("4.0", "1.5", "0.5"), strict=True)}
    assert all(row > column for row, column in cells(axes))


def test_maps_of_attention_and_adapters_are_means_in_percent():
    rows = [{"run": "a", "domain": d, "layer": 1, "head": h, "mass": m} for d, h, m in (("de", 0, 0.1), ("fr", 0, 0.3))]
    rows += [{"run": "a", "domain": "de", "layer": 0, "head": 1, "mass": 0.5}]
    (axes,) = memory_figures.attention(study(attention=rows)).axes
    assert cells(axes) == {(1, 0): "20", (0, 1): "50"}
    rows = [{"linear": name, "layer": layer, "relative": 0.01 * (1 + layer)} for name in "qk" for layer in (0, 1)]
    rows += [row | {"relative": 3 * row["relative"]} for row in rows]
    (axes,) = memory_figures.adapters(study(adapters=rows)).axes
    assert cells(axes) == {(0, 0): "2.0", (0, 1): "4.0", (1, 0): "2.0", (1, 1): "4.0"}
    assert [text.get_text() for text in axes.get_yticklabels()] == ["q", "k"]


def test_a_part_of_a_memory_gains_what_lies_between_it_and_none():
    row = {"run": "a", "domain": "de", "none": 2.0, "lora": 1.5, "kv": 1.75, "both": 1.0}
    other = row | {"run": "b", "lora": 1.75, "both": 1.5}
    figure = memory_figures.knockout(study(knockout=[row, other, row | {"domain": "fr", "kv": 2.25}]))
    (axes,) = figure.axes
    assert heights(axes) == [0.375, 0.5, 0.25, -0.25, 0.75, 1.0]
    assert beside(axes, 2)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["de", "fr"]


def test_the_cards_of_the_page_are_means_and_sums():
    run = {"dense": "tiny", "base_hash": "0" * 64, "memories": {"de": 4, "fr": 4, "zh": 4}}
    about = {"runs": {"a": run | {"removed_of_body": 0.1}, "b": run | {"removed_of_body": 0.3}}}
    about["text"] = {"watched_tokens": {"de": 1000, "fr": 2500}, "heldout_bytes": {"de": 70, "fr": 8000}}
    found = Study(Settings(), about=about, tables={"neurons": pd.DataFrame({"layer": range(1200)})})
    said = page._numbers(found)
    shown = [part.split("</b>")[0] for part in said.split("<b>")[1:]]
    assert shown == ["20.0 %", "1,200", "3", "3,500", "8,070"]
    assert page._head(found).count("2 runs of tiny (hash 000000000000): a, b") == 1
    for count, doubt in ((1, "There is one run"), (2, "There are 2 runs"), (3, None)):
        found.about["runs"] = dict.fromkeys("abc"[:count], run)
        assert ("how much another seed would differ" in words.doubts(found)) == (doubt is not None)
        assert doubt is None or doubt in words.doubts(found)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (np.float64(0.123456), "0.1235"),
        (12345.0, "12,345"),
        (float("nan"), "–"),
        (-np.inf, "-∞"),
        (np.inf, "∞"),
        (None, "–"),
        (7, "7"),
        ("<b>", "&lt;b&gt;"),
        (["a", 1], "a, 1"),
        (0.0, "0"),
    ],
)
def test_cells_of_tables_on_the_page(value, shown):
    assert page._cell(value) == shown


def test_how_it_was_measured_names_the_settings_of_the_study():
    about = {"text": {"origin": "a.yaml", "watched_tokens": {"de": 12_000, "fr": 3}, "heldout_bytes": {"de": 4_500}}}
    found = Study(Settings(rate=0.05, bar=0.925, draws=12_345, resamples=6_789), about=about)
    said = " ".join(words.methods(found).split())
    for part in ("From a.yaml.", "(tokens: de 12,000, fr 3)", "(bytes: de 4,500)", "the bar is the 92.5th percentile"):
        assert part in said
    for part in ("the 5 % with the lowest entropy", "(6,789 draws)", "12,345 draws", "Bootstrap of 6,789 draws"):
        assert part in said


def test_pictures_of_one_page_share_no_names_and_follow_its_colours():
    """An id of one would else be found in another; inside of each all that is named is there."""
    drawn = {name: page.svg(memory_figures.attention(study(attention=ROWS)), name, 'a "b"') for name in ("one", "two")}
    ids = {name: set(re.findall(r' id="([^"]+)"', text)) for name, text in drawn.items()}
    assert ids["one"] and not ids["one"] & ids["two"]
    for name, text in drawn.items():
        assert {*re.findall(r"url\(#([^)]+)\)", text), *re.findall(r'href="#([^"]+)"', text)} <= ids[name]
        assert text.startswith('<svg role="img" aria-label="a &quot;b&quot;" ') and text.count("role=") == 1
        assert "#000000" not in text and "var(--ink)" in text and "<metadata" not in text
