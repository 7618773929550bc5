"""Attention over memory and tokens as two flash attentions merged by their log-sum-exp, in one differentiable step.

The longer the row, the more this saves over one attention on their concatenation: keys and values are not copied, and
causal attention to the tokens needs no mask, so the kernel skips the half of the scores that lies in the future.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class MergedAttention(torch.autograd.Function):
    """Softmax over [memory; tokens] from one softmax over each part, as in ring attention (arXiv 2310.01889).

    Forward: with l_t, l_m the log-sum-exp of the scores of tokens and memory, out = (1 - w) out_t + w out_m where
    w = sigmoid(l_m - l_t).
    Backward: a flash kernel recomputes its weights as exp(score - lse), and also needs rowsum(grad * out). Given the
    MERGED lse and out, its weights are those of the joint softmax, so each call returns its part of the exact gradient:
    that of its own keys and values, and a term of the query's.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        memory_key: Tensor,
        memory_value: Tensor,
        mask: Tensor | None,
        visible: Tensor | None,
        documents: Tensor | None,
        scale: float | None,
        is_causal: bool,
    ) -> Tensor:
        """The output [B, H, T, dh]. Arguments are those of `attend_merged`, with additive masks."""
        out_t, lse_t, seed_t = flash(query, key, value, mask, scale, is_causal, documents)
        out_m, lse_m, seed_m = flash(query, *shared(query, memory_key, memory_value), visible, scale, False)
        weight = torch.sigmoid(lse_m - lse_t).unsqueeze(-1)  # [B, H, T, 1]
        out = torch.lerp(out_t.to(weight.dtype), out_m.to(weight.dtype), weight).to(query.dtype)
        lse = torch.logaddexp(lse_t, lse_m).contiguous()  # [B, H, T]; the CUDA backward ignores strides
        given = query, key, value, memory_key, memory_value, mask, visible, documents
        ctx.save_for_backward(*given, out, lse, *seed_t, *seed_m)
        ctx.scale, ctx.is_causal = scale, is_causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the first five arguments, from that of the output [B, H, T, dh]."""
        query, key, value, memory_key, memory_value, mask, visible, documents, out, lse, *seeds = ctx.saved_tensors
        half = len(seeds) // 2
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()  # CUDA refuses expanded ones
        result = (grad, query, out, lse)
        grads_t = _flash_backward(*result, key, value, mask, ctx.scale, ctx.is_causal, seeds[:half], documents)
        slots = shared(query, memory_key, memory_value)
        grads_m = _flash_backward(*result, *slots, visible, ctx.scale, False, seeds[half:])
        return (
            grads_t[0].add_(grads_m[0]),
            *grads_t[1:],
            grads_m[1].sum_to_size(memory_key.shape),
            grads_m[2].sum_to_size(memory_value.shape),
            *(None,) * 5,
        )


def shared(query: Tensor, memory_key: Tensor, memory_value: Tensor) -> tuple[Tensor, Tensor]:
    """The memory of each row, [B, K, P, dh]; a single one is expanded, not copied."""
    return memory_key.expand(len(query), -1, -1, -1), memory_value.expand(len(query), -1, -1, -1)


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    is_causal: bool,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """One flash attention.

    Returns:
        The output [B, H, T, dh], the log-sum-exp of its scores [B, H, T], and the random state that the CUDA backward
        takes. With `documents`, on a GPU, `mask` is not needed: see `attend_merged`.
    """
    if documents is not None:
        joined, longest = (_joined(tensor) for tensor in (query, key, value)), query.shape[2]
        out, lse, *seed, _ = torch.ops.aten._flash_attention_forward(
            *joined, documents, documents, longest, longest, 0.0, True, False, scale=scale
        )  # [B T, H, dh], [H, B T]
        return _apart(out, len(query)), lse.unflatten(1, (len(query), -1)).transpose(0, 1), tuple(seed)
    if query.is_cuda:  # see `kernels_agree`
        out, lse, *_, seed, offset, _ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, is_causal, scale=scale
        )
        return out, lse, (seed, offset)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    if mask is not None:  # for a query that sees nothing the kernel returns output 0 and lse 0; lse should be -inf
        blind = torch.isneginf(mask).all(dim=-1)  # [B|1, 1, T|1]
        lse = lse.masked_fill(blind, torch.finfo(lse.dtype).min)  # not -inf, as -inf - -inf is nan
    return out, lse, ()


def _flash_backward(
    grad: Tensor,
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    is_causal: bool,
    seed: list[Tensor],
    documents: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value, through the part of the softmax that falls on `key`."""
    if documents is not None:
        joined = (_joined(tensor) for tensor in (grad, query, key, value, out))
        lse, longest = lse.transpose(0, 1).flatten(1).contiguous(), query.shape[2]  # [H, B T]
        grads = torch.ops.aten._flash_attention_backward(
            *joined, lse, documents, documents, longest, longest, 0.0, True, *seed, scale=scale
        )
        return tuple(_apart(each, len(query)) for each in grads)
    if query.is_cuda:
        sizes = (None, None, query.shape[2], key.shape[2])
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, query, key, value, out, lse, *sizes, 0.0, is_causal, *seed, scale=scale
        )
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse, 0.0, is_causal, attn_mask=mask, scale=scale
    )


def _joined(tensor: Tensor) -> Tensor:
    """[B, H, T, dh] as [B T, H, dh]; no copy, as projections lay it out like this in memory."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _apart(tensor: Tensor, rows: int) -> Tensor:
    """[B T, H, dh] as [B, H, T, dh]: the reverse of `_joined`."""
    return tensor.unflatten(0, (rows, -1)).transpose(1, 2)
