"""The bank of memories: who reads what, what is trained, how large it is, what is kept between two activations."""

import weakref

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny_cases import RANK, SLOTS, left_padded_batch, make_case, packed_batch, plain_batch, real, run
from tiny_memories import KINDS, empty_bank, fill_, mixed, read
from tiny_models import tiny_model

from koff_lightning import KoffError, KVSpec, LoraSpec
from koff_lightning.backbone import hidden_states, prunable_groups
from koff_lightning.gates import BackboneGates
from koff_lightning.kv_memory import KVMemory
from koff_lightning.memory import MemoryBank
from koff_lightning.support.names import check_name
from koff_lightning.units import LORA_TARGETS


def bank(model=None, domains=("de", "fr"), lora=None, kv=None, shared=False):
    model = (model or tiny_model("llama")).requires_grad_(False)
    return MemoryBank(model, domains, lora, kv, shared), model


def test_a_new_adapter_changes_nothing_and_has_both_halves_trained():
    memories, model = bank(lora=LoraSpec(rank=2))
    ids, plain = plain_batch(2)["input_ids"], tiny_model("llama")
    memories.activate(["de", "fr"])
    assert torch.equal(model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7 * 2
    assert all("lora_" in name for name in trained)


def test_parameters_by_domain_are_disjoint_and_complete():
    case = make_case("llama")
    parts = [{id(p) for p in case.trained(domain)} for domain in ("de", "fr", "law")]
    everything = {id(p) for p in (*case.bank.lora_parameters(), *case.bank.kv_parameters())}
    assert len(set().union(*parts)) == sum(map(len, parts)) == len(everything)
    trained = [p for m in (case.model, case.bank) for p in m.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == everything
    assert all(p.dtype == torch.float32 for p in trained)


def test_size_counts_adapters_and_all_slots():
    case = make_case("llama")
    d, ffn, q, kv = 64, 96, 64, 32
    lora = RANK * ((d + q) + 2 * (d + kv) + (q + d) + 3 * (d + ffn))
    slots = 2 * SLOTS * kv  # keys and values
    assert case.bank.size("fr") == 2 * (lora + slots)
    assert make_case("llama", kv=False).bank.size("fr") == 2 * lora
    assert make_case("llama", lora=False).bank.size("fr") == 2 * slots


def test_targets_are_respected():
    memories, model = bank(lora=LoraSpec(rank=2, targets=["v_proj", "down_proj"]))
    adapted = {name.rpartition(".")[2] for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {"v_proj", "down_proj"} < set(LORA_TARGETS)
    assert len(memories.lora_parameters("de")) == 2 * 2 * 2


def test_an_unknown_domain_is_named():
    memories, _ = bank(lora=LoraSpec(rank=2))
    with pytest.raises(KoffError, match="no memory for domain es; domains with one: de, fr"):
        memories.activate(["de", "es", None])


def test_a_shared_memory_is_one_for_all():
    memories, _ = bank(lora=LoraSpec(rank=2), kv=KVSpec(4), shared=True)
    assert list(memories.kv) == ["koff_shared"]
    assert [id(p) for p in memories.lora_parameters("de")] == [id(p) for p in memories.lora_parameters("fr")]
    assert len(memories.lora_parameters()) == len(memories.lora_parameters("de"))
    memories.activate(["fr", "de"])
    assert memories.routes.rows is None, "all rows read the same"


@pytest.mark.parametrize("domains", [("a", "lora_", "B"), ("keys", "values", "forward"), ("default", "weight", "0")])
def test_names_that_peft_or_torch_reserve_are_fine(domains):
    case, batch = make_case("llama", domains=domains), plain_batch()
    together = run(case, batch, list(domains))
    for row, domain in enumerate(domains):
        alone = run(case, {"input_ids": batch["input_ids"][row : row + 1]}, [domain])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)


def test_off_restores_the_routes_even_after_an_error():
    case, batch = make_case("llama"), plain_batch()
    before = run(case, batch, ["de", None, "law"])
    with pytest.raises(ZeroDivisionError), case.bank.off():
        assert case.bank.read(0) is None
        raise ZeroDivisionError
    assert torch.equal(case.model.model(**batch, use_cache=False).last_hidden_state, before)


def test_a_bf16_backbone_keeps_fp32_memories_that_learn():
    model = tiny_model("llama").bfloat16()
    memories, _ = bank(model, lora=LoraSpec(rank=2), kv=KVSpec(4))
    memories.activate(["fr", "de", None])
    loss = memories.model(**plain_batch(), use_cache=False).logits.float().square().mean()
    loss.backward()
    for parameter in (*memories.lora_parameters(), *memories.kv_parameters()):
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None


def test_rows_of_unlike_memories_are_read_under_autocast_with_and_without_gradients():
    memories, model = bank(lora=LoraSpec(rank=2))
    for domain in memories.domains:
        fill_(memories, domain)
    memories.activate(["de", "fr"])
    ids = plain_batch(2)["input_ids"]
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model(ids, use_cache=False).logits.detach()
        with torch.no_grad():
            found = model(ids, use_cache=False).logits
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_activating_for_another_number_of_rows_is_refused():
    case = make_case("llama")
    case.bank.activate(["de", "fr"])
    with pytest.raises((KoffError, RuntimeError)):
        case.model(**plain_batch(4), use_cache=False)


def test_activating_for_another_number_of_rows_is_refused_with_lora_alone():
    case = make_case("llama", kv=False)
    case.bank.activate(["de", "fr"])
    with pytest.raises((KoffError, RuntimeError)):
        case.model(**plain_batch(4), use_cache=False)


# --- unlike memories, added and removed ------------------------------------------------------------------------------

ROWS = ["kv", "both", None, "lora", "other", "both"]
BATCHES = {"plain": plain_batch, "packed": packed_batch, "left_padded": left_padded_batch}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize(
    "order",
    [
        *(ROWS, ["kv", "kv", "lora", "lora", "other", "other"], ["lora", None] * 3, ["kv"] * 6),
        ["lora", "both", "other"] * 2,  # as many rows of each, but none beside its like
    ],
)
def test_rows_of_unlike_memories_equal_the_rows_alone(order, shape, grad):
    memories = mixed()
    batch = BATCHES[shape](6, 21)
    with torch.set_grad_enabled(grad):
        memories.activate(order)
        together = hidden_states(memories.model, **batch)
        for row, domain in enumerate(order):
            memories.activate([domain])
            alone = hidden_states(memories.model, **{k: v[row : row + 1] for k, v in batch.items()})
            chosen = real(batch)[row]
            torch.testing.assert_close(together[row, chosen], alone[0, chosen], atol=1e-5, rtol=0)


def test_gradients_of_unlike_memories_are_those_of_the_rows_alone():
    memories = mixed()
    tensors = [*memories.lora_parameters(), *memories.kv_parameters()]
    together = torch.autograd.grad(read(memories, ROWS).square().sum(), tensors)
    batch = plain_batch(6)["input_ids"]
    rows = [read(memories, [d], {"input_ids": batch[i : i + 1]}) for i, d in enumerate(ROWS)]
    for one, other in zip(together, torch.autograd.grad(torch.cat(rows).square().sum(), tensors), strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, atol=2e-5 * max(1.0, float(other.abs().max())), rtol=0)


@torch.no_grad()
def test_a_memory_added_later_is_the_one_added_at_once_and_leaves_the_others_alone():
    memories = mixed(["lora", "other"])
    before = read(memories, ["lora", "other", None])
    memories.add("both", *KINDS["both"])
    fill_(memories, "both")
    assert torch.equal(read(memories, ["lora", "other", None]), before)
    assert torch.equal(read(memories, ["both"] * 2), read(mixed(), ["both"] * 2))


@torch.no_grad()
def test_removing_a_memory_frees_it_and_leaves_the_others_bit_for_bit():
    memories = mixed()
    rows = ["kv", "lora", None, "other"]
    before = read(memories, rows)
    read(memories, ["both", "kv"])  # kept for the next token, and to be let go of
    gone = [weakref.ref(p) for p in (*memories.lora_parameters("both"), *memories.kv_parameters("both"))]
    assert len(gone) == 2 * 7 * 2 + 2 * 2
    memories.remove("both")
    assert not [ref for ref in gone if ref() is not None]
    assert not [name for part in (memories.model, memories) for name in part.state_dict() if "koff_both" in name]
    assert torch.equal(read(memories, rows), before)
    assert memories.domains == ["lora", "kv", "other"]
    with pytest.raises(KoffError, match="no memory for domain both; domains with one: lora, kv, other"):
        memories.activate(["both"])


@torch.no_grad()
def test_without_its_memories_the_model_is_plain_again():
    memories = mixed()
    for domain in KINDS:
        memories.remove(domain)
    plain = tiny_model("llama", attn_implementation="sdpa")
    assert torch.equal(read(memories, [None] * 3), plain(**plain_batch(3), use_cache=False).logits)
    assert not [*memories.parameters(), *memories.buffers()]
    assert sum(p.numel() for p in memories.model.parameters()) == sum(p.numel() for p in plain.parameters())
    with pytest.raises(KoffError, match="no memory for domain kv; there is none at all"):
        memories.remove("kv")
    memories.add("kv", *KINDS["kv"])
    fill_(memories, "kv")
    assert torch.equal(read(memories, ["kv"]), read(mixed(), ["kv"]))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("domain", ["lora", "kv", "both"])
def test_reading_on_after_the_memory_is_removed_is_refused(domain, grad):
    memories = mixed()
    with torch.set_grad_enabled(grad):
        read(memories, [domain, None, "other"])
        memories.remove(domain)
        with pytest.raises(KoffError, match="a memory that is active was removed: activate the rows' memories anew"):
            memories.model(**plain_batch(3), use_cache=False)
        read(memories, [None, None, "other"])


def test_a_memory_that_is_not_active_can_go_while_others_are_read():
    memories = mixed()
    before = read(memories, ["lora", "other"])
    memories.remove("both")
    assert torch.equal(memories.model(**plain_batch(2), use_cache=False).logits, before)


def test_a_shared_memory_goes_with_its_last_reader():
    memories, _ = bank(lora=LoraSpec(rank=2), kv=KVSpec(4), shared=True)
    fill_(memories, "de")
    before = read(memories, ["de"])
    memories.add("es", LoraSpec(rank=2), KVSpec(4))
    assert torch.equal(read(memories, ["es"]), before)
    with pytest.raises(KoffError, match="share one memory: it takes no further one"):
        memories.add("given", None, KVMemory([(2, 16)] * 2, 4))
    memories.remove("de")
    assert torch.equal(read(memories, ["fr"]), before)
    for domain in ("fr", "es"):
        memories.remove(domain)
    assert not memories.kv and not memories.lora_parameters()


def test_given_matrices_and_slots_are_taken_frozen_as_they_are():
    memories = mixed()
    copy = empty_bank()
    slots = memories.slots("other")
    copy.add("other", KINDS["other"][0], KVMemory.from_tensors(slots.tensors()), memories.weights("other"))
    assert torch.equal(read(copy, ["other"] * 2), read(memories, ["other"] * 2))
    assert not [p for p in (*copy.parameters(), *copy.model.parameters()) if p.requires_grad]
    assert copy.size("other") == memories.size("other")


def test_a_fresh_adapter_is_the_one_peft_makes_of_the_seed():
    torch.manual_seed(3)
    _, model = bank(domains=["de"], lora=LoraSpec(2, targets=["v_proj", "down_proj"]))
    torch.manual_seed(3)
    theirs = inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["v_proj", "down_proj"]), tiny_model("llama"), adapter_name="koff_de"
    )
    expected = {name: tensor for name, tensor in theirs.state_dict().items() if "lora_" in name}
    ours = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_a_fresh_memory_lies_where_the_model_does():
    """No accelerator is at hand in every test: tensors that have only a shape stand for one."""
    memories, model = bank(tiny_model("llama").to("meta"), lora=LoraSpec(3), kv=KVSpec(4))
    made = [*model.parameters(), *memories.parameters()]
    assert len(made) > 4 * 7 and {parameter.device.type for parameter in made} == {"meta"}


