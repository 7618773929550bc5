"""GGUF files: the same numbers as from the model they were made from, scaling of the rotary embedding included."""

import struct

import gguf
import numpy as np
import pytest
import torch
from tiny_models import LLAMA3_ROPE, YARN_ROPE, tiny_model

from koff_lightning import KoffError, load_backbone
from koff_lightning.backbone import rope_of

LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
IDS = torch.arange(3, 97).repeat(4)[None, :300]  # long enough for every scaling to show
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
PARTS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
PARTS |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"}
PARTS |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
OF_GEMMA = {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm"}
OF_GEMMA |= {"post_feedforward_layernorm": "post_ffw_norm"}


def write_gguf(path, model, entries=(), tensors=None, arch="llama", leave=()):
    """A GGUF as llama.cpp's converter writes it.

    For `llama` rotary halves are interleaved, for `gemma3` norms are written as what they multiply by, 1 + w.

    Args:
        path: Where to.
        model: Of the family `arch`.
        entries: Further metadata: (name without the architecture, value).
        tensors: Further tensors.
        arch: Its architecture.
        leave: Names of metadata to leave out.
    """
    config, writer = model.config, gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if "rope.dimension_count" not in leave:
        writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope_of(config)["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for name, value in entries:
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}
        add[type(value)](f"{arch}.{name}", value)
    parts = PARTS | (OF_GEMMA if arch == "gemma3" else {})
    names = NAMES | {
        f"model.layers.{i}.{a}": f"blk.{i}.{b}" for i in range(config.num_hidden_layers) for a, b in parts.items()
    }
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if arch == "llama" and stem.endswith(("q_proj", "k_proj")):
            rows = tensor.shape[0] // config.head_dim
            tensor = tensor.view(rows, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(tensor.shape)
        if arch == "gemma3" and stem.endswith("norm"):
            tensor = tensor + 1
        writer.add_tensor(f"{names[stem]}.{kind}", tensor.contiguous().numpy())
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def llama3_factors(model):
    """`rope_freqs.weight` as llama.cpp's converter computes it: plain frequencies over scaled ones."""
    size = model.config.head_dim
    plain = model.config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2).double() / size)
    return (plain / model.model.rotary_emb.inv_freq.double()).float().numpy()


def alike(path, model):
    loaded = load_backbone(path)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS, use_cache=False).logits, atol=1e-4, rtol=0)
    return loaded


