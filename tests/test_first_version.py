"""What the first version wrote still loads and gives the same figures: checkpoints, artefact, mask, saved configs.

The files are in data/first_version, whose README says how they were made. Here they are used by commands and top-level
names alone, so that the inside of the package may change.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import koff_lightning
from koff_lightning import KOFFModule, load_decomposed
from koff_lightning.cli import main

DATA = Path(__file__).parent / "data" / "first_version"
MIDDLE = "run/version_0/checkpoints/epoch=0-step=16.ckpt"
FINISHED = "run/version_0/checkpoints/last.ckpt"
MASK = "fisher/checkpoints/last.ckpt"
DOMAINS = ("weather", "kitchen")
ARMS = ("dense", "koff", "memory_off", "swapped")
CALLBACKS = [
    *("AnnealSparsity", "Checkpoints", "ContinuedLog", "ExportArtefact", "GradientCoverage", "KoffProgress", "LMEval"),
    *("Preview", "RunReport", "anneal.AnnealSparsity", "checkpoints.Checkpoints", "checkpoints.ContinuedLog"),
    *("coverage.GradientCoverage", "export.ExportArtefact", "lm_eval.LMEval", "preview.Preview"),
    *("progress.KoffProgress", "report.RunReport"),
]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Paths in the files are relative to their folder; signal handlers are afterwards as before."""
    monkeypatch.chdir(DATA)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The run that went on from its middle to its end."""
    root = tmp_path_factory.mktemp("resumed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(DATA)
        koff("fit", "--config", "run.yaml", "--ckpt_path", MIDDLE, *quiet(root))
    return root


@pytest.fixture(scope="module")
def model():
    return load_decomposed(DATA / "run" / "artifact")


def koff(*argv):
    assert main([str(word) for word in argv]) == 0


def quiet(root):
    return f"--trainer.default_root_dir={root}", "--export.enabled=false", "--data.open_with_start=false"


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def rows(root):
    """Rows of the only log below a run's folder."""
    (path,) = root.glob("version_*/metrics.csv")
    with path.open(newline="", encoding="utf-8") as lines:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(lines)]


def near(expected):
    """Bits per byte, or nats of a document, as another processor may round them."""
    return pytest.approx(expected, abs=1e-5, rel=1e-6)


def stored_figures(stage, arms, run="run"):
    """What a log says of the held-out text, by the run's results."""
    results = read(DATA / run / "results.json")
    figures = {f"{stage}/{arm}_bpb/{d}": results["domains"][d][f"{arm}_bpb"] for arm in arms for d in DOMAINS}
    return figures | {f"{stage}/{arm}_bpb": results["mean"][f"{arm}_bpb"] for arm in arms}


def logged(root, stage):
    return {name: value for name, value in rows(root)[-1].items() if name.startswith(f"{stage}/")}


def tensors(folder):
    """Every tensor of an artefact by its file and name."""
    files = sorted(folder.rglob("*.safetensors"))
    return {(str(f.relative_to(folder)), name): value for f in files for name, value in load_file(f).items()}


# ----------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("config", ["run.yaml", "run/version_0/config.yaml"])
def test_a_finished_run_scores_as_it_did(tmp_path, config):
    koff("test", "--config", config, "--ckpt_path", FINISHED, *quiet(tmp_path))
    assert logged(tmp_path, "test") == near(stored_figures("test", ARMS))


def test_it_validates_as_it_did(tmp_path):
    koff("validate", "--config", "run.yaml", "--ckpt_path", FINISHED, *quiet(tmp_path))
    assert logged(tmp_path, "val") == near(stored_figures("val", ["koff"]))


def test_it_is_exported_as_it_was(tmp_path):
    koff("export", "--ckpt", FINISHED, "--out", tmp_path / "artifact")
    found, stored = tensors(tmp_path / "artifact"), tensors(DATA / "run" / "artifact")
    assert found.keys() == stored.keys()
    assert not [name for name, value in stored.items() if not same(found[name], value)]
    was, now = (read(folder / "koff.json") for folder in (DATA / "run" / "artifact", tmp_path / "artifact"))
    assert now["parameters"] == was["parameters"]
    assert now["kept"] == was["kept"]


def same(found, stored):
    return found.dtype == stored.dtype and torch.equal(found, stored)


