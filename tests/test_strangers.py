"""Files of strangers: what differs from what it should be is said in one line, and nothing else comes of it."""

import json
import logging
import os
import re
import shutil
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_artifact import tiny_artifact
from tiny_models import FAMILIES, tiny_model
from tiny_run import RandomText, tiny_module, tiny_trainer
from tiny_tasks import toy_tasks

from koff_lightning import KoffError, KOFFModule, load_backbone, load_decomposed, load_tokenizer
from koff_lightning.artifact.checkpoint import from_checkpoint, read_checkpoint
from koff_lightning.artifact.folder import FORMAT, describe_file, read_manifest
from koff_lightning.callbacks import RunReport
from koff_lightning.cli import main
from koff_lightning.data import encoding
from koff_lightning.loading import load_config
from koff_lightning.model_files import heads
from koff_lightning.support.yaml_files import read_yaml, refuse_duplicate_keys

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "reliability"))
from strangers import Bench
from strangers import run as run_fuzz

IDS = torch.arange(3, 23).view(2, 10)


def saved(folder, family="llama", **options):
    tiny_model(family, **options).save_pretrained(folder)
    return folder


def refused(folder, message, load=load_backbone):
    with pytest.raises(KoffError, match=message) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def edit(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def add(folder, **tensors):
    file = folder / "model.safetensors"
    save_file(
        load_file(file) | {name.replace("__", "."): value for name, value in tensors.items()}, file, {"format": "pt"}
    )


# --------------------------------------------------------------------- tensors that the model has no place for


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.mlp.down_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight",
        "model.layers.0.self_attn.sinks",
        "whatever",
    ],
)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_tensor_without_a_place(tmp_path, family, name):
    saved(tmp_path, family)
    add(tmp_path, **{name: torch.zeros(3)})
    refused(tmp_path, "hold 1 tensors that the model of its config has no place for, first .*" + name.split(".")[-1])


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma3_text"])  # newer than such files
def test_rotary_buffers_are_harmless(tmp_path, family):
    model = tiny_model(family)
    saved(tmp_path, family)
    add(tmp_path, **{"model.rotary_emb.inv_freq": torch.zeros(8)})
    add(tmp_path, **{f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(8) for i in range(2)})
    assert torch.equal(load_backbone(str(tmp_path))(IDS).logits, model(IDS, use_cache=False).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_output_under_a_tied_config(tmp_path, family):
    saved(tmp_path, family, tie_word_embeddings=True)
    embeddings = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    add(tmp_path, lm_head__weight=embeddings.clone())
    loaded = load_backbone(str(tmp_path))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    add(tmp_path, lm_head__weight=embeddings + 1e-3)
    refused(tmp_path, "ties the output to the input embeddings, and its files hold an output that differs")


@pytest.mark.parametrize("name", ["layers.0.mlp.up_proj.weight", "model.model.layers.0.mlp.up_proj.weight"])
def test_a_tensor_that_is_there_twice(tmp_path, name):
    """Transformers takes names with and without the prefix, and of two for one place it drops one without a word."""
    saved(tmp_path)
    add(tmp_path, **{name: torch.ones(96, 64)})
    refused(tmp_path, r"hold one tensor twice, as .*layers\.0\.mlp\.up_proj\.weight and as .*: keep the right one")


def test_names_without_the_prefix_alone_are_read(tmp_path):
    saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    short = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(short, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(load_backbone(str(tmp_path))(IDS).logits, tiny_model("llama")(IDS, use_cache=False).logits)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool, torch.complex64])
def test_weights_that_are_no_floats(tmp_path, dtype, pickled):
    saved(tmp_path)
    add(tmp_path, model__norm__weight=torch.ones(64).to(dtype))
    if pickled:
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "hold model.norm.weight as .*unquantised")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_are_read(tmp_path, zipped):
    saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert torch.equal(load_backbone(str(tmp_path))(IDS).logits, tiny_model("llama")(IDS, use_cache=False).logits)


# --------------------------------------------------------------------------------------- which file, and where


def sharded(folder):
    tiny_model("llama").save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder / "model.safetensors.index.json"


def test_weights_that_may_not_be_read(tmp_path, monkeypatch):
    """safetensors calls them not there, which they are."""
    tiny_model("llama").save_pretrained(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)
    (tmp_path / "model.safetensors").write_bytes(b"as unreadable as without the right to")
    with pytest.raises(KoffError, match=r"cannot read .*model\.safetensors: you may not: correct its rights"):
        load_backbone(str(tmp_path))


def test_shards_are_read(tmp_path):
    sharded(tmp_path)
    assert torch.equal(load_backbone(str(tmp_path))(IDS).logits, tiny_model("llama")(IDS, use_cache=False).logits)


def test_a_single_file_beside_an_index(tmp_path):
    sharded(tmp_path)
    save_file(tiny_model("llama", seed=1).state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    refused(tmp_path, "model.safetensors lies beside model.safetensors.index.json, and they may hold different weights")


@pytest.mark.parametrize("name", ["../other/x.safetensors", "/{}/other/x.safetensors", "..", "sub/x.safetensors", 3])
def test_an_index_that_leads_outside(tmp_path, name):
    index = sharded(tmp_path / "m")
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    for place in (tmp_path / "other", tmp_path / "m" / "sub"):
        place.mkdir()
        shutil.copy(tmp_path / "m" / content["weight_map"][first], place / "x.safetensors")
    name = name.format(tmp_path) if isinstance(name, str) else name
    same = content["weight_map"][first]
    content["weight_map"] = {k: name if v == same else v for k, v in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    refused(tmp_path / "m", "which is no file beside it")


def test_an_index_and_its_files_that_differ(tmp_path):
    index = sharded(tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(content))
    refused(tmp_path, "against its index, model.norm.weight")
    content["weight_map"]["x"] = "nowhere.safetensors"
    index.write_text(json.dumps(content))
    refused(tmp_path, "names nowhere.safetensors, which is missing")


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}, "metadata": {}}', "null", "{"]
)
def test_an_index_of_another_kind(tmp_path, content):
    sharded(tmp_path).write_text(content)
    refused(tmp_path, "weight_map|object|valid JSON")


