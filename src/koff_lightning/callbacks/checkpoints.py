"""Checkpoints: when they are saved, how many are kept, and that the log goes on with them in a resumed run."""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from koff_lightning.support.errors import KoffError
from koff_lightning.support.wording import nearest
from koff_lightning.training.ending import in_mid_step

LOG = ExperimentWriter.NAME_METRICS_FILE  # metrics.csv

OURS = ("koff_lightning.", "lightning.")
ELSEWHERE = ("lm_eval/", "throughput/", "memory/", "lr-")  # judged there; logged by rank 0 alone, or not in each step


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint, between steps alone; it also saves when asked to end, and keeps one file more.

    What may take long, and so be stopped, has a checkpoint before it: validation, and scoring at the end. Other
    exceptions than a request to end may come from the middle of a step, from where no run could go on exactly.
    (Lightning keeps several files only of those it can compare by a monitored figure, and then may skip the one of the
    last step.)
    """

    _aside = ""  # would be gone
    _trains = False  # the run has begun to
    _looked = False  # at what the first step has logged

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the step that a run goes on from as saved, which Lightning forgets, and leave a sign that it trains."""
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved, self._trains = trainer.global_step, True
        if trainer.is_global_zero and self.dirpath:
            Path(self.dirpath).mkdir(parents=True, exist_ok=True)  # a run killed before its first save is known by it

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Save if due; in mid-step not even the clock of `train_time_interval` is looked at, which would start anew."""
        if in_mid_step(trainer):
            return
        if not self._looked:
            self._looked = True
            refuse_unlogged(trainer)
        super().on_train_batch_end(trainer, *args)
        if validation_comes_next(trainer) and not self._should_skip_saving_checkpoint(trainer):
            before = self._last_global_step_saved
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._last_global_step_saved = before  # what is saved by the figures of the validation is still to come

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if due; validation may come in mid-step."""
        if not in_mid_step(trainer):
            super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of the run, whether or not a save is due: Lightning would leave `last` at an earlier step."""
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save between two steps if asked to end; what is validating has been saved before."""
        if in_mid_step(trainer):
            return
        if not isinstance(exception, SystemExit):
            super().on_exception(trainer, pl_module, exception)
        elif self._trains and not trainer.validating and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_checkpoint(trainer, self.format_checkpoint_name(metrics=candidates))
            self._save_last_checkpoint(trainer, candidates)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Remove what was to go the time before, so that a damaged newest file has a predecessor."""
        filepath, self._aside = self._aside, filepath
        if filepath:
            super()._remove_checkpoint(trainer, filepath)


def refuse_unlogged(trainer: Trainer) -> None:
    """Refuse a monitor of what no step and no validation logs: Lightning would say so where the run ends.

    Args:
        trainer: After a whole step.

    Raises:
        KoffError: A callback monitors no such figure, and the run has nothing that others wrote and that may log it.
    """
    if not all(type(part).__module__.startswith(OURS) for part in (trainer.lightning_module, *trainer.callbacks)):
        return
    scores = {"val/koff_bpb", *(f"val/koff_bpb/{domain}" for domain in trainer.lightning_module.domains)}
    for name in filter(None, (getattr(callback, "monitor", None) for callback in trainer.callbacks)):
        if name not in scores | trainer.callback_metrics.keys() and not name.startswith(ELSEWHERE):
            known = sorted(scores | trainer.callback_metrics.keys())
            raise KoffError(
                f"a callback monitors {name!r}, which this run does not log.{nearest(name, known)} val/koff_bpb is the "
                f"mean held-out score, less is better; all that there are: {', '.join(known)}"
            )


def validation_comes_next(trainer: Trainer) -> bool:
    """Whether the run validates after the batch at hand."""
    return trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)


def save_the_end(trainer: Trainer) -> None:
    """Save a run that has trained to its end, before it is scored, which may take long and be stopped."""
    for callback in trainer.checkpoint_callbacks:
        callback.on_train_end(trainer, trainer.lightning_module)


class ContinuedLog(Callback):
    """Starts the log of a resumed run with that of the run before, up to the checkpoint.

    So `metrics.csv` of the last part, like TensorBoard's files, holds the whole curve, without gap or repetition.
    Checkpoints are saved before Lightning logs the step that they follow, and before a validation that is due then,
    which a resumed run would pass over: the row of that step travels in the checkpoint, validation is made up for.
    """

    def __init__(self) -> None:
        self._validate = False  # what was cut off

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep where the rows are, the row that is to come if one is due, and whether validation is."""
        files = [logger.experiment.metrics_file_path for logger in trainer.loggers if isinstance(logger, CSVLogger)]
        row = {name: float(value) for name, value in trainer._logger_connector.metrics["log"].items()}
        every = trainer.log_every_n_steps  # 0: never
        due = every > 0 and trainer.global_step % every == 0
        checkpoint["log"] = {
            "file": files[0] if files else None,
            "row": row | {"epoch": trainer.current_epoch} if due else {},
            "last": trainer.global_step - 1,
            "validate": validation_comes_next(trainer),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Give our loggers what was logged before."""
        before = checkpoint.get("log")
        if not before or trainer.state.fn != TrainerFn.FITTING:
            return
        last = before["last"]
        row = {name: value for name, value in before["row"].items() if isinstance(value, int | float)}
        rows = _rows(_found(before["file"], trainer.ckpt_path), last)
        if len(row) > 1 and not any(step == last and row.keys() <= other.keys() for step, other in rows):
            rows.append((last, row))
        validated = any(step == last and any(name.startswith("val/") for name in other) for step, other in rows)
        self._validate = before["validate"] and not validated
        for logger in trainer.loggers if trainer.is_global_zero else ():
            for step, values in rows if isinstance(logger, CSVLogger | TensorBoardLogger) else ():
                logger.log_metrics(values, step)
            logger.save()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate as the run before would have done next, if rank 0 says so, which alone may see the log."""
        self._validate = trainer.strategy.broadcast(self._validate)
        if self._validate:
            self._validate, loop = False, trainer.fit_loop.epoch_loop.val_loop
            trainer.validating, loop.restarting = True, False
            loop.run()
            trainer.training = True


def _found(file: str | None, checkpoint: str | Path) -> Path | None:
    """Where the log is that a checkpoint goes on: beside it, as where a run's folder was moved, or where it was."""
    if file is None:
        return None
    places = [*(folder / Path(file).name for folder in Path(checkpoint).absolute().parents[:2]), Path(file)]
    if Path(file).name != LOG:  # a checkpoint may come from anyone, and names no other file to read
        places = []
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        rank_zero_warn(f"the log that {checkpoint} goes on is neither beside it nor at {file}: this run's begins here")
    return found


def _rows(file: Path | None, last: int) -> list[tuple[int, dict[str, float]]]:
    """Step and values of the rows of a CSV log up to step `last`."""
    if file is None:
        return []
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = [(int(row.pop("step")), row) for row in csv.DictReader(lines) if row["step"].isdigit()]
        return [(step, {k: _number(v) for k, v in row.items() if v}) for step, row in rows if step <= last]
    except (OSError, ValueError, KeyError, AttributeError, csv.Error) as error:  # cut short, or no such log
        rank_zero_warn(f"{file} is no log that can be gone on with ({type(error).__name__}): this run's begins here")
        return []


def _number(text: str) -> float:
    return int(text) if text.isdigit() else float(text)
