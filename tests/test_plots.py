import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from koff_lightning.reports import plots
from koff_lightning.studies.claims.arms import ARMS as ARMS_OF_CLAIMS

pytestmark = pytest.mark.usefixtures("drawn_pictures")
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


def test_without_the_dense_model_there_is_no_change_to_show():
    figure = plots.domain_bars(domains(law=(None, 1.7, 2.8, None)))
    (axes,) = figure.axes
    assert axes.get_ylabel() == "bits per byte"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["law"]
    assert figure.get_figheight() < plots.domain_bars(domains(law=(1.5, 1.7, 2.8, None))).get_figheight()


def test_without_memories_there_is_one_bar_of_the_pruned_model():
    rows = domains(en=(1.0, 1.2, 1.2, None), law=(1.0, 1.3, 1.3, None))
    above, below = plots.domain_bars(rows | {"general:web": rows["en"] | {"koff_bpb": None}}).axes
    assert [text.get_text() for text in above.get_legend().get_texts()] == ["dense", "pruned"]
    assert len(above.patches) == 6 and len(below.patches) == 3
    assert not np.isnan([bar.get_height() for bar in below.patches]).any()


def test_bars_of_one_domain_are_not_wide():
    for names in (["law"], "abcdefgh"):
        rows = domains(**{name: (1.0, 1.1, 1.2, 1.3) for name in names})
        axes = plots.domain_bars(rows).axes[0]
        left, right = axes.get_xlim()
        assert all(bar.get_width() < 0.06 * (right - left) for bar in axes.patches)
        assert all(left < bar.get_x() and bar.get_x() + bar.get_width() < right for bar in axes.patches)


def test_layers_are_rows_and_kinds_are_panels():
    figure = plots.sparsity_by_layer(points(5), GROUPS)
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["FFN neurons", "kv groups"]
    assert panels[0].collections[0].get_array().shape == (3, 5)


def test_one_kind_makes_one_panel():
    figure = plots.sparsity_by_layer([{"step": 1, "removed": [0.5]}], [(0, "channel")])
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["FFN neurons"]


def test_all_kinds_share_one_scale_that_has_a_name():
    removed = [0.4 if kind == "channel" else 0.0 for _, kind in GROUPS]
    figure = plots.sparsity_by_layer([{"step": step, "removed": removed} for step in (1, 2)], GROUPS)
    *panels, bar = figure.axes
    assert [axes.collections[0].get_clim() for axes in panels] == [(0, pytest.approx(40.0))] * 2
    assert bar.get_ylabel() == "removed, % of the layer's units"


def test_the_first_layer_is_on_top():
    axes = plots.sparsity_by_layer(points(5), GROUPS).axes[0]
    assert axes.get_ylim() == (2.5, -0.5)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2"]


def test_few_layers_all_have_a_tick_and_many_have_some():
    for count, ticks in ((6, list(range(6))), (28, list(range(0, 28, 3)))):
        kept = [{"layer": layer, "kind": "channel", "of": 8, "kept": 4} for layer in range(count)]
        (axes,) = plots.kept_by_layer(kept).axes
        assert list(axes.get_xticks()) == ticks


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


def test_one_sparsity_makes_no_curve(tmp_path):
    row = {"arm": "koff", "sparsity": 0.1, "bpb": [1.0], "mean": 1.0, "sd": None, "removed": 0.1}
    plots.save(plots.quality_by_sparsity([row, row | {"arm": "dense", "removed": 0.0}]), tmp_path, "sparsity")
    assert not list(tmp_path.iterdir())


def test_an_arm_has_one_colour_in_all_pictures():
    shown = ("dense", "dense_memory", *ARMS_OF_CLAIMS)
    row = {"sparsity": 0.1, "bpb": [1.0], "mean": 1.0, "sd": None, "removed": 0.1}
    rows = [row | {"arm": arm, "mean": 1.0 + place} for place, arm in enumerate(shown)]
    (compared,) = plots.arms_compared(rows, 0.1).axes
    marks = {line.get_ydata()[0]: line.get_color() for line in compared.lines if line.get_marker() == "|"}
    colours = {label.get_text(): marks[place] for place, label in enumerate(compared.get_yticklabels())}
    (curve,) = plots.quality_by_sparsity([*rows, row | {"arm": "koff", "removed": 0.3}]).axes
    drawn = dict(zip(*reversed(curve.get_legend_handles_labels()), strict=True))
    lines = {arm: getattr(handle, "lines", [handle])[0] for arm, handle in drawn.items()}
    assert {arm: line.get_color() for arm, line in lines.items()} == colours
    few = [row | {"arm": "no_memory", "removed": share} for share in (0.1, 0.3)]
    (alone,) = plots.quality_by_sparsity(few).axes
    assert alone.containers[0][0].get_color() == colours["no_memory"], "whatever other arms there are"
    (above, _) = plots.domain_bars(domains(en=(1.0, 1.2, 1.2, None))).axes
    assert [to_hex(bar.get_facecolor()).upper() for bar in above.patches] == [colours["dense"], colours["no_memory"]]


def test_every_arm_of_claims_looks_like_no_other():
    looks = [plots.arm_style(arm)[:2] for arm in ("dense", "memory_off", "swapped", *ARMS_OF_CLAIMS)]
    assert len(set(looks)) == len(looks)


def test_the_marks_of_the_first_and_last_arm_are_not_cut():
    row = {"sparsity": 0.1, "bpb": [1.0], "sd": None, "removed": 0.1}
    for count in (1, 2, 20):
        figure = plots.arms_compared([row | {"arm": str(i), "mean": 1.0 + i} for i in range(count)], 0.1)
        figure.draw_without_rendering()
        (axes,) = figure.axes
        frame = axes.get_window_extent()
        for line in axes.lines:
            at = axes.transData.transform(line.get_xydata()[0])[1]
            half = line.get_markersize() / 2 * figure.dpi / 72
            assert frame.y0 <= at - half and at + half <= frame.y1
