"""Next-token cross-entropy and KL to the dense self, straight from hidden states, in token chunks.

The language-model head is frozen, so the gradient of the loss with respect to the hidden states is known as soon as a
chunk's logits are: softmax minus target. It is computed chunk by chunk in the forward and only scaled in the backward;
no logit tensor of the whole batch ever exists and nothing is recomputed.

Shapes: N predicted tokens, d hidden, V vocabulary, C tokens per chunk.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from koff_lightning.support import ranks
from koff_lightning.support.errors import KoffError


@dataclass
class LossSpec:
    """Weights of the objective L = ce * CE + kl * KL(dense || student).

    Args:
        ce: Weight of next-token cross-entropy on the text.
        kl: Weight of the divergence from the dense model; 0 saves the teacher's forward pass.
        chunk: Tokens whose logits exist at one time.
    """

    ce: float = 1.0
    kl: float = 2.0  # CE + 2 KL as in DDP (arXiv 2603.08065)
    chunk: int = 1024

    def __post_init__(self) -> None:
        if not (self.ce >= 0 and self.kl >= 0 and 0 < self.ce + self.kl < math.inf):
            raise KoffError(f"loss.ce and loss.kl must be >= 0, finite and not both 0; got {self.ce} and {self.kl}")
        if self.chunk < 1:
            raise KoffError(f"loss.chunk must be at least 1 token; got {self.chunk}")


class _FusedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, head, labels, weights, spec):  # noqa: ANN001, ANN205
        ce, kl = (
            student.new_zeros(len(labels), dtype=torch.float32),
            student.new_zeros(len(labels), dtype=torch.float32),
        )
        grad = torch.empty_like(student)
        for start in range(0, len(labels), spec.chunk):
            part = slice(start, start + spec.chunk)
            target = labels[part].unsqueeze(1)
            log_p = (student[part] @ head.T).float().log_softmax(-1)  # [C, V]
            ce[part] = -log_p.gather(1, target).squeeze(1)
            p = log_p.exp()
            slope = (spec.ce + (spec.kl if teacher is not None else 0)) * p  # d/d logits of ce + kl, [C, V]
            if teacher is not None:
                log_q = (teacher[part] @ head.T).float().log_softmax(-1)  # [C, V]
                q = log_q.exp()
                kl[part] = (q * log_q.sub_(log_p)).sum(-1)
                slope.sub_(q, alpha=spec.kl)
            slope.scatter_add_(1, target, torch.full_like(target, -spec.ce, dtype=slope.dtype))
            grad[part] = (slope * weights[part].unsqueeze(1)).to(head.dtype) @ head
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(ce, kl)
        return (weights * (spec.ce * ce + spec.kl * kl)).sum(), ce, kl

    @staticmethod
    def backward(ctx, scale, *_):  # noqa: ANN001, ANN002, ANN205
        return ctx.saved_tensors[0] * scale.to(ctx.saved_tensors[0].dtype), None, None, None, None, None


def fused_head_loss(
    student: Tensor, teacher: Tensor | None, head: Tensor, labels: Tensor, weights: Tensor, spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum over tokens of ce * CE + kl * KL(dense || student), with both per token.

    Args:
        student: Hidden states of the gated model at predicting positions, [N, d].
        teacher: Those of the dense model, [N, d]; None leaves KL out.
        head: Frozen output embedding, [V, d].
        labels: Next tokens, [N].
        weights: Weight of each token, [N] fp32.
        spec: Loss weights and chunk size.

    Returns:
        Scalar loss in nats (differentiable in `student`), cross-entropy [N] and KL [N] (for logging).
    """
    return _FusedHeadLoss.apply(student, teacher, head, labels, weights, spec)


def domain_weights(domain_of_token: Tensor, domains: int) -> Tensor:
    """Token weights [N] under which a weighted sum is the mean over present domains of the mean over their tokens.

    Tokens are counted over all ranks. Each rank's sum is its part of that mean times the number of ranks, so that the
    mean of the ranks' sums is what one process would have for the rows of all, whichever rank holds them.

    Args:
        domain_of_token: Domain index of each predicted token, [N] in 0..domains-1.
        domains: How many indices there are.
    """
    tokens = ranks.total(torch.bincount(domain_of_token, minlength=domains))  # [D]
    return ranks.count() / (tokens[domain_of_token] * (tokens > 0).sum())


@torch.no_grad()
def head_nats(hidden: Tensor, head: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """Negative log-likelihood of `labels` [N] given hidden states [N, d], in nats, [N] fp32; for evaluation."""
    parts = [
        torch.nn.functional.cross_entropy((h @ head.T).float(), y, reduction="none")
        for h, y in zip(hidden.split(chunk), labels.split(chunk), strict=True)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)
