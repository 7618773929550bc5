"""Machines fail while runs go on: full disks, folders that cannot be written, clocks that go back, a second run.

Nothing that was written is lost, and the run says in one line what happened.
"""

import gc
import hashlib
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_command import small_fits

from koff_lightning import KoffError, KOFFModule
from koff_lightning.artifact.checkpoint import read_checkpoint
from koff_lightning.callbacks.report import what_was_saved
from koff_lightning.cli import main
from koff_lightning.training.checkpoints import newest_checkpoint
from koff_lightning.training.run_folder import alone_in

STEPS = 8


@pytest.fixture
def run_in(tmp_path, monkeypatch):
    trainer = {"max_steps": STEPS, "limit_val_batches": 0}
    with small_fits(tmp_path, monkeypatch, trainer=trainer, export={"prove": False}) as run:
        yield run


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Folder of a run that nothing disturbed, made by the first test that asks for it."""
    return tmp_path_factory.mktemp("straight") / "run"


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, 64 MiB: mounting takes root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=False).returncode:
        pytest.skip("NOT TESTED HERE: only root may mount the small disk that this test fills")
    yield folder
    gc.collect()  # a model that was loaded from there maps its files
    subprocess.run(["umount", folder], check=True)


def at(monkeypatch, hook, step, do):
    """Do something in mid-run, once."""
    original, done = getattr(KOFFModule, hook), []

    def hooked(module, *args):
        if module.global_step == step and not done:
            done.append(do())
        return original(module, *args)

    monkeypatch.setattr(KOFFModule, hook, hooked)


def fill(folder):
    with (folder / "filler").open("wb") as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"\0" * 2**16)
            file.flush()


def weights(root):
    return read_checkpoint(newest_checkpoint([root]))["state_dict"]


def check_whole(root, straight):
    """The run has ended as one that nothing disturbed."""
    ours, theirs = weights(root), weights(straight)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    for part in ("results.json", "documents.json", "artifact/koff.json"):
        assert (root / part).is_file()
    assert not list(root.rglob("*.part"))


def hashes(folder):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


# ----------------------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize(
    "when",
    [("training_step", 5), pytest.param(("on_test_epoch_start", STEPS), marks=pytest.mark.slow)],
    ids=["before a checkpoint", "before the results"],
)
def test_a_disk_that_fills_up_in_mid_run(run_in, straight, disk, monkeypatch, capsys, when):
    if not straight.exists():
        assert run_in(straight) == 0
    root = disk / "run"
    with monkeypatch.context() as patch:
        at(patch, *when, lambda: fill(disk))
        assert run_in(root) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said.splitlines()[-1]
    assert said.splitlines()[-1].startswith("koff: ")
    assert read_checkpoint(newest_checkpoint([root]))["global_step"] == (4 if when[1] == 5 else STEPS)
    (disk / "filler").unlink()
    assert run_in(root, "--ckpt_path", "last") == 0
    check_whole(root, straight)


def test_files_that_may_not_grow_in_mid_run(run_in, straight, monkeypatch, capsys):
    """What a quota does, and any user can set."""
    if not straight.exists():
        assert run_in(straight) == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with monkeypatch.context() as patch:
            at(patch, "training_step", 5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1])))
            assert run_in("cut") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Earlier checkpoints are intact: make room, then go on with --ckpt_path last" in capsys.readouterr().err
    assert read_checkpoint(newest_checkpoint(["cut"]))["global_step"] == 4
    assert run_in("cut", "--ckpt_path", "last") == 0
    check_whole(Path("cut"), straight)


def test_an_export_onto_a_full_disk_keeps_the_one_before(run_in, straight, disk, capsys):
    if not straight.exists():
        assert run_in(straight) == 0
    checkpoint = str(newest_checkpoint([straight]))
    assert main(["export", "--ckpt", checkpoint, "--out", str(disk / "out")]) == 0
    before = hashes(disk / "out")
    fill(disk)
    assert main(["export", "--ckpt", checkpoint, "--out", str(disk / "out"), "--overwrite"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("koff: ")
    assert hashes(disk / "out") == before
    assert {path.name for path in disk.iterdir()} - {".out.lock"} <= {"out", "filler"}


# ------------------------------------------------------------------------------------------------- no writing


@pytest.fixture
def read_only(tmp_path):
    """A folder that cannot be written, for root neither."""
    folder = tmp_path / "sealed"
    folder.mkdir()
    folder.chmod(0o555)
    if not os.access(folder, os.W_OK):
        yield folder
        folder.chmod(0o755)
        return
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], check=False).returncode:
        pytest.skip("NOT TESTED HERE: root writes everywhere, and this one may not mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("options", [[], ["--trainer.logger=false"]])
def test_a_folder_that_cannot_be_written_is_said_before_training(run_in, read_only, monkeypatch, capsys, options):
    monkeypatch.setattr(KOFFModule, "training_step", lambda *_: pytest.fail("it trains"))
    assert run_in(read_only / "run", *options) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"koff: cannot write the run's folder {read_only / 'run'}: ")
    assert line.endswith("Give --trainer.default_root_dir")


# ------------------------------------------------------------------------------------------------------- clocks


def test_a_clock_that_goes_back(run_in, straight, monkeypatch):
    if not straight.exists():
        assert run_in(straight) == 0
    clock, hours = time.time, []

    def backwards():
        hours.append(3600.0)
        return clock() - sum(hours)

    monkeypatch.setattr(time, "time", backwards)
    with monkeypatch.context() as patch:
        at(patch, "training_step", 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run_in("cut") == 128 + signal.SIGTERM
    for age, path in enumerate(sorted(Path("cut").rglob("*.ckpt"))):  # as if each had been saved before the last
        os.utime(path, (10**9 - age, 10**9 - age))
    assert run_in("cut", "--ckpt_path", "last") == 0
    assert len(hours) > STEPS
    check_whole(Path("cut"), straight)


def test_the_checkpoint_that_is_named_is_the_last_whatever_the_clock_said(tmp_path):
    class Saved:
        _last_checkpoint_saved, best_model_path = str(tmp_path / "last.ckpt"), str(tmp_path / "step=2.ckpt")

    class Trainer:
        checkpoint_callbacks, ckpt_path = (Saved,), None

    for age, name in enumerate(("step=2.ckpt", "last.ckpt")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (10**9 - age, 10**9 - age))
    assert what_was_saved(Trainer).endswith("--ckpt_path " + Saved._last_checkpoint_saved)


def test_a_run_that_fails_before_it_saves_names_what_it_went_on_from(run_in, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at(patch, "training_step", 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run_in("cut") == 128 + signal.SIGTERM
    newest = newest_checkpoint(["cut"])
    assert read_checkpoint(newest)["global_step"] == 5
    with monkeypatch.context() as patch:
        at(patch, "training_step", 5, lambda: torch.empty(1 << 60))
        assert run_in("cut", "--ckpt_path", "last") == 2
    assert capsys.readouterr().out.splitlines()[-1] == f"go on from the last checkpoint with --ckpt_path {newest}"


# ---------------------------------------------------------------------------------------------------- two runs


def test_too_little_memory_is_one_line(run_in, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("koff_lightning.training.module.KOFFModule.training_step", lambda *_: torch.empty(1 << 60))
    assert run_in(tmp_path / "run") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "not enough memory: " in said and "Take a smaller data.batch_size" in said


WORKERS = ["--data.num_workers=2", "--export.enabled=false"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_worker_that_the_system_kills_is_one_line(run_in, monkeypatch, capsys):
    def kill_workers():
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
        time.sleep(0.5)

    at(monkeypatch, "training_step", 3, kill_workers)
    assert run_in("run", *WORKERS) == 2
    said = capsys.readouterr()
    assert re.fullmatch(  # torch's words depend on whether the signal or the wait for a batch tells it first
        r"koff: a process that builds batches is gone, .*: DataLoader worker .*"
        "(killed by signal: Killed|exited unexpectedly). Give fewer data.num_workers, or more memory",
        said.err.splitlines()[-1],
    )
    assert "step=2.ckpt" in said.out.splitlines()[-1] or "last.ckpt" in said.out.splitlines()[-1]


SLOW_STEPS = """
import sys, time
from koff_lightning import KOFFModule
from koff_lightning.cli import main
from koff_lightning.data import loader
heed, step = loader.heed_the_parent_alone, KOFFModule.training_step
def late(worker):
    time.sleep(2 * worker)
    heed(worker)
