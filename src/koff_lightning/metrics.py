"""Bits per byte: the loss on text in a unit that does not depend on the tokenizer, so languages can be compared."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric


class BitsPerByte(Metric):
    """Total negative log-likelihood in bits over the UTF-8 bytes of the text: sum of nats / (ln 2 * bytes).

    A ratio of sums, not a mean of ratios, and exact over any split of the text into rows, batches and ranks. Sums are
    kept in fp64: in fp32 a corpus of 2^24 bytes would no longer count single bytes. Without any bytes the value is nan.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    nats: Tensor
    num_bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_bytes", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, num_bytes: Tensor) -> None:
        """Add text.

        Args:
            nats: Negative log-likelihoods in nats, any shape (per token, per row or summed).
            num_bytes: UTF-8 bytes of the text that these predict, any shape.
        """
        self.nats += nats.sum(dtype=self.nats.dtype)
        self.num_bytes += num_bytes.sum(dtype=self.num_bytes.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        """Follow the module to its device but not to its dtype: bf16-true training would turn the sums to bf16."""

        def move(tensor: Tensor) -> Tensor:
            device = fn(torch.empty(0, device=tensor.device)).device
            return tensor.to(device, torch.float32 if device.type == "mps" else tensor.dtype)  # Apple's has no fp64

        return super()._apply(move, exclude_state)

    def compute(self) -> Tensor:
        """Bits per byte so far, scalar."""
        return self.nats / (math.log(2) * self.num_bytes)
