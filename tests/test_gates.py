"""What a gate is: its distribution, its count, its order; and the mask as a module."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_cases import DOMAINS, make_case, plain_batch
from tiny_models import tiny_model

from koff_lightning.backbone import PrunableGroup, hidden_states, prunable_groups
from koff_lightning.gates import BackboneGates, HardConcrete, ShrinkingReLU

GATES = {"hc": HardConcrete, "ddp": ShrinkingReLU}
LOGITS = torch.linspace(-6, 6, 25)


def groups():
    return [PrunableGroup(0, "channel", 5, (), "a", 1, 10), PrunableGroup(0, "kv_group", 3, (), "b", 4, 40)]


# -------------------------------------------------------------------------------------------- hard concrete


@pytest.mark.parametrize(
    ("logit", "alive", "full"),
    [
        (-4.605, 0.0471, 0.0020),
        (-1.599, 0.5, 0.0393),
        (0.0, 0.8318, 0.1682),
        (3.0, 0.9900, 0.8024),
        (4.605, 0.9980, 0.9529),
    ],
)
def test_hard_concrete_has_the_mass_of_the_closed_form(logit, alive, full):
    """P(m > 0) = sigmoid(a + 1.5986), P(m = 1) = sigmoid(a - 1.5986) (Louizos et al. 2018, eq. 12)."""
    torch.manual_seed(0)
    draws = HardConcrete().sample(torch.full((1000,), logit), rows=100)
    assert HardConcrete().keep(torch.tensor(logit)).item() == pytest.approx(alive, abs=2e-4)
    assert (draws > 0).float().mean().item() == pytest.approx(alive, abs=5e-3)
    assert (draws == 1).float().mean().item() == pytest.approx(full, abs=5e-3)
    assert 0 <= draws.min() <= draws.max() <= 1


def test_hard_concrete_draws_rows_apart_and_passes_gradients():
    torch.manual_seed(0)
    logits = torch.zeros(2000, requires_grad=True)
    draws = HardConcrete().sample(logits, rows=3)
    assert draws.shape == (3, 2000)
    assert (draws[0] != draws[1]).float().mean() > 0.3
    (slope,) = torch.autograd.grad(draws.sum(), logits)
    between = ((draws > 0) & (draws < 1)).any(0)
    assert (slope[between] > 0).all()
    assert not slope[~between].any()


def test_noise_at_its_ends_is_finite(monkeypatch):
    for noise in (0.0, 1.0):
        monkeypatch.setattr(torch, "rand", lambda *shape, noise=noise, **_: torch.full(shape, noise))
        assert HardConcrete().sample(LOGITS).tolist() == [[float(noise > 0)] * 25]
        ends = torch.tensor([-torch.inf, torch.inf])
        assert HardConcrete().sample(ends).tolist() == [[0.0, 1.0]], "no noise brings back what is closed for good"


# ------------------------------------------------------------------------------------------ shrinking ReLU


def test_shrinking_relu_is_a_relu_that_a_closed_unit_can_leave():
    logits = LOGITS.clone().requires_grad_()
    values = ShrinkingReLU().sample(logits, rows=7)
    assert torch.equal(values, LOGITS.clamp(min=0)[None])
    assert torch.equal(torch.autograd.grad(values.sum(), logits)[0], torch.ones(25))


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_its_count_runs_from_zero_to_one_over_two_mu(progress):
    gate = ShrinkingReLU()
    gate.anneal(progress)
    ends = gate.keep(torch.tensor([-1.0, 0.0, gate.mu, 2 * gate.mu, 5.0]))
    torch.testing.assert_close(ends, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]), atol=3e-4, rtol=0)
    logits = torch.tensor([-0.1, 0.0, 3 * gate.mu], requires_grad=True)
    assert (torch.autograd.grad(gate.keep(logits).sum(), logits)[0] > 1e-3).all(), "beyond its ends too it has a slope"


def test_mu_falls_as_a_square_root():
    gate = ShrinkingReLU()
    values = []
    for progress in (-1.0, 0.0, 0.25, 1.0, 2.0):
        gate.anneal(progress)
        values.append(gate.mu)
    assert values == pytest.approx([0.5, 0.5, 0.3, 0.1, 0.1])


# ---------------------------------------------------------------------------------------------- both kinds


@pytest.mark.parametrize("kind", GATES)
@given(
    logits=st.lists(st.floats(-6, 6, width=32), min_size=1, max_size=30),
    delta=st.floats(-10, 10),
    more=st.floats(0, 10),
    progress=st.floats(0, 1),
)
@settings(max_examples=30, deadline=None)
def test_a_shift_keeps_more_the_larger_it_is(kind, logits, delta, more, progress):
    gate, logits = GATES[kind](), torch.tensor(logits)
    gate.anneal(progress)
    less, most = (gate.keep(gate.shift(logits, d)) for d in (delta, delta + more))
    assert (most - less).min() >= -1e-6


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_a_shift_of_shrinking_relus_is_the_flow_that_moves_those_near_the_threshold_most(progress):
    gate = ShrinkingReLU()
    gate.anneal(progress)
    z = torch.linspace(-3, 3, 61, dtype=torch.float64)
    step = 1e-6
    speed = (gate.shift(z, step) - gate.shift(z, -step)) / (2 * step)
    u = (z - gate.mu) / (2 * gate.width)
    assert torch.allclose(speed, 1 / (1 + u**2), rtol=1e-6), "du/dt = 1 / (1 + u^2), in units of 2 width"
    assert torch.allclose(gate.shift(z, 0.0), z), "no time, no move"
    assert torch.allclose(gate.shift(gate.shift(z, 0.7), -1.9), gate.shift(z, -1.2)), "two moves are one"


@pytest.mark.parametrize("kind", GATES)
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=30))
@settings(max_examples=40, deadline=None)
def test_a_prior_keeps_the_order_and_starts_nearly_dense(kind, order):
    gate, order = GATES[kind](), torch.tensor(order).sort().values
    prior = gate.prior(order)
    assert (prior.diff() >= 0).all()
    assert gate.keep(gate.prior(torch.zeros(3))).min() > 0.98


@pytest.mark.parametrize("beta", [2 / 3, 2.0])
def test_sharpened_logits_lie_a_fifth_further_from_where_a_gate_is_half_open(beta):
    gate = HardConcrete(beta)
    sharp = gate.sharpen(LOGITS)
    torch.testing.assert_close(sharp - gate.offset, 1.2 * (LOGITS - gate.offset))
    soft, hard = gate.keep(LOGITS), (gate.keep(LOGITS) > 0.5).float()
    assert ((gate.keep(sharp) - hard).abs() <= (soft - hard).abs()).all(), "nearer to the hard count, which stays"


def test_sharpening_shrinking_relus_narrows_their_count_until_the_next_step():
    gate = ShrinkingReLU()
    gate.anneal(0.5)
    mu = gate.mu
    assert torch.equal(gate.sharpen(LOGITS), LOGITS)
    assert (gate.mu, gate.width) == (mu, pytest.approx(mu / 1.2))
    gate.anneal(0.5)
    assert gate.width == mu


@pytest.mark.parametrize("kind", GATES)
def test_a_new_mask_is_nearly_dense(kind):
    mask = BackboneGates(groups(), kind)
    assert mask.gate.keep(mask.logits).min() > 0.98
    assert mask.logits.dtype == torch.float32
    assert not mask.hardened


@pytest.mark.parametrize("kind", GATES)
@given(
    seed=st.integers(0, 100),
    spread=st.floats(0.1, 4.0),
    target=st.floats(0.05, 0.9),
    band=st.sampled_from([0.001, 0.01, 0.1]),
    progress=st.floats(0, 1),
)
@settings(max_examples=30, deadline=None)
def test_shift_to_target_brings_the_count_into_the_band_and_no_further(kind, seed, spread, target, band, progress):
    if kind == "ddp":  # its logits come down with the ramp: late in the run they do not lie where they began
        progress, target = min(progress, 0.4), min(target, 0.7)
    mask = BackboneGates([PrunableGroup(0, "channel", 400, (), "a", 1, 1)], kind)
    mask.gate.anneal(progress)
    with torch.no_grad():
        noise = torch.randn(400, generator=torch.Generator().manual_seed(seed))
        mask.logits.add_(noise * spread * mask.gate.rate)
    before = mask.logits.detach().clone()

    def sparsity(keep):
        return (1 - keep).mean()

    def counts(keep):  # both alike: only the shift is looked at
        return sparsity(keep), sparsity(keep)

    was = float(sparsity(mask.gate.keep(before)))
    mask.shift_to_target(target, band, counts)
    now = float(sparsity(mask.gate.keep(mask.logits.detach())))
    assert abs(now - target) <= band + 1e-4
    if abs(was - target) <= band:
        assert torch.equal(mask.logits, before), "inside the band nothing is touched"
    else:
        assert abs(now - target) >= band - 1e-4, "the least shift ends at the edge of the band"
    mask.shift_to_target(target, band, counts)
    assert abs(float(sparsity(mask.gate.keep(mask.logits.detach()))) - now) < 1e-4, "twice is once"


def test_shift_to_target_reaches_any_target_from_anywhere():
    mask = BackboneGates([PrunableGroup(0, "channel", 400, (), "a", 1, 1)], "ddp")
    mask.gate.anneal(1.0)
    mask.shift_to_target(0.5, 0.01, lambda keep: ((1 - keep).mean(),) * 2)
    assert (1 - mask.gate.keep(mask.logits.detach())).mean().item() == pytest.approx(0.5, abs=0.02)


def test_shift_to_target_sharpens_until_soft_and_hard_count_agree():
    mask = BackboneGates([PrunableGroup(0, "channel", 4000, (), "a", 1, 1)])
    with torch.no_grad():
        mask.logits.add_(0.5 * torch.randn(4000))
    mask.shift_to_target(0.12, 0.004, lambda keep: ((1 - keep).mean(), (keep < 0.5).float().mean()))
    keep = mask.gate.keep(mask.logits.detach())
    soft, hard = (1 - keep).mean().item(), (keep < 0.5).float().mean().item()
    assert abs(soft - hard) <= 0.024
    assert (soft + hard) / 2 == pytest.approx(0.12, abs=0.0041)


def test_shift_to_target_keeps_the_order_of_hard_concrete_logits():
    mask = BackboneGates([PrunableGroup(0, "channel", 400, (), "a", 1, 1)])
    with torch.no_grad():
        mask.logits.add_(torch.randn(400))
    order = mask.logits.argsort()
    mask.shift_to_target(0.3, 0.001, lambda keep: ((1 - keep).mean(),) * 2)
    assert torch.equal(mask.logits.argsort(), order)


def test_the_prior_orders_by_importance_per_parameter():
    mask = BackboneGates(groups())
    costs = torch.tensor([10] * 5 + [40] * 3)
    mask.importance.copy_(
        torch.tensor([5.0, 1.0, 3.0, 4.0, 2.0, 4.0, 100.0, 18.0])
    )  # per parameter: .5 .1 .3 .4 .2 .1 2.5 .45
    mask.order_by_prior(costs, 2.0)
    assert mask.logits.argsort().tolist()[2:] == [4, 2, 3, 7, 0, 6]
    assert mask.logits.std(correction=0).item() == pytest.approx(2.0, rel=0.2)
    assert mask.logits.mean().item() == pytest.approx(mask.gate.initial, abs=1e-5)


def test_without_observations_the_logits_stay_equal():
    mask = BackboneGates(groups())
    mask.order_by_prior(torch.ones(8), 4.0)
    assert mask.logits.unique().numel() == 1


def test_units_that_are_worth_the_same_start_in_their_own_order():
    """Whatever the device's way of sorting: two runs, or two ranks, begin with one mask."""
    mask = BackboneGates([PrunableGroup(0, "channel", 1000, (), "a", 1, 10)])
    mask.order = torch.arange(1000) // 500  # two classes of 500 alike
    mask.order_by_prior(torch.ones(1000), spread=1.0)
    assert (mask.logits.diff() > 0).all()