@pytest.mark.parametrize("name", ["../x", "", "a/b", "a.b", "ä", "x" * 65, " de"])
def test_an_unsafe_domain_name_is_refused(name):
    memories = empty_bank()
    with pytest.raises(KoffError, match="is not safe as a file name"):
        memories.add(name, LoraSpec(2), None)
    with pytest.raises(KoffError, match="is not safe as a file name"):
        check_name(name)


def test_what_does_not_fit_is_refused_and_changes_nothing():
    memories = mixed()
    before = {name: id(tensor) for name, tensor in memories.model.named_parameters()}
    spec, weights = KINDS["other"][0], memories.weights("other")
    name = next(iter(weights))
    with pytest.raises(KoffError, match="there is a memory 'other' already: remove it first"):
        memories.add("other", spec, None, weights)
    with pytest.raises(KoffError, match=r"layers.0.self_attn.q_proj.lora_A.weight is missing"):
        memories.add("new", spec, None, {k: v for k, v in weights.items() if k != name})
    with pytest.raises(KoffError, match="further is left over"):
        memories.add("new", spec, None, weights | {"further": weights[name]})
    with pytest.raises(KoffError, match=r"is torch.float32 \[5, 63\], due is torch.float32 \[5, 64\]"):
        memories.add("new", spec, None, weights | {name: weights[name][:, 1:]})
    with pytest.raises(KoffError, match=r"is torch.bfloat16 \[5, 64\], due is torch.float32"):
        memories.add("new", spec, None, weights | {name: weights[name].bfloat16()})
    with pytest.raises(KoffError, match=r"heads, head size\) \[\(1, 16\), \(2, 16\)\] but the model has"):
        memories.add("new", spec, KVMemory([(1, 16), (2, 16)], 4), weights)
    assert before == {name: id(tensor) for name, tensor in memories.model.named_parameters()}
    assert memories.domains == list(KINDS)