def test_links_out_of_the_folder(tmp_path):
    saved(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    os.symlink("../elsewhere.safetensors", tmp_path / "m" / "model.safetensors")
    refused(tmp_path / "m", "is a link to ../elsewhere.safetensors, outside the folder")
    hub = tmp_path / "hub" / "models--a--b"
    (hub / "blobs").mkdir(parents=True)
    (tmp_path / "elsewhere.safetensors").rename(hub / "blobs" / "abc")
    snapshot = hub / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (tmp_path / "m" / "config.json").rename(snapshot / "config.json")
    os.symlink("../../blobs/abc", snapshot / "model.safetensors")
    assert load_backbone(str(snapshot)), "the hub's cache is made of links"


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "model.safetensors", ".hidden"])
def test_a_pipe_among_the_files(tmp_path, name):
    """Who reads it waits for ever."""
    saved(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    for load in (load_backbone, load_tokenizer):
        refused(tmp_path, f"{name} is a pipe or a device, which may never end", load)


def test_a_model_of_the_hub_is_held_to_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("b" * 40)
    (tmp_path / "models--some--model" / "refs").mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs" / "main").write_text("b" * 40)
    saved(snapshot)
    assert torch.equal(load_backbone("some/model")(IDS).logits, tiny_model("llama")(IDS, use_cache=False).logits)
    assert load_backbone("some/model", revision="b" * 40)
    add(snapshot, model__norm__weight=torch.ones(64, dtype=torch.int8))
    with pytest.raises(KoffError, match="'some/model': its weights hold model.norm.weight as I8, .* unquantised"):
        load_backbone("some/model")


def test_a_shard_of_a_distributed_checkpoint(tmp_path):
    saved(tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "shard-00001-model-00001-of-00001.safetensors")
    refused(tmp_path, "is of a sharded checkpoint")


# ----------------------------------------------------------------------------- what config.json may not ask for


def test_an_adapter_beside_the_weights(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("import os\nos.mkdir('executed')\n")
    saved(tmp_path / "m")
    about = {"peft_type": "LORA", "megatron_core": "mine", "auto_mapping": {"parent_library": "mine"}}
    (tmp_path / "m" / "adapter_config.json").write_text(json.dumps(about))
    refused(tmp_path / "m", "adapter_config.json lies among its files")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"attn_implementation": "someone/kernel"}, "asks for the attention 'someone/kernel'"),
        ({"attn_implementation": "flash_attention_2"}, "asks for the attention 'flash_attention_2'"),
        ({"_attn_implementation": "someone/kernel@main:f"}, "asks for the attention"),
        ({"experts_implementation": "x/y"}, "asks for a kernel"),
        ({"fusion_config": {"a": True}}, "asks for other modules"),
        ({"transformers_weights": "other.safetensors"}, "names another weight file"),
        ({"return_dict": False}, "sets return_dict to False, which no run can use"),
        ({"output_attentions": True}, "sets output_attentions to True"),
        ({"final_logit_softcapping": 30.0}, "sets final_logit_softcapping: it caps its logits.*take another backbone"),
        ({"attn_logit_softcapping": 50.0}, "sets attn_logit_softcapping: it caps its attention scores"),
        ({"use_bidirectional_attention": True}, "sets use_bidirectional_attention: it lets tokens see"),
        ({"per_layer_config": {"0": {"intermediate_size": 8}}}, "gives layers options of their own"),
        ({"attribute_map": {"rms_norm_eps": "attention_dropout"}}, "gives its entries other names"),
        ({"save_pretrained": 3}, "has an entry 'save_pretrained', which transformers calls"),
        ({"is_heterogeneous": True}, "has an entry 'is_heterogeneous', which transformers calls"),
    ],
)
def test_what_a_config_may_not_ask_for(tmp_path, entries, message):
    edit(saved(tmp_path) / "config.json", **entries)
    refused(tmp_path, message)
    refused(tmp_path, message, load_config)


def test_a_config_in_place_of_the_one_that_was_looked_at(tmp_path):
    """Transformers takes the newest of `configuration_files` that its release is due, and reads nothing else."""
    content = json.loads((saved(tmp_path) / "config.json").read_text())
    (tmp_path / "config.4.0.0.json").write_text(json.dumps(content | {"attn_implementation": "someone/kernel"}))
    edit(tmp_path / "config.json", configuration_files=["config.4.0.0.json"])
    for load in (load_backbone, load_config):
        refused(tmp_path, r"names another config, .* \(configuration_files\)", load)


QUANTISED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


