"""The batch sampler: shares, coverage, passes, ranks, and that batch n depends on nothing but the seed and n."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from koff_lightning.data.mixture import DomainBatches

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=9)


def named(values):
    return {f"d{i}": value for i, value in enumerate(values)}


def batches(weights, batch_size, count, first=0, rows=50, **options):
    sampler = DomainBatches(named([rows] * len(weights)), named(weights), batch_size, **options)
    return list(islice(sampler.start_at(first), count))


@settings(deadline=None)
@given(weights=WEIGHTS, batch_size=st.integers(1, 12))
def test_every_window_of_batches_is_full_and_holds_every_domain(weights, batch_size):
    needed = -(-len(weights) // batch_size)
    drawn = batches(weights, batch_size, 20 * needed, window=needed)
    assert all(len(batch) == batch_size for batch in drawn)
    for first in range(0, len(drawn), needed):
        present = {domain for batch in drawn[first : first + needed] for domain, _ in batch}
        assert len(present) == len(weights)


@settings(deadline=None)
@given(weights=WEIGHTS, spare=st.integers(0, 9))
def test_shares_follow_weights_within_a_few_rows_at_every_step(weights, spare):
    batch_size, steps = len(weights) + spare, 1500
    sampler = DomainBatches(named([50] * len(weights)), named(weights), batch_size, window=1)
    total = np.cumsum(sampler.counts(np.arange(steps)), axis=0)  # [steps, D]
    share = total[-1] / steps
    due = share_by_hand(weights, batch_size)
    assert np.abs(total - np.arange(1, steps + 1)[:, None] * due).max() < 5
    np.testing.assert_allclose(share, due, atol=5 / steps)


@pytest.mark.parametrize(
    ("weights", "batch_size", "window"),
    [([9, 1], 2, 5), ([9, 1], 1, 10), ([9, *[1] * 6], 7, 3), ([99, 1], 10, 10), ([1] * 7, 7, 1), ([1] * 7, 3, 3)],
)
def test_a_window_is_as_wide_as_the_shares_ask(weights, batch_size, window):
    sampler = DomainBatches(named([50] * len(weights)), named(weights), batch_size)
    assert sampler.window == window
    share = sampler.counts(np.arange(2000)).sum(0) / (2000 * window * batch_size)
    np.testing.assert_allclose(share, np.array(weights) / sum(weights), atol=1e-3)


def test_a_domain_of_hardly_any_share_has_a_row_in_100_batches():
    sampler = DomainBatches(named([50] * 2), named([1e-9, 1]), 4)
    assert sampler.window == 100
    assert (sampler.counts(np.arange(50))[:, 0] == 1).all()
    assert DomainBatches(named([50] * 300), named([1e-9, *[1] * 299]), 2).window == 150


def share_by_hand(weights, batch_size):
    """max(1, c w) with c found by bisection."""
    weights, low, high = np.array(weights), 0.0, batch_size / min(weights)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(1, middle * weights).sum() < batch_size else (low, middle)
    return np.maximum(1, high * weights)


def test_equal_weights_that_fit_give_the_same_batch_shape_every_time():
    for batch in batches([0.1] * 3, 6, 50):
        assert Counter(domain for domain, _ in batch) == {"d0": 2, "d1": 2, "d2": 2}


def test_rows_of_a_batch_are_ordered_by_domain():
    for batch in batches([1, 2, 3, 4, 5], 3, 40):
        assert [domain for domain, _ in batch] == sorted(domain for domain, _ in batch)


@settings(deadline=None)
@given(first=st.integers(0, 200), batch_size=st.integers(1, 9), seed=st.integers(0, 5))
def test_batch_n_is_the_same_wherever_the_iteration_started(first, batch_size, seed):
    weights = [1, 5, 2, 3]
    whole = batches(weights, batch_size, first + 8, rows=7, seed=seed)
    assert batches(weights, batch_size, 8, first=first, rows=7, seed=seed) == whole[first:]


def test_another_seed_gives_another_order():
    assert batches([1, 1], 4, 5, seed=0) != batches([1, 1], 4, 5, seed=1)


def test_no_row_comes_twice_in_a_pass_and_passes_differ():
    rows = [row for batch in batches([1.0, 1.0], 2, 30, rows=10) for domain, row in batch if domain == "d1"]
    passes = [rows[i : i + 10] for i in range(0, 30, 10)]
    assert all(sorted(order) == list(range(10)) for order in passes)
    assert passes[0] != passes[1] != passes[2]


def test_a_domains_row_order_does_not_depend_on_the_other_domains():
    alone = [row for batch in batches([1], 1, 20) for _, row in batch]
    among = [row for batch in batches([1, 1, 1], 3, 20) for domain, row in batch if domain == "d0"]
    assert alone == among


@pytest.mark.parametrize("batch_size", [2, 5])
def test_ranks_draw_the_same_domains_and_different_rows(batch_size):
    ranks = [batches([1, 2, 3], batch_size, 40, rows=1000, rank=rank, world_size=3) for rank in range(3)]
    for step in zip(*ranks, strict=True):
        domains = [[domain for domain, _ in batch] for batch in step]
        assert domains[0] == domains[1] == domains[2]
    seen = [{ref for batch in rank for ref in batch} for rank in ranks]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_a_wider_window_holds_every_domain_once_per_optimizer_step():
    drawn = batches([1] * 7, 3, 40, window=4)
    for first in range(0, 40, 4):
        assert len({domain for batch in drawn[first : first + 4] for domain, _ in batch}) == 7


@settings(deadline=None)
@given(weights=WEIGHTS, batch_size=st.integers(1, 6), world_size=st.integers(1, 3))
def test_batches_of_one_domain_take_turns_by_weight(weights, batch_size, world_size):
    options = {"one_domain": True, "world_size": world_size, "rows": 300 * batch_size * world_size}
    drawn = batches(weights, batch_size, 200, **options)
    turns = np.zeros((len(drawn) + 1, len(weights)))
    for number, batch in enumerate(drawn):
        ((domain,), rows) = {domain for domain, _ in batch}, {row for _, row in batch}
        assert len(rows) == len(batch) == batch_size
        turns[number + 1] = turns[number]
        turns[number + 1, int(domain[1:])] += 1
    due = np.arange(len(turns))[:, None] * np.array(weights) / sum(weights)
    assert np.abs(turns - due).max() < 4, "after every batch each domain has had its share of them"
    assert drawn[7:] == batches(weights, batch_size, 193, first=7, **options)
    others = [batches(weights, batch_size, 200, rank=rank, **options) for rank in range(1, world_size)]
    for shared in zip(drawn, *others, strict=True):
        rows = [ref for batch in shared for ref in batch]
        assert len({domain for domain, _ in rows}) == 1, "all ranks train the same memory"
        assert len(set(rows)) == len(rows)


def test_a_run_of_batches_of_one_domain_does_not_go_on_from_one_of_mixed_batches():
    same = named([50] * 4), named([1, 2, 1, 1])
    for size in (2, 4, 8):
        alone, mixed = (DomainBatches(*same, size, one_domain=one).identity() for one in (True, False))
        assert alone != mixed
