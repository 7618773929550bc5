"""Runs that are stopped at any moment go on as if they had not been: SIGKILL, SIGTERM, damaged files, other options."""

import csv
import errno
import itertools
import os
import re
import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from zipfile import ZipFile

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, model_checkpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from tiny_command import small_fits
from tiny_run import RandomText, tiny_module, tiny_trainer
from toy_text import toy_documents

from koff_lightning import KoffError, KOFFModule, SparsitySpec
from koff_lightning.artifact import checkpoint as checkpoint_io
from koff_lightning.artifact.checkpoint import read_checkpoint
from koff_lightning.callbacks import Checkpoints, ContinuedLog
from koff_lightning.cli import main
from koff_lightning.data import DomainDataModule, retries, stream
from koff_lightning.data.shards import FileShard
from koff_lightning.support import files
from koff_lightning.training.checkpoints import AtomicCheckpointIO, newest_checkpoint
from koff_lightning.training.run_folder import alone_in, new_version

LOGGED = ("step", "epoch", "train/", "sparsity/", "penalty/", "val/")  # the other columns are times and memory
STEPS = 8


def fits(folder, monkeypatch):
    trainer = {"max_steps": STEPS, "check_val_every_n_epoch": None, "val_check_interval": 4}
    return small_fits(folder, monkeypatch, trainer=trainer, export={"enabled": False})


@pytest.fixture
def run_in(tmp_path, monkeypatch):
    with fits(tmp_path, monkeypatch) as run:
        yield run


def end_of(root):
    """Trained state and log of a run."""
    state = read_checkpoint(newest_checkpoint([root]))
    newest = max(Path(root).glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
    with (newest / "metrics.csv").open(newline="") as lines:
        log = [{k: v for k, v in row.items() if k.startswith(LOGGED)} for row in csv.DictReader(lines)]
    return state["global_step"], state["state_dict"], log


def check_same_end(one, other):
    (steps, weights, log), (other_steps, other_weights, other_log) = end_of(one), end_of(other)
    assert steps == other_steps == STEPS
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())
    assert log == other_log
    assert [row["step"] for row in log if row["train/loss"]] == [str(step) for step in range(STEPS)]
    assert (Path(one) / "results.json").is_file()


def at(monkeypatch, hook, step, do):
    """Do something in mid-run."""
    original = getattr(KOFFModule, hook)

    def hooked(module, *args):
        if module.trainer.training | module.trainer.validating and module.global_step == step:
            do()
        return original(module, *args)

    monkeypatch.setattr(KOFFModule, hook, hooked)


def pull_the_plug():
    raise RuntimeError("pulled the plug")


def cut_off(monkeypatch, run_in, *words, hook="training_step", step=5):
    """A run in the folder `cut` that breaks off in the middle."""
    with monkeypatch.context() as patch:
        at(patch, hook, step, pull_the_plug)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            run_in("cut", *words)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the run `straight`, which nothing stopped, and the run `cut`, which broke off in step 5."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch, fits(folder, patch) as run:
        assert run("straight") == 0
        cut_off(patch, run)
    return folder


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--model.lora.rank=3", "the checkpoint is of another make: lora.rank is 8 there and 3 here"),
        ("--model.sparsity.units=[channel]", "units is [channel, kv_group] there and [channel] here"),
        ("--model.sparsity.penalty=fixed", "keeps its course, but sparsity.penalty is lagrangian there and fixed here"),
        ("--data.domains={de: bundled:de}", "another make: domains is [de, python] there and [de] here"),
    ],
)
def test_other_options_than_the_runs_are_refused_before_text_is_read(run_in, made, monkeypatch, capsys, option, said):
    shutil.copytree(made / "cut", "cut")
    monkeypatch.setattr(DomainDataModule, "setup", lambda *_: pytest.fail("it reads text"))
    assert run_in("cut", option, "--ckpt_path", "last") == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["test", "fit"])
