"""The parts of an artifact, written from a decomposition: weights in a layout, memories, manifest, model card.

Every tensor is a copy or is only read; the module stays as it is.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from koff_lightning import __version__
from koff_lightning.artifact import modeling_koff
from koff_lightning.artifact.folder import (
    BACKBONE,
    CARD,
    MANIFEST,
    MEMORIES,
    Manifest,
    count_parameters,
    describe_files,
)
from koff_lightning.artifact.layouts import backbone_for, memory_for, memory_shapes
from koff_lightning.artifact.mask_description import describe_mask, hash_description, mask_hash
from koff_lightning.artifact.memory_files import MemoryCard, card_of, lora_state, write_memory
from koff_lightning.artifact.model_card import base_folder, licence_files, licence_of, model_card
from koff_lightning.decomposition import Decomposition
from koff_lightning.loading import tokenizer_hash
from koff_lightning.support.files import hash_file
from koff_lightning.support.secrets import without_secrets
from koff_lightning.support.versions import versions
from koff_lightning.surgery import close_rows, merge_lora, whole_units

SHARD = "5GB"  # largest weight file, as transformers splits
_CODE = Path(modeling_koff.__file__)
_AUTO = ("AutoConfig", "AutoModelForCausalLM")


@dataclass(frozen=True)
class Order:
    """What is to be written.

    Args:
        module: The decomposition.
        layout: One of `layouts.LAYOUTS`.
        memories: Name of each memory -> a domain of the module that reads it.
        merged: The domain whose LoRA is folded into the weights, or None.
        with_code: Whether the code of the koff_* model types goes with them.
        tokenizer: Of the backbone.
        config: Resolved options of the run, or None.
    """

    module: Decomposition
    layout: str
    memories: Mapping[str, str]
    merged: str | None
    with_code: bool
    tokenizer: PreTrainedTokenizerBase
    config: dict[str, Any] | None

    @property
    def kept(self) -> Tensor:
        """The mask, bool [U] on the CPU; all of it where none was learned."""
        gates = self.module.gates
        return gates.kept.cpu() if gates.hardened else torch.ones_like(gates.kept, device="cpu")

    @property
    def base(self) -> dict[str, Any]:
        """Which dense model this was."""
        model = self.module.backbone
        return {
            "id": self.module.source,
            "revision": without_secrets(self.module.loading.get("revision"))
            or getattr(model.config, "_commit_hash", None),
            "hash": self.module.backbone_hash,
            "family": model.config.model_type.removeprefix("koff_"),
            "tokenizer_hash": tokenizer_hash(self.tokenizer),
        }

    @property
    def base_folder(self) -> Path | None:
        """Where the dense model's files lie."""
        module = self.module
        return base_folder(module.source, module.backbone.name_or_path, module.loading.get("revision"))


@torch.no_grad()
def write_parts(order: Order, folder: Path) -> Manifest:
    """Fill an empty folder with everything but the proof's report.

    Raises:
        KoffError: The layout cannot express this model or this mask.
        OSError: The disk did not take it.
    """
    config = _write_weights(order, folder / BACKBONE)
    _write_companions(order, folder / BACKBONE, config)
    cards = {name: _write_memory(order, name, folder / MEMORIES / name) for name in order.memories}
    about = {name: card.summary(hash_file(folder / MEMORIES / name / CARD)) for name, card in cards.items()}
    manifest = _manifest(order, about, count_parameters(folder / BACKBONE))
    own_type = getattr(config, "model_type", "").startswith("koff_")
    (folder / BACKBONE / "README.md").write_text(model_card(manifest, own_type, order.with_code), encoding="utf-8")
    manifest = replace(manifest, files=describe_files(folder, BACKBONE))
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def plain_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights under the plain model's names, on the CPU: without adapters, tied ones once."""
    tied = model.all_tied_weights_keys
    return {
        name.replace(".base_layer.", "."): tensor.detach().cpu()
        for name, tensor in model.state_dict().items()
        if name not in tied and ".lora_A." not in name and ".lora_B." not in name
    }