@pytest.mark.parametrize("entry", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_folders(tmp_path, method, entry):
    edit(saved(tmp_path) / "config.json", **{entry: QUANTISED[method]})
    for load in (load_backbone, load_config):
        refused(tmp_path, rf"is of a quantised model \({method}\).*get the unquantised weights", load)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, outside 1 to"),
        ({"num_hidden_layers": 2000}, "speaks of 2000 layers, its files lack them"),
        ({"hidden_size": "64"}, "hidden_size is text"),
        ({"hidden_size": True}, "hidden_size is true or false"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, outside"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_key_value_heads": 3}, "cannot load backbone"),
        ({"head_dim": -16}, "head_dim is -16"),
        ({"sliding_window": 0}, "sliding_window is 0, outside"),
        ({"query_pre_attn_scalar": -24}, "query_pre_attn_scalar is -24, outside"),
        ({"hidden_activation": 3}, "hidden_activation is a number"),
        ({"vocab_size": 1e9}, "vocab_size is a number|vocab_size is 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ({"hidden_act": "nothing"}, "cannot load backbone"),
        ({"hidden_act": 3}, "hidden_act is a number"),
        ({"rope_parameters": []}, "rope_parameters is a list"),
        ({"rope_parameters": ["yarn"]}, "rope_parameters is a list"),
        ({"rope_scaling": 3}, "rope_scaling is a number"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "cannot load backbone"),
        ({"rope_parameters": {"rope_type": ["default"]}}, "rope_type is a list"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0, "rope_theta": 1e4}}, "factor is 0, outside"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta is text"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e-300}}, "rope_theta is 1e-300, outside"),
        ({"pad_token_id": 97}, "pad_token_id 97 is beyond the 97 rows of the embeddings: set it to null"),
        ({"bos_token_id": 97}, "bos_token_id 97 is beyond the 97 rows of the embeddings: set it to null"),
        ({"eos_token_id": [2, 98]}, "eos_token_id 98 is beyond the 97 rows of the embeddings: set it to null"),
        ({"pad_token_id": "<pad>"}, "pad_token_id is text"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id is a list"),
        ({"eos_token_id": 10**30}, "eos_token_id is 1000.*, which is no token's number"),
        ({"eos_token_id": [2, -7]}, "eos_token_id is -7, which is no token's number"),
        ({"model_type": ["llama"]}, "model_type is a list"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is text"),
        ({"auto_map": "x"}, "auto_map is text"),
        ({"layer_types": ["spiral"] * 2}, "cannot load backbone"),
    ],
)
def test_entries_of_another_kind_or_size(tmp_path, entries, message):
    edit(saved(tmp_path) / "config.json", **entries)
    refused(tmp_path, message)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        "3",
        '"x"',
        "{",
        "",
        "\xff",
        "[" * 100_000,
        '{"a":' * 5000 + "1" + "}" * 5000,
        '{"a": ' + "9" * 9000 + "}",
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_files_of_another_kind(tmp_path, name, text):
    (saved(tmp_path) / name).write_text(text, encoding="latin-1")
    refused(tmp_path, "JSON|object|deep|cannot load")


# ------------------------------------------------------------------------------------ checkpoints of `koff fit`


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with its checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    trainer = tiny_trainer(folder, [RunReport()])
    trainer.fit(tiny_module(folder), RandomText(8))
    trainer.save_checkpoint(folder / "run.ckpt")
    return folder


def spoilt(run, folder, change):
    """A copy of the checkpoint with `change` done to it."""
    content = torch.load(run / "run.ckpt", weights_only=True)
    change(content)
    torch.save(content, folder / "bad.ckpt")
    return str(folder / "bad.ckpt")


def put(*path):
    """What writes the last of `path` to the place that the others name."""

    def change(content):
        *names, last, value = path
        for name in names:
            content = content[name]
        content[last] = value(content[last]) if callable(value) else value

    return change


def knot(_):
    values = {}
    values["again"] = [values]
    return values


def many(_):
    values = [1]
    for _ in range(35):
        values = [values, values]
    return values


LORA = "model.backbone.model.layers.0.self_attn.q_proj.lora_A.koff_en.weight"


def points_of(content):
    return content["callbacks"]["RunReport"]["history"]["points"]


