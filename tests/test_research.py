"""What a researcher adds from outside: docs/research.md runs as it stands, and its promises hold where it is silent."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from tiny_artifact import tiny_artifact
from tiny_command import small_fits
from tiny_run import RandomText, tiny_module, tiny_trainer

from koff_lightning import DomainDataModule, KoffError, KOFFModule, KVSpec, LoraSpec, from_checkpoint, load_backbone
from koff_lightning.callbacks import GradientCoverage
from koff_lightning.cli import main
from koff_lightning.loading import load_tokenizer
from koff_lightning.studies.analysis import mask_of, open_run
from koff_lightning.training.optim import parameter_groups

PAGE = Path(__file__).parents[1] / "docs" / "research.md"
OWN = """
import json
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import Logger
from koff_lightning import KOFFModule

class Own(KOFFModule):
    def __init__(self, *args, push: float = 0.0, **options):
        super().__init__(*args, **options)
        self.push = push

    def on_fit_end(self):
        print("pushed by", self.push)

class Count(Callback):
    def on_train_end(self, trainer, module):
        print("steps seen:", trainer.global_step)

class Fails(Callback):
    def on_train_batch_end(self, trainer, module, *_):
        module.log("mine", "no number")

class Lines(Logger):
    name, version = "lines", 0

    def log_metrics(self, metrics, step=None):
        with open("lines.jsonl", "a") as file:
            file.write(json.dumps(sorted(metrics)) + "\\n")

    def log_hyperparams(self, *_, **__):
        pass
