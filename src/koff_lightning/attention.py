"""Attention over a learned memory: every query attends to the memory slots of its row besides its own tokens.

Registered with transformers under the name ``koff``, as an attention function and as its mask. An attention module with
a memory has the attribute ``koff_memory``: a function without arguments that returns its :class:`LayerMemory`, or None.
It is a function because activation checkpointing computes layers again and must then read the memory again. Without a
memory the result is that of transformers' own ``sdpa``, bit for bit.

The memory is never part of the tokens' key-value cache, so `generate`, packing, padding and activation checkpointing
work as they do without it. Its keys are stored after the rotary embedding, at the positions before the first token.

There are two ways to compute the same: `attend_reference` joins memory and tokens for one attention, `attend_merged`
attends to each alone and merges the results. `koff_attention` chooses.
"""

import math
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward, use_gqa_in_sdpa
from transformers.masking_utils import sdpa_mask

from koff_lightning.merged_attention import MergedAttention, flash, shared
from koff_lightning.support.errors import KoffError

NAME = "koff"

# Measured on a CPU, forward and backward: below this many tokens one attention over memory and tokens together is up to
# 1.3x faster; above it, copying the keys and building the mask make it up to 2x slower than two attentions and a merge.
MERGE_FROM = 512
KERNEL_GAP = 0.03  # difference allowed between the two ways in half precision, relative to the largest value

# Arguments that transformers may pass to an attention function and that are not supported with a memory.
_UNDEFINED = {"cache", "position_bias", "s_aux", "softcap"}


@dataclass(frozen=True)
class LayerMemory:
    """The memory that one layer reads: keys after the rotary embedding, and values.

    Attributes:
        key: [R, K, P, dh]: R rows of the batch, or 1 that all rows share; K key-value heads; P slots.
        value: [R, K, P, dh].
        visible: bool [R, P], the slots that a row sees; None when every row sees every slot.
    """

    key: Tensor
    value: Tensor
    visible: Tensor | None = None


def koff_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend to the tokens and to the memory of `module`, if it has one.

    Args:
        module: The attention module; `koff_memory` is read from it.
        query: [B, H, T, dh], after the rotary embedding.
        key: [B, K, S, dh], after the rotary embedding and the update of the tokens' cache.
        value: [B, K, S, dh].
        attention_mask: Bool or additive float [B, 1, T, S]; None for causal attention.
        scaling: Factor of the scores; 1/sqrt(dh) when None.
        dropout: Probability that an attention weight, of a slot or of a token, is dropped.
        **kwargs: Further arguments of transformers' attention functions. With a memory, `is_causal` is used and, for
            packed rows on a GPU, `koff_documents` (see `backbone.hidden_states`).

    Returns:
        The heads' outputs [B, T, H, dh], and None in place of the attention weights, which are never formed.

    Raises:
        KoffError: The memory does not fit the batch or the layer, or the model uses an attention variant (soft capping,
            position bias, attention sinks, paged cache) that is not supported with a memory.
    """
    read = getattr(module, "koff_memory", None)
    memory = None if read is None else read()
    whole = query.shape[2] == key.shape[2] and not kwargs.get("sliding_window")
    documents = kwargs.get("koff_documents") if whole else None
    if memory is not None or documents is not None:
        query, key, value = _as_autocast(query, key, value)
    # The dense model on packed rows, as teacher: without gradients the kernel can be called as it is.
    teaches = memory is None and documents is not None and not torch.is_grad_enabled() and not dropout
    if teaches and _can_merge(query, attention_mask, None, documents):
        out, *_ = flash(query, key, value, None, scaling, True, documents)
        return out.transpose(1, 2).contiguous(), None
    if memory is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    _check(memory, query, key, kwargs)
    if memory.key.dtype != key.dtype:
        memory = LayerMemory(memory.key.to(key.dtype), memory.value.to(key.dtype), memory.visible)
    causal = query.shape[2] > 1 and attention_mask is None and _is_causal(module, kwargs.get("is_causal"))
    if causal:  # a static cache is longer than the tokens seen so far: cut it, as transformers does
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    if key.shape[2] >= MERGE_FROM and not dropout and _can_merge(query, attention_mask, memory, documents):
        out = attend_merged(query, key, value, memory, attention_mask, scaling, causal, documents)
    else:
        out = attend_reference(query, key, value, memory, attention_mask, scaling, causal, dropout)
    return out.transpose(1, 2).contiguous(), None  # [B, T, H, dh]


def _check(memory: LayerMemory, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> None:
    """Raise KoffError unless the memory fits the batch and the layer."""
    rows, heads, slots, size = memory.key.shape
    wanted = (key.shape[1], key.shape[3])
    if rows not in (1, len(query)):
        raise KoffError(
            f"the active memory has {rows} rows but the batch has {len(query)}: activate one domain per row"
        )
    if (heads, size) != wanted or memory.value.shape != memory.key.shape:
        raise KoffError(
            f"the memory has keys {list(memory.key.shape)} and values {list(memory.value.shape)} but this layer has "
            f"{wanted[0]} key-value heads of size {wanted[1]}: use the memory that was trained for this model"
        )
    if memory.visible is not None and memory.visible.shape != (rows, slots):
        raise KoffError(f"visible must be [{rows}, {slots}], got {list(memory.visible.shape)}")
    if given := [name for name in _UNDEFINED & kwargs.keys() if kwargs[name] is not None]:
        raise KoffError(f"this model's attention uses {', '.join(given)}, which is not supported with a memory")


def _is_causal(module: nn.Module, given: bool | None) -> bool:
    """Whether several queries without a mask are causal: transformers' rule (integrations/sdpa_attention.py)."""
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _as_autocast(*tensors: Tensor) -> Iterator[Tensor]:
    """On a GPU under autocast: cast to its dtype, as SDPA does by itself, since the rotary embedding gives float32."""
    half = tensors[0].is_cuda and torch.is_autocast_enabled("cuda")
    return (each.to(torch.get_autocast_dtype("cuda")) if half else each for each in tensors)


