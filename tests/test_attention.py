"""Attention with a memory: both ways against a definition in float64, and inside models against the plain model."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from torch import nn
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from koff_lightning import attention
from koff_lightning.attention import LayerMemory, attend_merged, attend_reference, koff_attention
from koff_lightning.backbone import allow_recomputation, cache_argument
from koff_lightning.support.errors import KoffError

B, H, K, D, P = 3, 4, 2, 8, 5


def tensors(length, total, rows=B, dtype=torch.float32, seed=0):
    """Query, key, value, memory key, memory value with heads and tokens swapped in storage, as models hand them."""
    torch.manual_seed(seed)
    tokens = [torch.randn(B, n, heads, D, dtype=dtype) for n, heads in ((length, H), (total, K), (total, K))]
    slots = [torch.randn(rows, K, P, D, dtype=dtype) for _ in range(2)]
    return [t.requires_grad_() for t in [*(t.transpose(1, 2) for t in tokens), *slots]]


def causal(length, total):
    return torch.ones(length, total, dtype=torch.bool).tril(total - length).expand(B, 1, -1, -1).clone()


def left_padded(length, total):
    mask = causal(length, total)
    for row in range(B):
        mask[row, :, :, : 2 * row] = False  # rows 1 and 2 have queries that see no token at all
    return mask


def packed(length, total):
    document = torch.arange(total) // 4
    return causal(length, total) & (document[-length:, None] == document)


def additive(length, total):
    return torch.zeros(B, 1, length, total).masked_fill(~left_padded(length, total), -torch.inf)


def late(length, total):
    """The first blocks of the flash kernel hold nothing for anyone."""
    mask = causal(length, total)
    mask[..., :600] = False
    return mask


CASES = {
    "causal": (11, 11, None),
    "decode": (1, 9, None),
    "decode padded": (1, 9, left_padded),
    "chunk": (4, 13, causal),
    "left padded": (11, 11, left_padded),
    "additive mask": (11, 11, additive),
    "packed": (12, 12, packed),
    "long": (520, 520, None),
    "long, late": (3, 1100, late),
}
VISIBLE = {
    "all": None,
    "ragged": torch.tensor([[False] * P, [True] * 2 + [False] * 3, [True] * P]),
    "none": torch.zeros(B, P, dtype=torch.bool),
}


def defined(query, key, value, memory_key, memory_value, visible, mask, scale=None):
    """softmax(scale q [M; k]^T) [v_M; v] in float64; what sees nothing gives 0."""
    rows, heads, length, size = query.shape
    keys, values = (
        torch.cat([m.double().expand(rows, -1, -1, -1), t.double()], 2).repeat_interleave(heads // t.shape[1], 1)
        for m, t in ((memory_key, key), (memory_value, value))
    )
    seen = torch.ones(rows, memory_key.shape[2], dtype=torch.bool) if visible is None else visible
    if mask is None:
        mask = causal(length, key.shape[2])
    if mask.dtype != torch.bool:
        mask = mask == 0
    full = torch.cat([seen.expand(rows, -1)[:, None, None, :].expand(-1, -1, length, -1), mask], -1)
    scores = query.double() @ keys.mT * (size**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~full, -1e300).softmax(-1) * full
    return weights @ values


def close(got, wanted, tolerance=1e-5):
    torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("visible", VISIBLE)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attend", [attend_reference, attend_merged])
def test_both_ways_and_all_their_gradients_are_the_definition(attend, case, visible, rows):
    length, total, make_mask = CASES[case]
    mask = None if make_mask is None else make_mask(length, total)
    seen = VISIBLE[visible]
    seen = seen[1:2] if rows == 1 and seen is not None else seen
    inputs = tensors(length, total, rows)
    query, key, value, *slots = inputs
    is_causal = mask is None and length > 1
    out = attend(query, key, value, LayerMemory(*slots, seen), mask, None, is_causal)
    wanted = defined(*inputs, seen, mask)
    close(out, wanted)
    grad = torch.randn(B, length, H, D).transpose(1, 2)
    for got, expected in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(wanted, inputs, grad.double()), strict=True
    ):
        assert not got.isnan().any()
        close(got, expected)


@pytest.mark.parametrize("visible", VISIBLE)
@pytest.mark.parametrize("attend", [attend_reference, attend_merged])
def test_heads_may_have_masks_of_their_own(attend, visible):
    inputs, mask = tensors(6, 6), causal(6, 6).repeat(1, H, 1, 1)
    mask[:, 1:, :, :2] = False
    out = attend(*inputs[:3], LayerMemory(*inputs[3:], VISIBLE[visible]), mask, None, False)
    for head in range(H):
        close(out[:, head], defined(*inputs, VISIBLE[visible], mask[:, head : head + 1])[:, head])


@pytest.mark.parametrize("attend", [attend_reference, attend_merged])
def test_a_model_may_have_a_scale_of_its_own(attend):
    inputs = tensors(6, 6)
    out, wanted = attend(*inputs[:3], LayerMemory(*inputs[3:]), None, 0.9, True), defined(*inputs, None, None, 0.9)
    close(out, wanted)
    for got, expected in zip(
        torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(wanted.sum(), inputs), strict=True
    ):
        close(got, expected)


def test_merged_gradients_pass_gradcheck_in_double():
    inputs = tensors(6, 6, dtype=torch.float64)
    mask = left_padded(6, 6)
    for m, is_causal in ((None, True), (mask, False)):
        torch.autograd.gradcheck(
            lambda q, k, v, *slots, m=m, c=is_causal: attend_merged(q, k, v, LayerMemory(*slots), m, 0.3, c),
            inputs,
            fast_mode=True,
        )


@pytest.mark.parametrize("attend", [attend_reference, attend_merged])
def test_half_precision_stays_close_to_the_definition(attend):
    inputs = tensors(40, 40, dtype=torch.bfloat16)
    out = attend(*inputs[:3], LayerMemory(*inputs[3:]), None, None, True)
    wanted = defined(*inputs, None, None)
    assert out.dtype == torch.bfloat16
    close(out, wanted, 2e-2)
    for got, expected in zip(
        torch.autograd.grad(out.float().square().mean(), inputs),
        torch.autograd.grad(wanted.square().mean(), inputs),
        strict=True,
    ):
        assert (got - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("attend", [attend_reference, attend_merged])
def test_a_row_that_sees_no_slot_is_plain_attention(attend):
    query, key, value, *slots = tensors(11, 11)
    out = attend(query, key, value, LayerMemory(*slots, VISIBLE["ragged"]), None, None, True)
    plain = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    close(out[0], plain[0], 1e-6)
    assert (out[2] - plain[2]).abs().max() > 0.1


@pytest.mark.parametrize("visible", VISIBLE)
def test_masks_are_made_where_the_tokens_lie(visible):
    """No accelerator is at hand in every test: tensors that have only a shape stand for one."""
    inputs = [tensor.detach().to("meta") for tensor in tensors(11, 11)]
    seen = None if VISIBLE[visible] is None else VISIBLE[visible].to("meta")
    out = attend_reference(*inputs[:3], LayerMemory(*inputs[3:], seen), None, None, True)
    assert out.is_meta and out.shape == inputs[0].shape


def test_merged_takes_a_gradient_without_strides():
    inputs = tensors(11, 11)
    out = attend_merged(*inputs[:3], LayerMemory(*inputs[3:]), None, None, True)
    wanted = defined(*inputs, None, None)
    for got, expected in zip(
        torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(wanted.sum(), inputs), strict=True
    ):
        close(got, expected)


# --- the registered function ---------------------------------------------------------------------------------------


class Layer(nn.Module):
    """What a model's attention module shows to its attention function."""

    is_causal = True
    num_key_value_groups = H // K

    def __init__(self, memory=None):
        super().__init__()
        self.koff_memory = lambda: memory


