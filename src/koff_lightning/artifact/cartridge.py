"""KV memories in peft's CARTRIDGE format, for engines that take a learned prefix as a cache.

A cache has no places before the first token: there the P slots stand at the positions 0..P-1 and the text begins at P.
Rotary attention sees only distances, so moving keys and text by P changes nothing; values do not move.

The format flattens all layers into one matrix [P, L * 2 * K * dh] (of each layer the keys, then the values), so all
must have equally many key-value heads. Source: peft/tuners/cartridge.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig

from koff_lightning.backbone import sliding_window
from koff_lightning.kv_memory import KVMemory, rotate_keys
from koff_lightning.placement import shown
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import new_folder
from koff_lightning.support.json_files import read_json_object

CONFIG, WEIGHTS, NAME = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"


def to_cartridge(memory: KVMemory, freqs: Sequence[Tensor], folder: Path, base: str | None = None) -> None:
    """Write a KV memory as a CARTRIDGE adapter.

    `PeftModel.from_pretrained(backbone, folder)` reads it where the backbone's own config names its key-value heads:
    layout `uniform`, or any other when no head was removed.

    Args:
        memory: The memory; it must have slots in all layers.
        freqs: Each layer's inverse frequencies of the rotary embedding, [dh / 2] (`backbone.rotary_inv_freqs`).
        folder: A new or empty folder.
        base: Id of the model, as peft notes it.

    Raises:
        KoffError: Some layer has no slots, layers differ in key-value heads, the folder holds something, or the disk
            did not take it.
    """
    tensors, slots, layers = memory.tensors(), memory.slots, memory.depth
    if len(memory.layers) != layers:
        raise KoffError(
            f"a CARTRIDGE holds slots in all {layers} layers, this memory has some in {shown(memory.layers)} alone: "
            "train one with kv.layers all"
        )
    shapes = sorted({(part.shape[0], part.shape[2]) for part in tensors.values()})
    if len(shapes) != 1:
        raise KoffError(
            "a CARTRIDGE holds layers with equally many key-value heads; these have "
            f"{shapes[0][0]} to {shapes[-1][0]}: export with --layout uniform, or prune no kv_group units"
        )
    heads, size = shapes[0]
    parts = []
    for index in range(layers):
        key = rotate_keys(tensors[f"layers.{index}.key"].float(), freqs[index], slots)
        parts += [key, tensors[f"layers.{index}.value"].float()]
    flat = torch.stack(parts).permute(2, 0, 1, 3).reshape(slots, -1)  # [2L, K, P, dh] -> [P, 2L * K * dh]
    if folder.is_dir() and any(folder.iterdir()):
        raise KoffError(f"{folder} is not empty: remove what is in it, or give another folder")
    with new_folder(folder, overwrite=True) as work:
        save_file({NAME: flat.cpu().contiguous()}, work / WEIGHTS, {"format": "pt"})
        (work / CONFIG).write_text(_config(slots, layers, heads, size, base), encoding="utf-8")


def check_in_sight(config: PreTrainedConfig) -> None:
    """Raise KoffError for a model in which slots that stand among the tokens, as peft's do, go out of sight."""
    window = sliding_window(config)
    if window is not None and window < config.max_position_embeddings:
        raise KoffError(
            f"peft keeps a CARTRIDGE among the tokens, where the model's sliding window of {window} leaves it behind "
            "in a text longer than that: use the memory through koff_lightning, where slots are always in sight"
        )


def _config(slots: int, layers: int, heads: int, size: int, base: str | None) -> str:
    from peft import CartridgeConfig  # takes seconds, and only writing needs it

    config = CartridgeConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
        num_virtual_tokens=slots,
        num_frozen_tokens=1,
        num_layers=layers,
        token_dim=heads * size,
        num_attention_heads=heads,  # peft means those of the cache
        num_transformer_submodules=1,
    )
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_cartridge(folder: Path, freqs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Read a CARTRIDGE adapter, ours or one that peft trained.

    Args:
        folder: Where `adapter_config.json` and `adapter_model.safetensors` are.
        freqs: Each layer's inverse frequencies of the backbone's rotary embedding, [dh / 2].

    Returns:
        `layers.{i}.key` and `layers.{i}.value`, each fp32 [K, P, dh], for `KVMemory.from_tensors`.

    Raises:
        KoffError: No such files, another kind of adapter, further tensors, numbers that are no floats, or sizes that
            contradict each other.
    """
    try:
        config, held = read_json_object(folder / CONFIG), load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise KoffError(f"{folder} is not a CARTRIDGE adapter that can be read: {error}") from error
    if (kind := config.get("peft_type")) != "CARTRIDGE":
        raise KoffError(f"{folder} holds a peft adapter of type {kind}, wanted is CARTRIDGE")
    if (flat := held.pop(NAME, None)) is None:  # [P, 2L * K * dh]
        raise KoffError(f"{folder} is not a CARTRIDGE adapter that can be read: its weights hold no {NAME}")
    sizes = {name: config.get(name) for name in ("num_virtual_tokens", "num_layers", "token_dim")}
    if odd := next((name for name, size in sizes.items() if type(size) is not int or size < 1), None):
        raise KoffError(f"{folder} is not a CARTRIDGE adapter that can be read: its {odd} is {str(sizes[odd])[:20]!r}")
    if held:
        raise KoffError(f"{folder} holds more than {NAME} ({min(held)}), which a KV memory has no place for")
    if flat.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise KoffError(f"{folder}: {NAME} is {flat.dtype}, which are no keys and values: get the adapter again")
    slots, layers, width = sizes.values()
    size = 2 * len(freqs[0])
    if flat.shape != (slots, 2 * layers * width) or width % size:
        raise KoffError(
            f"{folder}: {NAME} is {list(flat.shape)}, which is not {slots} slots of {layers} layers with whole heads "
            f"of size {size}: it belongs to another model, or the files to different adapters"
        )
    parts = flat.float().view(slots, 2 * layers, width // size, size).permute(1, 2, 0, 3)  # [2L, K, P, dh]
    tensors = {}
    for index in range(layers):
        tensors[f"layers.{index}.key"] = rotate_keys(parts[2 * index], freqs[index], -slots)
        tensors[f"layers.{index}.value"] = parts[2 * index + 1].contiguous()
    return tensors
