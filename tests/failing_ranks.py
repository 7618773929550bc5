"""What each of two ranks runs for tests/test_multi_process.py: `koff fit` whose evaluations fail half done."""

import itertools
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lm_eval.api.task import ConfigurableTask
from several_ranks import ON_CPUS, SMALL, WATCHED

from koff_lightning.cli import main as koff
from koff_lightning.support import ranks


def failing(folder: Path, rank: int) -> None:
    """The evaluation of step 1 fails on both ranks, that of step 2 on rank 1 alone; leaves the error that ended it."""
    words = ["fit", "--config", "tiny_12pct.yaml", "--config", "hardware/ddp.yaml", *SMALL, *ON_CPUS, *WATCHED]
    judge, calls = ConfigurableTask.process_results, itertools.count()

    def judged(task: Any, *args: Any) -> Any:
        return 1 / 0 if next(calls) <= rank else judge(task, *args)  # the first call; on rank 1 the second too

    with patch.object(ConfigurableTask, "process_results", judged), patch.object(ranks, "MEETING", timedelta(0, 10)):
        try:
            status = koff([*words, f"--trainer.default_root_dir={folder / 'failing'}"])
            said = f"status {status}"
        except Exception as error:
            said = type(error).__name__
    (folder / f"failing.{rank}.txt").write_text(said)


if __name__ == "__main__":
    failing(Path(sys.argv[1]), int(os.environ["LOCAL_RANK"]))
