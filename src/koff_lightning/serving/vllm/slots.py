"""What vLLM is told of a memory with slots: tokens in their places, what keeps its cache apart, its tensors.

A prompt that reads a memory of P slots begins with P tokens that stand for them. They may be any tokens, as what is
computed of them is replaced: by the memory's keys, moved from the positions -P..-1 to 0..P-1, and its values. The text
begins at position P, which to rotary attention is the same.

vLLM tells the blocks of its prefix cache apart by their tokens and by a salt. Tokens in the places of slots tell
nothing, so every request that names a memory needs a salt made of the memory's name and content.

Letters: P slots, K key-value heads of a layer, R of them on one rank, dh head size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from koff_lightning.artifact.memory_files import read_card
from koff_lightning.backbone import head_size
from koff_lightning.kv_memory import KVMemory, check_one_rope, rotate_keys
from koff_lightning.listed_files import CARD
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import hash_file
from koff_lightning.support.names import check_name

KEY = "koff_memory"  # of a request's kv_transfer_params: the memory's name
FOLDER = "koff_memories"  # of the connector's extra config: where the memories lie
PLACE = 0  # the token that stands for a slot
_SALT = "koff"


@dataclass(frozen=True)
class Held:
    """A memory in a folder, as far as a scheduler needs it.

    Args:
        name: Name of its folder.
        slots: P; 0 where it has a LoRA alone.
        salt: Cache salt of the requests that read it.
    """

    name: str
    slots: int
    salt: str


def salt_of(name: str, card_sha256: str) -> str:
    """The cache salt of requests that read a memory.

    Args:
        name: Name of the memory.
        card_sha256: Hash of its memory.json, which holds the hashes of its other files.
    """
    return f"{_SALT}:{name}:{card_sha256}"


def is_salt(salt: str | None) -> bool:
    """Whether a cache salt is one of ours."""
    return salt is not None and salt.startswith(f"{_SALT}:")


def with_places(ids: Sequence[int], slots: int) -> list[int]:
    """The prompt for vLLM of a text that reads a memory: `slots` tokens stand before it."""
    return [PLACE] * slots + list(ids)


def asked(parameters: Mapping[str, Any] | None) -> str | None:
    """The memory that a request's kv_transfer_params name; None where there are none.

    Raises:
        KoffError: They hold anything else, as a misspelt key would otherwise be answered without a memory.
    """
    if not parameters:
        return None
    if odd := sorted(str(name) for name in set(parameters) - {KEY}):
        raise KoffError(f"kv_transfer_params knows {KEY!r} alone; got {odd[0]!r}")
    name = parameters[KEY]
    if not isinstance(name, str):
        raise KoffError(f"{KEY} is the name of a memory; got {name!r}")
    check_name(name)  # it is part of a path
    return name


def find(folder: Path, name: str) -> Held:
    """Look at a memory of a folder, as it is now.

    Raises:
        KoffError: There is no such memory, or its card cannot be used.
    """
    if not (folder / name / CARD).is_file():
        raise KoffError(f"there is no memory {name!r}")
    card = read_card(folder / name)
    return Held(name, 0 if card.kv is None else card.kv["slots"], salt_of(name, hash_file(folder / name / CARD)))


def inv_freq(config: PreTrainedConfig) -> Tensor:
    """The radians per position of a model's rotary embedding, its scaling included, [dh/2].

    Raises:
        KoffError: They change with the layer, or with the length of the text, so no memory can be placed.
    """
    check_one_rope(config)
    with torch.device("cpu"):  # whatever a worker has made the default
        return LlamaRotaryEmbedding(config).inv_freq


def heads_of(total: int, rank: int, size: int) -> slice:
    """The key-value heads that a rank of tensor parallelism holds, as vLLM deals them out.

    Args:
        total: Heads of the layer.
        rank: From 0.
        size: Ranks. Where they are more than the heads, several hold the same one.

    Raises:
        KoffError: The one cannot be divided by the other.
    """
    if max(total, size) % min(total, size):
        raise KoffError(f"{total} key-value heads cannot be dealt out to {size} ranks: take another tensor parallelism")
    if total >= size:
        share = total // size
        return slice(rank * share, (rank + 1) * share)
    first = rank // (size // total)
    return slice(first, first + 1)


def check_layers(memory: KVMemory, config: PreTrainedConfig) -> None:
    """Refuse a memory that does not fit a model, or whose slots vLLM cannot hold.

    Raises:
        KoffError: It has other key-value heads, or slots in some layers only: vLLM has one row of places for all.
    """
    widths = getattr(config, "koff_layers", None) or [{}] * config.num_hidden_layers
    size = head_size(config)
    memory.check_shapes([(layer.get("num_key_value_heads", config.num_key_value_heads), size) for layer in widths])
    if len(memory.layers) < memory.depth:
        raise KoffError(
            f"vLLM has one row of places for all layers, and a memory has slots in {len(memory.layers)} of "
            f"{memory.depth} only: serve it with --engine own"
        )


def placed(memory: KVMemory, freq: Tensor, dtype: torch.dtype, rank: int = 0, size: int = 1) -> list[list[Tensor]]:
    """The keys and the values of each layer as they are written into vLLM's cache, each [P, R, dh].

    Args:
        memory: The memory with all heads, its keys at the positions -P..-1.
        freq: As `inv_freq`.
        dtype: Dtype of the model, in which its layers write into the cache.
        rank: This rank of tensor parallelism, from 0.
        size: How many ranks there are.
    """
    found = []
    for index in range(memory.depth):
        key, value = (part.detach().float() for part in memory.layer(index))  # [K, P, dh]
        mine = heads_of(len(key), rank, size)
        pair = rotate_keys(key[mine], freq, memory.slots), value[mine]
        found.append([part.transpose(0, 1).to(dtype).contiguous() for part in pair])
    return found
