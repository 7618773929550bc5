"""The optimizer: which parameters move at which rate, step by step, and that nothing else pulls at them."""

import math

import pytest
import torch
from lightning.pytorch import Trainer
from tiny_run import tiny_module

from koff_lightning import KoffError, LoraSpec, OptimSpec
from koff_lightning.gates import BackboneGates
from koff_lightning.penalties import LagrangianPenalty
from koff_lightning.training.optim import (
    ResumableLambdaLR,
    clip_by_group,
    optimizer_and_rates,
    parameter_groups,
    rate_lambdas,
)


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    made = tiny_module(tmp_path_factory.mktemp("optim"), lora=LoraSpec(rank=2))
    made.configure_model()
    return made


def groups_of(module, **options):
    return parameter_groups(module.model.gates, module.penalty, module.model.memories, OptimSpec(**options))


def test_everything_that_is_trained_is_in_one_group_and_nothing_else(module):
    grouped = [id(p) for group in groups_of(module) for p in group["params"]]
    trained = [id(p) for p in module.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trained)
    assert len(set(grouped)) == len(grouped)


def test_rates_rise_from_the_first_step_and_fall_to_the_final_share(module):
    """Warm-up over w of n steps: step s trains at (s + 1) / (w n), never at 0; then a cosine to `final`."""
    spec, steps = OptimSpec(warmup=0.25, final=0.1), 40
    groups = groups_of(module)
    factors = {g["name"]: f for g, f in zip(groups, rate_lambdas(groups, spec, steps), strict=True)}
    assert [factors["lora"](step) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors["kv"](0) == pytest.approx(0.1)
    middle = 10 + (40 - 10) // 2
    assert factors["lora"](middle) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert factors["lora"](steps) == pytest.approx(0.1)
    assert [factors["mask"](step) for step in (0, 20, 40)] == [factors["multipliers"](3)] * 3 == [1.0] * 3
    alone = rate_lambdas(groups, OptimSpec(warmup=0.0), steps)[-1]
    assert alone(0) == pytest.approx(1.0), "without a warm-up the first step has the whole rate"
    assert alone(2) == pytest.approx(1.0 - 0.9 * (1 - math.cos(math.pi / (steps - 1))) / 2)
    shortest = rate_lambdas(groups, OptimSpec(warmup=0.0, final=0.1), 2)[-1]
    assert shortest(2) == pytest.approx(0.1), "also a run of two steps ends at the final share"


def test_memories_are_clipped_each_by_its_own_norm_and_the_mask_is_not(module):
    model = module.model
    optimizer, _ = optimizer_and_rates(model.gates, module.penalty, model.memories, OptimSpec(), 10)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 3.0)
    norms = clip_by_group(optimizer, 0.5)
    for group in optimizer.param_groups:
        size = sum(parameter.numel() for parameter in group["params"])
        assert norms[group["name"]].item() == pytest.approx(3 * math.sqrt(size), rel=1e-5)
        after = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in group["params"]))
        wanted = 0.5 if group["name"] in ("lora", "kv") else 3 * math.sqrt(size)
        assert after == pytest.approx(wanted, rel=1e-4), group["name"]
        for parameter in group["params"]:
            parameter.grad = None


@pytest.mark.parametrize("shares", [{"warmup": 0.0}, {"final": 0.0}, {"final": 1.0}])
def test_shares_may_lie_at_their_ends(shares):
    OptimSpec(**shares)


@pytest.mark.parametrize("shares", [{"warmup": 1.0}, {"warmup": -0.1}, {"final": 1.01}, {"final": -0.1}])
def test_shares_beyond_their_ends_are_refused(shares):
    with pytest.raises(KoffError, match="optim.warmup and optim.final are shares of 1"):
        OptimSpec(**shares)


