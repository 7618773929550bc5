"""How a model for lm-eval shares its requests with the other ranks, in the place of HFLM's own way."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class SharesRequests:
    """What ranks tell each other while each asks a model its share of the requests; HFLM's own needs accelerate."""

    batch_schedule: float
    logits_cache: bool
    world_size: int
    _world_size: int

    def _batch_scheduler(self, pos: int, n_reordered_requests: list[Any]) -> int:
        """HFLM's own, which divides by zero where `auto:N` wants more measurements than there are requests.

        It agrees on each measurement with the other ranks. Where requests that read the same are asked once, ranks have
        unequal numbers of them and may measure unequally often: there each measures for itself, and waits for nobody.
        """
        whole = self.batch_schedule, self._world_size
        self.batch_schedule = min(self.batch_schedule, len(n_reordered_requests))
        if self.logits_cache:
            self._world_size = 1
        try:
            return super()._batch_scheduler(pos, n_reordered_requests)
        finally:
            self.batch_schedule, self._world_size = whole

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors, one after the other."""
        if self.world_size == 1:
            return tensor
        parts = [torch.zeros_like(tensor.reshape(-1)) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.reshape(-1))
        return torch.cat(parts)

    def barrier(self) -> None:
        """Wait for the other ranks."""
        if self.world_size > 1:
            dist.barrier()
