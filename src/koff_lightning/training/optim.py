"""One AdamW with a group for each kind of thing that is trained."""

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from koff_lightning.artifact.checkpoint_schema import ADAMW
from koff_lightning.gates import BackboneGates
from koff_lightning.memory import MemoryBank
from koff_lightning.specs.training import OptimSpec
from koff_lightning.support.errors import KoffError


def total_steps(trainer: Trainer) -> int:
    """Optimizer steps of a run, by which its rates and its mask's course are laid out.

    Raises:
        KoffError: Nobody knows how many there will be.
    """
    steps = trainer.estimated_stepping_batches  # -1, which is max_steps, where the data does not say how long it is
    if not 1 <= steps < math.inf:
        raise KoffError("a schedule needs an end: set trainer.max_steps (or max_epochs with data of known length)")
    return int(steps)


def parameter_groups(
    gates: BackboneGates, penalty: nn.Module, memories: MemoryBank, spec: OptimSpec
) -> list[dict[str, Any]]:
    """Groups for AdamW, each with its own rate; empty ones left out."""
    # eps: a gate's gradient shrinks with the number of units and must not vanish beside Adam's default 1e-8; that of a
    # multiplier is the sparsity gap, and with a large eps the ascent is in proportion to it instead of to its sign.
    groups = [
        {"name": "mask", "params": [gates.logits], "lr": spec.mask_lr * gates.gate.rate, "eps": 1e-15},
        {
            "name": "multipliers",
            "params": list(penalty.parameters()),
            "lr": spec.multiplier_lr,
            "eps": 0.02,
            "maximize": True,
        },
        {"name": "lora", "params": memories.lora_parameters(), "lr": spec.lora_lr},
        {"name": "kv", "params": memories.kv_parameters(), "lr": spec.kv_lr},
    ]
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]  # those of a given mask do not move
    return [group for group in groups if group["params"]]


def rate_lambdas(groups: list[dict[str, Any]], spec: OptimSpec, steps: int) -> list[Callable[[int], float]]:
    """Factor on each group's rate by optimizer step: constant for the mask, warm-up and cosine for memories."""

    def course(step: int) -> float:
        rise = max(spec.warmup * steps, 1)
        fall = min(max((step - rise) / max(steps - rise, 1), 0.0), 1.0)
        return min((step + 1) / rise, 1.0) * (spec.final + (1 - spec.final) * (1 + math.cos(math.pi * fall)) / 2)

    return [course if group["name"] in ("lora", "kv") else lambda _: 1.0 for group in groups]


class ResumableAdamW(torch.optim.AdamW):
    """Torch's AdamW which, in a run that goes on, takes from the checkpoint what it has averaged and nothing else.

    Torch would take the groups' options as well, such as betas or the sign of the step, from a file that may come from
    anyone.
    """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the saved averages.

        Raises:
            KoffError: They are of another optimizer, of other groups of parameters, or of parameters of other shapes.
        """
        own = [{name: part for name, part in group.items() if name != "params"} for group in self.param_groups]
        sizes = ([len(group["params"]) for group in groups] for groups in (state["param_groups"], self.param_groups))
        if (there := next(sizes)) != (here := next(sizes)):
            raise KoffError(
                f"the checkpoint's optimizer has groups of {there} parameters, this run's of {here}: use the model "
                "options of that run"
            )
        if odd := next((kept for kept in state["state"].values() if kept.keys() != ADAMW), None):
            raise KoffError(
                f"the checkpoint's optimizer keeps {', '.join(sorted(odd)) or 'nothing'} of a parameter, this run's "
                f"AdamW {', '.join(sorted(ADAMW))}: go on with the optimizer of that run"
            )
        super().load_state_dict(state)
        for group, options in zip(self.param_groups, own, strict=True):
            group.update(options)
        for parameter, kept in self.state.items():
            if odd := [name for name, part in kept.items() if part.ndim and part.shape != parameter.shape]:
                raise KoffError(
                    f"the checkpoint's optimizer keeps {odd[0]} of shape {list(kept[odd[0]].shape)} for a parameter of "
                    f"shape {list(parameter.shape)}: use the model options of that run"
                )


class ResumableLambdaLR(LambdaLR):
    """Torch's LambdaLR which, in a run that goes on, keeps the rates that this run's options ask for.

    Torch would take the rates from the checkpoint: other options would be recorded but not acted on. Lightning restores
    the optimizer first, so what is set here is what the next step takes.
    """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the saved step; all else is this run's own."""
        super().load_state_dict(self.state_dict() | {name: state[name] for name in ("last_epoch", "_step_count")})
        groups = self.optimizer.param_groups
        for group, rate, factor in zip(groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * factor(self.last_epoch)
        self._last_lr = [group["lr"] for group in groups]


def optimizer_and_rates(
    gates: BackboneGates, penalty: nn.Module, memories: MemoryBank, spec: OptimSpec, steps: int
) -> tuple[ResumableAdamW, ResumableLambdaLR]:
    """The optimizer of a run of so many steps, and the scheduler of its learning rates."""
    groups = parameter_groups(gates, penalty, memories, spec)
    optimizer = ResumableAdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    return optimizer, ResumableLambdaLR(optimizer, rate_lambdas(groups, spec, steps))


def clip_by_group(optimizer: torch.optim.Optimizer, clip: float) -> dict[str, Tensor]:
    """Clip LoRA and KV gradients, each to norm `clip`; mask and multipliers are left as they are.

    Returns:
        The norm of each group's gradients before, by its name.
    """
    if any("name" not in group for group in optimizer.param_groups):
        raise KoffError(
            "configure_optimizers must give groups by name (mask, multipliers, lora, kv), which are clipped apart: see "
            "parameter_groups in koff_lightning.training.optim"
        )
    norms: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        if group["name"] in ("lora", "kv"):
            norms[group["name"]] = torch.nn.utils.clip_grad_norm_(group["params"], clip)
        else:
            grads = [p.grad for p in group["params"] if p.grad is not None]
            norms[group["name"]] = torch.nn.utils.get_total_norm(grads)
    return norms


def take_step(module: LightningModule, optimizer: LightningOptimizer, closure: Callable[[], Any], moves: bool) -> None:
    """Take an optimizer step as Lightning does, but past a loss scaler where nothing moves.

    Torch's fails where no parameter has a gradient, as in a warm-up without memories.

    Args:
        module: The module in training.
        optimizer: Its optimizer.
        closure: Forward and backward.
        moves: Whether the phase trains anything.
    """
    if moves or loss_scaler(module.trainer) is None:
        optimizer.step(closure=closure)
    else:
        Precision.optimizer_step(module.trainer.precision_plugin, optimizer.optimizer, module, closure)


def loss_scaler(trainer: Trainer) -> torch.amp.GradScaler | None:
    """What scales the loss of 16-bit training, so that gradients find room; None in any other."""
    return getattr(trainer.precision_plugin, "scaler", None)


def loss_scale(trainer: Trainer) -> float:
    """By what gradients are too large now: the scale of 16-bit training, which changes as it goes, else 1."""
    scaler = loss_scaler(trainer)
    return scaler.get_scale() if scaler else 1.0
