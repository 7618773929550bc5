"""What others raise, in one line: Lightning, the parser, the system. Errors of our own code keep their traceback."""

import os
from pathlib import Path
from traceback import walk_tb

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from koff_lightning.callbacks.report import has_trained, what_was_saved
from koff_lightning.support.errors import KoffError

NO_BACKEND = "No supported gpu backend"  # Lightning's words, and ours in their place:
NO_GPU = (
    "trainer.accelerator is gpu, as one_gpu.yaml, ddp.yaml and fsdp.yaml of hardware/ set it, and torch finds no GPU: "
    "take --config hardware/cpu.yaml in its place, or look with `koff doctor` why it finds none"
)


def own_words(error: BaseException | None) -> KoffError | None:
    """Our own error among those that led to this one."""
    while error and not isinstance(error, KoffError):
        error = error.__cause__ or error.__context__
    return error


def is_bad_input(error: BaseException) -> bool:
    """Whether an error comes from where others check what they are given, not from our own code."""
    checked = isinstance(error, ValueError | TypeError) and not _raised_in(error).startswith("koff_lightning.")
    return isinstance(error, KoffError) or is_lightnings(error) or checked


def is_lightnings(error: BaseException) -> bool:
    """Whether Lightning's own code has raised an error, not at a wrong call that ours made from within it."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    if not names[-1].startswith("lightning."):
        return False
    within = names[next(i for i, name in enumerate(names) if name.startswith("lightning.")) :]
    commands = "koff_lightning.commands."  # its parser is Lightning's, and calls the trainer from within
    ours = any(name.startswith("koff_lightning.") and not name.startswith(commands) for name in within)
    return isinstance(error, ValueError | MisconfigurationException) or not ours


def lightnings_words(error: BaseException) -> str:
    """One line on an error of Lightning's own code, which names that code where the message is not meant for users."""
    said = " ".join(str(error).split())
    if isinstance(error, ValueError | MisconfigurationException):  # of options, once it knows the data
        return said
    return f"{_raised_in(error)} failed ({type(error).__name__}: {said}): look at the trainer's options and callbacks"


def systems_words(error: OSError, trainer: Trainer) -> str:
    """One line on what the system has refused in mid-run, as on a full disk: which file, and what is safe."""
    if error.errno is None:  # of a library that says in words of its own what it misses
        return " ".join(str(error).split())
    file = error.filename or f"a file of the run in {Path(trainer.default_root_dir)}"
    saved = "" if has_trained(trainer) else f"; {what_was_saved(trainer)}"  # the report has said it
    return f"cannot read or write {file}: {error.strerror or os.strerror(error.errno)}{saved}"


def _raised_in(error: BaseException) -> str:
    """The module whose code raised an error."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "")
