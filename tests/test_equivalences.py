"""What must be equal: to the frozen model, to a model cut down by hand, to each row run alone, to each document alone."""

import copy

import pytest
import torch
from tiny_cases import (
    BATCHES,
    DOMAINS,
    RANK,
    left_padded_batch,
    make_case,
    packed_batch,
    plain_batch,
    random_mask,
    real,
    run,
    sliced_by_hand,
)
from tiny_models import FAMILIES

from koff_lightning.backbone import hidden_states
from koff_lightning.memory import KVSpec, LoraSpec, MemoryBank
from koff_lightning.surgery import cut_

PATHS = {"base": None, "lora": {"kv": False}, "kv": {"lora": False}, "lora_kv": {}}


@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_off_is_the_frozen_model_bit_for_bit(family, shape):
    case, batch = make_case(family), BATCHES[shape]()
    case.plain.set_attn_implementation("sdpa")
    expected = case.plain(**batch, use_cache=False).logits
    assert torch.equal(case.model(**batch, use_cache=False).logits, expected)
    ones = torch.ones(len(case.gates.logits))
    assert torch.equal(case.model.lm_head(run(case, batch, kept=ones)), expected)
    run(case, batch, ["de", "fr", "law"], random_mask(case.groups))  # leaves something to switch off
    with case.gates.off(), case.bank.off():
        assert torch.equal(case.model(**batch, use_cache=False).logits, expected)
    assert not torch.equal(case.model(**batch, use_cache=False).logits[real(batch)], expected[real(batch)])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gated_equals_sliced(family, shape, path):
    case, batch = make_case(family, **(PATHS[path] or {})), BATCHES[shape]()
    domain = None if PATHS[path] is None else "fr"
    kept, chosen = random_mask(case.groups), real(batch)
    gated = run(case, batch, [domain] * 3, kept)[chosen]
    by_hand = hidden_states(sliced_by_hand(case, kept, domain), **batch)[chosen]
    torch.testing.assert_close(gated, by_hand, atol=1e-5, rtol=0)

    cut_(case.model, case.groups, kept, case.bank)
    torch.testing.assert_close(run(case, batch, [domain] * 3)[chosen], gated, atol=1e-5, rtol=0)
    dense = hidden_states(case.plain, **batch)[chosen]
    assert (dense - gated).abs().max() > 0.1, "the mask must matter"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_soft_gate_scales_the_columns_of_its_consumer(family):
    case, batch = make_case(family, kv=False, lora=False), plain_batch()
    values = torch.rand(len(case.gates.logits), generator=torch.Generator().manual_seed(3))
    scaled = copy.deepcopy(case.plain)
    for group, part in zip(case.groups, values.split(case.gates.sizes), strict=True):
        scaled.get_submodule(group.consumer).weight.mul_(part.repeat_interleave(group.width))
    torch.testing.assert_close(run(case, batch, kept=values), hidden_states(scaled, **batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_has_its_own_gates(family):
    case, batch = make_case(family), plain_batch()
    masks = torch.stack([random_mask(case.groups, seed) for seed in range(3)])
    together = run(case, batch, ["de", "fr", None], masks)
    for row, domain in enumerate(["de", "fr", None]):
        alone = run(case, {"input_ids": batch["input_ids"][row : row + 1]}, [domain], masks[row])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)


ORDERS = {
    "unsorted": ["law", "de", "de", None, "fr", "law"],
    "blocks": ["de", "de", "fr", "fr", "law", "law"],
    "uneven": ["law", "fr", "fr", "fr", "fr", "fr"],
    "one": ["fr"] * 6,
    "one_or_none": ["fr", None] * 3,
    "none": [None] * 6,
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_several_domains_equal_the_rows_alone(family, order):
    rows_equal_alone(make_case(family), packed_batch(6), ORDERS[order])


@pytest.mark.parametrize("path", ["lora", "kv"])
@pytest.mark.parametrize("shape", ["plain", "left_padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_alone_in_other_shapes_and_with_one_kind_of_memory(family, shape, path):
    rows_equal_alone(make_case(family, **PATHS[path]), BATCHES[shape](6, 21), ORDERS["unsorted"])


def rows_equal_alone(case, batch, order):
    """Outputs and the gradients of every memory tensor, gates included, are those of the rows run one by one."""
    kept, chosen = random_mask(case.groups), real(batch)
    weight = torch.randn(*chosen.shape, 64, generator=torch.Generator().manual_seed(5)) * chosen.unsqueeze(-1)
    present = sorted({d for d in order if d})
    tensors = {d: case.trained(d) for d in present}
    together = run(case, batch, order, kept)
    if present:
        mixed = torch.autograd.grad((together * weight).sum(), sum(tensors.values(), []))
    alone = [run(case, {k: v[i : i + 1] for k, v in batch.items()}, [d], kept) for i, d in enumerate(order)]
    torch.testing.assert_close(together[chosen], torch.cat(alone)[chosen], atol=1e-5, rtol=0)
    for domain in present:
        own = sum((alone[i] * weight[i : i + 1]).sum() for i, d in enumerate(order) if d == domain)
        got, mixed = mixed[: len(tensors[domain])], mixed[len(tensors[domain]) :]
        for one, other in zip(got, torch.autograd.grad(own, tensors[domain]), strict=True):
            assert other.abs().max() > 0, "a gradient of zero proves nothing"
            torch.testing.assert_close(one, other, atol=2e-5 * max(1.0, float(other.abs().max())), rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_without_a_domain_is_the_plain_pruned_model(family):
    case, batch, kept = make_case(family), plain_batch(), random_mask(make_case(family).groups)
    mixed = run(case, batch, ["de", None, "law"], kept)
    pruned = hidden_states(sliced_by_hand(case, kept, None), **batch)
    torch.testing.assert_close(mixed[1], pruned[1], atol=1e-5, rtol=0)
    assert (mixed - pruned).abs().amax((1, 2))[[0, 2]].min() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_domains_get_no_gradient(family):
    case, batch = make_case(family), plain_batch()
    run(case, batch, ["de", None, "de"], random_mask(case.groups)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in case.trained("de"))
    assert all(p.grad is None for d in ("fr", "law") for p in case.trained(d))


@pytest.mark.parametrize("order", ["unsorted", "one", "blocks"])
@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_nothing(family, shape, order):
    case, batch = make_case(family), BATCHES[shape](6, 21)
    values = random_mask(case.groups).float().requires_grad_()
    tensors = [values, *[p for d in {d for d in ORDERS[order] if d} for p in case.trained(d)]]
    calls = count_calls(case.model.model.layers[0].mlp)
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            case.model.gradient_checkpointing_enable({"use_reentrant": False})
            case.model.train()
        case.bank.activate(ORDERS[order])
        case.gates.set(values[None])
        out = hidden_states(case.model, **batch)
        loss = (out * real(batch).unsqueeze(-1)).square().mean()
        results.append((out.detach(), torch.autograd.grad(loss, tensors)))
    assert len(calls) == 3, "the second forward must be computed twice"
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-5)


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_do_not_see_each_other(family):
    case, kept = make_case(family), random_mask(make_case(family).groups)
    batch, order = packed_batch(3), ["de", "law", None]
    packed = run(case, batch, order, kept)
    for row, domain in enumerate(order):
        starts = (batch["position_ids"][row] == 0).nonzero()[:, 0].tolist()
        assert len(starts) == 3
        for begin, end in zip(starts, [*starts[1:], 12], strict=True):
            alone = run(case, {"input_ids": batch["input_ids"][row : row + 1, begin:end]}, [domain], kept)
            torch.testing.assert_close(packed[row : row + 1, begin:end], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_not_seen(family):
    case, kept = make_case(family), random_mask(make_case(family).groups)
    batch, order = left_padded_batch(3), ["de", "law", None]
    padded = run(case, batch, order, kept)
    for row, domain in enumerate(order):
        text = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        alone = run(case, {"input_ids": text}, [domain], kept)
        torch.testing.assert_close(padded[row : row + 1, -text.shape[1] :], alone, atol=1e-5, rtol=0)


def test_documents_stay_apart_when_packing_comes_with_a_padding_mask():
    """transformers finds packed documents only when there is no 2D mask; with one it would mix them silently."""
    case, batch = make_case("llama"), packed_batch(3)
    expected = run(case, batch, ["de"] * 3)
    masked = run(case, batch | {"attention_mask": torch.ones(3, 12, dtype=torch.long)}, ["de"] * 3)
    torch.testing.assert_close(masked, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sliding_window_does_not_hide_the_memory(family):
    if family != "mistral":
        pytest.skip("only Mistral slides in all layers")
    case = make_case(family, sliding_window=4)
    rows_equal_alone(case, plain_batch(6), ORDERS["unsorted"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_memory_read_from_a_text_is_that_text_in_context(family):
    """And stays so in a model that is cut, when its memory is read after the cut."""
    case = make_case(family, lora=False)
    kept, text, batch = random_mask(case.groups), plain_batch(1, 5, seed=9)["input_ids"][0], plain_batch()
    cut_(case.model, case.groups, kept, case.bank)
    with case.bank.off():
        case.bank.kv["koff_fr"].initialise_(case.model, text)
    context = {"input_ids": torch.cat([text.expand(3, -1), batch["input_ids"]], 1)}
    expected = hidden_states(sliced_by_hand(case, kept, None), **context)[:, len(text) :]
    torch.testing.assert_close(run(case, batch, ["fr"] * 3), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_memory_is_the_same_with_and_without_a_cache(family):
    case = make_case(family)
    case.bank.activate(["de", "fr", "law"])
    case.gates.set(random_mask(case.groups).float()[None])
    batch = left_padded_batch()
    batch.pop("position_ids")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, anew = (case.model.generate(**batch, **options, use_cache=flag) for flag in (True, False))
    assert torch.equal(cached, anew)
    assert cached.shape[1] > 12


def test_memories_of_unequal_rank_share_a_batch():
    case, batch = make_case("llama", kv=False, domains=("de", "fr")), plain_batch(2)
    expected = run(case, batch, ["de", "fr"])
    bigger = make_case("llama", kv=False, domains=("de", "fr"))
    for linear in bigger.bank._linears:  # rank 3 -> 4 by a row and a column of zeros: the same update
        for part, pad in ((linear.lora_A["koff_fr"], (0, 0, 0, 1)), (linear.lora_B["koff_fr"], (0, 1))):
            part.weight = torch.nn.Parameter(torch.nn.functional.pad(part.weight, pad))
    torch.testing.assert_close(run(bigger, batch, ["de", "fr"]), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(run(bigger, batch, ["fr", "de"]), run(case, batch, ["fr", "de"]), atol=1e-5, rtol=0)


def test_a_gate_inside_an_adapter_is_refused():
    case = make_case("llama", lora=False, kv=False)  # gates first ...
    MemoryBank(case.model, DOMAINS, LoraSpec(RANK), KVSpec(4))  # ... adapters over them
    with pytest.raises(RuntimeError, match="inside the adapter"):
        case.gates.attach(case.model)
