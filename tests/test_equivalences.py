"""What must be equal: to the frozen model, to a model cut down by hand, to each row alone, to each document alone."""

import copy

import pytest
import torch
from tiny_cases import (
    BATCHES,
    DOMAINS,
    RANK,
    cut_case,
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

from koff_lightning.backbone import allow_recomputation, hidden_states
from koff_lightning.memory import MemoryBank
from koff_lightning.specs.memories import KVSpec, LoraSpec
from koff_lightning.support.errors import KoffError

PATHS = {"base": None, "lora": {"kv": False}, "kv": {"lora": False}, "lora_kv": {}}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    """One model of each family with all memories; tests that change it make their own."""
    return make_case(request.param)


@pytest.mark.parametrize("shape", BATCHES)
def test_all_off_is_the_frozen_model_bit_for_bit(case, shape):
    batch, ones = BATCHES[shape](), torch.ones(len(case.gates.logits))
    plain = copy.deepcopy(case.plain)
    plain.set_attn_implementation("sdpa")
    expected = plain.model(**batch, use_cache=False).last_hidden_state
    assert torch.equal(run(case, batch), expected)
    assert torch.equal(run(case, batch, kept=ones), expected)
    changed = run(case, batch, ["de", "fr", "law"], random_mask(case.groups))
    assert (changed - expected)[real(batch)].abs().max() > 0.1, "now there is something to switch off"
    with case.gates.off(), case.bank.off():
        assert torch.equal(hidden_states(case.model, **batch), expected)
    assert torch.equal(hidden_states(case.model, **batch)[real(batch)], changed[real(batch)])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gated_equals_sliced_by_hand_and_cut(family, path):
    case = make_case(family, **(PATHS[path] or {}))
    domain, kept = None if path == "base" else "fr", random_mask(case.groups)
    batches = [make() for make in BATCHES.values()]
    sliced = sliced_by_hand(case, kept, domain)
    gated = [run(case, batch, [domain] * 3, kept)[real(batch)] for batch in batches]
    cut = cut_case(case, kept)
    for batch, expected in zip(batches, gated, strict=True):
        chosen = real(batch)
        torch.testing.assert_close(expected, hidden_states(sliced, **batch)[chosen], atol=1e-5, rtol=0)
        torch.testing.assert_close(run(cut, batch, [domain] * 3)[chosen], expected, atol=1e-5, rtol=0)
        dense = hidden_states(case.plain, **batch)[chosen]
        assert (dense - expected).abs().max() > 0.1, "the mask must matter"


def test_a_soft_gate_scales_the_columns_of_its_consumer(case):
    batch = plain_batch()
    values = torch.rand(len(case.gates.logits), generator=torch.Generator().manual_seed(3))
    scaled = copy.deepcopy(case.plain)
    for group, part in zip(case.groups, values.split(case.gates.sizes), strict=True):
        scaled.get_submodule(group.consumer).weight.mul_(part.repeat_interleave(group.width))
    torch.testing.assert_close(run(case, batch, kept=values), hidden_states(scaled, **batch), atol=1e-5, rtol=0)


def test_each_row_has_its_own_gates(case):
    batch = plain_batch()
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
def test_rows_of_several_domains_equal_the_rows_alone(case, order):
    rows_equal_alone(case, packed_batch(6, 21), ORDERS[order])


@pytest.mark.parametrize("shape", ["plain", "left_padded"])
def test_rows_alone_in_other_shapes(case, shape):
    rows_equal_alone(case, BATCHES[shape](6, 21), ORDERS["unsorted"])


@pytest.mark.parametrize("path", ["lora", "kv"])
@pytest.mark.parametrize("order", ["unsorted", "blocks", "one_or_none"])
def test_rows_alone_with_one_kind_of_memory(order, path):
    rows_equal_alone(make_case("qwen3", **PATHS[path]), packed_batch(6, 21), ORDERS[order])


def rows_equal_alone(case, batch, order):
    """Outputs and the gradients of every memory tensor, gates included, are those of the rows run one by one."""
    kept, chosen = random_mask(case.groups), real(batch)
    weight = torch.randn(*chosen.shape, 64, generator=torch.Generator().manual_seed(5)) * chosen.unsqueeze(-1)
    present = sorted({d for d in order if d})
    tensors = {d: case.trained(d) for d in present}
    together = run(case, batch, order, kept)
    if present:
        mixed = torch.autograd.grad((together * weight).sum(), [p for part in tensors.values() for p in part])
    alone = [run(case, {k: v[i : i + 1] for k, v in batch.items()}, [d], kept) for i, d in enumerate(order)]
    torch.testing.assert_close(together[chosen], torch.cat(alone)[chosen], atol=1e-5, rtol=0)
    for domain in present:
        own = sum((alone[i] * weight[i : i + 1]).sum() for i, d in enumerate(order) if d == domain)
        got, mixed = mixed[: len(tensors[domain])], mixed[len(tensors[domain]) :]
        for one, other in zip(got, torch.autograd.grad(own, tensors[domain]), strict=True):
            assert other.abs().max() > 0, "a gradient of zero proves nothing"
            torch.testing.assert_close(one, other, atol=2e-5 * max(1.0, float(other.abs().max())), rtol=0)


def test_a_row_without_a_domain_is_the_plain_pruned_model(case):
    batch, kept = plain_batch(), random_mask(case.groups)
    mixed = run(case, batch, ["de", None, "law"], kept)
    pruned = hidden_states(sliced_by_hand(case, kept, None), **batch)
    torch.testing.assert_close(mixed[1], pruned[1], atol=1e-5, rtol=0)
    assert (mixed - pruned).abs().amax((1, 2))[[0, 2]].min() > 0.01


def test_absent_domains_get_no_gradient(case):
    tensors = {d: case.trained(d) for d in DOMAINS}
    loss = run(case, plain_batch(), ["de", None, "de"], random_mask(case.groups)).square().sum()
    grads = torch.autograd.grad(loss, [p for part in tensors.values() for p in part], allow_unused=True)
    present, absent = grads[: len(tensors["de"])], grads[len(tensors["de"]) :]
    assert all(g is not None and g.any() for g in present)
    assert all(g is None for g in absent)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_nothing(family):
    case, calls = make_case(family), []
    case.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    settings = [(BATCHES[shape](6, 21), ORDERS[order]) for shape in BATCHES for order in ("unsorted", "one", "blocks")]
    direct = [out_and_gradients(case, *setting) for setting in settings]
    assert len(calls) == len(settings)
    allow_recomputation(case.model)
    case.model.train()
    again = [out_and_gradients(case, *setting) for setting in settings]
    assert len(calls) == 3 * len(settings), "each checkpointed layer must be computed a second time in the backward"
    for one, other in zip(again, direct, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def out_and_gradients(case, batch, order):
    """Hidden states of the text, and gradients of the gates and of every memory present."""
    values = random_mask(case.groups).float().requires_grad_()
    tensors = [values, *[p for d in sorted({d for d in order if d}) for p in case.trained(d)]]
    case.bank.activate(order)
    case.gates.set(values[None])
    out = hidden_states(case.model, **batch)[real(batch)]
    return out.detach(), torch.autograd.grad(out.square().mean() + out.mean(), tensors)


def test_packed_documents_do_not_see_each_other(case):
    kept = random_mask(case.groups)
    batch, order = packed_batch(3), ["de", "law", None]
    packed = run(case, batch, order, kept)
    for row, domain in enumerate(order):
        starts = (batch["position_ids"][row] == 0).nonzero()[:, 0].tolist()
        assert len(starts) == 3
        for begin, end in zip(starts, [*starts[1:], 12], strict=True):
            alone = run(case, {"input_ids": batch["input_ids"][row : row + 1, begin:end]}, [domain], kept)
            torch.testing.assert_close(packed[row : row + 1, begin:end], alone, atol=1e-5, rtol=0)


def test_padding_is_not_seen(case):
    kept = random_mask(case.groups)
    batch, order = left_padded_batch(3), ["de", "law", None]
    padded = run(case, batch, order, kept)
    for row, domain in enumerate(order):
        text = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        alone = run(case, {"input_ids": text}, [domain], kept)
        torch.testing.assert_close(padded[row : row + 1, -text.shape[1] :], alone, atol=1e-5, rtol=0)


def test_packing_with_a_padding_mask_is_refused():
    """transformers finds packed documents only when there is no 2D mask; with one it would mix them silently."""
    case, batch = make_case("llama"), packed_batch(3)
    with pytest.raises(KoffError, match="cannot be combined"):
        run(case, batch | {"attention_mask": torch.ones(3, 12, dtype=torch.long)}, ["de"] * 3)


def test_a_sliding_window_does_not_hide_the_memory():
    """Mistral's window is over tokens; the memory is seen from everywhere. A token's last 4 decide, in 2 layers 7."""
    case, batch = make_case("mistral", sliding_window=4), plain_batch(3, 21)
    rows_equal_alone(case, batch, ["law", None, "de"])
    whole = run(case, batch, ["law", None, "de"])
    other = run(
        case,
        {"input_ids": torch.cat([plain_batch(3, 14, seed=8)["input_ids"], batch["input_ids"][:, 14:]], 1)},
        ["law", None, "de"],
    )
    torch.testing.assert_close(whole[:, 20:], other[:, 20:], atol=1e-5, rtol=0)
    assert (whole - run(case, batch))[:, 20].abs().amax(-1)[[0, 2]].min() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_a_memory_read_from_a_text_is_that_text_in_context(family):
    """And stays so in a model that is cut, when its memory is read after the cut."""
    windows = {"sliding_window": 64} if family == "gemma3_text" else {}  # none ends inside the text
    case = make_case(family, lora=False, **windows)
    kept, text, batch = random_mask(case.groups), plain_batch(1, 5, seed=9)["input_ids"][0], plain_batch()
    cut = cut_case(case, kept)
    with cut.bank.off():
        cut.bank.kv["koff_fr"].initialise_(cut.model, text)
    context = {"input_ids": torch.cat([text.expand(3, -1), batch["input_ids"]], 1)}
    expected = hidden_states(sliced_by_hand(case, kept, None), **context)[:, len(text) :]
    torch.testing.assert_close(run(cut, batch, ["fr"] * 3), expected, atol=1e-5, rtol=0)


def test_generation_with_a_memory_is_the_same_with_and_without_a_cache(case):
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
    for linear in bigger.bank._linears.values():  # rank 3 -> 4 by a row and a column of zeros: the same update
        for part, pad in ((linear.lora_A["koff_fr"], (0, 0, 0, 1)), (linear.lora_B["koff_fr"], (0, 1))):
            part.weight = torch.nn.Parameter(torch.nn.functional.pad(part.weight, pad))
    torch.testing.assert_close(run(bigger, batch, ["de", "fr"]), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(run(bigger, batch, ["fr", "de"]), run(case, batch, ["fr", "de"]), atol=1e-5, rtol=0)


def test_a_gate_inside_an_adapter_is_refused():
    case = make_case("llama", lora=False, kv=False)  # gates first ...
    with pytest.raises(KoffError, match="inside the adapter"):
        MemoryBank(case.model, DOMAINS, LoraSpec(RANK), KVSpec(4))  # ... adapters over them
