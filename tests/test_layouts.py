"""What each layout writes computes what the gated model computes, in the form that its readers expect."""

import copy
import functools
import inspect
import json
from typing import get_args

import pytest
import torch
from deci_loader import deci_logits, ffn_width
from safetensors.torch import save_file
from tiny_cases import ALPHA, RANK, make_case, plain_batch, random_mask, run
from tiny_models import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM

from koff_lightning import KoffError
from koff_lightning.artifact.layouts import LAYOUTS, layer_widths, layout_named
from koff_lightning.artifact.modeling_koff import MODELS, KoffDeciConfig
from koff_lightning.attention import LayerMemory
from koff_lightning.backbone import hidden_states, prunable_groups
from koff_lightning.commands.export_cli import export_checkpoint
from koff_lightning.kv_memory import KVMemory
from koff_lightning.surgery import masks, merge_lora, zero_kv, zero_state

CUT = ("ragged", "uniform", "merged")


def uniform_mask(groups, channels, heads):
    """Other units in every layer, as many in each."""
    random = torch.Generator().manual_seed(0)
    counts = {"channel": channels, "kv_group": heads}
    scores = [torch.rand(group.size, generator=random) for group in groups]
    return torch.cat([s.argsort().argsort() < counts[g.kind] for s, g in zip(scores, groups, strict=True)])


def mask_for(layout, groups):
    return uniform_mask(groups, 50, 1) if layout == "uniform" else random_mask(groups)


def written(config, state, folder):
    """The model that a stock `from_pretrained` finds in a folder with this config and these weights."""
    config.save_pretrained(folder)
    save_file({name: t.clone() for name, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, attn_implementation="koff")
    assert not any(info.values())
    return model


def peft_state(case, domain):
    key = f".koff_{domain}."
    found = {name: tensor for name, tensor in case.model.state_dict().items() if key in name}
    return {f"base_model.model.{name.replace(key, '.')}": tensor.clone() for name, tensor in found.items()}


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("deci", "merged")])
@pytest.mark.parametrize("family", FAMILIES)
def test_written_backbones_are_the_gated_model(family, layout, tmp_path):
    case, batch = make_case(family), plain_batch()
    kept = mask_for(layout, case.groups)
    config, state = LAYOUTS[layout].backbone(case.plain.config, case.plain.state_dict(), case.groups, kept)
    model = written(config, state, tmp_path)
    expected = run(case, batch, kept=kept)
    torch.testing.assert_close(hidden_states(model, **batch), expected, atol=1e-5, rtol=0)
    assert (run(case, batch) - expected).abs().max() > 0.1, "the mask must matter"
    plain = case.plain.config.model_type
    assert model.config.model_type == (f"koff_{plain}" if layout == "ragged" else plain)
    found = json.loads((tmp_path / "config.json").read_text())
    assert found["architectures"] == [type(model).__name__]
    assert found["head_dim"] == 16 and found["dtype"] == "float32" and found["use_cache"]
    assert "_name_or_path" not in found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_backbone_with_its_memory_beside_it(family, tmp_path):
    case, batch = make_case(family), plain_batch()
    kept, tensors = random_mask(case.groups), case.bank.kv["koff_fr"].tensors()
    state = merge_lora(case.plain.state_dict(), peft_state(case, "fr"), ALPHA / RANK)
    model = written(*LAYOUTS["merged"].backbone(case.plain.config, state, case.groups, kept), tmp_path)
    lora, kv = LAYOUTS["merged"].memory(None, tensors, case.groups, kept)
    assert lora is None
    expected = run(case, batch, ["fr"] * 3, kept)
    hang(model, kv)
    torch.testing.assert_close(hidden_states(model, **batch), expected, atol=1e-5, rtol=0)


def hang(model, kv):
    """Let every row read one KV memory."""
    memory = KVMemory.from_tensors(kv)
    for index, layer in enumerate(model.model.layers):
        pair = [part[None] for part in memory.layer(index)]  # each [1, K, P, dh]
        layer.self_attn.koff_memory = functools.partial(LayerMemory, *pair)