def test_an_order_that_is_given_goes_before_what_was_observed():
    mask = BackboneGates(groups())
    mask.importance.copy_(torch.arange(8.0))
    mask.order = torch.tensor([3.0, 1.0, 7.0, 2.0, 0.0, 6.0, 5.0, 4.0])
    mask.order_by_prior(torch.ones(8), 2.0)
    assert torch.equal(mask.logits.argsort().argsort().float(), mask.order)


def test_runs_of_other_seeds_draw_other_gates():
    drawn = []
    for seed in (0, 1, 62, 2**31 - 1, 3 * 2**31 + 5):
        torch.manual_seed(seed)
        mask = BackboneGates(groups())
        assert int(mask.seed) == seed % 2**31, "a run that goes on by a later release draws what it would have drawn"
        drawn.append(mask.draw(4, (7, 0)))
        torch.manual_seed(seed)
        assert torch.equal(BackboneGates(groups()).draw(4, (7, 0)), drawn[-1])
    for one, other in combinations(drawn, 2):
        assert not torch.equal(one, other)


def test_each_step_micro_batch_and_rank_draws_gates_of_its_own_and_the_same_ones_again():
    mask = BackboneGates(groups())
    places = [(7, 0, 0), (8, 0, 0), (7, 1, 0), (7, 0, 1)]
    drawn = [mask.draw(4, place) for place in places]
    assert all(torch.equal(mask.draw(4, place), one) for place, one in zip(places, drawn, strict=True))
    for one, other in combinations(drawn, 2):
        assert not torch.equal(one, other)


