"""Files that lm-eval writes: their places are looked at before anything is scored, and what was lost is told after."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import refuse_unwritable


@contextmanager
def files_written(output_path: str | None, use_cache: str | None) -> Iterator[None]:
    """Make the folders of results and of cached answers, and see to it that no result is lost without a word.

    lm-eval says in its log alone what it could not write, and goes on.

    Args:
        output_path: Folder of the results.
        use_cache: Beginning of the cache files' names.

    Raises:
        KoffError: A file in place of a folder, or nothing can be written into one; once all is scored, if a file of
            results could not be written.
    """
    if output_path and output_path.endswith(".json"):
        raise KoffError(f"lm-eval: --output_path {output_path}: give a folder, since each column has files of its own")
    _make("output_path", output_path)
    _make("use_cache", use_cache and (os.path.dirname(use_cache) or "."))
    log, said = logging.getLogger("lm_eval.loggers.evaluation_tracker"), [""]

    def listen(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        return False

    level = log.level
    log.setLevel(logging.INFO)  # the reason comes after the word that something went wrong, and below it
    log.addFilter(listen)
    try:
        yield
    finally:
        log.removeFilter(listen)
        log.setLevel(level)
    if reasons := [why for what, why in pairwise(said) if what.startswith("Could not save")]:
        raise KoffError(
            f"lm-eval: not all files below {output_path} could be written ({reasons[0]}): the scores stand above and "
            "nowhere else"
        )


def _make(option: str, folder: str | None) -> None:
    if folder:
        refuse_unwritable(Path(folder), f"lm-eval: --{option}")