@pytest.mark.parametrize("layout", ["ragged", "uniform", "masked"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_memory_fits_the_backbone_of_its_layout(family, layout, tmp_path):
    case, batch = make_case(family), plain_batch()
    kept = mask_for(layout, case.groups)
    config, state = LAYOUTS[layout].backbone(case.plain.config, case.plain.state_dict(), case.groups, kept)
    lora, kv = LAYOUTS[layout].memory(peft_state(case, "de"), case.bank.kv["koff_de"].tensors(), case.groups, kept)
    model = written(config, merge_lora(state, lora, ALPHA / RANK), tmp_path)
    hang(model, kv)
    torch.testing.assert_close(hidden_states(model, **batch), run(case, batch, ["de"] * 3, kept), atol=1e-5, rtol=0)
    assert LAYOUTS[layout].shapes == ("full" if layout == "masked" else "cut")


@pytest.mark.parametrize("width", [96, 768])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stored_memory_has_the_dense_shapes_again(layout, width):
    """Every number that the mask keeps is where it was, every other one is zero."""
    case = make_case("qwen2", intermediate_size=width)
    kept = random_mask(case.groups)
    lora, kv = peft_state(case, "de"), case.bank.kv["koff_de"].tensors()
    stored = LAYOUTS[layout].memory(lora, kv, case.groups, kept)
    shapes = [part and {name: tensor.shape for name, tensor in part.items()} for part in stored]
    back = LAYOUTS[layout].dense_memory(*stored, case.groups, kept)
    expected = (None if layout == "merged" else zero_state(lora, case.groups, kept), zero_kv(kv, case.groups, kept))
    for found, due in zip(back, expected, strict=True):
        assert (found is None) == (due is None)
        assert found is None or found.keys() == due.keys()
        assert all(torch.equal(tensor, due[name]) for name, tensor in (found or {}).items())
    assert (shapes[1] == {name: tensor.shape for name, tensor in kv.items()}) == (layout in ("masked", "deci"))
    if layout not in ("masked", "merged"):
        with pytest.raises(KoffError, match="rows, its units have"):
            LAYOUTS[layout].dense_memory(lora, kv, case.groups, kept)


def test_every_layout_says_what_can_be_done_with_it():
    def those(trait):
        return [name for name, layout in LAYOUTS.items() if getattr(layout, trait)]

    assert all(layout is layout_named(name) and layout.name == name for name, layout in LAYOUTS.items())
    assert those("folds") == ["merged"]
    assert those("takes_domains") == ["ragged", "uniform"]
    assert those("takes_biases") == ["ragged", "masked", "merged"]
    assert those("has_code") == ["ragged", "deci", "merged"]
    assert those("in_transformers") == ["ragged", "uniform", "masked", "merged"]
    assert set(get_args(inspect.signature(export_checkpoint).parameters["layout"].annotation)[0].__args__) == {*LAYOUTS}
    for name in (None, ["ragged"], "Ragged"):
        with pytest.raises(KoffError, match="layout must be one of ragged, uniform, deci, masked, merged; got"):
            layout_named(name)


@pytest.mark.parametrize("layout", CUT)
def test_what_removes_nothing_stays_a_plain_model(layout):
    model = tiny_model("qwen3")
    groups = prunable_groups(model)
    everything = torch.ones(sum(g.size for g in groups), dtype=torch.bool)
    config, state = LAYOUTS[layout].backbone(model.config, model.state_dict(), groups, everything)
    assert config.model_type == "qwen3"
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert LAYOUTS[layout].memory(None, None, groups, everything) == (None, None)


def test_what_travels_in_the_config():
    rope = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 128}
    model = tiny_model("llama", eos_token_id=[2, 5], tie_word_embeddings=True, rope_parameters=rope, rms_norm_eps=1e-5)
    model = model.to(torch.bfloat16)
    model.config.use_cache, model.config.name_or_path = False, "/somewhere/secret"
    model.config.quantization_config = {"quant_method": "gguf"}
    groups, before = prunable_groups(model), copy.deepcopy(model.config.to_dict())
    for layout in ("ragged", "masked"):
        config, _ = LAYOUTS[layout].backbone(model.config, model.state_dict(), groups, random_mask(groups))
        values = config.to_dict()
        for name in ("eos_token_id", "tie_word_embeddings", "rope_parameters", "rms_norm_eps", "vocab_size"):
            assert values[name] == before[name], name
        assert values["dtype"] == "bfloat16" and values["use_cache"] is True
        assert "quantization_config" not in values and "secret" not in json.dumps(values)
    assert model.config.to_dict() == before, "the model's own config is left alone"


def test_a_ragged_model_is_written_again_as_it_is():
    """As when a domain is added to an artifact: nothing more is removed, the widths stay."""
    model = tiny_model("llama")
    groups = prunable_groups(model)
    config, state = LAYOUTS["ragged"].backbone(model.config, model.state_dict(), groups, random_mask(groups))
    cut = AutoModelForCausalLM.from_config(config)
    cut.load_state_dict(state)
    left = prunable_groups(cut)
    everything = torch.ones(sum(g.size for g in left), dtype=torch.bool)
    for layout in ("ragged", "masked"):
        again, weights = LAYOUTS[layout].backbone(cut.config, cut.state_dict(), left, everything)
        assert again.to_dict() == config.to_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in state.items())
    with pytest.raises(KoffError, match="'uniform' wants one intermediate_size for all layers, the mask leaves"):
        LAYOUTS["uniform"].backbone(cut.config, cut.state_dict(), left, everything)
    with pytest.raises(KoffError, match="'deci' has one number of query heads for all layers, the model has 2 to 4"):
        LAYOUTS["deci"].backbone(cut.config, cut.state_dict(), left, everything)


