"""The fused loss against the plain one, chunk by chunk, and the weights by which domains count alike."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from koff_lightning import KoffError, LossSpec
from koff_lightning.losses import CPU_LOGITS, chunk_size, domain_weights, fused_head_loss, head_nats, top_k_of
from koff_lightning.support import ranks
from koff_lightning.training.objective import Objective

N, D, V = 23, 8, 31


def inputs(seed=0, dtype=torch.float64, n=N):
    random = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(n, D, generator=random, dtype=torch.float64).to(dtype) for _ in range(2))
    head = torch.randn(V, D, generator=random, dtype=torch.float64).to(dtype)
    labels = torch.randint(V, (n,), generator=random)
    return student.requires_grad_(), teacher, head, labels, torch.rand(n, generator=random)


def naive(student, teacher, head, labels, weights, spec):
    """The equation, with all logits at once."""
    logits = student @ head.T
    ce = F.cross_entropy(logits, labels, reduction="none")
    kl = torch.zeros_like(ce)
    if teacher is not None:
        log_p, log_q = logits.log_softmax(-1), (teacher @ head.T).log_softmax(-1)
        kl = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    return (weights * (spec.ce * ce + spec.kl * kl)).sum(), ce, kl


@pytest.mark.parametrize("with_teacher", [True, False])
@pytest.mark.parametrize("chunk", [1, 5, N - 1, N, 1000])
@pytest.mark.parametrize(("ce", "kl"), [(1.0, 2.0), (1.0, 0.0), (0.0, 1.0), (0.3, 0.7)])
def test_value_and_gradient_are_those_of_the_plain_loss(ce, kl, chunk, with_teacher):
    student, teacher, head, labels, weights = inputs()
    teacher, spec = teacher if with_teacher else None, LossSpec(ce, kl, chunk)
    for got, want in zip(
        fused_head_loss(student, teacher, head, labels, weights, spec),
        naive(student, teacher, head, labels, weights, spec),
        strict=True,
    ):
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    (slope,) = torch.autograd.grad(3 * fused_head_loss(student, teacher, head, labels, weights, spec)[0], student)
    (want,) = torch.autograd.grad(3 * naive(student, teacher, head, labels, weights, spec)[0], student)
    torch.testing.assert_close(slope, want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize(("ce", "kl"), [(1.0, 2.0), (0.0, 1.0)])
def test_half_precision_keeps_slopes_under_small_weights_and_a_large_loss_scale(ce, kl, top_k):
    """As 16-mixed has them: a token's weight is one of 65,536 then, and the loss is scaled up by as much or more."""
    student, _, head, labels, _ = inputs(dtype=torch.float16)
    teacher = student.detach() + 0.03 * inputs(1, torch.float16)[1]  # near: slopes of a hundredth
    weights, spec, scale = torch.full((N,), 2.0**-16), LossSpec(ce, kl, 5, top_k=top_k), 2.0**17
    wide = [student.detach().float().requires_grad_(), teacher.float(), head.float(), labels, weights]
    (slope,) = torch.autograd.grad(scale * fused_head_loss(student, teacher, head, labels, weights, spec)[0], student)
    (want,) = torch.autograd.grad(scale * fused_head_loss(*wide, spec)[0], wide[0])
    gap = (slope.float() - want).norm() / want.norm()
    assert want.abs().max() > 1e-3
    assert gap < 0.02


