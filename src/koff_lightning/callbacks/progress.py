"""KoffProgress: where a run stands. On a terminal a live bar, elsewhere a plain line now and then."""

import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich import get_console
from rich.progress import ProgressColumn
from rich.table import Column
from torch import Tensor

from koff_lightning.training.module import KOFFModule

try:
    import resource
except ImportError:  # Windows
    resource = None

REFRESH = 0.5  # seconds between looks at the figures: each look waits for the device
COLUMNS = 80  # of a plain line
BAR, SHORT_BAR, FIGURES = 20, 1, 34  # columns of the bar, which leaves room for `loss: 12.345 sparsity: 12.0/12.0%`
LINE_SHARE, LINE_SECONDS = 0.05, 10.0  # a plain line comes after both this share of the run and this time


class KoffProgress(RichProgressBar):
    """Step and total, phase, loss, sparsity and its target, time left, tokens per second: in one line of 80 columns.

    Throughput (over all devices) and peak memory also go to the loggers, with all else that is measured.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=5)
        self.plain = False
        self._throughput = Throughput()
        self._lines = Pace()
        self._total, self._first_step = math.inf, 0
        self._began, self._looked = 0.0, -math.inf
        self._figures: dict[str, float] = {}

    # ---------------------------------------------------------------------------------------------- training

    def setup(self, trainer: Trainer, pl_module: KOFFModule, stage: str) -> None:
        """Choose between bar and lines. The text has been read; loading the model comes next."""
        super().setup(trainer, pl_module, stage)
        console = get_console()
        live = console.is_jupyter or (sys.stdout.isatty() and not console.is_dumb_terminal)
        self.plain, self._lines = trainer.is_global_zero and not live, Pace()
        if self.plain:
            self.disable()
        if trainer.is_global_zero and pl_module.model is None:
            _say(f"loading {pl_module.source}")

    def on_train_start(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """One bar for the whole run, however many epochs it has."""
        super().on_train_start(trainer, pl_module)
        self._total = trainer.estimated_stepping_batches
        self._began, self._first_step = time.perf_counter(), trainer.global_step
        self._throughput.restart()
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        if self.progress is not None and self.is_enabled:
            for column in self.progress.columns:  # one line, whatever comes
                column._table_column = Column(no_wrap=True)
            self.train_progress_bar_id = self._add_task(self._total, "train")
            self._update(self.train_progress_bar_id, trainer.global_step)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """Keep the bar of the whole run; Lightning would start a new one each epoch."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: KOFFModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Measure the speed, log it and show it."""
        if not trainer.is_global_zero:
            return
        self._throughput.add(predicted_tokens(batch))
        step, now = trainer.global_step, time.perf_counter()
        line = self.plain and self._lines.due(step, self._total)
        if line or now - self._looked >= REFRESH or step >= self._total:
            self._looked, self._figures = now, self._look(trainer, pl_module, outputs)
            if self.is_enabled and self.progress is not None:
                self.progress.update(self.train_progress_bar_id, completed=step, description=f"{pl_module.phase:<11}")
                self._update_metrics(trainer, pl_module)
                self.refresh()
        if line:
            _say(self._line(trainer, pl_module))
        logged = {"throughput/tokens_per_second": self._figures["rate"], "memory/peak_gib": self._figures["peak"]}
        pl_module.log_dict(logged, rank_zero_only=True)

    def _line(self, trainer: Trainer, module: KOFFModule) -> str:
        """As much as fits, the most important first."""
        step, words = trainer.global_step, self._words(module)
        rate = f"{words.pop('tokens/s')} tok/s"
        named = [f"{name} {text}" for name, text in words.items()]
        return _fitting([f"step {_of(step, self._total)}", module.phase, *named, self._time_left(step), rate], COLUMNS)

    @torch.no_grad()
    def _look(self, trainer: Trainer, module: KOFFModule, outputs: Any) -> dict[str, float]:
        """Figures to show now."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        gated = module.phase != "warmup"  # before that gates stand at one, whatever the logits
        return {
            "loss": float(loss) * trainer.accumulate_grad_batches,
            "sparsity": module.model.realised_sparsity() if gated else 0.0,
            "target": module.model.target,
            "rate": self._throughput.rate() * trainer.world_size,
            "peak": peak_memory(module.device),
        }

    def get_metrics(self, trainer: Trainer, pl_module: KOFFModule) -> dict[str, str]:
        """What the bar says after the step count: as much as fits, the most important first."""
        if not self._figures:
            return {}
        words = self._words(pl_module)
        if (held_out := trainer.progress_bar_metrics.get("val/koff_bpb")) is not None:
            words["held-out"] = f"{float(held_out):.4f} bits/byte"
        if math.isfinite(self._figures["peak"]):
            words["peak"] = f"{self._figures['peak']:.2f} GiB"
        names, room = list(words), self._make_room()
        while len(names) > 1 and sum(len(f"{name}: {words[name]} ") for name in names) - 1 > room:
            names.pop()
        return {name: words[name] for name in names}

    def _make_room(self) -> int:
        """Shorten the bar where figures need its place; gives the columns for them."""
        _, bar, count, times, *_ = self.progress.columns
        task = self.progress.tasks[self.train_progress_bar_id]
        others = len("consolidate ") + len(count.render(task)) + len(f" {times.render(task)} ")
        left = get_console().width - others - 1
        bar.bar_width = min(BAR, max(SHORT_BAR, left - FIGURES))
        return left - bar.bar_width

    def _words(self, module: KOFFModule) -> dict[str, str]:
        now, words = self._figures, {}
        words["loss"] = f"{now['loss']:.3f}"
        if module.learns_mask:
            target = "" if module.mask_is_fixed else f"/{100 * now['target']:.1f}"
            words["sparsity"] = f"{100 * now['sparsity']:.1f}{target}%"
        words["tokens/s"] = f"{now['rate']:,.0f}"
        return words

    def _time_left(self, step: int) -> str:
        done = step - self._first_step
        if not done or not math.isfinite(self._total):
            return ""
        return f"{_duration((time.perf_counter() - self._began) / done * (self._total - step))} left"

    def on_validation_end(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """Say what came out; time spent on validation is not training time."""
        super().on_validation_end(trainer, pl_module)
        self._throughput.restart()
        held_out = trainer.callback_metrics.get("val/koff_bpb")
        unscored = trainer.sanity_checking or trainer.fast_dev_run  # a few rows, perhaps none of a domain
        if self.plain and held_out is not None and not unscored:
            step = f"step {_of(trainer.global_step, self._total)}  " if trainer.state.fn == "fit" else ""
            _say(f"{step}held-out text: {float(held_out):.4f} bits per byte")

    def on_train_end(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """Leave the bar before the report is printed; sum up."""
        self._stop_progress()
        if trainer.is_global_zero and self._figures:
            peak = f", peak memory {self._figures['peak']:.2f} GiB" if math.isfinite(self._figures["peak"]) else ""
            took = _duration(self._looked - self._began)  # to the last step: by now held-out text has been scored
            _say(f"trained to step {trainer.global_step} in {took}, {self._figures['rate']:,.0f} tokens/s{peak}")

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """Lightning's columns without batches per second, which tokens per second say better."""
        columns = super().configure_columns(trainer)[:-1]
        columns[1].bar_width = BAR
        return columns

    # ------------------------------------------------------------------------------------ test and prediction

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Show the batch count."""
        super().on_test_batch_end(trainer, *args, **kwargs)
        self._count("test", args[3], trainer.num_test_batches)

    def on_predict_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Show the batch count."""
        super().on_predict_batch_end(trainer, *args, **kwargs)
        self._count("predict", args[3], trainer.num_predict_batches)

    def _count(self, what: str, batch_idx: int, totals: Sequence[float]) -> None:
        if self.plain and self._lines.due(batch_idx + 1, sum(totals)):
            _say(f"{what}: batch {_of(batch_idx + 1, sum(totals))}")