def test_a_run_cut_short_goes_on_to_the_same_end(resumed):
    was, now = (read(folder / "results.json") for folder in (DATA / "run", resumed))
    for part in ("steps", "tokens", "heldout_bytes", "kept_units", "parameters"):
        assert now[part] == was[part], part
    assert was["sparsity"].items() <= now["sparsity"].items(), "later versions count in more ways"
    of_then = {domain: {key: now["domains"][domain][key] for key in row} for domain, row in was["domains"].items()}
    assert of_then == {domain: near(row) for domain, row in was["domains"].items()}, "later versions tell more"
    documents = read(DATA / "run" / "documents.json")
    for domain, scores in read(resumed / "documents.json").items():
        assert scores["bytes"] == documents[domain]["bytes"]
        assert scores["nats"] == {arm: near(nats) for arm, nats in documents[domain]["nats"].items()}


def test_its_log_goes_on(resumed):
    was, now = rows(DATA / "run"), rows(resumed)
    timed = ("throughput", "seconds", "time")
    assert len(now) == len(was) + 1, "later versions log the final scores"
    assert not {name for name in now[-1] if name not in ("step", "epoch") and not name.startswith("test/")}
    for old, new in zip(was, now[:-1], strict=True):
        assert new.keys() == old.keys()
        assert new == {name: new[name] if any(t in name for t in timed) else near(v) for name, v in old.items()}


@pytest.mark.filterwarnings("ignore:Found keys that are in the model")  # of the backbone
def test_what_it_has_trained_is_the_same(resumed):
    (path,) = resumed.glob("version_*/checkpoints/last.ckpt")
    was, now = (KOFFModule.load_from_checkpoint(p).state_dict() for p in (FINISHED, path))
    assert now.keys() == was.keys()
    before = KOFFModule.load_from_checkpoint(MIDDLE).state_dict()
    moved = [name for name, value in was.items() if not torch.equal(value, before[name])]
    assert sum("lora" in name for name in moved) >= 2 * 2 * 2 * 7, "of two domains and layers A and B of seven linears"
    assert sum(".kv." in name for name in moved) >= 2 * 2, "keys and values of two domains"
    assert sum("gates." in name or "penalty." in name for name in moved) >= 4, "logits, hardened, kept and multipliers"
    for name, value in was.items():
        torch.testing.assert_close(now[name], value, atol=1e-5, rtol=1e-5, msg=name)


def test_the_newest_checkpoint_of_a_copied_folder_is_found(tmp_path):
    shutil.copytree(DATA / "run", tmp_path / "run")
    koff("test", "--config", "run.yaml", "--ckpt_path", "last", "--trainer.logger=false", *quiet(tmp_path / "run"))


@pytest.mark.parametrize("checkpoint", [pytest.param(MIDDLE, marks=pytest.mark.slow), FINISHED])
def test_a_new_run_starts_from_old_weights(tmp_path, checkpoint):
    still = [f"--model.optim.{rate}=1e-12" for rate in ("mask_lr", "multiplier_lr", "lora_lr", "kv_lr")]
    argv = ["--model.warm_start", checkpoint, "--trainer.max_steps=1", "--anneal.warmup=1", "--anneal.ramp=0"]
    koff("fit", "--config", "run.yaml", *argv, "--anneal.hold=0", *still, *quiet(tmp_path))
    found, stored = (read(folder / "results.json")["domains"] for folder in (tmp_path, DATA / "run"))
    arms = ARMS if checkpoint == FINISHED else ("dense",)
    for domain in DOMAINS:
        for arm in arms:
            assert found[domain][f"{arm}_bpb"] == near(stored[domain][f"{arm}_bpb"])
        assert found[domain]["koff_bpb"] < found[domain]["swapped_bpb"] - 0.05, "it has learned something"


# --------------------------------------------------------------------------------------------- one-shot mask


def test_a_one_shot_mask_scores_as_it_did(tmp_path):
    koff("test", "--config", "fisher/config.yaml", "--ckpt_path", MASK, "--trainer.logger=null", *quiet(tmp_path))
    found = logged(tmp_path, "test")
    stored = stored_figures("test", ARMS[:-1], "fisher")
    assert {name: found[name] for name in stored} == near(stored)


@pytest.mark.parametrize("option", ["mask", pytest.param("prior", marks=pytest.mark.slow)])
def test_a_one_shot_mask_is_taken(tmp_path, option):
    koff("fit", "--config", "run.yaml", f"--model.{option}", MASK, "--trainer.max_steps=4", *quiet(tmp_path))
    if option == "prior":
        return
    was, now = (read(folder / "results.json") for folder in (DATA / "fisher", tmp_path))
    assert now["kept_units"] == was["kept_units"]
    bare = {domain: row["memory_off_bpb"] for domain, row in now["domains"].items()}
    assert bare == near({domain: row["koff_bpb"] for domain, row in was["domains"].items()})


