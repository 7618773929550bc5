"""Imports at their own cost: Python's collector of reference cycles would look through what they make, over and over.

That is a fifth of the time that Lightning and transformers take to load.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import without the collector; in a process that holds nothing else yet it never looks through that again."""
    collects, fresh = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if fresh:
            gc.freeze()
        if collects:
            gc.enable()
