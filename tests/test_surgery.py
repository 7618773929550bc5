"""Cutting state dicts: what is left has the counted parameters and the right shapes, and computes what the gates do."""

import pytest
import torch
from tiny_cases import (
    ALPHA,
    DOMAINS,
    RANK,
    cut_case,
    cut_model,
    left_padded_batch,
    make_case,
    plain_batch,
    random_mask,
    real,
    run,
)
from tiny_models import FAMILIES, tiny_model

from koff_lightning import KoffError, SparsitySpec
from koff_lightning.backbone import hidden_states, kv_shapes, parameter_counts, prunable_groups
from koff_lightning.sparsity import Budget
from koff_lightning.surgery import (
    cut_kv,
    cut_state,
    grow_state,
    masks,
    merge_lora,
    plain_state,
    with_bias,
    zero_kv,
    zero_state,
)
from koff_lightning.units import KINDS

BIASED = {"attention_bias": True, "mlp_bias": True}


def only(kinds, groups, kept):
    """The mask without what it removes of other kinds."""
    return torch.cat([part if g.kind in kinds else torch.ones_like(part) for g, part in masks(groups, kept)])


def adapter(case, domain):
    """One domain's adapter by the names that peft gives it in a file."""
    key = f".koff_{domain}."
    found = {name: tensor for name, tensor in case.model.state_dict().items() if "lora_" in name and key in name}
    return {f"base_model.model.{name.replace(key, '.')}": tensor for name, tensor in found.items()}


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}, BIASED])
@pytest.mark.parametrize("family", FAMILIES)
def test_counted_parameters_are_the_accounted_ones(family, config):
    if config is BIASED and not family.startswith("llama"):
        config = {}
    model = tiny_model(family, **config)
    groups = prunable_groups(model)
    budget = Budget(groups, parameter_counts(model), SparsitySpec(0.3, min_channels=4))
    for kept in (random_mask(groups), budget.harden(torch.randn(len(budget.costs)))):
        cut = cut_model(model, groups, kept)
        stored = {tensor.data_ptr(): tensor.numel() for tensor in cut.state_dict().values()}  # tied ones once
        expected = budget.kept_parameters(kept)
        assert parameter_counts(cut)["total"] == sum(stored.values()) == expected
        rate = 1 - parameter_counts(cut)["body"] / parameter_counts(model)["body"]
        assert rate == pytest.approx(budget.report(kept)["body"], abs=1e-12)


def test_one_kv_head_whose_size_is_no_share_of_the_hidden_size():
    """As of Gemma 3 270M; the head itself must stay."""
    case, batch, order = make_case("gemma3_text", num_key_value_heads=1, head_dim=24), left_padded_batch(), ["de"] * 3
    assert kv_shapes(case.plain) == [(1, 24)] * 2
    kept, chosen = only(("channel",), case.groups, random_mask(case.groups)), real(batch)
    expected = run(case, batch, order, kept)[chosen]
    torch.testing.assert_close(run(cut_case(case, kept), batch, order)[chosen], expected, atol=1e-5, rtol=0)
    gone = torch.cat([torch.zeros(g.size) if g.kind == "kv_group" else torch.ones(g.size) for g in case.groups]).bool()
    with pytest.raises(KoffError, match="layer 0 keeps no kv_group at all: raise sparsity.min_kv_groups"):
        cut_model(case.plain, case.groups, gone)


