"""Verdicts follow from the intervals of both comparisons, and from what a memory takes beyond the controls."""

import pandas as pd
import pytest
from scipy import stats

from koff_lightning.studies.analysis import paper
from koff_lightning.studies.analysis.report.findings import (
    _causal,
    _knockout,
    _ratio,
    _removal,
    _statement,
    _transfer,
    findings,
)
from koff_lightning.studies.analysis.study import Settings, Study

TESTS = pd.DataFrame({"both": [30], "marked": [40], "removed": [300], "neurons": [1000]})


def pooled(layers, cells):
    rows = [("layers", *layers), ("cells", *cells)]
    return pd.DataFrame(rows, columns=["within", "low", "high"]).assign(odds_ratio=1.0)


@pytest.mark.parametrize(
    ("layers", "cells", "verdict"),
    [
        ((2, 4), (1.1, 3), "yes"),
        ((2, 4), (0.5, 1.5), "open"),  # silent neurons go, whoever they serve
        ((0.1, 0.5), (0.2, 0.9), "no"),
        ((0.1, 0.5), (2, 4), "open"),
        ((2, 4), (float("nan"),) * 2, "open"),  # no cell holds both kinds: the strict comparison has not been made
    ],
)
def test_removal_is_told_where_both_comparisons_agree(layers, cells, verdict):
    found = _removal(pooled(layers, cells), TESTS, "Specific neurons")
    assert found.verdict == verdict
    assert ("nothing can be said" in found.text) == (cells[0] != cells[0])


def test_a_ratio_of_single_seeds_is_open():
    row = pd.Series({"against": "wanda_sp", "ratio": 2.0, "low": 1.5, "high": 3.0, "note": ""})
    assert _ratio(row).verdict == "yes"
    assert _ratio(row.replace("", "one seed")).verdict == "open"


def put_back(off, on, control_off, control_on):
    """Four domains whose text gains so much, each a little apart."""
    rows = []
    for number, domain in enumerate(("de", "fr", "es", "ru")):
        gains = {"off_after": off, "on_after": on, "off_control": control_off, "on_control": control_on}
        row = {"run": "a", "domain": domain, "neurons": 3, "off_before": 1.0, "on_before": 1.0}
        rows.append(row | {name: 1.0 - gain - 1e-5 * number for name, gain in gains.items()})
        rows[-1]["off_after"] -= 1e-4 * number
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ((0.05, 0.01, 0.01, 0.01), "yes"),
        ((0.051, 0.01, 0.051, 0.01), "open"),  # the memory takes as much of any neuron's gain
        ((0.05, 0.05, 0.05, 0.01), "no"),
    ],
)
def test_knowledge_has_moved_only_beyond_what_the_controls_lose(gains, verdict):
    table = put_back(*gains)
    if verdict == "open":
        table["off_after"] += [0.002, -0.002, 0.003, -0.003]
    (found,) = _causal(table)
    assert found.verdict == verdict
    assert "an interval over 4 domains" in found.text


def test_rows_without_controls_do_not_count():
    table = put_back(0.05, 0.01, 0.01, 0.01)
    table.loc[0, ["off_control", "on_control"]] = float("nan")
    (found,) = _causal(table)
    assert "Mean over 3 domains" in found.text
    assert "nan" not in found.text


def test_specialists_without_controls_were_removed_all_the_same():
    table = put_back(0.05, 0.01, 0.01, 0.01).assign(off_control=float("nan"), on_control=float("nan"))
    (found,) = _causal(table)
    assert f"{table['neurons'].sum()} removed specialists were put back" in found.text
    (none,) = _causal(table.assign(neurons=0, off_after=float("nan"), on_after=float("nan")))
    assert "No neuron that is specific to a domain was removed" in none.text


def test_one_domain_of_one_run_is_no_mean():
    (found,) = _causal(put_back(0.05, 0.01, 0.01, 0.01)[:1])
    assert "Mean over" not in found.text
    assert "One domain in one run." in found.text


def test_the_best_memory_is_told_apart_from_no_memory():
    rows = [("a", "de", 1.0, 1.1, 1.2, 1.4), ("a", "fr", 1.0, 1.1, 1.4, 1.2)]  # no memory is better still
    (found,) = _transfer(pd.DataFrame(rows, columns=["run", "domain", "dense", "none", "de", "fr"]))
    assert "among the memories, the own one is best for 100% of domains" in found.text


def test_a_removal_is_told_in_means_over_runs():
    """18 and 30 of 40 are 60 %, a tenth and three tenths of all 20 %."""
    tests = pd.concat([TESTS, TESTS.assign(both=18, removed=100)])
    text = _removal(pooled((2, 4), (1.1, 3)), tests, "Specific neurons").text
    assert "24 of 40 are removed (mean of 2 runs), 60% where 20% of all are." in text
    assert "those of others of the same layer [2.00, 4.00]." in text
    assert "those of others of the same layer, activity and importance [1.10, 3.00]." in text
    assert "(mean of" not in _removal(pooled((2, 4), (1.1, 3)), TESTS, "Specific neurons").text
    assert _removal(pooled((2, 4), (1.1, 3)), TESTS.assign(marked=0), "G2").text == "G2: there are none."


