"""What third parties say to developers stays off the terminal; whatever a user can act on stays on it."""

import logging
import sys
import warnings


def keep_the_terminal_quiet() -> None:
    """Filter advertisements and known warnings, unless the user asked for warnings with `python -W`."""
    for part in ("pytorch", "fabric"):  # advertisements
        rank_zero = logging.getLogger(f"lightning.{part}.utilities.rank_zero")
        rank_zero.addFilter(lambda record: "Tip: For seamless" not in record.getMessage())
    if sys.warnoptions:
        return
    # LightningCLI calls old names of jsonargparse, which setup.cfg therefore keeps below 5.
    warnings.filterwarnings("ignore", message=r"[\s\S]*(JsonargparseDeprecationWarning|removed in v5)")
    # Lightning's use of torch.utils._pytree.
    warnings.filterwarnings("ignore", message=r".*LeafSpec")
    # The frozen backbone stays in eval mode on purpose.
    warnings.filterwarnings("ignore", message=r".*in eval mode at the start of training")
    # torch.compile looks at the gradient of whatever a layer reads, as of the gates' values.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    # A resumed run saves its checkpoints in a folder of its own.
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    # Text is tokenised before the run: workers would have nothing to do.
    warnings.filterwarnings("ignore", message=r".*does not have many workers")
