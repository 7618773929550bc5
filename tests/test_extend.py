"""A domain that joins a finished artifact: only its own files appear, and it is the memory that was trained."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_artifact import DOMAINS, tiny_artifact
from toy_text import toy_documents, write_jsonl

from koff_lightning import KoffError, LoraSpec, SparsitySpec, load_decomposed
from koff_lightning.artifact.folder import describe_file, read_manifest
from koff_lightning.artifact.memories import add_from_bank
from koff_lightning.cli import main
from koff_lightning.support.files import hash_file


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A corpus, and an artifact of a random model with the tokenizer for it."""
    folder = tmp_path_factory.mktemp("extend")
    write_jsonl(folder / "art.jsonl", toy_documents(60, seed=3))
    return folder


def fit(folder: Path, artifact: Path, *more: str) -> int:
    """`koff fit --config add_domain.yaml` for the domain `art`, in seconds."""
    options = ["--trainer.max_steps=4", "--data.seq_len=32", "--trainer.enable_progress_bar=false", *more]
    paths = [f"--model.artifact={artifact}", f"--trainer.default_root_dir={folder / 'run'}"]
    return main(["fit", "--config", "add_domain.yaml", *paths, *options])


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hash_file(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("layout", ["ragged", "uniform"])
def test_a_run_adds_its_domain_and_changes_nothing_else(text, tmp_path, layout):
    made = tiny_artifact(tmp_path, layout=layout, uniform=layout == "uniform")
    before = hashes(made.folder)
    ids, rows = torch.randint(3, 300, (2, 9)), ["de", None]
    with torch.no_grad():
        old = load_decomposed(made.folder, domains=["de"])(ids, domains=rows).logits

    assert fit(tmp_path, made.folder, "--data.domains.art", str(text / "art.jsonl")) == 0

    after = hashes(made.folder)
    assert {name for name in after if before.get(name) != after[name]} - {"koff.json"} == {
        f"memories/art/{name}"
        for name in ("memory.json", "adapter_config.json", "adapter_model.safetensors", "kv_memory.safetensors")
    }
    assert set(before) <= set(after)
    model = load_decomposed(made.folder)
    assert model.domains == [*DOMAINS, "art"]
    with torch.no_grad():
        assert torch.equal(load_decomposed(made.folder, domains=["de"])(ids, domains=rows).logits, old)

    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["domains"]["art"]["dense_bpb"] is None  # the dense model is not there
    assert results["domains"]["art"]["koff_bpb"] != results["domains"]["art"]["memory_off_bpb"]
    assert results["sparsity"]["body"] == model.manifest.sparsity["body"] > 0.1
    assert results["parameters"]["active"] == model.active_parameters("art")
    assert results["parameters"]["stored"] == model.manifest.parameters["stored"]


def test_an_artifact_that_may_not_be_changed_is_told_before_the_first_step(text, tmp_path, capsys, monkeypatch):
    made, may = tiny_artifact(tmp_path / "colleague"), os.access
    monkeypatch.setattr("koff_lightning.KOFFModule.training_step", lambda *_: pytest.fail("it trains"))
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != made.folder.parent and may(path, mode))
    assert fit(tmp_path, made.folder, "--data.domains.art", str(text / "art.jsonl")) == 2
    line = f"koff: model.artifact: cannot write into {made.folder.parent} (no right to write there): give another place"
    assert capsys.readouterr().err.splitlines()[-1].startswith(line)