def test_a_uniform_llama_with_heads_that_its_config_refuses():
    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    groups = prunable_groups(model)
    three = uniform_mask(groups, 96, 3)
    with pytest.raises(KoffError, match=r"a plain llama config cannot say what is left \(ValueError: The hidden size"):
        LAYOUTS["uniform"].backbone(model.config, model.state_dict(), groups, three)
    assert LAYOUTS["ragged"].backbone(model.config, model.state_dict(), groups, three)[0].model_type == "koff_llama"


def test_masks_that_no_layout_can_write():
    model = tiny_model("llama")
    groups = prunable_groups(model)
    kept = random_mask(groups)
    with pytest.raises(KoffError, match="layout must be one of ragged, uniform, deci, masked, merged; got 'onnx'"):
        layout_named("onnx")
    with pytest.raises(KoffError, match="'uniform' wants one intermediate_size .* sparsity.layout: uniform"):
        LAYOUTS["uniform"].backbone(model.config, model.state_dict(), groups, kept)
    empty = torch.cat([part & (group.layer != 1) for group, part in masks(groups, kept)])
    with pytest.raises(KoffError, match="layer 1 keeps no channel at all: raise sparsity.min_channels"):
        LAYOUTS["ragged"].backbone(model.config, model.state_dict(), groups, empty)


# ------------------------------------------------------------------------------------------------------ deci


def deci_folder(case, kept, folder):
    config, state = LAYOUTS["deci"].backbone(case.plain.config, case.plain.state_dict(), case.groups, kept)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: t.clone() for n, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
    return config, state


