"""Add domains to an artefact: its mask and backbone stay as they are, only the new memories train."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from koff_lightning.artefact import BACKBONE, Manifest, verify
from koff_lightning.artefact_memories import add_memory
from koff_lightning.decomposition import Decomposition
from koff_lightning.errors import KoffError
from koff_lightning.layouts import memory_shapes
from koff_lightning.losses import LossSpec
from koff_lightning.memory_files import card_of, lora_state, write_memory
from koff_lightning.sparsity import SparsitySpec


def artefact_to_extend(folder: str, domains: Sequence[str], sparsity: SparsitySpec, loss: LossSpec) -> Manifest:
    """Check that an artefact can take memories for `domains`, trained under these options.

    Raises:
        KoffError: No sound artefact, one that holds a single merged domain, a domain that it has already, or options
            that need the dense model.
    """
    manifest = verify(folder)
    if manifest.layout not in ("ragged", "uniform"):  # full shapes would let adapters speak through removed units
        raise KoffError(
            f"artefact {folder} has layout {manifest.layout!r}; domains are added to 'ragged' and 'uniform' ones: "
            "export the run again with --layout ragged"
        )
    if known := [domain for domain in domains if domain in manifest.domains]:
        raise KoffError(
            f"artefact {folder} has a memory for {known[0]!r} already: give the new domain another name, or remove the "
            f"old one with `koff memory remove {folder} {known[0]}`"
        )
    if sparsity.target:
        raise KoffError(
            f"the mask of an artefact is fixed: set model.sparsity.target to 0, as add_domain.yaml does; got "
            f"{sparsity.target}"
        )
    if loss.kl:
        raise KoffError(
            "an artefact holds no dense model to learn from: set model.loss.kl to 0, as add_domain.yaml does; got "
            f"{loss.kl}"
        )
    return manifest


def add_trained(module: Decomposition, folder: str) -> list[str]:
    """Put the memories of a module that extends an artefact into it; what was there stays as it was.

    Returns:
        The domains.

    Raises:
        KoffError: The artefact has changed so that they no longer fit, or the disk did not take them.
    """
    manifest, bank = module.extends, module.memories
    with tempfile.TemporaryDirectory() as work:
        for domain in module.domains:
            card = card_of(
                bank,
                domain,
                base=manifest.base,
                mask_hash=manifest.mask_hash,
                tokenizer_hash=manifest.tokenizer_hash,
                shapes=memory_shapes(manifest.layout),
            )
            slots = bank.slots(domain)
            write_memory(Path(work) / domain, card, lora_state(bank, domain), slots and slots.tensors())
            add_memory(folder, Path(work) / domain)
    return module.domains


def backbone_of(folder: str) -> str:
    """Where the backbone of an artefact is."""
    return str(Path(folder).expanduser() / BACKBONE)
