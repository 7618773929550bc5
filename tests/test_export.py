"""Exports: what is written, that it is proven, and that anything wrong leaves nothing half."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_artifact import DOMAINS, tiny_decomposition
from tiny_models import tiny_model
from tiny_run import RandomText, tiny_module, tiny_trainer
from toy_text import toy_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from koff_lightning import KoffError, LoraSpec, load_decomposed
from koff_lightning.artifact import export as exporting
from koff_lightning.artifact import modeling_koff, proof
from koff_lightning.artifact.checkpoint import from_checkpoint
from koff_lightning.artifact.export import export, summary
from koff_lightning.artifact.folder import read_manifest, verify
from koff_lightning.artifact.layouts import Ragged
from koff_lightning.artifact.memories import add_memory, remove_memory
from koff_lightning.artifact.model_card import base_folder, licence_of, model_card
from koff_lightning.callbacks import ExportArtifact, RunReport
from koff_lightning.cli import main
from koff_lightning.commands.parsing import first_look
from koff_lightning.reports.results import mask_and_size, sentences
from koff_lightning.specs.sparsity import SparsitySpec
from koff_lightning.training.run_folder import run_results

LAYOUTS = ("ragged", "uniform", "deci", "masked", "merged")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder of a hardened decomposition and the module."""
    folder = tmp_path_factory.mktemp("made")
    return SimpleNamespace(folder=folder, module=tiny_decomposition(folder, chat=True, tie=True))


def counted(folder):
    """Numbers in the safetensors files below a folder."""
    total = 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


# ------------------------------------------------------------------------------------------------ what is proven


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_what_the_gated_model_computes(tmp_path, layout):
    module = tiny_decomposition(tmp_path, uniform=layout == "uniform")
    report = export(module, tmp_path / "out", layout, "fr" if layout == "merged" else None)
    assert report["passed"] and report["greedy"] == "equal" and report["argmax_agreement"] == 1
    assert report["max_abs_diff"] < 1e-5
    assert [case["memory"] for case in report["memories"]] == (["fr"] if layout == "merged" else [None, *DOMAINS])
    assert report == json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert verify(tmp_path / "out").layout == layout
    assert not list(tmp_path.glob(".out*")), "nothing is left beside it"


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3", {"lora": None}),
        ("mistral", {"kv": None}),
        ("qwen2", {"dtype": "bfloat16"}),
        ("llama3_rope", {"shared_memory": True}),
        ("llama", {"lora": None, "kv": None}),
        ("llama", {"lora": LoraSpec(rank=2, targets=["q_proj", "down_proj"]), "dtype": "float16"}),
    ],
)
def test_other_families_memories_and_dtypes(tmp_path, family, options):
    module = tiny_decomposition(tmp_path, family, **options)
    report = export(module, tmp_path / "out")
    assert report["passed"]
    manifest = read_manifest(tmp_path / "out")
    names = [] if not (module.lora or module.kv) else ["shared"] if module.shared_memory else list(DOMAINS)
    assert list(manifest.domains) == names
    assert manifest.dtype == options.get("dtype", "float32")
    assert counted(tmp_path / "out") == manifest.parameters["stored"]


def test_where_no_mask_was_learned_the_backbone_is_the_dense_one(tmp_path):
    module = tiny_decomposition(tmp_path)
    module.gates.hardened.fill_(False)
    module.sparsity = replace(module.sparsity, target=0.0)
    assert export(module, tmp_path / "out")["passed"]
    assert read_manifest(tmp_path / "out").mask().all()
    dense, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "out/backbone"))
    assert dense.keys() == ours.keys() and all(torch.equal(dense[name], ours[name]) for name in dense)
    assert json.loads((tmp_path / "out/backbone/config.json").read_text())["model_type"] == "llama"


def test_a_fresh_process_proves(made, fresh_process, tmp_path):
    report = export(made.module, tmp_path / "out")
    assert report["passed"] and report["dtype"] == "float32" and report["device"] == "cpu"


def test_the_module_stays_as_it_was(made, tmp_path):
    before = {name: tensor.clone() for name, tensor in made.module.state_dict().items()}
    made.module.gates.set(torch.ones(1, len(made.module.gates.kept)))
    columns, config = made.module.gates._columns, made.module.backbone.config.to_dict()
    export(made.module, tmp_path / "out")
    after = made.module.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert made.module.gates._columns is columns
    assert made.module.backbone.config.to_dict() == config


def test_the_same_export_gives_the_same_files(made, tmp_path):
    for name in "ab":
        export(made.module, tmp_path / name, prove=False)
    for file in ["koff.json", *read_manifest(tmp_path / "a").files]:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


