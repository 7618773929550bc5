"""The paper's own analyses: the ends of the LAPE ranking (Table 3), embeddings beside the dense model's (app. B)."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_run import DOMAINS, RandomText, tiny_module

from koff_lightning import KoffError
from koff_lightning.studies.analysis import paper
from koff_lightning.studies.analysis.ranking import ends, ranking
from koff_lightning.studies.analysis.report.findings import _statement
from koff_lightning.studies.analysis.similarity import (
    centroid_cosine,
    embedded,
    linear_cka,
    resampled,
    shared_neighbours,
    similarity,
)

RATES = np.array([[0.9, 0.0], [0.5, 0.5], [0.8, 0.1], [0.0, 0.0], [0.4, 0.4], [0.3, 0.5], [0.0, 0.7], [0.2, 0.6]])


def test_both_ends_of_the_ranking():
    specific, general = ends(RATES, 0.25)
    assert specific.tolist() == [True, False, False, False, False, False, True, False]
    assert general.tolist() == [False, True, False, False, True, False, False, False]
    assert not (ends(RATES, 0.6)[0] & ends(RATES, 0.6)[1]).any(), "the ends never meet"
    assert not (ends(RATES, 0.5)[0] | ends(RATES, 0.5)[1])[3], "a silent neuron is at neither"


def test_shares_removed_of_the_ends():
    gone = np.array([True, False, True, False, False, False, True, False])
    (line,) = ranking(RATES, {"neuron": gone}, 0.25).to_dict("records")
    assert (line["ranked"], line["all"], line["specific"], line["general"]) == (2, 3 / 8, 1.0, 0.0)
    assert line["specific_ratio"] == pytest.approx(8 / 3) and line["general_ratio"] == 0
    nothing = ranking(RATES, {"gate": gone, "up": np.zeros(8, dtype=bool)}, 0.25)
    assert nothing["what"].tolist() == ["gate", "up"] and np.isnan(nothing["specific_ratio"][1])


def test_alignment_does_not_see_rotation_scale_or_shift():
    x = torch.randn(60, 8, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    assert linear_cka(x, 3 * x @ turn + 5) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x, torch.randn(60, 8)) < 0.5
    # The published form: HSIC of the Gram matrices, centred on both sides.
    y = torch.randn(60, 5, dtype=torch.float64) + x[:, :5]
    centre = torch.eye(60, dtype=torch.float64) - 1 / 60
    k, m = (centre @ (v @ v.T) @ centre for v in (x, y))
    assert linear_cka(x, y) == pytest.approx(float((k * m).sum() / (k.norm() * m.norm())), abs=1e-10)


def test_neighbours_and_centroids():
    x = torch.randn(40, 6)
    assert shared_neighbours(x, 2 * x, 5) == 1
    assert shared_neighbours(x, torch.randn(40, 6), 5) < 0.5
    line = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    assert shared_neighbours(line, line[[0, 2, 1, 3]], 1) == 0
    assert centroid_cosine(line, line, ["a", "a", "b", "b"]) == pytest.approx(1)
    assert centroid_cosine(line, line[[2, 3, 0, 1]], ["a", "a", "b", "b"]) == pytest.approx(0.0998, abs=1e-3)


def test_drawn_rows_are_measured_as_if_they_were_the_text():
    """Each draw's alignment and centroids are those of the rows that it drew, copies and all; they agree on average."""
    torch.manual_seed(0)
    x = torch.randn(30, 6, dtype=torch.float64)
    y = x + 0.5 * torch.randn(30, 6, dtype=torch.float64)
    classes = ["a"] * 12 + ["b"] * 18
    drawn = resampled(x, y, classes, k=4)
    assert drawn.shape == (10_000, 3)
    random = np.random.default_rng(0)
    first = [random.multinomial(n, np.full(n, 1 / n), 10_000)[0] for n in (12, 18)]
    rows = torch.from_numpy(np.repeat(np.arange(30), np.concatenate(first)))
    kinds = [classes[row] for row in rows]
    assert drawn[0, 0] == pytest.approx(linear_cka(x[rows], y[rows]), abs=1e-9)
    assert drawn[0, 2] == pytest.approx(centroid_cosine(x[rows], y[rows], kinds), abs=1e-9)
    assert drawn[:, 1].mean() == pytest.approx(shared_neighbours(x, y, 4), abs=0.01)


# ------------------------------------------------------------------- the paper's statements, on planted figures


