"""The tables about neurons: which runs and which neurons each figure is of. The statistics are tested by themselves."""

import numpy as np
import pytest
import torch

from koff_lightning.studies.analysis import Activations, enrichment, logistic, odds_of_runs, odds_ratio_ratio, strata
from koff_lightning.studies.analysis import neurons as tables
from koff_lightning.studies.analysis.lape import identify
from koff_lightning.studies.analysis.masks import Mask
from koff_lightning.studies.analysis.paper import ends_lines
from koff_lightning.studies.analysis.ranking import ranking
from koff_lightning.support.errors import KoffError

DOMAINS, RATE, BAR = ["de", "fr", "zh"], 0.1, 0.9
SIZE, LAYER = 600, np.repeat([0, 1], 300)


@pytest.fixture(scope="module")
def seen():
    """600 neurons of two layers, a quarter of them active in one domain alone."""
    random = np.random.default_rng(0)
    rates = random.uniform(0.2, 0.4, (SIZE, 3))
    own = random.random(SIZE) < 0.25
    rates[own] = 0.01
    rates[own, random.integers(0, 3, own.sum())] = random.uniform(0.3, 0.9, own.sum())
    positive = torch.from_numpy(np.stack([random.binomial(500, rates.T) for _ in range(2)]))
    square = torch.from_numpy(random.lognormal(size=(2, 3, SIZE)))
    tokens = torch.full((2, 3), 500)
    return Activations(DOMAINS, "x", torch.from_numpy(LAYER), torch.ones(SIZE), tokens, positive, square * 0, square)


@pytest.fixture(scope="module")
def classes(seen):
    return tables.classes_of(seen, identify(seen.rates(), DOMAINS, RATE, BAR), RATE, BAR)


@pytest.fixture(scope="module")
def masks(classes):
    """Two runs that prefer specific neurons, the second more so; two of another way that do not, with other names."""

    def mask(name, seed, of_specific):
        removed = np.random.default_rng(seed).random(SIZE) < np.where(classes["specific"], of_specific, 0.15)
        return Mask(name, "x", DOMAINS, LAYER, removed, np.zeros(0, np.int64), np.zeros(0, bool))

    shares = {("koff", "s0"): 0.4, ("koff", "s1"): 0.5, ("flap", "f0"): 0.15, ("flap", "f1"): 0.15}
    return {key: mask(key[1], seed, share) for seed, (key, share) in enumerate(shares.items())}


def of(masks, kind):
    return [mask.removed for (other, _), mask in masks.items() if other == kind]


def test_the_studied_runs_are_compared_with_each_other_kind(seen, masks, classes):
    cells = strata(LAYER, seen.rates(), seen.importance())
    table = tables.ratio_table(seen, masks, "koff", classes, 50, 3).set_index(["class", "against", "within"])
    for within, stratum in (("layers", LAYER), ("cells", cells)):
        known = odds_ratio_ratio(of(masks, "koff"), of(masks, "flap"), classes["G2"], stratum, 50, 3)
        line = table.loc[("G2", "flap", within)]
        assert line[["first", "second", "low", "high"]].tolist() == [known.first, known.second, known.low, known.high]
    assert table.loc[("specific", "flap", "layers"), "ratio"] > 1.5, "the studied runs stand above"
    assert set(table.index.get_level_values("class")) <= set(tables.MAIN)


def test_every_kind_is_pooled_over_its_own_runs(seen, masks, classes):
    table = tables.pooled_table(seen, masks, classes | {"nobody": np.zeros(SIZE, bool)}, 50, 3)
    table = table.set_index(["class", "kind", "within"])
    assert "nobody" not in table.index.get_level_values("class") and (table["runs"] == 2).all()
    for kind in ("koff", "flap"):
        known = odds_of_runs(of(masks, kind), classes["specific"], LAYER, 50, 3)
        line = table.loc[("specific", kind, "layers")]
        assert line[["odds_ratio", "low", "high"]].tolist() == [known.odds_ratio, known.low, known.high]


def test_other_selections_are_told_with_what_is_removed_of_them(seen, masks):
    table = tables.selection_table(seen, masks, "koff", (RATE, BAR), 50, 3)
    assert set(zip(table["rate"], table["bar"], strict=True)) == {(RATE, BAR), *tables.SELECTIONS}
    for line in table.to_dict("records"):
        selected = identify(seen.rates(), DOMAINS, line["rate"], line["bar"]).selected
        assert line["specific"] == selected.sum()
        assert line["removed"] == np.mean([(removed & selected).sum() for removed in of(masks, "koff")])


