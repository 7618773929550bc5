"""Speed of one process with two threads beside two processes with one, and how long a resumed run takes to start.

`python recipes/scale/throughput.py` runs `koff fit` on the bundled model in turn, on the same 14 rows of 256 tokens a
step, and prints the medians of the steps. The last process goes on from the checkpoint of the first; from its start,
imports included, to the beginning of its first step is the start-up. Each figure is told by the clock and by the time
that the process had on a core: on a busy machine only the latter means something.
"""

import argparse
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS, LENGTH = 14, 256
Pair = tuple[float, float]  # seconds by the clock, and on a core


def fit(folder: str, steps: int, world: int, resume: bool) -> None:
    """`koff fit`; rank 0 leaves clock and own time at the beginning of every step and after the last."""
    from koff_lightning.cli import main
    from koff_lightning.training.module import KOFFModule

    times: list[tuple[float, float]] = []

    def note(*_: object) -> None:
        times.append((time.time(), time.process_time()))

    KOFFModule.on_train_batch_start = KOFFModule.on_train_end = note
    trainer = {"max_steps": steps, "limit_val_batches": 0, "limit_test_batches": 1, "accelerator": "cpu"}
    trainer |= {"devices": world, "default_root_dir": folder, "enable_progress_bar": "false", "logger": "false"}
    words = ["fit", "--config", "tiny_12pct.yaml", *(["--config", "hardware/ddp.yaml"] if world > 1 else [])]
    words += [f"--data.batch_size={ROWS // world}", f"--data.seq_len={LENGTH}", "--data.max_train_bytes=60000"]
    words += [
        "--model.loss.kl=2",
        "--export.enabled=false",
        *(f"--trainer.{name}={value}" for name, value in trainer.items()),
    ]
    status = main([*words, *(["--ckpt_path=last"] if resume else [])])
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        Path(folder, "times.json").write_text(json.dumps(times))
    raise SystemExit(status)


def timed(folder: str, steps: int, world: int, resume: bool = False) -> tuple[Pair, list[Pair]]:
    """Start `fit` in as many processes on two threads; clock and own time to the first step, and of each step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "NODE_RANK": "0"}
    place |= {"WORLD_SIZE": str(world)}
    threads = {"OMP_NUM_THREADS": str(2 // world), "OMP_WAIT_POLICY": "passive"}  # threads that wait take no core
    command = [sys.executable, __file__, "--fit", folder, str(steps), str(world), str(int(resume))]
    since = time.time()
    ranks = [place | {"LOCAL_RANK": str(rank)} for rank in range(world)] if world > 1 else [{}]
    running = [subprocess.Popen(command, env=os.environ | threads | rank, stdout=subprocess.DEVNULL) for rank in ranks]
    if any([process.wait() for process in running]):
        raise SystemExit("a run failed")
    times = json.loads(Path(folder, "times.json").read_text())
    steps_of = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(times)]
    return (times[0][0] - since, times[0][1]), steps_of[1:]


def main() -> None:
    """Run in turn and print."""
    parser = argparse.ArgumentParser(description="Throughput of one and of two processes; start-up of a resumed run.")
    parser.add_argument("--fit", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    if options.fit:
        folder, steps, world, resume = options.fit
        fit(folder, int(steps), int(world), resume == "1")
    seconds: dict[int, list[Pair]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.rounds):
            for world in (1, 2):
                start, steps = timed(f"{folder}/{turn}{world}", options.steps, world)
                seconds[world] += steps
                print(f"{world} process(es): start {start[0]:.1f} s, {start[1]:.1f} s of it on a core", flush=True)
        start, _ = timed(f"{folder}/01", options.steps + 2, 1, resume=True)
    clock, own = ({w: statistics.median(step[i] for step in each) for w, each in seconds.items()} for i in range(2))
    print(f"one process, two threads: {ROWS * LENGTH / clock[1]:.0f} tokens/s, {own[1]:.2f} s on cores for a step")
    print(f"two processes, one each: {ROWS * LENGTH / clock[2]:.0f} tokens/s, {own[2]:.2f} s on a core each for a step")
    print(
        f"speed of two beside one: {clock[1] / clock[2]:.2f} by the clock, {own[1] / 2 / own[2]:.2f} by time on cores"
    )
    print(f"start-up of a resumed run: {start[0]:.1f} s, {start[1]:.1f} s on a core")


if __name__ == "__main__":
    main()