def words(lines):
    return {verdict.says: verdict.word for verdict in paper.judge(pd.DataFrame(lines))}


def ranked(specific, general, other, runs=6, size=4000, seed=0):
    """Verdicts on Table 3, of gate alike in every run but by chance: shares removed of both ends and of the rest."""
    random = np.random.default_rng(seed)
    rates = np.column_stack([np.linspace(0.2, 0.01, size), np.linspace(0.001, 0.2, size)])
    ends_of = ends(rates)
    share = np.where(ends_of[0], specific, np.where(ends_of[1], general, other))
    return paper.ends_lines(rates, {"gate": [random.random(size) < share for _ in range(runs)]})


@pytest.mark.parametrize(
    "shares, verdicts",
    [
        ((0.3, 0.02, 0.15), ("supported", "supported")),
        ((0.02, 0.3, 0.15), ("contradicted", "contradicted")),
        ((0.15, 0.15, 0.15), ("not decided", "not decided")),
        ((0.3, 0.3, 0.05), ("supported", "contradicted")),
    ],
)
def test_table_3_is_judged_against_the_average(shares, verdicts):
    lines = ranked(*shares)
    assert tuple(words(lines).values()) == verdicts
    assert set(words(ranked(*shares, runs=1)).values()) == {"not decided"}, "one run tells nothing of the next"
    gone = shares[0] - (0.15 * shares[0] + 0.15 * shares[1] + 0.7 * shares[2])
    assert lines[0]["value"] == pytest.approx(gone, abs=0.02)
    assert lines[0]["low"] < lines[0]["value"] < lines[0]["high"]


def test_runs_that_disagree_decide_nothing():
    """The spread of the runs counts: of one run the specific are spared, of the other two hit hard."""
    rates = np.column_stack([np.linspace(0.2, 0.01, 4000), np.linspace(0.001, 0.2, 4000)])
    random, (specific, _) = np.random.default_rng(0), ends(rates)
    masks = [random.random(4000) < np.where(specific, share, 0.15) for share in (0.05, 0.4, 0.4)]
    lines = paper.ends_lines(rates, {"neuron": masks})
    assert lines[0]["value"] > 0.08 and words(lines)[paper.SPECIFIC] == "not decided"


def test_gate_and_up_must_both_show_it():
    random, (specific, _) = np.random.default_rng(0), ends(RATES := np.random.default_rng(1).random((4000, 3)))
    hit, not_hit = ([random.random(4000) < np.where(specific, share, 0.15) for _ in range(6)] for share in (0.4, 0.15))
    assert words(paper.ends_lines(RATES, {"gate": hit, "up": hit}))[paper.SPECIFIC] == "supported"
    assert words(paper.ends_lines(RATES, {"gate": hit, "up": not_hit}))[paper.SPECIFIC] == "not decided"


def layered(k, v, runs=3, noise=0.005, kind=None):
    """Verdicts on Figure 4 of shares removed of k and v by layer."""
    random, found = np.random.default_rng(0), []
    for _ in range(runs):
        found.append([])
        for name, shares in (("k_channel", k), ("v_channel", v)) if kind is None else ((kind, k),):
            for layer, share in enumerate(shares):
                kept = 1 - share - noise * random.standard_normal()
                found[-1].append({"layer": layer, "kind": name, "kept": 10_000 * kept, "of": 10_000})
    lines = paper.layer_lines(found)
    return words(lines) if lines else {}


HILL, FLAT, VALLEY = [0.05, 0.2, 0.3, 0.3, 0.2, 0.05], [0.15] * 6, [0.3, 0.2, 0.05, 0.05, 0.2, 0.3]


def test_a_figure_without_an_interval_is_told_without_one():
    group = [{"layer": layer, "kind": "kv_group", "kept": 9, "of": 10} for layer in range(6)]
    (verdict,) = paper.judge(pd.DataFrame(paper.layer_lines([group])))
    text = _statement(verdict).text
    assert "inf" not in text and text.endswith("middle third 0.000. One run decides nothing."), text


def test_runs_that_agree_in_coarse_steps_decide_nothing():
    """Each run loses one of four kv groups in the same layer, as two may by chance: no sign that a third does too."""
    run = [{"layer": layer, "kind": "kv_group", "kept": 4 - (layer == 5), "of": 4} for layer in range(6)]
    (verdict,) = paper.judge(pd.DataFrame(paper.layer_lines([run, run])))
    assert verdict.word == "not decided"
    assert verdict.figures["value"].tolist() == [0, 0.25]
    assert _statement(verdict).text.endswith("0.250. Runs that agree exactly give no interval.")


