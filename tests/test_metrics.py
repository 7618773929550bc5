"""Bits per byte: known answers, exactness over any split of the text, and precision."""

import math

import pytest
import torch

from koff_lightning.metrics import BitsPerByte, DocumentScores
from koff_lightning.reports.results import by_context


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


def test_text_that_cannot_be_scored_is_no_text_that_is_not_there():
    metric = BitsPerByte()
    metric.update(torch.tensor([math.nan, 1.0]), torch.tensor([4.0, 4.0]))
    assert metric.compute().item() == math.inf


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


def test_tokens_are_counted_by_what_of_their_text_stands_before_them():
    """Two texts in a row of 150: the first has 140 tokens, so 139 predictions with 1 to 139 tokens before."""
    length, first = 150, 140
    place = torch.cat([torch.arange(first), torch.arange(length - first)])[None]  # [1, T]
    labels = torch.where(place > 0, 5, -100)
    sizes = torch.zeros(1, length)
    sizes[0, 0], sizes[0, first] = 400, 30
    documents = (torch.arange(length)[None] >= first).long()
    batch = {"domains": ["a"], "labels": labels, "position_ids": place, "documents": documents, "document_bytes": sizes}
    nats = torch.where(labels[:, 1:] != -100, 2.0, 0.0)
    scores = DocumentScores()
    scores.update("koff", batch, nats)
    scores.update("dense", batch, nats / 2)
    found = scores.compute()["a"]
    assert found["koff"]["tokens"] == [[7, 7], [24, 2], [96, 0], [12, 0]]  # 1 to 7, 8 to 31, 32 to 127, 128 to 139
    assert found["koff"]["nats_by_context"] == [[14, 14], [48, 4], [192, 0], [24, 0]]
    assert found["koff"]["nats"] == [278, 18] and found["koff"]["bytes"] == [400, 30]
    told = by_context(scores.compute())["by_context"]
    assert told["against_dense"] == {"koff": [2.0, 2.0, 2.0, 2.0]}
    assert told["tokens"] == {"a": [14, 26, 96, 12]} and told["tokens_before"] == [1, 8, 32, 128]


def test_a_class_that_nobody_has_is_left_out_and_a_broken_figure_is_none():
    row = {"tokens": [[4], [2], [0], [0]], "nats": [6.0], "bytes": [9.0]}
    other = {"tokens": [[4], [2], [1], [0]], "nats": [7.0], "bytes": [9.0]}
    arms = {"dense": [[4.0], [2.0], [0.0], [0.0]], "koff": [[6.0], [math.nan], [0.0], [0.0]]}
    others = {"dense": [[4.0], [2.0], [1.0], [0.0]], "koff": [[2.0], [2.0], [3.0], [0.0]]}
    documents = {
        "a": {arm: row | {"nats_by_context": nats} for arm, nats in arms.items()},
        "b": {arm: other | {"nats_by_context": nats} for arm, nats in others.items()},
    }
    told = by_context(documents)["by_context"]
    assert told["against_dense"] == {"koff": [1.0, None, 3.0, None]}
    assert told["nats_per_token"]["koff"] == {"a": [1.5, None, None, None], "b": [0.5, 1.0, 3.0, None]}
    assert by_context({}) == {}
