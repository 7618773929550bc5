"""The rules of docs/claims.md, on figures that decide them."""

import math
from pathlib import Path

import numpy as np
import pytest

from koff_lightning.studies.bootstrap import Sample
from koff_lightning.studies.claims import general, text, verdicts
from koff_lightning.studies.claims.arms import AFTER, Run
from koff_lightning.studies.claims.paired import PairedDraws
from koff_lightning.studies.claims.report import gap_closure
from koff_lightning.studies.claims.verdicts import CLAIMS, judge

HOLDS = {"dense": 1.2, "dense_memory": 1.19, "koff": 1.195, "no_memory": 1.3, "two_stage": 1.25}
HOLDS |= {"lora_equal": 1.22, "kv_equal": 1.23} | dict.fromkeys(AFTER, 1.24)


def judged(figures, noise=1e-4, seeds=(0, 1, 2), within=None):
    """Verdicts on bits per byte by arm; `within`: others within texts."""

    def sample_of(part):
        read = figures | (within or {}) if part.inside else figures
        if set(part.arms) - set(read):
            return Sample({}, {}, [])
        draws = {
            arm: value + noise * np.random.default_rng(i).normal(size=10_000)
            for i, (arm, value) in enumerate(read.items())
        }
        return Sample({arm: read[arm] for arm in part.arms}, {arm: draws[arm] for arm in part.arms}, seeds)

    return {verdict.name: verdict for verdict in judge(sample_of)}


def test_all_claims_can_hold():
    assert {verdict.word for verdict in judged(HOLDS).values()} == {"supported"}


@pytest.mark.parametrize(
    ("changed", "claims"),
    [
        ({"koff": 1.213}, {"a", "a, within", "a, fair", "b"}),  # 1.1 % above dense, GC* = 0.87
        ({"dense_memory": 1.15, "koff": 1.19}, {"a, fair"}),
        ({"no_memory": 1.211}, {"b"}),  # 0.9 %: inside the margin
        ({"koff": 1.209, "dense_memory": 1.2}, {"b"}),  # 0.9 % lost, GC* = 0.91
        ({"dense_memory": 1.1, "koff": 1.151}, {"a, fair", "b, fair"}),
        ({"kv_equal": 1.19}, {"c"}),
        ({"random_memory": 1.19}, {"d"}),
        ({"two_stage": 1.19}, {"d"}),
    ],
)
def test_each_can_fail(changed, claims):
    found = judged(HOLDS | changed)
    assert {name for name, verdict in found.items() if verdict.word == "not supported"} == claims
    assert {verdict.word for name, verdict in found.items() if name not in claims} == {"supported"}


def test_within_texts_other_figures_decide():
    found = judged(HOLDS, within={"koff": 1.213})
    assert {name for name, verdict in found.items() if verdict.word == "not supported"} == {"a, within"}


def test_an_interval_across_the_bound_decides_nothing():
    found = judged(HOLDS | {"koff": 1.2115}, noise=0.005)["a"]
    assert found.word == "not decided"
    assert found.findings[0].found.low < verdicts.MARGIN < found.findings[0].found.high


def test_one_seed_or_a_missing_arm_decides_nothing():
    assert {verdict.word for verdict in judged(HOLDS, seeds=(0,)).values()} == {"not decided"}
    found = judged({arm: value for arm, value in HOLDS.items() if arm != "kv_equal"})
    assert found["c"].word == "not decided"
    assert found["c"].findings[1].why == "no common seed of koff, kv_equal"
    assert found["d"].word == "supported"


def test_one_part_that_fails_decides_whatever_the_others_lack():
    figures = {arm: value for arm, value in HOLDS.items() if arm != "flap_memory"} | {"two_stage": 1.19}
    assert judged(figures)["d"].word == "not supported"


def test_the_page_tells_the_chance_of_a_wrong_verdict():
    """A wrong "not supported" needs one part on its wrong side, so over all claims these chances add."""
    page = (Path(__file__).parents[1] / "docs" / "claims.md").read_text()
    parts, side = sum(len(parts) for _, parts in CLAIMS.values()), (1 - verdicts.LEVEL) / 2
    assert f"{parts} parts x {side:.2%} = {parts * side:.1%}".replace("%", " %") in page


