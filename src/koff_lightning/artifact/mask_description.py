"""A hard mask as `koff.json` writes it, and the hash by which a memory knows the mask it was made for."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from koff_lightning.backbone import PrunableGroup


def describe_mask(groups: Sequence[PrunableGroup], kept: Tensor, bias: Tensor | None = None) -> list[dict[str, Any]]:
    """The mask as the manifest has it.

    Args:
        groups: The units.
        kept: The mask, bool [U].
        bias: What the removed units leave behind at each group's consumer, [groups, d]; None without compensation.

    Returns:
        An entry per group, its bits packed (first unit highest) in hex; with compensation also the SHA-256 of its bias.
    """
    parts = kept.cpu().split([group.size for group in groups])
    mask = [
        {"layer": g.layer, "kind": g.kind, "of": g.size, "kept": int(part.sum()), "bits": _pack(part)}
        for g, part in zip(groups, parts, strict=True)
    ]
    if bias is None:
        return mask
    rows = bias.cpu().float().numpy().astype("<f4")  # the same on every machine
    return [group | {"bias": hashlib.sha256(row.tobytes()).hexdigest()} for group, row in zip(mask, rows, strict=True)]


def mask_hash(groups: Sequence[PrunableGroup], kept: Tensor, bias: Tensor | None = None) -> str:
    """SHA-256 over what `describe_mask` writes, so that a memory knows the mask it was made for."""
    return hash_description(describe_mask(groups, kept, bias))


def hash_description(mask: list[dict[str, Any]]) -> str:
    """`mask_hash` of a mask that `describe_mask` has written."""
    lines = [" ".join(map(str, (g["layer"], g["kind"], g["of"], g["bits"], *_bias(g)))) + "\n" for g in mask]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _bias(group: dict[str, Any]) -> list[str]:
    return [group["bias"]] if "bias" in group else []  # without one the hash is that of artifacts before there were any


def _pack(bits: Tensor) -> str:
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)  # [bytes, 8]
    return bytes((padded << torch.arange(7, -1, -1)).sum(1).tolist()).hex()


def unpack(group: dict[str, Any]) -> Tensor:
    """The mask of one described group, bool [units of the group]."""
    packed = torch.tensor(list(bytes.fromhex(group["bits"])), dtype=torch.uint8)  # [bytes]
    return (packed[:, None] >> torch.arange(7, -1, -1) & 1).flatten()[: group["of"]].bool()  # [units of the group]
