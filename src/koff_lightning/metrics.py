"""Bits per byte: the loss on text in a unit that does not depend on the tokenizer, so languages can be compared.

As one figure of all text (`BitsPerByte`), and by document (`DocumentScores`), which paired comparisons need; there also
by how much of the text was there to predict from. A memory knows what its domain looks like before any text is read,
which the dense model does not, so that the two compare otherwise at the beginning of a text than within it.
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
    kept in fp64: in fp32 a corpus of 2^24 bytes would no longer count single bytes. Without any bytes the value is nan.
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
            num_tokens: How many tokens these predict, any shape; what has none counts for no perplexity.
        """
        self.nats += nats.sum(dtype=self.nats.dtype)
        self.num_bytes += num_bytes.sum(dtype=self.num_bytes.dtype)
        if num_tokens is not None:
            self.num_tokens += num_tokens.sum(dtype=self.num_tokens.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        """Follow the module to its device but not to its dtype: bf16-true training would turn the sums to bf16."""

        def move(tensor: Tensor) -> Tensor:
            device = fn(torch.empty(0, device=tensor.device)).device
            return tensor.to(device, torch.float32 if device.type == "mps" else tensor.dtype)  # Apple's has no fp64

        return super()._apply(move, exclude_state)

    def compute(self) -> Tensor:
        """Bits per byte so far, scalar."""
        return self.nats / (math.log(2) * self.num_bytes)


# Fewest tokens before a predicted one, those of its own text in its row, of each class of context.
CONTEXT = (1, 8, 32, 128)


class DocumentScores:
    """Nats and UTF-8 bytes of every document by domain and arm, in fp64: the summands of `BitsPerByte`.

    Nats and predicted tokens are counted by class of context as well, K = len(CONTEXT) of them. Documents are numbered
    by the data module (`documents` of a batch); batches without numbers are passed over.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str, str], np.ndarray] = {}  # (domain, arm, "nats" or "bytes") -> [D]

    def reset(self) -> None:
        """Forget all that was counted."""
        self._sums = {}

    def update(self, arm: str, batch: Mapping[str, Any], nats: Tensor) -> None:
        """Count the documents of a batch.

        Args:
            arm: Name of the arm that was scored.
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
    """Sum of two lists by document; the shorter one has not seen the last documents."""
    if one is None:
        return other
    size = max(len(one), len(other))
    return np.pad(one, (0, size - len(one))) + np.pad(other, (0, size - len(other)))
