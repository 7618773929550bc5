"""Callbacks that go by lm-eval's scores: which there are, and when early stopping looks at them for the first time."""

import math
from collections.abc import Set
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping

from koff_lightning.evaluation.lm_tasks import Loaded
from koff_lightning.support.errors import KoffError
from koff_lightning.support.wording import nearest


def monitors(trainer: Trainer) -> list[str]:
    """Scores that checkpoints and early stopping go by."""
    names = [getattr(callback, "monitor", None) or "" for callback in trainer.callbacks]
    return [name for name in names if name.startswith("lm_eval/")]


def score_names(tasks: Loaded) -> set[str]:
    """The scores that tasks will have, as `<task or group>/<metric>` with the metrics of `lm_scores.plain`."""
    found = {name: _metrics(task) for name, task in tasks["tasks"].items()}
    for name, group in tasks.get("groups", {}).items():
        below = {pair for task in group.get_all_tasks() for pair in _metrics(task)}
        found[name] = {
            (metric, kind)
            for metric, kind in below
            for averaged in group.aggregate_metric_list or ()
            if metric == averaged.metric and (averaged.filter_list is None or kind in averaged.filter_list)
        }
    return {
        f"{name}/{metric}" + ("" if kind == "none" else f".{kind}")
        for name, pairs in found.items()
        for metric, kind in pairs
    }


def _metrics(task: Any) -> set[tuple[str, str]]:
    """Metric and filter of every score of one task; lm-eval's filter `none` is that of tasks which name none."""
    filters = task.get_config("filter_list") or [{"name": "none"}]
    return {(metric, each["name"]) for metric in task.aggregation() for each in filters}


def refuse_unscored(trainer: Trainer, known: Set[str]) -> None:
    """Refuse a monitor of a score that no evaluation gives: Lightning would say so in the middle of the run.

    Args:
        trainer: With its callbacks.
        known: The scores that there will be, `lm_eval/<column>/<task or group>/<metric>`.

    Raises:
        KoffError: There is such a callback.
    """
    for name in monitors(trainer):
        if name not in known:
            raise KoffError(
                f"a callback monitors {name!r}, which this run does not score: lm_eval.tasks gives "
                f"{', '.join(sorted(known)) or 'nothing'}.{nearest(name, known)}"
            )


def refuse_early_looks(trainer: Trainer, every_n_steps: int | None) -> None:
    """Refuse early stopping that looks before the first score: it would end the run at a nan.

    Args:
        trainer: Its loaders are known, as from `on_train_start` on.
        every_n_steps: Optimizer steps between evaluations; None for the end alone.

    Raises:
        KoffError: There is such a callback.
    """
    first = every_n_steps or trainer.estimated_stepping_batches
    for callback in trainer.callbacks:
        if not isinstance(callback, EarlyStopping) or not (callback.monitor or "").startswith("lm_eval/"):
            continue
        if callback.check_finite and (look := _first_look(trainer, callback)) < first:
            when = f"at step {first}" if every_n_steps else "at the end alone"
            raise KoffError(
                f"EarlyStopping looks at {callback.monitor!r} at step {math.ceil(look)}, but the first score comes "
                f"{when}, so that the run would end there: set lm_eval.every_n_steps to {max(1, int(look))} or less, "
                "let it look later, or give it check_finite: false"
            )


def _first_look(trainer: Trainer, stopping: EarlyStopping) -> float:
    """Optimizer step at which early stopping looks first: when an epoch ends, or a validation."""
    epoch, batches = trainer.num_training_batches, trainer.val_check_batch or 0  # 0: validation goes by the clock
    if stopping._check_on_train_epoch_end:
        batches = epoch
    elif not trainer.enable_validation:
        return math.inf
    elif (every := trainer.check_val_every_n_epoch or 1) > 1:
        batches += (every - 1) * epoch
    return batches / trainer.accumulate_grad_batches