"""


@pytest.mark.slow
def test_the_page_runs_as_it_stands(tmp_path):
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    domains = {folder.name for folder in (tmp_path / "runs/mixed/memories").iterdir()}
    assert domains == {"de", "python", "fr", "mean"}
    assert (tmp_path / "runs/tuned/koff.json").exists()


# ------------------------------------------------------------------------------------------------------ the module


class Probing(KOFFModule):
    def configure_model(self):
        super().configure_model()
        if not hasattr(self, "probe"):
            self.probe = torch.nn.Linear(2, 3)
            self.probe.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.probe.seen += 1
        return super().training_step(batch, batch_idx) + self.probe.weight.square().sum()

    def configure_optimizers(self):
        groups = parameter_groups(self.model.gates, self.penalty, self.model.memories, self.optim)
        return torch.optim.AdamW([*groups, {"name": "probe", "params": list(self.probe.parameters()), "lr": 0.1}])


def fit(module, folder, steps, *callbacks, ckpt_path=None):
    trainer = tiny_trainer(folder, callbacks, steps)
    trainer.fit(module, RandomText(), ckpt_path=ckpt_path)
    return trainer


def probing(folder):
    module = tiny_module(folder)
    return Probing(module.source, **{name: getattr(module, name) for name in ("domains", "sparsity", "lora", "kv")})


RESUMED = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")  # the loader is a list


@RESUMED
def test_what_a_subclass_adds_is_saved_loaded_and_resumed(tmp_path):
    path = tmp_path / "probe.ckpt"
    first = probing(tmp_path)
    fit(first, tmp_path, 8).save_checkpoint(path)
    loaded = Probing.load_from_checkpoint(path)
    assert torch.equal(loaded.probe.weight, first.probe.weight)
    assert loaded.probe.seen == 8
    resumed = probing(tmp_path)
    fit(resumed, tmp_path, 12, ckpt_path=path)
    assert resumed.probe.seen == 12
    assert torch.equal(from_checkpoint(path).gates.kept, first.model.gates.kept)  # the decomposition is in it as ever
    with pytest.raises(KoffError, match=r"3 tensors that this run has no place for, first probe\.bias"):
        KOFFModule.load_from_checkpoint(path)


def test_loading_a_checkpoint_does_not_list_the_frozen_weights(tmp_path):
    fit(tiny_module(tmp_path), tmp_path, 8).save_checkpoint(tmp_path / "run.ckpt")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        KOFFModule.load_from_checkpoint(tmp_path / "run.ckpt")
    assert not [str(one.message)[:60] for one in said if "state dict" in str(one.message)]


class Factored(KOFFModule):
    """Adafactor keeps averages of rows and of columns, of other shapes than the parameters."""

    def configure_optimizers(self):
        groups = parameter_groups(self.model.gates, self.penalty, self.model.memories, self.optim)
        for group in groups:
            group.pop("eps", None)
        return torch.optim.Adafactor(groups)


@RESUMED
def test_a_run_with_another_optimizer_is_exported_and_resumed_and_only_by_itself(tmp_path):
    module = tiny_module(tmp_path)
    options = {name: getattr(module, name) for name in ("domains", "sparsity", "lora", "kv")}
    path = tmp_path / "factored.ckpt"
    fit(Factored(module.source, **options), tmp_path, 8).save_checkpoint(path)
    assert from_checkpoint(path).gates.hardened
    assert fit(Factored(module.source, **options), tmp_path, 10, ckpt_path=path).global_step == 10
    with pytest.raises(KoffError, match="keeps col_var, row_var, step of a parameter, this run's AdamW"):
        fit(module, tmp_path, 10, ckpt_path=path)


def test_memories_of_one_run_may_differ_and_a_frozen_one_stays(tmp_path):
    module = tiny_module(tmp_path)
    module.configure_model()
    bank = module.model.memories
    bank.remove("law")
    bank.add("law", LoraSpec(rank=5, targets=["v_proj"]), None)
    bank.add("more", None, KVSpec(slots=7))
    module.domains.append("more")
    module.model.domains.append("more")
    frozen = bank.lora_parameters("en")
    before = [parameter.detach().clone() for parameter in frozen]
    for parameter in frozen:
        parameter.requires_grad_(False)
    fit(module, tmp_path, 8, GradientCoverage())
    assert bank.slots("law") is None
    assert bank.slots("more").initialised
    assert all(map(torch.equal, frozen, before))
    assert any(parameter.any() for name, parameter in bank.weights("law").items() if "lora_B" in name)


def test_a_mask_is_a_bool_of_each_unit(tmp_path):
    module = tiny_module(tmp_path)
    module.configure_model()
    gates = module.model.gates
    for wrong in (gates.logits.detach(), torch.tensor(True), torch.ones(len(gates.logits) + 1, dtype=torch.bool)):
        with pytest.raises(KoffError, match=r"a mask is a bool of each unit.* wanted torch\.bool \[\d+\], got"):
            gates.harden(wrong)
    assert not gates.hardened


def test_an_artifact_knows_no_logits(tmp_path):
    made = tiny_artifact(tmp_path)
    table = mask_of(open_run(made.folder)).table()
    assert table.removed.any()
    assert table.logit.isna().all()
    made.module.gates.logits.data.normal_()
    assert mask_of(made.module).table().query("kind == 'channel'").logit.notna().all()


def test_models_and_checkpoints_are_named_by_words_or_paths(tmp_path):
    module = tiny_module(tmp_path)
    path = tmp_path / "run.ckpt"
    fit(KOFFModule(Path(module.source), module.domains, module.sparsity, module.lora, module.kv), tmp_path, 8)
    load_backbone(Path(module.source))
    trainer = fit(module, tmp_path, 8)
    trainer.save_checkpoint(path)
    given = KOFFModule(module.source, module.domains, lora=module.lora, kv=module.kv, mask=path)
    fit(given, tmp_path, 2).save_checkpoint(tmp_path / "given.ckpt")
    assert torch.equal(from_checkpoint(tmp_path / "given.ckpt").gates.kept, module.model.gates.kept)
    with pytest.raises(KoffError, match=r"backbone must be a hub id.*; got LlamaForCausalLM\. Save a model"):
        KOFFModule(given.model.backbone, ["de"])
    with pytest.raises(KoffError, match="got LlamaForCausalLM"):
        load_backbone(given.model.backbone)


# ---------------------------------------------------------------------------------------------------------- data


def test_text_of_a_domain_is_named_and_never_given(tmp_path):
    for text in (iter(["a"]), {"files": 3}, {"files": "a.txt", "heldout_files": [None]}, [b"bytes"]):
        with pytest.raises(KoffError, match=r"domain 'de' names its text.*got \w+\. Write text from Python to a file"):
            DomainDataModule({"de": text})
    with pytest.raises(KoffError, match="'A long text A long text.*' is too long for the name of a file: write text"):
        DomainDataModule({"de": ["A long text " * 50]}, tokenizer="koff-tiny").setup()
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text("Some text of a document, " * (5 + number))
    paths = [tmp_path / "0.txt", tmp_path / "1.txt"]
    data = DomainDataModule({"de": {"files": paths[0], "heldout_files": [paths[1]]}}, tokenizer="koff-tiny", seq_len=16)
    data.setup()
    assert len(list(data.val_dataloader()))
    assert data.sources["de"].entries == [str(paths[0])]


def test_a_batch_without_domains_is_told_what_it_lacks(tmp_path):
    batch = {name: part for name, part in RandomText.batch(["en"], 0).items() if name != "domains"}
    module = tiny_module(tmp_path)
    module.configure_model()
    with pytest.raises(KoffError, match=r"a batch has no 'domains' \(it has input_ids, labels, num_bytes\): give"):
        module.training_step(batch, 0)


# ---------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """Writes a module `own_parts` into the current folder, which is not on the path."""
    (tmp_path / "own_parts.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    yield
    sys.modules.pop("own_parts", None)


def test_callback_and_logger_from_the_current_folder(tmp_path, monkeypatch, capsys, own_code):
    """The logger names no folder, which Lightning's way to save a config cannot do without."""
    parts = {"callbacks": [{"class_path": "own_parts.Count"}], "logger": [{"class_path": "own_parts.Lines"}]}
    with small_fits(tmp_path, monkeypatch, trainer={"max_steps": 2} | parts, export={"enabled": False}) as run:
        assert run("runs/own", "--allow-custom-classes") == 0
    assert "steps seen: 2" in capsys.readouterr().out
    assert "test/koff_bpb" in (tmp_path / "lines.jsonl").read_text()
    saved = yaml.safe_load((tmp_path / "runs/own/config.yaml").read_text())
    assert saved["trainer"]["max_steps"] == 2


