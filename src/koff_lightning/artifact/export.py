"""Turn a decomposition into an artifact: check that this is possible, write it in full and prove it, or leave nothing.

The module stays as it is.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from subprocess import Popen
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from koff_lightning import __version__
from koff_lightning.artifact import modeling_koff, proof
from koff_lightning.artifact.folder import (
    MEMORIES,
    Manifest,
    count_parameters,
    describe_files,
    describe_mask,
    hash_description,
    read_manifest,
)
from koff_lightning.artifact.layouts import Config, Layout, layout_named
from koff_lightning.artifact.memory_files import MemoryCard, card_of, lora_state, write_memory
from koff_lightning.artifact.model_card import base_folder, licence_files, licence_of, model_card
from koff_lightning.decomposition import Decomposition
from koff_lightning.listed_files import BACKBONE, CARD, MANIFEST
from koff_lightning.loading import load_tokenizer, tokenizer_hash
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import check_free, hash_file, new_folder
from koff_lightning.support.secrets import without_secrets
from koff_lightning.support.versions import versions
from koff_lightning.surgery import close_rows, merge_lora, plain_state, whole_units

SHARD = "5GB"  # largest weight file, as transformers splits
_CODE = Path(modeling_koff.__file__)
_AUTO = ("AutoConfig", "AutoModelForCausalLM")


def export(
    module: Decomposition,
    out: str | Path,
    layout: str | None = None,
    domain: str | None = None,
    with_code: bool = False,
    overwrite: bool = False,
    prove: bool = True,
    config: dict[str, Any] | None = None,
    begun: Popen[str] | None = None,
    results: Mapping[str, Any] | None = None,
) -> proof.Report:
    """Write an artifact and prove it. The module stays as it is.

    Args:
        module: With its mask fixed, or one that learned none.
        out: The artifact's folder. It appears there in full, or not at all.
        layout: How the backbone is stored (layouts.py); by default `sparsity.layout`.
        domain: Domain whose LoRA is merged into the weights, for layout `merged`.
        with_code: Put the code of the koff_* model types beside the weights, for people without koff-lightning.
        overwrite: Replace an artifact that is there.
        prove: Load the artifact in a fresh process and compare it with the module.
        config: Resolved options of the run, for the manifest; what looks like a secret is left out.
        begun: The process that compares, if it was started already (`proof.begin`).
        results: `results.json` of the run, for the model card, if it is about this very model.

    Returns:
        The proof's report, as in `export_report.json`.

    Raises:
        KoffError: The mask is not fixed, the layout cannot express it, the folder is taken, the disk is full, or the
            proof failed; what failed is then kept in `out` + `.failed`.
    """
    form = layout_named(layout or module.sparsity.layout)
    _check(module, form, domain, with_code)
    out = Path(out).expanduser().resolve()
    check_free(out, overwrite)
    tokenizer = load_tokenizer(
        module.source,
        revision=module.loading.get("revision"),
        trust_remote_code=module.loading.get("trust_remote_code", False),
    )
    memories = _memories(module, domain)
    with new_folder(out, overwrite) as folder:
        write_parts(Order(module, form, memories, domain, with_code, tokenizer, config, results), folder)
        if not prove:
            return proof.write_report(folder, {"passed": None, "error": "written without proof"})
        arms = memories if domain else {None: None} | memories
        report = proof.prove(module, folder, arms, tokenizer, begun)
        if not report["passed"]:
            raise KoffError(
                f"{out} was not written: {proof.fault(report)}; what failed is in {_set_aside(folder, out)}"
            )
    return report


def summary(out: Path, report: proof.Report) -> str:
    """One line on what was written and what the proof found."""
    manifest = read_manifest(out)
    size = manifest.parameters
    found, count = "not proven", len(size["active"])
    whole = " (whole: the threshold closed no gate)" if manifest.closed_nothing else ""
    if report["passed"]:
        found = (
            "a fresh process computes the same from it "
            f"(logits to {report['relative_diff']:.0e} of the largest, greedy tokens {report['greedy']})"
        )
    return (
        f"wrote {out}: backbone {size['backbone'] / 1e6:.3f} M of {size['dense_total'] / 1e6:.3f} M "
        f"parameters{whole}, "
        f"{count} {'memory' if count == 1 else 'memories'}; {found}"
    )


def _check(module: Decomposition, layout: Layout, domain: str | None, with_code: bool) -> None:
    """Refuse what cannot be exported, before anything is written."""
    if module.learns_mask and not module.gates.hardened:
        raise KoffError(
            "the mask of this run is not fixed yet, so nothing can be cut: export a later checkpoint of it "
            "(the mask is fixed after the shares anneal.warmup, ramp and hold of its steps)"
        )
    if module.learns_mask and module.gates.kept.all() and not module.chosen_mask(module.sparsity.target).all():
        raise KoffError(
            f"the mask is fixed but removes nothing, and the run's target is {module.sparsity.target}: the whole "
            "backbone would be exported; take a checkpoint whose mask is as its run left it"
        )
    if odd := [name for name, tensor in _to_write(module) if not tensor.isfinite().all()]:
        raise KoffError(
            f"{odd[0]} holds nan or inf, so an artifact would answer nonsense ({len(odd)} tensors in all): export an "
            "earlier checkpoint of the run"
        )
    if any(hasattr(p, "to_local") for p in module.parameters()):
        raise KoffError("this model is spread over several processes: export its checkpoint (koff export --ckpt)")
    if layout.folds != (domain is not None):
        raise KoffError("layout 'merged' folds one domain's LoRA in: give --layout merged and --domain together")
    if domain is not None and domain not in module.domains:
        raise KoffError(f"there is no domain {domain!r} to merge; the run has {', '.join(module.domains)}")
    if with_code and not layout.has_code:
        raise KoffError(f"layout {layout.name!r} needs no code of ours: leave --with-code out")


def _to_write(module: Decomposition) -> Iterator[tuple[str, Tensor]]:
    """The trained tensors of the artifact, memories and biases, by their names in the state dict."""
    parts = ("memories.", "gates.bias")
    return ((n, t) for n, t in module.state_dict().items() if n.startswith(parts) or ".lora_A." in n or ".lora_B." in n)


def _memories(module: Decomposition, merged: str | None) -> dict[str, str]:
    """Name of each memory to write -> a domain that reads it. A shared memory is written once."""
    if merged is not None:
        return {merged: merged}
    if module.lora is None and module.kv is None:
        return {}
    readers: dict[str, str] = {}
    for domain, name in module.memories.names.items():
        readers.setdefault(name, domain)
    return readers


def _set_aside(folder: Path, out: Path) -> Path:
    """Keep what failed in `out` + `.failed`, to look at."""
    failed = out.with_name(f"{out.name}.failed")
    check_free(failed, overwrite=True)
    shutil.rmtree(failed, ignore_errors=True)  # of an earlier export
    return folder.rename(failed)


# ----------------------------------------------------------------------------------------------------- the parts


@dataclass(frozen=True)
class Order:
    """What to export and how.

    Args:
        module: The decomposition.
        layout: How the backbone is stored.
        memories: Name of each memory -> a domain of the module that reads it.
        merged: The domain whose LoRA is merged into the weights, or None.
        with_code: Whether the code of the koff_* model types is put beside the weights.
        tokenizer: Tokenizer of the backbone.
        config: Resolved options of the run, or None.
        results: What the run scored, or None.
    """

    module: Decomposition
    layout: Layout
    memories: Mapping[str, str]
    merged: str | None
    with_code: bool
    tokenizer: PreTrainedTokenizerBase
    config: dict[str, Any] | None
    results: Mapping[str, Any] | None

    @property
    def kept(self) -> Tensor:
        """The mask, bool [U] on the CPU; all True if none was learned."""
        gates = self.module.gates
        return gates.kept.cpu() if gates.hardened else torch.ones_like(gates.kept, device="cpu")

    @cached_property
    def mask(self) -> list[dict[str, Any]]:
        """The mask as the manifest has it."""
        return describe_mask(self.module.gates.groups, self.kept, self.module.gates.bias)

    @cached_property
    def base(self) -> dict[str, Any]:
        """Name and hashes of the dense model."""
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
        """Folder of the dense model's files."""
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
    card = model_card(manifest, own_type, order.with_code, order.results)
    (folder / BACKBONE / "README.md").write_text(card, encoding="utf-8")
    manifest = replace(manifest, files=describe_files(folder, BACKBONE))
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _write_weights(order: Order, folder: Path) -> Config:
    """Weights and config in the order's layout."""
    model, bank = order.module.backbone, order.module.memories
    state = plain_state(model)
    if order.merged is not None and (spec := bank.lora(order.merged)) is not None:
        adapter = {name: tensor.cpu() for name, tensor in lora_state(bank, order.merged).items()}
        state = merge_lora(state, adapter, spec.alpha / spec.rank)
    gates = order.module.gates
    state = close_rows(state, gates.groups, order.kept)
    groups, kept = whole_units(gates.groups, order.kept)
    config, state = order.layout.backbone(model.config, state, groups, kept, gates.bias)
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