def test_without_memory_nothing_differs_from_sdpa_by_a_bit():
    for length, total, make_mask in CASES.values():
        mask = None if make_mask is None else make_mask(length, total)
        query, key, value, *_ = tensors(length, total)
        arguments = (query, key, value, mask)
        wanted = sdpa_attention_forward(Layer(), *arguments, scaling=0.2)[0]
        assert torch.equal(koff_attention(Layer(), *arguments, scaling=0.2)[0], wanted)
        if mask is None:  # and what else the layer says, such as that it is not causal
            wanted = sdpa_attention_forward(Layer(), *arguments, scaling=0.2, is_causal=False)[0]
            assert torch.equal(koff_attention(Layer(), *arguments, scaling=0.2, is_causal=False)[0], wanted)


def test_memory_is_cast_to_the_tokens_dtype_and_its_gradient_is_full_precision():
    query, key, value, *_ = tensors(6, 6, dtype=torch.bfloat16)
    slots = [torch.randn(1, K, P, D, requires_grad=True) for _ in range(2)]
    out, _ = koff_attention(Layer(LayerMemory(*slots)), query, key, value, None)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and out.shape == (B, 6, H, D)
    assert all(slot.grad.dtype == torch.float32 and slot.grad.abs().sum() > 0 for slot in slots)