# --------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_numbers_are_those_of_results_json_and_of_the_files(tmp_path, family):
    module = tiny_decomposition(tmp_path, family)
    export(module, tmp_path / "out", prove=False)
    manifest, figures = read_manifest(tmp_path / "out"), mask_and_size(module)
    said, found = figures["parameters"], manifest.parameters
    assert counted(tmp_path / "out" / "backbone") == found["backbone"] == said["backbone_kept"]
    assert counted(tmp_path / "out") == found["stored"] == said["stored"]
    assert found["active"] == said["active_by_domain"]
    assert found["dense_total"] == said["dense_total"] == counted(tmp_path / "dense")
    for domain in DOMAINS:
        assert counted(tmp_path / "out" / "memories" / domain) == said["memory"][domain]
        about = {"rank": 3, "alpha": 6.0, "slots": 5, "parameters": said["memory"][domain]}
        assert manifest.domains[domain].items() >= about.items()
    assert manifest.sparsity == {k: v for k, v in figures["sparsity"].items() if k != "hardened"}
    assert [{k: g[k] for k in ("layer", "kind", "kept", "of")} for g in manifest.kept] == figures["kept_units"]


def test_the_files_are_plain_and_complete(made, tmp_path):
    export(made.module, tmp_path / "out", prove=False)
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    memory = {"memory.json", "adapter_config.json", "adapter_model.safetensors", "kv_memory.safetensors"}
    assert names == {
        "koff.json",
        "export_report.json",
        *(f"memories/{domain}/{name}" for domain in DOMAINS for name in memory),
        "backbone/config.json",
        "backbone/generation_config.json",
        "backbone/model.safetensors",
        "backbone/tokenizer.json",
        "backbone/tokenizer_config.json",
        "backbone/chat_template.jinja",
        "backbone/README.md",
    }
    state = load_file(tmp_path / "out" / "backbone" / "model.safetensors")
    assert "lm_head.weight" not in state and "model.embed_tokens.weight" in state, "tied embeddings are stored once"
    config = json.loads((tmp_path / "out" / "backbone" / "config.json").read_text())
    assert config["use_cache"] and config["model_type"] == "koff_llama" and config["head_dim"] == 16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "backbone")
    assert tokenizer.chat_template == "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.mark.skipif(os.name != "posix", reason="rights are of POSIX systems")
