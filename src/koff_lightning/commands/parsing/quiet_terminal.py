"""What third parties say to developers stays off the terminal; whatever a user can act on stays on it."""

import logging
import sys
import warnings

# Advertisements, a device that nobody asks for, and `--dry-run` by the name that Lightning has for it.
UNWANTED = ("Tip: For seamless", "TPU available", "Running in `fast_dev_run`", "Loading `train_dataloader` to estimate")


def keep_the_terminal_quiet() -> None:
    """Filter advertisements and known warnings, unless the user asked for warnings with `python -W`."""
    for part in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{part}.utilities.rank_zero").addFilter(_is_wanted)
    if sys.warnoptions:
        return
    # LightningCLI calls old names of jsonargparse, which setup.cfg therefore keeps below 5.
    warnings.filterwarnings("ignore", message=r"[\s\S]*(JsonargparseDeprecationWarning|removed in v5)")
    # torch.compile looks at the gradient of whatever a layer reads, as of the gates' values.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    # A resumed run saves its checkpoints in a folder of its own.
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    # Text is tokenised before the run: workers would have nothing to do.
    warnings.filterwarnings("ignore", message=r".*does not have many workers")


def _is_wanted(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    return not any(words in said for words in UNWANTED)
