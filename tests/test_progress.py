import io
import math
import re
import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from tiny_run import RandomText, tiny_module, tiny_trainer

from koff_lightning.callbacks import KoffProgress
from koff_lightning.callbacks import progress as progress_module
from koff_lightning.callbacks.progress import Pace, Throughput, peak_memory


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """A slow machine must not add lines."""
    monkeypatch.setattr(progress_module, "LINE_SECONDS", math.inf)


def fit(folder, steps=8, **options):
    progress = KoffProgress()
    trainer = tiny_trainer(folder, [progress], steps=steps, **options)
    trainer.fit(tiny_module(folder), RandomText(batches=3))
    return progress, trainer


def test_without_a_terminal_there_are_plain_lines(tmp_path, capsys):
    progress, _ = fit(tmp_path)
    said = capsys.readouterr().out.splitlines()
    lines = [line for line in said if line.startswith("step")]
    assert progress.plain and len(lines) == 2  # first and last: the run took less than the time between lines
    assert lines[0].startswith("step 1/8  warmup  loss ") and lines[1].startswith("step 8/8  consolidate  loss ")
    for word in ("loss ", "sparsity ", "tok/s", "left"):
        assert word in lines[1]
    assert not any(ord(sign) < 32 for sign in "".join(lines))
    summary = next(line for line in said if line.startswith("trained to step 8 in 0:"))
    assert " tokens/s, peak memory " in summary and summary.endswith(" GiB")
    assert said[0] == f"loading {tmp_path / 'backbone'}"


def test_the_time_of_training_is_that_of_its_steps(tmp_path, capsys):
    class Scores(Callback):
        """Takes long after the last step, as scoring does, before the bar is told that training has ended."""

        def on_train_end(self, trainer, pl_module):
            progress._began -= 500  # as if that much time went by
            progress._looked -= 500

    progress = KoffProgress()
    trainer = tiny_trainer(tmp_path, [Scores(), progress], steps=2)
    trainer.fit(tiny_module(tmp_path), RandomText(batches=3))
    assert "trained to step 2 in 0:" in capsys.readouterr().out


@pytest.mark.parametrize("total", [8, 2_400, 99_999, 10_000_000, math.inf])
def test_a_plain_line_fits_80_columns_and_says_the_most_important(tmp_path, total):
    """Whatever its figures; step, phase and loss always fit, sparsity and the time left in runs of a usual length."""
    progress, trainer = fit(tmp_path, steps=2)
    progress._total, progress._began = total, time.perf_counter() - 360_000
    progress._figures |= {"loss": 12.345, "sparsity": 0.123, "target": 0.456, "rate": 1_234_567.0}
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = (
        1_000 if math.isinf(total) else total // 2
    )
    for phase in ("warmup", "ramp", "hold", "consolidate"):
        line = progress._line(trainer, SimpleNamespace(phase=phase, learns_mask=True, mask_is_fixed=phase[0] == "c"))
        assert len(line) <= 80
        assert f"  {phase}  loss 12.345" in line
        assert "sparsity" in line and (total > 99_999 or "left" in line)


def test_a_validation_says_what_came_out(tmp_path, capsys):
    fit(tmp_path, val_check_interval=2, check_val_every_n_epoch=None, limit_val_batches=2)
    said = [line for line in capsys.readouterr().out.splitlines() if "held-out" in line]
    assert len(said) == 4 and all(re.fullmatch(r"step \d/8  held-out text: \d\.\d{4} bits per byte", s) for s in said)


def test_accumulated_batches_count_as_one_step(tmp_path, capsys):
    fit(tmp_path, steps=2, accumulate_grad_batches=3)
    lines = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert lines == ["1/2", "2/2"]