@pytest.mark.parametrize("kinds", [("channel",), ("kv_group",), KINDS], ids="+".join)
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_and_zeroed_models_are_the_gated_one(family, lora, kinds):
    case = make_case(family, lora=lora)
    kept, batch = only(kinds, case.groups, random_mask(case.groups)), left_padded_batch()
    order, chosen = ["de", None, "law"], real(batch)
    expected = run(case, batch, order, kept)[chosen]
    cut = cut_case(case, kept)
    torch.testing.assert_close(run(cut, batch, order)[chosen], expected, atol=1e-5, rtol=0)
    assert (run(case, batch, order)[chosen] - expected).abs().max() > 0.1, "the mask must matter"
    case.model.load_state_dict(zero_state(case.model.state_dict(), case.groups, kept))
    torch.testing.assert_close(run(case, batch, order)[chosen], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cut_model_says_itself_what_is_left(family):
    case = make_case(family)
    kept = random_mask(case.groups)
    parts, cut = masks(case.groups, kept), cut_case(case, kept)
    left = [(group.layer, group.kind, int(part.sum()), group.params_per_unit) for group, part in parts]
    assert [(g.layer, g.kind, g.size, g.params_per_unit) for g in cut.groups] == left
    assert kv_shapes(cut.model) == [(count, 16) for _, kind, count, _ in left if kind == "kv_group"]
    assert all(cut.bank.size(d) < case.bank.size(d) for d in DOMAINS)


def test_cutting_in_two_steps_is_cutting_at_once():
    case = make_case("llama")
    kept = random_mask(case.groups)
    once = cut_case(case, kept).model.state_dict()
    half = cut_case(case, only(["channel"], case.groups, kept))
    rest = [part if group.kind == "kv_group" else part[part] for group, part in masks(case.groups, kept)]
    twice = cut_case(half, torch.cat(rest)).model.state_dict()
    assert once.keys() == twice.keys()
    assert all(torch.equal(twice[name], tensor) for name, tensor in once.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_trains_its_memories_and_generates(family):
    case = make_case(family)
    case = cut_case(case, random_mask(case.groups))
    assert not any(p.requires_grad for n, p in case.model.named_parameters() if "lora_" not in n)
    run(case, plain_batch(), ["de", None, "law"]).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for d in ("de", "law") for p in case.trained(d))
    case.bank.activate(["de", "fr", "law"])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = [case.model.generate(**plain_batch(), **options, use_cache=flag) for flag in (True, False)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_adapter_is_the_adapter(family):
    """Cut after merging and merged after cutting are the same model: that of the gates with that memory."""
    case = make_case(family, kv=False)
    kept, batch, scaling = random_mask(case.groups), plain_batch(), ALPHA / RANK
    state, delta = case.plain.state_dict(), adapter(case, "fr")
    expected = run(case, batch, ["fr"] * 3, kept)
    cut = cut_model(case.plain, case.groups, kept)
    merged_first = cut_state(merge_lora(state, delta, scaling), case.groups, kept)
    cut_first = merge_lora(cut_state(state, case.groups, kept), cut_state(delta, case.groups, kept), scaling)
    for weights in (merged_first, cut_first):
        cut.load_state_dict(weights)
        torch.testing.assert_close(hidden_states(cut, **batch), expected, atol=1e-5, rtol=0)


def test_merging_in_half_precision_rounds_once():
    """1 + 2^-9 is 1 in bfloat16, so that any earlier rounding would leave nothing of the sum."""
    delta = {"x.lora_A.weight": torch.full((1, 2), 1 + 2**-9), "x.lora_B.weight": torch.ones(1, 1)}
    merged = merge_lora({"x.weight": torch.full((1, 2), -1.0, dtype=torch.bfloat16)}, delta, 1.0)["x.weight"]
    assert merged.dtype == torch.bfloat16
    assert merged.tolist() == [[2**-9, 2**-9]]


def test_what_is_grown_again_keeps_its_dtype():
    model = tiny_model("llama").to(torch.bfloat16)
    groups, state = prunable_groups(model), plain_state(model)
    kept = random_mask(groups)
    grown, wanted = grow_state(cut_state(state, groups, kept), groups, kept), zero_state(state, groups, kept)
    assert all(torch.equal(grown[name], wanted[name]) and grown[name].dtype == torch.bfloat16 for name in state)


def test_what_removed_units_leave_behind_adds_to_a_bias_and_is_rounded_once():
    model = tiny_model("llama", num_hidden_layers=1, attention_bias=True).to(torch.bfloat16)
    groups, state = prunable_groups(model), {k: v.detach() for k, v in model.state_dict().items()}
    have, lack = (next(g for g in groups if g.kind == kind) for kind in ("kv_group", "channel"))
    noise = torch.Generator().manual_seed(0)
    own = torch.randn(model.config.hidden_size, generator=noise).to(torch.bfloat16)
    state[f"{have.consumer}.bias"] = own
    rows = torch.randn(2, len(own), generator=noise)
    found = with_bias(state, [have, lack], rows)
    assert torch.equal(found[f"{have.consumer}.bias"], (own.float() + rows[0]).to(torch.bfloat16))
    assert torch.equal(found[f"{lack.consumer}.bias"], rows[1].to(torch.bfloat16))
    assert found.keys() - state.keys() == {f"{lack.consumer}.bias"}
    assert torch.equal(state[f"{have.consumer}.bias"], own)


def test_nothing_is_edited_in_place_and_results_own_their_memory():
    case = make_case("qwen2")
    kept, state = random_mask(case.groups), case.model.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    cut, zeroed = cut_state(state, case.groups, kept), zero_state(state, case.groups, kept)
    merged = merge_lora(case.plain.state_dict(), adapter(case, "de"), 2.0)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    for name, tensor in state.items():
        assert cut[name].is_contiguous()
        if cut[name].shape != tensor.shape:
            assert cut[name].untyped_storage().nbytes() == cut[name].numel() * 4, f"{name} holds on to what it lost"
            assert zeroed[name].data_ptr() != tensor.data_ptr()
    assert merged.keys() == case.plain.state_dict().keys()


@pytest.mark.parametrize("tied", [True, False])
def test_the_plain_state_is_that_of_the_model_without_memories(tied):
    case, plain = make_case("llama", tie_word_embeddings=tied), tiny_model("llama", tie_word_embeddings=tied)
    found, wanted = plain_state(case.model), plain.state_dict()
    assert wanted.keys() - found.keys() == ({"lm_head.weight"} if tied else set())
    assert not found.keys() - wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


def test_keeping_everything_changes_nothing():
    case = make_case("llama")
    kept = torch.ones(len(case.gates.logits), dtype=torch.bool)
    for edit in (cut_state, zero_state):
        state = edit(case.model.state_dict(), case.groups, kept)
        assert all(torch.equal(state[name], tensor) for name, tensor in case.model.state_dict().items())
    left = cut_model(case.plain, case.groups, kept).state_dict()
    assert all(torch.equal(left[name], tensor) for name, tensor in case.plain.state_dict().items())


def test_adapters_are_cut_under_every_name_that_they_have():
    """In a file, and in a module, where a domain may be called like a part of a linear."""
    case = make_case("llama", kv=False, domains=("bias", "lora_B", "weight"))
    kept = random_mask(case.groups)
    inside = cut_state(case.model.state_dict(), case.groups, kept)
    for domain in ("bias", "lora_B", "weight"):
        for name, tensor in cut_state(adapter(case, domain), case.groups, kept).items():
            path, side, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
            assert torch.equal(tensor, inside[f"{path}.{side}.koff_{domain}.weight"])
    group = next(g for g in case.groups if g.kind == "channel")
    left = int(kept[: group.size].sum())
    assert inside[f"{group.consumer}.lora_A.koff_bias.weight"].shape == (RANK, left)
    assert inside[f"{group.consumer}.lora_B.koff_bias.weight"].shape == (64, RANK)
    assert inside[f"{group.producers[0][0]}.lora_A.koff_lora_B.weight"].shape == (RANK, 64)
    assert inside[f"{group.producers[0][0]}.lora_B.koff_lora_B.weight"].shape == (left, RANK)


def test_kv_memories_lose_or_blank_the_heads_that_are_gone():
    case = make_case("llama", lora=False)
    kept = only(("kv_group",), case.groups, random_mask(case.groups))  # layer 0 keeps its second head of two
    tensors = case.bank.kv["koff_de"].tensors()
    cut, zeroed = cut_kv(tensors, case.groups, kept), zero_kv(tensors, case.groups, kept)
    for part in ("key", "value"):
        whole = tensors[f"layers.0.{part}"]  # [K, P, dh]
        assert torch.equal(cut[f"layers.0.{part}"], whole[1:])
        assert torch.equal(zeroed[f"layers.0.{part}"], torch.stack([torch.zeros_like(whole[0]), whole[1]]))


def test_tensors_of_another_model_are_refused():
    model = tiny_model("llama")
    groups = prunable_groups(model)
    kept = random_mask(groups)
    cut = cut_state(model.state_dict(), groups, kept)
    with pytest.raises(KoffError, match=r"q_proj\.weight has 32 rows, its units have 64: it is cut already"):
        cut_state(cut, groups, kept)
    with pytest.raises(KoffError, match="a hard mask of 196 units is wanted, got torch.bool"):
        cut_state(model.state_dict(), groups, kept[1:])
    with pytest.raises(KoffError, match="a hard mask of 196 units is wanted, got torch.float32"):
        cut_state(model.state_dict(), groups, kept.float())
    case = make_case("llama")
    with pytest.raises(KoffError, match=r"adapter's .*q_proj is \[64, 64\], that of the weights is \[32, 64\]"):
        merge_lora(cut, adapter(case, "de"), 1.0)
    with pytest.raises(KoffError, match="that of the weights is missing"):
        merge_lora({}, adapter(case, "de"), 1.0)
