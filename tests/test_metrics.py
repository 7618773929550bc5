"""Bits per byte: known answers, exactness over any split of the text, and precision."""

import math

import pytest
import torch

from koff_lightning.metrics import BitsPerByte


def test_a_uniform_model_over_bytes_needs_eight_bits():
    metric = BitsPerByte()
    metric.update(torch.full((10,), math.log(256)), torch.tensor(10.0))
    assert metric.compute().item() == pytest.approx(8, abs=1e-6)


def test_the_value_does_not_depend_on_how_the_text_is_split():
    nats, sizes = torch.rand(64, dtype=torch.float64) * 100, torch.randint(1, 900, (64,)).float()
    whole, parts = BitsPerByte(), BitsPerByte()
    whole.update(nats, sizes)
    for first in (0, 1, 30):
        last = {0: 1, 1: 30, 30: 64}[first]
        parts.update(nats[first:last], sizes[first:last])
    assert parts.compute().item() == pytest.approx(whole.compute().item(), rel=1e-12)
    assert whole.compute().item() == pytest.approx((nats.sum() / math.log(2) / sizes.sum()).item(), rel=1e-12)


def test_it_is_a_ratio_of_sums_not_a_mean_of_ratios():
    metric = BitsPerByte()
    metric.update(torch.tensor([math.log(2), 0.0]), torch.tensor([1.0, 3.0]))
    assert metric.compute().item() == pytest.approx(0.25)


def test_small_rows_still_count_after_billions_of_bytes():
    metric = BitsPerByte()
    metric.update(torch.tensor(1.0), torch.tensor(2.0**33))
    for _ in range(8):
        metric.update(torch.tensor(0.0), torch.tensor(1.0))
    assert metric.num_bytes.item() == 2**33 + 8


def test_rows_with_nothing_to_predict_change_nothing_and_no_text_gives_nan():
    metric = BitsPerByte()
    metric.update(torch.zeros(2), torch.zeros(2))
    assert math.isnan(metric.compute())
    metric.update(torch.tensor(3.0), torch.tensor(4.0))
    before = metric.compute().item()
    metric.update(torch.zeros(2), torch.zeros(2))
    assert metric.compute().item() == before


def test_no_graph_is_kept_and_reset_forgets():
    metric, nats = BitsPerByte(), torch.ones(3, requires_grad=True)
    metric.update(nats * 2, torch.ones(3))
    assert not metric.nats.requires_grad
    metric.reset()
    metric.update(torch.tensor(math.log(2)), torch.tensor(1.0))
    assert metric.compute().item() == pytest.approx(1)


def test_casting_the_module_it_belongs_to_keeps_fp64():
    module = torch.nn.Sequential(BitsPerByte()).to(torch.bfloat16)
    assert module[0].nats.dtype == torch.float64


def test_states_are_summed_over_ranks():
    metric = BitsPerByte()
    assert set(metric._reductions) == {"nats", "num_bytes", "num_tokens"}
    assert all(reduce(torch.tensor([1.0, 2.0])) == 3 for reduce in metric._reductions.values())