def test_probe_and_observe_collect_squared_gradients_per_row():
    mask = BackboneGates(groups())
    weight = torch.arange(16.0).view(2, 8)
    (mask.probe(2) * weight).sum().backward()
    mask.observe()
    torch.testing.assert_close(mask.importance, weight.square().sum(0))
    mask.observe()  # nothing new
    torch.testing.assert_close(mask.importance, weight.square().sum(0))
    for bad in (math.nan, math.inf):
        (mask.probe(2) * weight.index_fill(1, torch.tensor([3]), bad)).sum().backward()
        mask.observe()  # a step that is skipped, whichever gate overflowed
        torch.testing.assert_close(mask.importance, weight.square().sum(0))


def test_a_loss_that_was_scaled_is_observed_as_it_was():
    mask = BackboneGates(groups())
    weight = torch.arange(16.0).view(2, 8)
    for scale in (2.0**16, 2.0**12):  # as 16-bit training finds its own
        (scale * (mask.probe(2) * weight).sum()).backward()
        mask.observe(scale)
    torch.testing.assert_close(mask.importance, 2 * weight.square().sum(0))


def test_what_removed_units_leave_behind_is_of_the_gated_model_alone():
    """Gates that are off, or none in force, are the dense model bit for bit, also under a mask with biases."""
    model = tiny_model("llama").requires_grad_(False)
    mask = BackboneGates(prunable_groups(model))
    mask.attach(model)
    ids = torch.arange(3, 23).view(2, 10)
    dense = hidden_states(model, input_ids=ids)
    mask.bias = torch.ones(len(mask.groups), dense.shape[-1])
    assert torch.equal(hidden_states(model, input_ids=ids), dense)
    mask.set(torch.ones(1, len(mask.logits)))
    assert not torch.allclose(hidden_states(model, input_ids=ids), dense, atol=0.1)
    with mask.off():
        assert torch.equal(hidden_states(model, input_ids=ids), dense)
    mask.set(None)
    assert torch.equal(hidden_states(model, input_ids=ids), dense)


