"""The statistics of enrichment: against tables done by hand, under the null, and under planted enrichment."""

import math

import numpy as np
import pytest

from koff_lightning.studies.analysis import (
    corrected,
    enrichment,
    enrichment_table,
    layer_table,
    logistic,
    odds_of_runs,
    odds_ratio_ratio,
    overlap,
    overlap_table,
    strata,
)
from koff_lightning.support.errors import KoffError


def of_tables(*tables: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Removed, marked and layer of neurons that give these tables (both, marked only, removed only, neither)."""
    removed, marked, layer = [], [], []
    for number, counts in enumerate(tables):
        for count, (m, r) in zip(counts, ((1, 1), (1, 0), (0, 1), (0, 0)), strict=True):
            removed += [bool(r)] * count
            marked += [bool(m)] * count
            layer += [number] * count
    return np.array(removed), np.array(marked), np.array(layer)


def test_a_table_done_by_hand():
    """R = 10*75/100 + 6*60/80 = 12, S = 5*10/100 + 4*10/80 = 1; RBG variance from the sums of P and Q."""
    found = enrichment(*of_tables((10, 5, 10, 75), (6, 4, 10, 60)))
    assert found.mh_odds_ratio == pytest.approx(12.0)
    r, s, p = np.array([7.5, 4.5]), np.array([0.5, 0.5]), np.array([85 / 100, 66 / 80])
    q = 1 - p
    variance = (p * r).sum() / 2 / 144 + (p * s + q * r).sum() / 2 / 12 + (q * s).sum() / 2
    assert math.log(found.mh_high) == pytest.approx(math.log(12) + 1.959964 * math.sqrt(variance))
    assert math.log(found.mh_low) == pytest.approx(math.log(12) - 1.959964 * math.sqrt(variance))
    excess = (10 - 15 * 20 / 100) + (6 - 10 * 16 / 80)
    spread = 15 * 85 * 20 * 80 / (100**2 * 99) + 10 * 70 * 16 * 64 / (80**2 * 79)
    from scipy.stats import chi2

    assert found.cmh_p == pytest.approx(chi2.sf(excess**2 / spread, 1))
    assert (found.marked, found.removed, found.both) == (25, 36, 16)
    assert found.note == "", "five are expected, which is enough"
    assert enrichment(*of_tables((10, 5, 9, 50))).note == "few members: expect little power"
    assert found.expected == pytest.approx(15 * 20 / 100 + 10 * 16 / 80)
    assert found.risk_ratio == pytest.approx(16 / 25 / (36 / 180))
    assert found.odds_ratio == pytest.approx(16.5 * 135.5 / (9.5 * 20.5))
    table = layer_table(*of_tables((10, 5, 10, 75), (6, 4, 10, 60)))
    assert table.loc[1, ["neurons", "marked", "removed", "both"]].tolist() == [80, 10, 16, 6]
    assert table.loc[0, "odds_ratio"] == pytest.approx(10.5 * 75.5 / (5.5 * 10.5))


def test_layers_confound_the_crude_ratio_and_not_the_pooled_one():
    found = enrichment(*of_tables((40, 40, 10, 10), (1, 9, 9, 81)))  # within each layer no difference at all
    assert found.odds_ratio > 2
    assert found.mh_odds_ratio == pytest.approx(1.0)


def drawn(seed: int, odds: float) -> tuple[np.ndarray, ...]:
    """600 neurons of three layers, of which the marked ones are removed at other odds than the rest."""
    random = np.random.default_rng(seed)
    layer, marked = np.repeat([0, 1, 2], 200), random.random(600) < 0.15
    base = np.array([0.1, 0.2, 0.4])[layer]
    chance = base / (1 - base) * np.where(marked, odds, 1.0)
    return random.random(600) < chance / (1 + chance), marked, layer


def test_p_values_are_uniform_under_the_null_and_small_when_enriched():
    null = np.array([enrichment(*drawn(seed, 1.0), draws=199, seed=seed).p_more for seed in range(300)])
    for level in (0.05, 0.2, 0.5, 0.8):
        share = float((null <= level).mean())
        assert abs(share - level) < 4 * math.sqrt(level * (1 - level) / 300) + 0.05 * level, (level, share)
    planted = [enrichment(*drawn(seed, 5.0), draws=999) for seed in range(20)]
    assert all(found.p_more < 0.02 for found in planted)
    assert np.mean([found.mh_low < 5 < found.mh_high for found in planted]) > 0.8


def test_the_permutation_is_the_hypergeometric_tail():
    """One stratum: P(X >= 4) and P(X <= 4) of 40 neurons, 10 marked, 9 removed."""
    from scipy.stats import hypergeom

    found = enrichment(*of_tables((4, 6, 5, 25)), draws=40_000)
    law = hypergeom(40, 10, 9)
    assert found.p_more == pytest.approx(law.sf(3), abs=0.01)
    assert found.p_less == pytest.approx(law.cdf(4), abs=0.01)
    assert enrichment(*of_tables((10, 0, 0, 90)), draws=99).p_more == 0.01, "never below one over all draws"


def test_cells_take_the_firing_rate_out():
    """Rare neurons are removed and specialists are rare: enriched by layer, not among equally rare neurons."""
    random = np.random.default_rng(3)
    rates, layer = random.beta(1, 3, (4000, 2)), np.repeat([0, 1], 2000)
    rare = rates.mean(1).argsort().argsort() / 4000
    removed, marked = random.random(4000) < (1 - rare) ** 3, random.random(4000) < (1 - rare) ** 3 / 2
    found = enrichment(removed, marked, layer, strata(layer, rates, random.random(4000), bins=10))
    assert found.mh_low > 1.5
    assert found.cell_low < 1.25
    assert found.cell_odds_ratio < found.mh_odds_ratio / 1.4


def test_strata_are_even_and_know_their_layer():
    random = np.random.default_rng(0)
    layer = np.repeat([0, 1], [300, 500])
    cells = strata(layer, random.random((800, 3)), random.random(800), bins=3)
    pairs = {(cell, number) for cell, number in zip(cells, layer, strict=True)}
    assert len(pairs) == len(np.unique(cells)) == 18
    sizes = np.bincount(cells)
    assert set(sizes[sizes > 0]) <= {33, 34, 55, 56}
    assert len(np.unique(strata(layer, random.random((800, 3)), random.random(800)))) == 18, "300 // 20 is 15, 3 by 3"
    assert len(np.unique(strata(layer, np.zeros((800, 3)), np.zeros(800), bins=2))) == 8, "ties go by place"


def test_silent_layers_are_named_and_change_nothing():
    telling = of_tables((10, 5, 10, 75))
    more = of_tables((10, 5, 10, 75), (0, 20, 0, 30), (0, 0, 10, 30))
    found = enrichment(*more)
    assert found.skipped == [1, 2]
    assert found.mh_odds_ratio == pytest.approx(enrichment(*telling).mh_odds_ratio)
    assert (found.p_more, found.p_less) == (enrichment(*telling).p_more, enrichment(*telling).p_less)


def test_one_member_and_one_removed_neuron_are_enough_to_tell():
    assert enrichment(*of_tables((1, 0, 9, 30), (1, 9, 0, 30), (0, 1, 10, 30), (1, 9, 9, 1)), draws=9).skipped == []


def test_what_cannot_be_said_is_nan_with_a_note():
    removed, _, layer = of_tables((10, 5, 10, 75))
    found = enrichment(removed, np.zeros(100, bool), layer)
    assert (found.note, found.skipped) == ("no neuron of this class", [0])
    assert all(math.isnan(value) for value in (found.risk_ratio, found.mh_odds_ratio, found.mh_low, found.p_more))
    found = enrichment(*of_tables((5, 0, 10, 80)))  # every member is removed
    assert found.mh_odds_ratio == math.inf
    assert math.isnan(found.mh_low)
    assert found.p_more < 0.01


def test_a_table_of_classes_is_corrected_for_their_number():
    removed, marked, layer = drawn(0, 5.0)
    classes = {"yes": marked, "no": np.roll(marked, 7), "none": np.zeros(600, bool)}
    table = enrichment_table(removed, classes, layer, draws=999).set_index("class")
    assert table.loc["yes", "q_more"] == pytest.approx(2 * table.loc["yes", "p_more"])
    assert math.isnan(table.loc["none", "q_more"])
    assert corrected(np.array([0.01, 0.04, np.nan, 0.03])) == pytest.approx([0.03, 0.04, np.nan, 0.04], nan_ok=True)


def test_regression_finds_the_class_and_leaves_the_confounds():
    random = np.random.default_rng(1)
    layer, rates = np.repeat(np.arange(8), 500), random.beta(1, 3, (4000, 3))
    specific, general, importance = random.random(4000) < 0.1, random.random(4000) < 0.1, random.lognormal(size=4000)
    logit = -2 + 1.5 * specific - 1.0 * general - 2 * rates.mean(1) - 0.8 * np.log(importance) + layer / 8
    removed = random.random(4000) < 1 / (1 + np.exp(-logit))
    found = logistic(removed, specific, general, rates, importance, layer)
    table = found.table.set_index("term")
    assert table.loc["specific", "coefficient"] == pytest.approx(1.5, abs=0.35)
    assert table.loc["general", "coefficient"] == pytest.approx(-1.0, abs=0.35)
    assert table.loc["log_importance", "p"] < 1e-6
    assert "clustered by 8 layers" in found.note
    alone = logistic(removed, specific, np.zeros(4000, bool), rates, importance, layer)
    assert "general" not in set(alone.table["term"])
    assert "general does not vary" in alone.note
    spared = logistic(removed & ~specific, specific, general, rates, importance, layer)
    assert "specific has no removed member" in spared.note
    assert "general" in set(spared.table["term"])
    named = logistic(specific, specific, general, rates, importance, layer)
    assert "specific has no kept member" in named.note
    even = logistic(removed, specific, general, np.full((4000, 3), 0.5), importance, layer)
    assert even.note.startswith("mean_rate does not vary; max_rate does not vary; ")
    assert even.table["term"].tolist() == ["specific", "general", "log_importance"]
    split = logistic(rates.mean(1) > 0.3, specific, general, rates, importance, layer)
    assert split.table.empty
    assert "no fit" in split.note


def test_the_ratio_of_two_ways_of_pruning():
    marked, layer = drawn(0, 1.0)[1:]

    def masks(odds: float, seeds: range) -> list[np.ndarray]:
        base = np.array([0.1, 0.2, 0.4])[layer]
        chance = base / (1 - base) * np.where(marked, odds, 1.0)
        return [np.random.default_rng(seed).random(600) < chance / (1 + chance) for seed in seeds]

    eager, even, again = masks(6.0, range(30, 35)), masks(1.0, range(10, 15)), masks(6.0, range(20, 25))
    found = odds_ratio_ratio(eager, even, marked, layer, draws=300)
    assert found.ratio == pytest.approx(found.first / found.second)
    assert 2 < found.low < found.ratio < found.high
    assert (found.seeds, found.note) == ((5, 5), "")
    same = odds_ratio_ratio(eager, again, marked, layer, draws=300)
    assert same.low < 1 < same.high
    # Seeds that are all alike leave the chance of the neurons; unlike ones add to it.
    alike = odds_ratio_ratio([eager[0]] * 5, [even[0]] * 5, marked, layer, draws=4000)
    assert alike.low < alike.ratio < alike.high
    mixed = odds_ratio_ratio([*even[:2], *eager[:3]], [even[0]] * 5, marked, layer, draws=4000)
    assert math.log(mixed.high / mixed.low) > 1.1 * math.log(alike.high / alike.low)
    one = odds_ratio_ratio(eager, even[:1], marked, layer, draws=100)
    assert "1 seed of one way" in one.note


def test_hardly_any_member_proves_nothing():
    """One member in either mask: a draw without it has no ratio, and may not be left out of the interval."""
    marked, layer = np.zeros(600, bool), np.repeat([0, 1, 2], 200)
    marked[:8] = True
    one, two = np.zeros((2, 600), bool)
    one[[0, *range(100, 130)]] = two[[0, *range(100, 140)]] = True  # the same member, fewer others
    found = odds_ratio_ratio([one], [two], marked, layer, draws=400)
    assert found.ratio > 1.2
    assert found.undefined > 0.2
    assert (found.low, found.high) == (0.0, math.inf)
    two[0] = False
    none = odds_ratio_ratio([one], [two], marked, layer, draws=400)
    assert math.isnan(none.low)
    assert "and the other 0: too few members" in none.note


def test_runs_are_pooled():
    marked, layer = drawn(0, 1.0)[1:]
    masks = [drawn(seed, 5.0)[0] for seed in range(3)]
    one = enrichment(masks[0], marked, layer)
    alone = odds_of_runs(masks[:1], marked, layer)
    assert (alone.odds_ratio, alone.low, alone.high) == (one.mh_odds_ratio, one.mh_low, one.mh_high)
    pooled = odds_of_runs(masks, marked, layer, draws=500)
    both = odds_ratio_ratio(masks, masks, marked, layer, draws=100)
    assert pooled.odds_ratio == pytest.approx(both.first)
    assert pooled.low < pooled.odds_ratio < pooled.high
    thrice = odds_of_runs(masks[:1] * 3, marked, layer, draws=2000)  # copies of a run are no more than the run
    assert math.log(thrice.high / thrice.low) == pytest.approx(math.log(one.mh_high / one.mh_low), rel=0.25)


def test_three_seeds_that_differ_leave_about_their_t_interval():
    from scipy import stats

    marked, layer = drawn(0, 1.0)[1:]
    base, masks = np.array([0.1, 0.2, 0.4])[layer], []
    for seed, odds in ((30, 1.0), (31, 3.0), (32, 9.0)):
        chance = base / (1 - base) * np.where(marked, odds, 1.0)
        masks.append(np.random.default_rng(seed).random(600) < chance / (1 + chance))
    logs = np.log([enrichment(mask, marked, layer, draws=1).mh_odds_ratio for mask in masks])
    found = odds_of_runs(masks, marked, layer, draws=1000)
    assert math.log(found.high / found.low) > 0.75 * 2 * stats.t.ppf(0.975, 2) * stats.sem(logs)


def test_overlap_against_chance():
    random = np.random.default_rng(0)
    layer = np.repeat([0, 1], [300, 700])

    def mask(first: int = 60, second: int = 84) -> np.ndarray:
        chosen = [random.choice(300, first, replace=False), 300 + random.choice(700, second, replace=False)]
        return np.isin(np.arange(1000), np.concatenate(chosen))

    found = [overlap(mask(), mask(150, 350), layer) for _ in range(1500)]
    assert found[0].expected == pytest.approx(60 * 150 / 300 + 84 * 350 / 700)
    assert np.mean([one.both for one in found]) == pytest.approx(found[0].expected, abs=4 * found[0].sd / 38)
    assert np.std([one.both for one in found]) == pytest.approx(found[0].sd, rel=0.08)
    assert found[0].chance == pytest.approx(72 / (144 + 500 - 72))
    same = mask()
    assert overlap(same, same, layer).jaccard == 1.0
    assert math.isnan(overlap(np.zeros(1000, bool), same, layer).z)
    pairs = overlap_table({"s0": same, "s1": mask(), "s2": mask()}, layer)
    assert list(zip(pairs["a"], pairs["b"], strict=True)) == [("s0", "s1"), ("s0", "s2"), ("s1", "s2")]


def test_bad_input_is_named():
    removed, marked, layer = of_tables((10, 5, 10, 75))
    with pytest.raises(KoffError, match="the mask removes none of the 100 FFN neurons: there is nothing to compare"):
        enrichment(np.zeros(100, bool), marked, layer)
    with pytest.raises(KoffError, match="removes all of the 100"):
        layer_table(np.ones(100, bool), marked, layer)
    with pytest.raises(KoffError, match="100 neurons in the mask, 99 in the class"):
        enrichment(removed, marked[1:], layer)
    with pytest.raises(KoffError, match="removes nothing, or everything"):
        logistic(np.zeros(100, bool), marked, marked, np.ones((100, 2)), np.ones(100), layer)
    with pytest.raises(KoffError, match="masks of 100 and 99 neurons"):
        overlap(removed, removed[1:], layer)
