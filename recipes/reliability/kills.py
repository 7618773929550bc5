"""Kill a run of koff-tiny at random moments, resume it each time, and compare its end with that of a run left alone.

    python recipes/reliability/kills.py --kills 200

Prints a line per finished run and the counts for docs/results/reliability.md; the exit status is 1 if any end differs.
Runs are forked from one process that has imported everything, so that an attempt begins in a fraction of a second.
"""

import argparse
import csv
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from koff_lightning.artifact.checkpoint import read_checkpoint
from koff_lightning.cli import main as koff
from koff_lightning.commands.training_cli import KoffCLI  # noqa: F401  imported before the first fork
from koff_lightning.training.checkpoints import newest_checkpoint

LOGGED = ("step", "epoch", "train/", "sparsity/", "penalty/", "val/")  # the other columns are times and memory
OPTIONS = {
    "data": {
        "domains": {"de": "bundled:de", "python": "bundled:python"},
        "seq_len": 64,
        "batch_size": 4,
        "max_train_bytes": 20_000,
        "max_heldout_bytes": 1_500,
    },
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 24,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
        "val_check_interval": 5,
        "enable_progress_bar": False,
    },
    "checkpoint": {"every_n_train_steps": 3},
    "export": {"prove": False},
}


def start(folder: Path) -> int:
    """Begin or resume the run of a folder in a process of its own; returns its id."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    with (folder / "said.txt").open("a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    options = ["--config", str(folder / "run.yaml"), "--trainer.default_root_dir", str(folder / "run")]
    os._exit(koff(["fit", *options, "--ckpt_path", "last"]))


def new(folder: Path) -> Path:
    """A folder with the config of a run."""
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump(OPTIONS))
    return folder


def end_of(folder: Path) -> dict[str, object]:
    """What must not depend on how often a run was killed: trained state, random state, counts, log and figures."""
    run = folder / "run"
    checkpoint = read_checkpoint(newest_checkpoint([run]))
    report = checkpoint["callbacks"]["RunReport"]
    newest = max(run.glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
    with (newest / "metrics.csv").open(newline="") as lines:
        log = [{k: v for k, v in row.items() if k.startswith(LOGGED)} for row in csv.DictReader(lines)]
    results = json.loads((run / "results.json").read_text())
    return {
        "weights": checkpoint["state_dict"],
        "optimizer": checkpoint["optimizer_states"],
        "rates": checkpoint["lr_schedulers"],
        "place": (checkpoint["global_step"], checkpoint["loops"]["fit_loop"]["state_dict"]),
        "history": (report["history"], report["tokens"]),
        "log": log,
        "figures": {key: results[key] for key in ("domains", "mean", "sparsity", "parameters", "tokens", "steps")},
        "artifact": {
            str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob("artifact/**/*.safetensors"))
        },
    }


def same(one: object, other: object) -> bool:
    """Equality to the bit, through dicts, lists and tensors."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def main() -> int:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", default="SIGKILL", help="SIGKILL, SIGTERM, SIGINT or SIGHUP")
    options = parser.parse_args()
    rng, what = random.Random(options.seed), signal.Signals[options.signal]
    torch.set_num_threads(1)
    kills, runs, differing = 0, 0, 0
    with tempfile.TemporaryDirectory() as work:
        since = time.monotonic()
        left_alone = new(Path(work) / "left_alone")
        if os.waitpid(start(left_alone), 0)[1]:
            print((left_alone / "said.txt").read_text())
            return 1
        seconds, reference = time.monotonic() - since, end_of(left_alone)
        print(f"a run left alone takes {seconds:.1f} s", flush=True)
        while kills < options.kills:
            folder = new(Path(work) / f"run_{runs}")
            here, status = 0, -1
            while status:
                child = start(folder)
                delay = rng.uniform(0, 1.05 * seconds) if kills < options.kills else 3600
                until = time.monotonic() + delay
                while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < until:
                    time.sleep(0.005)
                if not done[0]:
                    os.kill(child, what)
                    done = os.waitpid(child, 0)
                    kills, here = kills + 1, here + 1
                status = done[1]
                if os.WIFEXITED(status) and os.WEXITSTATUS(status) not in (0, 128 + what):
                    print((folder / "said.txt").read_text()[-4000:])
                    return 1
            end = end_of(folder)
            odd = [part for part in reference if not same(reference[part], end[part])]
            runs, differing = runs + 1, differing + bool(odd)
            verdict = f"differs in {', '.join(odd)}" if odd else "the same to the bit"
            print(f"run {runs}: {here} kills; {verdict}", flush=True)
    print(f"{options.signal}: {kills} kills over {runs} runs; {differing} ended otherwise than the run left alone")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
