"""Bits per byte: the loss on text in a unit that does not depend on the tokenizer, so that languages can be compared.

`BitsPerByte` is one figure for all text. `DocumentScores` keeps the sums of each document, which paired comparisons
need, also split by how many tokens of the text precede the predicted one: at the beginning of a text a memory has an
advantage over the dense model, since it knows its domain before any text is read.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from koff_lightning.support import ranks


class BitsPerByte(Metric):
    """Total negative log-likelihood in bits over the UTF-8 bytes of the text: sum of nats / (ln 2 * bytes).

    A ratio of sums, not a mean of ratios, and exact over any split of the text into rows, batches and ranks. Sums are
    kept in fp64: in fp32 a corpus of 2^24 bytes would no longer count single bytes. The value is nan without any bytes,
    and inf if a likelihood is nan: a model that cannot score a text must not pass for one that was given none.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    nats: Tensor
    num_bytes: Tensor
    num_tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_bytes", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, num_bytes: Tensor, num_tokens: Tensor | None = None) -> None:
        """Count the nats and bytes of more text.

        Args:
            nats: Negative log-likelihoods in nats, any shape (per token, per row or summed).
            num_bytes: UTF-8 bytes of the text that these predict, any shape.
            num_tokens: Number of tokens that these predict, any shape; only a perplexity needs it.
        """
        self.nats += nats.sum(dtype=self.nats.dtype)
        self.num_bytes += num_bytes.sum(dtype=self.num_bytes.dtype)
        if num_tokens is not None:
            self.num_tokens += num_tokens.sum(dtype=self.num_tokens.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        """Follow the module to its device but not to its dtype: with bf16-true training the sums would become bf16."""

        def move(tensor: Tensor) -> Tensor:
            device = fn(torch.empty(0, device=tensor.device)).device
            return tensor.to(device, torch.float32 if device.type == "mps" else tensor.dtype)  # Apple's has no fp64

        return super()._apply(move, exclude_state)

    def compute(self) -> Tensor:
        """Bits per byte so far, scalar."""
        bits = self.nats / (math.log(2) * self.num_bytes)
        return bits.masked_fill(bits.isnan() & (self.num_bytes > 0), math.inf)


# Classes of context: the least number of tokens of the same text and row that precede the predicted one.
CONTEXT = (1, 8, 32, 128)


class DocumentScores:
    """Nats and UTF-8 bytes of every document by domain and arm, in fp64: the terms of `BitsPerByte`'s sums.

    Nats and predicted tokens are also counted by class of context, K = len(CONTEXT). Documents are numbered by the data
    module (`documents` of a batch); batches without these numbers are ignored.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str, str], np.ndarray] = {}  # (domain, arm, "nats" or "bytes") -> [D]

    def reset(self) -> None:
        """Set all sums to zero."""
        self._sums = {}

    def update(self, arm: str, batch: Mapping[str, Any], nats: Tensor) -> None:
        """Add the documents of a batch.

        Args:
            arm: Name of the arm: the way in which the batch was scored.
            batch: A batch of DomainDataModule.
            nats: Negative log-likelihood of each next token, [B, T-1], zero where none is predicted.
        """
        if "documents" not in batch:
            return
        predicted = batch["labels"][:, 1:] != -100  # [B, T-1]
        place = batch["position_ids"] if "position_ids" in batch else torch.arange(batch["labels"].shape[1])
        before = place.cpu().expand(len(nats), -1)[:, 1:].numpy()  # [B, T-1] tokens before each predicted one
        kind = np.searchsorted(CONTEXT[1:], before, side="right")  # 0..K-1
        for domain in dict.fromkeys(d for d in batch["domains"] if d is not None):
            rows = [i for i, d in enumerate(batch["domains"]) if d == domain]
            documents = batch["documents"][rows].cpu().numpy()  # [b, T]
            by_kind = documents[:, 1:] * len(CONTEXT) + kind[rows]  # [b, T-1]
            for what, number, values in (
                ("nats", by_kind, nats),
                ("tokens", by_kind, predicted),
                ("bytes", documents, batch["document_bytes"]),
            ):
                weights = values[rows].cpu().double().numpy().ravel()
                size = (documents.max() + 1) * (len(CONTEXT) if number is by_kind else 1)
                sums = np.bincount(number.ravel(), weights=weights, minlength=size)
                self._sums[domain, arm, what] = _added(self._sums.get((domain, arm, what)), sums)

    def compute(self) -> dict[str, dict[str, dict[str, list[Any]]]]:
        """{domain: {arm: {"nats": [D], "bytes": [D], "nats_by_context": [K, D], "tokens": [K, D]}}} from all ranks.

        Every rank must call it.
        """
        table: dict[str, dict[str, dict[str, Any]]] = {}
        for sums in ranks.gather(self._sums):
            for (domain, arm, what), part in sums.items():
                row = table.setdefault(domain, {}).setdefault(arm, {})
                row[what] = _added(row.get(what), part)
        return {domain: {arm: _told(row) for arm, row in arms.items()} for domain, arms in table.items()}


def _told(sums: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
    """The sums of an arm as `DocumentScores.compute` gives them."""
    nats, tokens = (sums[what].reshape(-1, len(CONTEXT)) for what in ("nats", "tokens"))  # [D, K]
    told = {"nats": nats.sum(1), "bytes": sums["bytes"], "nats_by_context": nats.T, "tokens": tokens.T}
    return {what: part.tolist() for what, part in told.items()}


def _added(one: np.ndarray | None, other: np.ndarray) -> np.ndarray:
    """Sum of two arrays by document; the shorter one lacks the last documents."""
    if one is None:
        return other
    size = max(len(one), len(other))
    return np.pad(one, (0, size - len(one))) + np.pad(other, (0, size - len(other)))