def test_costs_and_gains_of_memories_are_means_over_domains_and_runs():
    """Another memory costs 0.2, 0.3, 0.1 and -0.2 more than the own one, which gains 0.1, 0.6, 0.2 and 0.5."""
    rows = [("a", "de", 1.0, 1.3, 1.2, 1.4), ("a", "fr", 1.0, 1.8, 1.5, 1.2)]
    rows += [("b", "de", 1.0, 1.4, 1.2, 1.3), ("b", "fr", 1.0, 1.9, 1.2, 1.4)]
    table = pd.DataFrame(rows, columns=["run", "domain", "dense", "none", "de", "fr"])
    (found,) = _transfer(table)
    assert "costs 0.1000 bits per byte more than the own one, which gains 0.3500 over none" in found.text
    assert "best for 75% of domains" in found.text and found.verdict == "open"
    (found,) = _transfer(table.assign(de=table["fr"], fr=table["de"]))
    assert "costs -0.1000" in found.text and found.verdict == "no"
    (found,) = _transfer(table[table["run"] == "a"])
    assert found.verdict == "yes"


@pytest.mark.parametrize(("both", "said"), [(1.3, "0.2000: 0.0500 more"), (1.4, "0.1000: 0.0500 less")])
def test_what_both_parts_gain_is_set_against_the_sum_of_each(both, said):
    row = {"run": "a", "domain": "de", "none": 1.5, "lora": 1.4, "kv": 1.45, "both": both}
    shifted = row | {name: row[name] + 1 for name in ("none", "lora", "kv", "both")}
    table = pd.DataFrame([row, shifted]).assign(synergy=lambda t: t["lora"] + t["kv"] - t["none"] - t["both"])
    assert f"gains 0.1000 bits per byte, the slots alone 0.0500, both {said} than their sum." in _knockout(table).text


def gained(off, control, on, control_on):
    """A domain whose text gains so many thousandths of a bit per byte."""
    gains = {"off_after": off, "off_control": control, "on_after": on, "on_control": control_on}
    row = {"run": "a", "neurons": 3, "off_before": 2.0, "on_before": 1.5}
    return row | {name: row[f"{name.partition('_')[0]}_before"] - gain / 1000 for name, gain in gains.items()}


def test_what_comes_back_is_told_in_thousandths_and_judged_over_domains():
    """Specialists lose 30 - 10, 50 - 10 and 70 - 16 more than the controls: by Student's interval over three."""
    rows = [gained(50, 30, 20, 20), gained(80, 30, 30, 20), gained(110, 36, 40, 20)]
    table = pd.DataFrame(rows).assign(domain=["de", "fr", "zh"])
    (found,) = _causal(table)
    assert "Put back, 9 removed specialists gain their domains 80.00 thousandths of a bit per byte" in found.text
    assert "with memories off and 30.00 with them on; as many others" in found.text
    assert "gain 32.00 (off) and 20.00 (on). Mean over 3 domains and runs." in found.text
    low, high = stats.t.interval(0.95, 2, 38, stats.sem([20, 40, 54]))
    assert f"lose 38.00 more of their gain to the memory than the others do [{low:.2f}, {high:.2f}]" in found.text
    assert found.verdict == ("yes" if low > 0 else "open")


def test_ratios_within_layers_and_the_text_are_told_in_sentences():
    """Of the specific neurons alone, a line for each mask that is compared with."""
    row = {"class": "specific", "within": "layers", "ratio": 2.0, "low": 1.5, "high": 3.0, "note": ""}
    rows = [row | {"against": name} for name in ("wanda_sp", "flap")]
    rows += [row | {"against": "none", "within": "cells"}, row | {"against": "none", "class": "G2"}]
    found = Study(Settings(), about={"stability": "the halves agree on 9 of 10"})
    found.tables["ratios"] = pd.DataFrame(rows)
    said = [line.text for line in findings(found)]
    assert [text.partition("?")[0] for text in said[:2]] == ["More selective than wanda_sp", "More selective than flap"]
    assert said[2:] == ["Is there enough text? The halves agree on 9 of 10."]


def test_one_figure_without_an_interval_is_told_beside_one_that_has_it():
    row = {"figure": "removed", "value": 0.25, "low": 0.125, "high": 0.5, "bound": 0.2, "above": True, "runs": 2}
    both = pd.DataFrame([row, row | {"figure": "kept", "low": float("-inf"), "high": float("inf"), "bound": 0}])
    text = _statement(paper.Verdict(paper.MIDDLE, "not decided", both)).text
    assert "removed 0.250 [0.125, 0.500] (above 0.2 wanted); kept 0.250." in text and "inf" not in text
    assert text.endswith("Runs that agree exactly give no interval.")
    assert "agree exactly" not in _statement(paper.Verdict(paper.MIDDLE, "supported", both[:1])).text
