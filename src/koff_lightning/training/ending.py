"""How a run of one or several processes ends early: when it is asked to, when its time is up, when a process is gone.

Lightning's handling of SIGTERM does not fit: its handler broadcasts in whatever a rank is doing when the signal comes,
which another rank takes for a part of something else, and on one device it ends the run after any micro-batch, where
the gradients of a step that has begun would be lost. Here a signal is noted, and after an optimizer step the ranks
agree whether any of them was asked to end.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread

import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from koff_lightning.support import ranks
from koff_lightning.support.ending import LOOK, MET, SIGNALS, TIME_LIMIT, Ended, SignalHandler

GRACE = 5.0  # seconds that the others have to end by themselves after one has


class EndsBetweenSteps(Callback):
    """Ends a run that is asked to, or whose time is up, after an optimizer step; one that only scores, at once.

    What ends is saved by `Checkpoints`, and its exit status says why it has ended.
    """

    def __init__(self) -> None:
        self._handler = SignalHandler(lambda: False)
        self._trainer: Trainer | None = None
        self._scoring = 0  # blocks of `may_be_left` that are open
        self._stops = False  # the trainer was asked to stop in mid-step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch the other processes of the run from here on; what only scores may see its launcher end before it."""
        if stage == "fit" and trainer.world_size > 1:
            watch_the_others(trainer)
        MET.set()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to go on where the time of all parts of a run was up before."""
        if _time_is_up(trainer):
            raise Ended(TIME_LIMIT, "give it more, by trainer.max_time, which counts all parts of a run")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note signals from here on, in place of the handlers before, which Lightning puts back itself at the end."""
        signals, self._trainer = trainer._signal_connector, trainer
        self._handler = SignalHandler(self._may_leave)
        self._handler.asked, signals.received_sigterm = 128 + signal.SIGTERM if signals.received_sigterm else 0, False
        self._handler.install(SIGNALS)
        self._stops = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Have Lightning end the run after this batch, if it is the last of its step."""
        if in_mid_step(trainer):
            self._hold_back(trainer)
            return
        trainer.should_stop, self._stops = trainer.should_stop or self._stops, False
        late = _time_is_up(trainer)
        self._handler.asked = self._handler.asked or (TIME_LIMIT if late else 0)
        self._handler.asked = ranks.largest(self._handler.asked, pl_module.device)
        if self._handler.asked:
            trainer.should_stop, trainer._signal_connector.received_sigterm = False, True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation may come in mid-step: what asks to stop then, as EarlyStopping, waits for the step's end."""
        if trainer.state.fn == TrainerFn.FITTING and in_mid_step(trainer):
            self._hold_back(trainer)

    def _hold_back(self, trainer: Trainer) -> None:
        """Let the step that has begun come to its end. No clock is looked at: each rank has its own."""
        self._stops, trainer.should_stop = self._stops or trainer.should_stop, False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the run if its timer looks after epochs alone."""
        if _time_is_up(trainer) and not self._handler.asked:
            self._handler.asked, trainer._signal_connector.received_sigterm = TIME_LIMIT, True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give Lightning's exception, which has none, the exit status that was asked for, and say so."""
        if isinstance(exception, SIGTERMException):
            exception.code = self._handler.asked or 128 + signal.SIGTERM
            rank_zero_info(f"after step {trainer.global_step} the run was {Ended(exception.code)}")

    def _may_leave(self) -> bool:
        alone = self._trainer.world_size == 1  # else the others would wait for this rank's part of the scores
        return self._scoring > 0 or (alone and self._trainer.validating and not in_mid_step(self._trainer))

    @contextmanager
    def left_at_once(self) -> Iterator[None]:
        """Let a signal end the block at once, without waiting for a step; see `may_be_left`."""
        if self._handler.asked:
            raise Ended(self._handler.asked)
        self._scoring += 1
        try:
            yield
        finally:
            self._scoring -= 1


@contextmanager
def may_be_left(trainer: Trainer) -> Iterator[None]:
    """Inside the block a signal raises `Ended` at once: what the block does trains nothing, and may take long."""
    ending = next((callback for callback in trainer.callbacks if isinstance(callback, EndsBetweenSteps)), None)
    if ending is None:
        yield
        return
    with ending.left_at_once():
        yield


def in_mid_step(trainer: Trainer) -> bool:
    """Whether gradients are being accumulated: a step has begun, which no checkpoint would hold."""
    return trainer.fit_loop._should_accumulate()


def _time_is_up(trainer: Trainer) -> bool:
    """Whether a timer has asked the trainer to stop; Lightning asks the timer of rank 0 and tells all."""
    timers = [c for c in trainer.callbacks if isinstance(c, Timer)] if trainer.should_stop else []
    return any((left := timer.time_remaining()) is not None and left <= 0 for timer in timers)


# ------------------------------------------------------------------------------------------------ lost processes


def watch_the_others(trainer: Trainer) -> None:
    """End this process, in one line for all of them that names the rank, when one it cannot go on without is gone.

    Rank 0 watches the ranks that it has launched, and those watch rank 0. Where something else has launched them, as
    torchrun or SLURM, that ends the others.
    """
    theirs: list[subprocess.Popen] = getattr(trainer.strategy.launcher, "procs", [])
    launched = list(theirs)
    theirs.clear()  # Lightning's own watch, which ends all in other words, then has nothing to do
    environment = getattr(trainer.strategy, "cluster_environment", None)
    look: Callable[[], str] | None = None
    if launched:
        look = _look_at({trainer.global_rank + place: process for place, process in enumerate(launched, 1)})
    elif isinstance(environment, LightningEnvironment) and trainer.local_rank:
        launcher, first = os.getppid(), trainer.global_rank - trainer.local_rank
        told = f"rank {first} is gone" if trainer.local_rank == 1 else "-"  # one of them says so

        def look() -> str:
            return told if os.getppid() != launcher else ""

    def watch() -> None:
        while not (said := look()):
            time.sleep(LOOK)
        if said != "-":
            print(f"koff: {said}, so the run ends; go on with --ckpt_path last", file=sys.stderr, flush=True)
        for process in launched:
            process.kill()
        os._exit(1)

    if look is not None:
        Thread(target=watch, daemon=True, name="watch the other ranks").start()


def _look_at(processes: dict[int, subprocess.Popen]) -> Callable[[], str]:
    """Tells what became of the first process that is gone: of one that says so itself a moment later, if it must."""
    gone: dict[int, float] = {}

    def look() -> str:
        for rank, process in processes.items():
            code = process.poll()
            if code is not None and code < 0:
                return f"rank {rank} was killed by {signal.Signals(-code).name}"
            if code and time.monotonic() - gone.setdefault(rank, time.monotonic()) > GRACE:
                return f"rank {rank} has ended with status {code}"
        return ""

    return look


def is_loss_of_a_rank(error: BaseException) -> bool:
    """Whether a collective has failed because another process is gone."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)