def test_on_a_terminal_one_bar_spans_all_epochs(tmp_path, monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    monkeypatch.setattr("koff_lightning.callbacks.progress.get_console", lambda: console)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.get_console", lambda: console)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    progress, _ = fit(tmp_path)
    assert not progress.plain
    assert len(progress.progress.tasks) == 1 and progress.progress.tasks[0].completed == 8
    shown = screen.getvalue()
    for word in ("8/8", "consolidate", "tokens/s", "sparsity", "loss"):
        assert word in shown


@pytest.mark.parametrize("total", [8, 99_999, 10_000_000])
@pytest.mark.parametrize("seconds", [30, 40_000, 400_000])
def test_the_bar_is_one_line_of_80_columns(tmp_path, monkeypatch, total, seconds):
    """In every phase, however long the run; loss and sparsity are told while counts and times are not of days."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr("koff_lightning.callbacks.progress.get_console", lambda: console)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.get_console", lambda: console)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    progress, trainer = fit(tmp_path)
    task = progress.progress.tasks[0]
    task.start_time, task.stop_time, task.finished_time = time.monotonic() - seconds, None, None
    task.total, task.completed = total, total // 2
    progress._figures |= {"loss": 12.345, "sparsity": 0.123, "target": 0.12, "rate": 1_234_567.0}
    for phase in ("warmup", "ramp", "hold", "consolidate"):
        module = SimpleNamespace(phase=phase, learns_mask=True, mask_is_fixed=phase[0] == "c")
        task.description = f"{phase:<11}"
        progress._metric_component.update(progress.get_metrics(trainer, module))
        progress._renderable_cache = progress._metric_component._renderable_cache.clear()
        trainer.state.fn, progress.train_progress_bar_id = "fit", task.id
        lines = console.render_lines(progress.progress.make_tasks_table([task]), pad=False)
        assert len(lines) == 1
        line = "".join(segment.text for segment in lines[0])
        assert len(line) <= 80 and line.startswith(phase) and "loss: 12.345" in line
        assert "…" not in line and (max(total, seconds) > 99_999 or "sparsity: 12.3" in line)


def test_throughput_and_memory_are_logged(tmp_path):
    _, trainer = fit(tmp_path, logger=CSVLogger(tmp_path, name=""), log_every_n_steps=2)
    head = (tmp_path / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert "throughput/tokens_per_second" in head and "memory/peak_gib" in head
    assert float(trainer.logged_metrics["throughput/tokens_per_second"]) > 0


def test_the_loss_is_not_that_of_a_share_of_the_step(tmp_path):
    progress, trainer = fit(tmp_path, steps=1, accumulate_grad_batches=2)
    assert progress._figures["loss"] == pytest.approx(float(trainer.callback_metrics["train/loss"]), rel=1e-5)


def test_test_and_predict_count_batches(tmp_path, capsys):
    trainer = tiny_trainer(tmp_path, [KoffProgress()])
    trainer.test(tiny_module(tmp_path), RandomText(), verbose=False)
    trainer.predict(tiny_module(tmp_path), RandomText(), return_predictions=False)
    lines = capsys.readouterr().out.splitlines()
    assert "test: batch 4/4" in lines and "predict: batch 4/4" in lines


def test_lines_are_rare_in_steps_and_in_time(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 10.0)

    def printed(seconds_per_step, total=1000):
        pace, clock[0], found = Pace(), 0.0, []
        for step in range(1, total + 1):
            clock[0] += seconds_per_step
            if pace.due(step, total):
                found.append(step)
        return found

    assert printed(1.0) == [1, *range(51, 1000, 50), 1000]  # 5 % of the steps is rarer
    assert printed(0.0625) == [1, *range(161, 1000, 160), 1000]  # 10 seconds is rarer


def test_throughput_leaves_out_pauses(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    throughput = Throughput(batches=2)
    for seconds in (5.0, 1.0, 1.0):  # the first falls out of the window
        clock[0] += seconds
        throughput.add(torch.tensor(30))
    assert throughput.rate() == 30
    clock[0] += 100  # validation
    throughput.restart()
    clock[0] += 1
    throughput.add(torch.tensor(30))
    assert throughput.rate() == 30


def test_peak_memory_is_that_of_the_process():
    before = peak_memory(torch.device("cpu"))
    block = torch.ones(64 * 2**20)  # 256 MiB
    assert peak_memory(torch.device("cpu")) >= max(before, block.numel() * 4 / 2**30)
