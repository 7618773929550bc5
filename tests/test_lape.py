"""LAPE and its kin on rates of activity with a known answer."""

import math
import sys

import numpy as np
import pytest
import torch

from koff_lightning.studies.analysis import Activations, entropy, identify, identify_weighted, stability
from koff_lightning.support.errors import KoffError

DOMAINS = ["de", "fr", "zh"]


def published(rates: np.ndarray, rate: float, bar: float) -> tuple[set[int], list[set[int]]]:
    """The selection as the paper's formulas say it, neuron by neuron, in plain Python."""
    flat = sorted(float(value) for row in rates for value in row)
    threshold = flat[round(len(flat) * bar) - 1]
    scored = []
    for number, row in enumerate(rates):
        if max(row) > threshold:
            shares = [value / sum(row) for value in row]
            scored.append((-sum(q * math.log(q) for q in shares if q > 0), number))
    chosen = {number for _, number in sorted(scored)[: round(rate * len(rates))]}
    return chosen, [{n for n in chosen if rates[n, k] > threshold} for k in range(rates.shape[1])]


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_formula_of_the_paper(seed):
    rates = np.random.default_rng(seed).beta(0.3, 1.5, (400, 3))
    rates[::7] = 0.0  # neurons that are never active
    found = identify(rates, DOMAINS, rate=0.05, bar=0.9)
    chosen, by_domain = published(rates, 0.05, 0.9)
    assert set(np.flatnonzero(found.selected)) == chosen
    assert [set(np.flatnonzero(column)) for column in found.assigned.T] == by_domain
    assert found.tied == 0


def test_constructed_rates_have_a_known_answer():
    """100 neurons: three specialists, one of two domains, four for all; the rest hardly ever active."""
    rates = np.full((100, 3), 0.01)
    rates[[10, 11, 12]] = np.eye(3) * 0.5 + 1e-4
    rates[20] = [0.4, 0.4, 1e-4]
    rates[[30, 31, 32, 33]] = 0.6
    rates[40] = [0.0099, 0.0, 0.0]  # the purest of all, and too rare to count
    found = identify(rates, DOMAINS, rate=0.04, bar=0.94)
    assert set(np.flatnonzero(found.selected)) == {10, 11, 12, 20}
    assert np.isinf(found.entropy[40])
    assert [list(np.flatnonzero(column)) for column in found.assigned.T] == [[10, 20], [11, 20], [12]]
    everywhere = {30, 31, 32, 33}
    assert {name: set(np.flatnonzero(kind)) for name, kind in found.general.items()} == dict.fromkeys(
        ("G1", "G2", "G3"), everywhere
    )
    classes = found.classes()
    assert list(classes) == ["specific", "specific:de", "specific:fr", "specific:zh", "G1", "G2", "G3"]
    assert found.classes()["specific"].sum() == 4


@pytest.mark.parametrize(
    ("neurons", "rate", "chosen"), [(17, 0.1, 2), (16, 0.1, 2), (14, 0.1, 1), (30, 0.05, 2), (6, 0.1, 1)]
)
def test_a_share_of_neurons_is_rounded_to_the_nearest_number(neurons, rate, chosen):
    """As in the released code, `round(len(entropy) * rate)`: a half goes to the even number."""
    rates = np.random.default_rng(0).uniform(0.1, 0.9, (neurons, 3))
    assert identify(rates, DOMAINS, rate=rate, bar=0.01).selected.sum() == chosen


def test_the_bar_is_the_published_order_statistic():
    rates = np.arange(1, 301).reshape(100, 3) / 1000  # 300 rates: the 285th is the bar
    assert identify(rates, DOMAINS, rate=0.05, bar=0.95).bar == 0.285


def test_entropy_at_its_ends():
    rates = np.array([[0.2, 0.2, 0.2], [0.0, 0.9, 0.0], [0.0, 0.0, 0.0]])
    assert entropy(rates) == pytest.approx([math.log(3), 0.0, 0.0])
    assert not np.signbit(entropy(rates)).any(), "a negative zero would be shown as one"