BAD = {
    "a tensor that is none": put("state_dict", LORA, "text"),
    "a tensor that is a list": put("state_dict", LORA, [1.0]),
    "sparse": put("state_dict", LORA, lambda x: x.to_sparse()),
    "complex": put("state_dict", LORA, lambda x: x + 0j),
    "int8": put("state_dict", LORA, lambda x: x.to(torch.int8)),
    "half": put("state_dict", LORA, lambda x: x.half()),
    "another shape": put("state_dict", LORA, lambda x: x[:1]),
    "nan": put("state_dict", LORA, lambda x: x * float("nan")),
    "many numbers that are one": put("state_dict", LORA, torch.zeros(1).expand(10**12)),
    "a name that is a number": put("state_dict", 3, torch.zeros(1)),
    "a tensor without a place": put("state_dict", "model.memories.kv.koff_en.more", torch.zeros(1)),
    "an adapter for a domain that is not there": put("state_dict", LORA.replace("_en", "_xx"), torch.zeros(2, 32)),
    "hardened is several": put("state_dict", "model.gates.hardened", torch.ones(3, dtype=torch.bool)),
    "hardened is a number": put("state_dict", "model.gates.hardened", torch.tensor(1.0)),
    "kept is numbers": put("state_dict", "model.gates.kept", lambda x: x.float()),
    "no logits": lambda content: content["state_dict"].pop("model.gates.logits"),
    "no gates": lambda content: [content["state_dict"].pop(k) for k in list(content["state_dict"]) if "gates" in k],
    "a step that is a dictionary": put("global_step", {}),
    "a step that is true": put("global_step", True),
    "a step below": put("global_step", -7),
    "a history that is a number": put("callbacks", "RunReport", "history", 3),
    "a history without points": put("callbacks", "RunReport", "history", {"every": 1}),
    "points of nothing": put("callbacks", "RunReport", "history", "points", [None]),
    "a point that lost a group": lambda content: points_of(content)[1]["removed"].pop(),
    "points that changed places": lambda content: points_of(content).reverse(),
    "a point of a later step": lambda content: points_of(content)[-1].update(step=10**6),
    "a share of more than all": lambda content: points_of(content)[0]["removed"].__setitem__(0, 3.5),
    "schedulers that are text": put("lr_schedulers", "x"),
    "schedulers of nothing": put("lr_schedulers", [None]),
    "optimizers that are numbers": put("optimizer_states", 3),
    "optimizers of nothing": put("optimizer_states", [{}]),
    "an optimizer that lost an average": lambda content: content["optimizer_states"][0]["state"][0].pop("exp_avg"),
    "an optimizer that lost a parameter": lambda content: content["optimizer_states"][0]["state"].pop(0),
    "a release that is none": put("pytorch-lightning_version", "x"),
    "an optimizer of another shape": put("optimizer_states", 0, "state", 0, "exp_avg", torch.zeros(1, 1)),
    "an optimizer that counts in complex numbers": put(
        "optimizer_states", 0, "state", 0, "step", torch.tensor(3.0, dtype=torch.complex64)
    ),
    "an optimizer rounded to halves": lambda content: content["optimizer_states"][0]["state"][0].update(
        {name: part.half() for name, part in content["optimizer_states"][0]["state"][0].items()}
    ),
    "an optimizer that counts to infinity": put("optimizer_states", 0, "state", 0, "step", torch.tensor(float("inf"))),
    "an optimizer whose average is a number": put("optimizer_states", 0, "state", 0, "exp_avg", 0.5),
    "an optimizer that has not begun": put("optimizer_states", 0, "state", 0, "step", torch.tensor(0.0)),
    "an optimizer that is ahead of its run": put("optimizer_states", 0, "state", 0, "step", torch.tensor(99.0)),
    "an optimizer that counts in halves": put("optimizer_states", 0, "state", 0, "step", torch.tensor(1.5)),
    "an optimizer of a parameter with a name": put("optimizer_states", 0, "state", "0x", {}),
    "an optimizer of a parameter too many": put("optimizer_states", 0, "state", 10**4, {}),
    "an optimizer that keeps nothing": put("optimizer_states", 0, "state", 0, []),
    "loops without a fit": put("loops", {}),
    "loops of nothing": put("loops", "fit_loop", None),
    "loops of other steps": put(
        *("loops", "fit_loop", "epoch_loop.automatic_optimization.optim_progress", "optimizer", "step", "total"),
        {"ready": 3, "completed": 3},
    ),
    "loops of no steps": put(
        *("loops", "fit_loop", "epoch_loop.automatic_optimization.optim_progress", "optimizer", "step", "total"),
        {"ready": 6, "completed": 0},
    ),
    "a loop that counts in text": put(*("loops", "fit_loop", "epoch_loop.batch_progress", "total", "processed"), "x"),
    "a loop that steps in text": put("loops", "fit_loop", "epoch_loop.state_dict", "_batches_that_stepped", "x"),
    "no place in the data": put("loops", "fit_loop", "epoch_progress", {}),
    "units of nothing": put("hyper_parameters", "sparsity", "units", None),
    "units that are numbers": put("hyper_parameters", "sparsity", "units", [1, 2]),
    "a target that is text": put("hyper_parameters", "sparsity", "target", "0.2"),
    "another gate": put("hyper_parameters", "sparsity", "gate", "x"),
    "a rank that is a list": put("hyper_parameters", "lora", "rank", [2]),
    "a rank that is true": put("hyper_parameters", "lora", "rank", True),
    "targets of nothing": put("hyper_parameters", "lora", "targets", None),
    "slots that are text": put("hyper_parameters", "kv", "slots", "4"),
    "domains that are text": put("hyper_parameters", "domains", "en"),
    "domains that lead outside": put("hyper_parameters", "domains", ["../..", "law"]),
    "sparsity that is a list": put("hyper_parameters", "sparsity", []),
    "a backbone that is a number": put("hyper_parameters", "backbone", 3),
    "a dtype that is a number": put("hyper_parameters", "dtype", 3),
    "targets of an adapter said twice": put("koff", "lora", "targets", 1, []),
    "an adapter that is said to be another": put("koff", "lora", "rank", 3),
    "a hash that is a number": put("koff", "backbone_hash", 3),
    "no hash": lambda content: content["koff"].pop("backbone_hash"),
    "a target of the mask that is a list": put("koff", "target", []),
    "a target that is not finite": put("koff", "target", float("nan")),
    "a target beyond all": put("koff", "target", 7.0),
    "a target below nothing": put("koff", "target", -1.0),
    "a placement of nothing that there is": put("koff", "placement", {"whatever": [0]}),
    "a placement that is a number": put("koff", "placement", {"lora": 1}),
    "another placement that is one": put("koff", "placement", {"whatever": 1}),
    "values in themselves": put("callbacks", "RunReport", knot),
    "values that multiply": put("callbacks", "RunReport", "tokens", many),
}


@pytest.mark.parametrize("case", BAD)
def test_a_checkpoint_of_another_kind(run, tmp_path, case):
    path = spoilt(run, tmp_path, BAD[case])
    with pytest.raises(KoffError) as caught:
        from_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["whatever", LORA.removeprefix("model.")])
def test_what_only_a_subclass_has_a_place_for(run, tmp_path, name):
    """Such a tensor is no part of the decomposition, and no part of ours."""
    path = spoilt(run, tmp_path, put("state_dict", name, torch.zeros(2, 32)))
    assert from_checkpoint(path).gates.hardened
    with pytest.raises(KoffError, match=f"1 tensors? that this run has no place for, first {re.escape(name)}"):
        KOFFModule.load_from_checkpoint(path)


@pytest.mark.parametrize(
    "case", ["sparse", "units of nothing", "no gates", "no logits", "kept is numbers", "a hash that is a number"]
)
def test_a_mask_of_it(run, tmp_path, case):
    path = spoilt(run, tmp_path, BAD[case])
    with pytest.raises(KoffError, match="not as `koff fit` writes|does not fit|lacks|written by another release"):
        tiny_trainer(tmp_path, []).fit(tiny_module(run, mask=path), RandomText(2))