def test_an_empty_static_cache_is_cut_to_the_tokens_seen():
    query, key, value, *slots = tensors(6, 6)
    layer = Layer(LayerMemory(*slots))
    longer = [nn.functional.pad(t, (0, 0, 0, 7), value=3.0) for t in (key, value)]
    assert torch.equal(
        koff_attention(layer, query, *longer, None)[0], koff_attention(layer, query, key, value, None)[0]
    )


def test_a_single_new_token_sees_the_whole_cache():
    query, key, value, *slots = tensors(1, 9)
    out, _ = koff_attention(Layer(LayerMemory(*slots)), query, key, value, None)
    close(out.transpose(1, 2), defined(query, key, value, *slots, None, None))


def test_a_layer_that_is_not_causal_stays_so():
    query, key, value, *slots = tensors(6, 6)
    out, _ = koff_attention(Layer(LayerMemory(*slots)), query, key, value, None, is_causal=False)
    everything = torch.ones(B, 1, 6, 6, dtype=torch.bool)
    close(out.transpose(1, 2), defined(query, key, value, *slots, None, everything))


@pytest.mark.parametrize(("length", "chosen"), [(511, "reference"), (512, "merged")])
def test_the_faster_way_is_chosen_by_length(monkeypatch, length, chosen):
    called = []
    monkeypatch.setattr(attention, "attend_reference", lambda q, *_: called.append("reference") or q)
    monkeypatch.setattr(attention, "attend_merged", lambda q, *_: called.append("merged") or q)
    query, key, value, *slots = tensors(length, length)
    koff_attention(Layer(LayerMemory(*slots)), query, key, value, None)
    koff_attention(Layer(LayerMemory(*slots)), query, key, value, None, dropout=0.1)
    assert called == [chosen, "reference"]  # the merge defines no dropout


@pytest.mark.parametrize("hidden", [None, "mask", "visible", "other documents"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [64, 68, 256, 264])
def test_the_merge_is_left_to_the_cuda_kernel_only_where_it_can_do_it(monkeypatch, hidden, dtype, size):
    """Flash attention takes no mask but bounds of documents, half precision only, and heads of up to 256, in eights."""
    monkeypatch.setattr(attention, "kernels_agree", lambda *_: True)
    query = SimpleNamespace(is_cuda=True, is_cpu=False, dtype=dtype, shape=(B, H, 600, size), device="cuda")
    memory = LayerMemory(torch.empty(0), torch.empty(0), torch.ones(B, P) if hidden == "visible" else None)
    able = hidden in (None, "other documents") and dtype != torch.float32 and size in (64, 256)
    mask = torch.ones(1) if hidden in ("mask", "other documents") else None
    documents = torch.ones(1) if hidden == "other documents" else None
    assert attention._can_merge(query, mask, memory, documents) == able
    monkeypatch.setattr(attention, "kernels_agree", lambda *_: False)
    assert not attention._can_merge(query, mask, memory, documents)


def test_on_a_cpu_no_key_is_copied_for_the_heads_that_share_it(monkeypatch):
    monkeypatch.setattr(attention, "repeat_kv", None)
    query, key, value, *slots = tensors(6, 6)
    out, _ = koff_attention(Layer(LayerMemory(*slots)), query, key, value, None)
    close(out.transpose(1, 2), defined(query, key, value, *slots, None, None))


def test_dropout_reaches_the_weights():
    query, key, value, *slots = tensors(6, 6)
    layer = Layer(LayerMemory(*slots))
    dropped, kept = (koff_attention(layer, query, key, value, None, dropout=p)[0] for p in (0.5, 0.0))
    assert (dropped - kept).abs().max() > 0.1


@pytest.mark.parametrize(
    ("key", "value", "visible", "message"),
    [
        ((2, K, P, D), (2, K, P, D), None, "memory has 2 rows but the batch has 3: activate one domain per row"),
        ((1, K + 1, P, D), (1, K + 1, P, D), None, "this layer has 2 key-value heads of size 8"),
        ((1, K, P, D + 2), (1, K, P, D + 2), None, "this layer has 2 key-value heads of size 8"),
        ((1, K, P, D), (1, K, P + 1, D), None, "has keys .* and values .* use the memory that was trained"),
        ((1, K, P, D), (1, K, P, D), (B, P), r"visible must be \[1, 5\], got \[3, 5\]"),
    ],
)
def test_a_memory_that_does_not_fit_is_named(key, value, visible, message):
    seen = None if visible is None else torch.ones(visible, dtype=torch.bool)
    layer = Layer(LayerMemory(torch.zeros(key), torch.zeros(value), seen))
    with pytest.raises(KoffError, match=message):
        koff_attention(layer, *tensors(6, 6)[:3], None)


@pytest.mark.parametrize("variant", ["softcap", "position_bias", "s_aux", "cache"])
def test_an_attention_variant_without_a_definition_is_refused(variant):
    query, key, value, *slots = tensors(6, 6)
    with pytest.raises(KoffError, match=f"uses {variant}, which is not supported with a memory"):
        koff_attention(Layer(LayerMemory(*slots)), query, key, value, None, **{variant: torch.ones(1)})


# --- inside models -------------------------------------------------------------------------------------------------

MODEL_K, MODEL_D = 2, 16  # of tiny_model


def remember(model, rows=1, visible=None, seed=3):
    """Give each layer of `model` a random memory; returns its leaf tensors."""
    torch.manual_seed(seed)
    leaves = []
    for layer in model.model.layers:
        slots = [torch.randn(rows, MODEL_K, P, MODEL_D, requires_grad=True) for _ in range(2)]
        layer.self_attn.koff_memory = lambda slots=slots: LayerMemory(*slots, visible)
        leaves += slots
    return leaves


def ids(rows, length, seed=1):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[0, 10**9], ids=["merged", "reference"])
def both_ways(request, monkeypatch):
    monkeypatch.setattr(attention, "MERGE_FROM", request.param)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_memory_is_the_sdpa_model_bit_for_bit(family):
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    model = tiny_model(family)
    for inputs in ({}, {"attention_mask": mask}):
        model.set_attn_implementation("koff")
        ours = model(ids(2, 12), **inputs).logits
        model.set_attn_implementation("sdpa")
        assert torch.equal(ours, model(ids(2, 12), **inputs).logits)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(both_ways):
    model = tiny_model("qwen3")
    remember(model)
    first, second = ids(1, 7, seed=1), ids(1, 5, seed=2)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    together = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
    close(together[:, :7], model(first, use_cache=False).logits)
    close(together[:, 7:], model(second, use_cache=False).logits)