def test_the_published_shares_are_the_defaults():
    """1 % of the neurons, and the rate below which 95 % of all rates lie."""
    rates = np.random.default_rng(0).permutation(3000).reshape(1000, 3) / 3000
    for found in (identify(rates, DOMAINS), identify_weighted(rates, DOMAINS)):
        assert (found.selected.sum(), found.bar) == (10, 2849 / 3000)


@pytest.mark.parametrize(("neurons", "bar", "place"), [(7, 0.9, 13), (7, 0.01, 1), (7, 0.75, 10), (15, 0.75, 22)])
def test_a_share_of_rates_is_rounded_to_the_nearest_number(neurons, bar, place):
    """Of 14 or 30 rates; a half goes to the even number, and the smallest rate is the lowest bar."""
    rates = np.random.default_rng(0).permutation(2 * neurons).reshape(neurons, 2) + 1.0
    assert identify(rates, ["de", "fr"], rate=0.1, bar=bar).bar == place


def test_a_rate_at_the_bar_does_not_exceed_it():
    """Neither to pass the filter, nor to belong to a domain, nor to count as general."""
    rates = np.full((20, 2), 0.1)
    rates[0], rates[1], rates[2] = [0.9, 0.5], [0.5, 0.5], [0.95, 0.96]
    found = identify(rates, ["de", "fr"], rate=0.05, bar=0.925)
    assert found.bar == 0.5
    assert np.isinf(found.entropy[1])
    assert list(np.flatnonzero(found.selected)) == [0]
    assert found.assigned[0].tolist() == [True, False]
    assert list(np.flatnonzero(found.general["G1"])) == [2]


def test_general_neurons_are_no_more_than_pass_the_filter():
    rates = np.zeros((10, 2))
    rates[:3, 0], rates[:3, 1] = [0.5, 0.6, 0.7], [0.1, 0.2, 0.69]
    found = identify(rates, ["de", "fr"], rate=0.2, bar=0.7)
    assert list(np.flatnonzero(found.selected)) == [0, 1]
    assert list(np.flatnonzero(found.general["G2"])) == [2], "the others are never active"


def test_general_neurons_are_those_of_the_highest_entropy_that_pass_the_filter():
    rates = np.zeros((10, 2))
    rates[:5] = [[0.9, x] for x in (0.0, 0.1, 0.2, 0.3, 0.4)]  # above the bar, 0.4, in one domain each
    found = identify(rates, ["de", "fr"], rate=0.2, bar=0.75)
    assert list(np.flatnonzero(found.selected)) == [0, 1]
    assert list(np.flatnonzero(found.general["G2"])) == [3, 4]


def test_general_neurons_of_one_entropy_are_taken_in_order():
    rates = np.zeros((1000, 2))
    rates[:20, 0] = 0.5
    rates[100:900] = 0.5
    found = identify(rates, ["de", "fr"], rate=0.02, bar=0.1)
    assert list(np.flatnonzero(found.general["G2"])) == list(range(100, 120))


def test_ties_are_taken_in_order_and_told():
    rates = np.zeros((10, 3))
    rates[:4, 0] = 0.5  # four alike, two to be taken
    found = identify(rates, DOMAINS, rate=0.2, bar=0.5)
    assert list(np.flatnonzero(found.selected)) == [0, 1]
    assert found.tied == 2
    rates = np.zeros((1000, 3))
    rates[::2, 0] = 0.5  # so many that an unstable sort would not keep their order
    found = identify(rates, DOMAINS, rate=0.2, bar=0.5)
    assert list(np.flatnonzero(found.selected)) == list(range(0, 400, 2))
    assert found.tied == 300
    rates = np.zeros((10, 3))
    rates[:4, 0] = 0.5
    rates[1:4, 1] = 0.1  # three are alike, but not like the first
    assert identify(rates, DOMAINS, rate=0.2, bar=0.5).tied == 2
    assert identify(np.full((10, 3), 0.5), DOMAINS, rate=0.2, bar=0.5).tied == 0, "none passes, so none is left out"


