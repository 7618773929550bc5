"""Speed of one process with two threads beside two processes with one, and how long a resumed run takes to start.

`python recipes/scale/throughput.py` runs `koff fit` on the bundled model in turn, on the same 14 rows of 256 tokens a
step, and prints the medians of the steps. The last process goes on from the checkpoint of the one before; from its
start, imports included, to the beginning of its first step is the start-up.
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


def fit(folder: str, steps: int, world: int, resume: bool) -> None:
    """`koff fit`; rank 0 leaves the beginning of every step and the end of the last in `folder/times.json`."""
    from koff_lightning.cli import main
    from koff_lightning.module import KOFFModule

    times: list[float] = []
    KOFFModule.on_train_batch_start = lambda *_: times.append(time.time())
    KOFFModule.on_train_end = lambda *_: times.append(time.time())
    trainer = {"max_steps": steps, "limit_val_batches": 0, "limit_test_batches": 1, "accelerator": "cpu"}
    trainer |= {"devices": world, "default_root_dir": folder, "enable_progress_bar": "false", "logger": "false"}
    words = ["fit", "--config", "tiny_12pct.yaml", *(["--config", "hardware/ddp.yaml"] if world > 1 else [])]
    words += [f"--data.batch_size={ROWS // world}", f"--data.seq_len={LENGTH}", "--data.max_train_bytes=400000"]
    words += ["--export.enabled=false", *(f"--trainer.{name}={value}" for name, value in trainer.items())]
    status = main([*words, *(["--ckpt_path=last"] if resume else [])])
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        Path(folder, "times.json").write_text(json.dumps(times))
    raise SystemExit(status)


def timed(folder: str, steps: int, world: int, resume: bool = False) -> tuple[float, list[float]]:
    """Start `fit` in as many processes on two threads; seconds to the first step, and of each step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "NODE_RANK": "0"}
    place |= {"WORLD_SIZE": str(world), "OMP_NUM_THREADS": str(2 // world)}
    command = [sys.executable, __file__, "--fit", folder, str(steps), str(world), str(int(resume))]
    since = time.time()
    ranks = [place | {"LOCAL_RANK": str(rank)} for rank in range(world)] if world > 1 else [{"OMP_NUM_THREADS": "2"}]
    running = [subprocess.Popen(command, env=os.environ | rank, stdout=subprocess.DEVNULL) for rank in ranks]
    if any([process.wait() for process in running]):
        raise SystemExit("a run failed")
    times = json.loads(Path(folder, "times.json").read_text())
    return times[0] - since, [later - sooner for sooner, later in itertools.pairwise(times)]


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
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.rounds):
            for world in (1, 2):
                start, steps = timed(f"{folder}/{turn}{world}", options.steps, world)
                seconds[world] += steps[2:-1]
                print(f"{world} process(es): start {start:.1f} s, median step {statistics.median(steps[2:-1]):.3f} s")
        speed = {world: ROWS * LENGTH / statistics.median(each) for world, each in seconds.items()}
        start, _ = timed(f"{folder}/01", options.steps + 2, 1, resume=True)
    print(f"one process, two threads    {speed[1]:7.0f} tokens/s")
    print(f"two processes (DDP)         {speed[2]:7.0f} tokens/s, {speed[2] / speed[1]:.2f} of one process")
    print(f"start-up of a resumed run   {start:7.1f} s")


if __name__ == "__main__":
    main()