@pytest.mark.parametrize(
    "case", ["sparse", "a step that is a dictionary", "points of nothing", "optimizers of nothing"]
)
def test_a_run_does_not_go_on_from_it(run, tmp_path, case):
    path = spoilt(run, tmp_path, BAD[case])
    with pytest.raises(KoffError, match="not as `koff fit` writes one"):
        tiny_trainer(tmp_path, [RunReport()]).fit(tiny_module(run), RandomText(8), ckpt_path=path, weights_only=True)


def gone_on(run, folder, path):
    """What is trained after the steps that a checkpoint leaves to come."""
    module = tiny_module(run)
    tiny_trainer(folder, [RunReport()], steps=12).fit(module, RandomText(12), ckpt_path=path, weights_only=True)
    return {name: part for name, part in module.state_dict().items() if name in module.owned()}


def other_options(content):
    for group in content["optimizer_states"][0]["param_groups"]:
        group |= {"betas": (0.1, 0.1), "eps": 3.0, "weight_decay": 0.5, "maximize": not group["maximize"], "lr": 7.0}
    content["lr_schedulers"][0] |= {"lr_lambdas": [3], "base_lrs": [9.0], "more": 1}


IN_MID_EPOCH = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")


@IN_MID_EPOCH
def test_a_run_that_goes_on_takes_no_options_of_the_optimizer_from_a_file(run, tmp_path):
    wanted = gone_on(run, tmp_path, spoilt(run, tmp_path, lambda content: None))
    found = gone_on(run, tmp_path, spoilt(run, tmp_path, other_options))
    assert all(torch.equal(part, found[name]) for name, part in wanted.items())


def test_a_run_does_not_begin_its_text_anew(tmp_path, capsys):
    words = ["fit", "demo.yaml", f"--trainer.default_root_dir={tmp_path}", "--export.enabled=false"]
    words += ["--data.domains={de: bundled:de, en: bundled:en}", "--data.seq_len=64", "--data.batch_size=2"]
    words += ["--data.max_heldout_bytes=1000", "--data.max_train_bytes=9000"]
    assert main([*words, "--trainer.max_steps=2"]) == 0
    path = next(tmp_path.glob("version_0/checkpoints/last.ckpt"))
    content = torch.load(path, weights_only=True)
    places = content["loops"]["fit_loop"]["state_dict"].pop("combined_loader")
    odd = {
        "an entry of combined_loader must be a dictionary, and is str 'x'": ["x"],
        "an entry of combined_loader lacks order": [{"batches": 2}],
        "batches must be a count, and is int -1": [places[0] | {"batches": -1}],
        "order must be dict, and is list": [places[0] | {"order": []}],
    }
    for message, found in {"does not say where its text stood": [], **odd}.items():
        content["loops"]["fit_loop"]["state_dict"]["combined_loader"] = found
        torch.save(content, path)
        capsys.readouterr()
        assert main([*words, "--trainer.max_steps=3", f"--ckpt_path={path}"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bos_token_id", "pad_token_id", "eos_token_id"])
def test_tokens_of_generation_config(tmp_path, name):
    saved(tmp_path, "llama")
    (tmp_path / "generation_config.json").write_text(json.dumps({name: 97}))
    refused(tmp_path, f"generation_config.json cannot be used: {name} 97 is beyond the 97 rows of the embeddings")
    (tmp_path / "generation_config.json").write_text(json.dumps({name: 96}))
    load_backbone(str(tmp_path))
    for odd in (10**30, -7) if name == "eos_token_id" else ([1, 2], 10**30, -7):
        (tmp_path / "generation_config.json").write_text(json.dumps({name: odd}))
        refused(tmp_path, f"{name} is")


def test_a_manifest_with_what_is_no_number(tmp_path):
    (tmp_path / "koff.json").write_text(json.dumps({"format_version": FORMAT, "sparsity": {"total": float("nan")}}))
    with pytest.raises(KoffError, match="holds NaN or Infinity for a number"):
        read_manifest(tmp_path)


def flattened(content):
    for entry in content["optimizer_states"][0]["state"].values():
        entry |= {name: part.flatten() for name, part in entry.items() if part.ndim}


@IN_MID_EPOCH
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content["optimizer_states"][0]["param_groups"][0]["params"].append(999), "has groups of"),
        (flattened, "for a parameter of shape"),
    ],
)
def test_an_optimizer_of_other_parameters_is_refused(run, tmp_path, spoil, message):
    with pytest.raises(KoffError, match=message):
        gone_on(run, tmp_path, spoilt(run, tmp_path, spoil))


@pytest.mark.parametrize("case", ["sparse", "units of nothing", "values in themselves"])
def test_an_export_of_it_is_one_line(run, tmp_path, capsys, case):
    path = spoilt(run, tmp_path, BAD[case])
    assert main(["export", "--ckpt", path, "--out", str(tmp_path / "out")]) == 2
    assert "is not as `koff fit` writes one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_sound_is_taken(run, tmp_path):
    assert read_checkpoint(run / "run.ckpt")["global_step"] == 8
    module = from_checkpoint(run / "run.ckpt")
    assert module.realised_sparsity() > 0


# --------------------------------------------------------------------------------------------------- configs


YAMLS = {
    "itself": "data: &a\n  domains: *a\n",
    "a list of itself": "&a [*a]\n",
    "multiplying": "a0: &a0 [1, 1]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
    "merging": "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{p: *a{i - 1}, q: *a{i - 1}}}\n" for i in range(1, 30)),
    "deep": "a: " + "[" * 20_000 + "]" * 20_000,
    "fairly deep": "a: " + "[" * 70 + "]" * 70,
    "deep mappings": "".join(f"{' ' * i}a:\n" for i in range(3000)),
    "digits": "a: " + "9" * 20_000,
    "large": "a: " + "x" * (5 * 2**20),
    "bytes": b"a: \xff\xfe",
    "a date that is none": "a: 2026-13-77",
    "a key that is a list": "[1, 2]: 3",
}


