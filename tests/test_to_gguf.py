"""`koff convert gguf`: what is written, that it is the same model, and what is refused before anything is written.

Whether llama.cpp computes the same from it is in test_llamacpp.py.
"""

import json

import gguf
import numpy as np
import pytest
import torch
from test_gguf import write_gguf
from tiny_artifact import tiny_artifact
from tiny_models import LLAMA3_ROPE, YARN_ROPE, tiny_model
from tokenizers import Regex, models, normalizers, pre_tokenizers
from toy_text import toy_documents, toy_tokenizer, write_jsonl
from transformers import AutoTokenizer

from koff_lightning import KoffError, load_backbone, load_decomposed
from koff_lightning.artifact.gguf_tokenizer import write_tokenizer
from koff_lightning.artifact.to_gguf import to_gguf
from koff_lightning.cli import main
from koff_lightning.loading import load_tokenizer

IDS = torch.arange(3, 97).repeat(2)[None]


def convert(artifact, out, *options):
    return main(["convert", "gguf", str(artifact), "--out", str(out), *options])


def entry(path, name):
    return gguf.GGUFReader(path).get_field(name).contents()


def test_a_folder_for_llama_server(tmp_path, capsys):
    made = tiny_artifact(tmp_path, chat=True, tie=True)
    assert convert(made.folder, tmp_path / "out") == 0
    assert "architecture deci, weights f16" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"README.md", "koff-gguf.json", "model.gguf", *(f"{d}.lora.gguf" for d in made.module.domains)}
    model = tmp_path / "out" / "model.gguf"
    mark = json.loads((tmp_path / "out" / "koff-gguf.json").read_text(encoding="utf-8"))
    assert mark["pre_tokenizer"] == entry(model, "tokenizer.ggml.pre") == "gpt-2"
    widths = json.loads((made.folder / "backbone" / "config.json").read_text())["koff_layers"]
    assert entry(model, "deci.feed_forward_length") == [layer["intermediate_size"] for layer in widths]
    assert entry(model, "deci.attention.head_count_kv") == [layer["num_key_value_heads"] for layer in widths]
    assert "m.role" in entry(model, "tokenizer.chat_template")
    assert "output.weight" not in {tensor.name for tensor in gguf.GGUFReader(model).tensors}, "tied ones once"
    text = (tmp_path / "out" / "README.md").read_text()
    assert "llama-server -m model.gguf --lora de.lora.gguf" in text and "| law | 2 |" in text and "5 slots" in text


@pytest.mark.parametrize(("kind", "most"), [("f16", 2.1), ("q8_0", 1.3)])
def test_types_of_weights(tmp_path, kind, most):
    made = tiny_artifact(tmp_path, layout="uniform", uniform=True)  # rows of 64 numbers
    assert convert(made.folder, tmp_path / "out", "--type", kind) == 0
    path = tmp_path / "out" / "model.gguf"
    tensors = gguf.GGUFReader(path).tensors
    assert all(t.tensor_type.name == ("F32" if len(t.shape) == 1 else kind.upper()) for t in tensors)
    assert sum(t.n_bytes for t in tensors) / sum(int(t.n_elements) for t in tensors) < most
    exact = load_backbone(str(made.folder / "backbone"))(IDS).logits
    assert (load_backbone(str(path))(IDS).logits - exact).abs().max() < 0.1 * exact.abs().max()