def test_a_gate_inside_an_adapter_and_a_second_bank_are_refused():
    model = tiny_model("llama")
    BackboneGates(prunable_groups(model)).attach(model)
    memories = empty_bank(model)
    with pytest.raises(KoffError, match="o_proj has a gate, which would end up inside the adapter"):
        memories.add("de", LoraSpec(2), None)
    memories.add("de", LoraSpec(2, targets=["q_proj"]), None)
    with pytest.raises(KoffError, match="this model carries memories already"):
        bank(model)


# --- what is kept between two activations ----------------------------------------------------------------------------


def kept(memories):
    return memories.routes._cache


@pytest.mark.parametrize("rows", [["both"] * 3, ["both", "other", "kv"], ["both", None, "lora"]])
@torch.no_grad()
def test_the_second_step_without_gradients_stacks_nothing_and_reads_the_same(rows, monkeypatch):
    memories = mixed()
    first = read(memories, rows)
    assert kept(memories)
    monkeypatch.setattr(torch, "stack", None)
    monkeypatch.setattr(torch, "cat", None)  # both would be called to build what is kept
    for linear in memories._linears.values():
        assert torch.isfinite(linear(torch.ones(3, 1, linear.in_features))).all()
    for layer in range(2):
        assert memories.read(layer) is memories.read(layer)
    monkeypatch.undo()
    assert torch.equal(memories.model(**plain_batch(3), use_cache=False).logits, first)


