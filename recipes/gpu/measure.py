"""Measure a config on GPUs and put the figures into docs/results/gpu.md; nobody has run it yet.

    python recipes/gpu/measure.py --config llama31_8b_12pct.yaml                     # one GPU
    torchrun --nproc-per-node 8 recipes/gpu/measure.py --config llama31_8b_12pct.yaml --config hardware/fsdp.yaml

Runs `koff fit` for some steps, without export, and notes on every rank the largest memory that torch has allocated and
reserved and the time of each step; rank 0 writes a row. What `koff plan` says of the same stands beside it. Text comes
from the config; further options follow a lone `--`. The options `--trainer.devices` and `--trainer.num_nodes` are taken
from torchrun.
"""

import argparse
import itertools
import os
import statistics
import time
from pathlib import Path

import torch

from koff_lightning.cli import main as koff
from koff_lightning.commands.plan import planned
from koff_lightning.support import ranks
from koff_lightning.training.module import KOFFModule

PAGE = Path(__file__).parents[2] / "docs/results/gpu.md"
HEAD = """# Measured on GPUs

By `recipes/gpu/measure.py`. Memory is the largest over ranks, in GiB: what tensors took, what torch held of the device,
and what `koff plan` had said of the tensors.

| GPU | ranks | command | tokens/s | tensors | held | plan |
|---|---|---|---|---|---|---|
"""


def measure(words: list[str], steps: int) -> tuple[float, list[float]]:
    """Run; the median step in seconds and the largest memory of any rank, bytes allocated and reserved."""
    times: list[float] = []
    memory: list[list[float]] = []

    def note(*_: object) -> None:
        torch.cuda.synchronize()
        times.append(time.perf_counter())

    def end(_: KOFFModule) -> None:
        memory.extend(ranks.gather([torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]))

    KOFFModule.on_train_batch_start = note
    KOFFModule.on_train_end = end
    options = ["--export.enabled=false", "--trainer.accumulate_grad_batches=1", f"--trainer.max_steps={steps}"]
    options += ["--trainer.limit_val_batches=0", "--trainer.limit_test_batches=1", "--trainer.logger=false"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        nodes = int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
        options += [f"--trainer.devices={os.environ['LOCAL_WORLD_SIZE']}", f"--trainer.num_nodes={nodes}"]
    if status := koff(["fit", *words, *options]):
        raise SystemExit(status)
    seconds = [later - sooner for sooner, later in itertools.pairwise(times)]
    return statistics.median(seconds), [max(each) for each in zip(*memory, strict=True)]


def main() -> None:
    """Measure, and add a row on rank 0."""
    parser = argparse.ArgumentParser(description="Speed and memory of a config on the GPUs that are here.")
    parser.add_argument("--config", action="append", required=True)
    parser.add_argument("--steps", type=int, default=20)
    options, further = parser.parse_known_args()
    words = [*(word for name in options.config for word in ("--config", name)), *(w for w in further if w != "--")]
    second, (allocated, reserved) = measure(words, options.steps)
    if int(os.environ.get("RANK", 0)):
        return
    world = int(os.environ.get("WORLD_SIZE", 1))
    tokens, total = planned(words, world)
    figures = [f"{tokens * world / second:,.0f}", *(f"{size / 2**30:.1f}" for size in (allocated, reserved, total))]
    row = " | ".join([torch.cuda.get_device_name(), str(world), f"`{' '.join(words)}`", *figures])
    PAGE.write_text((PAGE.read_text() if PAGE.exists() else HEAD) + f"| {row} |\n")
    print(row)


if __name__ == "__main__":
    main()
