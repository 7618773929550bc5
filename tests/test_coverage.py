from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from tiny_run import Batches, RandomText, tiny_module, tiny_trainer

from koff_lightning import KoffError, SparsitySpec
from koff_lightning.backbone import attention_modules
from koff_lightning.callbacks import GradientCoverage
from koff_lightning.callbacks.coverage import _faults, _message
from koff_lightning.data.packing import IGNORED


class At(Callback):
    """Do something to the module before a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.action(pl_module)


class Tamper(Callback):
    """Do something to the gradients after every backward."""

    def __init__(self, action):
        self.action = action

    def on_after_backward(self, trainer, pl_module):
        self.action(pl_module)


def fit(folder, *callbacks, data=None, trainer=None, **options):
    coverage = GradientCoverage()
    runner = tiny_trainer(folder, [*callbacks, coverage], **trainer or {})
    runner.fit(tiny_module(folder, **options), data or RandomText())
    return coverage


@pytest.mark.parametrize("gate", ["hc", "ddp"])
@pytest.mark.parametrize("joint", [True, False])
def test_a_healthy_run_passes_every_phase(tmp_path, gate, joint):
    coverage = fit(tmp_path, sparsity=SparsitySpec(target=0.2, min_channels=4, gate=gate), joint=joint)
    assert coverage._phase == "consolidate"
    assert {"LoRA of en", "KV memory of law"} <= coverage._checked


@pytest.mark.parametrize("options", [{"lora": None}, {"kv": None}, {"shared_memory": True}])
def test_ablations_pass(tmp_path, options):
    fit(tmp_path, **options)


def test_a_run_without_a_mask_passes(tmp_path):
    assert "mask" not in fit(tmp_path, sparsity=SparsitySpec(target=0.0, min_channels=4))._checked


def test_a_detached_kv_memory_is_named(tmp_path):
    def detach(module):
        for attention in attention_modules(module.model.backbone):
            attention.koff_memory = _detached(attention.koff_memory)

    with pytest.raises(
        KoffError, match=r"'warmup'.*8 have no usable gradient: model\.memories\.kv\.koff_en\S* \(none\).*more"
    ):
        fit(tmp_path, At(0, detach))


def _detached(read):
    def detached():
        memory = read()
        return memory and replace(memory, key=memory.key.detach(), value=memory.value.detach())

    return detached


def test_one_unread_layer_is_named(tmp_path):
    def unread(module):
        attention_modules(module.model.backbone)[1].koff_memory = lambda: None

    with pytest.raises(KoffError, match=r"4 have no usable gradient: model\.memories\.kv\.koff_en\.\w+\.1 \(none\)"):
        fit(tmp_path, At(0, unread))


def test_each_phase_is_checked_anew(tmp_path):
    def freeze(module):
        module.model.gates.logits.requires_grad_(False)

    with pytest.raises(KoffError, match=r"'ramp' trains .* at step 2 .*gates\.logits \(none\)"):
        fit(tmp_path, At(2, freeze))


def test_a_domain_that_comes_late_is_checked(tmp_path):
    class Late(RandomText):
        def train_dataloader(self):
            return Batches([self.batch([domain], 0) for domain in ("en", "law", *["en"] * 9)])

    def zero(module):
        for parameter in module.model.memories.kv_parameters("law"):
            parameter.grad = None if parameter.grad is None else torch.zeros_like(parameter)

    with pytest.raises(KoffError, match=r"at step 1 .*koff_law\S* \(all zero\)"):
        fit(tmp_path, Tamper(zero), data=Late())


def test_domains_are_gathered_over_accumulated_batches(tmp_path):
    class Alternating(RandomText):
        def train_dataloader(self):
            return Batches([self.batch([["en"], ["law"]][i % 2], i) for i in range(20)])

    coverage = fit(tmp_path, data=Alternating(), trainer={"accumulate_grad_batches": 2})
    assert {"KV memory of en", "KV memory of law"} <= coverage._checked


def test_rows_without_a_domain_touch_nothing(tmp_path):
    coverage = fit(tmp_path, data=RandomText(domains=["en", None]))
    assert "KV memory of law" not in coverage._checked


def test_data_of_unknown_length_wants_a_number_of_steps(tmp_path):
    class Unending(RandomText):
        def train_dataloader(self):
            return iter(super().train_dataloader())

    with pytest.raises(KoffError, match=r"a schedule needs an end: set trainer\.max_steps"):
        fit(tmp_path, data=Unending(), trainer={"steps": -1, "max_epochs": 1})
    fit(tmp_path, data=Unending())


def test_a_domain_of_which_nothing_is_predicted_is_not_present(tmp_path):
    class Mute(RandomText):
        def train_dataloader(self):
            batches = [self.batch(self.domains, i) for i in range(20)]
            for batch in batches[:2]:
                batch["labels"][[domain == "law" for domain in batch["domains"]]] = IGNORED
            return Batches(batches)

    assert {"KV memory of en", "KV memory of law"} <= fit(tmp_path, data=Mute())._checked


def test_not_finite_is_named(tmp_path):
    def spoil(module):
        module.model.memories.lora_parameters("en")[0].grad[0, 0] = torch.inf

    with pytest.raises(KoffError, match="gradients of domain en .lora. are not finite at step 0"):
        fit(tmp_path, Tamper(spoil))


def test_one_number_that_is_not_finite_spoils_its_tensor():
    """A part with it is not known to learn: it is checked again at the next step."""
    sound, odd = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    sound.grad, odd.grad = torch.ones(3), torch.tensor([1.0, torch.inf, 1.0])
    assert _faults([sound, odd], {sound: "a", odd: "b"}, SimpleNamespace(learns_now=False)) == {odd: "not finite"}


def test_three_are_named_and_the_others_counted():
    assert "c (none). They" in _message(dict.fromkeys("abc", "none"), 3, "ramp", 0)
    assert "c (none) and 1 more. They" in _message(dict.fromkeys("abcd", "none"), 4, "ramp", 0)


def test_zeros_behind_closed_gates_pass_but_not_a_memory_of_zeros(tmp_path):
    def zero_layer(module, layers):
        if module.phase == "ramp":
            for name, parameter in module.model.memories.kv["koff_en"].named_parameters():
                if int(name.rsplit(".")[-1]) in layers:
                    parameter.grad.zero_()

    fit(tmp_path, Tamper(lambda module: zero_layer(module, {0})))
    with pytest.raises(KoffError, match=r"'ramp'.*koff_en\S+ \(all zero\)"):
        fit(tmp_path, Tamper(lambda module: zero_layer(module, {0, 1})))