def among(student, teacher, head, labels, weights, spec):
    """The equation with the teacher's k likeliest tokens, by autograd, with all logits at once."""
    logits, log_q = student @ head.T, (teacher @ head.T).log_softmax(-1)
    log_q, index = log_q.topk(spec.top_k)
    log_p = logits.log_softmax(-1)
    ce, log_p = -log_p.gather(1, labels[:, None]).squeeze(1), log_p.gather(1, index)
    if spec.tail == "drop":
        log_q, log_p = log_q.log_softmax(-1), log_p.log_softmax(-1)
    else:
        log_q, log_p = (torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).log()], -1) for x in (log_q, log_p))
    kl = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    return (weights * (spec.ce * ce + spec.kl * kl)).sum(), ce, kl


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("tail", ["drop", "bucket"])
@pytest.mark.parametrize(("ce", "chunk"), [(0.0, 8), (0.0, 1000), (0.5, 5)])
def test_the_likeliest_tokens_alone_value_and_gradient(ce, chunk, tail, stored):
    student, teacher, head, labels, weights = inputs()
    spec = LossSpec(ce, 0.7, top_k=6, tail=tail, chunk=chunk)
    said = top_k_of(teacher, head, 6) if stored else teacher
    got, want = (
        fused_head_loss(student, said, head, labels, weights, spec),
        among(student, teacher, head, labels, weights, spec),
    )
    torch.testing.assert_close(got[0].double(), want[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[2].double(), want[2], atol=1e-5, rtol=1e-5)
    if spec.top_k_alone:
        assert not got[1].any(), "cross-entropy is not looked at"
    else:
        torch.testing.assert_close(got[1].double(), want[1], atol=1e-5, rtol=1e-5)
    slopes = [torch.autograd.grad(3 * loss[0], student)[0] for loss in (got, want)]
    torch.testing.assert_close(*slopes, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("tail", ["drop", "bucket"])
def test_all_tokens_are_the_likeliest_of_a_vocabulary(tail):
    """With k = V nothing is left out, so that the divergence is the whole one."""
    student, teacher, head, labels, weights = inputs()
    whole = fused_head_loss(student, teacher, head, labels, weights, LossSpec(0.0, 1.0))
    found = fused_head_loss(student, teacher, head, labels, weights, LossSpec(0.0, 1.0, top_k=V, tail=tail))
    torch.testing.assert_close(found[0], whole[0], atol=1e-5, rtol=1e-5)
    slopes = [torch.autograd.grad(loss[0], student)[0] for loss in (found, whole)]
    torch.testing.assert_close(*slopes, atol=2e-6, rtol=1e-5)


def test_a_bucket_sees_what_dropping_does_not():
    """A student that moves mass out of the k tokens, keeping their proportions, is punished by the bucket alone."""
    head, labels, weights = torch.eye(4), torch.zeros(1, dtype=torch.long), torch.ones(1)
    teacher, student = torch.tensor([[2.0, 1.0, -3.0, -3.0]]), torch.tensor([[2.0, 1.0, 4.0, -3.0]])
    kl = {
        tail: fused_head_loss(student, teacher, head, labels, weights, LossSpec(0, 1, top_k=2, tail=tail))[2].item()
        for tail in ("drop", "bucket")
    }
    assert kl["drop"] == pytest.approx(0, abs=1e-6)
    assert kl["bucket"] > 1


def test_gradient_agrees_with_finite_differences():
    student, teacher, head, labels, weights = inputs(n=3)
    spec = LossSpec(1.0, 2.0, 2)
    (slope,) = torch.autograd.grad(fused_head_loss(student, teacher, head, labels, weights, spec)[0], student)
    for place in [(0, 0), (1, 3), (2, D - 1)]:
        step = torch.zeros_like(student)
        step[place] = 1e-4
        ends = [naive(student + sign * step, teacher, head, labels, weights, spec)[0] for sign in (1, -1)]
        torch.testing.assert_close(slope[place], (ends[0] - ends[1]) / 2e-4, atol=1e-5, rtol=1e-4)


def test_the_chunk_does_not_matter():
    student, *rest = inputs(dtype=torch.float32)
    results = []
    for chunk in (1, 7, N):
        loss = fused_head_loss(student, *rest, LossSpec(chunk=chunk))
        results.append((*loss, *torch.autograd.grad(loss[0], student)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-6, rtol=1e-5)


def test_bf16_is_near_and_keeps_figures_in_fp32():
    student, teacher, head, labels, weights = inputs(dtype=torch.bfloat16)
    loss, ce, kl = fused_head_loss(student, teacher, head, labels, weights, LossSpec(chunk=4))
    loss.backward()
    assert (loss.dtype, ce.dtype, kl.dtype, student.grad.dtype) == (torch.float32,) * 3 + (torch.bfloat16,)
    exact, *others = [x.detach().double() for x in (student, teacher, head)]
    want = naive(exact.requires_grad_(), *others, labels, weights, LossSpec())
    want[0].backward()
    torch.testing.assert_close(loss.double(), want[0], rtol=0.02, atol=0.02)
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=0.05, atol=0.05)


def test_the_dense_model_has_no_divergence_from_itself_exactly():
    student, _, head, labels, weights = inputs(dtype=torch.float32)
    loss, _, kl = fused_head_loss(student, student.detach().clone(), head, labels, weights, LossSpec(ce=0.0, kl=1.0))
    assert not kl.any()
    assert not torch.autograd.grad(loss, student)[0].any()


def test_extreme_logits_stay_finite():
    student, teacher, head, labels, weights = inputs(dtype=torch.float32)
    loss, _, _ = fused_head_loss(student * 1e4, teacher * 1e4, head, labels, weights, LossSpec())
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_nothing_to_predict_is_a_loss_of_zero():
    student, teacher, head, labels, weights = inputs(n=0)
    loss, *_ = fused_head_loss(student, teacher, head, labels, weights, LossSpec())
    loss.backward()
    assert loss == 0


def test_weights_are_the_mean_of_means():
    """Two tokens of one domain count as much as three of another; an absent domain does not count."""
    domain = torch.tensor([0, 2, 0, 2, 2])
    values = torch.tensor([1.0, 5.0, 3.0, 6.0, 7.0])
    assert (domain_weights(domain, 4) * values).sum() == pytest.approx(((1 + 3) / 2 + (5 + 6 + 7) / 3) / 2)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_weights_sum_to_one_and_are_equal_per_domain(domains):
    domain = torch.tensor(domains)
    weights = domain_weights(domain, 5)
    assert weights.sum().item() == pytest.approx(1, abs=1e-5)
    shares = torch.zeros(5).index_add_(0, domain, weights)
    assert shares[shares > 0].tolist() == pytest.approx([1 / len(set(domains))] * len(set(domains)), abs=1e-5)


@pytest.mark.parametrize("chunk", [1, 6, N, 100])
def test_head_nats_is_cross_entropy(chunk):
    student, _, head, labels, _ = inputs(dtype=torch.float32)
    want = F.cross_entropy(student @ head.T, labels, reduction="none")
    torch.testing.assert_close(head_nats(student, head, labels, chunk), want, atol=1e-6, rtol=1e-6)
    nothing = head_nats(student[:0].bfloat16(), head.bfloat16(), labels[:0], chunk)
    assert (nothing.shape, nothing.dtype) == ((0,), torch.float32)


def test_more_tokens_than_the_vocabulary_has_are_refused():
    student, teacher, head, labels, weights = inputs()
    with pytest.raises(KoffError, match=f"loss.top_k is {V + 1}, but the vocabulary has {V} tokens"):
        fused_head_loss(student, teacher, head, labels, weights, LossSpec(0, 1, top_k=V + 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ce": -1.0}, "must be >= 0"),
        ({"kl": -0.1}, "must be >= 0"),
        ({"ce": 0.0, "kl": 0.0}, "not both 0"),
        ({"ce": float("nan")}, "loss.ce and loss.kl"),
        ({"kl": float("inf")}, "loss.ce and loss.kl"),
        ({"chunk": 0}, "at least 1 token; got 0"),
        ({"top_k": 1}, r"loss.top_k must be at least 2 \(100 in the paper\), or null for all; got 1"),
        ({"top_k": 5, "tail": "cut"}, "loss.tail must be drop or bucket; got 'cut'"),
    ],
)
def test_bad_weights_are_refused(options, message):
    with pytest.raises(KoffError, match=message):
        LossSpec(**options)


def test_on_a_cpu_the_logits_that_exist_at_one_time_are_few_bytes():
    heads = {vocabulary: torch.empty(1, 1).expand(vocabulary, 1) for vocabulary in (300, 49_152, 2 * CPU_LOGITS)}
    assert [chunk_size(head, 1024) for head in heads.values()] == [1024, CPU_LOGITS // 49_152, 1]
    assert chunk_size(heads[49_152], 5) == 5
    assert chunk_size(torch.empty(49_152, 1, device="meta"), 1024) == 1024, "elsewhere what was asked for"
    wide = torch.empty(1, 1).expand(CPU_LOGITS // 48, 1536)
    assert (chunk_size(wide, 1024), chunk_size(wide, 100)) == (256, 100), "a wide head is read for enough tokens"


def test_the_loss_that_is_told_is_that_of_all_ranks_and_its_gradient_that_of_this_one(monkeypatch):
    """Of two ranks; the other one has as many tokens and a loss that is larger by three."""
    student, teacher, head, labels, _ = inputs()
    model, spec = SimpleNamespace(head=head, domains=["de", "fr"]), LossSpec(ce=1.0, kl=2.0)
    predicted, groups = torch.ones(1, N, dtype=torch.bool), torch.zeros(1, dtype=torch.long)
    alone = Objective(model, spec).compare(student, teacher, labels, predicted, groups)
    (slope,) = torch.autograd.grad(alone.loss, student)
    _, ce, kl = naive(student.detach(), teacher, head, labels, torch.ones(N), spec)
    assert [alone.loss.item(), alone.ce.item()] == pytest.approx([(ce + 2 * kl).mean().item(), ce.mean().item()])
    torch.testing.assert_close(alone.tokens, ce + kl, check_dtype=False, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks, "total", lambda values: 2 * values + 3 * values.is_floating_point())
    both = Objective(model, spec).compare(student, teacher, labels, predicted, groups)
    (half,) = torch.autograd.grad(both.loss, student)
    torch.testing.assert_close(half, slope)
    for one, all_ in ((alone.loss, both.loss), (alone.ce, both.ce), (alone.kl, both.kl)):
        assert all_.item() == pytest.approx(one.item() + 1.5, rel=1e-5)
