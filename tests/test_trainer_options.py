"""What Lightning's trainer offers and a decomposition cannot use is refused in one line, before anything trains."""

import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from tiny_command import small_fits

from koff_lightning import DomainDataModule, KOFFModule
from koff_lightning.support.errors import KoffError
from koff_lightning.training import trainer_options

CALLBACKS = "lightning.pytorch.callbacks"


@pytest.fixture
def run_in(tmp_path, monkeypatch):
    trainer = {"max_steps": 4, "limit_val_batches": 0}
    with small_fits(tmp_path, monkeypatch, trainer=trainer, export={"enabled": False}) as run:
        yield run


@pytest.fixture
def refused(run_in, monkeypatch, capsys):
    """The line that a bad command leaves before it trains."""

    def line(*argv):
        with monkeypatch.context() as patch:
            patch.setattr(KOFFModule, "training_step", lambda *_: pytest.fail("it trains"))
            assert run_in("x", *argv) == 2
        return capsys.readouterr().err.splitlines()[-1]

    return line


@pytest.mark.parametrize(
    ("option", "advice"),
    [
        ("gradient_clip_val=0.5", "set model.optim.clip"),
        ("gradient_clip_val=0", "set model.optim.clip"),
        ("gradient_clip_algorithm=value", "set model.optim.clip"),
        ("overfit_batches=2", "set data.max_train_bytes"),
        ("reload_dataloaders_every_n_epochs=1", "every epoch would start again at the first row"),
        ("barebones=true", "the log, the checkpoints and the report"),
    ],
)
def test_options_without_use_are_refused(refused, option, advice):
    name = option.split("=")[0]
    line = refused(f"--trainer.{option}")
    assert line.startswith(f"koff: trainer.{name} is ")
    assert advice in line


@pytest.mark.parametrize("option", ["max_steps", "max_epochs", "limit_train_batches"])
def test_a_run_without_a_step_is_refused(refused, option):
    line = refused(f"--trainer.{option}=0")
    assert line.startswith(f"koff: trainer.{option} is 0, so nothing would be trained: raise it")


@pytest.mark.parametrize("unit", ["steps", "epochs"])
def test_more_than_the_most_is_refused_as_the_least(refused, unit, tmp_path):
    said = f"trainer.min_{unit} is 9, more than trainer.max_{unit}, 3, with which the run ends"
    assert said in refused(f"--trainer.min_{unit}=9", f"--trainer.max_{unit}=3")
    trainer = Trainer(accelerator="cpu", logger=False, **{f"min_{unit}": 9, f"max_{unit}": 3})
    with pytest.raises(KoffError, match=said):
        trainer_options.refuse_trainer(trainer)
    for least, most in ((3, 3), (3, -1)):
        trainer_options.refuse_trainer(Trainer(accelerator="cpu", **{f"min_{unit}": least, f"max_{unit}": most}))
    trial = Trainer(accelerator="cpu", fast_dev_run=2, **{f"min_{unit}": 9, f"max_{unit}": 90})
    trainer_options.refuse_trainer(trial)  # whose most is that of the trial


def test_warnings_that_are_to_be_errors_are_shown_and_end_no_run(run_in, tmp_path, monkeypatch):
    """PYTHONWARNINGS=error: jsonargparse and Lightning warn their developers in every run."""
    monkeypatch.setattr(sys, "warnoptions", ["error"])
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("error")
        assert run_in("x", "--trainer.max_steps=1") == 0
    assert any("eval mode" in str(warning.message) for warning in shown)
    assert (tmp_path / "x" / "results.json").exists()