def test_all_files_may_be_read_by_whom_the_umask_says(tmp_path):
    """safetensors by itself lets nobody but their owner read its files."""
    umask = os.umask(0o027)
    try:
        export(tiny_decomposition(tmp_path / "dense"), tmp_path / "out", layout="ragged", prove=False)
    finally:
        os.umask(umask)
    rights = {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert rights == {"0o640"}
    assert not [file for file in (tmp_path / "out").rglob("*") if file.name == ".umask"]


def test_big_models_are_sharded(made, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "SHARD", "40KB")
    assert export(made.module, tmp_path / "out")["passed"]
    backbone = tmp_path / "out" / "backbone"
    index = json.loads((backbone / "model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted(path.name for path in backbone.glob("model-*.safetensors"))
    assert len(shards) > 2 and sorted(set(index.values())) == shards
    assert counted(tmp_path / "out") == read_manifest(tmp_path / "out").parameters["stored"]


def test_a_merged_export_is_one_model_with_its_slots(made, tmp_path):
    export(made.module, tmp_path / "out", "merged", "law", prove=False)
    memory = tmp_path / "out" / "memories" / "law"
    assert {path.name for path in memory.iterdir()} == {"memory.json", "kv_memory.safetensors"}
    manifest = read_manifest(tmp_path / "out")
    assert manifest.domain == "law" and list(manifest.domains) == ["law"] and manifest.domains["law"]["rank"] is None


def test_plain_transformers_loads_the_uniform_layout_and_its_code_the_ragged_one(tmp_path):
    module = tiny_decomposition(tmp_path, uniform=True)
    export(module, tmp_path / "uniform", "uniform", prove=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "uniform" / "backbone")
    assert type(model).__name__ == "LlamaForCausalLM"
    export(tiny_decomposition(tmp_path), tmp_path / "code", with_code=True, prove=False)
    backbone = tmp_path / "code" / "backbone"
    assert json.loads((backbone / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "modeling_koff.KoffLlamaConfig",
        "AutoModelForCausalLM": "modeling_koff.KoffLlamaForCausalLM",
    }
    source = Path(modeling_koff.__file__)
    assert (backbone / "modeling_koff.py").read_bytes() == source.read_bytes()
    verify(tmp_path / "code")


def test_the_licence_travels(tmp_path):
    module = tiny_decomposition(tmp_path)
    (tmp_path / "dense" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (tmp_path / "dense" / "LICENSE.txt").write_text("\n  Apache License\nVersion 2.0\n")
    export(module, tmp_path / "out", prove=False)
    backbone = tmp_path / "out" / "backbone"
    assert read_manifest(tmp_path / "out").licence == "apache-2.0"
    assert (backbone / "LICENSE.txt").read_text() == "\n  Apache License\nVersion 2.0\n"
    card = (backbone / "README.md").read_text()
    assert "\nlicense: apache-2.0\n" in card and "That of the base model: apache-2.0" in card


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({}, None),
        ({"LICENSE": "\n  Apache License\n"}, "Apache License"),
        ({"README.md": "# no head\n"}, None),
        ({"README.md": "---\nlicense: [mit, other]\n---\n"}, "mit, other"),
        ({"README.md": "---\n: [\n---\n", "COPYING": "GPL"}, "GPL"),
        ({"README.md": "---\njust words\n---\n"}, None),
    ],
)
def test_where_a_licence_is_found(tmp_path, files, licence):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licence_of(tmp_path) == licence
    assert licence_of(base_folder("dense", str(tmp_path), None)) == licence
    assert licence_of(base_folder("dense.gguf", str(tmp_path), None)) is None, "it may be anybody's"


def test_the_card_says_what_it_is(made, tmp_path):
    export(made.module, tmp_path / "out", prove=False)
    card, manifest = (tmp_path / "out" / "backbone" / "README.md").read_text(), read_manifest(tmp_path / "out")
    assert f"{manifest.parameters['backbone']:,} of {manifest.parameters['dense_total']:,}" in card
    for name in ("body", "total", "units"):
        assert f"{100 * manifest.sparsity[name]:.2f} %" in card
    assert f"| 0 | {manifest.kept[0]['kept']} of 96 | {manifest.kept[1]['kept']} of 2 |" in card
    assert "import koff_lightning" in card and "load_decomposed" in card and manifest.mask_hash[:12] in card
    assert "name no licence" in card and "license:" not in card
    assert str(tmp_path) not in card and str(made.folder) not in card, "a path means nothing to others"


def test_the_card_names_a_dense_model_of_the_hub_and_no_folder(made, tmp_path, monkeypatch):
    export(made.module, tmp_path / "out", prove=False)
    monkeypatch.chdir(tmp_path)
    manifest = replace(read_manifest(tmp_path / "out"), base={"id": "models/x", "revision": None})
    assert "base_model: models/x\n" in model_card(manifest, False, False)
    (tmp_path / "models" / "x").mkdir(parents=True)
    card = model_card(manifest, False, False)
    assert "base_model" not in card and "models/x" not in card and "`x`" in card


def test_the_card_tells_what_the_run_scored(made, tmp_path):
    def row(*values):
        return dict(zip(("dense_bpb", "koff_bpb", "memory_off_bpb", "swapped_bpb"), values, strict=True))

    results = {"steps": 1200, "domains": {"en": row(1.0, 1.01, 1.2, None)}, "heldout_bytes": {"en": 2000}}
    results |= {"general": {"texts": {"web": row(2.0, None, 2.2, 2.1)}, "heldout_bytes": {"web": 30}}}
    export(made.module, tmp_path / "out", prove=False, results=results)
    card = (tmp_path / "out" / "backbone" / "README.md").read_text()
    assert "after 1,200 steps" in card
    assert "| en | 2,000 | 1.0000 | 1.0100 | 1.2000 |" in card
    assert "| web (no domain; under any memory) | 30 | 2.0000 | 2.1000 | 2.2000 |" in card
    for name, how in (("other", {}), ("merged", {"layout": "merged", "domain": "de", "results": results})):
        export(made.module, tmp_path / name, prove=False, **how)
        assert "Held-out" not in (tmp_path / name / "backbone" / "README.md").read_text(), name
    bare = replace(read_manifest(tmp_path / "out"), domains={})
    assert "| en | 2,000 | 1.0000 | 1.2000 |" in model_card(bare, False, False, results)
    assert "| web (no domain) | 30 | 2.0000 | 2.2000 |" in model_card(bare, False, False, results)


def test_results_of_another_run_or_step_are_not_the_checkpoints(tmp_path):
    checkpoints = tmp_path / "version_0" / "checkpoints"
    checkpoints.mkdir(parents=True)
    config, path = {"model": {"a": 1}, "data": {}}, checkpoints / "last.ckpt"
    torch.save({"global_step": 7}, path)
    for found, mine, taken in (
        ({"config": config, "steps": 7}, config, True),
        ({"config": config, "steps": 8}, config, False),  # an earlier checkpoint of the run
        ({"config": config | {"data": 1}, "steps": 7}, config, False),
        ({"steps": 7}, config, False),
        ([], config, False),
        ({"config": None, "steps": 7}, None, False),
    ):
        (tmp_path / "results.json").write_text(json.dumps(found))
        assert run_results(path, mine) == (found if taken else None)
    (tmp_path / "results.json").write_text("{")
    assert run_results(path, config) is None
    (tmp_path / "results.json").unlink()
    assert run_results(path, config) is None


# ---------------------------------------------------------------------------------------------------- what fails


def spoil(monkeypatch, part):
    """Let the export write something wrong: half a weight, half a memory, nothing loadable, or no numbers."""
    whole_backbone, whole_memory = Ragged.backbone, Ragged.memory

    def backbone(*arguments):
        config, state = whole_backbone(*arguments)
        name = next(name for name in state if name.endswith("layers.1.mlp.up_proj.weight"))
        wrong = {
            "weight": state[name] * 1.5,
            "slightly": state[name] * 1.003,
            "nan": state[name] * math.nan,
            "shape": state[name][1:],
        }
        return config, state | {name: wrong.get(part, state[name]).contiguous()}

    def memory(layout, lora, kv, *rest):
        lora, kv = whole_memory(layout, lora, kv, *rest)
        return lora, {k: v.flip(1) * 2 for k, v in kv.items()} if part == "memory" else kv

    monkeypatch.setattr(Ragged, "backbone", backbone)
    monkeypatch.setattr(Ragged, "memory", memory)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("weight", "computes other logits"),
        ("slightly", "computes other logits"),
        ("memory", "computes other logits"),
        ("nan", "could not use it"),  # loading it refuses numbers that are not finite
        ("shape", "could not use it"),
    ],
)
def test_what_is_wrong_is_set_aside_and_the_old_stays(made, tmp_path, monkeypatch, part, message):
    out = tmp_path / "out"
    export(made.module, out)
    before = (out / "koff.json").read_text()
    for _ in range(2):  # what failed before is replaced
        with monkeypatch.context() as patch:
            spoil(patch, part)
            with pytest.raises(KoffError, match=message) as error:
                export(made.module, out, overwrite=True)
    assert str(error.value).startswith(f"{out} was not written: a fresh process {message}")
    assert "\n" not in str(error.value)
    assert (out / "koff.json").read_text() == before and verify(out)
    report = json.loads((tmp_path / "out.failed" / "export_report.json").read_text())
    assert report["passed"] is False
    if part == "slightly":
        assert report["greedy"] != "different" and report["relative_diff"] < 1e-2, "only the logits tell"
    if part == "memory":
        assert [case["relative_diff"] < 1e-4 for case in report["memories"]] == [True, False, False, False]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.failed"]


def test_a_file_that_changes_before_the_proof(made, tmp_path, monkeypatch):
    check = proof.main

    def tamper(folder, reference):
        file = Path(folder) / "memories" / "fr" / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
        return check(folder, reference)

    monkeypatch.setattr(proof, "main", tamper)
    with pytest.raises(KoffError, match=r"fr.*adapter_model\.safetensors was changed"):
        export(made.module, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["cuda:0", "cpu"])
def test_a_gpu_without_room_leaves_the_proof_to_the_cpu(made, tmp_path, monkeypatch, place):
    compare_on, write, asked = proof.compare_on, proof.save_file, []

    def full(device, *paths):
        asked.append(device)
        if len(asked) == 1:
            raise RuntimeError("CUDA error: out of memory\nmore")
        return compare_on(device, *paths)

    def written_there(tensors, path, about):
        write(tensors, path, {"about": about["about"].replace('"device": "cpu"', f'"device": "{place}"')})

    monkeypatch.setattr(proof, "compare_on", full)
    monkeypatch.setattr(proof, "save_file", written_there)
    if place == "cpu":
        with pytest.raises(KoffError, match="CUDA error: out of memory"):
            export(made.module, tmp_path / "out")
    else:
        report = export(made.module, tmp_path / "out")
        assert report["passed"]
        assert report["device"] == "cpu"
    assert asked == list(dict.fromkeys([place, "cpu"]))


def test_a_proof_that_dies(made, tmp_path, monkeypatch):
    died = SimpleNamespace(returncode=-9, stderr="words\nKilled\n")
    monkeypatch.setattr(proof.subprocess, "run", lambda *_, **__: died)
    with pytest.raises(KoffError, match="the process ended with status -9: Killed"):
        export(made.module, tmp_path / "out")


def test_a_process_that_was_begun_before_compares_alike(made, fresh_process, tmp_path):
    begun = proof.begin()
    report = export(made.module, tmp_path / "out", begun=begun)
    assert report["passed"] and begun.returncode == 0


def test_a_begun_process_that_ended_as_it_waited_is_no_fault_of_the_artifact(made, tmp_path):
    """One that ends as it compares is."""
    words = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    waiting = subprocess.Popen([sys.executable, "-c", "raise SystemExit(9)"], **words)
    waiting.wait()
    assert export(made.module, tmp_path / "out", begun=waiting)["passed"]
    comparing = subprocess.Popen([sys.executable, "-c", "input(); raise SystemExit(9)"], **words)
    with pytest.raises(KoffError, match="the process ended with status 9: it said nothing"):
        export(made.module, tmp_path / "other", begun=comparing)


def test_a_begun_process_ends_without_a_word_when_nothing_is_to_be_proven(fresh_process):
    begun = proof.begin()
    assert begun.communicate("") == ("", "")
    assert begun.returncode == 0
    callback = ExportArtifact()
    callback._begun = begun = proof.begin()
    callback.on_exception(None, None, KeyboardInterrupt())
    assert begun.returncode == -9 and callback._begun is None


def test_greedy_tokens_may_differ_only_at_a_tie(made, tmp_path, monkeypatch):
    """Wrong with a cache alone: the logits of whole forwards agree."""
    generate = proof.DecomposedModel.generate

    def wrong(self, *arguments, **options):
        tokens = generate(self, *arguments, **options)
        tokens[1, -1] += 1
        return tokens

    monkeypatch.setattr(proof.DecomposedModel, "generate", wrong)
    with pytest.raises(KoffError, match=r"generates other tokens from it \(memory de\)"):
        export(made.module, tmp_path / "out")
    monkeypatch.setitem(proof.TOLERANCE, "float32", 1.0)  # everything is a tie
    report = export(made.module, tmp_path / "out")
    assert report["passed"] and report["greedy"] == "tie"
    assert [case["greedy"] for case in report["memories"]] == ["equal", "tie", "equal", "equal"]


def test_another_tokenizer_is_noticed(made, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(made.folder / "dense")
    tokenizer.add_tokens(["the"])
    write = exporting._write_companions
    spoiled = lambda order, *rest: write(replace(order, tokenizer=tokenizer), *rest)  # noqa: E731
    monkeypatch.setattr(exporting, "_write_companions", spoiled)
    with pytest.raises(KoffError, match="other token ids from its tokenizer"):
        export(made.module, tmp_path / "out")


@pytest.mark.parametrize("writer", ["save_file", "write_memory"])
def test_a_full_disk_leaves_nothing(made, tmp_path, monkeypatch, writer):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, writer, full)
    with pytest.raises(KoffError, match=r"^cannot write .*out: No space left on device$"):
        export(made.module, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_not_overwritten_unasked(made, tmp_path):
    export(made.module, tmp_path / "out", prove=False)
    with pytest.raises(KoffError, match="exists already: --overwrite replaces it"):
        export(made.module, tmp_path / "out", "masked", prove=False)
    export(made.module, tmp_path / "out", "masked", overwrite=True, prove=False)
    assert read_manifest(tmp_path / "out").layout == "masked"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "round"}, "layout must be one of ragged, uniform, deci, masked, merged; got 'round'"),
        ({"layout": "merged"}, "give --layout merged and --domain together"),
        ({"domain": "de"}, "give --layout merged and --domain together"),
        ({"layout": "merged", "domain": "nl"}, "no domain 'nl' to merge; the run has de, fr, law"),
        ({"layout": "masked", "with_code": True}, "layout 'masked' needs no code of ours"),
        ({"layout": "uniform"}, "wants one intermediate_size for all layers"),
    ],
)
def test_what_is_refused(made, tmp_path, options, message):
    with pytest.raises(KoffError, match=message):
        export(made.module, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_mask_is_refused(tmp_path):
    module = tiny_decomposition(tmp_path)
    module.gates.hardened.fill_(False)
    with pytest.raises(KoffError, match="the mask of this run is not fixed yet"):
        export(module, tmp_path / "out")


# What no value of the right kind replaces: name of a part -> how it is spoilt, and what is said of it.
LORA = "layers.0.self_attn.q_proj.lora_A.koff_law.weight"
NOT_NUMBERS = {
    "lora_nan": (lambda m: m.memories.lora_parameters("law")[0], math.nan, LORA),
    "lora_inf": (lambda m: m.memories.lora_parameters("law")[-1], math.inf, "down_proj.lora_B.koff_law.weight"),
    "kv_nan": (lambda m: m.memories.slots("law").value[1], math.nan, "memories.kv.koff_law.value.1"),
    "sink_nan": (lambda m: m.memories.slots("law").sink_key[0], -math.inf, "memories.kv.koff_law.sink_key.0"),
}


@pytest.mark.parametrize("kind", NOT_NUMBERS)
def test_memories_that_hold_no_numbers_are_refused(tmp_path, kind):
    part, value, name = NOT_NUMBERS[kind]
    module = tiny_decomposition(tmp_path)
    with torch.no_grad():
        part(module).view(-1)[1] = value
    with pytest.raises(KoffError, match=f"{re.escape(name)} holds nan or inf"):
        export(module, tmp_path / "out", prove=False)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("arm", [None, "law"], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gated_model_that_gives_no_numbers_proves_nothing(tmp_path, monkeypatch, arm, value):
    """For whatever reason, also where the artifact gives the same: `nan` differs from nothing by less than allowed."""
    gated, written = proof._gated, proof._written

    def broken(compute):
        def logits(model, ids, mask, rows):
            found = compute(model, ids, mask, rows)
            found[[row == arm for row in rows], -1, 7] = value
            return found

        return logits

    monkeypatch.setattr(proof, "_gated", broken(gated))
    module = tiny_decomposition(tmp_path)
    for both in (False, True):
        if both:
            monkeypatch.setattr(proof, "_written", broken(written))
        with pytest.raises(KoffError, match=f"the model itself computes nan or inf .memory {arm}.: there is nothing"):
            export(module, tmp_path / "out")
    report = json.loads((tmp_path / "out.failed" / "export_report.json").read_text(), parse_constant=pytest.fail)
    assert [case["finite"] for case in report["memories"]] == [case["memory"] != arm for case in report["memories"]]


@pytest.mark.parametrize("arm", [None, "de", "law"], ids=str)
def test_an_artifact_that_gives_no_numbers_for_one_memory(tmp_path, monkeypatch, arm):
    written = proof._written

    def broken(model, ids, mask, rows):
        found = written(model, ids, mask, rows)
        found[[row == arm for row in rows], -1, 7] = math.nan
        return found

    monkeypatch.setattr(proof, "_written", broken)
    with pytest.raises(KoffError, match="a fresh process computes other logits"):
        export(tiny_decomposition(tmp_path), tmp_path / "out")


def test_numbers_that_run_out_on_the_way_are_noticed(tmp_path, monkeypatch):
    """Only the continuation shows it: the logits that are compared are those of the first step."""
    gated, calls = proof._gated, []

    def later(module, ids, mask, rows):
        calls.append(len(rows))
        found = gated(module, ids, mask, rows)
        if len(calls) > 4 + 3:  # after the arms, and three steps
            found[1, -1] = math.nan
        return found

    monkeypatch.setattr(proof, "_gated", later)
    with pytest.raises(KoffError, match="the model itself computes nan or inf .memory de."):
        export(tiny_decomposition(tmp_path), tmp_path / "out")


def test_a_fixed_mask_that_removes_nothing_is_refused(tmp_path):
    module = tiny_decomposition(tmp_path)
    module.gates.harden(torch.ones_like(module.gates.kept))
    with pytest.raises(KoffError, match=r"the mask is fixed but removes nothing, and the run's target is 0\.3"):
        export(module, tmp_path / "out")


def test_a_threshold_that_closed_nothing_leaves_the_backbone_whole(tmp_path):
    """What the run ended with is exported, and said: the dense backbone, its memories, and why it is whole."""
    module = tiny_decomposition(tmp_path, sparsity=SparsitySpec(target=0.3, harden="threshold", min_channels=4))
    module.gates.logits.data.fill_(8.0)
    module.harden()
    assert module.gates.kept.all()
    report = export(module, tmp_path / "out")
    assert report["passed"] and read_manifest(tmp_path / "out").closed_nothing
    assert "parameters (whole: the threshold closed no gate), " in summary(tmp_path / "out", report)
    dense, cut = module.budget.denominators["total"], read_manifest(tmp_path / "out").parameters["backbone"]
    assert dense == cut
    said = sentences(mask_and_size(module))
    assert "the threshold closed no gate, so the backbone is whole: train longer" in said[-1]
    module.gates.logits.data[0] = -8.0  # now the logits close a gate that the mask keeps: a file that was changed
    with pytest.raises(KoffError, match="the mask is fixed but removes nothing"):
        export(module, tmp_path / "out", overwrite=True)


# --------------------------------------------------------------------------------------- checkpoints, whole runs


def train(folder, *callbacks, **options):
    """A run of a second over a random Llama with a tokenizer."""
    if not (folder / "backbone").exists():
        toy_tokenizer(folder / "backbone")
        sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 24, "head_dim": 8}
        tiny_model("llama", **sizes).save_pretrained(folder / "backbone")
    module = tiny_module(folder, **options)
    tiny_trainer(folder, callbacks, enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks)).fit(
        module, RandomText()
    )
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a finished run: checkpoint, config.yaml, results, artifact."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text("model: {backbone: x}\ndata: {hf_token: abc}\n")
    checkpoint = ModelCheckpoint(folder / "checkpoints", save_last=True)
    train(folder, RunReport(), checkpoint, ExportArtifact(prove=False))
    return folder


