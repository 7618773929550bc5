"""How long the C library keeps memory that was freed."""

import ctypes
import os
import sys

# Of glibc's malloc.h. By default it gives back whatever is free at the top of the heap beyond 64 MiB, so each step on a
# CPU has its activations and logits mapped anew, page by page: 7 to 9 % of a step of SmolLM2 (docs/results/bench.md).
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT = 512 * 2**20  # bytes at the top of the heap that stay for the next step
OWN_PAGES = 32 * 2**20  # the largest that glibc takes: larger blocks are mapped by themselves and given back at once


def keep_freed() -> None:
    """Let this process and those that it forks keep up to 512 MiB that were freed; what the environment says wins.

    Does nothing where the C library is not glibc.
    """
    said = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    mallopt = None if said or sys.platform != "linux" else getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, OWN_PAGES)
        mallopt(TRIM_THRESHOLD, KEPT)
