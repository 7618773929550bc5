"""The koff_* model types: saved and loaded like any other, with the forward of their family and layers of any width."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_cases import cut_model, left_padded_batch, plain_batch, random_mask, real, sliced_by_hand
from tiny_models import FAMILIES, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from koff_lightning import KoffError, load_backbone
from koff_lightning.artifact import modeling_koff
from koff_lightning.artifact.modeling_koff import MODELS, WIDTHS, KoffLlamaConfig, KoffLlamaForCausalLM
from koff_lightning.backbone import allow_recomputation, hidden_states, prunable_groups

WINDOWS = {
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "gemma3_text": {"sliding_window": 4},
}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def ragged(family, seed=0, **config):
    """A model whose layers keep 1 and 2 of 2 kv groups and unequal FFN widths."""
    model = tiny_model(family, **config)
    groups = prunable_groups(model)
    return cut_model(model, groups, random_mask(groups, seed))


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """A ragged model of each family and the folder that it was saved to."""
    model, folder = ragged(request.param), tmp_path_factory.mktemp(request.param)
    model.config.use_cache = True
    model.save_pretrained(folder)
    return model, folder


def widths(model):
    return [(layer.mlp.up_proj.out_features, layer.self_attn.q_proj.out_features) for layer in model.model.layers]


def test_layers_differ(saved):
    assert len(set(widths(saved[0]))) == 2
    assert {width[1] for width in widths(saved[0])} == {32, 64}


def test_saving_and_loading_changes_nothing(saved):
    model, folder = saved
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), "every tensor found, none left over, none of another shape"
    assert type(loaded) is type(model)
    assert loaded.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(folder)}
    assert torch.equal(loaded(**plain_batch()).logits, model.eval()(**plain_batch()).logits)


@pytest.mark.parametrize("implementation", ["koff", "sdpa", "eager"])
def test_the_attention_function_reaches_every_layer(saved, implementation):
    model, folder = saved
    batch = left_padded_batch()
    expected = model(**batch).logits[real(batch)]
    chosen = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation)
    switched = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    switched.set_attn_implementation(implementation)
    for other in (chosen, switched):
        assert {layer.self_attn.config._attn_implementation for layer in other.model.layers} == {implementation}
        torch.testing.assert_close(other(**batch).logits[real(batch)], expected, atol=1e-5, rtol=0)


def test_attentions_and_hidden_states_are_those_of_the_replaced_layers(saved):
    model = AutoModelForCausalLM.from_pretrained(saved[1], attn_implementation="eager")
    out = model(**plain_batch(), output_attentions=True, output_hidden_states=True)
    assert [attention.shape[1] for attention in out.attentions] == [width[1] // 16 for width in widths(model)]
    assert len(out.hidden_states) == 3


def test_generation_is_the_same_with_and_without_a_cache(saved):
    model = AutoModelForCausalLM.from_pretrained(saved[1])
    batch = left_padded_batch()
    batch.pop("position_ids")
    cached, anew, static = (
        model.generate(**batch, **GREEDY, **options)
        for options in ({"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"})
    )
    assert torch.equal(cached, anew) and torch.equal(static, anew)
    assert cached.shape[1] == 18


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_loading_in_a_dtype(saved, dtype):
    model = AutoModelForCausalLM.from_pretrained(saved[1], dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    for name, tensor in load_file(saved[1] / "model.safetensors").items():
        assert torch.equal(model.get_parameter(name), tensor.to(dtype))
    assert model(**plain_batch()).logits.dtype == dtype


@pytest.mark.parametrize("family", MODELS)
def test_tied_embeddings_stay_one_tensor(family, tmp_path):
    model = ragged(family, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(**plain_batch()).logits, model(**plain_batch()).logits)


@pytest.mark.parametrize("family", WINDOWS)
def test_sliding_windows_stay(family, tmp_path):
    """In the layers that had one: a window of 4 over 12 tokens matters, and is that of the model cut by hand."""
    plain, batch = tiny_model(family, **WINDOWS[family]), plain_batch()
    groups = prunable_groups(plain)
    kept = random_mask(groups)
    cut_model(plain, groups, kept).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    by_hand = sliced_by_hand(_Bare(plain, groups), kept, None)
    torch.testing.assert_close(hidden_states(loaded, **batch), hidden_states(by_hand, **batch), atol=1e-5, rtol=0)
    wide = cut_model(tiny_model(family), groups, kept)
    assert (hidden_states(wide, **batch) - hidden_states(loaded, **batch)).abs().max() > 0.01


class _Bare:
    """What `sliced_by_hand` wants of a case when there are no memories."""

    def __init__(self, model, groups):
        self.plain = self.model = model
        self.groups = groups


def test_gradient_checkpointing_computes_the_layers_again(saved):
    model = AutoModelForCausalLM.from_pretrained(saved[1])
    batch, calls = plain_batch(), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        allow_recomputation(model.train())
    assert len(calls) == 3
    for direct, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, direct)


def test_a_config_without_widths_is_the_plain_model():
    plain = tiny_model("llama")
    config = KoffLlamaConfig(**{k: v for k, v in plain.config.to_dict().items() if k != "model_type"})
    model = KoffLlamaForCausalLM(config).eval()
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(**plain_batch()).logits, plain(**plain_batch()).logits)
    assert config.koff_layers == [{name: getattr(config, name) for name in WIDTHS}] * 2


@pytest.mark.parametrize("family", MODELS)
def test_a_head_size_that_is_not_given_is_the_whole_models(family):
    """Qwen2's config has none, and a layer's own heads must not be asked."""
    config_class, model_class = MODELS[family]
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    given = {"head_dim": 16} if family in ("qwen3", "gemma3_text") else {}  # there the class has one, 128 and 256
    narrow = [{"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8}]
    model = model_class(config_class(**sizes, **given, vocab_size=97, pad_token_id=0, koff_layers=narrow))
    assert model.config.head_dim == 16
    assert model.model.layers[0].self_attn.q_proj.out_features == 32
    assert 0.015 < model.model.layers[0].self_attn.o_proj.weight.std() < 0.025, "initialised as the family does"


def test_head_counts_that_the_family_would_refuse():
    """Llama wants heads that divide the hidden size; a layer need not have that, the model it was cut from has."""
    layers = [
        {"num_attention_heads": 6, "num_key_value_heads": 3},
        {"num_attention_heads": 2, "num_key_value_heads": 1},
    ]
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2}
    model = KoffLlamaForCausalLM(KoffLlamaConfig(**sizes, vocab_size=97, intermediate_size=32, koff_layers=layers))
    assert [layer.self_attn.q_proj.out_features for layer in model.model.layers] == [48, 16]


BAD = {
    "koff_layers has 1 entries for 2 layers": [{}],
    "koff_layers.1. must give intermediate_size, num_attention_heads": [{}, {"intermediate_size": 0}],
    "koff_layers.0. must give .* 'head_dim'": [{"head_dim": 3}, {}],
    "koff_layers.0. must give .* 12.5": [{"intermediate_size": 12.5}, {}],
    "koff_layers.0.: the query heads must divide over the kv heads": [{"num_attention_heads": 3}, {}],
}


@pytest.mark.parametrize("message", BAD)
def test_widths_that_describe_no_model(message):
    with pytest.raises(ValueError, match=message):
        KoffLlamaConfig(num_hidden_layers=2, num_key_value_heads=2, koff_layers=BAD[message])


def test_our_own_loader_takes_a_ragged_folder(saved, tmp_path):
    model, folder = saved
    loaded = load_backbone(str(folder))
    assert torch.equal(hidden_states(loaded, **plain_batch()), hidden_states(model, **plain_batch()))
    broken = shutil.copytree(folder, tmp_path / "broken")
    text = (broken / "config.json").read_text()
    (broken / "config.json").write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(KoffError, match=r"cannot load backbone .*: koff_layers has 2 entries for 3 layers|layer_types"):
        load_backbone(str(broken))


# -------------------------------------------------------------------------------- in a process of its own

BLOCKED = "sys.modules['koff_lightning'] = None"  # importing it raises ImportError, as if it were not installed
KNOWN = "import koff_lightning"


def in_a_fresh_process(prelude, folder, tmp_path, **options):
    """Hidden states and generated tokens of a folder's model, computed by transformers alone after `prelude`."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
    code = f"""
import sys
{prelude}
import torch
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, {arguments})
tokens = torch.load({str(tmp_path / "tokens.pt")!r})
out = {{"logits": model(tokens).logits.detach(), "text": model.generate(tokens, **{GREEDY!r})}}
torch.save(out, {str(tmp_path / "out.pt")!r})
print(type(model).__module__, AutoConfig.from_pretrained({str(folder)!r}, {arguments}).model_type)
"""
    torch.save(plain_batch()["input_ids"], tmp_path / "tokens.pt")
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "out.pt"), done.stdout.split()


