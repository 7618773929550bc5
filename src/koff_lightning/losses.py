"""Next-token cross-entropy and KL to the dense self, straight from hidden states, in token chunks.

The language-model head is frozen, so a chunk's logits give not only the loss but also its gradient with respect to the
hidden states: (softmax minus target) times the head. The forward computes both chunk by chunk and the backward only
scales the stored gradient. The logits of a whole batch never exist at one time, and none are computed twice.

Shapes: N predicted tokens, d hidden, V vocabulary, C tokens per chunk.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from koff_lightning.specs.training import LossSpec
from koff_lightning.support import ranks
from koff_lightning.support.errors import KoffError

# Chunks are this many times shorter with `top_k_alone`, where each token gathers k rows of the head.
GATHERING = 8
# Logits that exist at one time on a CPU (28 MiB): they fit into its caches, and malloc reuses memory of this size
# instead of mapping it anew.
CPU_LOGITS = 7 * 2**20
# On a CPU a chunk has at least d / 6 tokens: each chunk reads the whole head, which for fewer tokens takes longer than
# the caches save.
WIDTH_PER_TOKEN = 6


@dataclass(frozen=True)
class TopK:
    """The dense model's k likeliest next tokens at each place.

    Attributes:
        index: Token ids, long [N, k].
        log_q: Their log-probabilities, normalised over the whole vocabulary, fp32 [N, k].
    """

    index: Tensor
    log_q: Tensor

    def __getitem__(self, part: slice) -> "TopK":
        return TopK(self.index[part], self.log_q[part])


def chunk_size(head: Tensor, most: int) -> int:
    """Tokens C whose logits exist at one time, given the head [V, d]: `most`, or fewer on a CPU."""
    if head.device.type != "cpu":
        return most
    return max(1, min(most, max(CPU_LOGITS // len(head), head.shape[1] // WIDTH_PER_TOKEN)))


def check_top_k(k: int | None, vocabulary: int) -> None:
    """Raise KoffError if `loss.top_k` is larger than the vocabulary."""
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


def _kl_of_top_k_alone(student: Tensor, teacher: TopK, head: Tensor) -> tuple[Tensor, Tensor]:
    """KL where both models are renormalised over the teacher's k tokens, and no other logits are computed at all.

    Args:
        student: Hidden states [C, d].
        teacher: Its top k at each of the C places.
        head: [V, d].

    Returns:
        KL [C], and the gradient of its sum with respect to `student`, [C, d].
    """
    rows = head[teacher.index]  # [C, k, d]
    log_p = (rows @ student.unsqueeze(-1)).squeeze(-1).float().log_softmax(-1)  # [C, k]
    log_q = teacher.log_q.log_softmax(-1)  # [C, k]
    p, q = log_p.exp(), log_q.exp()
    by_logits = (p - q).to(head.dtype)  # [C, k]
    return (q * (log_q - log_p)).sum(-1), (by_logits.unsqueeze(1) @ rows).squeeze(1)


def _kl_of_top_k(log_p: Tensor, p: Tensor, teacher: TopK, spec: LossSpec) -> tuple[Tensor, Tensor | float, Tensor]:
    """KL over the teacher's k tokens, where CE needs the student's logits of all tokens anyway.

    `spec.tail` says what becomes of the other V - k tokens: `drop` renormalises over the k, else they count as one
    further token that holds the rest of the probability.

    Args:
        log_p: The student's log-probabilities of the k tokens, [C, k].
        p: Its probabilities of all tokens, [C, V]; the k are set to 0 in place.
        teacher: Its top k at each of the C places.
        spec: Weights of CE and KL, and `tail`.

    Returns:
        KL [C]; and the gradient of ce * CE + kl * KL by the logits, to which -ce at the label is still to be added: for
        the other tokens as a factor of `p` ([C, 1] or a number), for the k tokens [C, k].
    """
    p.scatter_(1, teacher.index, 0.0)
    if spec.tail == "drop":
        log_p_k, log_q = log_p.log_softmax(-1), teacher.log_q.log_softmax(-1)
        q = log_q.exp()
        return (q * (log_q - log_p_k)).sum(-1), spec.ce, spec.ce * log_p.exp() + spec.kl * (log_p_k.exp() - q)
    q = teacher.log_q.exp()  # [C, k]
    q_rest = (1 - q.sum(-1, keepdim=True)).clamp(min=0)  # [C, 1]
    p_rest = p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)  # 1 minus the sum of the k would cancel
    kl = (q * (teacher.log_q - log_p)).sum(-1) + torch.xlogy(q_rest, q_rest / p_rest).squeeze(1)
    # Gradient of -sum q log p - q_rest log p_rest by the logits: p - q for the k, p (1 - q_rest / p_rest) for others.
    share = spec.ce + spec.kl
    return kl, share - spec.kl * (q_rest / p_rest), share * log_p.exp() - spec.kl * q


def _chunk_loss(
    student: Tensor, teacher: Tensor | TopK | None, head: Tensor, labels: Tensor, spec: LossSpec
) -> tuple[Tensor | float, Tensor | float, Tensor]:
    """CE and KL of each token of a chunk, [C] or 0.0, and the gradient of the sum of ce * CE + kl * KL, [C, d].

    What is as large as the logits is computed in their place: each pass over them costs as much as a matrix product.
    A function of its own, so that nothing of their size is alive when the next chunk's are made.

    Args:
        student: Hidden states [C, d].
        teacher: Those of the dense model, or its top k; None leaves KL out.
        head: [V, d].
        labels: [C].
        spec: Weights of CE and KL.
    """
    if isinstance(teacher, Tensor) and spec.top_k is not None:
        teacher = top_k_of(teacher, head, spec.top_k)
    if isinstance(teacher, TopK) and spec.top_k_alone:
        kl, grad = _kl_of_top_k_alone(student, teacher, head)
        return 0.0, kl, spec.kl * grad
    target, kl = labels.unsqueeze(1), 0.0
    log_p = (student @ head.T).float().log_softmax(-1)  # [C, V]
    ce = -log_p.gather(1, target).squeeze(1)
    if isinstance(teacher, Tensor):
        log_q = (teacher @ head.T).float().log_softmax(-1)  # [C, V]
        q = log_q.exp()
        kl = (log_q.sub_(log_p).mul_(q)).sum(-1)
        by_logits = log_p.exp_().mul_(spec.ce + spec.kl)  # [C, V], here and below without CE's own token
        by_logits.sub_(q, alpha=spec.kl)
    elif teacher is not None:
        log_p_top = log_p.gather(1, teacher.index)  # [C, k]
        kl, others, top = _kl_of_top_k(log_p_top, p := log_p.exp_(), teacher, spec)
        by_logits = p.mul_(others).scatter_(1, teacher.index, top)
    else:
        by_logits = log_p.exp_().mul_(spec.ce)
    by_logits.scatter_add_(1, target, by_logits.new_full(target.shape, -spec.ce))
    return ce, kl, by_logits.to(head.dtype) @ head


class _FusedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, head, labels, weights, spec, step):  # noqa: ANN001, ANN205
        ce, kl = (student.new_zeros(len(labels), dtype=torch.float32) for _ in range(2))
        grad = torch.empty_like(student)
        gathers = teacher is not None and spec.top_k_alone
        step = max(1, spec.chunk // GATHERING) if gathers else step
        for start in range(0, len(labels), step):
            part = slice(start, start + step)
            seen = None if teacher is None else teacher[part]
            ce[part], kl[part], grad[part] = _chunk_loss(student[part], seen, head, labels[part], spec)
        ctx.save_for_backward(grad, weights)
        ctx.mark_non_differentiable(ce, kl)
        return (weights * (spec.ce * ce + spec.kl * kl)).sum(), ce, kl

    @staticmethod
    def backward(ctx, scale, *_):  # noqa: ANN001, ANN002, ANN205
        grad, weights = ctx.saved_tensors
        # The weights come last: a gradient in half precision times a weight of 1e-4 would round to zero.
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
    step = chunk_size(head, spec.chunk) if step is None else step
    return _FusedHeadLoss.apply(student, teacher, head, labels, weights, spec, step)


def has_products(half: str) -> bool:
    """Whether oneDNN multiplies matrices of `bf16` or `fp16` on this processor; torch may be built without it."""
    onednn = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and getattr(onednn, f"_is_mkldnn_{half}_supported")()


def half_is_slow(device: torch.device) -> bool:
    """Whether bf16 matrix products fall back to torch's slowest code: on CPUs for which oneDNN has no kernel.

    There a product with a head of 49 thousand tokens takes a hundred times as long as in fp32.
    """
    return device.type == "cpu" and not has_products("bf16")


def is_slow(head: Tensor) -> bool:
    """Whether products with this head are slow in its dtype, or in autocast's: a CPU with bf16 may lack fp16."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else head.dtype
    in_fp16 = head.device.type == "cpu" and dtype == torch.float16
    return half_is_slow(head.device) or (in_fp16 and not has_products("fp16"))