def test_the_page_has_the_rules_of_the_code():
    page = (Path(__file__).parents[1] / "docs" / "claims.md").read_text()
    for name, (claim, _) in CLAIMS.items():
        assert f"| ({name}) | {claim.partition(':')[0]}" in page
    assert f"{verdicts.LEVEL:.1%}".replace("%", " %") in page
    assert "< 1 %" in page and verdicts.MARGIN == 0.01 and "0.95 (m - d)" in page and verdicts.RECOVERED == 0.95


def test_a_figure_that_one_domain_lacks_is_none_of_the_run():
    """As memories off where the bare mask cannot score one language."""
    whole = {"bytes": [10.0, 20.0], "nats": {"koff": [7.0, 14.0], "memory_off": [9.0, 18.0]}}
    lacks = whole | {"nats": {"koff": [8.0, 16.0]}}
    done = {Run("koff", 0.12, seed): {"documents": {"de": whole, "zh": lacks if seed else whole}} for seed in (0, 1)}
    paired = PairedDraws(done, {name: (("koff",), name) for name in ("koff", "memory_off")})
    assert (paired.of(("koff",)).seeds, paired.of(("memory_off", "koff")).seeds) == ([0, 1], [0])


class Drawn:
    """Stands for PairedDraws: each arm lies between two ends, evenly, and is measured in their middle."""

    def __init__(self, **ends):
        self.draws = {arm: np.linspace(*pair, 1001) for arm, pair in ends.items()}

    def of(self, arms):
        if set(arms) - set(self.draws):
            return Sample({}, {}, [])
        return Sample({arm: self.draws[arm].mean() for arm in arms}, {arm: self.draws[arm] for arm in arms}, [0, 1])


def test_gap_closure_is_what_is_won_back_of_what_was_lost():
    still = {"dense": (1.0, 1.0), "memory_off": (1.3, 1.3)}
    found = gap_closure(Drawn(**still, koff=(1.0, 1.2), no_memory=(1.2, 1.2)))
    assert found["gc"] == pytest.approx({"value": 0.2 / 0.3, "low": 0.35, "high": 1 - 0.05 / 3}, abs=1e-3)
    assert found["gc_star"] == pytest.approx({"value": 0.5, "low": 0.025, "high": 0.975}, abs=1e-3)
    assert gap_closure(Drawn(**still, koff=(1.1, 1.1), no_memory=(0.99, 1.1)))["gc_star"] is None, "perhaps no gap"
    assert gap_closure(Drawn(**still, koff=(1.1, 1.1)))["gc_star"] is None, "no run"


# --------------------------------------------------------------------------------------------------- general text


def general_run(**bpb):
    """Results of a run by what it scores on one general text of three documents."""
    sizes = [10.0, 20.0, 30.0]
    nats = {arm: [value * math.log(2) * size for size in sizes] for arm, value in bpb.items()}
    mean = {f"{arm}_bpb": value for arm, value in bpb.items()}
    mean |= {f"{arm}_bpb": None for arm in ("dense", "memory_off", "swapped") if arm not in bpb}
    return {"general": {"mean": mean}, "general_documents": {"web": {"bytes": sizes, "nats": nats}}}


def test_general_text_is_told_bare_and_under_any_memory():
    koff = {Run("koff", 0.12, s): general_run(dense=2.0, memory_off=2.2 + s / 100, swapped=2.4) for s in (0, 1)}
    alone = {Run("no_memory", 0.12, s): general_run(dense=2.0, memory_off=2.25 + s / 100) for s in (0, 1)}
    older = {Run("koff", 0.12, 2): {"mean": {}, "general_documents": None}}  # was made without such text
    found = general.figures(older | koff | alone)
    assert found["texts"] == {"web": 60} and found["dense"] == 2.0
    bare, under = found["arms"]["koff"]["bare"], found["arms"]["koff"]["any memory"]
    assert bare["bpb"] == [2.2, 2.21] and under["bpb"] == [2.4, 2.4]
    assert bare["against_dense"]["value"] == pytest.approx(0.1025)
    assert bare["against_dense"]["low"] < 0.1025 < bare["against_dense"]["high"]
    difference = bare["against_alone"]  # the same in both seeds and all documents, so it is certain
    assert difference == pytest.approx({"value": -0.05, "low": -0.05, "high": -0.05})
    assert under["against_dense"] == pytest.approx({"value": 0.2, "low": 0.2, "high": 0.2})
    assert found["arms"]["no_memory"]["bare"]["against_alone"] is None
    assert found["arms"]["no_memory"]["any memory"] == {"bpb": [], "against_dense": None, "against_alone": None}
    page = text._general(found)
    assert "web (60 bytes); dense 2.0000" in page
    cells = [line.split(" | ") for line in page.splitlines() if line.startswith("| koff")]
    assert cells[0][1] == "2.2050 ± 0.0071" and cells[0][3] == "-0.0500 [-0.0500, -0.0500]"
    assert cells[0][4:] == ["2.4000 ± 0.0000", "+20.00 % [+20.00, +20.00] |"]


