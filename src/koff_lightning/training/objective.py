"""The loss on text under gates and memories, for the domains' text and for general text (retention) alike.

Shapes: B rows, T tokens, N predicted tokens, U prunable units.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from koff_lightning.backbone import recomputed
from koff_lightning.data.teacher import INDEX, LOG_Q
from koff_lightning.decomposition import Batch, Decomposition
from koff_lightning.losses import TopK, domain_weights, head_loss
from koff_lightning.specs.training import LossSpec
from koff_lightning.support import ranks
from koff_lightning.support.errors import KoffError


@dataclass(frozen=True)
class TextLoss:
    """Losses of one micro-batch in nats; the scalars are means over the rows of all ranks.

    Attributes:
        loss: ce * CE + kl * KL, scalar; its gradient is that of this rank's rows alone.
        ce: Cross-entropy, scalar.
        kl: KL(dense || student), scalar.
        tokens: CE + KL of each predicted token of this rank, [N].
        predicted: Where these tokens are predicted, bool [B, T-1].
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
    tokens: Tensor
    predicted: Tensor


@dataclass(frozen=True)
class Objective:
    """Computes the loss of `spec` on text under gates and memories.

    Args:
        model: The decomposition.
        spec: Options of the loss.
        recompute: Whether activations are recomputed in the backward.
    """

    model: Decomposition
    spec: LossSpec
    recompute: bool = False

    def __call__(self, batch: Batch, gates: Tensor | None, memories: Sequence[str | None], groups: Tensor) -> TextLoss:
        """The mean over groups of rows (domains, in training) of the mean over their predicted tokens.

        Gates and memories stay in force after the forward: with activation checkpointing the backward computes layers
        again and needs them.

        Args:
            batch: Rows.
            gates: Gate values [R, U], None for all open.
            memories: Memory of each row, None for none.
            groups: Index of each row's group, [B] in 0..len(domains).
        """
        labels, predicted = self.model.targets(batch)  # [N], bool [B, T-1]
        teacher = self.teacher(batch, predicted)
        student = self.student(batch, predicted, gates, memories)  # [N, d]
        return self.compare(student, teacher, labels, predicted, groups)

    def teacher(self, batch: Batch, predicted: Tensor) -> Tensor | TopK | None:
        """The dense model at the predicted places: hidden states [N, d], or the stored top k; None without KL."""
        if not self.spec.kl:
            return None
        if self.spec.teacher == "live":
            return self.at(self.model.dense_hidden(batch)[:, :-1], predicted)
        return TopK(self.at(batch[INDEX], predicted).long(), self.at(batch[LOG_Q], predicted).float())

    def student(self, batch: Batch, predicted: Tensor, gates: Tensor | None, memories: Sequence[str | None]) -> Tensor:
        """Hidden states [N, d] at the predicted places under gates and memories."""
        self.model.gates.set(gates)
        self.model.memories.activate(memories)
        with recomputed(self.model.backbone, self.recompute):
            return self.at(self.model.hidden(batch)[:, :-1], predicted)

    def compare(
        self, student: Tensor, teacher: Tensor | TopK | None, labels: Tensor, predicted: Tensor, groups: Tensor
    ) -> TextLoss:
        """The loss, from the student's hidden states [N, d], those of the teacher (or its top k), and labels [N]."""
        weights = self.weights(predicted, groups)
        loss, ce, kl = self.head_loss(student, teacher, labels, weights)
        # Not as matrix products, which autocast would round.
        parts = torch.stack([loss.detach(), (weights * ce).sum(), (weights * kl).sum()])
        all_loss, all_ce, all_kl = ranks.total(parts) / ranks.count()
        return TextLoss(loss + (all_loss - loss.detach()), all_ce, all_kl, ce + kl, predicted)

    def head_loss(
        self, student: Tensor, teacher: Tensor | TopK | None, labels: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted sum over tokens, and CE and KL of each: see `losses.head_loss`."""
        return head_loss(student, teacher, self.model.head, labels, weights, self.spec)

    def weights(self, predicted: Tensor, groups: Tensor) -> Tensor:
        """Weight of each predicted token, [N]."""
        return domain_weights(self.at(groups[:, None].expand_as(predicted), predicted), len(self.model.domains) + 1)

    @staticmethod
    def at(values: Tensor, predicted: Tensor) -> Tensor:
        """The values [B, T-1, ...] at the predicted places, [N, ...]."""
        return values[predicted]


def take_stored_teacher(spec: LossSpec, data: Any, backbone_hash: str) -> None:
    """Let training batches bring the stored teacher, if `spec` asks for it.

    Args:
        spec: Options of the loss.
        data: The datamodule.
        backbone_hash: Hash of the dense model's weights.

    Raises:
        KoffError: There is no fitting one, or the datamodule has no stored teachers.
    """
    if spec.teacher != "stored":
        return
    if not hasattr(data, "take_stored_teacher"):
        raise KoffError(
            "loss.teacher: stored comes with the rows of DomainDataModule: train with that, or set it to live"
        )
    data.take_stored_teacher(backbone_hash, spec.top_k)
