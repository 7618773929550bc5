"""KOFF from Python, without the command line: the same run, or one line on what is missing."""

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from tiny_command import small_fits
from tiny_run import RandomText, tiny_module

from koff_lightning import AnnealSparsity, DomainDataModule, KoffError, KOFFModule
from koff_lightning.artifact.checkpoint import read_checkpoint
from koff_lightning.training.checkpoints import newest_checkpoint

PLAIN = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
PLAIN |= {"limit_val_batches": 0, "num_sanity_val_steps": 0, "enable_progress_bar": False}


def test_without_a_schedule_of_the_mask_nothing_trains(tmp_path):
    """The memories would, and the mask never."""
    with pytest.raises(KoffError, match=r"nothing says when the mask is learned: give .*AnnealSparsity\(\) as a"):
        Trainer(max_steps=8, default_root_dir=tmp_path, **PLAIN).fit(tiny_module(tmp_path), RandomText())


def test_plain_python_and_the_command_give_the_same_run(tmp_path, monkeypatch):
    """What is trained is the same to the bit: mask, multipliers, LoRA and KV memories."""
    options = {"trainer": {"max_steps": 8, "limit_val_batches": 0}, "export": {"enabled": False}}
    with small_fits(tmp_path, monkeypatch, **options) as run:
        assert run("run") == 0
    command = read_checkpoint(newest_checkpoint(["run"]))["state_dict"]

    seed_everything(0)
    names = ["de", "python"]
    sizes = {"seq_len": 64, "batch_size": 4, "max_train_bytes": 20_000, "max_heldout_bytes": 1_500}
    data = DomainDataModule({name: f"bundled:{name}" for name in names}, **sizes)
    module = KOFFModule(domains=names)
    Trainer(max_steps=8, devices=1, callbacks=[AnnealSparsity()], **PLAIN).fit(module, data)
    python = module.state_dict()
    assert command.keys() == module.owned()
    differing = [name for name, value in command.items() if not torch.equal(value, python[name].cpu())]
    assert not differing
    assert bool(command["model.gates.hardened"])