def _write_companions(order: Order, folder: Path, config: Config) -> None:
    """The files beside the weights: config, generation config, tokenizer with chat template, licence."""
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
    """Our classes for a model type, by the Auto class that loads them; none for a plain family."""
    if model_type == modeling_koff.KoffDeciConfig.model_type:
        return {"AutoConfig": modeling_koff.KoffDeciConfig}
    family = model_type.removeprefix("koff_")
    return {} if family == model_type else dict(zip(_AUTO, modeling_koff.MODELS[family], strict=True))


def _write_memory(order: Order, name: str, folder: Path) -> MemoryCard:
    module, domain = order.module, order.memories[name]
    slots = module.memories.slots(domain)
    card = card_of(
        module.memories,
        domain,
        base=order.base,
        mask_hash=hash_description(order.mask),
        tokenizer_hash=order.base["tokenizer_hash"],
        shapes=order.layout.shapes,
    )
    lora, kv = _on_cpu(lora_state(module.memories, domain)), _on_cpu(slots and slots.tensors())
    groups = module.gates.groups
    lora = lora and close_rows(lora, groups, order.kept)
    lora, kv = order.layout.memory(lora, kv, *whole_units(groups, order.kept))
    return write_memory(folder, replace(card, domain=name, lora=card.lora if lora else None), lora, kv)


def _manifest(order: Order, domains: dict[str, dict[str, Any]], backbone: int) -> Manifest:
    module = order.module
    sizes = {name: about["parameters"] for name, about in domains.items()}
    return Manifest(
        layout=order.layout.name,
        domain=order.merged,
        base=order.base,
        dtype=str(module.backbone.dtype).removeprefix("torch."),
        mask_hash=hash_description(order.mask),
        kept=order.mask,
        sparsity={"target": module.sparsity.target, "denominator": module.sparsity.denominator}
        | module.budget.report(order.kept)
        | {"by_kind": module.budget.by_kind(order.kept), "physical": _physical(module, backbone)},
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
    """Parameters by which this export is smaller than the dense model; the rest of `sparsity` is nominal."""
    sizes = module.budget.denominators
    gone = sizes["total"] - backbone
    return {"parameters": gone, "body": gone / sizes["body"], "total": gone / sizes["total"]}


def _on_cpu(tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    return tensors and {name: tensor.cpu() for name, tensor in tensors.items()}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
