"""The memory that two memories make together is what compose.py says it computes."""

import pytest
import torch
from peft import PeftModel
from tiny_cases import plain_batch
from tiny_memories import KINDS, empty_bank, fill_, mixed, read, written
from tiny_models import tiny_model

from koff_lightning import KoffError, KVSpec, LoraSpec
from koff_lightning.artifact.compose import compose
from koff_lightning.attention import LayerMemory
from koff_lightning.memory import MemoryBank

# peft asks transformers for something by its former name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@torch.no_grad()
def test_the_adapters_add_up_as_peft_adds_them(tmp_path):
    memories = empty_bank()
    for domain, spec in {"a": LoraSpec(3, 7.0), "b": LoraSpec(5, 6.0)}.items():  # peft wants one set of targets
        memories.add(domain, spec, None)
        fill_(memories, domain)
        written(tmp_path / domain, memories, domain)
    theirs = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    theirs.add_weighted_adapter(["a", "b"], [0.7, -1.2], "c", combination_type="cat")
    theirs.set_adapter("c")
    compose(memories, "a", "b", "c", (0.7, -1.2))
    expected = theirs(**plain_batch(2), use_cache=False).logits
    got = read(memories, ["c"] * 2)
    torch.testing.assert_close(got, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    assert memories.lora("c").rank == 8
    assert (got - read(memories, ["a"] * 2)).abs().max() > 0.1


@torch.no_grad()
def test_adapters_of_unlike_targets_add_up_in_every_linear():
    memories = mixed()
    compose(memories, "lora", "other", "c", (2.0, 0.5))
    deltas = {}
    for domain in ("lora", "other", "c"):
        weights, spec = memories.weights(domain), memories.lora(domain)
        for name in weights:
            if "lora_A" in name:
                update = spec.alpha / spec.rank * weights[name.replace("lora_A", "lora_B")] @ weights[name]
                deltas.setdefault(name, {})[domain] = update
    assert {name.split(".")[-3] for name in deltas if "c" in deltas[name]} == {"q_proj", "down_proj", "v_proj"}
    for parts in deltas.values():
        expected = 2.0 * parts.get("lora", 0) + 0.5 * parts.get("other", 0)
        if "c" in parts:
            torch.testing.assert_close(parts["c"], expected)


@torch.no_grad()
def test_the_slots_of_both_are_read_at_their_own_positions_in_any_order():
    memories = mixed()
    compose(memories, "both", "other", "ab", (0.0, 0.0))  # no adapters: only slots are left
    compose(memories, "other", "both", "ba", (0.0, 0.0))
    got = read(memories, ["ab"] * 2)
    model = tiny_model("llama")
    for index, layer in enumerate(model.model.layers):
        pairs = [memories.slots(domain).layer(index) for domain in ("both", "other")]
        whole = LayerMemory(*(torch.cat(parts, dim=1)[None] for parts in zip(*pairs, strict=True)))
        layer.self_attn.koff_memory = lambda whole=whole: whole
    expected = model(**plain_batch(2), use_cache=False).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(read(memories, ["ba"] * 2), got, atol=1e-5, rtol=0)
    assert memories.slots("ab").slots == 8 and memories.slots("ab").source_hash is None


@torch.no_grad()
def test_a_part_that_one_lacks_is_the_others():
    memories = mixed()
    before = read(memories, [*KINDS, None])
    compose(memories, "lora", "kv", "c", (1.0, 1.0))
    assert memories.lora("c").rank == KINDS["lora"][0].rank and memories.slots("c").slots == KINDS["kv"][1].slots
    for name, tensor in memories.weights("c").items():
        factor = KINDS["lora"][0].alpha if "lora_A" in name else 1.0
        assert torch.equal(tensor, factor * memories.weights("lora")[name])
    assert torch.equal(read(memories, [*KINDS, None]), before), "the two stay as they are"
    memories.add("slots", None, KVSpec(2))
    compose(memories, "kv", "slots", "d")
    assert memories.lora("d") is None


def test_what_cannot_be_composed_is_refused():
    memories = mixed()
    with pytest.raises(KoffError, match="two memories are wanted, got 'kv' and 'kv'"):
        compose(memories, "kv", "kv", "c")
    with pytest.raises(KoffError, match="no memory for domain es; domains with one: both, lora"):
        compose(memories, "kv", "es", "c")
    with pytest.raises(KoffError, match="weights must be finite numbers, got 1.0 and nan"):
        compose(memories, "kv", "lora", "c", (1.0, float("nan")))
    with pytest.raises(KoffError, match="there is a memory 'both' already"):
        compose(memories, "kv", "lora", "both")
    with pytest.raises(KoffError, match="'../c' is not safe"):
        compose(memories, "kv", "lora", "../c")
    assert memories.domains == list(KINDS)
    shared = MemoryBank(tiny_model("llama"), ["a", "b"], LoraSpec(2), None, shared=True)
    with pytest.raises(KoffError, match="which are one"):
        compose(shared, "a", "b", "c")
