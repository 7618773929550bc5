"""Cutting: what is left has the counted parameters, the right shapes, and still runs, trains and generates."""

import pytest
import torch
from tiny_cases import DOMAINS, make_case, plain_batch, random_mask, run
from tiny_models import FAMILIES, tiny_model

from koff_lightning import SparsitySpec
from koff_lightning.backbone import kv_shapes, parameter_counts, prunable_groups
from koff_lightning.sparsity import Budget
from koff_lightning.surgery import cut_, spread


def test_spread():
    assert spread(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]
    assert spread(torch.tensor([], dtype=torch.long), 3).tolist() == []


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("family", FAMILIES)
def test_counted_parameters_are_the_accounted_ones(family, config):
    if "mlp_bias" in config and not family.startswith("llama"):
        config = {}
    model = tiny_model(family, **config)
    groups = prunable_groups(model)
    budget = Budget(groups, parameter_counts(model), SparsitySpec(0.3, min_channels=4))
    for kept in (random_mask(groups), budget.harden(torch.randn(len(budget.costs)))):
        expected = budget.kept_parameters(kept)
        cut = tiny_model(family, **config)
        cut_(cut, groups, kept)
        assert parameter_counts(cut)["total"] == sum(p.numel() for p in cut.parameters()) == expected
        rate = 1 - parameter_counts(cut)["body"] / parameter_counts(model)["body"]
        assert rate == pytest.approx(budget.report(kept)["body"], abs=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_widths_weights_and_memories_are_cut_alike(family):
    case = make_case(family)
    kept = random_mask(case.groups)
    before = {d: case.bank.size(d) for d in DOMAINS}
    cut_(case.model, case.groups, kept, case.bank)
    for group, part in zip(case.groups, kept.split([g.size for g in case.groups]), strict=True):
        left = int(part.sum())
        consumer = case.model.get_submodule(group.consumer)
        assert consumer.in_features == consumer.base_layer.weight.shape[1] == left * group.width
        for path, rows in group.producers:
            linear = case.model.get_submodule(path)
            assert linear.out_features == linear.base_layer.weight.shape[0] == left * rows
            assert {linear.lora_B[n].weight.shape[0] for n in linear.lora_B} == {left * rows}
        if group.kind == "kv_group":
            assert kv_shapes(case.model)[group.layer] == (left, 16)
            assert {m.layer(group.layer)[0].shape[0] for m in case.bank.kv.values()} == {left}
    assert all(case.bank.size(d) < before[d] for d in DOMAINS)
    assert not any(p.requires_grad for n, p in case.model.named_parameters() if "lora_" not in n)
    assert all(p.requires_grad for d in DOMAINS for p in case.trained(d))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_trains_its_memories_and_generates(family):
    case = make_case(family)
    cut_(case.model, case.groups, random_mask(case.groups), case.bank)
    run(case, plain_batch(), ["de", None, "law"]).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for d in ("de", "law") for p in case.trained(d))
    case.bank.activate(["de", "fr", "law"])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = [case.model.generate(**plain_batch(), **options, use_cache=flag) for flag in (True, False)]
    assert torch.equal(*texts)


def test_keeping_everything_changes_nothing():
    case, batch = make_case("llama"), plain_batch()
    expected = run(case, batch, ["de", "fr", None])
    cut_(case.model, case.groups, torch.ones(len(case.gates.logits), dtype=torch.bool), case.bank)
    assert torch.equal(run(case, batch, ["de", "fr", None]), expected)


def test_cutting_one_kind_only():
    model = tiny_model("llama")
    groups = prunable_groups(model, ["channel"])
    cut_(model, groups, torch.arange(192) % 2 == 0)
    assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == [48, 48]
    assert kv_shapes(model) == [(2, 16)] * 2
