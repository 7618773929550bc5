"""Runs that get a real signal, or reach their time limit: what is saved, what they say, their exit status."""

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Timer
from tiny_run import RandomText, tiny_module, tiny_trainer

from koff_lightning.artifact.checkpoint import read_checkpoint
from koff_lightning.cli import main
from koff_lightning.support.ending import TIME_LIMIT, Ended, SignalHandler, ended_by
from koff_lightning.training import ending
from koff_lightning.training.checkpoints import newest_checkpoint

# `koff`, which says "begun" when KOFFModule comes to a method in a step, and goes on once it is told to.
HELD = """
import sys
from koff_lightning import KOFFModule
from koff_lightning.cli import main
hook, step = sys.argv[1], int(sys.argv[2])
original = getattr(KOFFModule, hook)
def held(module, *args):
    if module.trainer.state.fn == "fit" and not module.trainer.sanity_checking and module.global_step == step:
        print("begun", flush=True)
        sys.stdin.readline()
    return original(module, *args)
setattr(KOFFModule, hook, held)
sys.exit(main(sys.argv[3:]))
"""
SMALL = {
    "data": {
        "domains": {"de": "bundled:de", "python": "bundled:python"},
        **{"seq_len": 64, "batch_size": 4, "max_train_bytes": 20_000, "max_heldout_bytes": 1_500},
    },
    "trainer": {
        **{"accelerator": "cpu", "max_steps": 6, "num_sanity_val_steps": 0, "enable_progress_bar": False},
        **{"check_val_every_n_epoch": None, "val_check_interval": 4, "log_every_n_steps": 1},
    },
    "checkpoint": {"every_n_train_steps": 100},
    "export": {"enabled": False},
}
FIT = ["fit", "--config", "mine.yaml", "--trainer.default_root_dir=run"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(yaml.safe_dump(SMALL), encoding="utf-8")


def held(hook, step):
    """A run that waits in one of its methods."""
    run = subprocess.Popen(
        [sys.executable, "-c", HELD, hook, str(step), *FIT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert any(line == "begun\n" for line in run.stdout), run.stderr.read()
    return run


def signalled(hook, step, number):
    """Exit status and last line of a run that gets a signal in one of its methods, and then may go on."""
    run = held(hook, step)
    run.send_signal(number)  # it is there before what lets the run go on
    said = run.communicate("\n", timeout=300)[1]
    assert "Traceback" not in said
    return run.returncode, said.splitlines()[-1] if said else ""


@pytest.mark.parametrize(
    ("number", "hook", "step", "saved"),
    [
        (signal.SIGINT, "training_step", 2, 3),
        pytest.param(signal.SIGTERM, "training_step", 2, 3, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, "training_step", 5, 6, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "on_validation_epoch_start", 4, 4, marks=pytest.mark.slow),
        (signal.SIGTERM, "on_test_epoch_start", 6, 6),
    ],
)
def test_a_signal_ends_a_run_within_a_step_and_nothing_is_lost(number, hook, step, saved):
    """Though no checkpoint was due; a run that only scores ends at once, and goes on with the scoring."""
    status, said = signalled(hook, step, number)
    assert (status, said) == (128 + number, f"koff: ended by {number.name}; go on with --ckpt_path last")
    assert read_checkpoint(newest_checkpoint(["run"]))["global_step"] == saved
    assert not Path("run/results.json").exists()
    assert main([*FIT, "--ckpt_path", "last"]) == 0
    assert read_checkpoint(newest_checkpoint(["run"]))["global_step"] == 6
    assert Path("run/results.json").is_file()


IN_A_TERMINAL = """
import pty, sys
from pathlib import Path
pid, terminal = pty.fork()
if not pid:
    exec(sys.argv[1])
import os
said = b""
while b"begun" not in said:
    said += os.read(terminal, 4096)
os.close(terminal)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
PRINTS = """
import signal, sys, time
from pathlib import Path
from koff_lightning import cli
def run(verb, words):
    print("begun", flush=True)
    signal.sigwait([signal.SIGHUP]) if HELD_BACK else time.sleep(60)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP]) if HELD_BACK else None
def prints(verb, words, classes):
    try:
        run(verb, words)
    finally:
        print("more", flush=True)
        print("more", file=sys.stderr)
        Path("saved").touch()
cli._run_verb = prints
sys.exit(cli.main(["fit", "demo.yaml"]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminals of that kind")
@pytest.mark.parametrize(("held_back", "status"), [(True, 0), (False, 128 + signal.SIGHUP)])
def test_a_terminal_that_is_closed_breaks_nothing_that_prints(held_back, status):
    """It fails at each write, whether the signal that tells of it comes before the next one, later, or not at all."""
    program = PRINTS.replace("HELD_BACK", str(held_back))
    done = subprocess.run([sys.executable, "-c", IN_A_TERMINAL, program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, Path("saved").exists()) == (status, True), done.stderr


def test_a_second_signal_leaves_at_once():
    """While the step still waits to go on. What comes within a second of the first is one request with it."""
    run = held("training_step", 2)
    run.send_signal(signal.SIGINT)
    for _ in range(100):
        with suppress(subprocess.TimeoutExpired):
            run.wait(1.2)
            break
        run.send_signal(signal.SIGTERM)
    run.kill()
    run.communicate()
    assert run.returncode == 128 + signal.SIGTERM
    assert newest_checkpoint(["run"]) is None


@pytest.mark.slow
def test_a_signal_before_the_first_step_says_that_nothing_was_saved():
    status, said = signalled("fill_memories", 0, signal.SIGTERM)
    assert (status, said) == (143, "koff: ended by SIGTERM; no checkpoint had been saved yet")
    assert not list(Path("run").rglob("*.ckpt"))


def test_a_time_limit_ends_a_run_as_a_signal_does(capsys):
    """It counts the steps of all parts of a run; the accumulated batches of a step are trained to their end."""
    words = ["--trainer.max_steps=9999", "--trainer.accumulate_grad_batches=2", "--trainer.max_time=00:00:00:01"]
    assert main([*FIT, *words]) == TIME_LIMIT
    assert capsys.readouterr().err.splitlines()[-1] == "koff: ended by the time limit; go on with --ckpt_path last"
    checkpoint = read_checkpoint(newest_checkpoint(["run"]))
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
    assert batches == 2 * checkpoint["global_step"] > 0
    assert not Path("run/results.json").exists()
    assert main([*FIT, *words, "--ckpt_path", "last"]) == TIME_LIMIT
    assert capsys.readouterr().err.splitlines()[-1].startswith("koff: ended by the time limit; give it more")


class Stops(Callback):
    """Asks to stop in the middle of step 3, as the timer does, whose clock on another rank is behind."""

    def __init__(self, hook):
        setattr(self, hook, self.stop)

    @staticmethod
    def stop(trainer, *_):
        trainer.should_stop |= trainer.fit_loop.total_batch_idx == 4


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end"])
@pytest.mark.parametrize("left", [None, 0.01, -0.01])
def test_what_asks_to_stop_in_mid_step_waits_for_its_end(tmp_path, monkeypatch, hook, left):
    """On all ranks, however late it is by the clock of each: else one would leave the loop, and the others wait."""
    timer = [] if left is None else [Timer("00:12:00:00")]
    monkeypatch.setattr(Timer, "time_remaining", lambda _: left)
    options = {"accumulate_grad_batches": 2, "limit_val_batches": 1, "val_check_interval": 1}
    trainer = tiny_trainer(tmp_path, [*timer, Stops(hook)], steps=8, check_val_every_n_epoch=None, **options)
    with pytest.raises(SystemExit) if timer and left < 0 else nullcontext():
        trainer.fit(tiny_module(tmp_path), RandomText())
    assert (trainer.global_step, trainer.fit_loop.total_batch_idx + 1) == (3, 6)


def test_what_comes_twice_in_a_moment_is_one_request(monkeypatch):
    """`timeout` signals its command and then its group."""
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    handler = SignalHandler(may_leave=lambda: False)
    handler(signal.SIGTERM)
    handler(signal.SIGTERM)
    assert handler.asked == 143 and not left
    later = time.monotonic() + 2
    monkeypatch.setattr(time, "monotonic", lambda: later)
    handler(signal.SIGINT)
    assert left == [130]


def test_ignored_signals_stay_ignored():
    """As `nohup` and a shell's background jobs have it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            with pytest.raises(Ended, match="ended by SIGTERM"):
                os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "words", [["configs"], pytest.param(["plan", "--config", "demo.yaml"], marks=pytest.mark.slow)]
)
def test_nobody_reads_what_is_printed(words):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "koff_lightning", *words],
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_another_broken_pipe_is_no_quiet_end(monkeypatch):
    def broken(*_):
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr("koff_lightning.cli._run", broken)
    with pytest.raises(BrokenPipeError, match="of a worker"):
        main(["configs"])


def koff(*words, stdout=subprocess.PIPE, **environment):
    """Exit status, output and errors of a command of its own."""
    command = [sys.executable, "-m", "koff_lightning", *words]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, env=os.environ | environment, timeout=120, check=False
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
@pytest.mark.parametrize("words", [["configs"], ["--help"], ["fit", "--help"]])
def test_a_disk_that_is_too_full_for_what_is_printed_is_one_line(words):
    with open("/dev/full", "w") as full:
        done = koff(*words, stdout=full)
    line = b"koff: cannot write what is printed, or a file: No space left on device; make room, then run it again\n"
    assert (done.returncode, done.stderr) == (2, line)


def test_what_is_printed_into_a_closed_stream_reaches_no_file():
    """The number of a closed stream goes to the next file that is opened; C code that prints would write into that."""
    look = """
import os, sys
sys.argv = ["koff"]  # which imports nothing heavy
from koff_lightning.cli import main
status = main(["configs"])
with open("mine.txt", "w") as file:
    os.write(3, f"{status} {file.fileno() > 2}".encode())
"""
    command = ["sh", "-c", '"$0" -c "$1" 3>&1 <&- >&- 2>&-', sys.executable, look]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, b"0 True")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_cannot_show_a_text_shows_it_escaped(encoding):
    done = koff("configs", "demo.yaml", "--copy", "\u0436.yaml", PYTHONIOENCODING=encoding)
    line = b"wrote \\u0436.yaml: koff fit \\u0436.yaml\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, line, b"")


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_a_rank_that_has_met_the_others_is_no_longer_ended_with_its_launcher(stage, monkeypatch):
    """Of ranks that score, the launcher may be the first that is done."""
    monkeypatch.setattr(ending, "MET", met := Event())
    ending.EndsBetweenSteps().setup(SimpleNamespace(world_size=1), None, stage)
    assert met.is_set()


def test_a_rank_whose_launcher_is_gone_before_the_ranks_have_met_ends(tmp_path):
    """It has not even imported torch by then, and would wait at the meeting."""
    words = "-m koff_lightning fit demo.yaml --trainer.devices 2 --trainer.strategy ddp --trainer.accelerator cpu"
    script = f'"$0" {words} --trainer.default_root_dir "$1/runs" 2> "$1/said" & echo $!; sleep 0.7; kill -9 $$'
    ranks = {"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    launched = subprocess.run(
        ["bash", "-c", script, sys.executable, tmp_path],
        env=os.environ | ranks,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    rank = int(launched.stdout)
    for _ in range(300):
        if not Path(f"/proc/{rank}").exists():
            break
        time.sleep(0.1)
    else:
        os.kill(rank, signal.SIGKILL)
        pytest.fail("the rank still waits after 30 s")
    assert "what has launched this rank is gone" in (tmp_path / "said").read_text()
