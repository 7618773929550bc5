"""What the processes of one run ("ranks") tell each other. A process alone is told nothing and waits for nobody.

The rule of all training here: the ranks' rows are one batch. A rank's loss is its part of that batch's loss, times the
number of ranks, so that the mean of the ranks' gradients is the gradient of the whole batch, whatever rows each holds.
"""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 2**24  # numbers that are reduced in one go: a copy of this size exists meanwhile, 64 MiB
MEETING = timedelta(minutes=1)  # how long ranks wait for each other where one may not come


def count() -> int:
    """Number of ranks: of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(values: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if count() > 1:
        dist.all_reduce(values)
    return values


def copy_from_first(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors, which every rank gives in the same order, with those of rank 0."""
    for tensor in tensors if count() > 1 else ():
        dist.broadcast(tensor, 0)


def gather(value: Any) -> list[Any]:
    """Every rank's value, by rank, on every rank; any Python object."""
    values = [value] * count()
    if count() > 1:
        dist.all_gather_object(values, value)
    return values


def largest(value: int, device: torch.device) -> int:
    """The largest of the ranks' values, on every rank."""
    if count() == 1:
        return value
    values = torch.tensor(value, device=device)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return int(values)


def side_group() -> dist.ProcessGroup:
    """All ranks, to meet beside what else they tell each other; every rank has to call this."""
    return dist.new_group(timeout=MEETING, backend="gloo")


def all_meet(group: dist.ProcessGroup) -> bool:
    """Whether every rank comes here within `MEETING`; False on those that came when one does not.

    Args:
        group: Group of `side_group`: a rank that does not come may wait in another call, which this must not answer.
    """
    try:
        dist.monitored_barrier(group)
    except RuntimeError:
        return False
    return True


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Give every rank the mean of the ranks' gradients.

    A rank that has none counts as zeros. What has none on any rank keeps none, so that the optimizer leaves the memory
    of an absent domain alone. Every rank makes the same calls whatever its rows were, so none can wait for ever.
    """
    if count() == 1 or not parameters:
        return
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    due = [p for p, ranks in zip(parameters, total(used).tolist(), strict=True) if ranks]
    for parameter in due:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for grads in _buckets([p.grad for p in due]):
        mean = total(torch.cat([grad.flatten() for grad in grads])) / count()
        for grad, part in zip(grads, mean.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, in lists of at most `BUCKET` numbers (or of one larger tensor)."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
