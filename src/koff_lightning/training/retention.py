"""Retention: when a step takes general text, under which memory, and what that moves. All by the number of the step.

No rank looks at its data to decide, so all take the term together; and a run that goes on decides as one that was never
cut.
"""

import hashlib
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from koff_lightning.decomposition import Batch, Decomposition
from koff_lightning.specs.training import RetentionSpec
from koff_lightning.support.errors import KoffError
from koff_lightning.training.optim import loss_scale
from koff_lightning.training.settled import settled


def drawn(model: Decomposition, step: int) -> str:
    """The domain whose memory is in force in that step, each as likely as the others; by the run's seed alone."""
    place = repr((int(model.gates.seed), step, "retention")).encode()
    # A CRC would not do: it is linear, so numbers as alike as those of steps fall on few of the remainders.
    return model.domains[int(hashlib.sha256(place).hexdigest(), 16) % len(model.domains)]


def moved_parts(
    spec: RetentionSpec, model: Decomposition, domain: str, mask_learns: bool, memories_on: bool
) -> list[nn.Parameter]:
    """What general text under the memory of that domain moves, of what is learned now."""
    parts = [model.gates.logits] if mask_learns else []
    if spec.updates == "both" and memories_on:
        parts += model.memories.lora_parameters(domain) + model.memories.kv_parameters(domain)
    return [part for part in parts if part.requires_grad]


def general_text(trainer: Trainer, every: int, step: int, batch_idx: int) -> Batch:
    """The micro-batch of general text beside micro-batch `batch_idx` of a step that takes it, on this rank's device."""
    many = trainer.accumulate_grad_batches
    batch = trainer.datamodule.general.batch_number(step // every * many + batch_idx % many)
    return trainer.strategy.batch_to_device(batch)


def retention_loss(module: LightningModule, batch_idx: int) -> Tensor:
    """The term mu R: the loss on general text under a memory drawn at random, scalar in nats; 0 in a step without.

    Its gradient is taken at once, so that the domains' rows can have other gates and memories in force, which a
    checkpointed layer reads again in the backward.

    Args:
        module: The KOFFModule in training.
        batch_idx: Number of the micro-batch.

    Raises:
        KoffError: The loss is not finite, and such steps are not skipped.
    """
    spec, model, step = module.retention, module.model, module.global_step
    domain = drawn(model, step) if spec and spec.is_due(step) else None
    moves = moved_parts(spec, model, domain, module.learns_now, module.memories_on) if domain else []
    if not moves:
        return torch.zeros((), device=module.device)
    batch = general_text(module.trainer, spec.every, step, batch_idx)
    rows, place = len(batch["labels"]), (step, -1 - batch_idx, module.global_rank)  # other noise than the domains'
    mask = model.gates.draw(rows, place) if module.learns_now or model.gates.hardened else None
    memories = [domain if module.memories_on else None] * rows
    found = module.objective(batch, mask, memories, torch.zeros(rows, dtype=torch.long, device=module.device))
    module.guard.check_loss(found.loss, found.tokens, found.predicted, batch["domains"], step)
    for logger in module.trainer.loggers:  # not by `log`, which would repeat the value in the steps that follow
        logger.log_metrics({"train/retention": float(found.loss.detach())}, step)
    return spec.weight * settled(found.loss, moves, loss_scale(module.trainer))


def check_text(spec: RetentionSpec | None, data: Any) -> None:
    """Refuse retention without text before the first step; say of text without retention that no step takes it.

    Args:
        spec: Options of the model; None for no retention.
        data: The datamodule.

    Raises:
        KoffError: There is no text.
    """
    general = getattr(data, "general", None)
    if spec is not None and general is None:
        raise KoffError(
            "model.retention keeps what the model does on general text, and there is none: name some in "
            "data.retention, as in data.domains, or set model.retention to null"
        )
    if spec is None and general is not None:
        rank_zero_info("general text (data.retention) is scored and part of no step: model.retention is null")
