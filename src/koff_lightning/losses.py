"""Next-token cross-entropy and KL to the dense self, straight from hidden states, in token chunks.

The language-model head is frozen, so the gradient of the loss with respect to the hidden states is known as soon as a
chunk's logits are: softmax minus target. It is computed chunk by chunk in the forward and only scaled in the backward;
no logit tensor of the whole batch ever exists and nothing is recomputed.

Shapes: N predicted tokens, d hidden, V vocabulary, C tokens per chunk.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from koff_lightning.specs.training import LossSpec
from koff_lightning.support import ranks
from koff_lightning.support.errors import KoffError

SPARSE = 8  # a chunk is this much shorter where each token takes k rows of the head
ON_CPU = 7 * 2**20  # logits at one time there, 28 MiB: what caches hold, and malloc keeps instead of mapping anew
READ = 6  # with fewer tokens at a time than a head's width / 6, reading the head takes longer than caches save


@dataclass(frozen=True)
class TopK:
    """What the dense model says of the tokens that it finds likeliest.

    Attributes:
        index: The k tokens, long [N, k].
        log_q: Their log-probabilities among all tokens, fp32 [N, k].
    """

    index: Tensor
    log_q: Tensor

    def __getitem__(self, part: slice) -> "TopK":
        return TopK(self.index[part], self.log_q[part])


def at_once(head: Tensor, chunk: int) -> int:
    """Tokens whose logits are to exist at one time, by the head [V, d]; `chunk` is the most."""
    return max(1, min(chunk, max(ON_CPU // len(head), head.shape[1] // READ))) if head.device.type == "cpu" else chunk


def check_top_k(k: int | None, vocabulary: int) -> None:
    """Raise KoffError where `loss.top_k` is more than a vocabulary of so many tokens has."""
    if k is not None and k > vocabulary:
        raise KoffError(f"loss.top_k is {k}, but the vocabulary has {vocabulary} tokens: give at most that, or null")


def top_k_of(hidden: Tensor, head: Tensor, k: int) -> TopK:
    """The dense model's k likeliest next tokens, from its hidden states [n, d] and the head [V, d].

    Raises:
        KoffError: k is larger than the vocabulary.
    """
    check_top_k(k, len(head))
    logits = (hidden @ head.T).float()  # [n, V]
    values, index = logits.topk(k)
    return TopK(index, values - logits.logsumexp(-1, keepdim=True))


def _among(student: Tensor, seen: TopK, head: Tensor) -> tuple[Tensor, Tensor]:
    """KL over the teacher's k tokens alone, from their rows of the head: no other logit is made.

    Args:
        student: Hidden states [C, d].
        seen: The teacher's k likeliest tokens at each place.
        head: [V, d].

    Returns:
        KL [C], and the gradient of its sum by `student`, [C, d].
    """
    rows = head[seen.index]  # [C, k, d]
    log_p = (rows @ student.unsqueeze(-1)).squeeze(-1).float().log_softmax(-1)  # [C, k]
    log_q = seen.log_q.log_softmax(-1)  # over the k alone
    p, q = log_p.exp(), log_q.exp()
    slope = (p - q).to(head.dtype)  # [C, k]
    return (q * (log_q - log_p)).sum(-1), (slope.unsqueeze(1) @ rows).squeeze(1)


def _among_all(log_p: Tensor, p: Tensor, seen: TopK, spec: LossSpec) -> tuple[Tensor, Tensor | float, Tensor]:
    """KL over the teacher's k tokens where the logits of all are there; the k are set to 0 in `p`.

    Args:
        log_p: The student's log-probabilities of the k, [C, k].
        p: Its probabilities of all, [C, V].
        seen: The teacher's likeliest tokens.
        spec: Loss weights, and what becomes of the other tokens.

    Returns:
        KL [C], and d/d logits of ce * CE + kl * KL but for CE's own token: that of the others as a factor of `p`
        ([C, 1] or a number), that of the k [C, k].
    """
    p.scatter_(1, seen.index, 0.0)
    if spec.tail == "drop":
        among, log_q = log_p.log_softmax(-1), seen.log_q.log_softmax(-1)
        q = log_q.exp()
        return (q * (log_q - among)).sum(-1), spec.ce, spec.ce * log_p.exp() + spec.kl * (among.exp() - q)
    q = seen.log_q.exp()  # [C, k]
    q_rest = (1 - q.sum(-1, keepdim=True)).clamp(min=0)  # [C, 1]
    p_rest = p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)  # summed: 1 minus the k would cancel
    kl = (q * (seen.log_q - log_p)).sum(-1) + torch.xlogy(q_rest, q_rest / p_rest).squeeze(1)
    # d/d logits of -sum q log p - q_rest log p_rest: p - q for the k, p (1 - q_rest / p_rest) for the others.
    share = spec.ce + spec.kl
    return kl, share - spec.kl * (q_rest / p_rest), share * log_p.exp() - spec.kl * q


def _of_chunk(
    student: Tensor, seen: Tensor | TopK | None, head: Tensor, labels: Tensor, spec: LossSpec
) -> tuple[Tensor, Tensor | float, Tensor]:
    """Loss and gradient of a chunk of tokens. What is as large as its logits is gone before the next chunk begins.

    Args:
        student: Hidden states [C, d].
        seen: Those of the dense model, or its likeliest tokens.
        head: [V, d].
        labels: Next tokens, [C].
        spec: Loss weights.

    Returns:
        CE [C], KL [C] or 0, and the gradient of the sum of ce * CE + kl * KL by `student`, [C, d].
    """
    target, kl = labels.unsqueeze(1), 0.0
    log_p = (student @ head.T).float().log_softmax(-1)  # [C, V]
    ce = -log_p.gather(1, target).squeeze(1)
    # Below, what is as large as the logits is made in their place: each pass over them costs as a product does.
    if isinstance(seen, Tensor):
        log_q = (seen @ head.T).float().log_softmax(-1)  # [C, V]
        q = log_q.exp()
        kl = (log_q.sub_(log_p).mul_(q)).sum(-1)
        slope = log_p.exp_().mul_(spec.ce + spec.kl)  # d/d logits of ce * CE + kl * KL, [C, V]
        slope.sub_(q, alpha=spec.kl)
    elif seen is not None:
        log_among = log_p.gather(1, seen.index)  # [C, k]
        kl, others, among = _among_all(log_among, p := log_p.exp_(), seen, spec)
        slope = p.mul_(others).scatter_(1, seen.index, among)
    else:
        slope = log_p.exp_().mul_(spec.ce)
    slope.scatter_add_(1, target, slope.new_full(target.shape, -spec.ce))
    return ce, kl, slope.to(head.dtype) @ head


class _FusedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, head, labels, weights, spec, step):  # noqa: ANN001, ANN205
        ce, kl = (student.new_zeros(len(labels), dtype=torch.float32) for _ in range(2))
        grad = torch.empty_like(student)
        alone = teacher is not None and spec.top_k_alone
        step = max(1, spec.chunk // SPARSE) if alone else step
        for start in range(0, len(labels), step):
            part = slice(start, start + step)
            seen = None if teacher is None else teacher[part]
            if isinstance(seen, Tensor) and spec.top_k is not None:
                seen = top_k_of(seen, head, spec.top_k)
            if alone:
                kl[part], slope = _among(student[part], seen, head)
                grad[part] = spec.kl * slope
                continue
            ce[part], kl[part], grad[part] = _of_chunk(student[part], seen, head, labels[part], spec)
        ctx.save_for_backward(grad, weights)
        ctx.mark_non_differentiable(ce, kl)
        return (weights * (spec.ce * ce + spec.kl * kl)).sum(), ce, kl

    @staticmethod
    def backward(ctx, scale, *_):  # noqa: ANN001, ANN002, ANN205
        grad, weights = ctx.saved_tensors  # the weights come last: times one of 1e-4 half precision loses a slope
        return (grad * (weights * scale).unsqueeze(1)).to(grad.dtype), *(None,) * 6


def fused_head_loss(
    student: Tensor,
    teacher: Tensor | TopK | None,
    head: Tensor,
    labels: Tensor,
    weights: Tensor,
    spec: LossSpec,
    step: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum over tokens of ce * CE + kl * KL(dense || student), with both per token.

    Args:
        student: Hidden states of the gated model at predicting positions, [N, d].
        teacher: Those of the dense model, [N, d], or its likeliest tokens as they were stored; None leaves KL out.
        head: Frozen output embedding, [V, d].
        labels: Next tokens, [N].
        weights: Weight of each token, [N] fp32.
        spec: Loss weights and chunk size.
        step: Tokens whose logits exist at one time; by default as many as suit the device.

    Returns:
        Scalar loss in nats (differentiable in `student`), cross-entropy [N] (zeros where `spec.top_k_alone`)
        and KL [N] (for logging).
    """
    step = at_once(head, spec.chunk) if step is None else step
    return _FusedHeadLoss.apply(student, teacher, head, labels, weights, spec, step)