@pytest.mark.parametrize("option", ["ckpt_path", "model.warm_start"])
def test_a_checkpoint_of_another_backbone_is_refused_before_text_is_read(
    run_in, made, tmp_path, monkeypatch, capsys, verb, option
):
    tiny_module(tmp_path / "tiny")  # which saves its backbone
    here = ["--model.backbone", str(tmp_path / "tiny/backbone")]
    shutil.copytree(made / "cut", "cut")
    monkeypatch.setattr(DomainDataModule, "setup", lambda *_: pytest.fail("it reads text"))
    last = str(newest_checkpoint(["cut"]))
    scored = ["--ckpt_path", last] if (verb, option) == ("test", "model.warm_start") else []
    capsys.readouterr()
    assert main([verb, "--config", "mine.yaml", "--trainer.default_root_dir=cut", f"--{option}", last, *scored, *here])
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"koff: the checkpoint belongs to backbone 'koff-tiny', and this run's '{here[1]}' has other sizes: give "
        "--model.backbone koff-tiny, or the config of that run"
    )


def test_some_domains_of_a_run_are_scored_alone(run_in, made, monkeypatch, capsys):
    """Only other options than these are refused before text is read."""
    shutil.copytree(made / "cut", "cut")
    test = ["test", "--config", "mine.yaml", "--trainer.default_root_dir=cut", "--ckpt_path", "last"]
    assert main([*test, "--data.domains={de: bundled:de}"]) == 0
    monkeypatch.setattr(DomainDataModule, "setup", lambda *_: pytest.fail("it reads text"))
    assert main([*test, "--model.lora.rank=3"]) == 2
    assert "another make: lora.rank is 8 there and 3 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("hook", "step"),
    [("training_step", 1), ("training_step", 5), ("on_validation_epoch_start", 4), ("on_test_epoch_start", STEPS)],
    ids=["before the first checkpoint", "between checkpoints", "validating", "scoring after the last step"],
)
def test_a_run_cut_off_anywhere_goes_on_as_if_nothing_had_happened(run_in, made, monkeypatch, hook, step):
    cut_off(monkeypatch, run_in, hook=hook, step=step)
    assert run_in("cut", "--ckpt_path", "last") == 0
    check_same_end("cut", made / "straight")