@torch.no_grad()
def test_an_adapter_that_all_rows_read_is_not_copied():
    memories = mixed()
    read(memories, ["both"] * 3)
    adapted = [place for place in kept(memories) if isinstance(place, tuple)]
    assert len(adapted) == 2 * 7
    for linear, dtype in adapted:
        (down, up, _), *_ = kept(memories)[linear, dtype]
        halves = linear.lora_A["koff_both"].weight, linear.lora_B["koff_both"].weight
        assert [down.data_ptr(), up.data_ptr()] == [half.data_ptr() for half in halves]


@torch.no_grad()
def test_a_given_adapter_lies_as_one_token_reads_it():
    memories = mixed()
    weights = memories.weights("both")
    memories.add("again", memories.lora("both"), None, weights)
    again = memories.weights("again")
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    assert all(again[name].mT.is_contiguous() for name in again if "lora_B" in name)


def test_nothing_is_kept_with_gradients():
    memories = mixed()
    read(memories, ROWS)
    assert not kept(memories)


def parameters_of(memories, part):
    """One part of the memory of `both`."""
    return memories.lora_parameters("both") if part == "lora" else getattr(memories.slots("both"), part).parameters()


@pytest.mark.parametrize("part", ["lora", "key", "value"])
@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("rows", [["both"] * 3, ["both", "other", "both"]])
def test_what_is_kept_is_never_stale(rows, again, part):
    """Neither after another `activate`, nor without one."""
    memories = mixed()
    with torch.no_grad():
        read(memories, rows)
        for parameter in parameters_of(memories, part):
            parameter.mul_(1.5)
        changed = read(memories, rows) if again else memories.model(**plain_batch(3), use_cache=False).logits
    fresh = mixed()
    with torch.no_grad():
        for parameter in parameters_of(fresh, part):
            parameter.mul_(1.5)
    assert torch.equal(changed, read(fresh, rows).detach())


def test_a_training_step_between_two_evaluations_is_seen():
    memories = mixed()
    rows = ["both", "other", "both"]
    optimizer = torch.optim.AdamW([*memories.lora_parameters(), *memories.kv_parameters()], lr=0.1)

    def evaluate():
        with torch.no_grad():
            return memories.model(**plain_batch(3), use_cache=False).logits

    memories.activate(rows)
    before = evaluate()
    memories.model(**plain_batch(3, seed=1), use_cache=False).logits.square().mean().backward()
    optimizer.step()
    after = evaluate()
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, memories.model(**plain_batch(3), use_cache=False).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_is_kept_is_freed_by_activate_and_remove():
    memories = mixed()
    read(memories, ["both", "other", "kv"])
    stacked = weakref.ref(memories.read(0).key)
    memories.activate(["both", "other", "kv"])
    assert stacked() is None and not kept(memories)
    read(memories, ["both", "other", "kv"])
    stacked = weakref.ref(memories.read(0).key)
    memories.remove("lora")
    assert stacked() is None and not kept(memories)


def test_memories_made_in_inference_mode_are_read():
    with torch.inference_mode():
        memories = mixed()
        first = read(memories, ["both", "other", "kv"])
        assert torch.equal(memories.model(**plain_batch(3), use_cache=False).logits, first)