def _write_weights(order: Order, folder: Path) -> PreTrainedConfig | dict[str, Any]:
    """Weights and config in the order's layout."""
    model, bank = order.module.backbone, order.module.memories
    state = plain_state(model)
    if order.merged is not None and (spec := bank.lora(order.merged)) is not None:
        adapter = {name: tensor.cpu() for name, tensor in lora_state(bank, order.merged).items()}
        state = merge_lora(state, adapter, spec.alpha / spec.rank)
    gates = order.module.gates
    state = close_rows(state, gates.groups, order.kept)
    groups, kept = whole_units(gates.groups, order.kept)
    config, state = backbone_for(order.layout, model.config, state, groups, kept, gates.bias)
    folder.mkdir()
    split = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: state[name].contiguous() for name in names}, folder / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)
    return config


def _write_companions(order: Order, folder: Path, config: PreTrainedConfig | dict[str, Any]) -> None:
    """What makes a folder of weights a model: config, generation config, tokenizer with chat template, licence."""
    values = dict(config) if isinstance(config, dict) else config.to_diff_dict()  # as save_pretrained writes it
    if order.with_code and (kinds := _classes(values["model_type"])):
        values |= {"auto_map": {auto: f"{_CODE.stem}.{kind.__name__}" for auto, kind in kinds.items()}}
        shutil.copyfile(_CODE, folder / _CODE.name)
    _write_json(folder / "config.json", values)
    order.module.own_settings.to_json_file(folder / "generation_config.json")  # save_pretrained refuses odd ones
    order.tokenizer.save_pretrained(folder)
    for file in licence_files(order.base_folder):
        shutil.copyfile(file, folder / file.name)


def _classes(model_type: str) -> dict[str, type]:
    """Our classes for a model type, by the Auto class that finds them; none for a plain family."""
    if model_type == modeling_koff.KoffDeciConfig.model_type:
        return {"AutoConfig": modeling_koff.KoffDeciConfig}
    family = model_type.removeprefix("koff_")
    return {} if family == model_type else dict(zip(_AUTO, modeling_koff.MODELS[family], strict=True))


def _write_memory(order: Order, name: str, folder: Path) -> MemoryCard:
    module, domain, shapes = order.module, order.memories[name], memory_shapes(order.layout)
    groups, slots = module.gates.groups, module.memories.slots(domain)
    card = card_of(
        module.memories,
        domain,
        base=order.base,
        mask_hash=mask_hash(groups, order.kept, module.gates.bias),
        tokenizer_hash=order.base["tokenizer_hash"],
        shapes=shapes,
    )
    lora = None if order.merged else _on_cpu(lora_state(module.memories, domain))
    kv = _on_cpu(slots and slots.tensors())
    lora = lora and close_rows(lora, groups, order.kept)
    lora, kv = memory_for(order.layout, lora, kv, *whole_units(groups, order.kept))
    return write_memory(folder, replace(card, domain=name, lora=card.lora if lora else None), lora, kv)


def _manifest(order: Order, domains: dict[str, dict[str, Any]], backbone: int) -> Manifest:
    module, kept = order.module, order.kept
    mask = describe_mask(module.gates.groups, kept, module.gates.bias)
    sizes = {name: about["parameters"] for name, about in domains.items()}
    return Manifest(
        layout=order.layout,
        domain=order.merged,
        base=order.base,
        dtype=str(module.backbone.dtype).removeprefix("torch."),
        mask_hash=hash_description(mask),
        kept=mask,
        sparsity={"target": module.sparsity.target, "denominator": module.sparsity.denominator}
        | module.budget.report(kept)
        | {"by_kind": module.budget.by_kind(kept), "physical": _physical(module, backbone)},
        parameters={
            "dense_total": module.budget.denominators["total"],
            "backbone": backbone,
            "active": {name: backbone + size for name, size in sizes.items()},
            "stored": backbone + sum(sizes.values()),
        },
        domains=domains,
        config=without_secrets(order.config),
        versions=versions(),
        files={},
        licence=licence_of(order.base_folder),
        created_by=f"koff-lightning {__version__}",
    )


def _physical(module: Decomposition, backbone: int) -> dict[str, float]:
    """What this export really lacks against the dense model, where the rest of `sparsity` is nominal."""
    sizes = module.budget.denominators
    gone = sizes["total"] - backbone
    return {"parameters": gone, "body": gone / sizes["body"], "total": gone / sizes["total"]}


def _on_cpu(tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    return tensors and {name: tensor.cpu() for name, tensor in tensors.items()}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
