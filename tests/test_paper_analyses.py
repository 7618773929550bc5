"""The paper's own analyses: the ends of the LAPE ranking (Table 3), embeddings beside the dense model's (app. B)."""

import numpy as np
import pytest
import torch
from tiny_run import DOMAINS, RandomText, tiny_module

from koff_lightning import KoffError
from koff_lightning.studies.analysis.ranking import ends, ranking
from koff_lightning.studies.analysis.similarity import (
    centroid_cosine,
    embedded,
    linear_cka,
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


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    module = tiny_module(tmp_path_factory.mktemp("similar"))
    module.configure_model()
    return module.model.eval()


def test_an_open_mask_without_memory_is_the_dense_model(module):
    module.gates.harden(torch.ones_like(module.gates.kept))
    batches = list(RandomText().test_dataloader()) * 2
    table = similarity(module, batches, k=3).set_index("view")
    assert table.loc["memory_off", ["cka", "neighbours", "centroids"]].tolist() == pytest.approx([1, 1, 1])
    assert table["rows"].tolist() == [16, 16]


def test_what_is_removed_shows(module):
    closed = torch.ones_like(module.gates.kept)
    closed[: len(closed) // 2] = False
    module.gates.harden(closed)
    batches = list(RandomText().test_dataloader())
    assert similarity(module, batches, k=3).set_index("view")["cka"]["memory_off"] < 0.9999
    assert not torch.equal(embedded(module, batches, "dense"), embedded(module, batches, "memory_off"))
    assert {domain for batch in batches for domain in batch["domains"]} == set(DOMAINS)


def test_fewer_rows_than_neighbours_are_refused(module):
    with pytest.raises(KoffError, match="needs more than 10 rows of held-out text, got 8"):
        similarity(module, list(RandomText().test_dataloader()))