def test_every_mask_is_tested_by_itself(seen, masks, classes):
    found = tables.removal_tables(seen, masks, classes, 99, 3)
    cells = strata(LAYER, seen.rates(), seen.importance())
    tests = found["enrichment"].set_index(["kind", "run", "class"])
    for (kind, run), mask in masks.items():
        known = enrichment(mask.removed, classes["specific"], LAYER, cells, 99, 3)
        line = tests.loc[(kind, run, "specific")]
        assert line[["both", "p_more", "cell_odds_ratio"]].tolist() == [known.both, known.p_more, known.cell_odds_ratio]
        fit = logistic(mask.removed, classes["specific"], classes["G2"], seen.rates(), seen.importance(), LAYER)
        assert found["logistic"].query("run == @run")["p"].tolist() == fit.table["p"].tolist()
    layers = found["layers"].query("run == 's1' and `class` == 'specific'")
    assert layers["both"].sum() == (masks["koff", "s1"].removed & classes["specific"]).sum()
    assert set(found["layers"]["class"]) == set(tables.MAIN)


def test_neurons_are_listed_with_their_classes_and_masks(seen, masks, classes):
    found = identify(seen.rates(), DOMAINS, RATE, BAR)
    table = tables.neuron_table(seen, masks, found, classes)
    assert table["removed_flap_f1"].tolist() == masks["flap", "f1"].removed.tolist()
    assert table["specific"].tolist() == found.selected.tolist() and table["entropy"].tolist() == found.entropy.tolist()
    assert "entropy" not in tables.neuron_table(seen, masks, None, {})


def test_halves_of_neurons_have_a_line_each_where_every_run_has_them(seen, masks):
    """One run gates gate and up channels, the other up channels alone."""
    up, gate = np.random.default_rng(9).random((2, SIZE)) < 0.1
    halves = {"gate_channel": {"removed": gate}, "up_channel": {"removed": up}}
    none = np.zeros(0, np.int64), np.zeros(0, bool)
    both = Mask("a", "x", DOMAINS, LAYER, gate | up, *none, halves=halves)
    one = Mask("b", "x", DOMAINS, LAYER, up, *none, halves={"up_channel": {"removed": up}})
    own = {("koff", "a"): both, ("koff", "b"): one}
    lines = tables.ranking_table(seen, own | {("flap", "f0"): masks["flap", "f0"]})
    told = list(zip(lines["run"], lines["what"], strict=True))
    assert told == [("a", "gate"), ("a", "up"), ("a", "either"), ("b", "up"), ("b", "either"), ("f0", "neuron")]
    known = ranking(seen.rates(), {"gate": gate, "up": up, "either": gate | up})
    assert lines["specific"][:3].tolist() == known["specific"].tolist()
    said = tables.ends_of_runs(seen, own, "koff")
    assert said.to_dict("records") == ends_lines(seen.rates(), {"up": [up, up]})
    whole = tables.ends_of_runs(seen, masks, "flap").to_dict("records")
    assert whole == ends_lines(seen.rates(), {"neurons": of(masks, "flap")})
    assert tables.ends_of_runs(seen, masks, "ddp").empty


def test_masks_are_compared_in_pairs(masks):
    pairs = tables.overlaps(masks)
    assert (pairs.loc[0, "a"], pairs.loc[0, "b"], len(pairs)) == ("koff/s0", "koff/s1", 6)
    assert pairs.loc[0, "both"] == (masks["koff", "s0"].removed & masks["koff", "s1"].removed).sum()
    with pytest.raises(KoffError, match="there is one mask only: give more seeds"):
        tables.overlaps({("koff", "s0"): masks["koff", "s0"]})


def test_stability_is_told_by_domain_too(seen):
    table, sentence = tables.stability_table(seen, RATE, BAR)
    first, second = (identify(seen.rates(half), DOMAINS, RATE, BAR) for half in (0, 1))
    share = (first.selected & second.selected).sum() / (first.selected | second.selected).sum()
    assert table["domain"].tolist() == ["all", *DOMAINS] and table["jaccard"][0] == share
    of_zh = (first.assigned & second.assigned)[:, 2].sum() / (first.assigned | second.assigned)[:, 2].sum()
    assert table["jaccard"][3] == of_zh and f"{share:.0%}" in sentence