loader.heed_the_parent_alone = late
def slow(module, *args):
    print("begun", flush=True)
    time.sleep(0.5)
    return step(module, *args)
KOFFModule.training_step = slow
sys.exit(main(sys.argv[1:]))
"""
STREAMED = ["--data.streaming=true", "--data.max_train_bytes=null"]


@pytest.mark.parametrize("data", [[], pytest.param(STREAMED, marks=pytest.mark.slow)], ids=["in memory", "streamed"])
def test_a_signal_to_all_processes_of_a_run_ends_it_as_one_to_the_first(run_in, data):
    """As SLURM sends it. The workers go on until the step is taken, also one that has hardly started."""
    words = ["fit", "--config", "mine.yaml", "--trainer.default_root_dir=run", *WORKERS, *data]
    run = subprocess.Popen(
        [sys.executable, "-c", SLOW_STEPS, *words],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert any(line == "begun\n" for line in run.stdout)
    os.killpg(run.pid, signal.SIGTERM)
    said = run.communicate(timeout=120)[1]
    assert run.returncode == 128 + signal.SIGTERM, said
    assert said.splitlines()[-1] == "koff: ended by SIGTERM; go on with --ckpt_path last"
    assert "Traceback" not in said
    assert read_checkpoint(newest_checkpoint(["run"]))["global_step"] == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)  # no worker is left


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_worker_that_outlives_its_run_does_not_hold_the_folder(tmp_path):
    with alone_in(tmp_path / "run"):
        fork = multiprocessing.get_context("fork")
        begun = fork.Event()
        worker = fork.Process(target=lambda: (begun.set(), time.sleep(60)), daemon=True)
        worker.start()
        assert begun.wait(60), "only then has it left the lock to us"
        with pytest.raises(KoffError, match="another run is going on"), alone_in(tmp_path / "run"):
            pass
    with alone_in(tmp_path / "run"):
        assert worker.is_alive()
    worker.kill()
    worker.join()


def test_a_second_run_in_the_folder_of_a_first_touches_nothing(run_in, straight, capsys):
    if not straight.exists():
        assert run_in(straight) == 0
    before = hashes(straight)
    with alone_in(straight):
        assert run_in(straight) == 2
        assert run_in(straight, "--ckpt_path", "last") == 2
    assert "another run is going on in" in capsys.readouterr().err.splitlines()[-1]
    after = hashes(straight)
    assert {path: after.get(path) for path in before} == before