@torch.no_grad()
def test_left_padding_changes_nothing(both_ways):
    model = tiny_model("llama")
    remember(model)
    text = ids(1, 8)
    padded = nn.functional.pad(text, (4, 0))
    mask = (torch.arange(12) >= 4).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert not logits.isnan().any()
    close(logits[:, 4:], model(text, use_cache=False).logits)


@torch.no_grad()
def test_generate_with_a_cache_is_generate_without(both_ways):
    model = tiny_model("qwen2")
    remember(model, rows=2)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    cached = model.generate(ids(2, 6), use_cache=True, **settings)
    assert torch.equal(cached, model.generate(ids(2, 6), use_cache=False, **settings))
    remember(model, rows=2, seed=4)
    assert not torch.equal(cached, model.generate(ids(2, 6), use_cache=True, **settings))  # the memory matters


@torch.no_grad()
def test_a_cache_read_in_chunks_is_one_reading(both_ways):
    model = tiny_model("llama")
    remember(model)
    text = ids(1, 12)
    cache = {cache_argument(model): DynamicCache()}
    model(text[:, :5], **cache)
    rest = model(text[:, 5:], **cache)
    close(rest.logits, model(text, use_cache=False).logits[:, 5:])


@torch.no_grad()
def test_rows_of_a_batch_read_their_own_memory_or_none(both_ways):
    model = tiny_model("llama")
    plain = model(ids(3, 9), use_cache=False).logits
    visible = torch.tensor([[True] * P, [False] * P, [True] * 3 + [False] * 2])
    leaves = remember(model, rows=3, visible=visible)
    mixed = model(ids(3, 9), use_cache=False).logits
    close(mixed[1], plain[1])
    for row, slots in ((0, P), (2, 3)):
        for index, layer in enumerate(model.model.layers):
            own = [leaf[row : row + 1, :, :slots] for leaf in leaves[2 * index : 2 * index + 2]]
            layer.self_attn.koff_memory = lambda own=own: LayerMemory(*own)
        close(mixed[row], model(ids(3, 9)[row : row + 1], use_cache=False).logits[0])


def test_activation_checkpointing_gives_the_same_gradients(both_ways):
    model = tiny_model("llama")
    leaves = remember(model)
    model.train()
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            allow_recomputation(model)
        loss = model(ids(2, 9), labels=ids(2, 9), use_cache=False).loss
        grads.append(torch.autograd.grad(loss, leaves))
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(*grads, strict=True))