FORMS = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("width", [96, 768])
@pytest.mark.parametrize("form", FORMS)
def test_an_independent_reader_computes_the_gated_model(form, width, tmp_path):
    """96 is written as it is; 768 as `ffn_mult`, hence in steps of 256."""
    case = make_case(form.split()[0], intermediate_size=width, **FORMS[form])
    kept, batch = random_mask(case.groups), plain_batch()
    config, state = deci_folder(case, kept, tmp_path)
    hidden = run(case, batch, kept=kept)
    logits = deci_logits(tmp_path, batch["input_ids"])
    torch.testing.assert_close(logits, case.model.lm_head(hidden), atol=1e-4, rtol=0)
    assert (logits - case.plain(**batch).logits).abs().max() > 0.1, "the mask must matter"
    parts = [part for group, part in masks(case.groups, kept) if group.kind == "channel"]
    found = [ffn_width(block["ffn"], 64) for block in config["block_configs"]]
    counts = [int(part.sum()) for part in parts]
    assert found == (counts if width == 96 else [-(-count // 256) * 256 for count in counts])
    assert {tuple(sorted(block["ffn"])) for block in config["block_configs"]} == {
        ("intermediate_size" if width == 96 else "ffn_mult", "no_op", "replace_with_linear")
    }
    cut = written(LAYOUTS["deci"].ragged_config(config, case.plain.config.model_type), state, tmp_path / "ragged")
    torch.testing.assert_close(hidden_states(cut, **batch), hidden, atol=1e-5, rtol=0, msg="our own reading of it")
    assert sum(t.numel() for t in state.values()) < sum(t.numel() for t in case.plain.state_dict().values())


@pytest.mark.parametrize("width", [96, 768])
def test_a_memory_fits_the_deci_backbone(width, tmp_path):
    case, batch = make_case("llama", intermediate_size=width), plain_batch()
    kept = random_mask(case.groups)
    lora, kv = LAYOUTS["deci"].memory(peft_state(case, "law"), case.bank.kv["koff_law"].tensors(), case.groups, kept)
    _, state = deci_folder(case, kept, tmp_path)
    save_file(merge_lora(state, lora, ALPHA / RANK), tmp_path / "model.safetensors")
    with case.bank.off():
        case.bank.kv.clear()  # this reader has no place for it
    case.bank.activate(["law"] * 3)
    for layer in case.model.model.layers:
        layer.self_attn.koff_memory = None
    case.gates.set(kept.float()[None])
    expected = case.model.lm_head(hidden_states(case.model, **batch))
    torch.testing.assert_close(deci_logits(tmp_path, batch["input_ids"]), expected, atol=1e-4, rtol=0)
    assert LAYOUTS["deci"].shapes == "deci"
    gone = [part for group, part in masks(case.groups, kept) if group.kind == "kv_group"]
    for index, part in enumerate(gone):
        assert kv[f"layers.{index}.key"].shape[0] == 2
        assert not kv[f"layers.{index}.key"][~part].any() and kv[f"layers.{index}.value"][part].all()


def test_real_widths_come_back_from_ffn_mult():
    """Through the rounding to six digits that the format's own reader applies."""
    for hidden in (576, 896, 1536, 2048, 3584, 4096, 8192):
        for width in range(256, 4 * hidden, 256):
            assert ffn_width({"ffn_mult": 3 * width / (2 * hidden)}, hidden) == width


def test_engines_read_block_configs_as_attributes(tmp_path):
    """Copied code in the folder gives them that; transformers itself does not know the model type."""
    case = make_case("qwen2", intermediate_size=512)
    values, _ = deci_folder(case, random_mask(case.groups), tmp_path)
    config = KoffDeciConfig.from_pretrained(tmp_path)
    block = config.block_configs[1]
    assert block.attention.n_heads_in_group == 2 and block.attention.no_op is False
    assert block.ffn.ffn_mult == values["block_configs"][1]["ffn"]["ffn_mult"]
    assert not hasattr(block.ffn, "intermediate_size")
    assert config.rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}
    assert config.qkv_bias and not config.attention_bias
    config.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["block_configs"] == values["block_configs"]


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("qwen3", {}, "'deci' is for llama, mistral, qwen2; its format has no q/k norms, as 'qwen3' needs"),
        ("mistral", {"sliding_window": 4}, "'deci' has no sliding windows, the model has one of 4 tokens"),
    ],
)
def test_models_that_deci_cannot_express(family, config, message):
    model = tiny_model(family, **config)
    groups = prunable_groups(model)
    with pytest.raises(KoffError, match=message):
        LAYOUTS["deci"].backbone(model.config, model.state_dict(), groups, random_mask(groups))


def test_scaled_rotary_embeddings_in_the_spelling_of_deci():
    model = tiny_model("llama3_rope")
    groups = prunable_groups(model)
    config, _ = LAYOUTS["deci"].backbone(model.config, model.state_dict(), groups, random_mask(groups))
    assert config["rope_theta"] == 10_000.0 and "rope_parameters" not in config
    assert config["rope_scaling"]["rope_type"] == "llama3" and config["rope_scaling"]["factor"] == 8.0
    assert "rope_theta" not in config["rope_scaling"]


@pytest.mark.parametrize("family", MODELS)
def test_widths_are_named_as_the_config_names_them(family):
    model = tiny_model(family)
    groups = prunable_groups(model)
    kept = uniform_mask(groups, 40, 1)
    widths = {"intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}
    assert layer_widths(model.config, groups, kept) == [widths] * 2