@pytest.mark.parametrize("prelude", [KNOWN, BLOCKED], ids=["with the package", "without it"])
def test_the_package_or_the_code_beside_the_weights_suffices(prelude, tmp_path):
    """With the package its classes are used, untouched by the copy; without it the copy alone will do, if trusted."""
    model, folder = ragged("qwen3"), tmp_path / "model"
    model.config.auto_map = {
        "AutoConfig": "modeling_koff.KoffQwen3Config",
        "AutoModelForCausalLM": "modeling_koff.KoffQwen3ForCausalLM",
    }
    model.save_pretrained(folder)
    shutil.copy(modeling_koff.__file__, folder)
    options = {} if prelude is KNOWN else {"trust_remote_code": True}
    out, (module, model_type) = in_a_fresh_process(prelude, folder, tmp_path, **options)
    assert model_type == "koff_qwen3"
    assert module.startswith("koff_lightning." if prelude is KNOWN else "transformers_modules.")
    torch.testing.assert_close(out["logits"], model(**plain_batch()).logits, atol=1e-6, rtol=0)
    model.config.use_cache = True
    assert torch.equal(out["text"], model.generate(**plain_batch(), **GREEDY))


def test_the_file_is_self_contained():
    text = Path(modeling_koff.__file__).read_text()
    assert "koff_lightning" not in text and "from ." not in text


def test_the_types_are_registered():
    for family, (config, model) in MODELS.items():
        assert type(AutoConfig.for_model(f"koff_{family}")) is config
        assert AutoModelForCausalLM._model_mapping[config] is model