def test_a_value_acts_on_all_columns_of_its_unit():
    model = tiny_model("llama").requires_grad_(False)
    mask = BackboneGates(prunable_groups(model))
    mask.attach(model)
    seen = {}
    for group in mask.groups:
        model.get_submodule(group.consumer).register_forward_hook(
            lambda m, a, o, name=group.consumer: seen.update({name: a[0]})
        )
    ids = torch.arange(3, 23).view(2, 10)
    hidden_states(model, input_ids=ids)
    dense = dict(seen)
    for unit in (0, 95, 96, 97):  # neurons 0 and 95 and kv heads 0 and 1 of layer 0
        values = torch.ones(1, len(mask.logits))
        values[0, unit] = 0
        mask.set(values)
        hidden_states(model, input_ids=ids)
        group = mask.groups[int(unit >= 96)]
        first = (unit - 96 * int(unit >= 96)) * group.width
        removed = torch.zeros(dense[group.consumer].shape[-1], dtype=torch.bool)
        removed[first : first + group.width] = True
        got = seen[group.consumer]
        assert not got[..., removed].any()
        if group.kind == "kv_group":
            assert torch.equal(got[..., ~removed], dense[group.consumer][..., ~removed])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kind", ["hc", "ddp"])
def test_what_a_gate_lets_through_has_the_slopes_of_a_product(kind, rows, dtype, near):
    """Of a hard concrete gate x is not kept for the backward, and a closed one has no slope anyway."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, 8, generator=random).to(dtype).requires_grad_()
    logits = torch.linspace(-6, 6, 8).requires_grad_()
    mask, slope = BackboneGates(groups(), kind), torch.randn(3, 40, 8, generator=random).to(dtype)
    values = mask.gate.sample(logits, rows, random).unsqueeze(1)  # [R, 1, C]
    assert (values == 0).any()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        got = mask._gated(x, values)
    plain = x * values.to(dtype)
    assert torch.equal(got, plain)
    assert (x.data_ptr() in kept) == (kind == "ddp")
    found = torch.autograd.grad(got, (x, logits), slope, retain_graph=True)
    due = torch.autograd.grad(plain, (x, logits), slope)
    assert torch.equal(found[0], due[0])
    torch.testing.assert_close(found[1], due[1], rtol=near, atol=near)
    assert due[1].abs().max() > 0.1
    with torch.no_grad():
        assert torch.equal(mask._gated(x, values), plain)


@pytest.mark.parametrize("gate", [0.1, 0.01, 0.001])
def test_a_nearly_closed_gate_learns_in_fp16(gate):
    """There slope times product is below the least number, while slope times x is not."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 500, 8, generator=random).mul(0.1).half()
    slope = (x.sign() * 1e-4).half()
    values = torch.full((1, 1, 8), gate, requires_grad=True)
    (found,) = torch.autograd.grad(BackboneGates(groups())._gated(x, values), values, slope)
    due = (x.double() * slope.double()).sum(1, keepdim=True)
    torch.testing.assert_close(found.double(), due, rtol=5e-3, atol=0)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("kind", ["channel", "kv_group", "gate_channel", "v_channel", "o_channel"])
