"""Look at a module in the middle of its training and leave no trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.seed import isolate_rng

from koff_lightning.training.module import KOFFModule


@contextmanager
def eval_mode(module: KOFFModule) -> Iterator[None]:
    """Eval mode, no gradients and the dense model inside the block; after it, failed or not, all is as before.

    That is the random state of Python, numpy, torch and all GPUs, every part's mode, the gates in force and which rows
    read which memory.
    """
    modes, random = [(part, part.training) for part in module.modules()], isolate_rng()
    module.eval()
    random.__enter__()
    try:
        with torch.no_grad(), module.model.under():
            yield
    finally:
        random.__exit__(None, None, None)  # by hand: of itself it puts the state back only where its block ends well
        for part, mode in modes:
            part.training = mode
