"""GradientCoverage: stops a run in which something that should be learning gets no gradient.

A memory that is cut off from the loss trains without an error: the run ends, and the figures are those of a model that
never had it. (transformers drops a cache under activation checkpointing, for one.)
"""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.optim import Optimizer

from koff_lightning.decomposition import Decomposition
from koff_lightning.support.errors import KoffError
from koff_lightning.training.module import KOFFModule

NAMED = 3  # tensors that the error names


class GradientCoverage(Callback):
    """When a phase begins, check the gradient of everything that it trains, once for each domain that comes up.

    Every tensor must have a finite gradient. It must not be all zero either, except for LoRA's A, whose gradient is
    zero while B is, and for the multipliers, whose gradient is the gap to the target. What was frozen when training
    began is not looked for.
    """

    def __init__(self) -> None:
        self._phase = ""
        self._checked: set[str] = set()  # parts that are known to learn in this phase
        self._seen: set[str] = set()  # domains of which all parts are
        self._present: set[str] = set()  # domains of the micro-batches since the last optimizer step
        self._frozen: set[nn.Parameter] = set()

    def on_train_start(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """Note what is frozen: by who made the module, not by accident in a run."""
        self._frozen = {parameter for parameter in pl_module.parameters() if not parameter.requires_grad}

    def on_train_batch_start(self, trainer: Trainer, pl_module: KOFFModule, batch: dict[str, Any], _: int) -> None:
        """Note of which domains this optimizer step predicts anything."""
        domains = batch["domains"]
        if pl_module.phase != self._phase or not self._seen.issuperset(domains):  # else nobody waits for the device
            predicts = Decomposition.targets(batch)[1].any(1).tolist()  # [B]
            domains = [domain for domain, any_ in zip(domains, predicts, strict=True) if any_]
        self._present |= {domain for domain in domains if domain is not None}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: KOFFModule, optimizer: Optimizer) -> None:
        """Check what has not been checked in this phase; gradients are accumulated and unscaled here, not yet clipped.

        Raises:
            KoffError: A tensor that should be learning is not.
        """
        present, self._present = self._present, set()
        if pl_module.phase != self._phase:
            self._phase, self._checked, self._seen = pl_module.phase, set(), set()
        if self._checked and present <= self._seen:
            return
        trained = {part: [t for t in ts if t not in self._frozen] for part, ts in _trained(pl_module, present).items()}
        due = {part: tensors for part, tensors in trained.items() if tensors and part not in self._checked}
        if not due:
            self._seen |= present
            return
        names = {tensor: name for name, tensor in pl_module.named_parameters()}
        faults = {
            names[t]: fault for tensors in due.values() for t, fault in _faults(tensors, names, pl_module).items()
        }
        if "not finite" in faults.values():
            return  # NonFiniteGuard's business, or 16-bit training that finds its loss scale by overflowing
        if faults:
            raise KoffError(_message(faults, sum(map(len, due.values())), self._phase, trainer.global_step))
        self._checked |= due.keys()
        self._seen |= present


def _trained(module: KOFFModule, present: set[str]) -> dict[str, list[nn.Parameter]]:
    """What the current phase trains, by part, as far as the domains `present` touch it."""
    parts: dict[str, list[nn.Parameter]] = {}
    if module.learns_now:
        parts["mask"] = [module.model.gates.logits]
        parts["multipliers"] = list(module.penalty.parameters())
    for domain in sorted(present) if module.memories_on else ():
        parts[f"LoRA of {domain}"] = module.model.memories.lora_parameters(domain)
        parts[f"KV memory of {domain}"] = module.model.memories.kv_parameters(domain)
    return {part: tensors for part, tensors in parts.items() if tensors}


def _faults(tensors: list[nn.Parameter], names: dict[nn.Parameter, str], module: KOFFModule) -> dict[nn.Parameter, str]:
    """What is wrong with the gradients of one part, by tensor."""
    faults: dict[nn.Parameter, str] = {}
    for tensor in tensors:
        if tensor.grad is None:
            faults[tensor] = "none"
        elif not torch.isfinite(tensor.grad).all():
            faults[tensor] = "not finite"
    if faults:
        return faults
    moving = [t for t in tensors if "lora_A" not in names[t] and not names[t].startswith("penalty.")]
    zero = [t for t in moving if not t.grad.any()]  # whole on every rank, see training/strategies.py
    if module.learns_now and len(zero) < len(moving):
        return {}  # gates are drawn: all of a layer's may be closed, and what lies behind them gets zeros in this step
    return dict.fromkeys(zero, "all zero")


def _message(faults: dict[str, str], total: int, phase: str, step: int) -> str:
    named = ", ".join(f"{name} ({fault})" for name, fault in list(faults.items())[:NAMED])
    more = f" and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
    return (
        f"phase {phase!r} trains {total} tensors, but at step {step} {len(faults)} have no usable gradient: "
        f"{named}{more}. "
        "They would silently stay as they are; something cuts them off from the loss"
    )