# -------------------------------------------------------------------------------------------------- artefact


@pytest.mark.parametrize("domain", [*DOMAINS, None])
def test_the_artefact_computes_what_it_did(model, domain):
    stored = read(DATA / "greedy.json")
    ids = model.tokenizer(stored["prompt"], return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == stored["input_ids"]
    logits = load_file(DATA / "logits.safetensors")[domain or "off"]
    with torch.no_grad():
        found = model(ids, domains=domain).logits[0]
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=0)
    greedy = stored["greedy"][domain or "off"]
    made = model.generate(ids, domains=domain, max_new_tokens=len(greedy) - ids.shape[1], do_sample=False)
    assert made[0].tolist() == greedy


def test_the_artefact_is_inspected_and_generates(capsys):
    koff("inspect", "run/artifact")
    said = capsys.readouterr().out
    assert all(name in said for name in (*DOMAINS, "ragged"))
    koff("memory", "list", "run/artifact")
    said = capsys.readouterr().out
    assert all(name in said for name in DOMAINS)
    prompt = read(DATA / "greedy.json")["prompt"]
    koff("generate", "--model", "run/artifact", "--domain", "weather", "--prompt", prompt, "--max-new-tokens", "4")


def test_its_memories_go_out_and_come_back(tmp_path, capsys):
    shutil.copytree(DATA / "run" / "artifact", tmp_path / "artifact")
    koff("memory", "remove", tmp_path / "artifact", "kitchen")
    koff("memory", "add", tmp_path / "artifact", "run/artifact/memories/kitchen")
    found, stored = tensors(tmp_path / "artifact"), tensors(DATA / "run" / "artifact")
    assert found.keys() == stored.keys()
    assert not [name for name, value in stored.items() if not same(found[name], value)]


@pytest.mark.slow
def test_it_takes_a_domain_that_is_trained_later(tmp_path):
    shutil.copytree(DATA / "run" / "artifact", tmp_path / "artifact")
    config = yaml.safe_load((DATA / "run.yaml").read_text(encoding="utf-8"))
    config["data"]["domains"] = {"later": "text/kitchen.jsonl"}
    config["model"] = {"artifact": str(tmp_path / "artifact"), "sparsity": {"target": 0.0}, "loss": {"kl": 0.0}}
    del config["anneal"]
    (tmp_path / "later.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    root = f"--trainer.default_root_dir={tmp_path / 'later'}"
    koff("fit", "--config", tmp_path / "later.yaml", "--trainer.max_steps=2", root)
    assert load_decomposed(tmp_path / "artifact").domains == [*DOMAINS, "later"]


# --------------------------------------------------------------------------------------------- saved configs


def test_a_saved_config_with_class_paths_is_read(capsys):
    koff("fit", "--config", "ddp.yaml", "--print_config")
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert trainer["strategy"]["class_path"].endswith("ReplicatedStrategy")
    assert len(trainer["callbacks"]) == 4
    assert not trainer["callbacks"][0]["init_args"]["enabled"]


def test_its_callbacks_are_built(tmp_path):
    one = ["--trainer.strategy=auto", "--trainer.devices=1", f"--trainer.default_root_dir={tmp_path}"]
    koff("fit", "--config", "ddp.yaml", "--dry-run", *one)


@pytest.mark.slow
def test_its_strategy_is_built(tmp_path):
    words = ["fit", "--config", "ddp.yaml", "--dry-run", f"--trainer.default_root_dir={tmp_path}"]
    command, here = [sys.executable, "-m", "koff_lightning", *words], str(Path(koff_lightning.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": here}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["ReplicatedStrategy", "ShardedStrategy"])
def test_classes_go_by_their_old_paths(tmp_path, capsys, name):
    callbacks = [{"class_path": f"koff_lightning.callbacks.{path}"} for path in CALLBACKS]
    trainer = {"strategy": {"class_path": f"koff_lightning.strategies.{name}"}, "callbacks": callbacks}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"trainer": trainer}), encoding="utf-8")
    koff("fit", "--config", "run.yaml", "--config", tmp_path / "mine.yaml", "--print_config")
    read_back = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert read_back["strategy"]["class_path"].endswith(name)
    assert len(read_back["callbacks"]) == len(CALLBACKS)
