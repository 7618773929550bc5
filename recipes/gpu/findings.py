"""Rows of findings: each is written as soon as it is known and held against its bound; and how times are taken."""

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHORT = {str(dtype)[6:]: name for name, dtype in DTYPES.items()}  # float32 -> fp32
BOUND = {"fp32": 2e-4, "bf16": 6e-2}  # of the largest value; fp32 without TF32
GIB = 2**30


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether a gap is beyond the bound of its dtype or is no number, or something failed that was not to fail."""
    if "error" in row:
        return not row.get("may_fail", False)
    bound = BOUND.get(SHORT.get(row.get("dtype", ""), row.get("dtype", "")), BOUND["fp32"])
    return "gap" in row and not row["gap"] <= bound  # nan is never within


@dataclass
class Findings:
    """Takes rows: `findings(what="...", gap=...)` appends one to the file.

    Args:
        path: The file, JSON lines.
        device: cuda or cpu.
        part: Name of what is under way.
        wrong: Rows so far that are beyond their bounds.
    """

    path: Path
    device: str
    part: str = ""
    wrong: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, **row: Any) -> None:
        """Write a row, and say it."""
        where = torch.cuda.get_device_name() if self.device == "cuda" else "CPU"
        row = {"part": self.part, "device": where, "torch": torch.__version__, **row}
        bad = is_wrong(row)
        row |= {"wrong": True} if bad else {}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.wrong.extend([row] * bad)
        print(("WRONG " if bad else "") + json.dumps(row), flush=True)

    @contextmanager
    def trying(self, may_fail: bool = False, **row: Any) -> Iterator[None]:
        """Let the block fail: a row with the error is written and what follows goes on.

        Args:
            may_fail: The failure is a finding like others; else it counts as wrong, unless it is a lack of memory.
            row: What the block was to find.
        """
        try:
            yield
        except Exception as error:  # whatever it is: nobody is there to mend it
            lines = str(error).strip().splitlines() or [""]
            lacking = isinstance(error, torch.OutOfMemoryError)
            self(**row, error=f"{type(error).__name__}: {lines[0]}"[:300], may_fail=may_fail or lacking)


def gap(one: Tensor, other: Tensor) -> float:
    """Largest difference over the largest value; nan where any number is."""
    return float((one.float() - other.float()).abs().max() / other.float().abs().max())


def largest(gaps: list[float]) -> float:
    """The largest, or nan where one is."""
    return float(torch.tensor(gaps, dtype=torch.float64).max())


def timed(run: Callable[[], object], device: str, rounds: int) -> float:
    """Median seconds of a call, after two that do not count."""
    times = []
    for _ in range(rounds + 2):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def fresh_memory(device: str) -> None:
    """Let go of models that refer to themselves, and count the device's memory anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def most_memory(device: str) -> float | None:
    """GiB of all tensors at the worst moment since then; None where nothing counts them."""
    return torch.cuda.max_memory_allocated() / GIB if device == "cuda" else None
