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
from torch import Tensor

from koff_lightning.training.module import KOFFModule

try:
    import resource
except ImportError:  # Windows
    resource = None

REFRESH = 0.5  # seconds between looks at the figures: each look waits for the device
LINE_SHARE, LINE_SECONDS = 0.05, 10.0  # a plain line comes after both this share of the run and this time


class KoffProgress(RichProgressBar):
    """Step and total, time left, tokens per second, peak memory, expected sparsity and its target, loss.

    Throughput (over all devices) and peak memory also go to the loggers.
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
        """Choose between bar and lines."""
        super().setup(trainer, pl_module, stage)
        console = get_console()
        live = console.is_jupyter or (sys.stdout.isatty() and not console.is_dumb_terminal)
        self.plain, self._lines = trainer.is_global_zero and not live, Pace()
        if self.plain:
            self.disable()

    def on_train_start(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """One bar for the whole run, however many epochs it has."""
        super().on_train_start(trainer, pl_module)
        self._total = trainer.estimated_stepping_batches
        self._began, self._first_step = time.perf_counter(), trainer.global_step
        self._throughput.restart()
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        if self.progress is not None and self.is_enabled:
            self.train_progress_bar_id = self._add_task(self._total, "train")
            self._update(self.train_progress_bar_id, trainer.global_step)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """The bar goes on."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: KOFFModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Measure, log, show."""
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
        step = trainer.global_step
        share = f"{step / self._total:4.0%}" if math.isfinite(self._total) else ""
        words = [f"{name} {text}" for name, text in self.get_metrics(trainer, module).items()]
        return "  ".join(
            [f"step {_of(step, self._total)}", share, f"{module.phase:<11}", *words, self._time_left(step)]
        )

    @torch.no_grad()
    def _look(self, trainer: Trainer, module: KOFFModule, outputs: Any) -> dict[str, float]:
        """The figures of this moment."""
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
        """What the bar or the line says after the step count."""
        if not self._figures:
            return {}
        now = self._figures
        words = {"loss": f"{now['loss']:.3f}"}
        if pl_module.learns_mask:
            words["sparsity"] = f"{100 * now['sparsity']:.1f}/{100 * now['target']:.1f} %"
        if pl_module.learns_now:
            price = [p.mean().item() for p in pl_module.penalty.parameters()] or [
                getattr(pl_module.penalty, "weight", 0.0)
            ]
            words["penalty"] = "/".join(f"{p:.2f}" for p in price)
            words["temperature"] = f"{pl_module.model.gates.gate.temperature:.2f}"
        words["tokens/s"] = f"{now['rate']:,.0f}"
        if math.isfinite(now["peak"]):
            words["peak"] = f"{now['peak']:.2f} GiB"
        held_out = trainer.progress_bar_metrics.get("val/koff_bpb")
        return words | ({"held-out": f"{float(held_out):.4f} bits/byte"} if held_out is not None else {})

    def _time_left(self, step: int) -> str:
        done = step - self._first_step
        if not done or not math.isfinite(self._total):
            return ""
        left = round((time.perf_counter() - self._began) / done * (self._total - step))
        return f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"

    def on_validation_end(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """Time spent on validation is not training time."""
        super().on_validation_end(trainer, pl_module)
        self._throughput.restart()

    def on_train_end(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """Leave the bar before the report is printed."""
        self._stop_progress()

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """Lightning's columns without batches per second, which tokens per second say better."""
        columns = super().configure_columns(trainer)[:-1]
        columns[1].bar_width = 20
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


def _of(done: int, total: float) -> str:
    return f"{done:>{len(str(int(total)))}}/{total:.0f}" if math.isfinite(total) else f"{done}"


def _say(line: str) -> None:
    print(line.rstrip(), flush=True)
