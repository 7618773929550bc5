"""The bank of memories: who reads what, what is trained, how large it is."""

import pytest
import torch
from tiny_cases import RANK, SLOTS, make_case, plain_batch, run
from tiny_models import tiny_model

from koff_lightning import KoffError, KVSpec, LoraSpec
from koff_lightning.backbone import LORA_TARGETS
from koff_lightning.memory import MemoryBank


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
    loss = model(**plain_batch(), use_cache=False).logits.float().square().mean()
    loss.backward()
    for parameter in (*memories.lora_parameters(), *memories.kv_parameters()):
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None


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
