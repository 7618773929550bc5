"""The price of what is kept: when it presses, how hard, on which kinds; and the gate's options."""

from typing import get_args, get_type_hints

import pytest
import torch

from koff_lightning import KoffError
from koff_lightning.gates import HardConcrete
from koff_lightning.penalties import HingePenalty, LagrangianPenalty, make_penalty
from koff_lightning.specs.sparsity import SparsitySpec


def test_a_hinge_presses_until_the_target_is_met_and_then_no_more():
    sparsity = torch.tensor(0.10, requires_grad=True)
    price = HingePenalty(60.0)(sparsity, 0.15)
    assert price.item() == pytest.approx(60 * 0.05)
    assert torch.autograd.grad(price, sparsity)[0].item() == pytest.approx(-60)
    for met in (0.15, 0.4):
        sparsity = torch.tensor(met, requires_grad=True)
        price = HingePenalty(60.0)(sparsity, 0.15)
        assert (price.item(), torch.autograd.grad(price, sparsity)[0].item()) == (0, 0)


def test_an_absolute_price_calls_back_a_mask_that_runs_ahead():
    for found, slope in ((0.10, -60.0), (0.15, 0.0), (0.40, 60.0)):
        sparsity = torch.tensor(found, requires_grad=True)
        price = make_penalty("absolute", 60.0)(sparsity, 0.15)
        assert price.item() == pytest.approx(60 * abs(found - 0.15), abs=1e-5)
        assert torch.autograd.grad(price, sparsity)[0].item() == pytest.approx(slope)
    price = make_penalty("absolute", 60.0, autoscale=True)(torch.tensor(0.4), 0.15, torch.tensor(2.5))
    assert price.item() == pytest.approx(2.5 * 60 * 0.25)


def test_a_scaled_hinge_goes_with_the_loss_and_passes_it_no_gradient():
    data = torch.tensor(2.5, requires_grad=True)
    sparsity = torch.tensor(0.10, requires_grad=True)
    price = HingePenalty(60.0, autoscale=True)(sparsity, 0.15, data)
    assert price.item() == pytest.approx(2.5 * 60 * 0.05)
    assert torch.autograd.grad(price, [sparsity, data], allow_unused=True)[1] is None
    assert HingePenalty(60.0)(sparsity, 0.15, data).item() == pytest.approx(60 * 0.05)


def test_a_local_hinge_lets_no_kind_make_up_for_another():
    sparsity = torch.tensor([0.30, 0.00], requires_grad=True)  # 0.15 in the mean
    price = HingePenalty(10.0)(sparsity, 0.15)
    assert price.item() == pytest.approx(1.5)
    assert torch.autograd.grad(price, sparsity)[0].tolist() == [0, -10]


def test_the_plain_lagrangian_starts_without_a_price():
    plain, ours = make_penalty("plain_lagrangian", 1.0), make_penalty("lagrangian", 1.0)
    gap = torch.tensor(0.0)
    assert plain(gap, 0.12).item() == 0 < ours(gap, 0.12).item()
    slopes = torch.autograd.grad(plain(gap, 0.12), list(plain.parameters()))
    assert [s.item() for s in slopes] == pytest.approx([-0.12, 0.0144]), "its multipliers rise by ascent"


def test_local_multipliers_are_one_of_each_kind():
    penalty = LagrangianPenalty(kinds=3)
    assert [p.shape for p in penalty.parameters()] == [(3,), (3,)]
    assert LagrangianPenalty().linear.shape == (), "a checkpoint of a global target fits as before"
    for name in ("lagrangian", "plain_lagrangian"):
        assert [p.shape for p in make_penalty(name, 1.0, kinds=3).parameters()] == [(3,), (3,)]
    gaps = torch.tensor([0.1, 0.2, 0.3])
    assert penalty(gaps, 0.1).item() == pytest.approx(20 * (0.01 + 0.04))


def test_a_quadratic_multiplier_below_nothing_is_no_reward():
    penalty = LagrangianPenalty(-5.0)
    gap = torch.tensor(0.3, requires_grad=True)
    price = penalty(gap, 0.1)
    assert (price.item(), torch.autograd.grad(price, gap)[0].item()) == (0, 0)


def test_every_penalty_has_a_name_that_the_options_know():
    names = get_args(get_type_hints(SparsitySpec)["penalty"])
    for name in names:
        assert SparsitySpec(penalty=name).penalty == name
        assert make_penalty(name, 2.0)(torch.tensor(0.1), 0.2).ndim == 0
    with pytest.raises(KoffError, match="hinge"):
        SparsitySpec(penalty="hnge")


@pytest.mark.parametrize("beta", [0.5, 2 / 3, 2.0])
@pytest.mark.parametrize("logit", [-5.0, -1.0, 0.0, 3.0])
def test_the_count_of_hard_concrete_gates_is_their_mass_at_any_temperature(beta, logit):
    gate = HardConcrete(beta)
    draws = gate.sample(torch.full((1000,), logit), rows=100, random=torch.Generator().manual_seed(0))
    assert (draws > 0).float().mean().item() == pytest.approx(gate.keep(torch.tensor(logit)).item(), abs=5e-3)
    assert gate.keep(torch.tensor(gate.offset)).item() == pytest.approx(0.5)


def test_the_temperature_falls_over_the_mask_phase_or_stays():
    gate = HardConcrete(2.0, 0.5)
    found = []
    for progress in (0.0, 0.5, 1.0, 2.0):
        gate.anneal(progress)
        found.append(gate.temperature)
    assert found == [2.0, 1.25, 0.5, 0.5]
    fixed = HardConcrete()
    fixed.anneal(0.7)
    assert fixed.temperature == 2 / 3, "to the bit, as runs before this option had it"
    assert (HardConcrete().initial, HardConcrete(initial=1.5).initial) == (3.0, 1.5)