@pytest.mark.parametrize("name", ["mask_lr", "multiplier_lr", "lora_lr", "kv_lr", "clip"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_rate_that_moves_nothing_or_everything_is_refused(name, value):
    with pytest.raises(KoffError, match=f"rates and clip must be positive and finite; got {name}="):
        OptimSpec(**{name: value})


def test_a_run_that_goes_on_takes_the_rates_of_its_own_options_where_the_course_stands():
    def course(rate):
        optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": rate}])
        return optimizer, ResumableLambdaLR(optimizer, [lambda step: 1 / (1 + step)])

    first, schedule = course(0.5)
    for _ in range(3):
        first.step()
        schedule.step()
    second, again = course(8.0)
    second.load_state_dict(first.state_dict())
    again.load_state_dict(schedule.state_dict())
    assert second.param_groups[0]["lr"] == again.get_last_lr()[0] == 8.0 / 4
    second.step()
    again.step()
    assert second.param_groups[0]["lr"] == 8.0 / 5


def test_what_has_no_gradient_stays_where_it_is(module):
    """No weight decay: the logits of a mask, a multiplier or a memory are not pulled to zero."""
    optimizer = module_optimizer(module)
    before = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    for group in optimizer.param_groups:
        assert group["weight_decay"] == 0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, before[name]), name


def module_optimizer(module):
    module.trainer = Trainer(max_steps=40, accelerator="cpu", logger=False, enable_checkpointing=False)
    return module.configure_optimizers()["optimizer"]


def test_a_gate_of_very_many_takes_whole_steps(module):
    """Its gradient shrinks with the number of units: 1e-12 is as good as 1, and is nothing beside Adam's usual eps."""
    optimizer, logits = module_optimizer(module), module.model.gates.logits
    optimizer.zero_grad()
    before, rate = logits.detach().clone(), optimizer.param_groups[0]["lr"]
    logits.grad = torch.full_like(logits, 1e-12)
    optimizer.step()
    torch.testing.assert_close(before - logits.detach(), torch.full_like(before, rate), rtol=1e-2, atol=0)
    with torch.no_grad():
        logits.copy_(before)


def test_multipliers_climb_in_proportion_to_a_small_gap(module):
    """Not by its sign alone: a gap of 0.002 is taken at an eleventh of the pace of a large one."""
    optimizer, multiplier = module_optimizer(module), module.penalty.linear
    optimizer.zero_grad()
    before = multiplier.item()
    multiplier.grad = torch.full_like(multiplier, 0.002)
    optimizer.step()
    assert multiplier.item() - before == pytest.approx(0.1 * 0.002 / 0.022, rel=1e-3)
    with torch.no_grad():
        multiplier.fill_(before)


def test_gates_that_move_in_a_smaller_range_have_a_smaller_rate(module):
    gates = BackboneGates(module.model.gates.groups, "ddp")
    mask = parameter_groups(gates, module.penalty, module.model.memories, OptimSpec())[0]
    assert mask["params"] == [gates.logits]
    assert mask["lr"] == pytest.approx(0.1 * OptimSpec().mask_lr)


def test_adam_averages_over_ten_and_twenty_steps_and_decays_nothing(module):
    for group in module_optimizer(module).param_groups:
        assert (group["betas"], group["weight_decay"]) == ((0.9, 0.95), 0.0)


def test_the_penalty_is_on_the_mean_of_both_counts(tmp_path):
    """Not on the soft one, behind which the hard one lags, nor on the hard one, which has no gradient."""
    from koff_lightning.sparsity import SparsitySchedule

    made = tiny_module(tmp_path)
    made.configure_model()
    made.schedule = SparsitySchedule(target=0.2, steps=2, warmup=0, ramp=0, hold=1)  # gates are drawn at step 0
    gates, budget = made.model.gates, made.model.budget
    with torch.no_grad():
        gates.logits.copy_(torch.linspace(-4, 4, len(gates.logits)))
    made.model.target = 0.2
    keep = gates.gate.keep(gates.logits)
    soft, hard = (count.item() for count in budget.counts(keep.detach()))
    assert abs(soft - hard) > 0.01, "the counts must differ for this to say anything"
    found = made.sparsity_penalty()
    assert isinstance(made.penalty, LagrangianPenalty)
    assert found.item() == pytest.approx(20 * ((soft + hard) / 2 - 0.2) ** 2, rel=1e-4)
    assert torch.autograd.grad(found, gates.logits)[0].abs().max() > 0