def _can_merge(query: Tensor, mask: Tensor | None, memory: LayerMemory | None, documents: Tensor | None) -> bool:
    """Whether `attend_merged` can be used here; without a memory, whether its kernels can."""
    if query.is_cuda:
        shown = memory is None or memory.visible is None
        maskless = shown and (mask is None or documents is not None)  # the CUDA kernel takes no mask
        size = query.shape[3]
        able = maskless and query.dtype in (torch.float16, torch.bfloat16) and size % 8 == 0 and size <= 256
        return able and kernels_agree(query.device, query.dtype, size)
    return query.is_cpu


@torch.compiler.assume_constant_result
def kernels_agree(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether `attend_merged` equals `attend_reference` on this GPU, gradients too; if not, a warning says so.

    It calls flash kernels that are no public functions of torch, which may differ between releases and GPUs. So they
    are tried once, on a small example.

    Args:
        device: A GPU.
        dtype: Half precision.
        size: Head size dh.
    """
    return _agree(device, dtype, size)


@lru_cache
def _agree(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    try:  # in a thread of its own, outside of the autocast and the hooks of the forward under way
        with ThreadPoolExecutor(1) as pool:
            gaps = pool.submit(_gaps, device, dtype, size).result()
        said = "" if all(gap < KERNEL_GAP for gap in gaps) else f"differ by {', '.join(f'{gap:.1%}' for gap in gaps)}"
    except (RuntimeError, TypeError, ValueError) as error:
        said = f"fail: {str(error).splitlines()[0]}"
    if said:
        warnings.warn(f"flash kernels on {device} {said}; attention to memories takes a slower way", stacklevel=1)
    return not said


def _gaps(device: torch.device, dtype: torch.dtype, size: int) -> list[float]:
    """Largest differences of outputs and gradients, relative to their largest value: of plain and of packed rows."""
    rows, length, slots = 2, 160, 8  # more tokens than a block of a kernel has
    # Packed rows of two documents each; `number` is the document of each token.
    bounds = torch.tensor([0, 10, length, length + 150, rows * length], dtype=torch.int32, device=device)
    number = torch.bucketize(torch.arange(rows * length, device=device), bounds, right=True).view(rows, 1, length)
    packed = (number[..., :, None] == number[..., None, :]).tril()  # bool [B, 1, T, T]
    gaps = []
    for mask, documents, owners in ((None, None, 1), (packed, bounds, rows)):
        shapes = [(rows, 4, length), *[(rows, 2, length)] * 2, *[(owners, 2, slots)] * 2]
        made = []
        for place, shape in enumerate(shapes):
            numbers = torch.arange(math.prod(shape) * size, dtype=torch.float32, device=device)
            made.append((numbers * (7.3 + place)).sin().view(*shape, size).to(dtype).requires_grad_())
        given = *made[:3], LayerMemory(*made[3:]), mask, 0.5, mask is None
        ways = attend_merged(*given, documents), attend_reference(*given)
        for one, other in zip(*(_with_gradients(out, made) for out in ways), strict=True):
            gaps.append(float((one - other).abs().max() / other.abs().max()))
    return gaps


def _with_gradients(out: Tensor, made: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of its square, in float32."""
    grads = torch.autograd.grad(out.float().square().sum(), made)
    return [each.detach().float() for each in (out, *grads)]


def attend_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: LayerMemory,
    mask: Tensor | None,
    scale: float | None,
    is_causal: bool,
    dropout: float = 0.0,
) -> Tensor:
    """One attention over the memory followed by the tokens: the definition, and the faster way for short rows.

    softmax(scale query [memory.key; key]^T + [visible; mask]) [memory.value; value], where [;] concatenates.

    Args:
        query: [B, H, T, dh].
        key: [B, K, S, dh].
        value: [B, K, S, dh].
        memory: In the dtype of `key` and `value`.
        mask: Bool or additive float, broadcastable to [B, H, T, S]; None when `is_causal` says it all.
        scale: Factor of the scores; 1/sqrt(dh) when None.
        is_causal: Query t sees the tokens 0..t; `mask` is None then.
        dropout: Probability that a weight is dropped.

    Returns:
        [B, H, T, dh].
    """
    length = query.shape[2]
    if is_causal:
        mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None or memory.visible is not None:
        mask = _prepend_visible(mask, memory, query, key)  # [B|1, 1, T, P + S]
    slots = shared(query, memory.key, memory.value)  # [B, K, P, dh] twice
    key, value = torch.cat([slots[0], key], dim=2), torch.cat([slots[1], value], dim=2)  # [B, K, P + S, dh]
    queries, grouped = query, query.is_cpu or use_gqa_in_sdpa(mask, key, value)
    groups = query.shape[1] // key.shape[1]  # query heads of each key-value head
    if not grouped and length == 1 and (mask is None or mask.shape[1] == 1):  # decoding: they become its queries
        queries = query.reshape(len(query), -1, groups, query.shape[3])  # [B, K, H / K, dh]
    elif not grouped:  # with a mask, only the slowest CUDA kernel takes fewer key-value heads than query heads: repeat
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    return F.scaled_dot_product_attention(
        queries, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=grouped
    ).reshape(query.shape)


