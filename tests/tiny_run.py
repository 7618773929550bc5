"""A whole run in a second: a random backbone, random tokens in the format of the data module, and a trainer."""

from collections import UserList
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from tiny_models import tiny_model

from koff_lightning import KOFFModule, KVSpec, LoraSpec, SparsitySpec
from koff_lightning.callbacks import AnnealSparsity

DOMAINS = ["en", "law"]
BYTES = 40.0  # of each row


class Batches(UserList):
    """A loader; Lightning would take a plain list for a list of loaders."""


class RandomText(LightningDataModule):
    """Batches as from DomainDataModule: training batches hold every domain, held-out batches one each.

    Args:
        batches: Number of training batches.
        domains: Of the rows of each training batch.
    """

    def __init__(self, batches: int = 100, domains: Sequence[str | None] = ("en", "law")) -> None:
        super().__init__()
        self.batches, self.domains = batches, list(domains)

    @property
    def domain_names(self) -> list[str]:
        return DOMAINS

    @staticmethod
    def batch(domains: Sequence[str | None], seed: int) -> dict[str, Any]:
        ids = torch.randint(3, 97, (len(domains), 12), generator=torch.Generator().manual_seed(seed))
        return {
            "input_ids": ids,
            "labels": ids.clone(),
            "domains": list(domains),
            "num_bytes": torch.full((len(domains),), BYTES),
        }

    def train_dataloader(self) -> "Batches":
        return Batches([self.batch(self.domains, seed) for seed in range(self.batches)])

    def test_dataloader(self) -> "Batches":
        return Batches([self.batch([domain] * 2, 1000 + i) for i in range(2) for domain in DOMAINS])

    val_dataloader = test_dataloader
    predict_dataloader = test_dataloader

    def sample_ids(self, domain: str, num_tokens: int) -> torch.Tensor:
        return torch.arange(3, 3 + num_tokens)


def tiny_module(folder: Path, **options: Any) -> KOFFModule:
    """A module over a random Llama that is saved in `folder`."""
    path = folder / "backbone"
    if not path.exists():
        tiny_model("llama", hidden_size=32, intermediate_size=24, head_dim=8).save_pretrained(path)
    sparsity = options.pop("sparsity", SparsitySpec(target=0.2, min_channels=4))
    defaults = {"domains": DOMAINS, "lora": LoraSpec(rank=2), "kv": KVSpec(slots=4), "sparsity": sparsity}
    return KOFFModule(str(path), **defaults | options)


def tiny_trainer(
    folder: Path, callbacks: Sequence[Callback], steps: int = 8, anneal: Mapping[str, Any] | None = None, **options: Any
) -> Trainer:
    """A trainer on the CPU that logs nothing and saves nothing, with the schedule of the mask."""
    defaults = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "limit_val_batches": 0}
    bars = any(type(callback).__name__ == "KoffProgress" for callback in callbacks)
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        callbacks=[*callbacks, AnnealSparsity(**{"warmup": 0.25, "ramp": 0.25, "hold": 0.25} | dict(anneal or {}))],
        num_sanity_val_steps=0,
        enable_progress_bar=bars,
        **defaults | options,
    )