def test_a_run_that_is_asked_to_end_saves_and_goes_on(run_in, made, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at(patch, "training_step", 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run_in("cut") == 128 + signal.SIGTERM
    assert "koff: ended by SIGTERM; go on with --ckpt_path last" in capsys.readouterr().err
    assert read_checkpoint(newest_checkpoint(["cut"]))["global_step"] == 5, "of this very step"
    assert run_in("cut", "--ckpt_path", "last") == 0
    check_same_end("cut", made / "straight")


ACCUMULATED = ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=8"]


@pytest.mark.filterwarnings("ignore:.*version_1 is of a later run, but holds no checkpoint")
@pytest.mark.parametrize("ending", ["asked", pytest.param("cut off twice", marks=pytest.mark.slow)])
def test_no_run_ends_or_saves_in_the_middle_of_a_step(run_in, made, monkeypatch, ending):
    """Its first batches would count as read, but their gradients be gone."""
    whole, batches = made / "accumulated", []

    def asked_in_first_batch():
        batches.append(1)
        if len(batches) == 1:  # a second request, a second later, would end this very process
            os.kill(os.getpid(), signal.SIGTERM)

    def in_second_batch():
        batches.append(1)
        if len(batches) == 2:
            pull_the_plug()

    if not whole.exists():
        assert run_in(whole, *ACCUMULATED) == 0
    with monkeypatch.context() as patch:
        if ending == "asked":
            at(patch, "training_step", 5, asked_in_first_batch)
            assert run_in("cut", *ACCUMULATED) == 128 + signal.SIGTERM
            assert len(batches) == 2, "the step is taken to its end"
    if ending == "cut off twice":
        cut_off(monkeypatch, run_in, *ACCUMULATED)
        with monkeypatch.context() as patch:
            at(patch, "training_step", 4, in_second_batch)
            with pytest.raises(RuntimeError, match="pulled the plug"):
                run_in("cut", *ACCUMULATED, "--ckpt_path", "last")
    saved_at = 6 if ending == "asked" else 4
    assert read_checkpoint(newest_checkpoint(["cut"]))["global_step"] == saved_at
    assert run_in("cut", *ACCUMULATED, "--ckpt_path", "last") == 0
    check_same_end("cut", whole)


@pytest.mark.parametrize("often", [{"every_n_train_steps": 2}, {"train_time_interval": timedelta(seconds=3)}])
def test_checkpoints_are_saved_between_steps(tmp_path, monkeypatch, often):
    """By the clock too, which here goes a second from look to look, and where validation comes in mid-step."""
    saves, seconds = [], itertools.count()

    class Noted(Checkpoints):
        def _save_checkpoint(self, trainer, filepath):
            saves.append((trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.current.processed))

    monkeypatch.setattr(model_checkpoint, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    options = {"accumulate_grad_batches": 4, "enable_checkpointing": True, "limit_val_batches": 1}
    checkpoints = Noted(tmp_path / "saved", save_last=False, **often)
    tiny_trainer(tmp_path, [checkpoints], val_check_interval=6, **options).fit(tiny_module(tmp_path), RandomText())
    assert saves
    assert all(batches == 4 * step for step, batches in saves)


@pytest.mark.parametrize("interval", [3, 4])  # batches: in mid-step, or behind a step
def test_a_run_that_a_validation_ends_in_mid_step_ends_its_step_first(tmp_path, interval):
    saves = []

    class Noted(Checkpoints):
        def _save_last_checkpoint(self, trainer, candidates):
            saves.append((trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.current.processed))

    stop = EarlyStopping("val/koff_bpb", patience=2, min_delta=100.0)
    options = {"accumulate_grad_batches": 2, "enable_checkpointing": True, "limit_val_batches": 1}
    options |= {"val_check_interval": interval, "check_val_every_n_epoch": None, "steps": 20}
    trainer = tiny_trainer(tmp_path, [stop, Noted(tmp_path / "saved")], **options)
    trainer.fit(tiny_module(tmp_path, sparsity=SparsitySpec(target=0)), RandomText(batches=60))  # else it would wait
    assert trainer.global_step == (5 if interval == 3 else 6), "the third validation is the last"
    assert saves[-1][0] == trainer.global_step
    assert all(batches == 2 * step for step, batches in saves)


def test_early_stopping_waits_until_the_mask_is_fixed(tmp_path, caplog):
    """Pruning makes the figure worse, and a run that ends before its mask is fixed has nothing to export."""
    stop = EarlyStopping("val/koff_bpb", patience=2, min_delta=100.0)
    options = {"limit_val_batches": 1, "val_check_interval": 1, "check_val_every_n_epoch": None, "steps": 20}
    with caplog.at_level("INFO"):
        module, trainer = tiny_module(tmp_path), tiny_trainer(tmp_path, [stop], **options)
        trainer.fit(module, RandomText(batches=60))
    assert "EarlyStopping looks at val/koff_bpb once the mask is fixed, after step 15" in caplog.text
    assert module.mask_is_fixed
    assert trainer.global_step == 17, "the first validation after it, and two that are no better"


@pytest.mark.parametrize("fate", ["moved", "lost"])
def test_the_log_of_a_run_whose_folder_was_moved_is_found(run_in, made, fate):
    shutil.copytree(made / "cut", "elsewhere")
    if fate == "moved":
        assert run_in("elsewhere", "--ckpt_path", "last") == 0
        check_same_end("elsewhere", made / "straight")
        return
    Path("elsewhere/version_0/metrics.csv").unlink()
    with pytest.warns(
        UserWarning, match=r"step=4\.ckpt goes on is neither beside it nor at .*metrics\.csv: this run's"
    ):
        assert run_in("elsewhere", "--ckpt_path", "last") == 0
    assert [row["step"] for row in end_of("elsewhere")[2] if row["train/loss"]] == ["3", "4", "5", "6", "7"]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("change", [{"warmup": 0.125}, {"ramp": 0.5}, {"shape": "cubic"}])
def test_a_mask_that_is_not_fixed_keeps_its_course(tmp_path, change):
    """With its ramp begun elsewhere the prior would never order the logits."""
    path = tmp_path / "3.ckpt"

    class SavedInMidRamp(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                trainer.save_checkpoint(path)

    tiny_trainer(tmp_path, [SavedInMidRamp()]).fit(tiny_module(tmp_path), RandomText())
    (name,) = change
    with pytest.raises(KoffError, match=rf"keeps its course, but anneal\.{name} is .* there and .* here: use"):
        tiny_trainer(tmp_path, [], anneal=change).fit(tiny_module(tmp_path), RandomText(), ckpt_path=path)
    old = torch.load(path, weights_only=True)
    del old["callbacks"]["AnnealSparsity"]["course"]
    torch.save(old, path)
    tiny_trainer(tmp_path, [], anneal=change).fit(tiny_module(tmp_path), RandomText(), ckpt_path=path)


EPOCHS = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=4"]  # of the same steps in all


@pytest.mark.parametrize("words", [[*EPOCHS, "--trainer.max_steps=-1"], ["--trainer.max_epochs=9"]])
def test_a_run_laid_out_in_epochs_goes_on_with_the_next_row(run_in, made, monkeypatch, capsys, words):
    """Lightning then makes the loader before it has read from the checkpoint where it stood."""
    if words[:2] == EPOCHS:
        assert run_in("whole", *words) == 0
    else:  # it ends within the first
        shutil.copytree(made / "straight", "whole")
    cut_off(monkeypatch, run_in, *words)
    last = str(newest_checkpoint(["cut"]))
    assert run_in("cut", *words, "--ckpt_path", last) == 0
    check_same_end("cut", "whole")
    assert run_in("cut", *words, "--ckpt_path", last, "--data.max_train_bytes=9000") == 2
    assert "the text of this run is not the checkpoint's" in capsys.readouterr().err


def test_a_run_that_ends_with_an_epoch_goes_on_with_the_next_row(run_in, monkeypatch):
    """What is saved then is the end of an epoch: no save was due after its last batch, and no validation."""
    words = [*EPOCHS, "--trainer.max_steps=-1", "--checkpoint.every_n_train_steps=3", "--trainer.limit_val_batches=0"]
    assert run_in("whole", *words) == 0
    with monkeypatch.context() as patch:
        at(patch, "training_step", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run_in("cut", *words) == 128 + signal.SIGTERM
    assert read_checkpoint(newest_checkpoint(["cut"]))["global_step"] == 4
    assert run_in("cut", *words, "--ckpt_path", "last") == 0
    check_same_end("cut", "whole")


def test_the_last_checkpoint_is_of_the_last_step(run_in):
    """Also where none was due then."""
    assert run_in("x", "--trainer.max_steps=7", "--checkpoint.every_n_train_steps=3") == 0
    assert read_checkpoint("x/version_0/checkpoints/last.ckpt")["global_step"] == 7


STREAMED = ["--data.streaming=true", "--data.max_train_bytes=null"]
STREAMED += [f"--data.domains.{name}={name}-*.txt" for name in ("de", "python")]


@pytest.fixture
def little_at_a_time(monkeypatch, run_in):
    """Short files and small buffers, so that a few steps read often."""
    for seed, name in enumerate(("de", "python")):
        for i, text in enumerate(toy_documents(200, seed=seed)):
            Path(f"{name}-{i}.txt").write_text(text)
    monkeypatch.setattr(stream, "BUFFER", 500)
    monkeypatch.setattr(stream, "PACK", 8)


@pytest.mark.slow
def test_a_source_that_stays_away_stops_a_streamed_run_which_goes_on_when_it_is_back(
    run_in, little_at_a_time, monkeypatch, capsys
):
    def unplug():
        patch.setattr(FileShard, "read", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "unplugged")))
        patch.setattr(retries.time, "sleep", lambda _: None)
        patch.setattr(retries, "warn", lambda _: None)

    assert run_in("whole", *STREAMED) == 0
    with monkeypatch.context() as patch:
        at(patch, "training_step", 3, unplug)
        assert run_in("cut", *STREAMED) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(
        r"koff: cannot read (de|python)-\d+\.txt: .*unplugged.* Tried 9 times in 255 s\. Nothing.*", said
    )
    assert newest_checkpoint(["cut"]) is not None
    assert run_in("cut", *STREAMED, "--ckpt_path", "last") == 0
    check_same_end("cut", "whole")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
@pytest.mark.parametrize("epochs", [[], ["--trainer.max_epochs=9"]])
def test_a_streamed_run_with_workers_goes_on_in_mid_epoch(run_in, little_at_a_time, monkeypatch, epochs):
    workers = [*STREAMED, *epochs, "--data.num_workers=2"]
    assert run_in("whole", *workers) == 0
    cut_off(monkeypatch, run_in, *workers)
    assert run_in("cut", *workers, "--ckpt_path", "last") == 0
    check_same_end("cut", "whole")


def test_a_damaged_checkpoint_gives_way_to_the_one_before(run_in, made):
    shutil.copytree(made / "cut", "cut")
    folder = Path("cut/version_0/checkpoints")
    assert {path.name for path in folder.iterdir()} == {"epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt", "last.ckpt"}
    os.truncate(folder / "last.ckpt", 100_000)
    with ZipFile(folder / "epoch=0-step=4.ckpt") as archive:
        tensor = max(archive.infolist(), key=lambda record: record.file_size)
    with (folder / "epoch=0-step=4.ckpt").open("r+b") as file:  # one bit in the middle of a tensor
        place = tensor.header_offset + tensor.file_size // 2
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    with pytest.warns(UserWarning, match=r"cannot read .*An earlier checkpoint is used") as said:
        assert newest_checkpoint(["cut"]).name == "epoch=0-step=2.ckpt"
    assert {name for name in ("step=2", "step=4", "last") if any(name in str(w.message) for w in said)} == {
        "step=4",
        "last",
    }
    with pytest.warns(UserWarning, match="An earlier checkpoint is used"):
        assert run_in("cut", "--ckpt_path", "last") == 0
    check_same_end("cut", made / "straight")


# ----------------------------------------------------------------------------------------------- one checkpoint


def saved(path, step=1, **parts):
    about = {"backbone": "x", "backbone_hash": "0" * 64, "target": 0.0}
    content = {"koff": about, "hyper_parameters": {}, "state_dict": {}, "global_step": step} | parts
    AtomicCheckpointIO().save_checkpoint(content, path)
    return path


def test_the_newest_is_that_of_the_last_run_whatever_the_clock_says(tmp_path):
    paths = [saved(tmp_path / f"version_{v}/checkpoints/{s}.ckpt", s) for v, s in ((2, 500), (10, 100), (10, 200))]
    for age, path in enumerate(reversed(paths)):
        os.utime(path, (10**9 - age, 10**9 - age))
    assert newest_checkpoint([tmp_path]) == paths[2]
    (tmp_path / "version_10").rename(tmp_path / "elsewhere")
    (tmp_path / "version_10").symlink_to("elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path)
    assert newest_checkpoint([tmp_path]) == paths[2], "also through a link, and round in no circle"
    (tmp_path / "version_10").unlink()
    (tmp_path / "elsewhere").rename(tmp_path / "version_10")
    paths[1].unlink()
    paths[2].unlink()
    with pytest.warns(UserWarning, match="version_10 is of a later run, but holds no checkpoint"):
        assert newest_checkpoint([tmp_path]) == paths[0]
    assert newest_checkpoint([tmp_path / "version_10"]) is None


def broken(path, content=b"no checkpoint"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_where_there_are_checkpoints_but_none_is_intact_no_run_starts_anew(run_in, tmp_path, capsys):
    broken(tmp_path / "x/version_0/checkpoints/last.ckpt")
    broken(tmp_path / "x/version_1/checkpoints/last.ckpt", b"")
    saved(tmp_path / "x/version_2/a.ckpt", step=None)
    broken(tmp_path / "x/version_3/sharded.ckpt/.metadata", b"")
    assert run_in("x", "--ckpt_path", "last") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("koff: there are checkpoints, but none can be used: ")
    for reason in (
        r"version_0\S* as a checkpoint",
        r"version_1\S* as a checkpoint",
        r"a\.ckpt is not as `koff fit` writes one: [^;]*global_step",
    ):
        assert re.search(reason, said)
    assert "sharded.ckpt is a folder, as sharded runs save" in said
    assert not list((tmp_path / "x/version_4").rglob("*.*")), "nothing has begun"


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_disk_that_does_not_answer_is_no_damage(tmp_path, monkeypatch, error, what):
    """The run would go on from an earlier step, or from none, and count as the newest from then on."""
    saved(tmp_path / "version_0/a.ckpt", 1)
    newest = saved(tmp_path / "version_1/b.ckpt", 2)
    refused, real = newest if what == "file" else newest.parent, os.scandir

    def answer(ask):
        def asked(path, *rest):
            if str(path) == str(refused):
                raise OSError(error, os.strerror(error), str(path))
            return ask(path, *rest)

        return asked

    monkeypatch.setattr(checkpoint_io, "ZipFile", answer(ZipFile))
    monkeypatch.setattr(os, "scandir", answer(real))
    with pytest.raises(KoffError, match=f"cannot (read|look for checkpoints in) {refused}: {os.strerror(error)}"):
        newest_checkpoint([tmp_path])


def test_a_file_that_goes_away_meanwhile_gives_way_to_the_one_before(tmp_path):
    path = saved(tmp_path / "version_0/a.ckpt", 1)
    (tmp_path / "version_0/last.ckpt").symlink_to(tmp_path / "gone")
    with pytest.warns(UserWarning, match="no such file.* An earlier checkpoint is used"):
        assert newest_checkpoint([tmp_path, tmp_path / "not there"]) == path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("passwd", "step,x\n1,2\n", "is neither beside it nor at"),
        ("metrics.csv", "root:x:0:0\nroot:y:1:1\n", "is no log that can be gone on with"),
        ("metrics.csv", "step,x\n1,2,3\n", "is no log that can be gone on with"),
        ("metrics.csv", "step,x\n1,two\n", "is no log that can be gone on with"),
        ("metrics.csv", b"\xff\x00", "is no log that can be gone on with"),
    ],
)
def test_a_checkpoint_names_no_other_file_than_a_log(tmp_path, name, content, message):
    """It may come from anyone, and what it names is read and logged."""
    logged, file = [], tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    state, logger = SimpleNamespace(fn=TrainerFn.FITTING), CSVLogger(tmp_path)
    logger.log_metrics = lambda values, step: logged.append((step, values))
    trainer = SimpleNamespace(state=state, loggers=[logger], is_global_zero=True, ckpt_path=tmp_path / "a" / "b.ckpt")
    log = {"file": str(file), "row": {"train/loss": 1.5, "epoch": 0, "odd": "text"}, "last": 3, "validate": False}
    with pytest.warns(UserWarning, match=message):
        ContinuedLog().on_load_checkpoint(trainer, None, {"log": log})
    assert logged == [(3, {"train/loss": 1.5, "epoch": 0})]


def test_no_rank_waits_for_another_until_all_are_known_to_go_on_from_one_step():
    """One that found no checkpoint would never come."""
    alone = SimpleNamespace(
        state=SimpleNamespace(fn=TrainerFn.FITTING), loggers=[], is_global_zero=True, ckpt_path=None
    )  # no strategy
    log = {"file": None, "row": {}, "last": 3, "validate": True}
    ContinuedLog().on_load_checkpoint(alone, None, {"log": log})


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.ckpt", 1)

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        KoffError, match=r"cannot write .*a.ckpt: No space left on device. Earlier checkpoints are intact"
    ):
        saved(path, 2)
    assert read_checkpoint(path)["global_step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"extra": Payload()}, "cannot read .* as a checkpoint"),
        ({"hyper_parameters": {"_instantiator": "os.system"}}, r"names code to be run \(_instantiator\)"),
        ({"hyper_parameters": {"_class_path": "os.system"}}, r"names code to be run \(_class_path\)"),
        ({"hyper_parameters": None}, "is not a checkpoint of `koff fit`"),
    ],
)
def test_hostile_checkpoints_are_refused_and_nothing_runs(tmp_path, monkeypatch, capsys, parts, message):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "bad.ckpt", **parts)
    with pytest.raises(KoffError, match=message):
        read_checkpoint(path)
    with pytest.raises(KoffError, match=message):
        KOFFModule.load_from_checkpoint(path, weights_only=False)
    assert main(["export", "--ckpt", str(path), "--out", "out"]) == 2
    assert main(["test", "--config", "demo.yaml", "--trainer.logger=false", "--trainer.accelerator=cpu"]) == 2
    assert not Path("executed").exists()