def has_products(half: str) -> bool:
    """Whether oneDNN multiplies matrices of `bf16` or `fp16` on this processor; torch may be built without it."""
    onednn = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and getattr(onednn, f"_is_mkldnn_{half}_supported")()


def half_is_slow(device: torch.device) -> bool:
    """Whether torch has only its plainest code for products of bf16 matrices: on CPUs for which oneDNN has none.

    There one product with a head of 49 thousand words takes a hundred times as long as in fp32.
    """
    return device.type == "cpu" and not has_products("bf16")


def is_slow(head: Tensor) -> bool:
    """The same of products with this head, in what they would be made in here: processors with bf16 may lack fp16."""
    made_in = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else head.dtype
    in_fp16 = head.device.type == "cpu" and made_in == torch.float16
    return half_is_slow(head.device) or (in_fp16 and not has_products("fp16"))


def head_loss(
    student: Tensor, teacher: Tensor | TopK | None, head: Tensor, labels: Tensor, weights: Tensor, spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fused_head_loss`, in fp32 where half precision is slow, whatever the dtypes are and autocast says."""
    if not is_slow(head):
        return fused_head_loss(student, teacher, head, labels, weights, spec)
    with torch.autocast("cpu", enabled=False):
        teacher = teacher.float() if isinstance(teacher, Tensor) else teacher
        return fused_head_loss(student.float(), teacher, head.float(), labels, weights, spec)


def domain_weights(domain_of_token: Tensor, domains: int) -> Tensor:
    """Token weights [N] under which a weighted sum is the mean over present domains of the mean over their tokens.

    Tokens are counted over all ranks. Each rank's sum is its part of that mean times the number of ranks, so that the
    mean of the ranks' sums is what one process would have for the rows of all, whichever rank holds them.

    Args:
        domain_of_token: Domain index of each predicted token, [N] in 0..domains-1.
        domains: Number of domains.
    """
    ones = torch.ones_like(domain_of_token)
    tokens = ranks.total(ones.new_zeros(domains).scatter_add_(0, domain_of_token, ones))  # [D]; bincount would wait
    return ranks.count() / (tokens[domain_of_token] * (tokens > 0).sum())


class _Settled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, slopes, *inputs):  # noqa: ANN001, ANN002, ANN205
        ctx.slopes = slopes
        return loss.clone()

    @staticmethod
    def backward(ctx, scale):  # noqa: ANN001, ANN205
        return None, None, *(None if slope is None else slope * scale for slope in ctx.slopes)


def settled(loss: Tensor, inputs: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """The same loss whose gradient by `inputs`, and by nothing else, is taken already: its graph is gone.

    So two forwards can be part of one step whose backward would read again what is in force: gates and memories.

    Args:
        loss: A scalar.
        inputs: What it depends on and what it is to move.
        scale: By which the gradient is raised while it is computed: the loss scale of 16-bit training.
    """
    slopes = torch.autograd.grad(loss * scale, inputs, allow_unused=True)
    return _Settled.apply(loss.detach(), [None if slope is None else slope / scale for slope in slopes], *inputs)


@torch.no_grad()
def head_nats(hidden: Tensor, head: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """Negative log-likelihood of `labels` [N] given hidden states [N, d], in nats, [N] fp32; for evaluation."""
    slow, step = is_slow(head), at_once(head, chunk)
    hidden, head = (hidden.float(), head.float()) if slow else (hidden, head)
    with torch.autocast("cpu", enabled=False) if slow else nullcontext():
        parts = [
            torch.nn.functional.cross_entropy((h @ head.T).float(), y, reduction="none")
            for h, y in zip(hidden.split(step), labels.split(step), strict=True)
        ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)
