"""Processes that `torchrun` or `accelerate launch` has started for one command which itself starts none."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from koff_lightning.support.ending import Ended
from koff_lightning.support.errors import KoffError

PATIENCE = timedelta(weeks=1)  # how long a process waits for the others: their shares of the work differ
GRACE = 30.0  # seconds that the first process has to tell what all have met: it may be slower than the others


def count() -> int:
    """Number of processes; 1 where none was launched so. A variable that something else has left says nothing."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def device_of(device: str | None) -> str | None:
    """The device of this process: of several each has a GPU to itself.

    Args:
        device: What the user has named, if anything.

    Raises:
        KoffError: One GPU was named for all, or there are fewer than processes on this machine.
    """
    import torch

    if count() == 1 or device == "cpu" or not torch.cuda.is_available():
        return device
    if device not in (None, "cuda"):
        raise KoffError(f"each of {count()} processes has a device of its own, so {device!r} cannot be all theirs")
    here, there_are = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if here > there_are:
        raise KoffError(f"{here} processes on this machine have {there_are} GPUs between them: start as many as GPUs")
    return f"cuda:{os.environ['LOCAL_RANK']}"


@contextmanager
def first_speaks() -> Iterator[None]:
    """Let the first process alone tell an error that all of them meet alike.

    The others wait for that: once one has ended the launcher ends all, the first too if it has said nothing yet. What
    the first has not met they tell themselves, as where a file is missing on the second machine.
    """
    try:
        yield
    except KoffError:
        if rank():
            try:
                time.sleep(GRACE)
            except Ended:
                raise SystemExit(2) from None
        raise


def copies() -> int:
    """Number of tasks that SLURM's srun has started of one command and nothing makes parts of one whole."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) if count() == 1 else 1


def refuse_copies(verb: str) -> None:
    """Raise KoffError where srun has started several tasks of a command that torchrun alone can share out.

    Args:
        verb: The command.
    """
    if copies() > 1:
        raise KoffError(
            f"srun has started {copies()} tasks, each of which would do all that koff {verb} does: start it as one "
            f"task (srun --ntasks=1), with torchrun --nproc-per-node=GPUS -m koff_lightning {verb} for several GPUs"
        )


@first_speaks()
def refuse_several(verb: str) -> None:
    """Raise KoffError where several processes were launched for a command that starts its own.

    Args:
        verb: The command.
    """
    if count() > 1 or copies() > 1:
        raise KoffError(f"koff {verb} starts its runs itself, --jobs at one time: start it once, without torchrun")


@contextmanager
def one_is_first() -> Iterator[None]:
    """Hide the LOCAL_RANK that something else has left from lm-eval, which has no scores where it is not 0."""
    left = os.environ.pop("LOCAL_RANK", None) if count() == 1 else None
    try:
        yield
    finally:
        if left is not None:
            os.environ["LOCAL_RANK"] = left


@contextmanager
def joined(device: str | None) -> Iterator[None]:
    """Let the processes share work within a block, by `torch.distributed`; one alone does not need it.

    Args:
        device: As from `device_of`.
    """
    if count() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    on_gpu = bool(device) and device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)  # else objects of all ranks would go by the first GPU
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()