def test_code_of_a_models_repository_does_not_run_because_a_checkpoint_says_so(tmp_path, monkeypatch):
    asked = {}

    def build(self, *_, **loading):
        asked.update(loading)
        raise InterruptedError

    monkeypatch.setattr("koff_lightning.decomposition.Decomposition.__init__", build)
    path = saved(
        tmp_path / "a.ckpt",
        hyper_parameters={"domains": ["en"], "trust_remote_code": True},
        **{"pytorch-lightning_version": "2.6.6"},
    )
    with pytest.raises(InterruptedError):
        KOFFModule.load_from_checkpoint(path)
    assert asked["trust_remote_code"] is False


# --------------------------------------------------------------------------------------------------- one folder


def test_two_runs_in_one_folder(tmp_path):
    with alone_in(tmp_path / "run"):
        with (
            pytest.raises(KoffError, match="another run is going on in .*run: wait for it, or give"),
            alone_in(tmp_path / "run"),
        ):
            pass
        with alone_in(tmp_path / "other"):
            pass
    with alone_in(tmp_path / "run"):
        names = [new_version(tmp_path / "run").folder.name for _ in range(3)]
        assert names == ["version_0", "version_1", "version_2"]


def test_a_run_that_has_ended_leaves_no_lock_and_clears_away_what_a_killed_one_left(tmp_path):
    parts = [tmp_path / ".results.json.7.part", tmp_path / "version_0/checkpoints/.last.ckpt.part"]
    for part in parts:
        broken(part)
    (tmp_path / ".artifact.7.part").mkdir()
    with alone_in(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {".running", "version_0"}
        assert not parts[1].exists()
    assert [path.name for path in tmp_path.iterdir()] == ["version_0"]


def test_a_lock_that_is_removed_by_whoever_held_it_is_held_by_one_of_those_that_wait(tmp_path):
    """Both have the file open that is removed; one may come in and lock a new one while the other wakes up."""
    inside, most, path = [0], [0], tmp_path / "lock"

    def take_it():
        for _ in range(200):
            with files.lock(path, wait=True):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0)
                inside[0] -= 1

    threads = [Thread(target=take_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and not path.exists()


def test_a_link_that_leads_nowhere_is_one_line(tmp_path):
    """As one to a disk that is not mounted."""
    (tmp_path / "runs").symlink_to("nowhere")
    for ask in (lambda: new_version(tmp_path / "runs" / "demo"), alone_in(tmp_path / "runs" / "demo").__enter__):
        with pytest.raises(KoffError, match="runs is a file, or a link that leads nowhere. Give --trainer"):
            ask()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for ask in (lambda: new_version(tmp_path / "file" / "run"), alone_in(tmp_path / "file" / "run").__enter__):
        with pytest.raises(KoffError, match="cannot write the run's folder .*: Not a directory. Give --trainer"):
            ask()


def test_a_later_run_that_saved_nothing_is_not_passed_over_in_silence(run_in, made, monkeypatch):
    shutil.copytree(made / "cut", "cut")
    cut_off(monkeypatch, run_in, step=1)
    (Path("cut") / "version_2").mkdir()  # as of a command that was refused: it has not trained
    said = r"^cut/version_1 is of a later run, but holds no checkpoint: cut/version_0/\S+ of an earlier run is used$"
    with pytest.warns(UserWarning, match=said):
        assert newest_checkpoint(["cut"]).parts[1] == "version_0"
    with pytest.warns(UserWarning, match=said):
        assert run_in("cut", "--ckpt_path", "last") == 0


def test_last_without_any_checkpoint(run_in, capsys):
    assert main(["test", "--config", "mine.yaml", "--ckpt_path", "last"]) == 2
    assert "there is no checkpoint below runs/mine" in capsys.readouterr().err
    assert run_in("x", "--ckpt_path", "best") == 2
    assert "give a checkpoint file, or `last`" in capsys.readouterr().err