def test_figure_4_is_judged_by_layers_and_by_kind():
    less = [share - 0.05 for share in HILL]
    assert layered(HILL, less) == {paper.MIDDLE: "supported", paper.K_MORE: "supported"}
    assert layered(VALLEY, HILL)[paper.MIDDLE] == "not decided", "on average there is neither hill nor valley"
    assert layered(VALLEY, VALLEY)[paper.MIDDLE] == "contradicted"
    assert layered(less, HILL)[paper.K_MORE] == "contradicted"
    assert layered(FLAT, FLAT) == {paper.MIDDLE: "not decided", paper.K_MORE: "not decided"}
    assert layered([*HILL[:5], 0.3], [*HILL[:5], 0.3])[paper.MIDDLE] == "not decided", "one end is no valley"
    assert set(layered(HILL, less, runs=1).values()) == {"not decided"}
    assert layered(HILL, None, kind="kv_group") == {paper.MIDDLE: "supported"}, "k and v go together there"
    assert layered([0.1, 0.3], [0.1, 0.2]) == {paper.K_MORE: "supported"}, "two layers have no middle"
    assert layered(HILL, None, kind="channel") == {}


def aligned(values, runs=3, noise=0.001):
    """Verdict on appendix B of three measures with memories off; `koff` lines of the table are not looked at."""
    random, lines, drawn = np.random.default_rng(0), [], []
    for run in range(runs):
        own = np.array(values) + noise * random.standard_normal(3)
        both = (("memory_off", own), ("koff", np.full(3, 0.5)))
        lines += [{"run": run, "view": view, **dict(zip(paper.MEASURES, one, strict=True))} for view, one in both]
        draws = own + noise * random.standard_normal((10_000, 3))
        drawn.append(pd.DataFrame(draws, columns=list(paper.MEASURES)).assign(run=run))
    return words(paper.similarity_lines(pd.DataFrame(lines), pd.concat(drawn)))[paper.STAYS]


def test_appendix_b_needs_all_three_measures_near_one():
    assert aligned([0.99, 0.95, 0.999]) == "supported"
    assert aligned([0.99, 0.85, 0.999]) == "contradicted"
    assert aligned([0.99, 0.9005, 0.999]) == "not decided"
    assert aligned([0.99, 0.95, 0.999], noise=0.05) == "not decided"
    assert aligned([0.99, 0.95, 0.999], runs=1) == "not decided"


def test_the_rules_stand_on_the_page():
    """Five statements share 5 %; the page has each statement with its bound."""
    page = (Path(__file__).parents[1] / "docs" / "analysis.md").read_text(encoding="utf-8")
    assert pytest.approx(0.99) == paper.LEVEL
    assert "level 1 - 0.05 / 5 = 99 %" in page and f"above {paper.NEAR}" in page
    assert all(f"| {says} |" in page for says in paper.SOURCES)


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    module = tiny_module(tmp_path_factory.mktemp("similar"))
    module.configure_model()
    return module.model.eval()


def test_an_open_mask_without_memory_is_the_dense_model(module):
    module.gates.harden(torch.ones_like(module.gates.kept))
    batches = list(RandomText().test_dataloader()) * 2
    found = similarity(module, batches, k=3)
    table = found["similarity"].set_index("view")
    assert found["similarity_draws"].to_numpy() == pytest.approx(1), "whichever rows are drawn"
    assert table.loc["memory_off", ["cka", "neighbours", "centroids"]].tolist() == pytest.approx([1, 1, 1])
    assert table["rows"].tolist() == [16, 16]


def test_what_is_removed_shows(module):
    closed = torch.ones_like(module.gates.kept)
    closed[: len(closed) // 2] = False
    module.gates.harden(closed)
    batches = list(RandomText().test_dataloader())
    assert similarity(module, batches, k=3)["similarity"].set_index("view")["cka"]["memory_off"] < 0.9999
    assert not torch.equal(embedded(module, batches, "dense"), embedded(module, batches, "memory_off"))
    assert {domain for batch in batches for domain in batch["domains"]} == set(DOMAINS)


def test_fewer_rows_than_neighbours_are_refused(module):
    with pytest.raises(KoffError, match="needs more than 10 rows of held-out text, got 8"):
        similarity(module, list(RandomText().test_dataloader()))