SCALINGS = {
    "none": ({"rope_type": "default", "rope_theta": 10_000.0}, [("rope.scaling.type", "none")]),
    "linear": (LINEAR_ROPE, [("rope.scaling.type", "linear"), ("rope.scaling.factor", 4.0)]),
    "yarn": (
        YARN_ROPE,
        [
            ("rope.scaling.type", "yarn"),
            ("rope.scaling.factor", 8.0),
            ("rope.scaling.original_context_length", 64),
            ("rope.scaling.finetuned", True),
        ],
    ),
    "yarn with its own ramp": (
        YARN_ROPE | {"beta_fast": 16.0, "beta_slow": 2.0},
        [
            ("rope.scaling.type", "yarn"),
            ("rope.scaling.factor", 8.0),
            ("rope.scaling.original_context_length", 64),
            ("rope.scaling.yarn_beta_fast", 16.0),
            ("rope.scaling.yarn_beta_slow", 2.0),
        ],
    ),
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_scaling_in_the_metadata(tmp_path, scaling):
    rope, entries = SCALINGS[scaling]
    model = tiny_model("llama", rope_parameters=rope)
    plain = tiny_model("llama")
    if scaling != "none":
        off = (model(IDS, use_cache=False).logits - plain(IDS, use_cache=False).logits).abs().max()
        assert off > 0.1, "the scaling is not too small to be seen"
    loaded = alike(write_gguf(tmp_path / "x.gguf", model, entries), model)
    loaded.save_pretrained(tmp_path / "saved")  # the config tells it too, so that an export has it
    alike(str(tmp_path / "saved"), model)


@pytest.mark.parametrize("change", [{}, {"factor": 32.0, "original_max_position_embeddings": 8192}])
def test_the_scaling_of_llama_3_is_a_tensor(tmp_path, change):
    model = tiny_model("llama", rope_parameters=LLAMA3_ROPE | change)
    path = write_gguf(tmp_path / "x.gguf", model, tensors={"rope_freqs.weight": llama3_factors(model)})
    assert alike(path, model).config.rope_parameters["rope_type"] == "llama3"


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_other_families_with_biases_norms_and_yarn(tmp_path, family):
    model = tiny_model(family, rope_parameters=YARN_ROPE)
    entries = SCALINGS["yarn"][1] + [("attention.key_length", 16), ("attention.value_length", 16)]
    alike(write_gguf(tmp_path / "x.gguf", model, entries, arch=family, leave=["rope.dimension_count"]), model)


@pytest.mark.parametrize(
    ("entries", "tensors", "message"),
    [
        (
            [("rope.scaling.type", "longrope"), ("rope.scaling.factor", 2.0)],
            {},
            "is 'longrope' with factor 2.0; linear",
        ),
        ([("rope.scaling.type", "linear")], {}, "is 'linear' with factor None"),
        ([("rope.scaling.factor", 2.0)], {}, "has a factor, 2.0, and no type"),
        ([("rope.scale_linear", 2.0)], {}, "has llama.rope.scale_linear, which is not supported"),
        ([("attention.sliding_window", 8)], {}, "has llama.attention.sliding_window, which is not supported"),
        ([("logit_scale", 2.0)], {}, "has llama.logit_scale, which is not supported"),
        ([("rope.scaling.type", "yarn"), ("rope.scaling.factor", 2.0)], {}, "yarn without an original_context_length"),
        ([], {"rope_freqs.weight": np.linspace(1, 3, 8, dtype="f4")}, "is not that of Llama 3"),
        ([], {"rope_freqs.weight": np.ones(5, dtype="f4")}, "has 5 factors for 8 frequencies"),
        ([], {"rope_factors_long.weight": np.ones(8, dtype="f4")}, "longrope"),
        (
            [],
            {"blk.0.attn_q.bias": np.ones(64, dtype="f4")},
            "hold 1 tensors that the model of its config has no place",
        ),
        ([], {"blk.2.attn_q.weight": np.ones((64, 64), dtype="f4")}, "first blk.2.attn_q.weight"),
        ([], {"blk.0.attn_q_norm.weight": np.ones(16, dtype="f4")}, "first blk.0.attn_q_norm.weight"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, entries, tensors, message):
    path = write_gguf(tmp_path / "x.gguf", tiny_model("llama"), entries, tensors)
    with pytest.raises(KoffError, match=message) as caught:
        load_backbone(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scaled", [False, True])
def test_gemma(tmp_path, scaled):
    """The file tells one base and one window: layers with the window have the base that its architecture is made of."""
    linear = LINEAR_ROPE | {"rope_theta": 1_000_000.0}
    model = tiny_model(
        "gemma3_text",
        num_hidden_layers=6,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
        tie_word_embeddings=False,
        head_dim=24,
        rope_parameters={
            "full_attention": linear if scaled else {"rope_type": "default", "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        query_pre_attn_scalar=256,  # has no place in the file
    )
    entries = [("attention.sliding_window", 8), ("attention.key_length", 24), ("attention.value_length", 24)]
    told = [("rope.scaling.type", "linear"), ("rope.scaling.factor", 4.0)] if scaled else []
    write_gguf(tmp_path / "x.gguf", model, entries + told, None, "gemma3")
    loaded = load_backbone(str(tmp_path / "x.gguf"))
    assert loaded.config.rope_parameters == model.config.rope_parameters
    torch.testing.assert_close(loaded(IDS).logits, model(IDS, use_cache=False).logits, atol=1e-4, rtol=0)
    write_gguf(tmp_path / "y.gguf", model, entries[1:], None, "gemma3")
    with pytest.raises(KoffError, match="metadata lacks gemma3.attention.sliding_window, without which"):
        load_backbone(str(tmp_path / "y.gguf"))


def test_rope_of_a_part_of_the_head(tmp_path):
    path = write_gguf(
        tmp_path / "x.gguf", tiny_model("qwen2"), [("rope.dimension_count", 8)], None, "qwen2", ["rope.dimension_count"]
    )
    with pytest.raises(KoffError, match="covers 8 of 16 dimensions"):
        load_backbone(path)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_sizes_that_are_missing_are_not_guessed(tmp_path, arch):
    """transformers would take its defaults: with as many key-value heads as queries keys come out in another order."""
    options = {"tie_word_embeddings": False, "num_hidden_layers": 6} if arch == "gemma3" else {}
    model = tiny_model("gemma3_text" if arch == "gemma3" else arch, num_key_value_heads=4, **options)
    entries = [("attention.key_length", 16), ("attention.value_length", 16), ("attention.sliding_window", 8)]
    write_gguf(tmp_path / "x.gguf", model, entries if arch == "gemma3" else (), arch=arch)
    content = (tmp_path / "x.gguf").read_bytes()
    names = ["attention.head_count_kv", "attention.head_count", "attention.layer_norm_rms_epsilon", "block_count"]
    names += ["embedding_length", "feed_forward_length"] + ["rope.freq_base"] * (arch == "gemma3")
    for name in names:
        of_the_file = struct.pack("<Q", len(f"{arch}.{name}")) + f"{arch}.{name}".encode()
        assert content.count(of_the_file) == 1
        (tmp_path / "x.gguf").write_bytes(content.replace(of_the_file, of_the_file[:8] + b"x" * len(of_the_file[8:])))
        with pytest.raises(KoffError, match=f"metadata lacks {arch}.{name}, without which its numbers are not known"):
            load_backbone(str(tmp_path / "x.gguf"))


def patched(data, at, form, value):
    return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: patched(data, 8, "<Q", 2**60),  # tensors
        lambda data: patched(data, 16, "<Q", 2**60),  # entries
        lambda data: patched(data, 24, "<Q", 2**62),  # the first name's length
        lambda data: patched(data, 4, "<I", 9),  # version
        lambda data: data[: len(data) - 100],
        lambda data: data[:30],
        lambda data: data[:300],
        lambda data: data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight", 1),  # twice
        lambda data: data.replace(b"llama.embedding_length", b"llama.embedding_lengtX", 1),
        lambda data: data.replace(b"general.architecture", b"general.architecturX", 1),
    ],
)
def test_heads_that_lie(tmp_path, spoil):
    path = tmp_path / "x.gguf"
    write_gguf(path, tiny_model("llama"))
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(KoffError, match="backbone") as caught:
        load_backbone(str(path))
    assert "\n" not in str(caught.value)