def test_a_run_without_an_end_is_refused(refused, tmp_path, monkeypatch):
    """Lightning would take 1000 epochs, and a schedule of half a million steps."""
    (tmp_path / "mine.yaml").write_text("data: {domains: {de: bundled:de}}\n")
    monkeypatch.setattr(DomainDataModule, "setup", lambda *_: pytest.fail("it reads text"))
    assert refused() == (
        "koff: trainer.max_steps is not set, so nobody knows when the run ends: give --trainer.max_steps 1000, say (or "
        "trainer.max_epochs)"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_asks_for_a_gpu_says_what_to_take_where_there_is_none(refused):
    said = refused("--config=hardware/one_gpu.yaml")
    assert "trainer.accelerator is gpu, as one_gpu.yaml, ddp.yaml and fsdp.yaml of hardware/ set it, and torch" in said
    assert "take --config hardware/cpu.yaml in its place" in said


def test_options_of_a_config_file_are_refused_too(refused, tmp_path):
    (tmp_path / "over.yaml").write_text("trainer: {gradient_clip_val: 0.5}\n")
    assert refused("--config", "over.yaml") == (
        "koff: trainer.gradient_clip_val is 0.5, but every memory's gradients are clipped by a norm of their own: set "
        "model.optim.clip"
    )


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("LearningRateFinder", "set model.optim.mask_lr"),
        ("BatchSizeFinder", "set data.batch_size"),
        ("GradientAccumulationScheduler, init_args: {scheduling: {0: 1}}", "set trainer.accumulate_grad_batches"),
        ("BackboneFinetuning", "model.joint, model.lora"),
        ("ModelPruning, init_args: {pruning_fn: l1_unstructured}", "set model.sparsity"),
        ("StochasticWeightAveraging, init_args: {swa_lrs: 0.01}", "replace the weights by averages"),
        ("EMAWeightAveraging", "replace the weights by averages"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # jsonargparse on the defaults of averaging
def test_callbacks_that_replace_weights_rates_or_batches_are_refused(refused, name, advice):
    line = refused("--trainer.callbacks", f"[{{class_path: {CALLBACKS}.{name}}}]")
    assert line.startswith(f"koff: trainer.callbacks: {name.split(',')[0]} cannot be used here: ")
    assert advice in line


def test_what_fails_inside_lightning_is_one_line(refused, monkeypatch):
    monkeypatch.setattr(trainer_options, "REFUSED_CALLBACKS", {})
    line = refused("--trainer.callbacks", f"[{{class_path: {CALLBACKS}.LearningRateFinder}}]")
    assert line.startswith("koff: lightning.pytorch.tuner.lr_finder failed (AttributeError: ")
    assert line.endswith("): look at the trainer's options and callbacks")


def test_many_devices_without_a_strategy_start_no_process(refused, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("it starts processes"))
    assert refused("--trainer.devices=64") == (
        "koff: DDPStrategy cannot train a decomposition: use --config hardware/ddp.yaml (in Python "
        "strategy=ReplicatedStrategy() of koff_lightning.training.strategies), or one device (--trainer.devices 1)"
    )


def test_files_that_may_not_grow_at_all_are_one_line(refused):
    """The first file is refused, before anything is saved: the line promises no checkpoint."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
    try:
        line = refused()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert line == (
        "koff: cannot read or write a file of the run in x: File too large; no checkpoint had been saved yet"
    )


# ------------------------------------------------------------------------------------- processes that others start

SLURM = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "koff", "SLURM_JOB_ID": "7"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "7", "RANK": "1", "LOCAL_RANK": "1", "GROUP_RANK": "0"}
TWO = {"torchrun": TORCHRUN | {"WORLD_SIZE": "2"}, "srun": SLURM | {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}}
COPIES = (
    "koff: started as 2 processes, but the trainer uses 1: add --config hardware/ddp.yaml (or hardware/fsdp.yaml) with "
    "--trainer.devices PROCESSES_PER_NODE and --trainer.num_nodes NODES, or start 1 process"
)


@pytest.fixture
def process(tmp_path, run_in):
    """Run `koff fit` as a process with some variables in its environment."""

    def start(launcher=(), options=(), **environment):
        words = ["fit", "--config", "mine.yaml", "--trainer.default_root_dir=x", *options]
        command = [sys.executable, *launcher, "-m", "koff_lightning", *words]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        return subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=False)

    return start


@pytest.mark.parametrize("launcher", TWO)
def test_processes_that_would_train_copies_are_refused_on_each(process, launcher):
    done = process(**TWO[launcher])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == COPIES


def test_a_process_alone_that_was_told_another_number_is_refused(monkeypatch):
    """As where a launcher has left its variables in a shell: it would write no log, and warn of nothing."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer_options.refuse_separate_copies(trainer)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with pytest.raises(KoffError, match="SLURM_PROCID in the environment says that this is process 1 of several, but"):
        trainer_options.refuse_separate_copies(trainer)


def test_tasks_of_slurm_that_lightning_does_not_take_are_one_line(process):
    done = process(**SLURM | {"SLURM_NTASKS": "2"})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("koff: You set `--ntasks=2` in your SLURM bash script, but")


@pytest.mark.slow
def test_torchrun_without_a_strategy(process):
    done = process(["-m", "torch.distributed.run", "--nproc-per-node=2"])
    assert done.returncode != 0
    assert done.stderr.splitlines().count(COPIES) == 2
    assert not list(Path("x").rglob("*.ckpt"))


REPLICATED = ["--config", "hardware/ddp.yaml", "--trainer.devices=2", "--trainer.accelerator=cpu"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "options", "environment"),
    [
        ([], [], {"WORLD_SIZE": "1", "RANK": "0"}),
        ([], [], SLURM | {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash", "SLURM_PROCID": "0"}),
        ([], REPLICATED, {}),
        (["-m", "torch.distributed.run", "--nproc-per-node=1"], [], {}),
        (["-m", "torch.distributed.run", "--nproc-per-node=2"], REPLICATED, {}),
    ],
    ids=["stray variables", "a shell of SLURM", "Lightning starts them", "torchrun of one", "torchrun"],
)
def test_processes_that_the_trainer_uses_train(process, launcher, options, environment):
    done = process(launcher, options, **environment)
    assert done.returncode == 0, done.stderr
    assert list(Path("x").rglob("last.ckpt"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("val_loss", ""),
        ("val/kof_bpb", " Did you mean 'val/koff_bpb'?"),
        ("val/koff_bpb/fr", " Did you mean 'val/koff_bpb'?"),
    ],
)
def test_a_monitor_of_what_is_never_logged_ends_the_run_in_its_first_step(run_in, capsys, monkeypatch, name, hint):
    steps, step = [], KOFFModule.training_step
    monkeypatch.setattr(KOFFModule, "training_step", lambda *given: steps.append(1) or step(*given))
    assert run_in("x", f"--checkpoint.monitor={name}", "--trainer.limit_val_batches=1") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(
        f"koff: a callback monitors '{name}', which this run does not log.{hint} val/koff_bpb is the"
    )
    assert len(steps) == 1


@pytest.mark.parametrize("name", ["val/koff_bpb/de", "train/ce", "sparsity/expected"])
def test_a_monitor_of_what_is_logged_keeps_its_best_file(run_in, name):
    options = ["--checkpoint.filename=best", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=2"]
    assert run_in("x", f"--checkpoint.monitor={name}", *options) == 0
    assert {"best.ckpt", "last.ckpt"} <= {file.name for file in Path("x/version_0/checkpoints").iterdir()}
