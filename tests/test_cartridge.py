"""A KV memory and peft's CARTRIDGE adapter are the same memory at other positions."""

import json

import pytest
import torch
from peft import CartridgeConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_cases import plain_batch
from tiny_memories import empty_bank, fill_, read
from tiny_models import FAMILIES, YARN_ROPE, tiny_model
from transformers import AutoModelForCausalLM

from koff_lightning import KoffError, KVSpec
from koff_lightning.artifact.cartridge import from_cartridge, to_cartridge
from koff_lightning.artifact.layouts import LAYOUTS
from koff_lightning.backbone import prunable_groups, rotary_inv_freqs
from koff_lightning.kv_memory import KVMemory

# peft asks transformers for something by its former name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

P = 7


def backbone(variant):
    if variant == "uniform":  # one kv head of two is left in each layer, and heads are no longer hidden_size / heads
        model = tiny_model("qwen3")
        groups = prunable_groups(model)
        kept = torch.cat([torch.arange(group.size) % 2 == 1 for group in groups])
        config, state = LAYOUTS["uniform"].backbone(model.config, model.state_dict(), groups, kept)
        cut = AutoModelForCausalLM.from_config(config, attn_implementation="koff")
        cut.load_state_dict(state)
        return cut.eval()
    overrides = {"yarn": {"rope_parameters": YARN_ROPE}, "gemma3_text": {"sliding_window": 64}}.get(variant, {})
    return tiny_model(variant if variant in FAMILIES else "llama", **overrides)


def memory_of(model, seed=0):
    memories = empty_bank(model)
    memories.add("de", None, KVSpec(P))
    fill_(memories, "de", seed)
    return memories


@pytest.mark.parametrize("variant", [*FAMILIES, "yarn", "uniform"])
@torch.no_grad()
def test_pefts_model_gives_our_logits(tmp_path, variant):
    memories = memory_of(backbone(variant))
    freqs = rotary_inv_freqs(memories.model)
    to_cartridge(memories.slots("de"), freqs, tmp_path / "de", "tiny/model")
    theirs = PeftModel.from_pretrained(backbone(variant), tmp_path / "de")
    batch = plain_batch(2)
    expected = read(memories, ["de"] * 2, batch)
    got = theirs(**batch, attention_mask=torch.ones_like(batch["input_ids"]), use_cache=True).logits
    torch.testing.assert_close(got, expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=0)
    assert (expected - read(memories, [None] * 2, batch)).abs().max() > 0.1


@torch.no_grad()
def test_an_adapter_that_peft_made_gives_its_logits_here(tmp_path):
    config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    torch.manual_seed(0)
    theirs = get_peft_model(tiny_model("llama"), config).eval()
    theirs.save_pretrained(tmp_path)
    memories = empty_bank()
    tensors = from_cartridge(tmp_path, rotary_inv_freqs(memories.model))
    memories.add("theirs", None, KVMemory.from_tensors(tensors))
    batch = plain_batch(2)
    expected = theirs(**batch, attention_mask=torch.ones_like(batch["input_ids"]), use_cache=True).logits
    torch.testing.assert_close(read(memories, ["theirs"] * 2, batch), expected, atol=2e-5, rtol=0)


def test_there_and_back_again(tmp_path):
    model = tiny_model("llama3_rope")
    memory = memory_of(model).slots("de")
    tensors = memory.tensors()
    to_cartridge(memory, rotary_inv_freqs(model), tmp_path / "de")
    back = from_cartridge(tmp_path / "de", rotary_inv_freqs(model))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(back[name], tensor, atol=1e-6 if "key" in name else 0, rtol=0)
    assert (
        from_cartridge(tmp_path / "de", rotary_inv_freqs(model)).keys() == KVMemory.from_tensors(back).tensors().keys()
    )


def test_layers_of_unequal_heads_are_refused(tmp_path):
    memory = KVMemory([(2, 16), (1, 16)], P)
    with pytest.raises(KoffError, match="equally many key-value heads; these have 1 to 2: export with --lay"):
        to_cartridge(memory, [torch.ones(8)], tmp_path / "de")
    assert not (tmp_path / "de").exists()


def test_a_folder_that_holds_something_is_not_written_to(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(KoffError, match="is not empty"):
        to_cartridge(KVMemory([(2, 16)], P), [torch.ones(8)], tmp_path)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(tensors, path, *_):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("koff_lightning.artifact.cartridge.save_file", full)
    with pytest.raises(KoffError, match=r"cannot write .*de: .*No space left on device"):
        to_cartridge(KVMemory([(2, 16)], P), [torch.ones(8)], tmp_path / "de")
    assert not list(tmp_path.iterdir())


def test_what_is_no_cartridge_is_refused(tmp_path):
    with pytest.raises(KoffError, match="is not a CARTRIDGE adapter that can be read"):
        from_cartridge(tmp_path / "none", [torch.ones(8)])
    folder = tmp_path / "de"
    to_cartridge(KVMemory([(2, 16)], P), [torch.ones(8)], folder)
    with pytest.raises(KoffError, match=r"\[7, 64\], which is not 7 slots of 1 layers with whole heads of size 24"):
        from_cartridge(folder, [torch.ones(12)])
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, message in {
        ("num_virtual_tokens", 6): "which is not 6 slots",
        ("peft_type", "LORA"): "adapter of type LORA, wanted is CARTRIDGE",
        ("token_dim", None): "that can be read: its token_dim is 'None'",
        ("num_virtual_tokens", 7.5): "that can be read: its num_virtual_tokens is '7.5'",
        ("num_virtual_tokens", float("inf")): "that can be read: its num_virtual_tokens is 'inf'",
        ("num_layers", 0): "that can be read: its num_layers is '0'",
    }.items():
        (folder / "adapter_config.json").write_text(json.dumps(config | dict([change])))
        with pytest.raises(KoffError, match=message):
            from_cartridge(folder, [torch.ones(8)])
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"lora_A": torch.ones(P, 64)}, folder / "adapter_model.safetensors")
    with pytest.raises(KoffError, match="that can be read: its weights hold no prompt_embeddings$"):
        from_cartridge(folder, [torch.ones(8)])
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    with pytest.raises(KoffError, match="holds a peft adapter of type LORA, wanted is CARTRIDGE"):
        from_cartridge(folder, [torch.ones(8)])
    (folder / "adapter_config.json").write_text("[" * 50_000)
    with pytest.raises(KoffError, match="that can be read: .* thousands deep"):
        from_cartridge(folder, [torch.ones(8)])
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(KoffError, match="that can be read"):
        from_cartridge(folder, [torch.ones(8)])


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_numbers_that_are_no_floats_are_refused(tmp_path, dtype):
    to_cartridge(KVMemory([(2, 16)], P), [torch.ones(8)], tmp_path / "de")
    save_file({"prompt_embeddings": torch.ones(P, 64).to(dtype)}, tmp_path / "de" / "adapter_model.safetensors")
    with pytest.raises(KoffError, match=f"prompt_embeddings is {dtype}, which are no keys and values"):
        from_cartridge(tmp_path / "de", [torch.ones(8)])


def test_tensors_that_a_memory_has_no_place_for_are_refused(tmp_path):
    to_cartridge(KVMemory([(2, 16)], P), [torch.ones(8)], tmp_path / "de")
    file = tmp_path / "de" / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.lm_head.weight": torch.ones(3)}, file)
    with pytest.raises(KoffError, match=r"holds more than prompt_embeddings \(base_model.model.lm_head.weight\)"):
        from_cartridge(tmp_path / "de", [torch.ones(8)])
