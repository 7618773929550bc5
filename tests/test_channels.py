"""Output channels of single linears as units: the gate, what it costs, what an export really loses by it."""

import copy

import pytest
import torch
from tiny_cases import ALPHA, RANK, Case, cut_model, left_padded_batch, make_case, plain_batch, random_mask, real, run
from tiny_models import FAMILIES, tiny_model
from torch import nn

from koff_lightning import KoffError, SparsitySpec
from koff_lightning.backbone import parameter_counts, prunable_groups
from koff_lightning.evaluation.baselines import compensation, scores
from koff_lightning.gates import BackboneGates
from koff_lightning.memory import MemoryBank
from koff_lightning.sparsity import Budget
from koff_lightning.specs.memories import KVSpec, LoraSpec
from koff_lightning.surgery import close_rows, cut_kv, cut_state, masks, physical, whole_units, zero_state
from koff_lightning.units import CHANNELS, KINDS

PAPER = ("k_channel", "v_channel", "gate_channel", "up_channel", "down_channel")
MIXTURES = [(kind,) for kind in CHANNELS] + [
    PAPER,
    CHANNELS,
    ("channel", "k_channel", "v_channel"),
    ("kv_group", "gate_channel", "down_channel"),
]
ORDER = ["de", None, "law"]


def outputs(case: Case, batch, kept=None, domains=ORDER):
    """What every gated linear says, by its path, and what it was given."""
    found, hooks = {}, []
    for group in case.groups:
        module = case.model.get_submodule(group.gated)
        note = lambda _, given, out, path=group.gated: found.update({path: (given[0], out)})  # noqa: E731
        hooks.append(module.register_forward_hook(note))  # after the gate's own, which hangs there already
    run(case, batch, domains, kept)
    for hook in hooks:
        hook.remove()
    return found


def cut(case: Case, kept) -> nn.Module:
    """The plain model as the ragged layout has it."""
    closed = copy.deepcopy(case.plain)
    closed.load_state_dict(close_rows(closed.state_dict(), case.groups, kept))
    return cut_model(closed, *whole_units(case.groups, kept))


@torch.no_grad()
def cut_with_memories(case: Case, kept) -> Case:
    model = cut(case, kept)
    plain, groups = copy.deepcopy(model), prunable_groups(model)
    bank = MemoryBank(model, case.bank.domains, LoraSpec(RANK, ALPHA), KVSpec(5))
    model.load_state_dict(cut_state(case.model.state_dict(), case.groups, kept))
    for name, memory in bank.kv.items():
        left = cut_kv(case.bank.kv[name].tensors(), case.groups, kept)
        for index in range(len(model.model.layers)):
            memory._write_(index, left[f"layers.{index}.key"], left[f"layers.{index}.value"])
    gates = BackboneGates(groups)
    gates.attach(model)
    return Case(plain, model, groups, bank, gates)


