"""`%koff` in a notebook: the command as one types it in a terminal, run in the notebook's own process.

After `%load_ext koff_lightning`, `%koff inspect runs/demo/artifact` is `koff inspect runs/demo/artifact`.
"""

import logging
import os
import shlex

import lightning.pytorch  # noqa: F401 (sets its loggers' levels when it is imported, so that must be over)
import rich
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from transformers.utils.logging import disable_progress_bar

from koff_lightning.cli import main


def load(shell: InteractiveShell) -> None:
    """Make `%koff` known, and keep out of the notebook what would be saved with it and help nobody.

    A run prints plain lines as into a file: of a live bar only the last state would be saved, and colours, which
    ipykernel asks for by FORCE_COLOR, would be saved as escape codes. The states of transformers' loading bars and
    Lightning's word on seeds and devices are left out.
    """
    shell.register_magic_function(koff, "line", "koff")
    os.environ.pop("FORCE_COLOR", None)
    rich.reconfigure(force_jupyter=False)
    disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def koff(line: str) -> None:
    """Run `koff` with the words of the line, split as a shell splits them.

    Raises:
        UsageError: The command failed, so that the cell, and a notebook that is run from top to bottom, stops here.
            The command has printed what was wrong.
    """
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UsageError(f"koff: {error}: put a text with an apostrophe in double quotes") from error
    if status := main(words):
        raise UsageError(f"koff ended with status {status}")
