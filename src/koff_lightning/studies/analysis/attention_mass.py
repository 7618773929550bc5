"""How much of each head's attention falls on the slots of a memory."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from koff_lightning.attention import koff_attention
from koff_lightning.backbone import attention_modules
from koff_lightning.decomposition import Batch, Decomposition
from koff_lightning.support.errors import KoffError
from koff_lightning.surgery import masks

if TYPE_CHECKING:
    import pandas as pd

WATCHED = "koff_watched"  # the attention function that also tells how much falls on the slots


def attention_mass(module: Decomposition, batches: Iterable[Batch]) -> "pd.DataFrame":
    """Share of each head's attention that falls on the slots of the own memory, over the tokens of held-out text.

    Args:
        module: From `open_run`.
        batches: Held-out text; rows without a KV memory are passed over.

    Returns:
        One line per domain, layer and query head: `domain`, `layer`, `head`, `mass` in [0, 1]; nan for removed
        heads, 0 in layers without slots.

    Raises:
        KoffError: No domain of the text has a KV memory.
    """
    import pandas as pd

    sums: dict[str, Tensor] = {}  # domain -> [L, H]
    counts: dict[str, int] = {}  # domain -> tokens
    with_slots = [name for name in module.memories.domains if module.memories.slots(name) is not None]
    for batch in batches:
        rows = [row for row, name in enumerate(batch["domains"]) if name in with_slots]
        if not rows:
            continue
        part = {k: v[rows].to(module.backbone.device) for k, v in batch.items() if isinstance(v, Tensor) and v.ndim}
        names = [batch["domains"][row] for row in rows]
        mass = _masses(module, part | {"domains": names})  # [B, L, H, T]
        counted = part["labels"] != -100  # bool [B, T]
        for row, name in enumerate(names):
            total = (mass[row] * counted[row]).sum(-1).double().cpu()  # [L, H]
            sums[name] = sums.get(name, 0) + total
            counts[name] = counts.get(name, 0) + int(counted[row].sum())
    if not sums:
        raise KoffError("no domain of this text has a KV memory: there are no slots to attend to")
    gone = _removed_heads(module, next(iter(sums.values())).shape)
    rows = [
        {"domain": name, "layer": layer, "head": head, "mass": float(value)}
        for name, total in sums.items()
        for layer, line in enumerate((total / counts[name]).masked_fill(gone, math.nan))
        for head, value in enumerate(line)
    ]
    return pd.DataFrame(rows)


def _removed_heads(module: Decomposition, shape: Sequence[int]) -> Tensor:
    """Query heads whose kv group is removed, bool [L, H]."""
    gone = torch.zeros(*shape, dtype=torch.bool)
    for group, kept in masks(module.gates.groups, module.gates.kept.cpu()):
        if group.kind == "kv_group":
            gone[group.layer] = (~kept).repeat_interleave(shape[1] // group.size)
    return gone


def _masses(module: Decomposition, batch: Batch) -> Tensor:
    """Share of attention on the own slots, [B, L, H, T]."""
    modules = attention_modules(module.backbone)
    seen: dict[int, Tensor] = {}
    with _watching(module, modules, seen):
        module.row_nats(batch, "koff")
    return torch.stack([seen[layer] for layer in range(len(modules))], dim=1)


@contextmanager
def _watching(module: Decomposition, modules: list[nn.Module], seen: dict[int, Tensor]) -> Iterator[None]:
    for layer, attention in enumerate(modules):
        attention.koff_watch = lambda mass, layer=layer: seen.__setitem__(layer, mass)
    module.backbone.set_attn_implementation(WATCHED)
    try:
        yield
    finally:
        module.backbone.set_attn_implementation("koff")
        for attention in modules:
            del attention.koff_watch


def watched_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`attention.koff_attention`, which hands the slots' share of the attention [B, H, T] to `module.koff_watch`."""
    out = koff_attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    memory = module.koff_memory() if hasattr(module, "koff_memory") else None
    if memory is None:  # a layer without slots
        module.koff_watch(query.new_zeros(query.shape[:3], dtype=torch.float32))
        return out
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    shares = []
    for row in range(len(query)):  # one at a time: the scores of a whole batch are large
        keys = memory.key[row if len(memory.key) > 1 else 0]  # [K, P, dh]
        slots = query[row] @ keys.to(query.dtype).repeat_interleave(groups, 0).mT * scale  # [H, T, P]
        if memory.visible is not None:
            slots = slots.masked_fill(~memory.visible[row if len(memory.visible) > 1 else 0], -math.inf)
        tokens = query[row] @ key[row].repeat_interleave(groups, 0).mT * scale  # [H, T, S]
        if attention_mask is None:
            hidden = torch.ones_like(tokens[0], dtype=torch.bool).triu(1)
            tokens = tokens.masked_fill(hidden, -math.inf)
        elif attention_mask.dtype == torch.bool:
            tokens = tokens.masked_fill(~attention_mask[row if len(attention_mask) > 1 else 0], -math.inf)
        else:
            tokens = tokens + attention_mask[row if len(attention_mask) > 1 else 0]
        on_slots, on_tokens = slots.float().logsumexp(-1), tokens.float().logsumexp(-1)  # [H, T]
        shares.append(torch.sigmoid(on_slots - on_tokens))
    module.koff_watch(torch.stack(shares))
    return out


AttentionInterface.register(WATCHED, watched_attention)
AttentionMaskInterface.register(WATCHED, sdpa_mask)