@pytest.mark.parametrize("case", YAMLS)
def test_a_config_that_is_endless_or_huge(tmp_path, capsys, case):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text := YAMLS[case], bytes) else text.encode())
    with pytest.raises(KoffError, match=r"c\.yaml") as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)
    if case not in ("a date that is none", "a key that is a list"):  # jsonargparse reads by its own rules
        with pytest.raises(KoffError, match=r"c\.yaml"):
            refuse_duplicate_keys(path)


def test_aliases_that_a_config_may_have(tmp_path):
    (tmp_path / "c.yaml").write_text("a: &a {x: [1, 2]}\nb: *a\nc: {<<: *a, y: 2}\n")
    refuse_duplicate_keys(tmp_path / "c.yaml")
    assert read_yaml(tmp_path / "c.yaml")["c"] == {"x": [1, 2], "y": 2}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"include_path": "tasks"}, "task files may run Python of their own"),
        ({"tasks": ["tasks/mine.yaml"]}, "task files may run Python of their own"),
        ({"tasks": "koff_cloze, tasks/mine.yaml"}, "task files may run Python of their own"),
        ({"confirm_run_unsafe_code": True}, "says confirm_run_unsafe_code, which lets code of others run"),
        ({"trust_remote_code": True}, "says trust_remote_code, which lets code of others run"),
        ({"tasks": [{"task": "mine"}]}, "config.tasks must be str, and is list"),
        ({"num_fewshot": [1]}, "config.num_fewshot must be a count, and is list"),
        ({"output_path": 3}, "config.output_path must be str, and is int 3"),
        ({"use_cache": [3]}, "config.use_cache must be str, and is list"),
    ],
)
def test_a_config_of_lm_eval_runs_nothing(tmp_path, monkeypatch, capsys, entries, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.py").write_text("import os\nos.mkdir('executed')\ndef f(x):\n    return x\n")
    task = "task: mine\ndataset_path: json\noutput_type: loglikelihood\ndoc_to_text: !function mine.f\n"
    (tmp_path / "tasks" / "mine.yaml").write_text(task)
    (tmp_path / "c.yaml").write_text(json.dumps(entries))
    assert main(["lm-eval", "--model", "koff-tiny", "--tasks", "mine", "--config", "c.yaml"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "executed").exists()


def test_a_config_of_lm_eval_with_the_switch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    toy_tasks(tmp_path / "tasks")
    (tmp_path / "c.yaml").write_text("include_path: tasks\nlimit: -1\n")
    words = ["lm-eval", "--model", "koff-tiny", "--tasks", "toy_choose", "--config", "c.yaml"]
    assert main([*words, "--allow-custom-classes"]) == 2
    assert "limit must be a number of samples" in capsys.readouterr().err, "the tasks of the folder were read"
    assert main(words) == 2
    assert "task files may run Python" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- artifacts and memories


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An artifact with the memories of three domains."""
    return tiny_artifact(tmp_path_factory.mktemp("made")).folder


@pytest.fixture
def artifact(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "artifact"))


LINKS = {
    "hidden folder": ".cache",
    "hidden folder in the backbone": "backbone/.cache",
    "folder in a memory": "memories/de/.more",
    "file": "backbone/LICENSE.md",
}


@pytest.mark.parametrize("place", LINKS)
def test_links_in_an_artifact(artifact, tmp_path, capsys, place):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("mine")
    os.symlink(secret / "key" if place == "file" else secret, artifact / LINKS[place])
    assert main(["memory", "remove", str(artifact), "fr"]) == 2
    assert "outside the folder" in capsys.readouterr().err
    assert (secret / "key").stat().st_nlink == 1
    assert (artifact / "memories" / "fr").is_dir(), "nothing was changed"
    with pytest.raises(KoffError, match="outside the folder"):
        load_decomposed(artifact)


def test_an_adapter_in_the_backbone_of_an_artifact(artifact):
    """Hidden by a manifest that lists it: the hashes are the stranger's own."""
    (artifact / "backbone" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    content = json.loads((artifact / "koff.json").read_text())
    content["files"]["backbone/adapter_config.json"] = describe_file(artifact / "backbone" / "adapter_config.json")
    (artifact / "koff.json").write_text(json.dumps(content))
    with pytest.raises(KoffError, match="adapter_config.json lies among its files"):
        load_decomposed(artifact)


@pytest.mark.parametrize("name", [".hidden.safetensors", "../../dense/model.safetensors"])
def test_an_index_in_the_backbone_of_an_artifact(artifact, name):
    """What the manifest does not list is not read."""
    place = artifact / "backbone"
    (place / "model.safetensors").rename(place / ".hidden.safetensors")
    names = dict.fromkeys(heads(place / ".hidden.safetensors"), name)
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    for verify in (True, False):
        with pytest.raises(KoffError):
            load_decomposed(artifact, verify=verify)


@pytest.mark.parametrize("file", ["koff.json", "memories/de/memory.json", "backbone/tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "[" * 50_000, '{"a": ' + "9" * 9000 + "}", ""])
def test_json_files_of_an_artifact(artifact, file, text):
    (artifact / file).write_text(text)
    with pytest.raises(KoffError) as caught:
        load_decomposed(artifact, verify=False).tokenizer  # noqa: B018
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def made_deci(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("deci"), layout="deci").folder


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"attn_implementation": "somebody/kernel"}, "asks for the attention 'somebody/kernel'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "of a quantised model"),
        ({"transformers_weights": "x"}, "names another weight file"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_parameters": []}, "rope_parameters is a list"),
        ({"num_hidden_layers": 99}, "not as koff-lightning writes it"),
        ({"num_attention_heads": None}, "not as koff-lightning writes it"),
        ({"block_configs": [3]}, "not as koff-lightning writes it"),
        ("[" * 50_000, "thousands deep"),
        ("[]", "holds a list"),
        ("{}", "not as koff-lightning writes it"),
    ],
)
def test_the_config_of_layout_deci(made_deci, tmp_path, entries, message):
    """Transformers has no class for it, so it is read apart from all others: by the same rules."""
    folder = Path(shutil.copytree(made_deci, tmp_path / "artifact"))
    file = folder / "backbone" / "config.json"
    file.write_text(entries) if isinstance(entries, str) else edit(file, **entries)
    Bench._hash_anew(folder)
    refused(folder, message, load_decomposed)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"use_rslora": True}, "asks for use_rslora, so peft would compute otherwise"),
        ({"alpha_pattern": {"q_proj": 99}}, "asks for alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "asks for modules_to_save"),
        ({"exclude_modules": ["q_proj"]}, "asks for exclude_modules"),
        ({"layers_pattern": "blocks"}, "asks for layers_pattern"),
        ({"init_lora_weights": "pissa"}, "asks for init_lora_weights"),
        ({"bias": "all"}, "not of LoRA alone"),
        ({"peft_type": "LOHA"}, "not of LoRA alone"),
        ({"target_modules": [{"a": 1}]}, "disagree about rank, alpha, targets or layers"),
        ({"r": None}, "disagree about rank, alpha, targets or layers"),
        ("[" * 50_000, "thousands deep"),
        ("[]", "holds a list"),
    ],
)
def test_the_config_of_an_adapter(artifact, entries, message):
    """What peft makes of the folder is what we make of it."""
    file = artifact / "memories" / "de" / "adapter_config.json"
    file.write_text(entries) if isinstance(entries, str) else edit(file, **entries)
    Bench._hash_anew(artifact)
    refused(artifact, message, load_decomposed)


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"model": {"type": "BPE"}}', '{"version": "1.0", "model": null}', "\x00", "{" * 3000]
)
def test_a_tokenizer_of_another_kind(artifact, text):
    (artifact / "backbone" / "tokenizer.json").write_text(text)
    with pytest.raises(KoffError, match="cannot load") as caught:
        load_tokenizer(str(artifact / "backbone"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("entries", [{"model_max_length": {}}, {"chat_template": 3}, {"padding_side": ["left"]}])
def test_options_of_a_tokenizer_of_another_kind(artifact, entries):
    edit(artifact / "backbone" / "tokenizer_config.json", **entries)
    refused(artifact / "backbone", f"{next(iter(entries))} is a", load_tokenizer)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"fast_tokenizer_files": ["../outside/tokenizer.4.0.0.json"]}, "fast_tokenizer_files is .*files beside it"),
        ({"fast_tokenizer_files": 3}, "fast_tokenizer_files is 3"),
        ({"tokenizer_file": "{}/tokenizer.json"}, "tokenizer_file names .*not a file of this folder"),
        ({"tokenizer_class": "GPT2Tokenizer", "vocab": "{}/vocab.json", "merges": "{}/merges.txt"}, "vocab names"),
        ({"tokenizer_class": "GPT2Tokenizer", "init_inputs": ["{}/vocab.json", "{}/merges.txt"]}, "init_inputs gives"),
    ],
    ids=lambda part: next(reversed(part)) if isinstance(part, dict) else "",
)
def test_a_tokenizer_of_another_folder(artifact, tmp_path, entries, message):
    """Transformers opens some of what tokenizer_config.json names: not hashed, and whatever lies there."""
    outside, home = tmp_path / "outside", artifact / "backbone"
    outside.mkdir()
    content = json.loads((home / "tokenizer.json").read_text())
    for name in ("tokenizer.json", "tokenizer.4.0.0.json"):
        (outside / name).write_text(json.dumps(content))
    (outside / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2}))
    (outside / "merges.txt").write_text("#version\na b\n")
    if "init_inputs" in entries or "vocab" in entries:
        (home / "tokenizer.json").unlink()
    edit(home / "tokenizer_config.json", **json.loads(json.dumps(entries).replace("{}", str(outside))))
    Bench._hash_anew(artifact)
    refused(artifact, message, lambda folder: load_decomposed(folder).tokenizer)


