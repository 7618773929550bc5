"""Cut removed units out of the backbone, its adapters and its KV memories: the masked model, physically smaller.

In place and final. Each small function edits the weights and the widths together; the output is the same before and
after, up to the rounding of shorter sums.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from koff_lightning.backbone import PrunableGroup
from koff_lightning.memory import MemoryBank


@torch.no_grad()
def cut_(model: PreTrainedModel, groups: list[PrunableGroup], kept: Tensor, memories: MemoryBank | None = None) -> None:
    """Remove every unit that `kept` (bool [U], over `groups` in order) marks False. Gates must be off afterwards.

    Args:
        model: Backbone, with or without adapters injected.
        groups: The units, as listed from the plain backbone.
        kept: Hard mask.
        memories: Bank whose KV memories lose the removed kv heads too.
    """
    for group, mask in zip(groups, kept.split([g.size for g in groups]), strict=True):
        units = mask.nonzero()[:, 0]
        if len(units) == group.size:
            continue
        for path, rows in group.producers:
            cut_rows_(model.get_submodule(path), spread(units, rows))
        cut_columns_(model.get_submodule(group.consumer), spread(units, group.width))
        if group.kind == "kv_group" and memories is not None:
            for memory in memories.kv.values():
                memory.keep_heads_(group.layer, units)


def spread(units: Tensor, width: int) -> Tensor:
    """Indices of the rows or columns that belong to `units` when each owns `width` consecutive ones."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def cut_rows_(linear: nn.Module, rows: Tensor) -> None:
    """Keep only the given outputs of a linear; of an adapted one, those of its base and of every adapter's B."""
    for part in _parts(linear, "lora_B"):
        part.weight = _slice(part.weight, rows, 0)
        if part.bias is not None:
            part.bias = _slice(part.bias, rows, 0)
        part.out_features = len(rows)
    linear.out_features = len(rows)


def cut_columns_(linear: nn.Module, columns: Tensor) -> None:
    """Keep only the given inputs of a linear; of an adapted one, those of its base and of every adapter's A."""
    for part in _parts(linear, "lora_A"):
        part.weight = _slice(part.weight, columns, 1)
        part.in_features = len(columns)
    linear.in_features = len(columns)


def _parts(linear: nn.Module, side: str) -> list[nn.Linear]:
    return [linear.base_layer, *getattr(linear, side).values()] if hasattr(linear, "base_layer") else [linear]


def _slice(parameter: nn.Parameter, index: Tensor, dim: int) -> nn.Parameter:
    return nn.Parameter(
        parameter.index_select(dim, index.to(parameter.device)).contiguous(), requires_grad=parameter.requires_grad
    )