class Throughput:
    """Tokens per second over the last batches, loading included.

    Counts stay on the device until asked for, since reading one waits for everything before it.
    """

    def __init__(self, batches: int = 50) -> None:
        self._tokens: deque[Tensor] = deque(maxlen=batches)
        self._seconds: deque[float] = deque(maxlen=batches)
        self._since = time.perf_counter()

    def restart(self) -> None:
        """Do not count the time since the last batch."""
        self._since = time.perf_counter()

    def add(self, tokens: Tensor) -> None:
        """Count a batch that ends now, of `tokens` (scalar)."""
        now = time.perf_counter()
        self._tokens.append(tokens)
        self._seconds.append(now - self._since)
        self._since = now

    def rate(self) -> float:
        """Tokens per second on this device."""
        return float(torch.stack(list(self._tokens)).sum()) / max(sum(self._seconds), 1e-9)


class Pace:
    """When the next plain line is due: the first, the last, and between them rarely enough for a log file."""

    def __init__(self) -> None:
        self._step, self._time = 0, -math.inf

    def due(self, step: int, total: float) -> bool:
        """Whether to print at `step` of `total`; True counts as printed."""
        now, steps = time.perf_counter(), step - self._step
        first, last = self._time == -math.inf, step >= total
        enough = steps >= LINE_SHARE * total if math.isfinite(total) else steps > 0
        if not steps or not (first or last or (enough and now - self._time >= LINE_SECONDS)):
            return False
        self._step, self._time = step, now
        return True


def predicted_tokens(batch: dict[str, Any]) -> Tensor:
    """Number of next tokens that a batch trains on, scalar, on its device."""
    return (batch["labels"][:, 1:] != -100).sum()


def peak_memory(device: torch.device) -> float:
    """GiB: most that torch had allocated on a CUDA device, else most that this process ever held (nan on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _fitting(words: Sequence[str], columns: int) -> str:
    """The words in one line, as far as it goes."""
    line = ""
    for word in filter(None, words):
        longer = f"{line}  {word}" if line else word
        line = longer if len(longer) <= columns else line
    return line


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours}:{minutes:02} h" if hours else f"{minutes}:{seconds % 60:02}"


def _of(done: int, total: float) -> str:
    return f"{done:>{len(str(int(total)))}}/{total:.0f}" if math.isfinite(total) else f"{done}"


def _say(line: str) -> None:
    print(line.rstrip(), flush=True)
