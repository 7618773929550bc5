"""Open what is to be studied: the dense model, its fixed mask and its memories in one module, ready to run.

A checkpoint and an artifact of the same run, in whatever layout, open as the same thing: memories in the dense model's
shapes, the adapters' parts that belong to removed units at zero. So a removed unit that is put back is exactly what it
was in the dense model.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from koff_lightning.artifact.checkpoint import from_checkpoint
from koff_lightning.artifact.decomposed import load_decomposed
from koff_lightning.artifact.folder import read_manifest
from koff_lightning.artifact.layouts import Layout
from koff_lightning.decomposition import Decomposition
from koff_lightning.kv_memory import KVMemory
from koff_lightning.specs.memories import LoraSpec
from koff_lightning.specs.sparsity import SparsitySpec
from koff_lightning.support.errors import KoffError
from koff_lightning.surgery import whole_units, zero_state

Memory = tuple[LoraSpec | None, dict[str, Tensor], dict[str, Tensor] | None]  # adapter, its matrices, slots


def open_run(source: str | Path, dense: str | None = None) -> Decomposition:
    """Open a checkpoint of `koff fit` or `koff baseline`, or an artifact, on the CPU and in eval mode.

    Args:
        source: A `.ckpt` file, or the folder that `koff export` wrote.
        dense: Where the dense model is, if it is no longer where the run found it.

    Raises:
        KoffError: Nothing that can be opened, a mask that is not fixed, another dense model, or an artifact of layout
            `merged`, whose memory can no longer be told from its backbone.
    """
    path = Path(source).expanduser()
    module = _from_artifact(path, dense) if path.is_dir() else from_checkpoint(path, dense)
    if module.learns_mask and not module.gates.hardened:
        raise KoffError(f"{path}: its mask is not fixed yet: train to the end of the hold phase, or take a later one")
    groups, kept = module.gates.groups, module.gates.kept
    with torch.no_grad():
        for domain in module.memories.domains:
            weights = module.memories.weights(domain)
            for name, cleared in zero_state(weights, groups, kept).items():
                weights[name].copy_(cleared)
    return module.eval().requires_grad_(False)


def _from_artifact(folder: Path, dense: str | None) -> Decomposition:
    manifest = read_manifest(folder)
    if manifest.form.folds:
        raise KoffError(f"{folder} has its memory merged into the backbone: analyse the run's ragged export")
    memories = _memories(folder)  # before the dense model: a cut backbone is loaded and let go of on the way
    base = manifest.base
    spec = SparsitySpec(
        target=manifest.sparsity["target"],
        denominator=manifest.sparsity["denominator"],
        units=list(dict.fromkeys(group["kind"] for group in manifest.kept)),
        min_channels=1,
    )
    # Linears are made able to carry adapters while nothing is gated; the adapters themselves take their places below.
    revision = base["revision"] if dense is None else None
    domains = list(memories) or ["none"]
    try:
        module = Decomposition(
            dense or base["id"], domains, spec, LoraSpec(rank=1), None, revision=revision, dtype=manifest.dtype
        )
    except KoffError as error:
        hint = "" if dense else " (if the dense model has moved, say where it is: --dense)"
        raise KoffError(f"{folder}: {error}{hint}") from error
    if module.backbone_hash != base["hash"]:
        raise KoffError(
            f"{folder} was cut from {base['id']!r} (hash {base['hash'][:12]}), but {module.source!r} has hash "
            f"{module.backbone_hash[:12]}: give its own dense model"
        )
    module.gates.harden(manifest.mask())
    _hang(module, memories, manifest.form)
    return module


def _memories(folder: Path) -> dict[str, Memory]:
    """The memories of an artifact, checked against their hashes, in the shapes they are stored in."""
    bank = load_decomposed(folder).memories
    slots = {domain: bank.slots(domain) for domain in bank.domains}
    return {d: (bank.lora(d), bank.weights(d), slots[d] and slots[d].tensors()) for d in bank.domains}


def _hang(module: Decomposition, memories: Mapping[str, Memory], layout: Layout) -> None:
    """Put the stored memories in place of the fresh ones."""
    groups, kept = whole_units(module.gates.groups, module.gates.kept)
    for domain in list(module.memories.domains):
        module.memories.remove(domain)
    for domain, (lora, weights, slots) in memories.items():
        matrices, tensors = layout.dense_memory(weights if lora else None, slots, groups, kept)
        filled = tensors and KVMemory.from_tensors(tensors, depth=module.memories.depth)
        module.memories.add(domain, lora, filled, matrices)
    module.domains = list(memories)
