"""KOFF from Python, without the command line: the same run, or one line on what is missing."""

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from tiny_command import small_fits
from tiny_run import RandomText, tiny_module

from koff_lightning import AnnealSparsity, DomainDataModule, KoffError, KOFFModule, KVSpec, LoraSpec, SparsitySpec
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


@pytest.mark.filterwarnings("ignore:.*WeightAveraging callback")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_val": 0.5}, r"trainer\.gradient_clip_val is 0\.5, but .* set model\.optim\.clip"),
        ({"overfit_batches": 2}, r"trainer\.overfit_batches is 2, but it would not hold training to these"),
        ({"reload_dataloaders_every_n_epochs": 1}, "every epoch would start again at the first row"),
        ({"callbacks": [AnnealSparsity(), EMAWeightAveraging()]}, "EMAWeightAveraging cannot be used here: it would"),
    ],
)
def test_what_the_command_refuses_of_a_trainer_is_refused_here_too(tmp_path, options, message):
    trainer = Trainer(max_steps=8, default_root_dir=tmp_path, **PLAIN | {"callbacks": [AnnealSparsity()]} | options)
    with pytest.raises(KoffError, match=message):
        trainer.fit(tiny_module(tmp_path), RandomText())


def test_a_callback_that_served_another_run_begins_anew(tmp_path):
    """The schedule is of the run at hand, and not of the first one that had the callback."""
    anneal, steps = AnnealSparsity(0.1, 0.2, 0.2), []
    for length in (10, 20):
        module = tiny_module(tmp_path)
        Trainer(max_steps=length, default_root_dir=tmp_path, callbacks=[anneal], **PLAIN).fit(module, RandomText())
        steps.append((module.schedule.steps, module.schedule.harden_step))
    assert steps == [(10, 5), (20, 10)]


@pytest.mark.parametrize(("prior", "warns"), [("fisher", False), ("none", True)])
def test_a_mask_that_no_step_learns_is_the_priors_or_drawn(tmp_path, prior, warns, recwarn):
    """Not the first units of the file, which are those of the first layer."""
    module = tiny_module(tmp_path, sparsity=SparsitySpec(target=0.2, min_channels=4, prior=prior))
    callbacks = [AnnealSparsity(0.5, 0.0, 0.0)]
    Trainer(max_steps=8, default_root_dir=tmp_path, callbacks=callbacks, **PLAIN).fit(module, RandomText())
    gates = module.model.gates
    assert gates.hardened and not gates.kept.all()
    assert bool(gates.importance.sum() > 0) == (prior == "fisher")
    assert any("none learns the mask" in str(warning.message) for warning in recwarn) == warns
    removed = gates.logits[~gates.kept]
    assert len(removed.unique()) == len(removed), "an order, not the order of the file"
    if prior == "fisher":
        worth = gates.importance / module.model.budget.costs
        spared = worth[gates.kept].sort().values[len(removed) :]  # some are kept so that a layer has its least
        assert worth[~gates.kept].max() <= spared.max()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KOFFModule("koff-tiny", "de"), r"domains must be a list of names; got the text 'de': give \['de'\]"),
        (lambda: KOFFModule("koff-tiny", ["de"], 0.12), "sparsity must be a SparsitySpec, a dict of its options"),
        (lambda: KOFFModule("koff-tiny", ["de"], lora={"rnk": 4}), r"lora has no option 'rnk'\. Did you mean 'rank'"),
        (lambda: LoraSpec(rank="4"), r"lora\.rank must be a whole number; got '4'"),
        (lambda: LoraSpec(rank=4.5), r"lora\.rank must be a whole number; got 4\.5"),
        (lambda: KVSpec(slots=True), r"kv\.slots must be a whole number; got True"),
        (lambda: SparsitySpec(target="0.12"), r"sparsity\.target must be a number; got '0\.12'"),
        (lambda: SparsitySpec(beta_end="x"), r"sparsity\.beta_end must be a number or null; got 'x'"),
        (lambda: DomainDataModule(["bundled:de"]), r"data\.domains must be a mapping of names to text"),
        (lambda: DomainDataModule({"de": "bundled:de"}).train_dataloader(), r"call setup\(\) before train_dataloader"),
        (lambda: DomainDataModule({"de": "bundled:de"}).val_dataloader(), r"call setup\(\) before val_dataloader"),
    ],
)
def test_what_cannot_be_meant_is_one_line(make, message):
    with pytest.raises(KoffError, match=message):
        make()


def test_a_domain_of_the_model_without_text_is_told_before_a_step(tmp_path):
    data = DomainDataModule(
        {"de": "bundled:de"}, max_train_bytes=20_000, max_heldout_bytes=1_500, tokenizer="koff-tiny"
    )
    trainer = Trainer(max_steps=2, default_root_dir=tmp_path, callbacks=[AnnealSparsity()], **PLAIN)
    with pytest.raises(KoffError, match="the model has the domain 'fr', and the data only de: give both"):
        trainer.fit(KOFFModule("koff-tiny", ["de", "fr"]), data)


def test_an_optimizer_whose_groups_have_no_names_is_one_line(tmp_path):
    module = tiny_module(tmp_path)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(KoffError, match="configure_optimizers must give groups by name"):
        Trainer(max_steps=2, default_root_dir=tmp_path, callbacks=[AnnealSparsity()], **PLAIN).fit(module, RandomText())


def test_a_run_whose_time_is_up_says_so(tmp_path, caplog):
    trainer = Trainer(max_steps=500, max_time={"seconds": 0.2}, callbacks=[AnnealSparsity()], **PLAIN)
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as caught:
        trainer.fit(tiny_module(tmp_path), RandomText(500))
    assert caught.value.code == 124
    assert f"after step {trainer.global_step} the run was ended by the time limit" in caplog.text


def test_the_mean_is_of_the_domains_that_were_scored(tmp_path):
    module = tiny_module(tmp_path)
    module.held_out = lambda modes: {"en": {"koff": 1.5}, "law": {"koff": float("nan")}}
    told = {}
    module.log = lambda name, value, **_: told.setdefault(name, value)
    module._log_table("val", ("koff",))
    assert told["val/koff_bpb"] == 1.5
