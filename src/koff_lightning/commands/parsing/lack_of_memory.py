"""Too little memory, on any device, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from koff_lightning.support.errors import KoffError

# What CUDA and its libraries say of it, for which torch has no type.
OF_CUDA = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")


@contextmanager
def lack_of_memory_told(advice: str) -> Iterator[None]:
    """Turn errors of the block that mean a lack of memory into a KoffError.

    Args:
        advice: What to make smaller: a sentence without its dot.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if _is_loss_of_a_worker(error):
            reason = str(error).splitlines()[0].rstrip(". ")
            raise KoffError(
                f"a process that builds batches is gone, as where a system is short of memory: {reason}. Give fewer "
                "data.num_workers, or more memory"
            ) from error
        if not _is_lack_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else "none is left"
        raise KoffError(f"not enough memory: {reason}. {advice}") from error


def _is_loss_of_a_worker(error: BaseException) -> bool:
    """Whether a worker process of a data loader was lost; torch raises no type of its own for that."""
    return str(error).startswith("DataLoader worker") and any(
        text in str(error) for text in ("is killed by signal", "exited unexpectedly")
    )


def _is_lack_of_memory(error: BaseException) -> bool:
    """Torch has a type for this on GPUs and only words on CPUs."""
    import torch

    kinds = MemoryError, torch.OutOfMemoryError
    return isinstance(error, kinds) or any(
        text in str(error) for text in ("not enough memory", "can't allocate memory", *OF_CUDA)
    )
