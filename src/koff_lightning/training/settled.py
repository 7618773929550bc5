"""A loss whose backward has run already, so that one step can hold two forwards under different gates and memories."""

from collections.abc import Sequence

import torch
from torch import Tensor


class _Settled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, grads, *inputs):  # noqa: ANN001, ANN002, ANN205
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx, scale):  # noqa: ANN001, ANN205
        return None, None, *(None if grad is None else grad * scale for grad in ctx.grads)


def settled(loss: Tensor, inputs: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """The loss with its backward already run: its gradient with respect to `inputs` is stored and its graph is freed.

    One step can then hold two forwards under different gates and memories. With activation checkpointing a backward
    computes layers again under whatever gates and memories are in force at that time, so the backward of the first
    forward has to run before the second forward changes them.

    Args:
        loss: A scalar.
        inputs: Tensors that receive its gradient; nothing else does.
        scale: Loss scale of 16-bit training, applied while the gradient is computed.
    """
    grads = torch.autograd.grad(loss * scale, inputs, allow_unused=True)
    return _Settled.apply(loss.detach(), [None if grad is None else grad / scale for grad in grads], *inputs)
