import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.image import imread

from koff_lightning.reports import plots

ARMS = ("dense_bpb", "koff_bpb", "memory_off_bpb", "swapped_bpb")
GROUPS = [(layer, kind) for layer in range(3) for kind in ("channel", "kv_group")]


def points(count):
    return [
        {"step": 1 + i, "target": 0.1, "expected": 0.09, "realised": 0.11, "removed": [0.1 * i] * len(GROUPS)}
        for i in range(count)
    ]


def domains(**rows):
    return {name: dict(zip(ARMS, row, strict=True)) for name, row in rows.items()}


def test_bars_start_at_zero_and_the_change_is_against_dense():
    figure = plots.domain_bars(domains(en=(1.0, 1.01, 1.2, 1.1), law=(2.0, 1.9, 2.2, 2.1)))
    above, below = figure.axes
    assert above.get_ylim()[0] == 0
    assert [label.get_text() for label in below.get_xticklabels()] == ["en", "law"]
    heights = [bar.get_height() for bar in below.containers[0]]
    assert heights == pytest.approx([1.0, -5.0])  # KOFF, in percent


def test_arms_without_figures_are_left_out():
    above, _ = plots.domain_bars(domains(en=(1.0, 1.01, 1.2, None))).axes
    assert [text.get_text() for text in above.get_legend().get_texts()] == ["dense", "KOFF", "memory off"]


def test_a_domain_without_text_leaves_a_gap():
    above, below = plots.domain_bars(domains(en=(1.0, 1.0, 1.0, 1.0), law=(None,) * 4)).axes
    assert len(above.patches) == 8
    assert len(below.patches) == 6


def test_layers_are_rows_and_kinds_are_panels():
    figure = plots.sparsity_by_layer(points(5), GROUPS)
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["FFN neurons", "kv groups"]
    assert panels[0].collections[0].get_array().shape == (3, 5)


def test_one_kind_makes_one_panel():
    figure = plots.sparsity_by_layer([{"step": 1, "removed": [0.5]}], [(0, "channel")])
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["FFN neurons"]


def test_the_axis_names_the_denominator():
    (axes,) = plots.sparsity_over_training(points(5), "body").axes
    assert axes.get_ylabel() == "parameters removed, % of body"
    assert axes.get_ylim()[0] == 0
    assert [line.get_ydata()[0] for line in axes.lines] == pytest.approx([10.0, 9.0, 11.0])


def test_both_formats_are_written(tmp_path):
    plots.save(plots.sparsity_over_training(points(3), "body"), tmp_path / "plots", "sparsity")
    assert imread(tmp_path / "plots" / "sparsity.png").shape[1] > 600
    assert ElementTree.parse(tmp_path / "plots" / "sparsity.svg").getroot().tag.endswith("svg")


def test_arms_and_their_curve():
    row = {"arm": "koff", "sparsity": 0.1, "bpb": [1.0, 1.1], "mean": 1.05, "sd": 0.07, "removed": 0.1}
    dense = row | {"arm": "dense", "bpb": [0.9], "mean": 0.9, "sd": None, "removed": 0.0}
    further = row | {"sparsity": 0.3, "bpb": [1.4], "mean": 1.4, "sd": None, "removed": 0.3}
    alone = row | {"arm": "ddp"}
    (axes,) = plots.arms_compared([row, dense, further, alone], 0.1).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["koff", "ddp", "dense"]
    (axes,) = plots.quality_by_sparsity([row, dense, further, alone]).axes
    lines = {container.get_label(): container[0] for container in axes.containers}
    assert lines["koff"].get_xydata() == pytest.approx(np.array([[10, 1.05], [30, 1.4]]))
    assert len(lines["ddp"].get_xydata()) == 1 and "dense" not in lines