def export_by_command(run, out, *options):
    return main(["export", "--ckpt", str(run / "checkpoints" / "last.ckpt"), "--out", str(out), *options])


def test_a_checkpoint_gives_the_artifact_that_the_run_left(run, tmp_path, capsys):
    assert export_by_command(run, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "2 memories; a fresh process computes the same from it" in said
    ours, theirs = read_manifest(tmp_path / "out"), read_manifest(run / "artifact")
    same = {"config": None, "files": {}}
    assert replace(ours, **same) == replace(theirs, **same)
    assert ours.config == {"model": {"backbone": "x"}, "data": {"hf_token": "(removed)"}}
    assert theirs.config["model"]["sparsity"]["target"] == 0.2
    assert ours.parameters["active"] == json.loads((run / "results.json").read_text())["parameters"]["active_by_domain"]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out/backbone" / name).read_bytes() == (run / "artifact/backbone" / name).read_bytes()


def test_the_command_refuses_and_overwrites(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert export_by_command(run, tmp_path / "out") == 2
    assert capsys.readouterr().err.strip().endswith("exists already: --overwrite replaces it, or give another folder")
    assert export_by_command(run, tmp_path / "out", "--overwrite") == 2
    assert "holds no koff.json" in capsys.readouterr().err
    assert export_by_command(run, tmp_path / "out", "--check", "hff") == 2
    assert "no engine 'hff' to check. Did you mean 'hf'?" in capsys.readouterr().err
    assert export_by_command(run, tmp_path / "out", "--device", "mars") == 2
    assert "device 'mars' cannot be used here" in capsys.readouterr().err
    assert export_by_command(run, tmp_path / "out", "--device", "meta") == 2
    assert "device 'meta' cannot be used here: it holds no numbers" in capsys.readouterr().err
    assert export_by_command(run, tmp_path / "other", "--layout", "masked", "--check", "vllm") == 0
    assert re.search(r"^vLLM +backbone +yes +with this package beside it", capsys.readouterr().out, re.MULTILINE)


def test_a_backbone_that_has_moved(run, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    content = torch.load(moved / "checkpoints" / "last.ckpt", weights_only=True)
    content["hyper_parameters"] |= {"backbone": "./gone/backbone"}
    torch.save(content, moved / "checkpoints" / "last.ckpt")
    assert export_by_command(moved, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "'./gone/backbone': no such folder" in said and "say where it is with --backbone" in said
    assert export_by_command(moved, tmp_path / "out", "--backbone", str(run / "backbone")) == 0
    tiny_model("llama", vocab_size=300, hidden_size=32, intermediate_size=24, head_dim=8, seed=7).save_pretrained(
        tmp_path / "another"
    )
    assert export_by_command(moved, tmp_path / "new", "--backbone", str(tmp_path / "another")) == 2
    assert "but" in (said := capsys.readouterr().err) and "has hash" in said and "load that backbone" in said


class Evil:
    def __reduce__(self):
        return (open, ("evil", "w"))


def test_checkpoints_that_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)

    def refused(content, message):
        path = tmp_path / "some.ckpt"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(KoffError, match=message) as error:
            from_checkpoint(path)
        assert "\n" not in str(error.value)

    refused(good | {"hyper_parameters": Evil()}, "cannot read .* as a checkpoint")
    assert not (tmp_path / "evil").exists(), "nothing in a checkpoint is run"
    refused((run / "checkpoints" / "last.ckpt").read_bytes()[:5000], "cannot read .* as a checkpoint")
    refused(b"", "cannot read .* as a checkpoint")
    refused({"state_dict": {}}, "is not a checkpoint of `koff fit`")
    refused([1, 2], "is not a checkpoint of `koff fit`")
    newer = good["hyper_parameters"] | {"sparsity": {"colour": "red"}}
    refused(
        good | {"hyper_parameters": newer}, r"by another release of koff-lightning \(sparsity has no option 'colour'\)"
    )
    added = good["hyper_parameters"] | {"artifact": "runs/demo/artifact"}
    refused(good | {"hyper_parameters": added}, "holds memories for the artifact 'runs/demo/artifact'")
    with pytest.raises(KoffError, match="no such file. `koff fit` leaves one"):
        from_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(KoffError, match=f"is a folder, wanted is a checkpoint: give {tmp_path / 'some.ckpt'}"):
        from_checkpoint(tmp_path)


OTHER_KINDS = {
    "kv_bool": ("memories.kv.koff_law.value.1", torch.bool),
    "kv_int64": ("memories.kv.koff_law.value.0", torch.int64),
    "kv_complex": ("memories.kv.koff_law.key.1", torch.complex64),
    "sink_half": ("memories.kv.koff_law.sink_key.0", torch.float16),
    "lora_int8": ("backbone.model.layers.0.mlp.down_proj.lora_A.koff_law.weight", torch.int8),
    "lora_bf16": ("backbone.model.layers.1.mlp.up_proj.lora_B.koff_en.weight", torch.bfloat16),
    "mask_uint8": ("gates.kept", torch.uint8),
    "mask_float": ("gates.hardened", torch.float32),
    "logits_double": ("gates.logits", torch.float64),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_tensors_of_another_kind_are_refused(run, tmp_path, capsys, kind):
    """torch would cast them without a word."""
    name, dtype = OTHER_KINDS[kind]
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    state = content["state_dict"]
    due = state[f"model.{name}"].dtype
    state[f"model.{name}"] = state[f"model.{name}"].to(dtype)
    torch.save(content, tmp_path / "some.ckpt")
    assert main(["export", "--ckpt", str(tmp_path / "some.ckpt"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{name} is {dtype}" in said and str(due).removeprefix("torch.") in said
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_cannot_ask_for_code_to_be_run(run, tmp_path):
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    content["hyper_parameters"]["trust_remote_code"] = True
    torch.save(content, tmp_path / "some.ckpt")
    assert not from_checkpoint(tmp_path / "some.ckpt").loading.get("trust_remote_code")


def test_a_run_leaves_a_proven_artifact(fresh_process, tmp_path, capsys):
    module = train(tmp_path, ExportArtifact())
    assert "wrote " in capsys.readouterr().out
    assert json.loads((tmp_path / "artifact" / "export_report.json").read_text())["passed"]
    assert torch.equal(read_manifest(tmp_path / "artifact").mask(), module.model.gates.kept)
    assert load_decomposed(tmp_path / "artifact").domains == ["en", "law"]
    train(tmp_path, ExportArtifact(layout="masked", prove=False))
    assert read_manifest(tmp_path / "artifact").layout == "masked", "a second run of the folder replaces it"


def test_no_run_deletes_a_memory_that_was_added_to_its_artifact(tmp_path):
    export_ = ExportArtifact(prove=False)
    train(tmp_path, export_)
    artifact = tmp_path / "artifact"
    add_memory(artifact, artifact / "memories" / "en", "added")
    before = {path: path.read_bytes() for path in artifact.rglob("*") if path.is_file()}
    with pytest.raises(KoffError, match="has the memory of 'added', which this run does not make and would delete"):
        train(tmp_path, export_)
    assert {path: path.read_bytes() for path in artifact.rglob("*") if path.is_file()} == before
    remove_memory(artifact, "added")
    train(tmp_path, export_)


@pytest.mark.parametrize("lora", [LoraSpec(rank=2), None], ids=["with memories", "without"])
def test_a_run_says_what_to_do_with_its_artifact(tmp_path, capsys, lora):
    """In commands that run as they stand, also in a folder with a space and without any memory."""
    train(tmp_path / "my run", ExportArtifact(prove=False), lora=lora, kv=None)
    lines = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line, comments=True) for line in lines[lines.index("next:") + 1 :]]
    assert [words[:2] for words in commands] == [["koff", verb] for verb in ("inspect", "generate", "analyze")]
    for _, verb, *words in commands:
        first_look.look(verb, words)
    assert main(commands[0][1:]) == 0
    assert ("--domain" in commands[1]) == (lora is not None)
    assert main([*commands[1][1:], "--max_new_tokens", "1"]) == 0


def test_a_run_without_a_fixed_mask_says_so(tmp_path, capsys):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 3

    train(tmp_path, ExportArtifact(), Stop())
    assert "artifact: the run ended before its mask was fixed" in capsys.readouterr().out
    assert not (tmp_path / "artifact").exists()


@pytest.mark.parametrize("how", ["off", "fast_dev_run", "rank"])
def test_runs_that_write_none(tmp_path, monkeypatch, how):
    monkeypatch.setattr("koff_lightning.callbacks.export.export", None)
    callback = ExportArtifact(enabled=how != "off")
    trainer = tiny_trainer(tmp_path, [callback], fast_dev_run=how == "fast_dev_run")
    if how == "rank":
        monkeypatch.setattr(type(trainer), "is_global_zero", False)
    module = tiny_module(tmp_path)
    trainer.fit(module, RandomText())
    assert not (tmp_path / "artifact").exists()


def test_what_would_fail_at_the_end_fails_at_the_start(tmp_path):
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "thesis.tex").touch()
    with pytest.raises(KoffError, match="so it is not overwritten"):
        train(tmp_path, ExportArtifact(), Fail())
    with pytest.raises(KoffError, match="layout must be one of"):
        ExportArtifact(layout="round")


class Fail(Callback):
    def on_train_start(self, *_):
        raise AssertionError("the run began")