def test_fewer_pass_the_filter_than_are_asked_for():
    rates = np.zeros((10, 3))
    rates[3, 1] = 0.5
    assert list(np.flatnonzero(identify(rates, DOMAINS, rate=0.5, bar=0.9).selected)) == [3]


def test_the_variant_avoids_neurons_that_are_active_everywhere():
    random = np.random.default_rng(0)
    rates = random.beta(0.3, 1.5, (300, 3))
    rates[:30] = random.uniform(0.8, 1.0, (30, 3))
    found = identify_weighted(rates, DOMAINS, rate=0.1, bar=0.8)
    assert 0 < found.weight <= 0.2
    assert not (rates[found.selected] > found.bar).all(1).any()
    heavy = identify_weighted(rates, DOMAINS, rate=0.1, bar=0.8, weight=50.0)
    assert heavy.selected[:30].sum() > 10, "a large weight asks for nothing but activity"


@pytest.mark.parametrize("third", [0.4, 0.3, 0.25, 0.22, 0.2])
def test_the_weight_is_found_to_a_thousandth_and_no_finer(third):
    """Ten neurons of one kind are to be taken; beyond a known weight it is those that are active everywhere."""
    rates = np.array([[0.5, 0.5, third]] * 10 + [[0.9, 0.9, 0.9]] * 10)
    found = identify_weighted(rates, DOMAINS, rate=0.5, bar=0.5)
    even = (1 - entropy(rates)[0] / math.log(3)) * (1 + 1 / 2 + 1 / 3) / 3 / (0.9 - 0.5)  # both kinds score alike
    assert 0.005 < even < 0.195
    assert found.weight <= even < found.weight + 1e-3
    assert list(np.flatnonzero(found.selected)) == list(range(10))
    assert found.weight * 2**8 / 0.2 == pytest.approx(round(found.weight * 2**8 / 0.2)), "0.2 is halved eight times"


def test_the_weight_at_its_ends():
    rates = np.full((10, 2), 0.1)
    rates[:4] = [0.5, 0.0]
    rates[4] = [0.2, 0.1]  # the bar is 0.1, which the fifth to be taken does not exceed everywhere
    assert identify_weighted(rates, ["de", "fr"], rate=0.5, bar=0.75).weight == 0.2
    rates = np.full((10, 2), 0.1)
    rates[:4] = 0.5  # all are equal in everything but activity: even without a weight the first are taken
    assert identify_weighted(rates, ["de", "fr"], rate=0.5, bar=0.5).weight == 0.0


def test_bad_input_is_named():
    rates = np.full((50, 1), 0.1)
    with pytest.raises(KoffError, match="compares domains and there is only 'de'.*two or more.*knock-out"):
        identify(rates, ["de"])
    with pytest.raises(KoffError, match=r"0\.01 of 30 neurons is less than one: raise rate to 0\.0333"):
        identify(np.full((30, 3), 0.1), DOMAINS)
    for share in (0.0, 1.0, 2.0):
        with pytest.raises(KoffError, match="rate and bar must lie between 0 and 1"):
            identify(np.full((30, 3), 0.1), DOMAINS, rate=share)
        with pytest.raises(KoffError, match="rate and bar must lie between 0 and 1"):
            identify(np.full((30, 3), 0.1), DOMAINS, rate=0.5, bar=share)
    with pytest.raises(KoffError, match=r"rates must be \[neurons, 3 domains\]"):
        identify(rates, DOMAINS)
    for shape in ([50], [50, 3, 1], [3, 50]):
        with pytest.raises(KoffError, match=r"rates must be \[neurons, 3 domains\]; got \[.*50"):
            identify(np.full(shape, 0.1), DOMAINS)


def sums_of(rates: np.ndarray, tokens: int, seed: int = 0) -> Activations:
    """What a pass over independent tokens would have counted."""
    positive = np.random.default_rng(seed).binomial(tokens, rates.T, (2, *rates.T.shape))
    count = len(rates)
    zeros = torch.zeros(2, rates.shape[1], count, dtype=torch.float64)
    tokens = torch.full((2, rates.shape[1]), tokens)
    layer = torch.zeros(count, dtype=torch.int64)
    return Activations(DOMAINS, "x", layer, torch.ones(count), tokens, torch.from_numpy(positive), zeros, zeros)