def test_rows_that_hold_no_whole_blocks_stay_f16(tmp_path):
    to_gguf(tiny_artifact(tmp_path).folder, tmp_path / "out", "q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q8_0"


ROPES = {
    "plain": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "yarn": YARN_ROPE | {"attention_factor": 1.3},
    "llama3": LLAMA3_ROPE,
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_gguf_of_its_own_family_is_the_same_model(tmp_path, family, rope):
    changes = {"rope_parameters": ROPES[rope]}
    made = tiny_artifact(tmp_path, family, "uniform", uniform=True, changes=changes)
    if rope == "llama3" and family != "llama":  # whose graphs in llama.cpp do not look at the factors
        family = to_gguf(made.folder, tmp_path / "out").arch if family == "qwen2" else "refused"
        assert family in ("deci", "refused")
        return
    to_gguf(made.folder, tmp_path / "out", "f32")
    same, exact = load_backbone(str(tmp_path / "out" / "model.gguf")), load_backbone(str(made.folder / "backbone"))
    torch.testing.assert_close(same(IDS).logits, exact(IDS).logits, atol=1e-4, rtol=0)


def test_a_gguf_decomposed_and_written_again(tmp_path, monkeypatch):
    """`koff fit` on a GGUF, which removes nothing here, to a GGUF: the same logits."""
    monkeypatch.chdir(tmp_path)
    toy_tokenizer(tmp_path / "dense")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")  # as koff-tiny's, without an `<|endoftext|>`
    tiny_model("llama", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1).save_pretrained(tmp_path / "dense")
    made = tiny_artifact(tmp_path, layout="uniform", uniform=True, lora=None, kv=None)
    to_gguf(made.folder, tmp_path / "one", "f32")
    source = str(tmp_path / "one" / "model.gguf")
    corpus = write_jsonl(tmp_path / "corpus.jsonl", toy_documents(80))
    words = ["fit", f"--model.backbone={source}", "--model.sparsity.target=0", "--model.kv=null", "--model.loss.kl=0"]
    words += [f"--data.domains={{fox: {corpus}}}", "--data.seq_len=32"]
    words += [
        "--trainer.max_steps=2",
        "--trainer.log_every_n_steps=1",
        "--trainer.limit_val_batches=1",
        "--trainer.default_root_dir=run",
    ]
    assert main(words) == 0
    (artifact,) = tmp_path.glob("run/**/artifact")
    assert convert(artifact, tmp_path / "two", "--type", "f32") == 0
    again = load_backbone(str(tmp_path / "two" / "model.gguf"))
    torch.testing.assert_close(again(IDS).logits, load_backbone(source)(IDS).logits, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("qwen3", {}, "holds a qwen3 model with layers of unequal width: `deci`, which takes them, has no q/k norms"),
        ("qwen3", {"changes": {"rope_parameters": LLAMA3_ROPE}, "target": 0.0}, "scaled as in Llama 3"),
        ("qwen3", {"changes": {"attention_bias": True}, "target": 0.0}, "biases that its family does not have"),
        ("llama", {"changes": {"rope_parameters": YARN_ROPE | {"beta_slow": 2.0}}}, "the model has (32, 2.0)"),
        ("llama", {"changes": {"rope_parameters": YARN_ROPE | {"truncate": False}}}, "yarn with truncate true only"),
        ("llama", {"changes": {"hidden_act": "gelu"}}, "with SiLU, the model has 'gelu'"),
        ("gemma3_text", {}, "writes llama, mistral, qwen2, qwen3 models, this one is gemma3_text"),
    ],
)
def test_what_no_architecture_holds_is_refused_before_anything_is_written(tmp_path, capsys, family, options, message):
    made = tiny_artifact(tmp_path, family, **options)
    before = sorted(tmp_path.iterdir())
    assert convert(made.folder, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_folders_and_names(tmp_path, capsys):
    made = tiny_artifact(tmp_path)
    assert convert(made.folder, tmp_path / "out") == 0
    assert convert(made.folder, tmp_path / "out") == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert convert(made.folder, tmp_path / "out", "--overwrite", "--type", "q8_0") == 0
    assert convert(made.folder, made.folder, "--overwrite") == 2
    assert "holds no koff-gguf.json, so it is not overwritten" in capsys.readouterr().err
    assert convert(tmp_path / "dense", tmp_path / "other") == 2
    assert "so it is no artifact" in capsys.readouterr().err
    assert convert(made.folder, tmp_path / "other", "--type", "q4_0") == 2
    assert "q4_0" in capsys.readouterr().err
    with pytest.raises(KoffError, match="must be one of f32, f16, q8_0; got 'q4_0'"):
        to_gguf(made.folder, tmp_path / "other", "q4_0")
    assert not (tmp_path / "other").exists()


def test_numbers_too_large_for_f16(tmp_path):
    model = load_decomposed(tiny_artifact(tmp_path).folder)
    model.backbone.lm_head.weight.data[0, 0] = 1e5
    from koff_lightning.artifact.to_gguf import _write_backbone, form_of

    with pytest.raises(KoffError, match="output.weight holds numbers above the largest of f16: write f32"):
        _write_backbone(model, form_of(model), tmp_path / "x.gguf", "f16")


# --------------------------------------------------------------------------------------------- the tokenizer


@pytest.fixture
def tokenizer(tmp_path):
    folder = tiny_artifact(tmp_path).folder / "backbone"
    return load_tokenizer(str(folder))


def written(tokenizer, tmp_path, **options):
    return write_tokenizer(gguf.GGUFWriter(tmp_path / "t.gguf", "llama"), tokenizer, 400, [], **options)


def test_koff_tiny_and_the_toy_tokenizer_have_names(tokenizer, tmp_path):
    assert written(tokenizer, tmp_path) == "gpt-2"
    tiny = load_tokenizer("koff-tiny")
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    assert write_tokenizer(writer, tiny, 4096, [1, 7]) == "qwen35"
    said = {name: value.value for name, value in writer.kv_data[0].items() if name.startswith("tokenizer")}
    assert said["tokenizer.ggml.add_bos_token"] and not said["tokenizer.ggml.add_eos_token"]
    assert (said["tokenizer.ggml.bos_token_id"], said["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert said["tokenizer.ggml.eot_token_id"] == 7, "a model may have further ends"


def test_a_pre_tokenizer_without_a_name_is_refused(tokenizer, tmp_path):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[aeiou]"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    with pytest.raises(KoffError, match=r"no name for this tokenizer's pre-tokenizer.*\[aeiou\].*known are gpt-2") as e:
        written(tokenizer, tmp_path)
    assert "\n" not in str(e.value)


def test_other_kinds_of_tokenizers_are_refused(tokenizer, tmp_path):
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Lowercase()
    with pytest.raises(KoffError, match="no normalizer 'Lowercase'"):
        written(tokenizer, tmp_path)
    backend.normalizer = normalizers.NFC()
    assert written(tokenizer, tmp_path) == "gpt-2"
    with pytest.raises(KoffError, match="has a token [0-9]+, the model's embedding only 100 rows"):
        write_tokenizer(gguf.GGUFWriter(tmp_path / "t.gguf", "llama"), tokenizer, 100, [])
    backend.model = models.BPE(byte_fallback=True)
    with pytest.raises(KoffError, match="BPE with byte fallback .SentencePiece.: use another engine"):
        written(tokenizer, tmp_path)


def test_a_tokenizer_that_a_gguf_gave(tmp_path):
    """transformers reads one from a GGUF; what it made of it is written again or refused, never another."""
    to_gguf(tiny_artifact(tmp_path, layout="uniform", uniform=True).folder, tmp_path / "out", "f32")
    source = str(tmp_path / "out" / "model.gguf")
    own = AutoTokenizer.from_pretrained(str(tmp_path / "uniform" / "backbone"))
    assert load_tokenizer(source)("jumps während 跳过").input_ids == own("jumps während 跳过").input_ids


def test_a_gguf_has_the_tokens_that_it_holds_and_no_others(tmp_path):
    """Also when what was read is saved, as an artifact has it."""
    tiny, file = load_tokenizer("koff-tiny"), tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    write_tokenizer(writer, tiny, 4096, [])
    for name in ("context_length", "embedding_length", "block_count", "feed_forward_length", "head_count"):
        getattr(writer, f"add_{name}")(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((4096, 16), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    load_tokenizer(str(file)).save_pretrained(tmp_path / "saved")
    for found in (load_tokenizer(str(file)), AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert found.get_vocab() == tiny.get_vocab()
        assert found("jumps während 跳过").input_ids == tiny("jumps während 跳过").input_ids
        assert found.unk_token is None and (found.bos_token, found.eos_token) == (tiny.bos_token, tiny.eos_token)


def test_write_gguf_of_the_other_tests_has_the_same_tensors(tmp_path):
    """Two writers, of which one stands in for llama.cpp's converter, agree to the bit."""
    made = tiny_artifact(tmp_path, layout="uniform", uniform=True, lora=None, kv=None)
    to_gguf(made.folder, tmp_path / "out", "f32")
    theirs = write_gguf(tmp_path / "x.gguf", load_backbone(str(made.folder / "backbone")))
    ours = {t.name: t.data.tobytes() for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert ours == {t.name: t.data.tobytes() for t in gguf.GGUFReader(theirs).tensors}
    assert tiny_model("llama").config.head_dim == 16