def test_where_a_tokenizer_was_once_is_harmless(artifact, tmp_path):
    """Older releases of transformers wrote it down, and nothing is read from there."""
    shutil.copytree(artifact / "backbone", tmp_path / "model")
    places = {"tokenizer_file": "/nowhere/tokenizer.json", "special_tokens_map_file": __file__, "init_inputs": []}
    edit(tmp_path / "model" / "tokenizer_config.json", **places)
    assert load_tokenizer(str(tmp_path / "model"))("fox")["input_ids"]


def test_a_tokenizer_of_the_hub_is_held_to_the_same(artifact, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("b" * 40)
    (tmp_path / "models--some--model" / "refs").mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs" / "main").write_text("b" * 40)
    shutil.copytree(artifact / "backbone", snapshot)
    model = json.loads((snapshot / "config.json").read_text()) | {"model_type": "llama"}
    (snapshot / "config.json").write_text(json.dumps(model))
    assert load_tokenizer("some/model")("fox")["input_ids"]
    edit(snapshot / "tokenizer_config.json", tokenizer_file=str(artifact / "backbone" / "tokenizer.json"))
    with pytest.raises(KoffError, match="tokenizer_file names .*not a file of this folder"):
        load_tokenizer("some/model")


@pytest.mark.parametrize("kind", ["nan", "inf"])
@pytest.mark.parametrize("file", ["memories/de/adapter_model.safetensors", "backbone/model.safetensors"])
def test_numbers_that_are_not_finite(artifact, file, kind):
    tensors = load_file(artifact / file)
    first = sorted(tensors)[0]
    tensors[first].view(-1)[0] = float(kind)
    save_file(tensors, artifact / file, {"format": "pt"})
    Bench._hash_anew(artifact)
    with pytest.raises(KoffError, match="not finite"):
        load_decomposed(artifact)


def split_by(artifact, pattern):
    place = artifact / "backbone" / "tokenizer.json"
    content = json.loads(place.read_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    place.write_text(json.dumps(content | {"pre_tokenizer": split}))
    Bench._hash_anew(artifact)


def test_a_pattern_that_never_ends(artifact, capfd):
    split_by(artifact, "(a|aa)+$b")
    assert main(["generate", "--model", str(artifact), "--prompt", "a" * 60, "--max_new_tokens", "2"]) == 2
    said = capfd.readouterr().err.splitlines()
    assert "a tokenizer cannot be used, it failed in the middle of a text" in said[-1]


@pytest.mark.parametrize("verb", ["generate", "lm-eval"])
def test_a_pattern_that_goes_back_and_forth_at_each_character(artifact, capfd, monkeypatch, verb):
    """At none of them long enough for the library to end it; all the text takes seconds, a book hours."""
    split_by(artifact, "(?:.|.){18}[^ -~]")
    monkeypatch.setattr(encoding, "SECONDS", 0.1)
    monkeypatch.setattr(encoding, "SECONDS_PER_CHARACTER", 0.0)
    rest = {
        "generate": ["--prompt", "a" * 1000, "--max_new_tokens", "2"],
        "lm-eval": ["--domain", "de", "--tasks", "koff_cloze_de", "--limit", "1"],
    }
    assert main([verb, "--model", str(artifact), *rest[verb]]) == 2
    assert "s of processor time: a pattern in its tokenizer.json goes" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("more", [{}, {"model.layers.0.more": torch.zeros(1)}])
def test_transformers_says_nothing_while_it_loads(tmp_path, more):
    """Neither of layers that no other device shares, which nobody asked for, nor in a table what we say in a line."""
    tensors = load_file(saved(tmp_path) / "model.safetensors")
    save_file(tensors | more, tmp_path / "model.safetensors", {"format": "pt"})
    said = []
    handler = logging.Handler()
    handler.emit = said.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        with pytest.raises(KoffError, match="no place for") if more else nullcontext():
            load_backbone(str(tmp_path))
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert [record.getMessage() for record in said] == []


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="it can be read")
def test_a_tokenizer_of_sentencepiece_alone(tmp_path):
    (saved(tmp_path) / "tokenizer.model").write_bytes(b"x" * 100)
    refused(tmp_path, "takes the packages sentencepiece and protobuf", load_tokenizer)


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="it can be read")
def test_a_folder_of_such_a_tokenizer_and_nothing_else(tmp_path):
    """With the package transformers reads it, so it is not called a folder without a tokenizer."""
    (tmp_path / "tokenizer.model").write_bytes(b"x" * 100)
    refused(tmp_path, "takes the packages sentencepiece and protobuf", load_tokenizer)


