"""What Lightning's trainer offers and a decomposition cannot use: said at once, not ignored or found out in mid-run."""

import inspect
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_only

from koff_lightning.support.errors import KoffError

_CLIP = "every memory's gradients are clipped by a norm of their own: set model.optim.clip"
_AVERAGES = "it would replace the weights by averages, and with them the multipliers that hold the mask to its budget"
_RATES = "mask, multipliers and memories have rates of their own: set model.optim.mask_lr, lora_lr, kv_lr"

# option -> why it is refused and what to do
REFUSED = {
    "gradient_clip_val": _CLIP,
    "gradient_clip_algorithm": _CLIP,
    "overfit_batches": "it would not hold training to these batches: set data.max_train_bytes for a few rows of text",
    "reload_dataloaders_every_n_epochs": "every epoch would start again at the first row, so that rows further on are "
    "never read: leave it out, the data goes on by itself",
    "barebones": "it takes away the log, the checkpoints and the report that a run is for: leave it out (to look at a "
    "run that writes nothing: --dry-run)",
}
REFUSED_CALLBACKS = {
    StochasticWeightAveraging: _AVERAGES,
    WeightAveraging: _AVERAGES,
    LearningRateFinder: _RATES,
    GradientAccumulationScheduler: "the course of the mask counts on steps that are all alike: set "
    "trainer.accumulate_grad_batches",
    BaseFinetuning: "it would thaw the backbone, which stays frozen: model.joint, model.lora and model.kv say what "
    "trains",
    ModelPruning: "it would prune what the mask and the memories are: set model.sparsity",
    BatchSizeFinder: "its trial steps would train: `koff plan` says what fits; set data.batch_size",
}


def refuse_options(options: Any) -> None:
    """Refuse options of the section `trainer`, wherever they were given, or of a trainer.

    Raises:
        KoffError: One of those in REFUSED is not at its default, or the least of steps or epochs exceeds the most.
    """
    for name, reason in REFUSED.items():
        value = getattr(options, name)
        if value != inspect.signature(Trainer).parameters[name].default:
            raise KoffError(f"trainer.{name} is {value!r}, but {reason}")
    for unit in () if options.fast_dev_run else ("steps", "epochs"):
        least, most = getattr(options, f"min_{unit}"), getattr(options, f"max_{unit}")
        if None not in (least, most) and 0 <= most < least:  # -1: without end
            raise KoffError(
                f"trainer.min_{unit} is {least}, more than trainer.max_{unit}, {most}, with which the run ends: lower "
                "the one or raise the other"
            )


def refuse_endless(options: Any) -> None:
    """Refuse options of the section `trainer` that say nothing of when a run ends: Lightning would take 1000 epochs.

    A trainer that was made does not tell any more whether somebody has asked for these.

    Raises:
        KoffError: There are neither steps nor epochs nor a time, and it is no trial of a few steps.
    """
    if options.max_steps == -1 and options.max_epochs is None and options.max_time is None and not options.fast_dev_run:
        raise KoffError(
            "trainer.max_steps is not set, so nobody knows when the run ends: give --trainer.max_steps 1000, say (or "
            "trainer.max_epochs)"
        )


def refuse_callbacks(trainer: Trainer) -> None:
    """Refuse callbacks that replace weights, rates or batches.

    Raises:
        KoffError: The trainer has such a callback.
    """
    for callback in trainer.callbacks:
        for kind, reason in REFUSED_CALLBACKS.items():
            if isinstance(callback, kind):
                raise KoffError(f"trainer.callbacks: {type(callback).__name__} cannot be used here: {reason}")


def refuse_trainer(trainer: Trainer) -> None:
    """Refuse the same of a trainer that was made in Python.

    Raises:
        KoffError: As `refuse_options` and `refuse_callbacks`.
    """
    refuse_options(trainer)
    refuse_callbacks(trainer)


def refuse_no_steps(trainer: Trainer) -> None:
    """Refuse a run that would end before its first step, with nothing to show.

    Raises:
        KoffError: One of the trainer's limits is 0.
    """
    for name in ("max_steps", "max_epochs", "limit_train_batches"):
        if getattr(trainer, name) == 0:
            raise KoffError(
                f"trainer.{name} is 0, so nothing would be trained: raise it (`koff test` scores a checkpoint)"
            )


def refuse_separate_copies(trainer: Trainer) -> None:
    """Refuse to train where torchrun, SLURM or MPI have started another number of processes than the trainer uses.

    With fewer in use each would train a model of its own in the one folder; with more they would wait for ever. A
    process that is alone and takes itself for another than the first would keep no log.

    Raises:
        KoffError: The launcher has started another number of processes, or there is only a launcher's variable.
    """
    environment = trainer._accelerator_connector.cluster_environment  # as Lightning has detected it
    if isinstance(environment, LightningEnvironment):  # Lightning starts the others itself
        if rank_zero_only.rank != trainer.global_rank:
            raise KoffError(
                f"RANK, LOCAL_RANK or SLURM_PROCID in the environment says that this is process {rank_zero_only.rank} "
                "of several, but the trainer runs it alone: unset that variable, or start all processes by torchrun"
            )
        return
    started, used = environment.world_size(), trainer.num_devices * trainer.num_nodes
    if started != used:
        raise KoffError(
            f"started as {_processes(started)}, but the trainer uses {used}: add --config hardware/ddp.yaml (or "
            "hardware/fsdp.yaml) with --trainer.devices PROCESSES_PER_NODE and --trainer.num_nodes NODES, or start "
            f"{_processes(used)}"
        )


def _processes(number: int) -> str:
    return f"{number} process{'es' * (number > 1)}"