def _prepend_visible(mask: Tensor | None, memory: LayerMemory, query: Tensor, key: Tensor) -> Tensor:
    """The mask [B|1, 1|H, T, P + S] over memory and tokens, from that of the tokens and `memory.visible`."""
    slots, visible = memory.key.shape[2], memory.visible
    if mask is None:
        mask = query.new_ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool)
    if visible is None:
        return F.pad(mask, (slots, 0), value=True if mask.dtype == torch.bool else 0.0)
    seen = visible[:, None, None, :]  # [R, 1, 1, P]
    if mask.dtype != torch.bool:
        seen = _additive(seen, mask.dtype)
    rows = max(len(mask), len(seen))
    return torch.cat([seen.expand(rows, *mask.shape[1:3], -1), mask.expand(rows, -1, -1, -1)], dim=-1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as a term of the scores: 0 where seen, -inf where not."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def attend_merged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: LayerMemory,
    mask: Tensor | None,
    scale: float | None,
    is_causal: bool,
    documents: Tensor | None = None,
) -> Tensor:
    """Two flash attentions, over the tokens and over the memory, merged by their log-sum-exp: exact, nothing copied.

    Arguments and result are those of :func:`attend_reference`, without dropout. On CUDA only bfloat16 or float16, no
    `visible`, and no mask but that of packed rows, which is given as `documents`: int32 [N + 1], where each of the N
    documents begins among the tokens of all rows joined, and where the last one ends.
    """
    tokens = None if mask is None or documents is not None else _additive(mask, query.dtype)
    slots = None if memory.visible is None else _additive(memory.visible[:, None, None, :], query.dtype)
    slotted = query, key, value, memory.key, memory.value
    return MergedAttention.apply(*slotted, tokens, slots, documents, scale, is_causal)


AttentionInterface.register(NAME, koff_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # else transformers makes no mask for padding and packing