def test_a_learned_gate_keeps_no_more_than_a_product_does(kind, lora, monkeypatch):
    """Attention keeps its output in any case: were the product kept too, o_proj without an adapter would cost more."""
    case = make_case("llama", kinds=[kind], lora=lora)
    own = {p.untyped_storage().data_ptr() for p in case.model.parameters()}

    def kept():
        values = case.gates.gate.sample(case.gates.logits, 3, torch.Generator().manual_seed(0))
        case.bank.activate(DOMAINS)
        case.gates.set(values)
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.untyped_storage()) or t, lambda t: t):
            hidden_states(case.model, **plain_batch(length=30))
        return sum({part.data_ptr(): part.nbytes() for part in seen if part.data_ptr() not in own}.values())

    ours = kept()
    monkeypatch.setattr(BackboneGates, "_gated", lambda _, x, values, *__: x * values)
    plain = kept()
    assert ours < plain if lora and kind == "channel" else ours <= plain


def test_hardening_is_final_and_exact():
    mask = BackboneGates(groups())
    kept = torch.tensor([True, False] * 4)
    mask.harden(kept)
    assert mask.hardened
    assert torch.equal(mask.draw(5), kept.float()[None])
    assert not mask.draw().requires_grad, "the logits no longer act"
    again = BackboneGates(groups())
    again.load_state_dict(mask.state_dict())
    assert again.hardened
    assert torch.equal(again.draw(), mask.draw())


def test_off_restores_what_was_in_force_even_after_an_error():
    mask = BackboneGates(groups())
    mask.set(torch.zeros(1, 8))
    before = mask._columns
    with pytest.raises(ZeroDivisionError), mask.off():
        assert mask._columns is None
        raise ZeroDivisionError
    assert mask._columns is before
