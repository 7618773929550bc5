"""Memories of unlike kinds on a tiny model, filled with noise, in memory and on disk."""

from pathlib import Path

import torch
from tiny_cases import plain_batch
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from koff_lightning.artifact.folder import Manifest
from koff_lightning.artifact.memory_files import MemoryCard, card_of, lora_state, write_memory
from koff_lightning.memory import MemoryBank
from koff_lightning.specs.memories import KVSpec, LoraSpec

KINDS = {  # domain -> adapter, KV memory
    "both": (LoraSpec(3, 6.0), KVSpec(5)),
    "lora": (LoraSpec(1, 3.0, ["q_proj", "down_proj"]), None),
    "kv": (None, KVSpec(2)),
    "other": (LoraSpec(5, 6.0, ["q_proj", "v_proj"]), KVSpec(3)),
}


def empty_bank(model: PreTrainedModel | None = None) -> MemoryBank:
    """On a frozen model; by default a tiny Llama."""
    return MemoryBank((model or tiny_model("llama")).requires_grad_(False))


def mixed(domains=tuple(KINDS)) -> MemoryBank:
    """A bank with these memories, each of another kind."""
    bank = empty_bank()
    for domain in domains:
        bank.add(domain, *KINDS[domain])
        fill_(bank, domain)
    return bank


def fill_(bank: MemoryBank, domain: str, seed: int = 0) -> None:
    """Noise in all of a domain's memory, the frozen slot included; the same whatever else the bank holds."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed + sum(map(ord, domain)))
        slots = bank.slots(domain)
        sinks = [] if slots is None else [*slots.sink_key.buffers(), *slots.sink_value.buffers()]
        for tensor in (*bank.lora_parameters(domain), *bank.kv_parameters(domain), *sinks):
            nn.init.normal_(tensor, std=0.3 if tensor.ndim == 3 else 0.1)  # KV [K, P, dh], LoRA [r, in]


def read(bank: MemoryBank, rows: list[str | None], batch: dict[str, Tensor] | None = None) -> Tensor:
    """Logits [B, T, V] of rows with these memories."""
    bank.activate(rows)
    return bank.model(**(batch or plain_batch(len(rows))), use_cache=False).logits


HOME = {
    "base": {"id": "tiny/model", "revision": None, "hash": "b" * 64, "family": "llama", "tokenizer_hash": "t" * 64},
    "mask_hash": "m" * 64,
}
PLACEHOLDERS = {"domain": None, "dtype": "float32", "kept": [], "sparsity": {}, "parameters": {}, "domains": {}}
PLACEHOLDERS |= {"config": None, "versions": {}, "files": {}, "licence": None, "created_by": "a test"}
MANIFEST = Manifest(**PLACEHOLDERS, **HOME, layout="ragged")


def written(folder: Path, bank: MemoryBank, domain: str) -> MemoryCard:
    """Write a memory as if the bank's backbone were that of MANIFEST."""
    card = card_of(bank, domain, **HOME, tokenizer_hash="t" * 64, shapes="cut")
    slots = bank.slots(domain)
    return write_memory(folder, card, lora_state(bank, domain), slots and slots.tensors())
