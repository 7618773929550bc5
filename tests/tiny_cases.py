"""A tiny model with gates and filled memories; the same cut by surgery; and by hand, with none of our code."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from koff_lightning.artifact.layouts import LAYOUTS
from koff_lightning.attention import LayerMemory
from koff_lightning.backbone import PrunableGroup, hidden_states, prunable_groups
from koff_lightning.gates import BackboneGates
from koff_lightning.memory import MemoryBank
from koff_lightning.specs.memories import KVSpec, LoraSpec
from koff_lightning.surgery import cut_kv, cut_state
from koff_lightning.units import KINDS

DOMAINS = ("de", "fr", "law")
SLOTS, ALPHA, RANK = 5, 6.0, 3


@dataclass
class Case:
    """A frozen model with everything of ours hung on it."""

    plain: PreTrainedModel  # a copy of the model as it was before
    model: PreTrainedModel
    groups: list[PrunableGroup]
    bank: MemoryBank
    gates: BackboneGates

    def trained(self, domain: str) -> list[nn.Parameter]:
        return self.bank.lora_parameters(domain) + self.bank.kv_parameters(domain)


def make_case(
    family: str,
    *,
    lora: bool = True,
    kv: bool = True,
    domains: Sequence[str] = DOMAINS,
    kinds: Sequence[str] = KINDS,
    **config,
) -> Case:
    """Hang memories (LoRA with B not zero, KV full of noise) and gates on a random model of a family."""
    model = tiny_model(family, **config).requires_grad_(False)
    model.config.use_cache = False
    plain = copy.deepcopy(model)
    groups = prunable_groups(model, kinds)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        spec = LoraSpec(RANK, ALPHA) if lora else None
        bank = MemoryBank(model, domains, spec, KVSpec(SLOTS) if kv else None)
        for tensor in (*bank.lora_parameters(), *bank.kv_parameters(), *_sinks(bank)):
            nn.init.normal_(tensor, std=0.3 if tensor.ndim == 3 else 0.1)  # KV [K, P, dh], LoRA [r, in]
    gates = BackboneGates(groups)
    gates.attach(model)
    return Case(plain, model, groups, bank, gates)


def _sinks(bank: MemoryBank) -> list[Tensor]:
    return [b for name, b in bank.named_buffers() if b.is_floating_point()]


def random_mask(groups: list[PrunableGroup], seed: int = 0, keep: float = 0.6) -> Tensor:
    """A hard mask, bool [U], other in every layer and with at least one unit in each group."""
    random = torch.Generator().manual_seed(seed)
    parts = []
    for group in groups:
        kept = torch.rand(group.size, generator=random) < keep
        kept[torch.randint(group.size, (), generator=random)] = True
        if group.kind == "kv_group" and group.layer == 0:
            kept = torch.arange(group.size) == 1  # else two of two heads would stay too often
        parts.append(kept)
    return torch.cat(parts)


def cut_model(model: PreTrainedModel, groups: list[PrunableGroup], kept: Tensor) -> PreTrainedModel:
    """The ragged model that surgery makes of a plain one."""
    config, state = LAYOUTS["ragged"].backbone(model.config, model.state_dict(), groups, kept)
    cut = AutoModelForCausalLM.from_config(config, attn_implementation="koff")
    cut.load_state_dict(state)
    cut.config.use_cache = False
    return cut.requires_grad_(False).eval()


@torch.no_grad()
def cut_case(case: Case, kept: Tensor) -> Case:
    """The same of a model with its memories; the gates of the result are over the units that are left."""
    model = cut_model(case.plain, case.groups, kept)
    plain, groups = copy.deepcopy(model), prunable_groups(model)
    spec = LoraSpec(RANK, ALPHA) if case.bank.lora_parameters() else None
    bank = MemoryBank(model, case.bank.domains, spec, KVSpec(SLOTS) if case.bank.kv else None)
    model.load_state_dict(cut_state(case.model.state_dict(), case.groups, kept))
    for name, memory in bank.kv.items():
        left = cut_kv(case.bank.kv[name].tensors(), case.groups, kept)
        for index in range(len(groups) // 2):
            memory._write_(index, left[f"layers.{index}.key"], left[f"layers.{index}.value"])
    gates = BackboneGates(groups)
    gates.attach(model)
    return Case(plain, model, groups, bank, gates)


@torch.no_grad()
def sliced_by_hand(case: Case, kept: Tensor, domain: str | None) -> PreTrainedModel:
    """The plain model with the domain's LoRA merged in, then cut down by indexing."""
    model = copy.deepcopy(case.plain)
    masks = iter(kept.split([group.size for group in case.groups]))
    size = model.config.head_dim
    share = model.config.num_attention_heads // model.config.num_key_value_heads
    for index, layer in enumerate(model.model.layers):
        neurons, heads = next(masks), next(masks)
        keys, queries = heads.repeat_interleave(size), heads.repeat_interleave(share * size)
        mlp, attention = layer.mlp, layer.self_attn
        rows = {"gate_proj": neurons, "up_proj": neurons, "q_proj": queries, "k_proj": keys, "v_proj": keys}
        columns = {"down_proj": neurons, "o_proj": queries}
        for block in (mlp, attention):
            for name, linear in list(block.named_children()):
                if isinstance(linear, nn.Linear):
                    adapted = case.model.get_submodule(f"model.layers.{index}").mlp if block is mlp else None
                    adapted = adapted or case.model.model.layers[index].self_attn
                    full = linear.weight + _delta(getattr(adapted, name), domain)
                    setattr(block, name, _cut(full, linear.bias, rows.get(name), columns.get(name)))
        if domain is not None and case.bank.kv:
            key, value = (part[heads].detach()[None] for part in case.bank.kv[f"koff_{domain}"].layer(index))
            attention.koff_memory = lambda key=key, value=value: LayerMemory(key, value)
    return model