def head_loss(
    student: Tensor, teacher: Tensor | TopK | None, head: Tensor, labels: Tensor, weights: Tensor, spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fused_head_loss`, but computed in fp32 where half precision is slow, whatever dtypes and autocast say."""
    if not is_slow(head):
        return fused_head_loss(student, teacher, head, labels, weights, spec)
    with torch.autocast("cpu", enabled=False):
        teacher = teacher.float() if isinstance(teacher, Tensor) else teacher
        return fused_head_loss(student.float(), teacher, head.float(), labels, weights, spec)


def domain_weights(domain_of_token: Tensor, domains: int) -> Tensor:
    """Token weights [N] with which a sum over tokens becomes the mean over domains of the mean over a domain's tokens.

    Tokens are counted over all ranks, and weights are multiplied by the number of ranks: the mean of the ranks' sums,
    which is what DDP takes, is then what one process would have for the rows of all ranks.

    Args:
        domain_of_token: Domain index of each predicted token, [N] in 0..domains-1.
        domains: Number of domains.
    """
    ones = torch.ones_like(domain_of_token)
    tokens = ranks.total(ones.new_zeros(domains).scatter_add_(0, domain_of_token, ones))  # [D]; bincount would sync
    return ranks.count() / (tokens[domain_of_token] * (tokens > 0).sum())


@torch.no_grad()
def head_nats(hidden: Tensor, head: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """Negative log-likelihood of `labels` [N] given hidden states [N, d], in nats, [N] fp32; for evaluation."""
    slow, step = is_slow(head), chunk_size(head, chunk)
    hidden, head = (hidden.float(), head.float()) if slow else (hidden, head)
    with torch.autocast("cpu", enabled=False) if slow else nullcontext():
        parts = [
            torch.nn.functional.cross_entropy((h @ head.T).float(), y, reduction="none")
            for h, y in zip(hidden.split(step), labels.split(step), strict=True)
        ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)