def test_an_error_that_own_code_has_made_keeps_its_place(tmp_path, monkeypatch, own_code):
    parts = {"callbacks": [{"class_path": "own_parts.Fails"}], "logger": False}
    fits = small_fits(tmp_path, monkeypatch, trainer={"max_steps": 2} | parts, export={"enabled": False})
    with fits as run, pytest.raises(ValueError, match="no number") as caught:
        run("runs/own", "--allow-custom-classes")
    assert "own_parts" in {entry.frame.f_globals["__name__"] for entry in caught.traceback}


def test_a_module_of_ones_own_behind_the_command(tmp_path, monkeypatch, capsys, own_code):
    monkeypatch.syspath_prepend(tmp_path)
    from own_parts import Own

    with small_fits(tmp_path, monkeypatch, trainer={"max_steps": 2, "logger": False}, export={"enabled": False}):
        assert main(["fit", "mine.yaml", "--trainer.default_root_dir=runs/own", "--model.push=0.5"], module=Own) == 0
        assert "pushed by 0.5" in capsys.readouterr().out
        assert main(["fit", "mine.yaml", "--model.psh=0.5"], module=Own) == 2
        assert "no option" in capsys.readouterr().err


def test_the_tokenizer_of_a_path_is_found(tmp_path):
    load_tokenizer("koff-tiny").save_pretrained(tmp_path / "tokenizer")
    assert len(load_tokenizer(tmp_path / "tokenizer")) > 1000
