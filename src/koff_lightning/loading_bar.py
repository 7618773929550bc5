"""Whether transformers draws its progress bar while it loads weights: only where loading takes long.

A hub model keeps its bars, which are also those of the download.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

LARGE = 2 * 2**30  # bytes of weights; fewer are loaded in a few seconds, before anybody reads a bar


@contextmanager
def bar_for_large(source: str, gguf: str | None = None) -> Iterator[None]:
    """Show no bar inside the block while little is loaded; the caller's own setting comes back after it.

    Args:
        source: Folder of the weights, or a hub id.
        gguf: The file in that folder that holds them, if it is one of that kind.
    """
    files = [Path(source) / gguf] if gguf else Path(source).glob("*.safetensors")
    silent = Path(source).is_dir() and sum(file.stat().st_size for file in files) < LARGE
    if not silent or not is_progress_bar_enabled():
        yield
        return
    disable_progress_bar()
    try:
        yield
    finally:
        enable_progress_bar()