def test_a_tokenizer_without_files(tmp_path):
    """Of transformers' own message the first line ends in a colon."""
    refused(saved(tmp_path), "the files of its tokenizer are missing, damaged", load_tokenizer)


def test_a_tokenizer_without_vocabulary(tmp_path):
    """Every text would be called too short."""
    (saved(tmp_path) / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizerFast"}')
    refused(tmp_path, "has no vocabulary", load_tokenizer)


@pytest.mark.parametrize(
    "fault", ["a bit", "half a tensor", "a file less", "a file more", "another tokenizer", "no list"]
)
def test_a_backbone_of_an_artifact_is_compared_with_its_list_also_by_itself(tmp_path, fault):
    """As `--model.backbone ARTIFACT/backbone`; a folder that lies elsewhere has nothing to be compared with."""
    backbone = tiny_artifact(tmp_path).folder / "backbone"
    load, weights = load_backbone, backbone / "model.safetensors"
    wanted = f"{weights.name} was changed after it was written"
    if fault == "a bit":
        content = bytearray(weights.read_bytes())
        content[-8] ^= 1
        weights.write_bytes(content)
    elif fault == "half a tensor":
        tensors = load_file(weights)
        tensors["model.norm.weight"] *= 0.5
        save_file(tensors, weights, {"format": "pt"})
    elif fault == "no list":
        (backbone.parent / "koff.json").write_text('{"files": [1]}')
        wanted = "files must be a dictionary.* cannot be compared with it; get the artifact again"
    elif fault == "a file less":
        (backbone / "generation_config.json").unlink()
        wanted = "generation_config.json is missing"
    elif fault == "a file more":
        (backbone / "chat_template.jinja").write_text("{{ messages }}")
        wanted = "chat_template.jinja does not belong there"
    else:
        file, load = backbone / "tokenizer_config.json", load_tokenizer
        file.write_text(file.read_text().replace("token", "tokem", 1))  # as long as it was
        wanted = "tokenizer_config.json was changed after it was written"
    refused(backbone, wanted, load)
    if fault in ("a bit", "half a tensor", "no list"):
        shutil.copytree(backbone, tmp_path / "elsewhere")
        load_backbone(str(tmp_path / "elsewhere"))


def test_a_handful_of_the_fuzz():
    """recipes/reliability/strangers.py runs hundreds."""
    found = run_fuzz(4, seed=7)
    assert sum(found.values()) == 8
    assert not [key for key in found if key[2] == "fault"], found