# --------------------------------------------------------------------------------------------------- the gate


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_at_one_change_no_bit(family):
    case, batch = make_case(family, kinds=CHANNELS), left_padded_batch()
    ones = torch.ones(sum(case.gates.sizes))
    assert torch.equal(run(case, batch, ORDER, ones), run(case, batch, ORDER))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_multiplies_base_bias_and_adapter_together(family):
    config = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    case, batch = make_case(family, kinds=CHANNELS, **config), plain_batch()
    values = torch.rand(3, sum(case.gates.sizes), generator=torch.Generator().manual_seed(3))  # other in every row
    found = outputs(case, batch, values)
    for group, part in zip(case.groups, values.split(case.gates.sizes, dim=1), strict=True):
        given, said = found[group.gated]
        linear = case.model.get_submodule(group.gated)
        for row, domain in enumerate(ORDER):
            whole = linear.base_layer(given[row])
            if domain is not None:
                adapter = f"koff_{domain}"
                down, up = linear.lora_A[adapter].weight, linear.lora_B[adapter].weight
                whole = whole + ALPHA / RANK * given[row] @ down.T @ up.T
            torch.testing.assert_close(said[row], part[row] * whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_no_adapter_brings_a_closed_channel_back(family):
    """It says exactly zero, whatever the adapter; and the adapter is not even asked to: its rows have no gradient."""
    case, batch = make_case(family, kinds=CHANNELS), plain_batch()
    kept = random_mask(case.groups)
    found = outputs(case, batch, kept, ["de"] * 3)
    for group, mask in masks(case.groups, kept):
        assert (found[group.gated][1][..., ~mask] == 0).all(), group.gated
    run(case, batch, ["de"] * 3, kept).square().sum().backward()
    for group, mask in masks(case.groups, kept):
        slope = case.model.get_submodule(group.gated).lora_B["koff_de"].weight.grad
        assert not slope[~mask].any(), group.gated


def test_a_gate_inside_the_adapter_is_refused():
    model = tiny_model("llama")
    groups = prunable_groups(model, ["up_channel"])
    BackboneGates(groups).attach(model)
    MemoryBank(model, ["de"], LoraSpec(RANK, ALPHA), None)
    with pytest.raises(RuntimeError, match="attach gates after injection"):
        BackboneGates(groups).attach(model)


# ------------------------------------------------------------------------------------------- cut and counted


@pytest.mark.parametrize("kinds", MIXTURES, ids="+".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_and_zeroed_models_are_the_gated_one(family, kinds):
    config = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    case, batch = make_case(family, kinds=kinds, **config), left_padded_batch()
    kept, chosen = random_mask(case.groups), real(batch)
    expected = run(case, batch, ORDER, kept)[chosen]
    assert (run(case, batch, ORDER)[chosen] - expected).abs().max() > 0.01, "the mask must matter"
    smaller = cut_with_memories(case, kept)
    torch.testing.assert_close(run(smaller, batch, ORDER)[chosen], expected, atol=1e-5, rtol=0)
    case.model.load_state_dict(zero_state(case.model.state_dict(), case.groups, kept))
    torch.testing.assert_close(run(case, batch, ORDER)[chosen], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kinds", MIXTURES, ids="+".join)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_physical_is_what_the_cut_model_lacks_and_nominal_what_closed_rows_hold(family, kinds):
    case = make_case(family, lora=False, kv=False, kinds=kinds)
    kept, dense = random_mask(case.groups), parameter_counts(case.plain)
    budget = Budget(case.groups, dense, SparsitySpec(0.01, units=list(kinds), min_channels=1))
    smaller, gone = cut(case, kept), budget.physical(kept)
    assert parameter_counts(smaller)["total"] == dense["total"] - gone["parameters"] == budget.kept_parameters(kept)
    assert 1 - parameter_counts(smaller)["body"] / dense["body"] == pytest.approx(gone["body"], abs=1e-12)
    state, rows = case.plain.state_dict(), 0
    for group, mask in masks(case.groups, kept):
        if group.kind in CHANNELS:
            path = group.producers[0][0]
            rows += sum(state[f"{path}.{n}"][~mask].numel() for n in ("weight", "bias") if f"{path}.{n}" in state)
        else:
            rows += int((~mask).sum()) * group.params_per_unit
    assert budget.report(kept)["body"] == pytest.approx(rows / dense["body"], abs=1e-12)
    for kind, share in budget.by_kind(kept).items():
        parts = torch.cat([mask for group, mask in masks(case.groups, kept) if group.kind == kind])
        assert share == pytest.approx((~parts).double().mean().item())


def test_a_neuron_goes_once_either_half_is_closed_and_down_k_and_v_channels_stay_as_zeros():
    model = tiny_model("llama")
    groups = prunable_groups(model, PAPER)
    neuron = prunable_groups(model, ["channel"])[0].params_per_unit
    for kind, gone in {"gate_channel": neuron, "up_channel": neuron, "down_channel": 0, "k_channel": 0}.items():
        closed = torch.cat([torch.arange(g.size) != (2 if g.kind == kind and not g.layer else -1) for g in groups])
        assert physical(groups, closed) == gone
    both = [(g.kind in ("gate_channel", "up_channel") and not g.layer) for g in groups]
    same = torch.cat([torch.arange(g.size) != (2 if b else -1) for g, b in zip(groups, both, strict=True)])
    assert physical(groups, same) == neuron, "a neuron that both halves close goes once"


def test_whole_units_are_passed_through():
    groups = prunable_groups(tiny_model("qwen3"), KINDS)
    kept = random_mask(groups)
    found, mask = whole_units(groups, kept)
    assert found == groups
    assert torch.equal(mask, kept)


@pytest.mark.parametrize("method", ["magnitude", "wanda_sp", "flap", "fisher", "random"])
def test_one_shot_scores_find_a_row_of_zeros(method):
    """A channel that says nothing, or next to it, is the least important one of its linear."""
    model = tiny_model("llama", num_hidden_layers=1).requires_grad_(False)
    groups = prunable_groups(model, PAPER)
    for group in groups:
        model.get_submodule(group.gated).weight[5] *= 1e-6
    batch = plain_batch() | {"labels": plain_batch()["input_ids"]}
    found = scores(model, [batch], method, groups)
    assert found.shape == (sum(g.size for g in groups),)
    if method == "random":
        return
    for group, part in zip(groups, found.split([g.size for g in groups]), strict=True):
        assert part.argmin() == 5, group.kind


def test_compensation_of_channels_is_refused():
    model = tiny_model("llama")
    groups = prunable_groups(model, ["up_channel"])
    with pytest.raises(KoffError, match="give --compensate false"):
        compensation(model, {}, groups, random_mask(groups))


# --------------------------------------------------------------------------------------------------- the target


def budget_of(**options) -> Budget:
    model = tiny_model("llama")
    spec = SparsitySpec(**{"units": list(PAPER), "min_channels": 4} | options)
    return Budget(prunable_groups(model, spec.units), parameter_counts(model), spec)


def test_a_local_target_is_one_of_each_kind():
    budget = budget_of(target=0.25, scope="local", denominator="units")
    shifted = torch.randn(len(budget.costs), generator=torch.Generator().manual_seed(0))
    shifted[budget.kinds["up_channel"]] += 100  # globally none of these would go
    shares = budget.by_kind(budget.harden(shifted))
    for kind, units in budget.kinds.items():
        assert shares[kind] == int(0.25 * len(units)) / len(units)
    whole = budget_of(target=0.25, denominator="units")
    assert whole.by_kind(whole.harden(shifted))["up_channel"] == 0


def test_the_threshold_closes_what_is_more_often_closed_and_leaves_each_layer_its_minimum():
    budget = budget_of(harden="threshold")
    keep = torch.full((len(budget.costs),), 0.4)
    keep[7::10], keep[3::10] = 0.6, 0.5  # as often closed as open is not more often open
    kept = budget.threshold(keep)
    assert kept[keep > 0.5].all()
    sizes = [g.size for g in budget.groups]
    for group, part, open_ in zip(budget.groups, kept.split(sizes), (keep > 0.5).split(sizes), strict=True):
        if group.whole is None:
            assert part.sum() == max(open_.sum(), 4 if group.in_ffn else 1), group.kind
    both = (masks(*whole_units(budget.groups, mask)) for mask in (kept, keep > 0.5))
    for (_, neurons), (_, open_) in zip(*both, strict=True):
        assert neurons.sum() == max(open_.sum(), 4), "of which both halves stay"


@pytest.mark.parametrize("harden", ["budget", "threshold"])
def test_gate_and_up_channels_leave_the_same_neurons_as_a_minimum(harden):
    """Each by itself would keep its own best, and no neuron might have both halves."""
    budget = budget_of(units=["gate_channel", "up_channel"], target=0.8, scope="local", denominator="units")
    scores = torch.zeros(len(budget.costs))
    scores[budget.kinds["gate_channel"]] = rising = torch.arange(len(scores) // 2) / len(scores)  # all below one half
    scores[budget.kinds["up_channel"]] = 0.5 - rising
    kept = budget.harden(scores) if harden == "budget" else budget.threshold(scores)
    for _, neurons in masks(*whole_units(budget.groups, kept)):
        assert neurons.sum() >= 4


@pytest.mark.parametrize("penalty", ["lagrangian", "hinge"])
def test_local_counts_are_of_each_kind(penalty):
    budget = budget_of(target=0.25, scope="local", denominator="units", penalty=penalty)
    keep = torch.full((len(budget.costs),), 0.9)
    keep[budget.kinds["v_channel"]] = 0.3
    keep[budget.kinds["up_channel"]] = 0.5  # as `threshold` has it: closed, unless more often open
    found = dict(zip(budget.kinds, budget.measured(keep).tolist(), strict=True))
    assert found["k_channel"] == pytest.approx(0.1 if penalty == "hinge" else 0.05)
    assert found["v_channel"] == pytest.approx(0.7 if penalty == "hinge" else 0.85)
    assert found["up_channel"] == pytest.approx(0.5 if penalty == "hinge" else 0.75)
    whole = budget_of(target=0.25, penalty=penalty)
    assert whole.measured(keep).ndim == 0


@pytest.mark.parametrize("beta", [2 / 3, 2.0])
def test_each_kind_is_held_to_its_own_target(beta):
    budget = budget_of(target=0.25, scope="local", denominator="units")
    gates = BackboneGates(budget.groups, beta=beta)
    with torch.no_grad():
        gates.logits.copy_(3 * torch.randn(len(gates.logits), generator=torch.Generator().manual_seed(0)))
    for units, counts in budget.scopes():
        gates.shift_to_target(0.25, 0.01, counts, units)
    found = budget.measured(gates.gate.keep(gates.logits))
    assert (found - 0.25).abs().max() < 0.02


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"units": ["channel", "up_channel"]}, "channel owns the weights of up_channel, which would be counted twice"),
        ({"units": ["kv_group", "o_channel"]}, "kv_group owns the weights of o_channel"),
        (
            {"units": ["channel", "down_channel", "gate_channel"]},
            "channel owns the weights of down_channel and gate_channel",
        ),
        ({"units": ["gate"]}, "must be some of channel, kv_group, gate_channel"),
        ({"penalty": "hinge", "target": 0.0}, "hinge with sparsity.target 0 would press on nothing"),
        ({"penalty": "absolute", "target": 0.0}, "absolute with sparsity.target 0 would press on nothing"),
        ({"autoscale": True}, "scales penalty hinge or absolute; got penalty lagrangian"),
        ({"scope": "local"}, "set sparsity.denominator to units; got body"),
        ({"units": ["up_channel"], "layout": "uniform"}, "layout uniform is of whole units"),
        ({"units": ["k_channel"], "multiple_of": 8}, "multiple_of 8 is of whole units"),
        ({"harden": "threshold", "multiple_of": 8}, "threshold leaves any widths"),
        ({"harden": "round"}, "sparsity.harden must be budget or threshold; got 'round'"),
        ({"beta": 0.0}, "sparsity.beta must be > 0"),
        ({"beta_end": float("inf")}, "sparsity.beta_end must be > 0 and finite"),
        ({"gate": "ddp", "beta": 2.0}, "are of gate hc"),
        ({"initial": float("nan")}, "sparsity.initial must be finite"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, wanted):
    with pytest.raises(KoffError, match=wanted) as caught:
        SparsitySpec(**options)
    assert "\n" not in str(caught.value)


def test_a_local_target_out_of_reach_names_the_kind():
    with pytest.raises(KoffError, match="0.97 of down_channel cannot be reached: with 4"):
        budget_of(target=0.97, scope="local", denominator="units")