def test_no_general_text_is_nothing():
    assert general.figures({Run("koff", 0.12, 0): {"mean": {}}}) is None


# ------------------------------------------------------------------------------------------------------ the page

ROW = {"arm": "koff", "sparsity": 0.12, "bpb": [1.0, 1.2], "against_dense": 0.05, "gc": 0.5, "gc_star": None}
ROW |= {"removed": 0.1189, "active": 1_500_000, "net": -0.051, "stored": 2_000_000, "seconds": 90.4, "tokens": 1234567}


def test_a_line_of_the_arms_holds_their_figures():
    shown = dict(zip(text.ARM_HEAD[2:], text._arm(ROW)[2:], strict=True))
    assert shown == {
        "bits per byte": "1.1000 ± 0.1414",
        "against dense": "+5.00 %",
        "GC": "0.50",
        "GC*": "",
        "removed of body": "11.9 %",
        "active": "1.500 M",
        "net": "-5.1 %",
        "stored": "2.000 M",
        "seconds": "90",
        "tokens": "1,234,567",
    }
    bare = text._arm(ROW | dict.fromkeys(("against_dense", "active", "net", "stored", "seconds", "tokens", "gc")))
    assert bare[2:] == ["1.1000 ± 0.1414", "", "", "", "11.9 %", "", "", "", "", ""]
    assert text._arm(ROW | {"bpb": [1.5]})[2] == "1.5000", "one run does not spread"


def test_the_curve_has_a_column_for_each_share_in_order():
    rows = [ROW | {"sparsity": share, "bpb": [bpb]} for share, bpb in ((0.5, 2.0), (0.12, 1.0), (0.25, 1.5))]
    rows += [row | {"arm": "dense"} for row in rows] + [ROW | {"arm": "no_memory"}]
    rows += [ROW | {"arm": "flap", "sparsity": 0.25, "against_dense": 0.1}]
    curve = text._curve({"sparsities": [0.12, 0.5, 0.25], "arms": rows}).split("\n\n")[2].splitlines()
    assert curve[0] == "| arm | 12 % | 25 % | 50 % |"
    assert curve[2:] == [
        "| koff | 1.0000 (+5.0 %) | 1.5000 (+5.0 %) | 2.0000 (+5.0 %) |",
        "| flap |  | 1.1000 ± 0.1414 (+10.0 %) |  |",
    ]
    assert text._curve({"sparsities": [0.12], "arms": rows}) == ""


@pytest.mark.parametrize(
    ("figure", "said"),
    [
        ("koff / dense - 1", "koff / dense - 1: +1.00 % [-2.00, +3.00], below 4 %"),
        ("koff - dense", "koff - dense: +0.0100 [-0.0200, +0.0300], below 0.04"),
    ],
)
def test_a_ratio_is_told_in_percent_and_a_difference_in_bits(figure, said):
    part = {"figure": figure, "must_be": "below", "bound": 0.04, "why": ""}
    part["found"] = {"value": 0.01, "low": -0.02, "high": 0.03}
    assert text._finding(part) == said
    assert text._finding(part | {"found": None, "why": "no run"}).endswith(
        " not measured, " + said.split("], ")[1] + " (no run)"
    )


def test_memories_of_one_kind_are_told_with_their_sizes():
    equal = {"both": 12_000, "lora_equal": {"rank": 6, "parameters": 12_100, "ratio": 12_100 / 12_000}}
    equal["kv_equal"] = {"slots": 40, "parameters": 12_240, "ratio": 1.02}
    said = text._equal(equal)
    assert "has 12,000 parameters" in said and "`lora_equal` has 12,100 (rank 6, 1.0083 times as many)" in said
    assert "`kv_equal` 12,240 (40 slots, 1.0200 times)" in said
    assert text._equal({}) == ""
