"""A hard mask as `koff.json` writes it, and the hash by which a memory knows the mask it was made for."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from koff_lightning.backbone import PrunableGroup


def describe_mask(groups: Sequence[PrunableGroup], kept: Tensor) -> list[dict[str, Any]]:
    """The mask (bool [U]) as the manifest has it: an entry per group, its bits packed (first unit highest) in hex."""
    parts = kept.cpu().split([group.size for group in groups])
    return [
        {"layer": g.layer, "kind": g.kind, "of": g.size, "kept": int(part.sum()), "bits": _pack(part)}
        for g, part in zip(groups, parts, strict=True)
    ]


def mask_hash(groups: Sequence[PrunableGroup], kept: Tensor) -> str:
    """SHA-256 over the groups and the mask (bool [U]), so that a memory knows the mask it was made for."""
    return hash_description(describe_mask(groups, kept))


def hash_description(mask: list[dict[str, Any]]) -> str:
    """`mask_hash` of a mask that `describe_mask` has written."""
    lines = [f"{group['layer']} {group['kind']} {group['of']} {group['bits']}\n" for group in mask]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _pack(bits: Tensor) -> str:
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)  # [bytes, 8]
    return bytes((padded << torch.arange(7, -1, -1)).sum(1).tolist()).hex()


def unpack(group: dict[str, Any]) -> Tensor:
    """The mask of one described group, bool [units of the group]."""
    packed = torch.tensor(list(bytes.fromhex(group["bits"])), dtype=torch.uint8)  # [bytes]
    return (packed[:, None] >> torch.arange(7, -1, -1) & 1).flatten()[: group["of"]].bool()  # [units of the group]