def test_a_memory_is_written_beside_its_artifact(tmp_path, monkeypatch):
    """There must be room for it there; the folder of temporary files may be small."""
    made = tiny_artifact(tmp_path)
    model, before = load_decomposed(made.folder), sorted(tmp_path.iterdir())
    for name in ("art", "sport"):
        model.memories.add(name, LoraSpec(2, 2.0), None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    add_from_bank(made.folder, model.memories, ["art"])
    assert [*read_manifest(made.folder).domains] == [*DOMAINS, "art"]
    full = SafetensorError("No space left on device")
    monkeypatch.setattr("koff_lightning.artifact.memory_files.save_file", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(KoffError, match=f"cannot write beside {re.escape(str(made.folder))}: No space left on device"):
        add_from_bank(made.folder, model.memories, ["sport"])
    assert sorted(tmp_path.iterdir()) == before


def test_the_text_of_an_added_domain_is_known_to_whoever_needs_it_later(text, tmp_path, capsys):
    folder = tiny_artifact(tmp_path).folder
    content = json.loads((folder / "koff.json").read_text())
    own = {name: {"files": str(text / "art.jsonl")} for name in DOMAINS}
    (folder / "koff.json").write_text(json.dumps(content | {"config": {"data": {"domains": own, "seq_len": 32}}}))
    assert main(["router", "fit", "--model", str(folder)]) == 0
    assert fit(tmp_path, folder, "--data.domains.art", str(text / "art.jsonl")) == 0
    again = f"koff router fit --model {folder}"
    assert f"is refused until it is fitted anew: {again}" in capsys.readouterr().out
    assert main(["inspect", str(folder)]) == 0
    assert "one was fitted and cannot be used: the router of" in capsys.readouterr().out
    assert main(again.split()[1:]) == 0
    assert main(["inspect", str(folder)]) == 0
    assert "router      one was fitted\n" in capsys.readouterr().out
    assert main(["memory", "remove", str(folder), "art"]) == 0
    assert read_manifest(folder).config["data"] == {"domains": own, "seq_len": 32}


def test_the_memory_in_the_artifact_is_the_one_that_was_trained(text, tmp_path):
    made = tiny_artifact(tmp_path)
    assert fit(tmp_path, made.folder, "--data.domains.art", str(text / "art.jsonl")) == 0
    saved = torch.load(next((tmp_path / "run").rglob("last.ckpt")), weights_only=True)["state_dict"]
    loaded = load_decomposed(made.folder, domains=["art"]).state_dict()
    trained = {name: value for name, value in saved.items() if "koff_art" in name}
    assert trained
    for name, value in trained.items():
        assert torch.equal(loaded[name.removeprefix("model.")], value), name


CHANNELS = ["q_channel", "k_channel", "v_channel", "o_channel", "gate_channel", "up_channel", "down_channel"]


def test_a_later_memory_does_not_speak_in_closed_channels(text, tmp_path):
    """As for memories trained with the mask: y = z (W x + dW x), so a closed channel stays zero."""
    made = tiny_artifact(tmp_path, sparsity=SparsitySpec(target=0.3, units=CHANNELS, min_channels=4))
    closed = read_manifest(made.folder).closed()
    assert {path.rpartition(".")[2] for path in closed} == {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}
    more = ["--model.optim.lora_lr=0.1", "--model.lora.rank=2"]
    assert fit(tmp_path, made.folder, "--data.domains.art", str(text / "art.jsonl"), *more) == 0
    model = load_decomposed(made.folder)
    weights, said = model.memories.weights("art"), {}
    for path, rows in closed.items():
        up = weights[f"{path}.lora_B.weight"]
        assert not up[rows].any() and up[~rows].any()
        linear = model.backbone.get_submodule(path)
        linear.register_forward_hook(lambda _, __, out, path=path: said.update({path: out}))
    with torch.no_grad():
        model(torch.randint(3, 300, (2, 9)), domains=["art", "de"])
    for path, rows in closed.items():
        assert not said[path][..., rows].any() and said[path][..., ~rows].any()


def test_an_adapter_that_writes_to_closed_channels_is_refused(tmp_path):
    made = tiny_artifact(tmp_path, sparsity=SparsitySpec(target=0.03, units=["v_channel"]))
    home = made.folder / "memories" / "de"
    path, rows = next(iter(read_manifest(made.folder).closed().items()))
    tensors = load_file(home / "adapter_model.safetensors")
    tensors[f"base_model.model.{path}.lora_B.weight"][rows.nonzero()[0, 0], 0] = 1e-3
    card = json.loads((home / "memory.json").read_text())
    save_file(tensors, home / "adapter_model.safetensors", {"format": "pt"})
    card["files"]["adapter_model.safetensors"] = describe_file(home / "adapter_model.safetensors")
    (home / "memory.json").write_text(json.dumps(card))
    model = load_decomposed(made.folder, domains=["fr"], verify=False)
    with pytest.raises(KoffError, match="its adapter writes to channels of .*v_proj that the mask has closed"):
        model.add_memory(home)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.domains.de"], "has a memory 'de' already: `koff memory remove"),
        (["--model.sparsity.target=0.1", "--data.domains.art"], "the mask of an artifact is fixed.*got 0.1"),
        (["--model.loss.kl=1", "--data.domains.art"], "holds no dense model to learn from.*got 1"),
    ],
)
def test_what_cannot_be_added_is_refused_at_once(text, tmp_path, capsys, options, message):
    made = tiny_artifact(tmp_path)
    before = hashes(made.folder)
    assert fit(tmp_path, made.folder, *options, str(text / "art.jsonl")) == 2
    assert hashes(made.folder) == before
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_a_layout_with_full_shapes_is_refused(text, tmp_path, capsys):
    made = tiny_artifact(tmp_path, layout="masked")
    assert fit(tmp_path, made.folder, "--data.domains.art", str(text / "art.jsonl")) == 2
    assert "has layout 'masked'; domains are added to 'ragged' and 'uniform' ones" in capsys.readouterr().err


def test_no_artifact_is_refused(text, tmp_path, capsys):
    assert fit(tmp_path, tmp_path / "nothing", "--data.domains.art", str(text / "art.jsonl")) == 2
    assert "no such folder" in capsys.readouterr().err
