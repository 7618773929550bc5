"""Where this package keeps what is made or fetched once for all runs."""

import os
from pathlib import Path


def own_cache() -> Path:
    """$KOFF_CACHE, or ~/.cache/koff: tokenised text in `tokens`, copies of hub datasets in `hub`, fetched models."""
    return Path(os.environ.get("KOFF_CACHE") or "~/.cache/koff").expanduser()
