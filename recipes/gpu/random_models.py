"""Models of random weights in the exact shapes of the named ones: speed and memory do not depend on the numbers."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from koff_lightning import KVSpec, LoraSpec, SparsitySpec, decomposition
from koff_lightning.artifact.layouts import LAYOUTS
from koff_lightning.backbone import without_weights
from koff_lightning.decomposition import Decomposition, price
from koff_lightning.kv_memory import KVMemory
from koff_lightning.memory import MemoryBank
from koff_lightning.surgery import plain_state

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 256}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
DOMAINS = ["de", "en"]
Sizes = dict[str, Any]


def config_of(sizes: Sizes) -> PreTrainedConfig:
    """The config of these sizes; `model_type` among them, llama without."""
    sizes = dict(sizes)
    return AutoConfig.for_model(sizes.pop("model_type", "llama"), **sizes)


def backbone_of(config: PreTrainedConfig, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A frozen model of random weights, made on the device."""
    with torch.device(device):
        backbone = AutoModelForCausalLM.from_config(config, dtype=dtype)
    backbone.config.use_cache = False
    backbone.generation_config.eos_token_id = None  # random tokens end nothing
    return backbone.requires_grad_(False).eval()


def decomposed(backbone: PreTrainedModel, sparsity: SparsitySpec, lora: LoraSpec, kv: KVSpec) -> Decomposition:
    """A decomposition of this very model, no file between: its mask half-way and its memories full of noise."""
    made = {"load_backbone": lambda *_, **__: backbone, "fingerprint": lambda _: "random"}
    with mock.patch.multiple(decomposition, **made):
        module = Decomposition("random", DOMAINS, sparsity, lora, kv, dtype=str(backbone.dtype)[6:])
    module.to(backbone.device)
    with torch.no_grad():
        for parameter in (*module.memories.lora_parameters(), *module.memories.kv_parameters()):
            parameter.normal_(std=0.05)
        module.gates.logits.normal_(std=4)
    module.target = sparsity.target
    return module


@contextmanager
def tiny_model(family: str, dtype: torch.dtype, device: str) -> Iterator[Decomposition]:
    """A small decomposition of a family."""
    backbone = backbone_of(config_of(TINY | {"model_type": family}), dtype, device)
    yield decomposed(backbone, SparsitySpec(target=0.12, min_channels=8), LoraSpec(16, 32.0), KVSpec(128))


@torch.no_grad()
def sliced(module: Decomposition, device: str) -> tuple[PreTrainedModel, MemoryBank]:
    """The model cut by the hard mask, and the memories cut with it, as an export would write them."""
    layout, plain, memories = LAYOUTS["ragged"], module.backbone, module.memories
    groups, kept = module.budget.groups, module.hard_mask().cpu()
    config, state = layout.backbone(plain.config, plain_state(plain), groups, kept)
    cut = backbone_of(config, plain.dtype, device)
    left = cut.load_state_dict(state, strict=False)
    assert not left.unexpected_keys, left.unexpected_keys
    assert set(left.missing_keys) <= set(cut.all_tied_weights_keys), left.missing_keys
    bank = MemoryBank(cut)
    for domain in module.domains:
        slots = {name: tensor.cpu() for name, tensor in memories.slots(domain).tensors().items()}
        weights, slots = layout.memory(memories.weights(domain), slots, groups, kept)
        bank.add(domain, memories.lora(domain), KVMemory.from_tensors(slots), weights)
    return cut, bank


def cut_shape(config: PreTrainedConfig, sparsity: SparsitySpec) -> PreTrainedConfig:
    """The config of a model cut by a random mask; no weights are made for it."""
    budget = price(without_weights(config), sparsity)
    kept = budget.harden(torch.rand(sum(group.size for group in budget.groups)), sparsity.target)
    return LAYOUTS["ragged"].backbone(config, {}, budget.groups, kept)[0]


def batch_of(rows: int, length: int, vocabulary: int, device: str) -> dict[str, Any]:
    """Random tokens [B, T], rows of both domains in turn."""
    ids: Tensor = torch.randint(3, vocabulary, (rows, length), device=device)
    domains = list(itertools.islice(itertools.cycle(DOMAINS), rows))
    return {"input_ids": ids, "labels": ids, "domains": domains}
