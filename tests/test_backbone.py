"""Loading every family from disk, what can be removed from it, and one clear line for everything that goes wrong."""

import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from transformers import AutoConfig, BertConfig, BertModel, DynamicCache, MixtralConfig
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from koff_lightning import KoffError, load_backbone, load_tokenizer, loading
from koff_lightning.backbone import (
    attention_modules,
    cache_argument,
    decoder_layers,
    hidden_states,
    kv_shapes,
    parameter_counts,
    prunable_groups,
    rotary_inv_freqs,
)
from koff_lightning.loading import fingerprint

IDS = torch.arange(3, 23).view(2, 10)


@pytest.mark.parametrize(("large", "shown"), [(2**31, False), (0, True)])
def test_only_loading_that_takes_long_shows_a_bar(monkeypatch, capfd, large, shown):
    monkeypatch.setattr(loading, "LARGE", large)
    enable_progress_bar()
    load_backbone("koff-tiny")
    assert ("Loading weights" in capfd.readouterr().err) is shown
    assert is_progress_bar_enabled(), "the caller's setting comes back"
    disable_progress_bar()
    load_backbone("koff-tiny")
    assert not capfd.readouterr().err and not is_progress_bar_enabled()
    enable_progress_bar()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back_frozen_and_the_same(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    loaded = load_backbone(str(tmp_path))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.config.use_cache is False
    assert torch.equal(loaded(IDS).logits, model(IDS, use_cache=False).logits)
    assert torch.equal(loaded.lm_head(hidden_states(loaded, input_ids=IDS)), loaded(IDS).logits)
    assert fingerprint(loaded) == fingerprint(model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_is_as_asked(tmp_path, dtype):
    tiny_model("llama").save_pretrained(tmp_path)
    assert {p.dtype for p in load_backbone(str(tmp_path), dtype=dtype).parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("given", ["eager", "flex_attention"])
def test_the_attention_is_ours_to_choose(tmp_path, given):
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attn_implementation": given}))
    assert load_backbone(str(tmp_path)).config._attn_implementation == "sdpa"


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "models")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_backbone("~/models").config.vocab_size == 97


@pytest.mark.parametrize("family", FAMILIES)
def test_units_and_their_costs(family):
    """A neuron costs 3 d; a kv group 2 G dh d + 2 dh d, and (G + 2) dh biases in Qwen2."""
    model = tiny_model(family, num_attention_heads=8, num_key_value_heads=2)
    d, dh, g = 64, 16, 4
    groups = prunable_groups(model)
    assert [(x.layer, x.kind, x.size) for x in groups] == [
        (i, *u) for i in range(2) for u in (("channel", 96), ("kv_group", 2))
    ]
    channel, heads = groups[:2]
    assert (channel.width, channel.params_per_unit) == (1, 3 * d)
    biases = (g + 2) * dh if family == "qwen2" else 0
    assert (heads.width, heads.params_per_unit) == (g * dh, 2 * g * dh * d + 2 * dh * d + biases)
    for group in groups:
        consumer = model.get_submodule(group.consumer)
        assert consumer.in_features == group.size * group.width
        for path, rows in group.producers:
            assert model.get_submodule(path).out_features == group.size * rows


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_counts(family, tied):
    model = tiny_model(family, tie_word_embeddings=tied)
    counts, d = parameter_counts(model), 64
    units = sum(group.size * group.params_per_unit for group in prunable_groups(model))
    assert counts["body"] == units, "all of the body is prunable where consumers have no bias"
    around, within = (4 if family == "gemma3_text" else 2), family in ("qwen3", "gemma3_text")
    norms = (2 * around + 1) * d + (2 * 2 * 16 if within else 0)
    assert counts["total"] == units + norms + 97 * d * (1 if tied else 2)


def test_a_consumers_bias_stays_with_the_layer():
    model = tiny_model("llama", attention_bias=True, mlp_bias=True)
    channel, heads = prunable_groups(model)[:2]
    assert channel.params_per_unit == 3 * 64 + 2
    assert heads.params_per_unit == (2 * 2 * 16 + 2 * 16) * 64 + (2 + 2) * 16
    units = sum(group.size * group.params_per_unit for group in prunable_groups(model))
    assert parameter_counts(model)["body"] - units == 2 * 2 * 64  # biases of down and o


def test_kinds_can_be_chosen():
    model = tiny_model("llama")
    assert {g.kind for g in prunable_groups(model, ["channel"])} == {"channel"}
    assert {g.kind for g in prunable_groups(model, ("kv_group",))} == {"kv_group"}
    assert len(prunable_groups(model, ["kv_group", "channel"])) == 4


@pytest.mark.parametrize(("kinds", "got"), [(["neuron"], "neuron"), ([], "none"), (["channel", "head"], "head")])
def test_unknown_kinds_are_named(kinds, got):
    with pytest.raises(KoffError, match=f"some of channel, kv_group, .*; got {got}"):
        prunable_groups(tiny_model("llama"), kinds)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_inside_of_a_model(family):
    model = tiny_model(family)
    assert len(decoder_layers(model)) == len(attention_modules(model)) == 2
    assert kv_shapes(model) == [(2, 16)] * 2
    assert [freq.shape for freq in rotary_inv_freqs(model)] == [(8,)] * model.config.num_hidden_layers


def test_the_fingerprint_tells_weights_apart():
    model = tiny_model("llama")
    first = fingerprint(model)
    assert fingerprint(tiny_model("llama")) == first != fingerprint(tiny_model("llama", seed=1))
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    assert fingerprint(model) != first
    assert len(fingerprint(tiny_model("llama").bfloat16())) == 64


# ------------------------------------------------------------------------------------------------- bad input


def refused(source, message, **options):
    with pytest.raises(KoffError, match=message) as caught:
        load_backbone(str(source), **options)
    assert "\n" not in str(caught.value), "one line"
    assert len(str(caught.value)) < 400
    return str(caught.value)


def test_a_missing_folder(tmp_path):
    refused(tmp_path / "nowhere", "no such folder")
    refused("./nowhere", "no such folder")
    refused("some/where/deep", "no such folder")


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path / "notes.txt", "that is a file, and none in GGUF")


def test_a_folder_without_a_model(tmp_path):
    refused(tmp_path, r"no config\.json")


def test_a_missing_gguf(tmp_path):
    refused(tmp_path / "model.gguf", "no such file.*koff fetch")


def test_a_gguf_that_is_none(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"not a model at all" * 10)
    refused(tmp_path / "model.gguf", "cannot load backbone")


@pytest.mark.parametrize("config", [BertConfig(), MixtralConfig()])
def test_an_architecture_that_is_not_supported(config, tmp_path):
    config.save_pretrained(tmp_path)
    refused(tmp_path, f"'{config.model_type}' model; supported families are llama, mistral, qwen2, qwen3")


def test_an_architecture_that_nobody_knows(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "perceptron"}')
    refused(tmp_path, "perceptron.*does not recognize this architecture")


def test_a_config_that_is_not_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json")


def test_a_folder_without_weights(tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path)
    refused(tmp_path, "cannot load backbone.*no file named")


def test_a_broken_weight_file(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    refused(tmp_path, "cannot load backbone")


def test_weights_that_lack_a_layer(tmp_path):
    """transformers would fill the third layer with random numbers and only print a table."""
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused(tmp_path, "lack")


def test_weights_of_another_shape(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    refused(tmp_path, "cannot load backbone")


def test_an_unknown_dtype(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    refused(tmp_path, "dtype.*flaot32", dtype="flaot32")


def test_an_encoder_saved_as_a_folder(tmp_path):
    BertModel(BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        tmp_path
    )
    refused(tmp_path, "'bert' model")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that answers everything with one status and error code."""
    answer = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(answer["status"])
            for key, value in answer["headers"].items():
                self.send_header(key, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    use_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield lambda status, **headers: answer.update(status=status, headers=headers)
    server.shutdown()
    server.server_close()


def use_hub(monkeypatch, address):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )


def test_a_gated_model(hub):
    hub(403, **{"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model koff-test/gated is restricted"})
    refused("koff-test/gated", "access is restricted.*hf auth login")


def test_a_private_or_misspelt_model(hub):
    hub(401, **{"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository Not Found"})
    assert "koff-test/mispelt" in refused("koff-test/mispelt", "spelling|restricted")


def test_a_model_that_is_not_there(hub):
    hub(404, **{"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository Not Found"})
    refused("koff-test/nothing", "no such model on the hub")


def test_a_revision_that_is_not_there(hub):
    hub(404, **{"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id: v9"})
    refused("koff-test/model", "revision|v9", revision="v9")


def test_no_network(monkeypatch):
    use_hub(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the hub's retries
    said = []
    monkeypatch.setattr(
        logging.getLogger("huggingface_hub"), "handlers", [SimpleNamespace(level=0, handle=said.append)]
    )
    refused("koff-test/model", "hub cannot be reached.*koff-tiny")
    with pytest.raises(KoffError, match="hub cannot be reached"):
        load_tokenizer("koff-test/model")
    assert said == [], "the hub's new attempts are not told"


def test_a_number_is_looked_for_on_no_hub(monkeypatch):
    use_hub(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it asks the hub"))
    refused("5", "'5' is a number, and no such folder: give a folder")


def test_offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("koff-test/model", "no copy of it from the hub, which is switched off.*koff-tiny")


def test_a_tokenizer_that_is_not_there(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(KoffError, match=r"cannot load (tokenizer|backbone)") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_error_of_ours_is_not_taken_for_bad_input(tmp_path, monkeypatch):
    """A bug must show its traceback, not pass for a user's mistake."""
    tiny_model("llama").save_pretrained(tmp_path)

    def broken(**_):
        raise TypeError("a bug")

    monkeypatch.setattr(AutoConfig, "from_pretrained", broken)
    with pytest.raises(TypeError, match="a bug"):
        load_backbone(str(tmp_path))


# ---------------------------------------------------------------------------------------------------- GGUF


def write_gguf(path, model):
    """A GGUF as llama.cpp writes it: rotary halves interleaved, no tokenizer."""
    gguf = pytest.importorskip("gguf")
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
    parts |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {
        f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")
    }
    names |= {
        f"model.layers.{i}.{a}": f"blk.{i}.{b}" for i in range(config.num_hidden_layers) for a, b in parts.items()
    }
    for name, tensor in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows = tensor.shape[0] // config.head_dim
            tensor = tensor.view(rows, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names[name.removesuffix(".weight")] + ".weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_the_model_it_was_made_from(tmp_path):
    model = tiny_model("llama")
    write_gguf(tmp_path / "tiny.gguf", model)
    loaded = load_backbone(str(tmp_path / "tiny.gguf"))
    torch.testing.assert_close(loaded(IDS).logits, model(IDS, use_cache=False).logits, atol=1e-5, rtol=0)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert prunable_groups(loaded) == prunable_groups(model)
    assert loaded.config.use_cache is False


def test_a_truncated_gguf(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    whole = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "tiny.gguf", "cannot load backbone")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_tokens_cache_is_handed_over_by_the_name_that_this_release_has_for_it(family):
    model, cache = tiny_model(family), DynamicCache()
    model(IDS, use_cache=True, **{cache_argument(model): cache})  # another name: a warning or an error
    assert cache.get_seq_length() == IDS.shape[1]
