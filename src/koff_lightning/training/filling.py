"""The start of KV memories: slots that read the beginning of their domain's own text."""

import torch
from lightning.pytorch import LightningDataModule

from koff_lightning.decomposition import Decomposition
from koff_lightning.support.errors import KoffError


def fill_memories(model: Decomposition, data: LightningDataModule | None) -> None:
    """Fill the KV memories that are not filled yet; those of one model may differ in their slots, or be missing.

    Args:
        model: The decomposition.
        data: Where the text comes from, by its `sample_ids(domain, tokens)`.

    Raises:
        KoffError: A memory has to be filled, and the data have no such method.
    """
    bank = model.memories
    for name, memory in {name: bank.slots(domain) for domain, name in bank.names.items()}.items():
        if memory is None or memory.initialised:
            continue
        if not hasattr(data, "sample_ids"):
            raise KoffError(
                "KV memories start from text: train with DomainDataModule, or one that has sample_ids(domain, tokens), "
                "or set kv.init to normal"
            )
        readers = [domain for domain in model.domains if bank.names[domain] == name]
        parts = [data.sample_ids(domain, -(-memory.slots // len(readers))) for domain in readers]
        ids = torch.cat(parts)[: memory.slots].to(model.device)  # [P]
        with model.under():
            memory.initialise_(model.backbone, ids)
