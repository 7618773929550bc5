"""Intervals against cases whose answer is known."""

import math

import numpy as np
import pytest
from scipy import stats

from koff_lightning.studies import bootstrap
from koff_lightning.studies.bootstrap import bits_per_byte, interval, over_seeds


def draws_of(nats, sizes, **options):
    """Measured [A] and drawn [R, A] figures of nats [A, S, D] in one domain."""
    arms, seeds, count = nats.shape
    measured, drawn = bits_per_byte([nats.reshape(-1, count)], [sizes], **options)
    measured = measured.reshape(arms, seeds)
    return measured.mean(1), over_seeds(drawn.reshape(-1, arms, seeds), measured)


def test_bits_per_byte_are_ratios_of_sums_with_equal_weight_for_every_domain():
    nats = [np.array([[math.log(2), 3 * math.log(2)]]), np.array([[6 * math.log(2)]])]
    measured, drawn = bits_per_byte(nats, [np.array([1.0, 3.0]), np.array([2.0])], resamples=2000)
    assert measured == pytest.approx([(4 / 4 + 6 / 2) / 2])
    # the first domain's two documents both have one bit per byte, whichever is drawn
    assert drawn == pytest.approx(np.full((2000, 1), 2.0))


def test_alike_documents_leave_the_t_interval_of_the_seeds():
    figures = np.array([1.20, 1.23, 1.22])
    nats = np.repeat(figures[None, :, None], 20, axis=2) * math.log(2) * 10
    measured, drawn = draws_of(nats, np.full(20, 10.0), resamples=40_000)
    found = interval(measured[0], drawn[:, 0])
    low, high = stats.t.interval(0.95, 2, figures.mean(), stats.sem(figures))
    assert (found.value, found.low, found.high) == pytest.approx((figures.mean(), low, high), abs=1.5e-3)


def test_alike_seeds_leave_the_bootstrap_of_the_documents():
    values = np.random.default_rng(0).normal(1.2, 0.3, 40)
    measured, drawn = draws_of(np.tile(values, (1, 3, 1)) * math.log(2), np.ones(40))
    found = interval(measured[0], drawn[:, 0])
    known = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", random_state=1)
    assert (found.low, found.high) == pytest.approx(tuple(known.confidence_interval), abs=0.01)


def test_one_seed_is_not_moved():
    drawn = np.random.default_rng(0).normal(size=(50, 2, 1))
    assert (over_seeds(drawn, np.zeros((2, 1))) == drawn[:, :, 0]).all()


def test_what_one_seed_does_to_all_arms_stays_together():
    nats = np.random.default_rng(0).normal(100, 5, (1, 3, 30))
    _, drawn = draws_of(np.concatenate([nats, nats + 2]), np.ones(30))
    assert drawn[:, 1] - drawn[:, 0] == pytest.approx(np.full(len(drawn), 2 / math.log(2)))


def test_pairing_beats_two_separate_samples():
    rng = np.random.default_rng(0)
    hard = rng.normal(100, 20, 40)  # documents differ much more than arms
    nats = hard + rng.normal(0, 1, (2, 3, 40))
    _, drawn = draws_of(nats, np.ones(40))
    _, apart = draws_of(nats[1:], np.ones(40), seed=7)
    paired, unpaired = (
        interval(0, difference) for difference in (drawn[:, 1] - drawn[:, 0], apart[:, 0] - drawn[:, 0])
    )
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 5


@pytest.mark.parametrize(("of_seeds", "of_documents"), [(1.0, 0.1), (0.1, 1.0), (0.3, 1.5)])
def test_intervals_cover_the_truth_as_often_as_they_say(of_seeds, of_documents):
    rng = np.random.default_rng(5)
    held = 0
    for trial in range(200):
        seeds, documents = rng.normal(0, of_seeds, (1, 3, 1)), rng.normal(0, of_documents, (1, 1, 25))
        measured, drawn = draws_of((50 + seeds + documents) * math.log(2), np.ones(25), resamples=400, seed=trial)
        found = interval(measured[0], drawn[:, 0])
        held += found.low <= 50 <= found.high
    assert 0.91 <= held / 200 <= 0.985


def test_noise_of_one_document_in_one_run_is_not_counted_again_as_the_seeds():
    """Nothing but that noise: the interval is hardly wider than that of the seeds alone, and covers no less."""
    rng = np.random.default_rng(6)
    held, widths = 0, []
    for trial in range(200):
        nats = (50 + rng.normal(0, 1, (1, 3, 25))) * math.log(2)
        measured, drawn = draws_of(nats, np.ones(25), resamples=400, seed=trial)
        found = interval(measured[0], drawn[:, 0])
        held += found.low <= 50 <= found.high
        seeds = nats.mean(2)[0] / math.log(2)
        widths.append((found.high - found.low) / (2 * stats.t.ppf(0.975, 2) * stats.sem(seeds)))
    assert held / 200 >= 0.95
    assert 0.95 < np.median(widths) < 1.35


def test_a_gap_that_some_draws_close_leaves_its_quotient_open():
    """1.6 % of the draws have no gap and nothing closed either: they say nothing, not that all of it is closed."""
    below, above = np.full(1000, 0.1), np.full(1000, 0.05)
    below[:16], above[:16] = -0.01, -0.02
    found = interval(0.5, bootstrap.quotient(above, below), level=0.97)
    assert (found.low, found.high) == (-math.inf, 0.5)


def test_students_interval():
    values = np.array([1.0, 2.0, 4.0])
    found = bootstrap.student(values, 0.9)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.9, 2, values.mean(), stats.sem(values)))
    two = bootstrap.student(values[:2])
    assert (two.low, two.high) == pytest.approx(stats.t.interval(0.95, 1, 1.5, 0.5)), "two seeds are enough for one"
    assert bootstrap.student(np.full(3, 0.25)) == bootstrap.Interval(0.25, -math.inf, math.inf)
    assert bootstrap.student(values[:1]) == bootstrap.Interval(1.0, -math.inf, math.inf)


def test_many_documents_are_drawn_in_parts(monkeypatch):
    nats, sizes = np.random.default_rng(0).normal(100, 5, (2, 30)), np.ones(30)
    whole = bits_per_byte([nats], [sizes], resamples=100)[1]
    monkeypatch.setattr(bootstrap, "AT_ONCE", 210)
    assert bits_per_byte([nats], [sizes], resamples=100)[1] == pytest.approx(whole)