def _delta(adapted: nn.Module, domain: str | None) -> Tensor | float:
    if domain is None or not hasattr(adapted, "lora_A"):
        return 0.0
    return ALPHA / RANK * adapted.lora_B[f"koff_{domain}"].weight @ adapted.lora_A[f"koff_{domain}"].weight


def _cut(weight: Tensor, bias: Tensor | None, rows: Tensor | None, columns: Tensor | None) -> nn.Linear:
    weight = weight if rows is None else weight[rows]
    weight = weight if columns is None else weight[:, columns]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight.copy_(weight)
    if bias is not None:
        linear.bias.copy_(bias if rows is None else bias[rows])
    return linear


def plain_batch(rows: int = 3, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))}


def packed_batch(rows: int = 3, length: int = 12) -> dict[str, Tensor]:
    """Rows of several documents: positions begin anew inside the row, at other places in each."""
    batch = plain_batch(rows, length)
    places = torch.arange(length)
    starts = [[0, 4 + row, 8 + row] for row in range(rows)]
    batch["position_ids"] = torch.stack([places - max_start(places, start) for start in starts])
    return batch


def max_start(places: Tensor, starts: list[int]) -> Tensor:
    return torch.stack([torch.where(places >= s, s, 0) for s in starts]).amax(0)


def left_padded_batch(rows: int = 3, length: int = 12) -> dict[str, Tensor]:
    """Rows of unequal length, padding before the text, positions counted from the text's first token."""
    batch = plain_batch(rows, length)
    lengths = torch.tensor([length - 3 * row for row in range(rows)])
    mask = torch.arange(length) >= (length - lengths)[:, None]
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return batch | {"attention_mask": mask.long(), "position_ids": positions}


BATCHES = {"plain": plain_batch, "packed": packed_batch, "left_padded": left_padded_batch}


def real(batch: dict[str, Tensor]) -> Tensor:
    """Where the batch holds text, bool [B, T]."""
    return batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"]).bool()


def run(case: Case, batch: dict[str, Tensor], domains: Sequence[str | None] | None = None, kept: Tensor | None = None):
    """Hidden states [B, T, d] with the memories of `domains` and the gates at `kept`; None = off."""
    case.bank.activate(domains or [None] * len(batch["input_ids"]))
    case.gates.set(None if kept is None else kept.float().reshape(-1, kept.shape[-1]))
    return hidden_states(case.model, **batch)