def test_stability_says_how_much_text_is_needed():
    rates = np.random.default_rng(1).beta(0.5, 2.0, (2000, 3))
    little, much = stability(sums_of(rates, 150)), stability(sums_of(rates, 400_000))
    assert much.enough
    assert much.needed is None
    assert much.jaccard >= 0.8 > little.jaccard > little.chance
    assert not little.enough
    assert little.tokens == 300
    assert f"about {little.needed:,} of each are needed" in little.sentence
    assert stability(sums_of(rates, 2 * little.needed, seed=2)).jaccard > 0.7, "the forecast is of the right size"


def test_four_of_five_are_enough(monkeypatch):
    monkeypatch.setattr(sys.modules[stability.__module__], "jaccard", lambda first, second: 0.8)
    found = stability(sums_of(np.random.default_rng(1).beta(0.5, 2.0, (200, 3)), 150))
    assert (found.enough, found.needed) == (True, None)


def test_all_text_of_a_domain_in_one_half():
    sums = sums_of(np.full((200, 3), 0.2), 100)
    sums.tokens[1, 2] = 0
    with pytest.raises(KoffError, match="one half of the documents holds no text of domain 'zh'"):
        stability(sums)


def test_a_neuron_is_not_both_specific_and_general():
    rates = np.full((100, 2), 0.1)
    rates[:12] = [[0.5 + 0.03 * i, 0.9] for i in range(12)]  # few exceed the bar, so that both classes want the same
    found = identify(rates, ["en", "de"], rate=0.1, bar=0.9)
    assert found.selected.any()
    assert found.general["G2"].any()
    assert not (found.selected & found.general["G2"]).any()


def test_halves_without_a_specific_neuron_are_no_share_of_anything():
    tokens, zeros = torch.full((2, 3), 100), torch.zeros(2, 3, 40, dtype=torch.float64)
    alike = torch.full((2, 3, 40), 50)  # no rate exceeds any quantile of them
    seen = Activations(DOMAINS, "x", torch.zeros(40).long(), torch.ones(40), tokens, alike, zeros, zeros)
    found = stability(seen, rate=0.1, bar=0.9)
    assert math.isnan(found.jaccard)
    assert "no neuron is specific in either half" in found.sentence


def test_the_weighted_score_takes_the_harmonic_mean_of_the_domains_off():
    rates = np.random.default_rng(0).random((200, 3))
    found = identify_weighted(rates, ["a", "b", "c"], weight=0.1)
    shares = rates / rates.sum(1, keepdims=True)
    expected = -(shares * np.log(shares)).sum(1) / np.log(3) - 0.1 * rates.max(1) / ((1 + 1 / 2 + 1 / 3) / 3)
    np.testing.assert_allclose(found.entropy, expected)


def test_the_weighted_variant_refuses_what_lape_refuses():
    with pytest.raises(KoffError, match="LAPE compares domains and there is only 'a'"):
        identify_weighted(np.ones((200, 1)), ["a"])
    with pytest.raises(KoffError, match="is less than one"):
        identify_weighted(np.ones((9, 2)), ["a", "b"])


def test_general_neurons_go_by_each_domains_own_bar_and_by_lape_whatever_selected_the_specific_ones():
    rates = np.random.default_rng(0).random((200, 3)) * np.array([1.0, 0.5, 0.1])  # one domain wakes far fewer
    found = identify_weighted(rates, ["a", "b", "c"], rate=0.2, bar=0.5, weight=0.2)
    own = np.sort(rates, axis=0)[99]  # half of a domain's rates are no larger
    assert np.array_equal(found.general["G3"], (rates > own).all(1))
    assert 0 < found.general["G3"].sum() != found.general["G1"].sum()
    passed = np.flatnonzero((rates > found.bar).any(1) & ~found.selected)
    highest = passed[np.argsort(-entropy(rates)[passed], kind="stable")[:40]]
    assert set(np.flatnonzero(found.general["G2"])) == set(highest)
